"""Run by test_xla.py in a process of its own: torch-xla's SPMD mode is process-wide. Arguments: devices, executions."""

import resource
import sys
import threading

import psutil
import pytest
import torch
import torch_xla
from torch.fx.experimental.proxy_tensor import make_fx

from torchways.capture.lowering.decompositions import taken_apart
from torchways.capture.lowering.kept_whole import KEPT, TAKEN_APART
from torchways.controller.checks import operator_name
from torchways.errors import CaptureError, InternalError
from torchways.graphs import serialize_graph
from torchways.runtime.base import BufferSpec
from torchways.runtime.xla import XlaRuntime

NUM_DEVICES, NUM_EXECUTIONS = int(sys.argv[1]), int(sys.argv[2])
SPLIT = "S(0)" if NUM_DEVICES > 1 else "R"


def spec(dtype, *shape, placement="R"):
    return BufferSpec(dtype=dtype, shape=shape, placements=(placement,), mesh=(NUM_DEVICES,))


def graph(function, *arguments):
    return serialize_graph(make_fx(function, tracing_mode="fake")(*arguments).graph)


def read(runtime, buffer):
    wait(runtime, [buffer])
    return runtime.to_host(buffer)


def wait(runtime, buffers):
    ready = threading.Event()
    runtime.on_ready(buffers, ready.set)
    for _ in range(100_000):
        runtime.progress()
        if ready.wait(0.001):
            return
    raise AssertionError("the computation never ended")


def check_values(runtime):
    """Constants, unused inputs, inputs passed through, repeated outputs, and reductions over what is split."""

    def function(p, x, unused, same):
        doubled = x * 2
        return p + x.sum(), doubled, same, torch.arange(4), doubled, x.argmax()

    x, p = torch.randn(8, 6), torch.tensor(1.0)
    data = graph(function, p, x, torch.empty(3), torch.empty(2))
    inputs = [spec("float32"), spec("float32", 8, 6, placement=SPLIT), spec("float32", 3), spec("float32", 2)]
    split = spec("float32", 8, 6, placement=SPLIT)
    outputs = [spec("float32"), split, spec("float32", 2), spec("int64", 4), split, spec("int64")]
    executable = runtime.compile(data, inputs, outputs, [])
    same = torch.tensor([5.0, 6.0])
    values = [runtime.put(v, s) for v, s in zip((p, x, torch.zeros(3), same), inputs, strict=True)]
    made, computed = runtime.execute(executable, values)
    assert not any(buffer is value for buffer in computed for value in values)
    results = [read(runtime, buffer) for buffer in made]
    for result, expected in zip(results, function(p, x, None, same), strict=True):
        torch.testing.assert_close(result, expected)
    assert runtime.compile(data, inputs, outputs, []) is executable


def check_placements_of_copies(runtime):
    """Copies of inputs, inputs themselves and equal outputs, with other placements than they have elsewhere."""

    def function(x, y):
        total = x + y
        return x.clone(), y.clone(), x, y, total, total, x.detach().clone() * 1

    x, y = torch.randn(8, 6), torch.randn(8, 6)
    whole, split = spec("float32", 8, 6), spec("float32", 8, 6, placement=SPLIT)
    outputs = [split, whole, split, whole, whole, split, split]
    executable = runtime.compile(graph(function, x, y), [whole, split], outputs, [])
    made, _ = runtime.execute(executable, [runtime.put(x, whole), runtime.put(y, split)])
    for buffer, expected, output in zip(made, function(x, y), outputs, strict=True):
        torch.testing.assert_close(read(runtime, buffer), expected)
        if NUM_DEVICES > 1:
            [places] = torch_xla._XLAC._get_local_shard_replica_and_indices([buffer])
            assert (places[0][1] is Ellipsis) == (output is whole)


def check_copies(runtime):
    for dtype in (torch.float64, torch.int32, torch.bool, torch.bfloat16, torch.int64, torch.uint8):
        value = torch.tensor([[0, 1], [2, 3]]).to(dtype)
        for host in (value, value[0, 1], value[:0]):
            back = read(runtime, runtime.put(host, spec(str(dtype).removeprefix("torch."), *host.shape)))
            assert back.dtype == dtype
            assert torch.equal(back, host)
    split = torch.randn(8, 3)
    assert torch.equal(read(runtime, runtime.put(split, spec("float32", *split.shape, placement=SPLIT))), split)


def check_soak_and_donation(runtime):
    """A chain with a collective in each link, all in flight; the donated state is always in the same memory."""
    size = 1_000_000
    data = graph(lambda p, x: (p + x.mean(),), torch.empty(size), torch.empty(8, 1000))
    inputs = [spec("float32", size), spec("float32", 8, 1000, placement=SPLIT)]
    executable = runtime.compile(data, inputs, inputs[:1], [0])
    state, x = runtime.fill(inputs[0], 0.0), runtime.put(torch.ones(8, 1000), inputs[1])
    resident = []
    for number in range(NUM_EXECUTIONS):
        [state], _ = runtime.execute(executable, [state, x])
        if number in (NUM_EXECUTIONS // 10, NUM_EXECUTIONS - 1):
            resident.append(psutil.Process().memory_info().rss)
    assert read(runtime, state)[0] == NUM_EXECUTIONS
    assert resident[1] < 1.05 * resident[0] + 16 * 4 * size, resident


def check_products_of_what_is_updated_in_place(runtime):
    """XNNPACK keeps what it packed of a matrix that is still at the same address."""
    size = 512
    whole = spec("float32", size, size)
    for product in (lambda x, w: (x @ w,), lambda x, w: (x @ w.t(),)):
        x, w, change = torch.randn(3, size, size)
        multiply = runtime.compile(graph(product, x, w), [whole, whole], [whole], [])
        update = runtime.compile(graph(lambda w, change: (w + change,), w, change), [whole, whole], [whole], [0])
        inputs, weight, step = runtime.put(x, whole), runtime.put(w.clone(), whole), runtime.put(change, whole)
        for _ in range(4):
            [found], _ = runtime.execute(multiply, [inputs, weight])
            torch.testing.assert_close(read(runtime, found), product(x, w)[0], rtol=1e-3, atol=1e-3)
            [weight], _ = runtime.execute(update, [weight, step])
            w = w + change


def check_independent_chains(runtime):
    """Collectives of computations that do not wait for each other, in flight at the same time."""
    data = graph(lambda p, x: (p + (x @ x.T).mean() + x.sum(0).mean(),), torch.empty(1000), torch.empty(64, 64))
    inputs = [spec("float32", 1000), spec("float32", 64, 64, placement=SPLIT)]
    executable = runtime.compile(data, inputs, inputs[:1], [])
    states = [runtime.fill(inputs[0], 0.0) for _ in range(8)]
    x = runtime.put(torch.ones(64, 64), inputs[1])
    for number in range(NUM_EXECUTIONS):
        [states[number % 8]], _ = runtime.execute(executable, [states[number % 8], x])
    for number, state in enumerate(states):
        assert read(runtime, state)[0] == 128 * len(range(number, NUM_EXECUTIONS, 8))


def check_ends_of_donated(runtime):
    """Who waits for a computation hears of its end although all its outputs are donated to the next one at once."""
    size = 100_000
    data = graph(lambda p: (p + 1,), torch.empty(size))
    executable = runtime.compile(data, [spec("float32", size)], [spec("float32", size)], [0])
    state = runtime.fill(spec("float32", size), 0.0)
    ended = [threading.Event() for _ in range(10)]
    for event in ended:
        [state], computed = runtime.execute(executable, [state])
        runtime.on_ready(computed, event.set)
    assert read(runtime, state)[0] == 10
    assert all(event.wait(10) for event in ended)


def check_operators(runtime):
    names = set(runtime.lowered_ops())
    assert {"aten::add.Tensor", "aten::mm", "aten::native_layer_norm"} <= names
    assert names.isdisjoint({"aten::native_layer_norm_backward", "aten::_linalg_det"})
    assert runtime.fallback_counters() == {}
    data = graph(lambda x: (torch.linalg.det(x),), torch.eye(4))
    with pytest.raises(CaptureError, match="would run on the host"):
        runtime.compile(data, [spec("float32", 4, 4)], [spec("float32")], [])


def check_kept_operators(runtime):
    """Each core decomposition of an operator that torch-xla has a kernel for is left out, or has a reason."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    lowered = set()
    for operator in taken_apart():
        if isinstance(operator, torch._ops.OpOverload) and not operator._schema.is_mutable:
            name = operator_name(operator)
            if has_kernel(name, "XLA") and not operator._can_decompose():
                lowered.add(name.removeprefix("aten::"))
    reasoned = [name for names in TAKEN_APART.values() for name in names]
    assert len(reasoned) == len(set(reasoned))
    assert KEPT.isdisjoint(reasoned)
    assert lowered == KEPT | set(reasoned)


def check_memory_of_compilation(runtime):
    """On one device, what is compiled takes no memory for its arguments."""
    size, count = 8192, 8
    arguments = [torch.empty(size, size) for _ in range(count)]
    data = graph(lambda *values: (sum(values).sum(),), *arguments)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    runtime.compile(data, [spec("float32", size, size)] * count, [spec("float32")], [])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    assert grown < arguments[0].nbytes, grown


def check_other_results(runtime):
    """An operator that makes complex numbers of what PyTorch makes real ones is refused: it computes something else."""
    shape = ("complex64", 3)
    data = graph(lambda left, right: (torch.dist(left, right),), *torch.zeros(2, 3, dtype=torch.complex64))
    with pytest.raises(CaptureError, match=r"dist.* makes c64 of shape .* and torch.float32"):
        runtime.compile(data, [spec(*shape), spec(*shape)], [spec("float32")], [])


def check_failed_launch(runtime):
    """A launch that torch-xla fails to make raises its reason, where what waits for it would wait for ever."""
    data = graph(lambda x: (x * 2,), torch.empty(4))
    executable = runtime.compile(data, [spec("float32", 4)], [spec("float32", 4)], [])
    wrong = runtime.fill(spec("float32", 3), 0.0)
    # On several devices the next call that passes the device lock raises it, on one a look after two seconds.
    with pytest.raises((InternalError, RuntimeError), match="Executable expected parameter"):
        wait(runtime, runtime.execute(executable, [wrong])[1])


def main():
    runtime = XlaRuntime(NUM_DEVICES)
    check_values(runtime)
    check_copies(runtime)
    check_placements_of_copies(runtime)
    check_soak_and_donation(runtime)
    check_products_of_what_is_updated_in_place(runtime)
    check_independent_chains(runtime)
    check_ends_of_donated(runtime)
    check_operators(runtime)
    check_kept_operators(runtime)
    if NUM_DEVICES == 1:
        check_memory_of_compilation(runtime)
    check_other_results(runtime)
    check_failed_launch(runtime)  # the last: nothing can be launched after it
    print("all right")


main()

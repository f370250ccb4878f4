"""The public functions of torchways; `import torchways as tw` shows all of them.

With TORCHWAYS_EAGER=1 the same calls run everything as plain PyTorch in this process, so that breakpoints work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.decompositions import decomposition_table
from torchways.config import ClusterConfig
from torchways.controller.buckets import Buckets, Padding, PadValue
from torchways.controller.buffers import get_all
from torchways.controller.control_flow import run_cond, run_while_loop
from torchways.controller.function import make_function, make_parallel, make_pipeline
from torchways.controller.generation import run_generate
from torchways.controller.generation_options import merged, num_new_tokens, repeated, token_choice
from torchways.controller.loop import LoopThread
from torchways.controller.parity.report import ParityReport
from torchways.controller.parity.report import parity as parity_mode
from torchways.controller.program import ProgramFunction
from torchways.controller.redistribute import distribute
from torchways.controller.scan import loop_in_python, loop_length, run_scan
from torchways.controller.session import Session
from torchways.controller.variant import Dispatch
from torchways.controller.variants import MAX_VARIANTS, VariantOptions
from torchways.errors import ConfigError, SessionClosed, UserError
from torchways.ids import IslandId
from torchways.launch.embedded import start_cluster
from torchways.mesh import VirtualSlice, check_mesh, normalize_placements
from torchways.observability.process import setup_logging
from torchways.observability.trace import write_chrome_trace
from torchways.parallel.pipeline import SplitPoint, add_stages
from torchways.parallel.plans import PlanOrMaker, placements_of, plan_of
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.rpc.clients import ClusterInfo, ExecutorStatus, IslandInfo, ManagerClient

ADDRESS_VARIABLE = "TORCHWAYS_ADDRESS"
EAGER_VARIABLE = "TORCHWAYS_EAGER"

_session: Session | None = None
#: Eager mode: the cluster that was asked for, between init and shutdown.
_eager_config: ClusterConfig | None = None


class _Scope:
    """What `init` returns: a context manager that shuts down at its end."""

    def __enter__(self) -> _Scope:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutdown()


def is_eager() -> bool:
    """Whether TORCHWAYS_EAGER=1 asks for plain PyTorch in this process."""
    return os.environ.get(EAGER_VARIABLE, "") not in ("", "0")


def init(
    address: str | None = None,
    *,
    islands: int = 2,
    devices_per_island: int = 2,
    hosts_per_island: int = 1,
    platform: str = "cpu",
    memory_budget: int | None = None,
    memory_wait: timedelta | None = None,
    log_level: str = "warning",
    start_timeout: timedelta | None = None,
) -> _Scope:
    """Joins a cluster, or starts one on this machine; use it as a context manager, or call `shutdown`.

    Args:
        address: host:port of a resource manager. None: the one that `twrun` started (TORCHWAYS_ADDRESS), else an
            embedded cluster of this process, which ends with it, however it ends.
        islands, devices_per_island, hosts_per_island, platform: of the embedded cluster; see `ClusterConfig`.
        memory_budget: bytes that buffers may take on each device; a computation that needs more waits until others
            are done, and what can never fit is refused.
        memory_wait: how long a computation may wait for memory while nothing runs that could free some.
        log_level: of this process and of the embedded cluster: debug, info, warning or error.
        start_timeout: longest wait for the cluster, and for each slice, to be ready.

    On TPU (untested on hardware) TORCHWAYS_COMPILATION_CACHE in the environment names a folder in which executors keep
    what they compiled, for later runs. torch-xla's CPU client cannot load such files.

    Raises:
        ConfigError: a setting is out of range, or there is no token for `address`.
        ClusterLost: the cluster cannot be reached.
        UserError: there is a session already.
    """
    global _session, _eager_config
    if _session is not None and not _session.closed:
        raise UserError("tw.init() was called already; call tw.shutdown() first")
    settings = {"start_timeout": start_timeout, "memory_wait": memory_wait}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    config = ClusterConfig(
        islands=islands,
        devices_per_island=devices_per_island,
        hosts_per_island=hosts_per_island,
        platform=platform,
        memory_budget=memory_budget,
        log_level=log_level,
        **given,
    )
    if is_eager():
        _eager_config = config
        return _Scope()
    os.environ.setdefault("TORCHWAYS_LOG_LEVEL", log_level)
    setup_logging("controller")
    threading.Thread(target=decomposition_table, name="torchways-prepare", daemon=True).start()  # seconds, at first
    address = address or os.environ.get(ADDRESS_VARIABLE)
    end_cluster: Callable[[], None] | None = None
    token = os.environ.get(TOKEN_VARIABLE, "")
    if address is None:
        cluster = start_cluster(config)
        address, token, end_cluster = cluster.address, cluster.token, cluster.close
    elif not token:
        raise ConfigError(f"no token for the cluster at {address}: set {TOKEN_VARIABLE}; twrun sets it by itself")
    loop = LoopThread("torchways-session")
    session = Session(
        manager=loop.run(_make_manager(address, token)),
        loop=loop,
        token=token,
        start_timeout=config.start_timeout,
        end_cluster=end_cluster,
    )
    try:
        session.start()
    except BaseException:
        session.close()
        raise
    _session = session
    atexit.register(session.close)
    return _Scope()


async def _make_manager(address: str, token: str) -> ManagerClient:
    return ManagerClient(address, token)


def shutdown() -> None:
    """Ends the session, and the cluster if `init` started it. Arrays can no longer be read. Idempotent."""
    global _session, _eager_config
    _eager_config = None
    session, _session = _session, None
    if session is not None:
        atexit.unregister(session.close)
        session.close()


def _current() -> Session:
    if _session is None:
        raise SessionClosed("there is no session: call tw.init() first")
    return _session


def init_device_mesh(
    shape: Sequence[int], *, mesh_dim_names: Sequence[str] | None = None, island: int | None = None
) -> VirtualSlice:
    """Asks for a virtual slice: a mesh of devices of one island. Returns before its executors are ready.

    Args:
        shape: size of each mesh axis.
        mesh_dim_names: name of each axis. "dp" is special: programs split host tensors along it.
        island: island to take it from; None: the resource manager chooses.

    Raises:
        ResourceExhausted: the island does not have that many devices.
        PlacementError: shape, names or island make no sense.
    """
    if is_eager():
        shape, names = check_mesh(shape, mesh_dim_names)
        return VirtualSlice(shape=shape, mesh_dim_names=names, island=IslandId(island or 0))
    return _current().init_device_mesh(shape, mesh_dim_names, island)


def function(
    target: Any = None,
    *,
    mesh: VirtualSlice,
    buckets: Buckets | None = None,
    pad_value: PadValue = 0,
    max_variants: int = MAX_VARIANTS,
) -> Any:
    """Makes a function, an `nn.Module` class or a module a compiled function on `mesh`; also as a decorator.

    Called inside a program it is one node of it. Called outside it is a program of one node: it returns arrays at
    once and computes no gradients. An argument that lives on another slice is transferred to `mesh`. A module's
    state lives on the slice; `state_dict()` reads it back.

    Args:
        target: what is decorated.
        mesh: slice that it runs on.
        buckets, pad_value, max_variants: for calls outside a program; see `program`.

    Raises:
        ConfigError: buckets make no sense.
        UserError: `target` is none of these.
    """
    if target is None:
        return lambda actual: function(
            actual, mesh=mesh, buckets=buckets, pad_value=pad_value, max_variants=max_variants
        )
    options = _variant_options(buckets, pad_value, max_variants)
    return target if is_eager() else make_function(target, mesh, _current, options)


def _variant_options(buckets: Buckets | None, pad_value: PadValue, max_variants: int) -> VariantOptions:
    return VariantOptions(max_variants, Padding(buckets, pad_value) if buckets else None)


def program(
    target: Callable[..., Any] | None = None,
    *,
    mesh: VirtualSlice | None = None,
    dispatch: Dispatch = "parallel",
    buckets: Buckets | None = None,
    pad_value: PadValue = 0,
    max_variants: int = MAX_VARIANTS,
) -> Any:
    """Decorates a function that calls compiled functions, modules, `backward()` and optimizers: one dataflow program.

    It is traced once for each combination of argument shapes, then dispatched whole; calls return at once. Host
    tensors among the arguments are split on dimension 0 over the mesh axis named "dp". What it reads of Python's state
    is a condition of the trace: where that changed, a call traces again. Hyperparameters of optimizers, and numbers
    that change, are inputs. What it writes to Python's state, each run writes.

    Args:
        target: the function.
        mesh: slice of all that no compiled function or pipeline stage places.
        dispatch: "parallel" sends the whole program in one message an island, so that the control plane runs ahead of
            the data; "sequential" dispatches each computation when the one before is over, for comparison.
        buckets: sizes that dimensions of host tensors are padded to, at the end, by argument:
            ``{"x": {1: [64, 128, 256]}, "labels": {1: [64, 128, 256]}}``. A dict's items are named
            ``"batch['input_ids']"``; the name of what holds tensors stands for all of them. Calls of any size need as
            many traces and executables as there are buckets. What is returned keeps the padded sizes: pad the mask too
            (with 0), or labels with the loss's ``ignore_index``, and cut what you read. Arrays, calls within another
            program and eager mode are not padded.
        pad_value: what is padded with: one number, or one for an argument's name, 0 for others.
        max_variants: traces to keep, with their executables; the least recently used is forgotten first.

    A function whose graph depends on values (data-dependent shapes, `tw.cond`) cannot be traced; it runs node by node
    instead, without gradients, and a warning says why.

    Raises (when called):
        ShapeError: an argument is larger than its largest bucket.
        CaptureError: the function cannot be captured; the message names its line.
        PlacementError: nothing says where it runs, or an argument cannot be split.
    """
    if target is None:
        return lambda actual: program(
            actual,
            mesh=mesh,
            dispatch=dispatch,
            buckets=buckets,
            pad_value=pad_value,
            max_variants=max_variants,
        )
    options = _variant_options(buckets, pad_value, max_variants)
    return target if is_eager() else ProgramFunction(target, mesh, _current, dispatch, options=options)


def parity(*, rtol: float | None = None, atol: float | None = None) -> contextlib.AbstractContextManager[ParityReport]:
    """Compares programs that are called inside with eager PyTorch, node by node; TORCHWAYS_PARITY=1 does so for all.

    Every node (a compiled function, a transfer, a sum, an argument on its way to its slice) runs on its slice as
    always, and once more with plain PyTorch on the CPU, from the same inputs. What a call returns and changes is what
    it would without. But it waits for all values, holds all of them and donates none, so it needs more memory. One line
    is logged for each call. Random operators are not compared: what they drew is taken for given.

    An element agrees if its error is at most ``atol + rtol * abs(expected)``. A value with elements that do not is
    still taken for right if it is no more than ten times as far from what float64 gives as eager PyTorch's is, or if
    each operator of its node agrees by itself and all together give it: then rounding has grown.

    Args:
        rtol, atol: None: torch.testing.assert_close's for each dtype. Integers and bools must be equal.

    Returns:
        a context manager; its value, a `ParityReport`, says what was compared and the largest error of each dtype.

    Raises (a call inside):
        ParityError: names the first node that diverges, the first operator of it that does so by itself, the user's
            lines and the errors. Parameters, optimizer state and all else stay as before the call.
    """
    return parity_mode(rtol=rtol, atol=atol)


def cond(
    predicate: Any,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: Sequence[Any] = (),
    *,
    mesh: VirtualSlice | None = None,
) -> Any:
    """Runs `true_fn` or `false_fn` on arrays, by the value of an array; spelled as torch.cond.

    The controller waits for the predicate, then dispatches the chosen branch as a program, and returns at once. A
    program that calls it runs node by node (see `program`). No gradients flow through it. A function is traced once
    for each combination of shapes as long as it lives: define branches once, not anew for each call.

    Args:
        predicate: an array or tensor of one element, or a bool.
        true_fn, false_fn: called with the operands.
        operands: arrays, tensors or other values.
        mesh: slice of what nothing else places.

    Raises:
        ShapeError: the predicate has more than one element.
    """
    if is_eager():
        return (true_fn if bool(predicate) else false_fn)(*operands)
    return run_cond(predicate, true_fn, false_fn, operands, mesh, _current)


def while_loop(
    cond_fn: Callable[..., Any],
    body_fn: Callable[..., Any],
    operands: Sequence[Any],
    *,
    mesh: VirtualSlice | None = None,
) -> tuple[Any, ...]:
    """Runs `body_fn` on arrays as long as `cond_fn` of them is true; spelled as torch.while_loop.

    Both are dispatched as programs; the controller waits for each condition. No gradients flow through it.

    Args:
        cond_fn: called with the operands; returns an array of one element, or a bool.
        body_fn: called with the operands; returns their next values, of the same shapes and dtypes.
        operands: the first values.
        mesh: slice of what nothing else places.

    Returns:
        the operands for which `cond_fn` was false.

    Raises:
        ShapeError: the condition has more than one element, or the body changes a shape or dtype.
    """
    if is_eager():
        state = tuple(operands)
        while bool(cond_fn(*state)):
            result = body_fn(*state)
            state = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        return state
    return run_while_loop(cond_fn, body_fn, operands, mesh, _current)


def scan(
    combine_fn: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    mesh: VirtualSlice | None = None,
    donate: bool = False,
) -> tuple[Any, list[Any]]:
    """Runs `combine_fn` on a carry a known number of times, as one program; spelled as torch's and JAX's scan.

    The body is traced once, and all turns are dispatched in one message an island: nothing returns to the controller
    between them. From turn to turn the carry's memory is used again. Called inside a program it is a Python loop of
    the trace, through which gradients flow; outside it computes none. Keep `combine_fn`, it is traced once as long as
    it lives; and keep `length` to tens or hundreds, since the program's size grows with it.

    Args:
        combine_fn: called as ``combine_fn(carry, x)``; returns the next carry and the turn's `y`. What it writes in
            place to arrays that it does not get as arguments is seen by the next turn.
        init: the first carry: a pytree of tensors, whose shapes and dtypes stay the same from turn to turn. Other
            leaves are constants.
        xs: pytree of tensors that each turn gets a row of, along dimension 0; None: `length` says how many turns.
        length: number of turns.
        mesh: slice of what nothing else places.
        donate: gives up the arrays of `init`: the first turn uses their memory too, and they cannot be read any more.

    Returns:
        The last carry, and the list of each turn's `y`, whose arrays can be read as soon as their turn is over
        (unlike torch's and JAX's, which stack them).

    Raises:
        ShapeError: `xs` and `length` do not agree, or the body changes the structure, shapes or dtypes of the carry.
    """
    if is_eager():
        return loop_in_python(combine_fn, init, xs, loop_length(xs, length))
    return run_scan(combine_fn, init, xs, length, mesh, donate, _current)


def generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    num_return_sequences: int | None = None,
    generation_config: Any = None,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    tokens_per_dispatch: int = 16,
    **options: Any,
) -> torch.Tensor:
    """Continues prompts with a causal language model of `transformers`; spelled as its `generate`.

    Greedy tokens are those of `model.generate` on the CPU, up to rounding: prompt and decoding step are one compiled
    function each, with a static key-value cache that stays on the slice (split over the batch on the axis "dp" and
    over heads on other axes). Cache lengths are rounded up to 64 and prompts padded on the left, to one of at most four
    lengths between two powers of two, so that prompts of many lengths share what is compiled. (Not for models whose
    `forward` takes no `position_ids`, nor where it would leave no room for the new tokens.)

    Args:
        model: placed by `tw.function` or `tw.parallelize_module`; call `model.eval()` first.
        input_ids: prompts, int64[batch, length], padded on the left.
        attention_mask: 0 for padding, [batch, length]; None: there is none.
        max_new_tokens: tokens to add; fewer if all rows end before.
        max_length: of prompt and new tokens, where `max_new_tokens` is not given.
        do_sample: draw tokens; else take the likeliest one.
        temperature, top_k, top_p: transformers' logits warpers of these names, for sampling; None: left out.
        eos_token_id: tokens that end a row, () for none; None: those of `model.generation_config`, if it has some.
        pad_token_id: fills up rows that have ended; None: that of `model.generation_config`, else the first of
            `eos_token_id`.
        num_return_sequences: continuations of each prompt, one behind the other; more than one for sampling and beam
            search only.
        generation_config: of transformers: the options where the call does not name them. What neither names is taken
            from `model.generation_config`, as in transformers.
        generator: what tokens are drawn with, on the host; None: PyTorch's default one (`torch.manual_seed`).
            The same state gives the same tokens, whatever `tokens_per_dispatch` is.
        streamer: gets the prompt, then the tokens of each step [batch] as soon as they are there, by `put`, and a call
            of `end`: any of transformers' streamers.
        tokens_per_dispatch: tokens in one message to the island. One message is ahead of the tokens that are looked at:
            up to as many steps are computed in vain after all rows have ended.
        options: further ones of transformers' `generate`. Taken, and computed by its own processors: `min_new_tokens`,
            `min_length`, `repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`, `sequence_bias`,
            `suppress_tokens`, `begin_suppress_tokens`, `min_p`, `typical_p`, `epsilon_cutoff`, `eta_cutoff`,
            `remove_invalid_values`, `logits_processor`, `stopping_criteria`, and for beam search `num_beams`,
            `length_penalty` and `early_stopping`. All others are refused by name, unless they have no effect.
            Processors and criteria of your own are traced once: they compute with tensors, and see `input_ids[:, -n:]`
            and `input_ids[:, -n]` only. Pass the same objects to each call: new ones are traced and compiled anew.

    Returns:
        Prompts and new tokens, int64[batch, length + new], on the host.

    Raises:
        UserError: the model is on no slice, the tokens do not fit its positions, padding is on the right, or an option
            is none of these.
        ShapeError: `input_ids` or `attention_mask` have a shape that is none.
    """
    given = merged(
        {
            "max_new_tokens": max_new_tokens,
            "max_length": max_length,
            "do_sample": do_sample,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "num_return_sequences": num_return_sequences,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        },
        generation_config,
        getattr(model, "generation_config", None),
        options,
    )
    choice = token_choice(given, streams=streamer is not None)
    num_tokens = num_new_tokens(given["max_new_tokens"], given["max_length"], input_ids.shape[-1])
    num_rows = given["num_return_sequences"] if choice.beams is None else choice.beams.num_beams
    input_ids, attention_mask = repeated(input_ids, attention_mask, num_rows, choice.do_sample or bool(choice.beams))
    return run_generate(
        model,
        input_ids,
        attention_mask,
        num_tokens,
        choice,
        generator,
        streamer,
        tokens_per_dispatch,
        None if is_eager() else _current,
    )


def pipeline(
    module: torch.nn.Module | Callable[[], torch.nn.Module],
    *,
    split_spec: Mapping[str, SplitPoint],
    meshes: Sequence[VirtualSlice],
    plan: PlanOrMaker | None = None,
) -> Any:
    """Splits a module into stages, each on a slice of its own; returns the module itself.

    Its parameters become arrays and stay the same objects: an optimizer that has them already goes on with them.

    Args:
        module: any module, or a function that builds one, which is then initialised on the slices (see
            `parallelize_module`); its parameters are on the stage of their submodule, in the order of registration.
        split_spec: names of submodules at which a new stage begins, in the order in which they run.
        meshes: slice of each stage: one more than split points.
        plan: how parameters are split over the axes of their stage's slice, as for `parallelize_module`; then all
            meshes have the same axes.

    Raises:
        PlacementError: a name does not exist, the numbers do not fit, or the plan does not.
    """
    if is_eager():
        module = module if isinstance(module, torch.nn.Module) else module()
        add_stages(module, split_spec, meshes)
        return module
    return make_pipeline(module, split_spec, meshes, plan, _current)


def parallelize_module(
    module: torch.nn.Module | Callable[[], torch.nn.Module], mesh: VirtualSlice, plan: PlanOrMaker | None = None
) -> Any:
    """Places a module on `mesh`, its parameters split as a plan says; returns the module itself.

    Within a program forward and backward are one computation, and an optimizer's update another. Parameters become
    arrays and stay the same objects. Optimizer state is split as its parameter. Host tensors passed to a
    program are split on dimension 0 over the mesh axis "dp" as always. A plan says where values live and never changes
    a result.

    Args:
        module: any module, whose values are copied; or a function that builds one, ``lambda: GPT(config)``: then it is
            initialised on the slice, every parameter split as the plan says, and the controller holds no values. Its
            random numbers come from PyTorch's generator as those of any program: reproducible by torch.manual_seed,
            but not those that the constructor would draw on the host.
        mesh: slice that it runs on.
        plan: from patterns of parameter names to placements, ``{"*.wq.weight": {"tp": Shard(0)}}`` or
            ``{"*.wq.weight": ("tp", None)}``; the first that fits holds, and what none fits is replicated. Patterns
            of submodules that end in ":input" or ":output" constrain activations. `tw.fully_shard` and
            `tw.tensor_parallel` make plans, and can be given themselves. None: all is replicated, which is data
            parallelism.

    Raises:
        PlacementError: a pattern fits no parameter, an axis does not exist, or a dimension cannot be split evenly.
        CaptureError: the function that builds the module cannot be captured.
    """
    if is_eager():
        module = module if isinstance(module, torch.nn.Module) else module()
        placements_of(module, mesh, plan_of(module, mesh, plan))
        return module
    return make_parallel(module, mesh, plan, _current)


def distribute_tensor(tensor: torch.Tensor, mesh: VirtualSlice, placements: Sequence[Any] | None = None) -> Any:
    """Starts copying a host tensor to a slice and returns its array. On an array, and within a program, `redistribute`.

    Args:
        tensor: on the CPU.
        mesh: where to.
        placements: one an axis of `mesh`: Shard(dim) or Replicate() of torch.distributed.tensor; or a partition spec,
            one entry a dimension: an axis name, a tuple of these, or None. None replicates.

    Raises:
        PlacementError: placements do not fit the mesh or the shape.
    """
    if is_eager():
        normalize_placements(placements, mesh, tensor.shape)
        return tensor
    return distribute(tensor, mesh, placements, _current)


def redistribute(tensor: torch.Tensor, mesh: VirtualSlice, placements: Sequence[Any] | None = None) -> Any:
    """Returns a tensor of the same value that is on `mesh` and sharded so; never waits.

    Within a program it is a constraint: XLA reshards the tensor where it was sharded otherwise, and its gradient comes
    back with the same placements; a tensor of another slice is transferred. Use it on what a program returns to say how
    results are sharded, and on its arguments to say how host tensors are split. Outside a program it is a program of
    its own.

    Args:
        tensor: an array, or any tensor within a program.
        mesh: the slice. Within a compiled function, the slice that it runs on.
        placements: as for `distribute_tensor`.

    Raises:
        PlacementError: placements do not fit the mesh or the shape, or `mesh` is not the compiled function's.
    """
    return distribute_tensor(tensor, mesh, placements)


Array._redistribute = staticmethod(redistribute)


def get(tree: Any, *, timeout: timedelta | None = None) -> Any:
    """Waits for all arrays of a pytree and returns it with their values as CPU tensors; reads them at once.

    Args:
        tree: lists, tuples, dicts, ... of arrays and anything else.
        timeout: longest wait for all; None waits as long as their executors live.

    Raises:
        RemoteError, ExecutorLost, DeadlineExceeded, SessionClosed: as `Array.cpu`, for the first array that fails.
    """
    return get_all(tree, timeout)


def cluster_info() -> ClusterInfo:
    """Returns the cluster's islands (with `num_devices`) and processes."""
    if is_eager():
        config = _eager_config or ClusterConfig()
        islands = tuple(
            IslandInfo(island=IslandId(i), platform="eager", num_devices=config.devices_per_island)
            for i in range(config.islands)
        )
        return ClusterInfo(islands=islands, processes=())
    return _current().cluster_info()


def executor_status() -> list[ExecutorStatus]:
    """Returns memory, buffers, runs in flight and host fallbacks of the executors of this session's slices."""
    return [] if is_eager() else _current().executor_status()


@contextlib.contextmanager
def profile(path: str | os.PathLike[str]) -> Iterator[None]:
    """Writes a Chrome/Perfetto trace of what runs inside, with a row for each device, to `path`.

    Waits for runs in flight at both ends, so that the trace holds just the runs inside.
    """
    if is_eager():
        yield
        return
    session = _current()
    session.wait_for_runs(timedelta(minutes=10))
    started_ns = time.time_ns()
    yield
    session.wait_for_runs(timedelta(minutes=10))
    write_chrome_trace(Path(path), session.collect_spans(started_ns))

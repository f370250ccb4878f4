"""The public functions of torchways; `import torchways as tw` shows all of them.

With TORCHWAYS_EAGER=1 the same calls run everything as plain PyTorch in this process, so that breakpoints work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.utils._pytree as pytree

from torchways.array import Array
from torchways.capture.lowering.decompositions import decomposition_table
from torchways.capture.source import user_line
from torchways.config import LEAST_WEIGHT, ClusterConfig
from torchways.controller.buckets import Buckets, Padding, PadValue
from torchways.controller.buffers import RemoteBuffer, get_all
from torchways.controller.control_flow import run_cond, run_while_loop
from torchways.controller.data_loader import ArrayLoader, make_loader
from torchways.controller.function import make_function, make_parallel, make_pipeline, make_replicated
from torchways.controller.generation import run_generate
from torchways.controller.generation_options import merged, num_new_tokens, repeated, token_choice
from torchways.controller.parity.report import ParityReport
from torchways.controller.parity.report import parity as parity_mode
from torchways.controller.program import ProgramFunction, eager_program
from torchways.controller.redistribute import distribute
from torchways.controller.scan import loop_in_python, loop_length, run_scan
from torchways.controller.session import Session, run_seconds
from torchways.controller.session.loop import LoopThread
from torchways.controller.value_checks import check_values as checked_values
from torchways.controller.variant import Dispatch
from torchways.controller.variants import MAX_VARIANTS, VariantOptions
from torchways.data.spec import LoaderSpec
from torchways.errors import ConfigError, SessionClosed, UserError
from torchways.ids import IslandId
from torchways.launch.embedded import start_cluster
from torchways.launch.state_file import find_token
from torchways.mesh import VirtualSlice, check_mesh, normalize_placements
from torchways.observability.process import setup_logging
from torchways.observability.trace import write_chrome_trace
from torchways.parallel.balance import BalancedStages, balance
from torchways.parallel.microbatch import run_microbatches
from torchways.parallel.pipeline import SplitPoint, add_stages
from torchways.parallel.plans import PlanOrMaker, placements_of, plan_of
from torchways.parallel.replicate import Reduction
from torchways.rpc.clients import ClusterInfo, ExecutorStatus, IslandInfo, ManagerClient
from torchways.schedules import Schedule

ADDRESS_VARIABLE = "TORCHWAYS_ADDRESS"
EAGER_VARIABLE = "TORCHWAYS_EAGER"

_session: Session | None = None
#: The process that had the last session.
_session_pid: int | None = None
#: Eager mode: the cluster that was asked for, between init and shutdown.
_eager_config: ClusterConfig | None = None


class _Scope:
    """The result of `init`: a context manager that calls `shutdown` on exit."""

    def __enter__(self) -> _Scope:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutdown()


def is_eager() -> bool:
    """Returns True if TORCHWAYS_EAGER=1 is set, so that everything runs as plain PyTorch in this process."""
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
    stall_warning: timedelta | None = None,
    weight: float = 1.0,
    priority: int = 0,
    log_level: str = "warning",
    start_timeout: timedelta | None = None,
) -> _Scope:
    """Joins a cluster, or starts one on this machine.

    Call `shutdown` when you are done, or use `init` as a context manager.

    Args:
        address: host:port of a resource manager. If None, joins the cluster that `twrun` started (TORCHWAYS_ADDRESS).
            If there is none, starts an embedded cluster, which ends when this process ends, for whatever reason. The
            token of a cluster that runs is that of TORCHWAYS_TOKEN, else of the file that TORCHWAYS_TOKEN_FILE names,
            else of the state file that `torchways up` made.
        islands, devices_per_island, hosts_per_island, platform: size and PJRT platform of the embedded cluster; see
            `ClusterConfig`.
        memory_budget: bytes that buffers may occupy on each device. A computation that needs more waits until others
            have finished. A computation that can never fit is refused.
        memory_wait: how long a computation may wait for memory when nothing is running that could free any.
        stall_warning: how long a run may make no progress before a warning says what it waits for.
        weight: where several clients want the same devices, their parts of the device time are as their weights.
            At least 0.001, and at most what the cluster allows (`torchways up --max-weight`). It counts under the
            policy "proportional_share", the default.
        priority: runs of a higher priority go first, under the policy "priority".
        log_level: debug, info, warning or error, for this process and for the embedded cluster.
        start_timeout: longest wait for the cluster to start, and for each slice to become ready.

    On TPU (never run on hardware), executors keep compiled programs in the folder named by the environment variable
    TORCHWAYS_COMPILATION_CACHE. On CPU the variable has no effect: torch-xla's CPU client cannot load such files.

    Raises:
        ConfigError: a setting is out of range, the cluster allows no such weight or priority, there is no token for
            `address`, or others may read its file.
        ClusterLost: the cluster cannot be reached.
        UserError: this process already has a session, or was forked from one that had.
    """
    global _session, _session_pid, _eager_config
    if _session_pid not in (None, os.getpid()) and not is_eager():  # gRPC's threads and state do not follow into a fork
        raise UserError(
            f"this process was forked from process {_session_pid}, which had a session, and cannot have one: start it "
            'anew, as multiprocessing.get_context("spawn") does'
        )
    if _session is not None and not _session.closed:
        raise UserError("tw.init() was called already; call tw.shutdown() first")
    settings = {"start_timeout": start_timeout, "memory_wait": memory_wait, "stall_warning": stall_warning}
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    config = ClusterConfig(
        islands=islands,
        devices_per_island=devices_per_island,
        hosts_per_island=hosts_per_island,
        platform=platform,
        memory_budget=memory_budget,
        log_level=log_level,
        data_path=_import_path(),
        **given,
    )
    if not weight >= LEAST_WEIGHT:
        raise ConfigError(f"weight must be at least {LEAST_WEIGHT:g}, not {weight:g}")
    if is_eager():
        _eager_config = config
        return _Scope()
    os.environ.setdefault("TORCHWAYS_LOG_LEVEL", log_level)
    setup_logging("controller")
    threading.Thread(target=decomposition_table, name="torchways-prepare", daemon=True).start()  # seconds, at first
    address = address or os.environ.get(ADDRESS_VARIABLE)
    end_cluster: Callable[[], None] | None = None
    if address is None:
        cluster = start_cluster(config)
        address, token, end_cluster = cluster.address, cluster.token, cluster.close
    else:
        token = find_token(address)
    loop = LoopThread("torchways-session")
    session = Session(
        manager=loop.run(_make_manager(address, token)),
        loop=loop,
        start_timeout=config.start_timeout,
        end_cluster=end_cluster,
        share=(weight, priority),
    )
    try:
        session.start()
    except BaseException:
        session.close()
        raise
    _session, _session_pid = session, os.getpid()
    atexit.register(session.close)
    return _Scope()


def _import_path() -> tuple[str, ...]:
    """Returns the folders that this process imports from, for the data processes of a cluster of its own."""
    return tuple(os.path.abspath(entry) for entry in sys.path)  # "" is the current folder


async def _make_manager(address: str, token: str) -> ManagerClient:
    return ManagerClient(address, token)


def shutdown() -> None:
    """Ends the session, and the cluster if `init` started it.

    Waits for a checkpoint that is being written. Ctrl-C ends the wait: the checkpoint is given up, and all else ends.

    Arrays of the session can no longer be read. A second call does nothing. After a call that was interrupted, it ends
    what is left.
    """
    global _session, _eager_config
    _eager_config = None
    session = _session
    if session is not None:
        session.close()
        # Only now: if it is interrupted, the next call goes on with it, or the end of the process.
        atexit.unregister(session.close)
        _session = None


def _current() -> Session:
    if _session is None:
        raise SessionClosed("there is no session: call tw.init() first")
    return _session


def init_device_mesh(
    shape: Sequence[int], *, mesh_dim_names: Sequence[str] | None = None, island: int | None = None
) -> VirtualSlice:
    """Reserves a virtual slice: a mesh of devices of one island. Returns before the slice's executors are ready.

    Args:
        shape: size of each mesh axis.
        mesh_dim_names: name of each axis. The name "dp" is special: programs split host tensors along this axis.
        island: number of the island to take the devices from. If None, the resource manager chooses one.

    Raises:
        ResourceExhausted: the island does not have that many devices.
        PlacementError: the shape, the names or the island are invalid.
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
    """Turns a function, a module or an `nn.Module` class into a compiled function on a slice. Works as a decorator.

    Inside a program, each call is one node of the program. Outside a program, a call is a program with one node: it
    returns arrays at once and computes no gradients. Arguments on another slice are transferred to `mesh`. The state
    of a module lives on the slice; `state_dict()` reads it back.

    Args:
        target: the function, module or class.
        mesh: the slice to run on.
        buckets, pad_value, max_variants: for calls outside a program; see `program`.

    Raises:
        ConfigError: `buckets` is invalid.
        UserError: `target` is not a function, a module or an `nn.Module` class.
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
    """Turns a function into one dataflow program. The function may call modules, `backward()` and optimizers.

    The function is traced once for each combination of argument shapes. After that, each call dispatches the whole
    program and returns at once. Host tensors among the arguments are split on dimension 0 over the mesh axis "dp".

    The trace records which Python state the function reads. If that state has changed, the next call traces again.
    Optimizer hyperparameters, and numbers that change between calls, are inputs instead, so changing them does not
    cause a new trace. State that the function writes is written again by every run.

    If the graph depends on values (data-dependent shapes, `tw.cond`), the function cannot be traced as a whole. It then
    runs node by node, without gradients, and a warning gives the reason.

    Args:
        target: the function.
        mesh: the slice for operators that no compiled function or pipeline stage places.
        dispatch: "parallel" sends the whole program at once, one message per island, so that control runs ahead of the
            data. "sequential" dispatches each computation when the previous one has finished, for comparison.
        buckets: sizes to pad host tensors to, by argument and dimension:
            ``{"x": {1: [64, 128, 256]}, "labels": {1: [64, 128, 256]}}``. Padding is added at the end. Items of a dict
            argument are named ``"batch['input_ids']"``; the name of a container applies to all tensors in it. There
            are then only as many traces and executables as buckets. Results keep the padded sizes: pad the mask with
            0, or the labels with the ``ignore_index`` of the loss, and slice the results that you read. Arrays, calls
            inside another program, and eager mode are not padded.
        pad_value: the number to pad with, or a dict of numbers by argument name. The default is 0.
        max_variants: how many traces to keep, with their executables. The least recently used one is dropped first.

    Raises (when called):
        ShapeError: an argument is larger than its largest bucket.
        UserError: an argument that is to be padded requires grad: a padded copy would get its gradient.
        CaptureError: the function cannot be captured; the message names the line.
        PlacementError: no slice is known for an operator, or an argument cannot be split.
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
    return eager_program(target) if is_eager() else ProgramFunction(target, mesh, _current, dispatch, options=options)


def parity(*, rtol: float | None = None, atol: float | None = None) -> contextlib.AbstractContextManager[ParityReport]:
    """Compares every program called inside the context with eager PyTorch, node by node.

    TORCHWAYS_PARITY=1 turns this on for a whole run. Each node (a compiled function, a transfer, a sum, the upload of
    an argument) runs on its slice as usual, and again in plain PyTorch on the CPU from the same inputs. A call returns
    and changes the same values as without parity mode. It needs more memory, because it waits for all values, keeps
    them and donates none. One line is logged per call. Random operators are not compared; their results are taken as
    they are.

    An element agrees if its error is at most ``atol + rtol * abs(expected)``. A value with larger errors is still
    accepted in two cases, which both point to rounding: it is at most ten times as far from the float64 result as
    eager PyTorch's is, or each operator of the node agrees by itself and together they give this value.

    Args:
        rtol, atol: tolerances. If None, those of torch.testing.assert_close for each dtype. Integers and bools must be
            equal.

    Returns:
        A context manager that yields a `ParityReport`: what was compared, and the largest error of each dtype.

    Raises (a call inside):
        ParityError: a node diverges. The error names the first such node, the first operator in it that diverges by
            itself, your source lines and the errors. Parameters, optimizer state and everything else stay as they were
            before the call.
    """
    return parity_mode(rtol=rtol, atol=atol)


def check_values() -> contextlib.AbstractContextManager[None]:
    """Fails the first compiled function that makes NaN or infinity, in programs called inside the context.

    TORCHWAYS_CHECK_VALUES=1 turns this on for a whole run. After each compiled function, also in each microbatch of a
    pipeline, the executor waits for it, and looks at all its floating-point outputs. If one is not finite, all of
    them, and what depends on them, are failures. Programs are not traced or compiled again. Computations no longer
    overlap, so this is for finding an error, not for training. Arguments are not checked, and a function that makes
    infinity on purpose, such as a mask of -inf that another function reads, fails as well. Slices of several hosts are
    not checked. With TORCHWAYS_EAGER=1 it has no effect; use `torch.autograd.set_detect_anomaly` there.

    Returns:
        A context manager. It counts when a program is called, not when its results are read.

    Raises (a read of what depends on such a value):
        NonFiniteError: the error names the function, your line, the output, how many of its elements are NaN or
            infinite, and, in a pipeline, stage and microbatch.
    """
    return checked_values()


def cond(
    predicate: Any,
    true_fn: Callable[..., Any],
    false_fn: Callable[..., Any],
    operands: Sequence[Any] = (),
    *,
    mesh: VirtualSlice | None = None,
) -> Any:
    """Runs `true_fn` or `false_fn`, depending on the value of an array. Takes the arguments of torch.cond.

    The controller waits for the predicate, dispatches the chosen branch as a program and returns at once. A program
    that calls `tw.cond` runs node by node (see `program`). No gradients flow through it. Define the branches once, not
    in each call: traces are kept for each function object.

    Args:
        predicate: an array or tensor of one element, or a bool.
        true_fn, false_fn: the branches, called with the operands.
        operands: arrays, tensors or other values.
        mesh: the slice for operators that nothing else places.

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
    """Calls `body_fn` on the operands while `cond_fn` returns true. Takes the arguments of torch.while_loop.

    Both functions are dispatched as programs. The controller waits for each condition. No gradients flow through it.

    Args:
        cond_fn: called with the operands; returns an array of one element, or a bool.
        body_fn: called with the operands; returns their next values, with the same shapes and dtypes.
        operands: the initial values.
        mesh: the slice for operators that nothing else places.

    Returns:
        The operands for which `cond_fn` returned false.

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
    """Runs a loop of known length as one program. Takes the arguments of the scan of torch and JAX.

    The body is traced once, and all iterations are dispatched with one message per island: nothing returns to the
    controller between them. Each iteration reuses the memory of the carry. Inside a program, `scan` is a Python loop in
    the trace, and gradients flow through it. Outside a program it computes no gradients. Reuse the same `combine_fn`
    object, so that it is traced only once. Keep `length` to tens or hundreds, because the size of the program grows
    with it.

    Args:
        combine_fn: called as ``combine_fn(carry, x)``; returns the next carry and the iteration's output `y`. If it
            writes in place to arrays that are not its arguments, the next iteration sees the new values.
        init: the initial carry: a pytree of tensors, whose shapes and dtypes must not change between iterations. Other
            leaves are constants.
        xs: pytree of tensors. Each iteration gets one row of each, along dimension 0. If None, pass `length`.
        length: number of iterations.
        mesh: the slice for operators that nothing else places.
        donate: if True, the first iteration reuses the memory of the arrays in `init`, and they can no longer be read.

    Returns:
        The last carry, and a list with the `y` of each iteration. An output can be read as soon as its iteration has
        finished. (The scan of torch and JAX stacks the outputs instead.)

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
    """Generates tokens with a causal language model of `transformers`. Takes the options of its `generate`.

    Greedy decoding gives the tokens of `model.generate` on the CPU, up to rounding. The prompt and the decoding step
    are one compiled function each. The key-value cache has a fixed size and stays on the slice; it is split over the
    batch on the axis "dp" and over heads on other axes.

    To share compiled functions between prompts of different lengths, cache lengths are rounded up to a multiple of 64,
    and prompts are padded on the left to one of at most four lengths between two powers of two. Prompts are not padded
    if the model's `forward` takes no `position_ids`, or if padding would leave no room for the new tokens.

    Args:
        model: a model placed by `tw.function` or `tw.parallelize_module`. Call `model.eval()` first.
        input_ids: prompts, int64[batch, length], padded on the left.
        attention_mask: [batch, length], 0 for padding. None means no padding.
        max_new_tokens: number of tokens to add; fewer if all rows end earlier.
        max_length: length of prompt and new tokens together, if `max_new_tokens` is not given.
        do_sample: True draws tokens; False takes the most likely token.
        temperature, top_k, top_p: the logits warpers of transformers with these names, for sampling. If nothing gives
            `top_k`, it is 50, as in transformers; 0 draws from the whole vocabulary.
        eos_token_id: tokens that end a row; () for none. If None, those of `model.generation_config`.
        pad_token_id: fills rows that have ended. If None, that of `model.generation_config`, or else the first
            `eos_token_id`.
        num_return_sequences: how many continuations to return for each prompt, in consecutive rows. More than one needs
            sampling or beam search.
        generation_config: a `GenerationConfig` of transformers, for options that the call does not name. Options that
            neither names come from `model.generation_config`, as in transformers.
        generator: random generator on the host for sampling. If None, PyTorch's default one (`torch.manual_seed`). The
            same generator state gives the same tokens for any `tokens_per_dispatch`.
        streamer: any streamer of transformers. Its `put` gets the prompt, then the tokens of each step [batch] as soon
            as they are computed; `end` is called last.
        tokens_per_dispatch: number of tokens per message to the island. The next message is sent before the tokens of
            the previous one are looked at, so up to this many steps are computed for nothing after all rows have ended.
        options: more options of transformers' `generate`. Supported, and computed by its own processors:
            `min_new_tokens`, `min_length`, `repetition_penalty`, `no_repeat_ngram_size`, `bad_words_ids`,
            `sequence_bias`, `suppress_tokens`, `begin_suppress_tokens`, `min_p`, `typical_p`, `epsilon_cutoff`,
            `eta_cutoff`, `remove_invalid_values`, `logits_processor`, `stopping_criteria`, and for beam search
            `num_beams`, `length_penalty` and `early_stopping`. Any other option is refused by name, unless it has no
            effect. Your own processors and criteria are traced once: they must compute with tensors, and can read only
            `input_ids[:, -n:]` and `input_ids[:, -n]`. Pass the same objects in each call; new objects are traced and
            compiled again.

    Returns:
        Prompts and new tokens, int64[batch, length + new], on the host.

    Raises:
        UserError: the model is not on a slice, the tokens do not fit its positions, padding is on the right, or an
            option is not supported.
        ShapeError: `input_ids` or `attention_mask` has an invalid shape.
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
    """Splits a module into pipeline stages, one slice per stage. Returns the module itself.

    The parameters become arrays and stay the same objects, so you can create the optimizer before or after.

    Args:
        module: any module, or a function that builds one. In the second case the module is initialised on the slices
            (see `parallelize_module`), and each parameter is on the stage of its submodule, in registration order.
        split_spec: submodule names at which the stages begin or end, in the order in which they run; or what
            `tw.balanced_stages` returns.
        meshes: the slice of each stage, one more than there are split points.
        plan: how to split parameters over the axes of their stage's slice, as for `parallelize_module`. All meshes
            must then have the same axes.

    Raises:
        PlacementError: a submodule does not exist, the number of meshes is wrong, or the plan does not fit.
    """
    if is_eager():
        module = module if isinstance(module, torch.nn.Module) else module()
        add_stages(module, split_spec, meshes)
        return module
    return make_pipeline(module, split_spec, meshes, plan, _current)


def replicate(
    module: torch.nn.Module | Callable[[], torch.nn.Module],
    meshes: Sequence[VirtualSlice] | Sequence[Sequence[VirtualSlice]],
    *,
    split_spec: Mapping[str, SplitPoint] | None = None,
    plan: PlanOrMaker | None = None,
    bucket_cap_mb: float = 25,
    reduce_dtype: torch.dtype | None = None,
) -> Any:
    """Copies a module to several slices, which share each batch. Returns the module itself.

    A call splits its tensor arguments along dimension 0, one part for each replica, and concatenates the results, so
    the numbers are those of the module itself. There is one logical parameter for all copies: `parameters()`,
    `state_dict()` and optimizers are those of the plain module. Gradients are summed over the replicas, in buckets, and
    every replica updates its own copy. In `tw.microbatch`, each replica works on chunks of its own.

    Args:
        module: any module, or a function that builds one (see `parallelize_module`).
        meshes: the slice of each replica; of a pipeline, the slices of the stages of each replica. All need the same
            axes.
        split_spec: of a pipeline, the names at which stages begin or end, as for `tw.pipeline`.
        plan: how to split parameters over the devices of each slice, as for `parallelize_module`.
        bucket_cap_mb: gradients travel together, in buckets of up to so many megabytes (2**20 bytes). Those of split
            parameters travel one by one.
        reduce_dtype: the dtype as which gradients travel, for example torch.bfloat16; None: their own.

    Raises:
        PlacementError: two replicas share a slice, or have different numbers of stages or other axes.
        ConfigError: `bucket_cap_mb` is negative, or `reduce_dtype` is not a floating-point dtype.
    """
    if bucket_cap_mb < 0 or (reduce_dtype is not None and not reduce_dtype.is_floating_point):
        raise ConfigError(
            f"tw.replicate: bucket_cap_mb is at least 0, not {bucket_cap_mb}, and reduce_dtype a floating-point dtype "
            f"or None, not {reduce_dtype}"
        )
    if is_eager():
        return module if isinstance(module, torch.nn.Module) else module()
    stages = [[item] if isinstance(item, VirtualSlice) else list(item) for item in meshes]
    dtype = "" if reduce_dtype is None else str(reduce_dtype).removeprefix("torch.")
    reduction = Reduction(int(bucket_cap_mb * 2**20), dtype)
    return make_replicated(module, stages, split_spec or {}, plan, reduction, _current)


def balanced_stages(
    module: torch.nn.Module | Callable[[], torch.nn.Module], num_stages: int, *args: Any, **kwargs: Any
) -> BalancedStages:
    """Chooses where to split a model into stages that compute equally much; returns a `split_spec` for `tw.pipeline`.

    A stage may begin with any layer: an item of an `nn.ModuleList` or `nn.Sequential` that a call of the model runs
    once. The largest stage has as few floating-point operations as possible; of splits that are equal in this, the one
    whose largest parameters of a stage are the smallest is taken. The model runs on fake tensors: nothing is computed,
    and no memory is needed. ``print`` of the result shows a table of the stages, which is also logged.

    Args:
        module: a module that is not placed yet, or a function that builds one, as for `tw.pipeline`.
        num_stages: number of stages.
        *args, **kwargs: of a call of the module. Of tensors only shapes and dtypes count.

    Raises:
        PlacementError: there are fewer layers than stages, or the module is placed already.
    """
    return balance(module, num_stages, args, kwargs)


def microbatch(
    function: Callable[..., Any],
    *args: Any,
    n_microbatches: int,
    schedule: str | Schedule = "1F1B",
    **kwargs: Any,
) -> Any:
    """Calls a function on each chunk of a batch, as the loop of gradient accumulation does.

    Call it in a program, with a function that computes a loss and calls its ``backward()``. Gradients add up over the
    chunks, so divide the loss by `n_microbatches`. The optimizer's step comes after it. With a module that
    `tw.pipeline` has split, the slices work on different chunks at the same time, in the order of `schedule`. The
    function is traced once, and a program does not grow with the number of chunks.

    Args:
        function: called with a chunk of each tensor; must not assign attributes, clear gradients or step an optimizer.
        *args, **kwargs: tensors with dimensions are split along dimension 0, as `torch.chunk` splits them; all must
            have the same size there. Everything else is passed as it is.
        n_microbatches: number of chunks. There can be fewer, and the last can be smaller, as with `torch.chunk`.
        schedule: for pipelines, the order in which each slice works on the chunks: "GPipe", "1F1B", "LoopedBFS",
            "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble" or "DualPipeV", as in
            torch.distributed.pipelining; or a `Schedule`. "auto" measures what the stages take in the first calls of
            the program, and goes on with the schedule that is predicted to take the shortest time, of those that fit
            into the memory budget; `report()` of the program shows it.

    Returns:
        What the function returns, a pytree. Tensors without dimensions are stacked, one for each chunk; others are
        concatenated along dimension 0. None of them needs gradients.

    Raises:
        ShapeError: the tensors have different sizes along dimension 0.
        UserError: there is no such schedule, or values that are no tensors differ from chunk to chunk.
        CaptureError: the function changes what is no tensor.
        ConfigError: the schedule does not fit the pipeline.
    """
    return run_microbatches(function, args, kwargs, n_microbatches, schedule)


def parallelize_module(
    module: torch.nn.Module | Callable[[], torch.nn.Module], mesh: VirtualSlice, plan: PlanOrMaker | None = None
) -> Any:
    """Places a module on a slice and splits its parameters by a plan. Returns the module itself.

    Parameters become arrays and stay the same objects. Optimizer state is split like its parameter. In a program,
    forward and backward are one computation, and the optimizer's update is another. Host tensors passed to a program
    are split on dimension 0 over the mesh axis "dp" as usual. A plan decides where values are stored; it never changes
    results. The module can be a part of a larger one that is placed on another slice: it then runs on its own slice and
    keeps its parameters there.

    Args:
        module: any module, whose values are copied to the slice; or a function that builds one, for example
            ``lambda: GPT(config)``. In the second case the module is initialised on the slice, each parameter already
            split, and the controller holds no values. torch.manual_seed makes this reproducible, but the numbers
            differ from those that the constructor would draw on the host.
        mesh: the slice to run on.
        plan: maps patterns of parameter names to placements: ``{"*.wq.weight": {"tp": Shard(0)}}`` or
            ``{"*.wq.weight": ("tp", None)}``. The first matching pattern applies; a parameter that matches none is
            replicated. Patterns of submodule names that end in ":input" or ":output" constrain activations. You can
            also pass a function that makes a plan, such as `tw.fully_shard` or `tw.tensor_parallel`. None replicates
            everything, which is data parallelism.

    Raises:
        PlacementError: a pattern matches no parameter, an axis does not exist, or a dimension cannot be split evenly.
        CaptureError: the function that builds the module cannot be captured.
    """
    if is_eager():
        module = module if isinstance(module, torch.nn.Module) else module()
        placements_of(module, mesh, plan_of(module, mesh, plan))
        return module
    return make_parallel(module, mesh, plan, _current)


def data_loader(
    make_dataset: str,
    mesh: VirtualSlice | Sequence[VirtualSlice],
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    batch_size: int | None = 1,
    shuffle: bool = False,
    seed: int = 0,
    drop_last: bool = False,
    num_workers: int = 0,
    prefetch_factor: int = 2,
    timeout: float = 0,
    collate_fn: str | None = None,
    placements: Sequence[Any] | Mapping[str | int, Sequence[Any]] | None = None,
    prefetch: int = 2,
) -> ArrayLoader:
    """Reads batches with PyTorch's DataLoader on the hosts of a slice. They do not pass the controller.

    Returns once the dataset is made, in a process beside the slice's executors. Each batch is a tree like that of
    PyTorch's DataLoader, with arrays on the slice in place of tensors. Pass it to a program.

    Args:
        make_dataset: import path of the dataset's class, or of a function that makes it: ``"my_data.text:Lines"``. It
            is imported where the executors run. A dataset has `__getitem__` and `__len__`, or is an `IterableDataset`.
        mesh: the slice. If it is a list of slices, each reads an equal part of the rows of every batch on its own host,
            and an item is a list with one batch per slice.
        args, kwargs: arguments of `make_dataset`: numbers, strings, None, and lists and dicts of these.
        batch_size: rows of a batch, of all slices together. If None, each item of the dataset is a batch.
        shuffle: whether each epoch has a random order, that of a `DistributedSampler` with `seed`.
        seed: of the order, and of random numbers that `__getitem__` and `collate_fn` draw from the generators of
            PyTorch, NumPy and Python. These depend on seed, epoch and batch alone, not on the number of workers. (An
            IterableDataset's workers are seeded once an epoch.)
        drop_last: whether to leave out a last batch that is smaller.
        num_workers, prefetch_factor, timeout: as of PyTorch's DataLoader, on each slice's host.
        collate_fn: import path of a function that makes a batch of a list of items; None: PyTorch's own.
        placements: how tensors are split over the slice: one placement per axis, a partition spec, or a dict of these
            by key (or index) in the batch, in which "" stands for all others. If None, and for tensors that a dict does
            not name, dimension 0 is split over the axis "dp", if there is one.
        prefetch: batches that are on the slice before you take them.

    Raises (also from iterating):
        ConfigError: an option is invalid or does not fit the dataset, or the cluster runs no code of clients.
        DataError: the dataset cannot be imported or made, or an item cannot be read; with the traceback.
        DataProcessLost: the process of the dataset ended.
        PlacementError: a tensor cannot be split as it should.
    """
    spec = LoaderSpec(
        dataset=make_dataset,
        args=tuple(args),
        kwargs=kwargs or {},
        batch_size=batch_size,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        num_workers=num_workers,
        prefetch_factor=prefetch_factor,
        timeout=timeout,
        collate_fn=collate_fn,
        rules={},
    )
    return make_loader(spec, mesh, placements, prefetch, None if is_eager() else _current)


def distribute_tensor(tensor: torch.Tensor, mesh: VirtualSlice, placements: Sequence[Any] | None = None) -> Any:
    """Starts copying a host tensor to a slice and returns its array.

    For an array, and inside a program, this is the same as `redistribute`.

    Args:
        tensor: a tensor on the CPU.
        mesh: the slice to copy it to.
        placements: one placement per axis of `mesh`, Shard(dim) or Replicate() of torch.distributed.tensor; or a
            partition spec, one entry per dimension of the tensor: an axis name, a tuple of axis names, or None. If
            None, the tensor is replicated.

    Raises:
        PlacementError: the placements do not fit the mesh or the shape.
    """
    if is_eager():
        normalize_placements(placements, mesh, tensor.shape)
        return tensor
    return distribute(tensor, mesh, placements, _current)


def redistribute(tensor: torch.Tensor, mesh: VirtualSlice, placements: Sequence[Any] | None = None) -> Any:
    """Returns the same value on `mesh`, sharded by `placements`. Never waits.

    Inside a program this is a constraint: XLA reshards the tensor if necessary, and its gradient gets the same
    placements. A tensor on another slice is transferred. Apply it to the results of a program to choose their sharding,
    and to its arguments to choose how host tensors are split. Outside a program it runs as a program of its own.

    Args:
        tensor: an array, or any tensor inside a program.
        mesh: the slice. Inside a compiled function this must be the slice that the function runs on.
        placements: as for `distribute_tensor`.

    Raises:
        PlacementError: the placements do not fit the mesh or the shape, or `mesh` is not the compiled function's slice.
    """
    return distribute_tensor(tensor, mesh, placements)


Array._redistribute = staticmethod(redistribute)


def get(tree: Any, *, timeout: timedelta | None = None) -> Any:
    """Waits for all arrays in a pytree and returns the pytree with CPU tensors in their place.

    The arrays are read concurrently.

    Args:
        tree: nested lists, tuples and dicts of arrays and other values.
        timeout: longest wait for all arrays together. None waits as long as their executors are alive.

    Raises:
        RemoteError, ExecutorLost, DeadlineExceeded, SessionClosed: as `Array.cpu`, for the first array that fails.
    """
    return get_all(tree, timeout)


def cluster_info() -> ClusterInfo:
    """Returns the islands of the cluster, each with its number of devices, and its processes."""
    if is_eager():
        config = _eager_config or ClusterConfig()
        islands = tuple(
            IslandInfo(island=IslandId(i), platform="eager", num_devices=config.devices_per_island)
            for i in range(config.islands)
        )
        return ClusterInfo(islands=islands, processes=())
    return _current().cluster_info()


def executor_status() -> list[ExecutorStatus]:
    """Returns the status of each executor of this session's slices: memory, buffers, runs in flight, host fallbacks."""
    return [] if is_eager() else _current().executor_status()


def cancel(*arrays: Any) -> None:
    """Cancels the runs that make arrays, as far as they are not over.

    What a run has not put on the devices yet is not computed. Reading what it would have made, here or in later runs,
    raises `torchways.errors.RunCancelled`: also the state that the run would have updated. Does not wait.

    Args:
        arrays: results of calls, also nested in containers. What is no array is passed over.
    """
    if is_eager():
        return
    found = [item for item in pytree.tree_leaves(arrays) if isinstance(item, Array)]
    buffers = [item._buffer for item in found]
    _current().runs.cancel_makers(buffer.buffer_id for buffer in buffers if isinstance(buffer, RemoteBuffer))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Gives each call inside the context a deadline: what is not over after `seconds` is cancelled; see `cancel`.

    Args:
        seconds: from the call on. The time that a program takes to be traced and compiled counts, except for programs
            that update state, whose calls wait for that.

    Raises:
        ConfigError: `seconds` is not above 0.
    """
    if not seconds > 0:
        raise ConfigError(f"seconds must be above 0, not {seconds!r}, at {user_line()}")
    token = run_seconds.set(seconds)
    try:
        yield
    finally:
        run_seconds.reset(token)


def synchronize(*, timeout: timedelta | None = None) -> None:
    """Waits until every run that this session has sent is over, well or not; as `torch.accelerator.synchronize` does.

    For clocks: calls return before they are computed. Errors of runs are raised where their results are read.

    Args:
        timeout: longest wait. None waits as long as the executors are alive.

    Raises:
        ExecutorLost, DeadlineExceeded, SessionClosed: as `Array.cpu`.
    """
    if not is_eager():
        _current().runs.wait_for_all(timeout)


@contextlib.contextmanager
def profile(path: str | os.PathLike[str]) -> Iterator[None]:
    """Writes a Chrome/Perfetto trace of the runs inside the context to `path`, with one row per device.

    It shows this client, the schedulers and the executors, with arrows from a dispatch to its computations. The file
    is compressed if its name ends with ".gz".

    Waits for runs in flight on entry and on exit, so that the trace holds only the runs inside.
    """
    if is_eager():
        yield
        return
    session = _current()
    session.runs.wait_for_all(timedelta(minutes=10))
    started_ns = time.time_ns()
    yield
    session.runs.wait_for_all(timedelta(minutes=10))
    write_chrome_trace(Path(path), session.collect_spans(started_ns))

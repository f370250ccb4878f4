"""torch-xla's PJRT runtime as a `Runtime`: the sole user of torch_xla.

A graph is traced lazily on placeholder inputs, hashed, and compiled into torch-xla's cache; running it is one call of
that cache, which returns before the computation ends. Private calls (`_XLAC`) are those of torch-xla's own
torch.compile backend (torch_xla/_dynamo/dynamo_bridge.py); there is no public call that runs a cached graph.

The process must be started with PJRT_DEVICE, CPU_NUM_DEVICES and NPROC set (launch/environment.py): with XLA's default
thread pool, collectives of executions in flight at the same time deadlock on CPU.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import logging
import math
import mmap
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from torchways.errors import CaptureError, InternalError
from torchways.graphs import SOURCE_KEY, computation_of, deserialize_graph, serialize_graph
from torchways.operators import ALIGNMENTS, ALIGNMENTS_BACKWARD, BARRIER, CONSTRAIN, MANUAL_SEED, NEVER, QR, SVD
from torchways.runtime import heap
from torchways.runtime.base import BufferSpec, OnDevice, at_once
from torchways.runtime.left_out import left_out
from torchways.runtime.products import turn_products

with left_out():
    import torch_xla
    import torch_xla.core.xla_builder as xla_builder
    import torch_xla.core.xla_model as xm
    import torch_xla.core.xla_op_registry as xla_op_registry
    import torch_xla.debug.metrics as xla_metrics
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr
    from torch_xla.utils.dlpack import from_dlpack, to_dlpack

logger = logging.getLogger(__name__)

_XLAC = torch_xla._XLAC

#: Executions that may be unfinished at a time (counted in steps of a marker). With 32 unfinished, XLA makes a launch
#: wait for an earlier execution and its callbacks, which need the GIL, while the launch has the device lock, which
#: `_run_cached_graph` waits for with the GIL held: a deadlock. The last marker's execution may still be about to end.
_MAX_IN_FLIGHT = 24
_MARKER_EVERY = 8

#: Executables that are kept although no program has them; torch-xla's own cache keeps what is compiled in any case.
_MAX_RECENT = 128

#: A launch that takes longer may have failed, of which torch-xla says nothing by itself.
_LAUNCH_SECONDS = 2.0

#: Bytes; XLA's CPU client takes only memory that is aligned to it. PyTorch's own is.
_XLA_ALIGNMENT = 64

#: Bytes; host memory of this size that a buffer shares is looked after with each such loan, not just now and then.
_LARGE_LOAN = 1 << 20

#: How `_run_cached_graph` says that a graph has left torch-xla's cache.
_EVICTED = "Failed to get computation by hash"


#: Operators whose kernel for XLA runs them on the host whatever the arguments are, or that PyTorch makes of such ones.
#: Found by running PyTorch's database of operators with samples (torch 2.9.1, torch-xla 2.9.0).
_ON_THE_HOST = frozenset(
    {
        "aten::_batch_norm_with_update",
        "aten::_cholesky_solve_helper",
        "aten::_cummin_helper",
        "aten::_logcumsumexp",
        "aten::adaptive_max_pool2d",
        "aten::cauchy",
        "aten::cummin",
        "aten::frexp.Tensor",
        "aten::geometric",
        "aten::i0",
        "aten::log_normal",
        "aten::logcumsumexp",
        "aten::median.dim",
        "aten::nanmedian.dim",
        "aten::rrelu_with_noise",
        "aten::rrelu_with_noise_functional",
        "aten::special_bessel_j0",
        "aten::special_bessel_j1",
        "aten::special_erfcx",
        "aten::special_i0e",
        "aten::special_i1",
        "aten::special_i1e",
        "aten::special_ndtri",
        "aten::special_spherical_bessel_j0",
        "aten::special_zeta",
        "prims::bessel_i0",
        "prims::bessel_i0e",
        "prims::bessel_i1",
        "prims::bessel_i1e",
        "prims::bessel_j0",
        "prims::bessel_j1",
        "prims::erfcx",
        "prims::frexp",
        "prims::ndtri",
        "prims::spherical_bessel_j0",
        "prims::zeta",
    }
)


@dataclass(frozen=True, slots=True)
class _Source:
    """What an executable is compiled of."""

    graph: bytes
    inputs: tuple[BufferSpec, ...]
    outputs: tuple[BufferSpec, ...]
    donated: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Executable:
    """A compiled graph.

    Attributes:
        source: what it is compiled of, should it leave torch-xla's cache.
        graph_hash: its key in torch-xla's cache; None where nothing is computed.
        inputs: what the cached graph takes, in its order: positions of our inputs, or constants. The position behind
            the last is that of the seed that `seeding` computes.
        outputs: for each of our outputs, its position in the cached graph's, or ~position of the input that it is.
        donated: positions of our inputs whose memory it may reuse.
        seeding: what computes the seed of its random operators, and of which of our inputs.
    """

    source: _Source
    graph_hash: Any
    inputs: tuple[int | torch.Tensor, ...]
    outputs: tuple[int, ...]
    donated: tuple[int, ...]
    seeding: tuple[_Executable, tuple[int, ...]] | None = None


@dataclass(slots=True)
class _Waiting:
    """Who waits for a computation. `buffers` are its outputs that nobody took over, or a later computation's."""

    buffers: Sequence[torch.Tensor]
    callback: Callable[[], None]


class _Marker:
    """Tells when an execution has ended."""

    __slots__ = ("ended", "wake")

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.wake: Callable[[], None] | None = None

    def end(self) -> None:
        """On some thread."""
        self.ended.set()
        if self.wake is not None:  # set before `ended` is looked at for the last time
            self.wake()


class XlaRuntime:
    """The `num_devices` devices of this process's PJRT client. A computation's mesh comes with it."""

    def __init__(self, num_devices: int) -> None:
        self._num_devices = num_devices
        if self._num_devices > 1:
            xr.use_spmd()
        found = xr.global_runtime_device_count()
        if found != self._num_devices:
            raise InternalError(
                f"the PJRT client has {found} devices, but the executor was started for {self._num_devices}"
            )
        self._device = torch_xla.device()
        #: By the sizes of their axes, which are named by number.
        self._meshes: dict[tuple[int, ...], xs.Mesh] = {}
        self._markers: collections.deque[_Marker] = collections.deque()
        self._since_marker = 0
        #: A buffer whose launch is under way, and since when that is known.
        self._launching: torch.Tensor | None = None
        self._launching_since = 0.0
        #: Who waits for computations whose launch may be under way, in order.
        self._waiting: collections.deque[_Waiting] = collections.deque()
        #: Host memory can be a buffer, and a buffer host memory, without a copy.
        self.shares_memory = self._num_devices == 1 and xr.device_type() == "CPU"
        #: Host tensors whose memory is a buffer's, or was.
        self._loans: collections.deque[torch.Tensor] = collections.deque()
        self._large_loans: collections.deque[torch.Tensor] = collections.deque()
        self._zeros = _untouched_memory(mmap.PAGESIZE)
        #: Executables that a program still has, to be shared by equal functions; by a digest of their source.
        self._compiled: weakref.WeakValueDictionary[bytes, _Executable] = weakref.WeakValueDictionary()
        #: Those that were asked for last: a program that comes again, from whichever client, finds them.
        self._recent: collections.OrderedDict[bytes, _Executable] = collections.OrderedDict()
        self._remembering = threading.Lock()
        # Compiled graphs reuse what is donated. It is a setting of the process, not of a thread: on once and for all.
        _XLAC._xla_set_enable_alias_with_buffer_donor_config(True)
        #: A value that is there for ever.
        self._anchor = xm.send_cpu_data_to_device([torch.zeros(())], self._device, None)[0]

    def put(self, host: torch.Tensor, spec: BufferSpec) -> torch.Tensor:
        """Puts a CPU tensor, which must not change any more, on the devices; returns the buffer."""
        host = host.contiguous()
        if self.shares_memory and host.numel() and host.dtype != torch.bool:
            host = host if host.data_ptr() % _XLA_ALIGNMENT == 0 else host.clone()
            self._lend(host)
            return from_dlpack(torch.utils.dlpack.to_dlpack(host))
        return self._place(host, spec)

    def _lend(self, host: torch.Tensor) -> None:
        """Keeps a tensor at least as long as the buffer that has its memory.

        Were the buffer the last to let go of it, a thread of torch-xla's would take the GIL for it while it holds the
        device lock, which `_on_ready_callback` takes with the GIL held.
        """
        large = host.nbytes >= _LARGE_LOAN
        # Of the large ones all are looked at when one comes; a few each time that a small one does, too: a model's
        # weights are given up at its first step, and batches of token ids are small.
        for loans, count in ((self._loans, 2), (self._large_loans, len(self._large_loans) if large else 2)):
            for _ in range(min(count, len(loans))):
                oldest = loans.popleft()
                if _is_shared(oldest):
                    loans.append(oldest)
        (self._large_loans if large else self._loans).append(host)

    def fill(self, spec: BufferSpec, value: float) -> torch.Tensor:
        """Returns a buffer with one value everywhere."""
        return self._place(torch.full(spec.shape, value, dtype=spec.torch_dtype), spec)

    def _untouched(self, spec: BufferSpec) -> torch.Tensor:
        """Returns a CPU tensor of zeros that takes no memory as long as nobody writes to it: all share one mapping."""
        size = spec.torch_dtype.itemsize * math.prod(spec.shape)
        if not size:
            return torch.empty(spec.shape, dtype=spec.torch_dtype)
        if size > len(self._zeros):
            self._zeros = _untouched_memory(size)
        return torch.frombuffer(self._zeros, dtype=spec.torch_dtype, count=math.prod(spec.shape)).view(spec.shape)

    def _place(self, host: torch.Tensor, spec: BufferSpec) -> torch.Tensor:
        # Split on the host: mark_sharding on a placed tensor would compile and run a resharding graph. `.to(device)`
        # would upload only at the first use.
        sharded = any(text != "R" for text in spec.placements)
        sharding = self._sharding_spec(spec) if sharded else None
        return xm.send_cpu_data_to_device([host], self._device, sharding)[0]

    def _mesh(self, sizes: tuple[int, ...]) -> xs.Mesh:
        if sizes not in self._meshes:
            names = tuple(map(str, range(len(sizes))))
            self._meshes[sizes] = xs.Mesh(np.arange(self._num_devices), sizes, names)
        return self._meshes[sizes]

    def _sharding_spec(self, spec: BufferSpec) -> xs.ShardingSpec:
        mesh = self._mesh(spec.mesh)
        sharding = xs.ShardingSpec(mesh, _partition_spec(spec.placements, len(spec.shape)))
        # By itself it takes a tensor that is split in all its dimensions for one that is split over all axes of the
        # mesh. The private call is what mark_sharding makes.
        arguments = mesh._get_op_sharding_args(sharding.partition_spec)
        sharding._tile_assignment, sharding._group_assignment, sharding._replication_groups = arguments[:3]
        sharding._sharding_type = arguments[3]
        return sharding

    def compile(
        self,
        graph: bytes,
        inputs: Sequence[BufferSpec],
        outputs: Sequence[BufferSpec],
        donated: Sequence[int],
        on_device: OnDevice = at_once,
    ) -> _Executable:
        """Compiles a serialized graph, without running it; see `Runtime.compile`.

        Only torch-xla's lazy trace is made on the device's thread. It is quick, but of several devices places zeros of
        the inputs' sizes, which for gigabytes takes seconds. (On placeholders in their place, torch-xla holds the
        device lock while XLA compiles.) What takes long is not made there: to read the graph, which is Python, and
        XLA's compilation, which has neither the GIL nor the device lock.
        """
        source = _Source(graph, tuple(inputs), tuple(outputs), tuple(donated))
        kinds = repr((source.inputs, source.outputs, source.donated))
        key = hashlib.sha256(computation_of(graph) + kinds.encode()).digest()
        executable = self._compiled.get(key)
        if executable is None:
            executable = self._compiled[key] = self._compile(source, on_device)
        with self._remembering:
            self._recent[key] = executable
            self._recent.move_to_end(key)
            if len(self._recent) > _MAX_RECENT:
                self._recent.popitem(last=False)
        return executable

    def _compile(self, source: _Source, on_device: OnDevice) -> _Executable:
        graph = deserialize_graph(source.graph)
        _move_to_device(graph, self._device)
        seed, seeding = _take_seed(graph), None
        if isinstance(seed, _SeedGraph):  # torch-xla takes a seed from outside, as a value that is there
            inputs = [source.inputs[position] for position in seed.positions]
            seeding = self.compile(seed.graph, inputs, inputs[:1], (), on_device), seed.positions
            seed = len(source.inputs)
        if xr.device_type() == "CPU":
            turn_products(graph)
        constrain = functools.partial(self._constrain, mesh=source.outputs[0].mesh if source.outputs else ())
        for operator, ours in ((CONSTRAIN, constrain), *_OURS.items()):
            for node in graph.find_nodes(op="call_function", target=operator):
                node.target = ours
        executable, pending = on_device(lambda: self._trace(graph, seed, source))
        executable = replace(executable, seeding=seeding)
        if pending:
            try:
                # Compiles the pending graph into torch-xla's cache; no public call does so without running it.
                _XLAC._xla_warm_up_cache(pending, [])
            finally:
                on_device(pending.clear)  # the graph goes with its tensors
                heap.give_back()  # it had arguments as large as the real ones
        return executable

    def _compile_again(self, executable: _Executable) -> None:
        """Compiles what has left torch-xla's cache; on the device's thread, as a computation waits for it.

        Raises:
            InternalError: it comes out as another graph.
        """
        logger.warning(
            "more compiled functions are in use than torch-xla keeps: compiling one anew. Start the cluster with a "
            "larger XLA_COMPILATION_CACHE_SIZE in its environment"
        )
        again = self._compile(executable.source, at_once)
        if again.graph_hash != executable.graph_hash:
            raise InternalError("torch-xla traced a compiled function to another graph than before")

    def _trace(
        self, graph: torch.fx.Graph, seed: int | None, source: _Source
    ) -> tuple[_Executable, list[torch.Tensor]]:
        """Traces a graph lazily; returns the executable to be, and the tensors whose pending graph it is."""
        arguments = [self.put(self._untouched(spec), spec) for spec in source.inputs]
        if seed is not None:
            xm.set_rng_state(0)  # it begins with the seed, not with what an earlier trace made of it
        for position in source.donated:
            _XLAC._set_buffer_donation(arguments[position], True)  # no public call marks a donor
        before = self.fallback_counters()
        results = list(_ExactTypes(graph).run(*arguments))
        self._refuse_fallbacks(before, graph)
        is_placed = self._num_devices > 1
        argument_of = {
            (id(arguments[position]), spec.placements if is_placed else ()): position
            for position, spec in enumerate(source.inputs)
        }
        computed: list[torch.Tensor] = []
        specs: list[BufferSpec] = []
        sources: list[int] = []
        known: dict[tuple[int, tuple[str, ...]], int] = {}
        for result, spec in zip(results, source.outputs, strict=True):
            key = (id(result), spec.placements if is_placed else ())
            if key in argument_of:
                sources.append(~argument_of[key])
                continue
            if key not in known:
                known[key] = len(computed)
                # One with other placements than another output, or than an argument, is a value of its own.
                is_marked = any(result is other for other in (*computed, *arguments))
                computed.append(_barrier(result) if is_marked else result)
                specs.append(spec)
            sources.append(known[key])
        if not computed:
            return _Executable(source, None, (), tuple(sources), ()), []
        # Constants and copies of inputs may have their values already; what computes nothing is no graph of the cache,
        # and to mark it would place that value anew, as a constant.
        is_pending = _XLAC._check_tensor_need_materialization(computed)
        computed = [
            result if pending else _barrier(result) for result, pending in zip(computed, is_pending, strict=True)
        ]
        if is_placed:
            for result, spec in zip(computed, specs, strict=True):
                if spec.shape:
                    xs.mark_sharding(result, self._mesh(spec.mesh), _partition_spec(spec.placements, len(spec.shape)))
        # Ids tell which device data of the graph is which of our inputs; only the private call gives them.
        position_of = {_XLAC._xla_get_tensor_id(argument): index for index, argument in enumerate(arguments)}
        if seed is not None:
            position_of[_XLAC._get_seed_info_id()] = seed  # what random operators read; there is no public name for it
        tensor_ids, device_data = _XLAC._get_tensors_xla_device_data_node(computed)
        taken = tuple(position_of.get(tensor_id, data) for tensor_id, data in zip(tensor_ids, device_data, strict=True))
        graph_hash = _XLAC._get_graph_hash(computed)  # its key in torch-xla's cache, which no public call gives
        return _Executable(source, graph_hash, taken, tuple(sources), source.donated), computed

    def _constrain(self, value: torch.Tensor, placements: str, *, mesh: tuple[int, ...]) -> torch.Tensor:
        """What the operator of this name is on these devices."""
        copy = value.clone()
        if self._num_devices > 1 and value.dim():
            xs.annotate_custom_sharding(copy, self._mesh(mesh), _partition_spec(placements.split(), value.dim()))
        return copy

    def _refuse_fallbacks(self, before: dict[str, int], graph: torch.fx.Graph) -> None:
        fallen = [name for name, count in self.fallback_counters().items() if count > before.get(name, 0)]
        if fallen:
            lines = {
                str(node.meta.get(SOURCE_KEY, ""))
                for node in graph.nodes
                if any(str(node.target).split(".")[1:2] == [_base_name(name)] for name in fallen)
            }
            raise CaptureError(
                f"{', '.join(sorted(fallen))} would run on the host, which a compiled function must not; used at "
                f"{', '.join(sorted(lines)) or 'an unknown line'}. Write it with other operators"
            )

    def execute(
        self, executable: _Executable, inputs: Sequence[torch.Tensor], gang_key: str = ""
    ) -> tuple[list[torch.Tensor], Sequence[torch.Tensor]]:
        """Starts a computation; see `Runtime.execute`."""
        if executable.graph_hash is None:
            return [inputs[~source] for source in executable.outputs], ()
        given = inputs
        if executable.seeding is not None:
            seeding, positions = executable.seeding
            given = [*inputs, *self.execute(seeding, [inputs[position] for position in positions])[0]]
        else:  # one more, that of which the seed is, has room too
            self._wait_for_room()
        self._pass_device_lock()
        arguments = [given[item] if isinstance(item, int) else item for item in executable.inputs]
        try:
            # The call that torch-xla's torch.compile backend makes; nothing public runs a cached graph.
            results = _XLAC._run_cached_graph(executable.graph_hash, arguments)
        except RuntimeError as error:
            if _EVICTED not in str(error):
                raise
            self._compile_again(executable)
            results = _XLAC._run_cached_graph(executable.graph_hash, arguments)
        if executable.donated and self._waiting:
            self._redirect([inputs[position] for position in executable.donated], results)
        self._since_marker += 1
        if self._since_marker == _MARKER_EVERY:
            self._since_marker = 0
            marker = _Marker()
            self._markers.append(marker)
            self.on_ready(results, marker.end)
            self.progress()
        return [results[source] if source >= 0 else inputs[~source] for source in executable.outputs], results

    def _pass_device_lock(self) -> None:
        """Waits until no launch has the device lock, without the GIL, which the calls after it hold while they wait.

        Of several devices a launch may wait for a callback, which needs the GIL; of one it holds up the other threads.
        To ask meanwhile whether its buffers are there is no way out: they are looked at while they are made, which
        crashed.
        """
        # To sync a tensor that has its value takes the lock and does nothing more; the public sync() takes none.
        _XLAC._xla_sync_multi([self._anchor], [], False, False)

    def _redirect(self, donated: Sequence[torch.Tensor], results: Sequence[torch.Tensor]) -> None:
        """Lets who waits for a donated buffer, which can tell nothing any more, wait for another one."""
        taken = {id(buffer) for buffer in donated}
        for item in self._waiting:
            item.buffers = [buffer for buffer in item.buffers if id(buffer) not in taken] or results

    def has_room(self, wake: Callable[[], None]) -> bool:
        """Whether a computation can be started now; see `Runtime.has_room`."""
        markers = self._markers
        while len(markers) * _MARKER_EVERY >= _MAX_IN_FLIGHT:
            oldest = markers[0]
            oldest.wake = wake
            if not oldest.ended.is_set():
                return False
            markers.popleft()
        return True

    def _wait_for_room(self) -> None:
        markers = self._markers
        deadline, pause = time.monotonic() + 30, 0.00002
        while len(markers) * _MARKER_EVERY >= _MAX_IN_FLIGHT:
            if self.progress():
                time.sleep(pause)
                pause = min(2 * pause, 0.001)
            elif markers:
                markers[0].ended.wait(timeout=1.0)
            if time.monotonic() > deadline:
                logger.warning("waiting for a computation; some %d are in flight", len(markers) * _MARKER_EVERY)
                deadline += 30

    def on_ready(self, buffers: Sequence[torch.Tensor], callback: Callable[[], None]) -> None:
        """Calls back, on a thread of XLA's, when a computation of which these are outputs has ended."""
        self._waiting.append(_Waiting(buffers, callback))

    def progress(self) -> bool:
        """Asks for the completion of what is launched; returns whether something is not launched yet."""
        # A launch goes on in the background, with the device lock held. `_on_ready_callback` waits for that lock, and
        # holds the GIL meanwhile, so no launch may need the GIL: see `_lend` and `_MAX_IN_FLIGHT`. It is asked of
        # launched buffers only, so it does not wait for long.
        # No public call tells of a launch's or a computation's end without waiting for it (wait_device_ops waits for
        # all computations, and holds up launches meanwhile).
        waiting = self._waiting
        markers = self._markers
        while markers and markers[0].ended.is_set():
            markers.popleft()
        if waiting:
            self._pass_device_lock()
        while waiting and not _XLAC._is_placecholder(waiting[0].buffers[0]):
            item = waiting.popleft()
            _XLAC._on_ready_callback(item.buffers[0], item.callback)
        if waiting:
            self._check_launch(waiting[0].buffers[0])
        else:
            self._launching = None  # its memory is not ours to keep
        return bool(waiting)

    def _check_launch(self, buffer: torch.Tensor) -> None:
        """Raises where a launch has failed: torch-xla tells only who waits for all computations.

        Raises:
            InternalError: its buffers will never be there.
        """
        now = time.monotonic()
        if buffer is not self._launching:
            self._launching, self._launching_since = buffer, now
        elif now > self._launching_since + _LAUNCH_SECONDS:
            self._launching_since = now
            logger.info("a computation is not launched after %g s; asking torch-xla why", _LAUNCH_SECONDS)
            reason = "torch-xla does not say why"
            try:
                xm.wait_device_ops()
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
            if _XLAC._is_placecholder(buffer):
                raise InternalError(f"a computation could not be launched: {reason}")

    def to_host(self, buffer: torch.Tensor) -> torch.Tensor:
        """Returns a computed buffer as a CPU tensor, which may share the buffer's memory."""
        if self.shares_memory and buffer.numel():
            return torch.utils.dlpack.from_dlpack(to_dlpack(buffer))  # `.cpu()` runs at 0.3 GB/s
        if self._num_devices == 1 or not _XLAC._get_xla_sharding_spec(buffer):
            return buffer.cpu()
        # Local shards come at 1.3 to 3 GB/s (measured on the reference machine); of a replicated buffer one is enough.
        [shards] = _XLAC._get_local_shards([buffer])  # as torch_xla's XLAShardedTensor.local_shards does
        [places] = _XLAC._get_local_shard_replica_and_indices([buffer])
        whole: torch.Tensor | None = None
        for (shard, _), (_, index) in zip(shards, places, strict=True):
            if index is Ellipsis:
                return shard
            if whole is None:
                whole = torch.empty(buffer.shape, dtype=buffer.dtype)
            whole[tuple(index)] = shard
        if whole is None:
            raise InternalError("a sharded buffer has no shard on this host")
        return whole

    def fallback_counters(self) -> dict[str, int]:
        """Operators that ran on the host since the start, with counts."""
        names = [name for name in xla_metrics.counter_names() if name.startswith("aten::")]
        return {name: int(xla_metrics.counter_value(name)) for name in names}

    def lowered_ops(self) -> list[str]:
        """Names of the operators that torch-xla compiles: own kernels, and what PyTorch decomposes into these.

        Kernels of `_ON_THE_HOST` are no more than a call of PyTorch's own.
        """
        decomposed = ("CompositeImplicitAutograd", "CompositeExplicitAutograd")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public call lists kernels
        return [
            name
            for name in torch._C._dispatch_get_all_op_names()
            if name not in _ON_THE_HOST
            and (has_kernel(name, "XLA") or any(has_kernel(name, key) for key in decomposed))
        ]


class _ExactTypes(torch.fx.Interpreter):
    """Runs a graph; where torch-xla makes another type than what it declares, it converts the value.

    Positions declared as int64 may have 32 bits, and numbers declared as float32 64. Otherwise later operators fail,
    and buffers have other sizes than computations that take them expect. Where a result is complex though the graph
    says that it is real, or has another shape, something else was computed.

    Raises:
        CaptureError: so it has.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        super().__init__(torch.nn.Module(), graph=graph)

    def run_node(self, n: torch.fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result if isinstance(result, (tuple, list)) else self._exact(result)
        if n.target is torch.ops.aten.abs.default and result.is_complex():
            result = result.to(result.dtype.to_real())  # torch-xla's has an imaginary part, of zeros
        _check_type(n, result)
        return [self._exact(item) for item in result] if isinstance(result, (tuple, list)) else self._exact(result)

    def _exact(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "xla":
            return value
        actual = _XLAC._get_xla_tensor_shape_type(value)  # nothing public tells XLA's own type
        if value.dtype == torch.int64 and actual in ("s32", "u32"):
            return value + torch.zeros((), dtype=torch.int64, device=value.device)  # `.to` finds nothing to do
        if value.dtype == torch.float32 and actual == "f64":
            return value.to(torch.float64).to(torch.float32)
        return value


def _check_type(node: torch.fx.Node, result: Any) -> None:
    """Raises where an operator's result is complex or real, or has another shape, unlike what the graph says."""
    said = node.meta.get("val")  # not of nodes that were added here
    pairs = zip(result, said, strict=True) if isinstance(said, tuple) else ((result, said),)
    for found, expected in pairs:
        if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor) or found.device.type != "xla":
            continue
        actual = _XLAC._get_xla_tensor_shape_type(found)  # what torch-xla declares may be another type
        if actual.startswith("c") != expected.is_complex() or found.shape != expected.shape:
            raise CaptureError(
                f"{node.target} makes {actual} of shape {tuple(found.shape)} on XLA, and {expected.dtype} of shape "
                f"{tuple(expected.shape)} in eager PyTorch; used at {node.meta.get(SOURCE_KEY) or 'an unknown line'}. "
                "Write it with other operators"
            )


def _partition_spec(placements: Sequence[str], ndim: int) -> tuple[Any, ...]:
    """Returns torch-xla's partition spec: for each dimension, the mesh axes (by number) that split it."""
    axes: list[list[str]] = [[] for _ in range(ndim)]
    for axis, text in enumerate(placements):
        if text != "R":
            axes[int(text[2:-1])].append(str(axis))
    return tuple(None if not names else names[0] if len(names) == 1 else tuple(names) for names in axes)


def _base_name(operator: str) -> str:
    """Returns "scatter_reduce" for "aten::scatter_reduce.two"."""
    return operator.removeprefix("aten::").split(".")[0]


def _barrier(value: torch.Tensor) -> torch.Tensor:
    copy = value.clone()
    xm.optimization_barrier_([copy])
    return copy


def _untouched_memory(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _qr(value: torch.Tensor, reduced: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _on_xla(torch.ops.aten.qr.default, value, reduced)


def _svd(value: torch.Tensor, full: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, S and V of matrices; torch-xla's own S has another shape than it says where there are several."""
    u, _, v = _on_xla(torch.ops.aten.svd.default, value, not full)
    size = min(value.shape[-2:])
    return u, (u[..., :size] * (value @ v[..., :size])).sum(-2), v


def _loop(num_steps: int, start: list[Any], step: Callable[..., list[Any]]) -> list[Any]:
    """Calls `step` so many times with a counter and values, which it returns anew; as one loop of XLA's."""
    zero = xla_builder.Op.scalar(start[0].builder(), 0, dtype=xla_builder.Type.S32)

    def body(counter: Any, *values: Any) -> list[Any]:
        return [counter + counter.scalar_like(1), *step(counter, *values)]

    found = xla_builder.Op.mkwhile([zero, *start], lambda counter, *_: counter < counter.scalar_like(num_steps), body)
    return [found.get_tuple_element(index + 1) for index in range(len(start))]


def _step_of(values: Any, counter: Any, dim: int = 0) -> Any:
    """Returns the values of one step: without dimension `dim`, which counts steps."""
    sizes = list(values.shape().sizes)
    places = [counter if index == dim else counter.zeros_like() for index in range(len(sizes))]
    sizes[dim] = 1
    found = values.dynamic_slice(places, sizes)
    return found.reshape([size for index, size in enumerate(sizes) if index != dim])


def _with_step(values: Any, counter: Any, value: Any) -> Any:
    sizes = value.shape().sizes
    places = [counter, *(counter.zeros_like() for _ in sizes)]
    return values.dynamic_update_slice(value.reshape([1, *sizes]), places)


def _shifted(value: Any, count: int, filler: float) -> Any:
    scalar = xla_builder.Op.scalar(value.builder(), filler, dtype=value.shape().dtype)
    return value.pad(scalar, ((0, 0, 0), (count, -count, 0)))


def _alignments(emitted: Any, skipping: Any) -> Any:
    def step(counter: Any, states: Any, emitted: Any, skipping: Any) -> list[Any]:
        state = _step_of(states, counter)
        one, two = _shifted(state, 1, NEVER), _shifted(state, 2, NEVER) + skipping
        largest = state.max(one).max(two)
        total = (state - largest).exp() + (one - largest).exp() + (two - largest).exp()
        following = counter + counter.scalar_like(1)
        new = largest + total.log() + _step_of(emitted, following)
        return [_with_step(states, following, new), emitted, skipping]

    return _loop(emitted.shape().sizes[0] - 1, [emitted, emitted, skipping], step)[0]


def _alignments_backward(gradient: Any, shares: Any) -> Any:
    last = gradient.shape().sizes[0] - 1

    def step(counter: Any, totals: Any, shares: Any) -> list[Any]:
        before = counter.scalar_like(last - 1) - counter
        total = _step_of(totals, before + counter.scalar_like(1))
        new = _step_of(totals, before)
        parts = _step_of(shares, before, dim=1)
        for way in range(3):
            new = new + _shifted(_step_of(parts, counter.scalar_like(way)) * total, -way, 0.0)
        return [_with_step(totals, before, new), shares]

    return _loop(last, [gradient, shares], step)[0]


def _built(name: str, build: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Returns a function of tensors for one that builds XLA's operators."""
    registered = xla_op_registry.register(name, build)

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = registered(*tensors)
        return found

    return call


#: Our operators, and what they are on XLA.
_OURS = {
    BARRIER: _barrier,
    QR: _qr,
    SVD: _svd,
    ALIGNMENTS: _built("torchways::alignments", _alignments),
    ALIGNMENTS_BACKWARD: _built("torchways::alignments_backward", _alignments_backward),
}


def _on_xla(operator: Any, *args: Any) -> Any:
    """Calls torch-xla's kernel of an operator of which PyTorch makes others, for all devices, before it gets there."""
    return operator._op_dk(torch._C.DispatchKey.XLA, *args)


def _is_shared(tensor: torch.Tensor) -> bool:
    return tensor._use_count() > 1  # no public call tells whether C++ holds a tensor


@dataclass(frozen=True, slots=True)
class _SeedGraph:
    """A graph of one int64[], a seed, and the positions of the arguments that it takes, which are such, too."""

    graph: bytes
    positions: tuple[int, ...]


def _take_seed(graph: torch.fx.Graph) -> int | _SeedGraph | None:
    """Returns what seeds a graph's random operators, if it has any, and forgets it.

    Returns:
        The position of an argument, or what computes the seed of some.
    """
    placeholders = graph.find_nodes(op="placeholder")
    for node in graph.find_nodes(op="call_function", target=MANUAL_SEED):
        seed = node.args[0]
        assert isinstance(seed, torch.fx.Node)
        graph.erase_node(node)
        if seed.op == "placeholder":
            return placeholders.index(seed)
        needed = {seed}
        for before in reversed(graph.nodes):
            if before in needed:
                needed.update(before.all_input_nodes)
        alone = torch.fx.Graph()
        copies: dict[torch.fx.Node, torch.fx.Node] = {}
        for before in graph.nodes:
            if before in needed:
                copies[before] = alone.node_copy(before, copies.__getitem__)
        alone.output((copies[seed],))
        graph.eliminate_dead_code()
        taken = tuple(position for position, item in enumerate(placeholders) if item in needed)
        return _SeedGraph(serialize_graph(alone), taken)
    return None


def _move_to_device(graph: torch.fx.Graph, device: torch.device) -> None:
    """Makes operators that create tensors create them on `device`."""
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.update_kwarg("device", device)
        node.args = torch.fx.node.map_aggregate(
            node.args, lambda item: device if isinstance(item, torch.device) else item
        )

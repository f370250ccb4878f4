"""`tw.checkpoint.save`: a snapshot that is ordered with the runs, then files, written beside the training."""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import copy
import dataclasses
import logging
import os
import shutil
import threading
import time
import warnings
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from torchways.array import Array
from torchways.checkpoint import folders
from torchways.checkpoint.state import RANDOM_STATE, collect, form_of, random_state, spec_of, to_bytes
from torchways.controller.buffers import RemoteBuffer
from torchways.errors import CheckpointError, ConfigError, DeadlineExceeded, TorchwaysError
from torchways.rpc import torchways_pb2 as pb
from torchways.signals import result_of

logger = logging.getLogger(__name__)

# The storage writer asks tensors for their typed storage.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, "torch.distributed.checkpoint")

#: How often a wait for a checkpoint is said in the log.
_SAY_SECONDS = 30.0

_lock = threading.Lock()
#: The checkpoint that is being written.
_current: Saving | None = None


class Saving:
    """A checkpoint that is being written, beside whatever the program does next.

    Attributes:
        path: where it will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pid = os.getpid()
        self._future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def done(self) -> bool:
        """Whether it is written, or will never be."""
        return self._future.done()

    def result(self, timeout: timedelta | None = None) -> Path:
        """Waits until it is written; returns where.

        Raises:
            CheckpointError: it could not be written. What was saved before is as it was.
            DeadlineExceeded: `timeout` passed.
        """
        try:
            result_of(self._future, None if timeout is None else timeout.total_seconds())
        except concurrent.futures.TimeoutError as error:
            raise DeadlineExceeded(f"waited {timeout} for the checkpoint {self.path}") from error
        return self.path

    def _wait(self) -> None:
        """Waits until it is over, however it ends."""
        started = time.monotonic()
        while not self._future.done() and os.getpid() == self._pid:  # who was forked meanwhile has no thread for it
            with contextlib.suppress(concurrent.futures.TimeoutError, CheckpointError):
                result_of(self._future, _SAY_SECONDS)
            if not self._future.done():
                logger.warning("waiting for the checkpoint %s since %.0f s", self.path, time.monotonic() - started)


def save(folder: str | os.PathLike[str], state: Any, *, step: int | None = None, keep: int | None = None) -> Saving:
    """Saves a checkpoint beside the training.

    What is saved is what the calls made so far come to. `save` returns before they are over: later calls may run at
    once, but for a computation that would overwrite a value in place: it waits until that is copied to its host's
    memory. Executors write the arrays on their devices, side by side. One checkpoint is written at a time: `save` waits
    for the one before.

    A checkpoint that is not complete is never loaded, whatever ends it. If files cannot be written, the training goes
    on: the error is logged, and `Saving.result` raises it.

    Args:
        folder: where the checkpoint goes, or with `step` the folder that holds all of them. The executors must see it:
            on several machines, a shared file system. A checkpoint that is there is replaced, and nothing else is.
        state: a module, or a dictionary of what to keep: modules, optimizers, arrays, tensors, dictionaries, plain
            values, and whatever has `state_dict` and `load_state_dict` (learning rate schedules, data loaders, ...).
            The states of the random generators of PyTorch, Python and NumPy come with it.
        step: number of the checkpoint, which is then in the folder ``step_00000100`` of `folder`.
        keep: how many to keep in `folder`: this one, and those of the highest steps. Others are removed once this one
            is complete. None: all.

    Returns:
        The checkpoint under way: `result()` waits for it.

    Raises:
        CheckpointError: `state` cannot be saved, or something other than a checkpoint is where it would be.
        ConfigError: `step` or `keep` is out of range.
    """
    global _current
    if step is not None and step < 0:
        raise ConfigError(f"step is {step}, and must not be negative")
    if keep is not None and (keep < 1 or step is None):
        raise ConfigError(f"keep is {keep}: it must be at least 1, and goes with step, which numbers checkpoints")
    final = folders.step_folder(Path(folder).absolute(), step)
    folders.check_replaceable(final)
    with _lock:
        previous = _current
        if previous is not None:
            previous._wait()
        saving = Saving(final)
        job = _Job(final, step is not None, keep, collect(state))
        try:
            job.snapshot()
        except BaseException:
            job.clean_up()
            raise
        _current = saving
        threading.Thread(target=_run, args=(job, saving), name="torchways-checkpoint", daemon=True).start()
    return saving


def wait_for_saves() -> None:
    """Waits until the checkpoint that is being written is complete, or has failed."""
    saving = _current
    if saving is not None:
        saving._wait()


atexit.register(wait_for_saves)


def _run(job: _Job, saving: Saving) -> None:
    try:
        started = time.monotonic()
        job.write()
        logger.info("saved %s in %.1f s", saving.path, time.monotonic() - started)
        saving._future.set_result(None)
    except BaseException as error:
        job.clean_up()
        reason = str(error) if isinstance(error, (OSError, TorchwaysError)) else f"{type(error).__name__}: {error}"
        known = folders.latest(saving.path.parent)
        before = f"the last complete one is {known.name}" if known is not None else "there is none before it"
        message = f"checkpoint {saving.path} could not be saved: {reason}; {before}. Training goes on"
        logger.error("%s", message)
        failure = CheckpointError(message)
        failure.__cause__ = error
        saving._future.set_exception(failure)


class _Job:
    """One checkpoint on its way.

    Args:
        final: where it goes.
        is_numbered: whether it is one of the checkpoints of a folder.
        keep: how many there may be when it is complete.
        tree: nested dictionaries of tensors and plain values.
    """

    def __init__(self, final: Path, is_numbered: bool, keep: int | None, tree: dict[str, Any]) -> None:
        self._final = final
        self._is_numbered = is_numbered
        self._keep = keep
        self._tree = {**tree, RANDOM_STATE: to_bytes(random_state())}
        self._partial: Path | None = None
        self._error: BaseException | None = None
        self._written: list[concurrent.futures.Future[list[pb.SavedTensor]]] = []

    def snapshot(self) -> None:
        """Settles all values: what the caller does next changes none of them."""
        try:
            self._partial = folders.begin(self._final)
        except OSError as error:
            self._error = error
        leaves, spec = pytree.tree_flatten(self._tree)
        with contextlib.ExitStack() as locks:
            sessions = {id(session): session for leaf in leaves if (session := _session_of(leaf)) is not None}
            for session in sessions.values():
                locks.enter_context(session.lock)
            remote: dict[int, RemoteBuffer] = {}
            for number, leaf in enumerate(leaves):
                buffer = leaf._buffer if isinstance(leaf, Array) else None
                if isinstance(buffer, RemoteBuffer):
                    leaves[number] = form_of(leaf)
                    remote[id(leaves[number])] = buffer
                elif isinstance(leaf, torch.Tensor):
                    leaves[number] = leaf.detach().cpu() if buffer is not None else leaf.detach().clone()
                else:
                    leaves[number] = copy.deepcopy(leaf)
            self._tree = pytree.tree_unflatten(leaves, spec)
            self._start_writing(remote)

    def _start_writing(self, remote: Mapping[int, RemoteBuffer]) -> None:
        flat, _ = flatten_state_dict(self._tree)
        named = {name: (remote[id(leaf)], spec_of(leaf)) for name, leaf in flat.items() if id(leaf) in remote}
        self._remote = frozenset(named)
        if self._partial is None:
            return
        by_session: dict[int, dict[str, Any]] = {}
        for name, (buffer, spec) in named.items():
            by_session.setdefault(id(buffer.session), {})[name] = (buffer, spec)
        for buffers in by_session.values():
            session: Any = next(iter(buffers.values()))[0].session
            if wait_for_saves not in session.before_close:
                session.before_close.append(wait_for_saves)
            self._written += session.values.save(str(self._partial), buffers)

    def write(self) -> None:
        """Waits for the executors, writes what is the controller's, and makes the checkpoint complete."""
        if self._error is not None:
            raise self._error
        assert self._partial is not None
        # First: making the plan would hold up the caller, who has just got `save` back and needs Python's lock.
        tensors = [tensor for written in self._written for tensor in written.result()]
        writer = FileSystemWriter(self._partial)
        planner = DefaultSavePlanner()
        planner.set_up_planner(self._tree, writer.storage_meta(), is_coordinator=True)
        writer.set_up_storage_writer(True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        [plan] = writer.prepare_global_plan(plans)
        mine = [item for item in plan.items if item.index.fqn not in self._remote]
        results = writer.write_data(dataclasses.replace(plan, items=mine), planner).wait()
        index_of = {item.index.fqn: item.index for item in plan.items}
        results += [_result(index_of[tensor.name], tensor) for tensor in tensors]
        writer.finish(metadata, [results])
        folders.commit(self._partial, self._final)
        if self._keep is not None:
            folders.prune(self._final, self._keep)
        latest = folders.latest(self._final.parent) if self._is_numbered else None
        if latest is not None and latest != self._final:
            logger.warning(
                "saved %s, but %s is of a higher step: that is the one that is loaded from the folder. Remove it, or "
                "give another folder",
                self._final,
                latest.name,
            )

    def clean_up(self) -> None:
        """Removes what was written of a checkpoint that will never be complete."""
        if self._partial is not None:
            concurrent.futures.wait(self._written)  # nobody writes there any more
            shutil.rmtree(self._partial, ignore_errors=True)


def _session_of(leaf: Any) -> Any:
    buffer = leaf._buffer if isinstance(leaf, Array) else None
    return buffer.session if isinstance(buffer, RemoteBuffer) else None


def _result(index: MetadataIndex, tensor: pb.SavedTensor) -> WriteResult:
    return WriteResult(
        index=index,
        size_in_bytes=tensor.length,
        storage_data=_StorageInfo(tensor.file, tensor.offset, tensor.length),
    )

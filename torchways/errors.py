"""Every error that torchways raises on purpose, and how errors cross processes.

There are three families: the user's program must change (`UserError`), a node of it failed on an executor
(`RemoteError`), or a machine or process failed (`InfraError`). Besides these, `InternalError` is a bug in torchways,
`ParityError` is a difference that parity mode found, and `CheckpointError` is about files. Each message names what
happened, the values, the rule and the remedy.
"""

from __future__ import annotations

from dataclasses import dataclass


class TorchwaysError(Exception):
    """Base of all errors that torchways raises on purpose."""


class UserError(TorchwaysError):
    """The program, its arguments or its configuration must change."""


class CaptureError(UserError):
    """A function cannot be captured as one graph (data-dependent branch, unsupported operator)."""


class DataDependentError(CaptureError):
    """The operators or shapes of a function depend on the values of tensors, so it cannot be captured as one graph."""


class ShapeError(UserError, ValueError):
    """A shape or dtype does not fit."""


class PlacementError(UserError, ValueError):
    """A mesh, axis or placement does not fit."""


class ConfigError(UserError, ValueError):
    """A setting is unknown or out of range."""


class CheckpointError(TorchwaysError):
    """A checkpoint could not be written or read. What was saved before is as it was."""


class ResourceExhausted(UserError):
    """There are not enough devices, or there is not enough memory."""


class RemoteError(TorchwaysError):
    """A node of a program failed on an executor.

    Attributes:
        function: compiled function that failed.
        source: the user's line, ``file.py:41 in train_step``.
        remote_traceback: Python traceback on the executor.
        run_id: the run that failed first. Of several failures, the one with the lowest run is reported.
    """

    def __init__(
        self, message: str, *, function: str = "", source: str = "", remote_traceback: str = "", run_id: int = 0
    ) -> None:
        super().__init__(message)
        self.function = function
        self.source = source
        self.remote_traceback = remote_traceback
        self.run_id = run_id


class NonFiniteError(RemoteError):
    """A compiled function made NaN or infinity, while values were checked; see `tw.check_values`."""


class DataError(RemoteError):
    """An input pipeline failed: its dataset cannot be made, or an item of it cannot be read; see `tw.data_loader`."""


class ParityError(TorchwaysError):
    """Parity mode found a node of a program whose values differ from eager PyTorch; see `tw.parity`.

    Attributes:
        program: name of the program.
        function: the compiled function, or other node, that diverges.
        source: the user's line, ``file.py:41 in train_step``.
        operator, operator_source: the first operator in the node that diverges by itself, such as "aten::gelu", and
            its line; empty if there is none.
        num_different: elements of the node's first diverging output whose error exceeds the tolerance.
        max_abs_error, max_rel_error: largest errors of that output.
    """

    def __init__(
        self,
        message: str,
        *,
        program: str = "",
        function: str = "",
        source: str = "",
        operator: str = "",
        operator_source: str = "",
        num_different: int = 0,
        max_abs_error: float = 0.0,
        max_rel_error: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.program = program
        self.function = function
        self.source = source
        self.operator = operator
        self.operator_source = operator_source
        self.num_different = num_different
        self.max_abs_error = max_abs_error
        self.max_rel_error = max_rel_error


class RunCancelled(TorchwaysError):
    """The array's run was cancelled, or its deadline passed; see `tw.cancel`."""


class InfraError(TorchwaysError):
    """A process or a connection failed. Your program may be correct."""


class ExecutorLost(InfraError):
    """An executor ended or cannot be reached, and its buffers are gone; or a link to it broke under a run."""


class ClusterLost(InfraError):
    """The resource manager, a scheduler or the node agent ended or cannot be reached."""


class DataProcessLost(InfraError):
    """The process of an input pipeline ended or cannot be reached. Make the loader anew and load its position."""


class DeadlineExceeded(InfraError, TimeoutError):
    """A wait took longer than its deadline."""


class SessionClosed(InfraError):
    """The session that an array or mesh belongs to has been shut down."""


class AccessDenied(InfraError):
    """A caller named what belongs to another client, or called what its role may not."""


class InternalError(TorchwaysError):
    """A bug in torchways. Please report it with the message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An error as it crosses processes; `to_error` makes it an exception again.

    Attributes:
        kind: class name, a key of `ERROR_CLASSES`.
        message: what, values, rule, remedy.
        function: compiled function that failed, or empty.
        source: the user's line, or empty.
        traceback: remote Python traceback, or empty.
        run_id: the run that failed first.
        process: process that reported it, e.g. ``executor i0.e1``.
    """

    kind: str
    message: str
    function: str = ""
    source: str = ""
    traceback: str = ""
    run_id: int = 0
    process: str = ""

    def to_error(self) -> TorchwaysError:
        """Returns the exception to raise in the user's process."""
        cls = ERROR_CLASSES.get(self.kind, InternalError)
        message = self.message
        if self.source:
            message += f"\n  at {self.source}"
        if self.process:
            message += f"\n  reported by {self.process}"
        if issubclass(cls, RemoteError):
            if self.traceback:
                message += f"\n  remote traceback:\n{self.traceback}"
            return cls(
                message,
                function=self.function,
                source=self.source,
                remote_traceback=self.traceback,
                run_id=self.run_id,
            )
        return cls(message)


def failure_from(error: BaseException, *, process: str = "") -> Failure:
    """Describes `error` for another process; what is not ours becomes an `InternalError`."""
    kind = type(error).__name__
    if kind in ERROR_CLASSES:
        return Failure(kind=kind, message=str(error), process=process)
    return Failure(kind="InternalError", message=f"{kind}: {error}", process=process)


def _all_subclasses(cls: type[TorchwaysError]) -> dict[str, type[TorchwaysError]]:
    classes = {cls.__name__: cls}
    for subclass in cls.__subclasses__():
        classes |= _all_subclasses(subclass)
    return classes


#: Wire code (class name) of every error class.
ERROR_CLASSES: dict[str, type[TorchwaysError]] = _all_subclasses(TorchwaysError)

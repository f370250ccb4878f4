"""Every error that torchways raises on purpose, and how errors cross processes.

Three families answer three questions: is it the user's program (`UserError`), a node of it that failed on an
executor (`RemoteError`), or the machines (`InfraError`)? What is none of these is our bug (`InternalError`), or what
parity mode was asked to find (`ParityError`).
Messages say what happened, with which values, by which rule, and what to do.
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
    """What a function computes, or in which shapes, depends on the values of tensors, so it has no one graph."""


class ShapeError(UserError, ValueError):
    """A shape or dtype does not fit."""


class PlacementError(UserError, ValueError):
    """A mesh, axis or placement does not fit."""


class ConfigError(UserError, ValueError):
    """A setting is unknown or out of range."""


class ResourceExhausted(UserError):
    """More devices or memory was asked for than there is."""


class RemoteError(TorchwaysError):
    """A node of a program failed on an executor.

    Attributes:
        function: compiled function that failed.
        source: the user's line, ``file.py:41 in train_step``.
        remote_traceback: Python traceback on the executor.
        run_id: the run that failed first; of several failures the lowest is reported.
    """

    def __init__(
        self, message: str, *, function: str = "", source: str = "", remote_traceback: str = "", run_id: int = 0
    ) -> None:
        super().__init__(message)
        self.function = function
        self.source = source
        self.remote_traceback = remote_traceback
        self.run_id = run_id


class ParityError(TorchwaysError):
    """Parity mode: a node of a program gives other values than eager PyTorch; see `tw.parity`.

    Attributes:
        program: its name.
        function: compiled function, or other node, that diverges.
        source: the user's line, ``file.py:41 in train_step``.
        operator, operator_source: the first operator inside that diverges by itself, "aten::gelu", and its line; empty
            where there is none.
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


class InfraError(TorchwaysError):
    """A process or a connection failed; the program may be right."""


class ExecutorLost(InfraError):
    """An executor process ended or cannot be reached; its buffers are gone."""


class ClusterLost(InfraError):
    """The resource manager, a scheduler or the node agent ended or cannot be reached."""


class DeadlineExceeded(InfraError, TimeoutError):
    """A wait took longer than its deadline."""


class SessionClosed(InfraError):
    """The session that an array or mesh belongs to has been shut down."""


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
        if cls is RemoteError:
            if self.traceback:
                message += f"\n  remote traceback:\n{self.traceback}"
            return RemoteError(
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

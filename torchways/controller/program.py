"""`@tw.program`: traces a Python function once, then dispatches it whole.

A call looks for a variant that was traced for these argument shapes and this state structure. If there is one, the
call only binds buffers to it: one message an island, whatever the program does.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torchways.array import Array
from torchways.capture.current_trace import current_trace
from torchways.capture.python_state.functions import unread_parameters
from torchways.capture.python_state.places import Fixed
from torchways.capture.python_state.watcher import active_watcher
from torchways.capture.source import user_line
from torchways.controller.auto_schedule import improve_schedules
from torchways.controller.buffers import RemoteBuffer
from torchways.controller.fitting import automatic_loops
from torchways.controller.reports.report import ProgramReport, report_of
from torchways.controller.running import run_variant
from torchways.controller.session import Session
from torchways.controller.signatures import Signature, difference, signature_of
from torchways.controller.trace_check import check_trace, checks_traces
from torchways.controller.tracing import capture_again, trace_variant
from torchways.controller.variant import Dispatch, Variant
from torchways.controller.variants import DEFAULT_OPTIONS, VariantCache, VariantOptions
from torchways.errors import ConfigError, DataDependentError, UserError
from torchways.ids import RunId
from torchways.ir.stages import schedule_of
from torchways.mesh import Placements, VirtualSlice
from torchways.passes.lower import LoweredProgram, lower

logger = logging.getLogger(__name__)


class ProgramFunction:
    """A Python function that runs as one dataflow program. Made by `tw.program`.

    A call returns at once, with arrays (futures) in place of tensors. `print(f)` shows the last traced program;
    `f.lower(...)` runs the passes on it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        mesh: VirtualSlice | None,
        get_session: Callable[[], Session],
        dispatch: Dispatch = "parallel",
        is_one_node: bool = False,
        options: VariantOptions = DEFAULT_OPTIONS,
    ) -> None:
        if dispatch not in ("parallel", "sequential"):
            raise ConfigError(f"dispatch={dispatch!r}: a program is dispatched 'parallel' or 'sequential'")
        functools.update_wrapper(self, function)
        self._function = function
        self.mesh = mesh
        self._get_session = get_session
        self._dispatch = dispatch
        #: It is one compiled function: there are no smaller nodes that it could be run by.
        self._is_one_node = is_one_node
        self._padding = options.padding
        self._variants: VariantCache[Variant] = VariantCache(options.max_variants)
        #: Signatures for which the graph depends on values: these calls run node by node.
        self._untraceable: set[Any] = set()
        self._last: Variant | None = None
        self._reports = _Reports()
        self._times_traced = 0
        self._symbolic: set[Any] = set()
        #: Of these, those that a trace cannot do with a stand-in for.
        self._constant: set[Any] = set()
        self._unread = unread_parameters(function)
        #: Make copies of arrays for replicas, by slice and placements.
        self._copiers: dict[Any, ProgramFunction] = {}

    @property
    def traced_function(self) -> Callable[..., Any]:
        """The Python function that this program runs."""
        return self._function

    @property
    def _name(self) -> str:
        return getattr(self._function, "__name__", type(self._function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (watcher := active_watcher()) is not None:
            watcher.note_object_or_function(Fixed(self._function, self._name), self._function)
            return self._function(*args, **kwargs)  # part of the program that is being traced
        session = self._get_session()
        session.check()
        given = None
        if self._padding is not None:
            given = self._without_unread(args, kwargs) if self._unread else (args, kwargs)
            args, kwargs = self._padding.pad(self._function, args, kwargs)
        if self._unread:
            args, kwargs = self._without_unread(args, kwargs)
        with session.lock:  # to other threads a call is one step: tracing, binding, sending, and what it writes
            signature = signature_of(args, kwargs, self._function)
            if given is not None:
                signature.given = given
            variant = self._variants.find(signature.key, lambda variant: variant.holds(session, signature))
            reason = None
            if variant is not None and checks_traces():
                self._check(variant, signature, session)
            if variant is None and signature.key not in self._untraceable:
                try:
                    variant = self._trace(signature, session)
                except DataDependentError as error:
                    if self._is_one_node:
                        raise
                    reason = error
                if len(self._untraceable) > self._variants.max_variants:
                    self._untraceable.clear()
            if variant is not None:
                self._last = variant
                improve_schedules(variant)
                return run_variant(variant, signature, self._copies_on)
        return self._run_untraced(args, kwargs, reason)

    def _without_unread(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call without the values that the function never reads."""
        names = self._function.__code__.co_varnames[: self._function.__code__.co_argcount]
        kept = [None if name in self._unread else value for name, value in zip(names, args, strict=False)]
        return (*kept, *args[len(names) :]), {
            name: None if name in self._unread else value for name, value in kwargs.items()
        }

    def _check(self, variant: Variant, signature: Signature, session: Session) -> None:
        symbolic = frozenset(self._symbolic - self._constant)
        new = capture_again(self._function, self._name, signature, self.mesh, session, symbolic)
        if new.reschedule is not None:
            new = new.reschedule({loop.number: schedule_of(loop) for loop in automatic_loops(variant.captured)})
        check_trace(self._name, variant.captured, new, signature)

    def _run_untraced(self, args: Any, kwargs: Any, reason: DataDependentError | None = None) -> Any:
        """Runs the Python function itself: each compiled function that it calls is dispatched when it is called.

        Raises:
            DataDependentError: it computes gradients, which only a trace can.
        """
        try:
            with torch.no_grad():
                result = self._function(*args, **kwargs)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise reason or DataDependentError(f"{self._name} depends on values and computes gradients") from error
            raise
        if reason is not None:
            logger.warning("%s; it runs node by node", reason)
            self._untraceable.add(signature_of(args, kwargs).key)
        return result

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else _BoundProgram(self, instance)

    def __str__(self) -> str:
        if self._last is None:
            return f"program {self._name}: not traced yet; call it once"
        return str(self._last.lowered.program)

    @property
    def num_traces(self) -> int:
        """Number of traces that are kept."""
        return len(self._variants)

    def lower(self, *, print_after: str | None = None) -> LoweredProgram:
        """Runs the passes again on the last traced program.

        Args:
            print_after: name of a pass. The program is printed before and after this pass.

        Raises:
            UserError: the program has not been called yet.
        """
        if self._last is None:
            raise UserError(f"{self} before lower()")
        return lower(self._last.captured.program, print_after=print_after)

    def report(self) -> ProgramReport:
        """Returns what the program's last calls took, five at most, and what they move and hold.

        It has time by node and by your lines, waits by reason, bytes by transfer, the peak of each slice's memory, and
        how microbatches ran beside what their schedules predict. Waits until these calls are over.

        ``print(f.report())`` shows it as tables, and ``f.report().write_html(path)`` writes a page. If you have called
        the program since its last report, both show how the numbers have changed.

        Raises:
            UserError: the program has not been called yet, or cannot be traced as a whole.
        """
        if self._last is None and self._untraceable:
            raise UserError(
                f"{self._name} depends on values and runs node by node, so it has no report: ask the programs and "
                "compiled functions that it calls for theirs"
            )
        if self._last is None:
            raise UserError(f"{self} before report()")
        self._last.session.check()
        newest = self._last.recent[-1].run_ids[-1] if self._last.recent else None
        return self._reports.compared(report_of(self._last), newest)

    def _trace(self, signature: Signature, session: Session) -> Variant:
        variant = self._make_variant(signature, session)
        self._variants.add(signature.key, variant)
        return variant

    def _make_variant(self, signature: Signature, session: Session) -> Variant:
        self._log_trace(signature, session)
        if symbolic := self._numbers_that_change(signature):
            try:
                return self._traced(signature, session, symbolic)
            except Exception as error:
                # What stands in for a number may lack what the number itself can do. If it is not that, the trace with
                # the number says it.
                logger.info("%s: a number that changes is no input (%s); one trace for each", self._name, error)
            self._constant |= symbolic
        return self._traced(signature, session, frozenset())

    def _traced(self, signature: Signature, session: Session, symbolic: frozenset[Any]) -> Variant:
        return trace_variant(
            self._function, self._name, signature, self.mesh, session, self._dispatch, symbolic=symbolic
        )

    def _copies_on(
        self, mesh: VirtualSlice, arrays: Sequence[Array], placements: Sequence[Placements]
    ) -> list[RemoteBuffer]:
        """Returns copies of arrays on a slice."""

        def copies(*values: torch.Tensor) -> list[torch.Tensor]:
            mode = current_trace()
            assert mode is not None
            return [mode.constrain(value, mesh, texts) for value, texts in zip(values, placements, strict=True)]

        key = (mesh, tuple(placements))
        if key not in self._copiers:
            self._copiers[key] = ProgramFunction(copies, mesh, self._get_session)
        made: list[Array] = self._copiers[key](*(array.detach() for array in arrays))
        return [array._buffer for array in made if isinstance(array._buffer, RemoteBuffer)]

    def _numbers_that_change(self, signature: Signature) -> frozenset[Any]:
        """Returns places whose number was seen to change: it is an input from then on."""
        for variant in self._variants.of_key(signature.key):
            self._symbolic |= variant.state.changed_numbers(signature)
        return frozenset(self._symbolic - self._constant)

    def _log_trace(self, signature: Signature, session: Session) -> None:
        """Says why the function is traced, if it is not the first time."""
        self._times_traced += 1
        if self._variants:
            kept, most = len(self._variants), self._variants.max_variants
            is_ours = str(getattr(self._function, "__module__", "")).startswith("torchways.")  # tw.generate's, say
            logger.log(
                logging.INFO if is_ours else logging.WARNING,
                "tracing %s anew at %s, for the %s time (%d of at most %d traces kept%s): %s",
                self._name,
                user_line(),
                _ordinal(self._times_traced),
                kept,
                most,
                ": buckets= pads sizes, max_variants= keeps more" if kept == most else "",
                self._why(signature, session),
            )

    def _why(self, signature: Signature, session: Session) -> str:
        """Says why no variant serves a call."""
        same = self._variants.of_key(signature.key)
        if not same:
            return difference(self._function, signature, self._variants.keys())
        fewest = min([variant.changes(session, signature) for variant in same], key=len)
        return "; ".join(fewest)


class _Reports:
    """The reports of a program that were asked for last."""

    def __init__(self) -> None:
        self._newest: ProgramReport | None = None
        self._newest_run: RunId | None = None
        self._before: ProgramReport | None = None

    def compared(self, report: ProgramReport, newest_run: RunId | None) -> ProgramReport:
        """Returns a report beside the last one of other calls, given the newest run that it knows of."""
        if newest_run != self._newest_run:
            self._before = self._newest
        self._newest, self._newest_run = report, newest_run
        return report if self._before is None else report.against(self._before)


class _BoundProgram(functools.partial):
    """A program that is a method, of one object."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.func, name)


def eager_program(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns what `tw.program` returns in eager mode: what it is given; a function with an empty report."""
    if not inspect.isfunction(function):
        return function

    @functools.wraps(function)
    def program(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    program.report = lambda: ProgramReport(program=function.__name__, is_eager=True)  # type: ignore[attr-defined]
    return program


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if number % 100 in (11, 12, 13) else endings.get(number % 10, 'th')}"

"""What a program's report consists of, beside its loops (loops.py). Data only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

#: "compute": a compiled function, or several that executors issue as one. "transfer": values that go to another slice.
#: "sum": values of several slices that are added up.
NodeKind: TypeAlias = Literal["compute", "transfer", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReport:
    """What a node of the program takes in a call.

    Executors issue computations that stand next to each other as one: these are one node, "step/0 and 2 more". In a
    pipeline, a stage's forward and backward passes are nodes, for all microbatches together.

    Attributes:
        kind: "compute", "transfer" or "sum".
        name: of the compiled function, with stage and kind in a pipeline, "step/0 1F"; of a transfer or a sum, dtype,
            shape and placements of the value.
        slices: the numbers of its slices: of a transfer, from and to; of a sum, all that take part.
        source: the user's line. Several are joined by ", ".
        num_runs: how often it runs in a call.
        time_us: what these take together, in microseconds: the median over the calls. On a slice of several hosts, that
            of the slowest. A transfer is timed where it is sent, from the time that its value is on the host. None: it
            was not measured.
        share: of `ProgramReport.call_us`, 0 to 1. Slices work at the same time, so shares may add up to more than 1.
    """

    kind: NodeKind
    name: str
    slices: tuple[int, ...]
    source: str
    num_runs: int
    time_us: float | None
    share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LineReport:
    """What the nodes of a line of the user's take in a call.

    Attributes:
        source: the line, "train.py:41 in train_step". Lines whose operators are one node are joined by ", ".
        compute_us: the sum of the times of its computations, in microseconds.
        transfer_us: of its transfers and sums.
        share: both of `ProgramReport.call_us`, 0 to 1 and above.
    """

    source: str
    compute_us: float
    transfer_us: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitReport:
    """A reason for which the script, a scheduler or a device waited in the calls.

    Attributes:
        reason: what it waited for.
        where: who waited: "script", "scheduler i0", or the devices of a slice, "@0".
        mean_us: microseconds in a call, the mean over all calls: waits are rare, and a median would leave them out.
        longest_us: the longest single wait, in microseconds.
        num_calls: the calls that had such a wait.
    """

    reason: str
    where: str
    mean_us: float
    longest_us: float
    num_calls: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferReport:
    """Values that go between slices in a call. Those that are alike and made at the same line are one item.

    Attributes:
        kind: "transfer" or "sum".
        value: dtype, shape and placements where it is made, "fp32[64,128][S(0)]".
        slices: numbers of slices: from and to; of a sum, all that take part.
        source: the line where the value is made, or where it is read if nothing of the program makes it.
        num_runs: how many of them there are in a call.
        value_bytes: size of the whole values, in bytes, all of a call together; of a sum, on one slice.
        sent_bytes: bytes that executors sent to others for them in a call, the median over the calls. Zero between
            slices of the same devices. None: it was not measured.
        time_us: what they take in a call, as in `NodeReport`.
    """

    kind: Literal["transfer", "sum"]
    value: str
    slices: tuple[int, ...]
    source: str
    num_runs: int
    value_bytes: int
    sent_bytes: float | None
    time_us: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryReport:
    """The most that a slice's part of the program holds at a time, as the check before a run counts it.

    It counts arguments, results and all values between computations, not what XLA needs inside a computation, and no
    buffers that the program does not use.

    Attributes:
        slice_index: the number of the slice.
        peak_bytes: the most, bytes per device.
        budget_bytes: of a device; 0: no limit.
        function: the compiled function that runs then; "" if the arguments alone are the most.
        source: its line.
        largest: the largest value at that time: dtype, shape and placements.
        largest_bytes: its bytes per device.
    """

    slice_index: int
    peak_bytes: int
    budget_bytes: int
    function: str
    source: str
    largest: str
    largest_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineBar:
    """Something that a slice did in the call whose length is the median.

    Attributes:
        kind: "compute", "transfer" or "sum".
        name: of the node; in a pipeline, with the action.
        source: its line.
        slice_index: the slice; of a transfer, the one that sends.
        start_us, end_us: microseconds from the start of the call's first work.
    """

    kind: NodeKind
    name: str
    source: str
    slice_index: int
    start_us: float
    end_us: float


def slices_text(kind: NodeKind, slices: tuple[int, ...]) -> str:
    """Returns ``@0 -> @1`` for a transfer, and ``@0, @1`` for anything else."""
    return (" -> " if kind == "transfer" else ", ").join(f"@{index}" for index in slices)

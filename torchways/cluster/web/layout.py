"""Where a program's nodes and edges are drawn: a column a slice, from top to bottom in program order. Pure."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torchways.rpc import torchways_pb2 as pb

#: Lines between two nodes, at most, for each node: a value that all nodes read would hide what else there is.
_EDGES_PER_NODE = 4
_MAX_CROSSING = 20_000


@dataclass(slots=True, kw_only=True)
class Node:
    """What is drawn as one box.

    Attributes:
        column: of its slice.
        kind: "compute", "send", "receive", "all_reduce", "loop", "arguments", "results" or "summary".
        lines: its text; the first is its name.
        details: for who points at it.
        row: from the top; set by `layout`.
        depth: 1 within a loop.
    """

    column: int
    kind: str
    lines: tuple[str, ...]
    details: str = ""
    row: int = 0
    depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """An edge between two nodes, by their positions. `label`: what flows."""

    source: int
    target: int
    label: str


@dataclass(slots=True, kw_only=True)
class Layout:
    """What is drawn. `columns`: their titles. `num_hidden`: edges that are left out."""

    columns: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    num_hidden: int = 0


def layout(outlines: Sequence[pb.ProgramOutline]) -> Layout:
    """Places what all islands know of one program."""
    if any(outline.summaries for outline in outlines):
        return _summarised(outlines)
    found = _Builder()
    items = sorted(
        (item for outline in outlines for item in outline.slices),
        key=lambda item: (item.part.slice_index, item.slice_id),
    )
    for column, item in enumerate(items):
        found.add_slice(column, item)
    return found.finished()


class _Builder:
    """Collects nodes and edges, column by column."""

    def __init__(self) -> None:
        self._layout = Layout()
        #: Of each edge: the nodes that send on it and that receive from it, and those that take part in a sum.
        self._senders: dict[int, list[int]] = defaultdict(list)
        self._receivers: dict[int, list[int]] = defaultdict(list)
        self._sums: dict[int, list[int]] = defaultdict(list)
        self._counts: Counter[tuple[int, int]] = Counter()
        self._labels: dict[tuple[int, int], str] = {}
        self._last_of_column: dict[int, int] = {}
        self._before: dict[int, int] = {}

    def add_slice(self, column: int, item: pb.SliceProgram) -> None:
        """Adds a slice's part."""
        part = item.part
        mesh = "x".join(map(str, item.mesh_shape))
        self._layout.columns.append(f"@{part.slice_index}  slice {item.slice_id} ({mesh})")
        makers: dict[int, int] = {}
        if part.num_args:
            specs = [f"${slot}: {_spec(part.slots, slot)}" for slot in range(min(part.num_args, len(part.slots)))]
            noun = "argument" if part.num_args == 1 else "arguments"
            self._node(column, "arguments", (f"{part.num_args} {noun}",), _first(specs))
        for instruction in part.instructions:
            self._instruction(column, part, part.slots, instruction, makers, 0)
        kept = [result.slot for result in part.results]
        if kept:
            noun = "result" if len(kept) == 1 else "results"
            specs = [f"${slot}: {_spec(part.slots, slot)}" for slot in kept]
            node = self._node(column, "results", (f"{len(kept)} {noun}",), _first(specs))
            self._reads(node, kept, makers, part.slots)

    def _instruction(
        self,
        column: int,
        part: pb.Part,
        slots: Sequence[pb.TensorSpec],
        instruction: pb.Instruction,
        makers: dict[int, int],
        depth: int,
        action: str = "",
    ) -> None:
        kind = instruction.WhichOneof("instruction")
        prefix = f"{action} " if action else ""
        reads: Sequence[int] = ()
        writes: Sequence[int] = ()
        match kind:
            case "compute":
                compute = instruction.compute
                reads, writes = compute.inputs, compute.outputs
                function = pb.Function(name="?")
                if compute.function_index < len(part.functions):
                    function = part.functions[compute.function_index]
                made = [f"${slot}: {_spec(slots, slot)}" for slot in writes]
                details = f"{function.name}\n{function.source}\n{function.num_operators} operators\n{_first(made)}"
                node = self._node(column, kind, (prefix + function.name, function.source), details, depth)
            case "send":
                send = instruction.send
                reads = [send.slot]
                text = f"{prefix}send to @{send.peer}"
                node = self._node(column, kind, (text,), f"edge {send.edge_id}: {_spec(slots, send.slot)}", depth)
                self._senders[send.edge_id].append(node)
            case "receive":
                receive = instruction.receive
                writes = [receive.slot]
                details = f"edge {receive.edge_id}: {_spec(slots, receive.slot)}"
                node = self._node(column, kind, (f"{prefix}receive from @{receive.peer}",), details, depth)
                self._receivers[receive.edge_id].append(node)
            case "all_reduce":
                reduce = instruction.all_reduce
                reads, writes = [reduce.input], [reduce.output]
                members = ", ".join(f"@{member}" for member in reduce.members)
                details = f"edge {reduce.edge_id}: {_spec(slots, reduce.input)}"
                node = self._node(column, kind, (f"{prefix}sum over {members}",), details, depth)
                self._sums[reduce.edge_id].append(node)
            case "loop":
                self._loop(column, part, instruction.loop, makers)
                return
            case _:
                return
        self._reads(node, reads, makers, slots)
        makers.update((slot, node) for slot in writes)

    def _loop(self, column: int, part: pb.Part, loop: pb.Loop, makers: dict[int, int]) -> None:
        order = " ".join(map(_repeat_text, loop.order))
        node = self._node(column, "loop", (f"loop of {loop.num_turns} turns", order), order)
        self._reads(node, [slot for body in loop.bodies for slot in body.inputs], makers, part.slots)
        for body in loop.bodies[:1]:  # the second differs in sizes only
            inner = dict.fromkeys(range(len(body.inputs)), node)
            for item in body.instructions:
                self._instruction(column, part, body.slots, item.instruction, inner, 1, f"{item.stage}{item.kind}")
        makers.update((slot, node) for slot in loop.outputs)

    def _node(self, column: int, kind: str, lines: tuple[str, ...], details: str, depth: int = 0) -> int:
        nodes = self._layout.nodes
        nodes.append(Node(column=column, kind=kind, lines=lines, details=details, depth=depth))
        position = len(nodes) - 1
        if column in self._last_of_column:
            self._before[position] = self._last_of_column[column]
        self._last_of_column[column] = position
        return position

    def _reads(
        self, node: int, slots: Sequence[int], makers: Mapping[int, int], specs: Sequence[pb.TensorSpec]
    ) -> None:
        for slot in dict.fromkeys(slots):
            if slot in makers:
                self._edge(makers[slot], node, _spec(specs, slot))

    def _edge(self, source: int, target: int, label: str) -> None:
        self._counts[source, target] += 1
        self._labels.setdefault((source, target), label)

    def finished(self) -> Layout:
        """Connects the slices, and gives each node its row."""
        crossing: dict[int, list[int]] = defaultdict(list)
        pairs = (
            (source, target)
            for edge, targets in self._receivers.items()
            for source in self._senders.get(edge, ())
            for target in targets
        )
        for source, target in itertools.islice(pairs, _MAX_CROSSING):  # a client may give all edges one number
            crossing[target].append(source)
            self._edge(source, target, self._layout.nodes[target].details)
        for members in self._sums.values():
            for source, target in itertools.pairwise(members):
                self._edge(source, target, self._layout.nodes[source].details)
        self._rows(crossing)
        found = self._layout
        limit = _EDGES_PER_NODE * len(found.nodes)
        for (source, target), count in sorted(self._counts.items(), key=self._length)[:limit]:
            label = self._labels[source, target] + (f" and {count - 1} more" if count > 1 else "")
            found.lines.append(Line(source=source, target=target, label=label))
        found.num_hidden = max(0, len(self._counts) - limit)
        return found

    def _length(self, item: tuple[tuple[int, int], int]) -> tuple[int, int]:
        """Edges between slices come first, then short ones."""
        source, target = (self._layout.nodes[position] for position in item[0])
        return (source.column == target.column, abs(source.row - target.row))

    def _rows(self, crossing: Mapping[int, Sequence[int]]) -> None:
        """Places each node below the one before it in its column, and what is received below what is sent."""
        nodes = self._layout.nodes
        followers: dict[int, list[int]] = defaultdict(list)
        waiting: Counter[int] = Counter()
        for target in range(len(nodes)):
            for source in (*([self._before[target]] if target in self._before else ()), *crossing.get(target, ())):
                followers[source].append(target)
                waiting[target] += 1
        ready = [position for position in range(len(nodes)) if not waiting[position]]
        left = dict.fromkeys(range(len(nodes)))
        while left:
            if not ready:  # they wait for each other: a receive that stands before what it depends on
                ready.append(min(left, key=lambda position: (nodes[position].row, position)))
            position = ready.pop()
            if position not in left:
                continue
            del left[position]
            for follower in followers[position]:
                nodes[follower].row = max(nodes[follower].row, nodes[position].row + 1)
                waiting[follower] -= 1
                if not waiting[follower]:
                    ready.append(follower)


def _summarised(outlines: Sequence[pb.ProgramOutline]) -> Layout:
    found = Layout()
    sends: dict[tuple[int, int], int] = {}
    columns: dict[int, int] = {}
    for kinds, index, slice_id, sent in sorted(_counted(outlines), key=lambda item: item[1:3]):
        column = columns.setdefault(index, len(found.columns))
        found.columns.append(f"@{index}  slice {slice_id}")
        lines = [f"{count:,} x {kind.replace('_', ' ')}" for kind, count in sorted(kinds.items())]
        total = f"{sum(kinds.values()):,} instructions"
        found.nodes.append(Node(column=column, kind="summary", lines=(total, *lines)))
        sends.update(((index, peer), count) for peer, count in sent.items())
    for (source, target), count in sorted(sends.items()):
        if target in columns and source != target:
            label = f"{count:,} {'value' if count == 1 else 'values'}"
            found.lines.append(Line(source=columns[source], target=columns[target], label=label))
    return found


def _counted(outlines: Sequence[pb.ProgramOutline]) -> Iterator[tuple[dict[str, int], int, int, dict[int, int]]]:
    for outline in outlines:
        for item in outline.summaries:
            yield dict(item.num_instructions), item.slice_index, item.slice_id, dict(item.num_sends)
        for part in outline.slices:  # of an island that has a small part
            kinds = Counter(str(one.WhichOneof("instruction")) for one in part.part.instructions)
            yield dict(kinds), part.part.slice_index, part.slice_id, {}


def _spec(specs: Sequence[pb.TensorSpec], slot: int) -> str:
    if slot >= len(specs):
        return "?"
    spec = specs[slot]
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}] {' '.join(spec.placements)}".rstrip()


def _first(texts: Sequence[str], limit: int = 12) -> str:
    more = [f"and {len(texts) - limit} more"] if len(texts) > limit else []
    return "\n".join([*texts[:limit], *more])


def _repeat_text(repeat: pb.Repeat) -> str:
    actions = " ".join(f"{action.stage}{action.kind}{action.microbatch}" for action in repeat.actions)
    return f"({actions}) x {repeat.times}" if repeat.times > 1 else actions

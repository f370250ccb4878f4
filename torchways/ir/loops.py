"""Unrolls the loops of a part: from a body and a schedule to the flat list of instructions that is carried out.

A loop crosses processes as one body and a list of actions whose size does not grow with the number of turns. Whoever
has to look at single instructions (an executor that carries them out, pre-flight that proves they can be) unrolls it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torchways.errors import UserError
from torchways.ir.part import (
    AllReduceInstruction,
    ComputeInstruction,
    FlatPart,
    Instruction,
    LoopAction,
    LoopBody,
    LoopInstruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
    Slot,
    reads,
    writes,
)
from torchways.ir.program import Value
from torchways.schedules.actions import Action, Kind, expanded


def unrolled(part: SlicePart) -> FlatPart:
    """Returns the part with each loop as the instructions of all its turns, in the order of its actions.

    Each turn has values of its own. What turns hand on goes from a turn to the one that comes next in the order of
    the actions that make it: gradients are added up in the order in which they are computed.

    Raises:
        UserError: a loop names what it does not have, its actions are not one of each kind that a body has for each
            turn, or a turn would read what the turn before hands on before that is made.
    """
    for instruction in part.instructions:
        if isinstance(instruction, LoopInstruction):
            _check_loop(instruction, len(part.slots))
    slots = list(part.slots)
    numbers: dict[int, Slot] = {}
    instructions: list[Instruction] = []
    for instruction in part.instructions:
        if isinstance(instruction, LoopInstruction):
            instructions += _Unrolling(instruction, slots, numbers).run()
        else:
            instructions.append(instruction)
    return FlatPart(
        slice_index=part.slice_index,
        functions=part.functions,
        slots=tuple(slots),
        num_args=part.num_args,
        instructions=tuple(instructions),
        results=part.results,
        numbers=(*part.numbers, *((slot, number) for number, slot in numbers.items())),
    )


#: Plausible bounds, of what a loop unrolls to.
_MAX_TURNS = 1 << 16
_MAX_INSTRUCTIONS = 1 << 20


class _Unrolling:
    """One loop; `slots` and `numbers` are the part's, and get what its turns need."""

    def __init__(self, loop: LoopInstruction, slots: list[Value], numbers: dict[int, Slot]) -> None:
        self._loop = loop
        self._slots = slots
        self._numbers = numbers
        self._actions = expanded(loop.order)
        self._of_action = [_by_action(body) for body in loop.bodies]
        _check_actions(loop, self._actions, self._of_action)
        #: For each turn, the part's slots of the body's.
        self._of_turn: dict[int, dict[Slot, Slot]] = {}
        #: For each value that is handed on: the newest, and the turn that made it.
        self._newest = [loop.bodies[0].inputs[read] for read, _ in loop.bodies[0].carried]
        self._made_in: list[int | None] = [None] * len(self._newest)
        self._last_made_in = self._find_last()
        #: For each body, the inputs of the loop that it may not reuse.
        self._kept = [
            {slot for position, slot in enumerate(body.inputs) if position not in loop.donated} for body in loop.bodies
        ]
        #: Those that an action reads which does not make them: each turn needs that of the turn before.
        self._made_elsewhere = set[int]().union(*map(_made_elsewhere, loop.bodies))

    def run(self) -> list[Instruction]:
        """Returns the instructions of all turns."""
        made: list[Instruction] = []
        for action in self._actions:
            body = self._body(action.microbatch)
            instructions = self._of_action[self._body_index(action.microbatch)]
            for kind in dict.fromkeys((action.kind, *action.kind.parts)):
                made += [
                    self._instruction(instruction, Action(action.stage, kind, action.microbatch), body)
                    for instruction in instructions.get((action.stage, kind), ())
                ]
        return made

    def _body_index(self, turn: int) -> int:
        return len(self._loop.bodies) - 1 if turn == self._loop.num_turns - 1 else 0

    def _body(self, turn: int) -> LoopBody:
        return self._loop.bodies[self._body_index(turn)]

    def _find_last(self) -> list[int]:
        """Returns the turn that makes each handed-on value last."""
        last = [0] * len(self._newest)
        for action in self._actions:
            body = self._body(action.microbatch)
            kinds = {action.kind, *action.kind.parts}
            for item in body.instructions:
                if item.stage == action.stage and item.kind in kinds:
                    filled = set(writes(item.instruction))
                    for index, (_, slot) in enumerate(body.carried):
                        if slot in filled:
                            last[index] = action.microbatch
        return last

    def _instruction(self, instruction: Instruction, action: Action, body: LoopBody) -> Instruction:
        turn = action.microbatch
        of_turn = self._of_turn.setdefault(turn, {})
        for index, (slot, _) in enumerate(body.carried):
            if slot in reads(instruction) and slot not in of_turn:
                if index in self._made_elsewhere and self._made_in[index] != (turn - 1 if turn else None):
                    raise UserError(
                        f"turn {turn} of a loop would read what turn {turn - 1} hands on before that is made: run the "
                        "microbatches one after the other"
                    )
                of_turn[slot] = self._newest[index]
        read = tuple(self._read(slot, of_turn, body, turn) for slot in reads(instruction))
        filled = tuple(self._filled(slot, of_turn, body, turn) for slot in writes(instruction))
        for index, (_, slot) in enumerate(body.carried):
            if slot in writes(instruction):
                self._newest[index], self._made_in[index] = of_turn[slot], turn
        return self._with_slots(instruction, action, read, filled)

    def _read(self, slot: Slot, of_turn: dict[Slot, Slot], body: LoopBody, turn: int) -> Slot:
        if slot in of_turn:
            return of_turn[slot]
        if slot in body.number_slots:
            if turn not in self._numbers:
                self._numbers[turn] = len(self._slots)
                self._slots.append(body.slots[slot])
            return self._numbers[turn]
        if slot < len(body.inputs):
            return body.inputs[slot]
        raise UserError(f"a turn of a loop reads slot {slot} before it is filled: its actions are in a wrong order")

    def _filled(self, slot: Slot, of_turn: dict[Slot, Slot], body: LoopBody, turn: int) -> Slot:
        of_turn[slot] = self._outlives(slot, body, turn)
        if of_turn[slot] < 0:
            of_turn[slot] = len(self._slots)
            self._slots.append(body.slots[slot])
        return of_turn[slot]

    def _outlives(self, slot: Slot, body: LoopBody, turn: int) -> Slot:
        """Returns the part's slot for a value that outlives the loop, or -1."""
        outputs = self._loop.outputs
        for index, (_, made) in enumerate(body.carried):
            if made == slot and turn == self._last_made_in[index]:
                return outputs[index]
        if turn == self._loop.num_turns - 1 and slot in body.last:
            return outputs[len(body.carried) + body.last.index(slot)]
        return -1

    def _with_slots(
        self, instruction: Instruction, action: Action, read: tuple[Slot, ...], filled: tuple[Slot, ...]
    ) -> Instruction:
        turn, loop = action.microbatch, self._loop
        match instruction:
            case ComputeInstruction():
                kept = self._kept[self._body_index(turn)]
                donated = tuple(position for position in instruction.donated if read[position] not in kept)
                part_of = LoopAction(loop.number, action) if loop.number is not None else None
                return replace(instruction, inputs=read, outputs=filled, donated=donated, part_of=part_of)
            case SendInstruction():
                return replace(instruction, slot=read[0], edge_id=self._edge(instruction.edge_id, turn))
            case ReceiveInstruction():
                return replace(instruction, slot=filled[0], edge_id=self._edge(instruction.edge_id, turn))
            case AllReduceInstruction():
                edge_id = self._edge(instruction.edge_id, turn)
                return replace(instruction, input=read[0], output=filled[0], edge_id=edge_id)

    def _edge(self, edge_id: int, turn: int) -> int:
        return edge_id + turn * self._loop.edge_stride


def _check_loop(loop: LoopInstruction, num_slots: int) -> None:
    """Checks what a loop names, which a client may have made up."""
    require(len(loop.bodies) in (1, 2) and 1 <= loop.num_turns <= _MAX_TURNS, "a loop has no turns, or too many")
    num_instructions = sum(len(body.instructions) for body in loop.bodies)
    num_actions = sum(len(repeat.actions) * repeat.times for repeat in loop.order)
    require(max(num_instructions * loop.num_turns, num_actions) <= _MAX_INSTRUCTIONS, "a loop is too long")
    first = loop.bodies[0]
    require(all(position < len(first.inputs) for position in loop.donated), "a loop donates what it does not read")
    for body in loop.bodies:
        require(
            len(body.inputs) <= len(body.slots) and all(slot < num_slots for slot in body.inputs),
            "its inputs are wrong",
        )
        named = [slot for item in body.instructions for slot in (*reads(item.instruction), *writes(item.instruction))]
        named += [*body.number_slots, *body.last, *(slot for pair in body.carried for slot in pair)]
        require(max(named, default=0) < len(body.slots), "a loop names a value that it does not have")
        made = {slot for item in body.instructions for slot in writes(item.instruction)}
        require(all(slot in made for slot in (*body.last, *(slot for _, slot in body.carried))), "it makes no result")
        require(all(read < len(body.inputs) for read, _ in body.carried), "it hands on what it does not read")
        require(
            len(body.carried) + len(loop.bodies[-1].last) == len(loop.outputs)
            and len(body.carried) == len(first.carried),
            "a loop has other results than its bodies",
        )


def require(holds: bool, reason: str) -> None:
    """Raises UserError, with the reason why a program cannot be loaded, where what has to hold does not."""
    if not holds:
        raise UserError(f"a program cannot be loaded: {reason}")


def _by_action(body: LoopBody) -> dict[tuple[int, Kind], list[Instruction]]:
    found: dict[tuple[int, Kind], list[Instruction]] = {}
    for item in body.instructions:
        found.setdefault((item.stage, item.kind), []).append(item.instruction)
    return found


def _made_elsewhere(body: LoopBody) -> set[int]:
    makers = {slot: (item.stage, item.kind) for item in body.instructions for slot in writes(item.instruction)}
    readers: dict[Slot, set[tuple[int, Kind]]] = {}
    for item in body.instructions:
        for slot in reads(item.instruction):
            readers.setdefault(slot, set()).add((item.stage, item.kind))
    return {index for index, (read, made) in enumerate(body.carried) if readers.get(read, set()) - {makers.get(made)}}


def _check_actions(
    loop: LoopInstruction, actions: Sequence[Action], bodies: Sequence[Mapping[tuple[int, Kind], object]]
) -> None:
    done: set[tuple[int, Kind, int]] = set()
    for action in actions:
        for kind in {action.kind, *action.kind.parts}:
            key = (action.stage, kind, action.microbatch)
            if key in done or not 0 <= action.microbatch < loop.num_turns:
                raise UserError(f"a loop of {loop.num_turns} turns cannot do {action}, or not again")
            done.add(key)
    for turn in range(loop.num_turns):
        index = len(bodies) - 1 if turn == loop.num_turns - 1 else 0
        for stage, kind in bodies[index]:
            if (stage, kind, turn) not in done:
                raise UserError(f"a loop never does {Action(stage, kind, turn)}")

"""Loops of a part, unrolled: every turn's instructions once, in the schedule's order, fed with what it should read."""

import pytest

from torchways.errors import UserError
from torchways.ir.loops import unrolled
from torchways.ir.part import (
    BodyInstruction,
    ComputeInstruction,
    LoopBody,
    LoopInstruction,
    ReceiveInstruction,
    SendInstruction,
    SlicePart,
)
from torchways.ir.program import Function, Value
from torchways.passes.preflight import check_order
from torchways.schedules import Kind, Repeat, Schedule, compact, make_schedule

F, I, W, B = Kind.FORWARD, Kind.INPUT, Kind.WEIGHT, Kind.BACKWARD  # noqa: E741


def value(dtype="float32"):
    return Value(dtype=dtype, shape=(), slice_index=0, placements=("R",))


def function(name):
    return Function(name=name, source="", graph=b"", num_operators=1)


def compute(stage, kind, index, inputs, outputs, donated=()):
    made = ComputeInstruction(function_index=index, inputs=inputs, outputs=outputs, donated=donated)
    return BodyInstruction(stage=stage, kind=kind, instruction=made)


FIRST = ["square", "scale", "add"]
LAST = ["triple", "seed", "scale", "add"]


def parts(schedule, num_turns, num_bodies=1):
    """Two stages: y = x[turn]^2, loss = 3 y; gradients dw0 += 2 x g, dw1 += y; g = 3. Edges 0 (y) and 1 (g)."""
    first = LoopBody(
        # 0: x, 1: dw0, 2: turn, 3: y, 4: g, 5: new dw0
        slots=(value(), value(), value("int64"), value(), value(), value()),
        inputs=(0, 1),
        number_slots=(2,),
        instructions=(
            compute(0, F, 0, (0, 2), (3,)),
            BodyInstruction(stage=0, kind=F, instruction=SendInstruction(slot=3, edge_id=0, peer=1)),
            BodyInstruction(stage=0, kind=W, instruction=ReceiveInstruction(slot=4, edge_id=1, peer=1)),
            compute(0, W, 1, (0, 2, 4, 1), (5,), (3,)),
        ),
        carried=((1, 5),),
        last=(),
    )
    last = LoopBody(
        # 0: dw1, 1: y, 2: loss, 3: g, 4: new dw1
        slots=(value(), value(), value(), value(), value()),
        inputs=(0,),
        number_slots=(),
        instructions=(
            BodyInstruction(stage=1, kind=F, instruction=ReceiveInstruction(slot=1, edge_id=0, peer=0)),
            compute(1, F, 0, (1,), (2,)),
            compute(1, I, 1, (2,), (3,)),
            BodyInstruction(stage=1, kind=I, instruction=SendInstruction(slot=3, edge_id=1, peer=0)),
            compute(1, W, 2, (1, 0), (4,), (1,)),
        ),
        carried=((0, 4),),
        last=(2,),
    )
    made = []
    for index, (body, args, outputs) in enumerate(((first, 2, (2,)), (last, 1, (1, 2)))):
        loop = LoopInstruction(
            bodies=(body,) * num_bodies,
            num_turns=num_turns,
            order=tuple(compact(schedule.rows[index])),
            outputs=outputs,
            donated=(args - 1,),
            edge_stride=2,
        )
        made.append(
            SlicePart(
                slice_index=index,
                functions=tuple(map(function, ("forward", "backward", "weights"))),
                slots=tuple(value() for _ in range(args + len(outputs))),
                num_args=args,
                instructions=(loop,),
                results=tuple((slot, number) for number, slot in enumerate(outputs)),
            )
        )
    return made


def run(flat, xs):
    """Carries parts out, each instruction in order, as executors do; every donated buffer is gone."""
    wires, results = {}, {}
    slots = [{0: "xs", 1: 0.0}, {0: 0.0}]
    for index, part in enumerate(flat):
        slots[index].update(part.numbers)
    positions = [0, 0]
    while any(position < len(part.instructions) for position, part in zip(positions, flat, strict=True)):
        before = list(positions)
        for index, part in enumerate(flat):
            while positions[index] < len(part.instructions):
                if not _carry_out(part.instructions[positions[index]], index, slots[index], wires, xs):
                    break
                positions[index] += 1
        assert positions != before, "deadlock"
    for index, part in enumerate(flat):
        results[index] = [slots[index][slot] for slot, _ in part.results]
    return results


def _carry_out(item, index, slots, wires, xs):
    match item:
        case SendInstruction():
            assert item.edge_id not in wires
            wires[item.edge_id] = slots[item.slot]
        case ReceiveInstruction():
            if item.edge_id not in wires:
                return False
            slots[item.slot] = wires[item.edge_id]
        case ComputeInstruction():
            read = [slots[slot] for slot in item.inputs]
            for position in item.donated:
                del slots[item.inputs[position]]
            match index, item.function_index:
                case 0, 0:
                    made = xs[read[1]] ** 2
                case 0, 1:
                    made = read[3] + 2 * xs[read[1]] * read[2]
                case 1, 0:
                    made = 3 * read[0]
                case 1, 1:
                    made = 3.0
                case 1, 2:
                    made = read[1] + read[0]
            slots[item.outputs[0]] = made
    return True


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "InterleavedZeroBubble", "LoopedBFS"])
@pytest.mark.parametrize("num_turns", [1, 2, 3, 6])
@pytest.mark.parametrize("num_bodies", [1, 2])
def test_gradients_are_added_up_over_all_turns_whatever_the_schedule(name, num_turns, num_bodies):
    made = parts(make_schedule(name, 2, 2, num_turns), num_turns, num_bodies)
    flat = [unrolled(part) for part in made]
    check_order(flat)
    xs = [float(number + 1) for number in range(num_turns)]
    assert run(flat, xs) == {
        0: [sum(6 * x for x in xs)],
        1: [sum(x**2 for x in xs), 3 * xs[-1] ** 2],
    }
    assert all(len(part.instructions) == {0: 4, 1: 5}[part.slice_index] * num_turns for part in flat)


def test_the_part_does_not_grow_with_its_turns_and_prints():
    few, many = (parts(make_schedule("1F1B", 2, 2, count), count)[0] for count in (8, 256))
    assert len(str(few).splitlines()) == len(str(many).splitlines())
    assert "    do 0B0 0F2 6 times, each +1\n" in str(few)
    assert "      0W: $5 = backward($0, $2, $4, $1) donating $1\n" in str(few)
    assert "      $5 is $1 of the next turn\n" in str(few)


@pytest.mark.parametrize(
    ("csv", "why"),
    [
        ("0F0,0B0,0F1\n1F0,1B0,1F1,1B1\n", "never does 0W1"),
        ("0F0,0F0,0B0,0F1,0B1\n1F0,1B0,1F1,1B1\n", "cannot do 0F0, or not again"),
        ("0F0,0B0,0F1,0B1,0F2,0B2\n1F0,1B0,1F1,1B1\n", "a loop of 2 turns cannot do 0F2"),
        ("0F0,0B0,0F1,0B1\n1F0,1W0,1I0,1F1,1B1\n", None),
        ("0F0,0B0,0F1,0B1\n1B0,1F0,1F1,1B1\n", "reads slot 2 before it is filled"),
    ],
)
def test_actions_that_are_not_those_of_the_body(csv, why):
    made = parts(Schedule.from_csv(csv), 2)
    if why is None:
        [unrolled(part) for part in made]
    else:
        with pytest.raises(UserError, match=why):
            [unrolled(part) for part in made]


def test_a_turn_that_needs_all_of_the_turn_before():
    body = LoopBody(
        slots=(value(), value(), value()),
        inputs=(0,),
        number_slots=(),
        instructions=(compute(0, F, 0, (0,), (1,)), compute(0, W, 1, (1,), (2,))),
        carried=((0, 2),),
        last=(),
    )

    def part(order):
        loop = LoopInstruction(bodies=(body,), num_turns=2, order=order, outputs=(1,), donated=(), edge_stride=0)
        return SlicePart(
            slice_index=0,
            functions=(function("f"), function("w")),
            slots=(value(), value()),
            num_args=1,
            instructions=(loop,),
            results=((1, 0),),
        )

    row = make_schedule("1F1B", 1, 1, 2).rows[0]
    flat = unrolled(part(tuple(compact(row))))
    assert [item.inputs for item in flat.instructions] == [(0,), (2,), (3,), (4,)]
    assert flat.instructions[-1].outputs == (1,)
    with pytest.raises(UserError, match="turn 1 of a loop would read what turn 0 hands on before that is made"):
        unrolled(part((*map(lambda action: Repeat((action,)), make_schedule("GPipe", 1, 1, 2).rows[0]),)))

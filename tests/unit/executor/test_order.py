"""What pre-flight proves of a program is what executors do: they keep its order, and what fits is never starved."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.executor.test_state import BASE, World, _Buffer
from torchways.executor import events
from torchways.executor.loading import read_program
from torchways.executor.plan import load_program
from torchways.executor.routes import Routes
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, PartId, ProgramId, RunId, SliceId
from torchways.ir.part import Arguments, ComputeInstruction, ReceiveInstruction, SendInstruction
from torchways.ir.program import AllReduce, Arg, Compute, Function, Program, Result, SliceSpec, TracedInput, Value
from torchways.ir.sizes import logical_bytes
from torchways.passes.lower import lower
from torchways.passes.preflight import check_order, peak_memory
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.programs import HostAddress, register_message

PROGRAM = ProgramId(BASE + 1)
SLICES = {0: SliceId(11), 1: SliceId(12)}


def random_program(dice, num_nodes):
    """Computations of two slices that read each other's values, sums over both, and state that is replaced."""
    values, nodes, functions = [], [], [Function(name="f", source="", graph=b"", num_operators=1)]

    def new(slice_index, size):
        values.append(Value(dtype="float32", shape=(size,), slice_index=slice_index, placements=("R",)))
        return len(values) - 1

    for number in range(dice.randint(2, 4)):
        output = new(number % 2, dice.randint(1, 20))
        nodes.append(Arg(output=output, label="state", source=TracedInput(number), replaced=dice.random() < 0.5))
    for _ in range(num_nodes):
        here = [[index for index, value in enumerate(values) if value.slice_index == which] for which in (0, 1)]
        pairs = [(a, b) for a in here[0] for b in here[1] if values[a].shape == values[b].shape]
        if pairs and dice.random() < 0.3:
            inputs = dice.choice(pairs)
            outputs = tuple(new(which, values[inputs[0]].shape[0]) for which in (0, 1))
            nodes.append(AllReduce(inputs=inputs, outputs=outputs))
            continue
        inputs = tuple(dice.sample(range(len(values)), dice.randint(1, min(3, len(values)))))
        which = dice.randint(0, 1)
        outputs = tuple(new(which, dice.randint(1, 20)) for _ in range(dice.randint(1, 2)))
        nodes.append(Compute(function_index=0, inputs=inputs, outputs=outputs))
    made = [output for node in nodes if not isinstance(node, Arg) for output in node.outputs]
    nodes.append(Result(inputs=tuple(dice.sample(made, dice.randint(1, min(3, len(made)))))))
    spec = SliceSpec(shape=(1,), axis_names=("dp",))
    return Program(name="p", slices=(spec, spec), values=tuple(values), functions=tuple(functions), nodes=tuple(nodes))


class Executors(World):
    """Two executors and the sums between them; what each computes is noted."""

    def __init__(self, pick, budgets):
        super().__init__(pick)
        for name, budget in budgets.items():
            self.states[name] = ExecutorState(name, budget_bytes=budget)
        self.order = {}
        self.sums = {}

    def carry_out(self, name, command):
        if isinstance(command, events.Execute):
            part = (name, command.task.run.run_id)
            self.order.setdefault(part, []).append(command.task.unit.position)
        if isinstance(command, events.Reduce):
            brought = self.sums.setdefault((command.task.run.run_id, command.instruction.edge_id), [])
            brought.append((name, command))
            if len(brought) == len(command.instruction.members):
                for member, item in brought:
                    self.post(None, member, events.Reduced(task=item.task, data=_Buffer(1)))
            return
        super().carry_out(name, command)


def load(part, hosts, limit):
    """Returns a part as its executor loads it."""
    message = register_message(PROGRAM, "p", [(SLICES[part.slice_index], (1,), part)], hosts, [0])
    [program] = message.register_program.slices
    name = "ab"[part.slice_index]
    loaded, _ = read_program(pb.LoadProgram(program_id=PROGRAM, name="p", program=program), name, 1, limit)
    return name, loaded


def run_program(dice, program, num_runs, spare, *, for_run=False):
    lowered = lower(program)
    check_order(lowered.parts)
    hosts = {index: [HostAddress(executor_id="ab"[index], data_address="")] for index in SLICES}
    sizes = {part.slice_index: peak_memory(part, program.slices[0]).nbytes for part in lowered.parts}
    budgets = {}
    for part in lowered.parts:
        # The budget is what pre-flight says, beside the results of the other runs, and their arguments, if these have
        # places before and after.
        kept = [*(() if for_run else range(part.num_args)), *(slot for slot, _ in part.results)]
        beside = (num_runs - 1) * sum(logical_bytes(part.slots[slot].dtype, part.slots[slot].shape) for slot in kept)
        budgets["ab"[part.slice_index]] = sizes[part.slice_index] + beside + spare
    world = Executors(dice.choice, budgets)
    loaded = dict(load(part, hosts, sizes[part.slice_index] + spare) for part in lowered.parts)
    for name, item in loaded.items():
        world.post(f"scheduler of {name}", name, events.ProgramArrived(program=item))
    for number in range(num_runs):
        first = BASE + 1000 * (1 + number)
        for name, item in loaded.items():
            arguments = [BufferId(first + 100 * "ab".index(name) + slot) for slot in range(item.num_args)]
            for slot, buffer_id in enumerate(arguments):
                put = events.BufferPut(
                    buffer_id=buffer_id,
                    data=_Buffer(1),
                    spec=None,
                    slice_id=item.part.slice_id,
                    nbytes=item.slot_bytes[slot],
                    for_run=for_run,
                )
                world.post(None, name, put)
            run = events.RunEnqueued(
                part=item.part,
                run_id=RunId(first),
                sequence=number,
                first_buffer_id=BufferId(first + 500),
                arguments=Arguments(arguments),
            )
            world.post(f"scheduler of {name}", name, run)
    world.run()
    return world, loaded, budgets


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4), st.sampled_from([0, 0, 40, 10_000]), st.booleans())
def test_what_passes_preflight_keeps_its_order_and_is_never_starved_nor_stuck(
    seed, num_nodes, num_runs, spare, for_run
):
    dice = random.Random(seed)
    world, loaded, budgets = run_program(dice, random_program(dice, num_nodes), num_runs, spare, for_run=for_run)
    for name, item in loaded.items():
        state = world.states[name]
        assert state.memory.starved == []
        assert state.runs == {}
        assert state.num_entries()["kept_bytes"] == 0
        assert len(world.ended[name]) == num_runs
        assert [failure for _, failure in world.ended[name]] == [None] * num_runs
        assert world.peak <= max(budgets.values())
        computing = [u.position for u in item.units if isinstance(u.instructions[0], ComputeInstruction)]
        for number in range(num_runs if computing else 0):
            assert world.order[name, BASE + 1000 * (1 + number)] == computing


def test_a_later_computation_does_not_take_the_memory_of_an_earlier_one():
    """A receive is awaited by a unit of 32 bytes; a later one of 60 could run at once, in a budget of 100."""
    instructions = [
        ReceiveInstruction(slot=1, edge_id=0, peer=1),
        ComputeInstruction(function_index=0, inputs=(0, 1), outputs=(2,), donated=()),
        SendInstruction(slot=2, edge_id=1, peer=1),
        ComputeInstruction(function_index=0, inputs=(0,), outputs=(3,), donated=()),
    ]
    program = load_program(
        PartId(PROGRAM, SliceId(1)),
        "p",
        1,
        [10, 20, 32, 60],
        instructions,
        [(3, 0)],
        routes=Routes(targets={1: ("b",)}, senders={0: "b"}),
        limit_bytes=100,
    )
    state = ExecutorState("a", budget_bytes=100)
    state.handle(events.ProgramArrived(program=program))
    state.handle(events.ProgramCompiled(part=program.part, failure=None))
    put = events.BufferPut(buffer_id=BufferId(BASE + 2), data=_Buffer(1), spec=None, slice_id=SliceId(1), nbytes=10)
    state.handle(put)
    run = events.RunEnqueued(
        part=program.part,
        run_id=RunId(BASE + 7),
        sequence=0,
        first_buffer_id=BufferId(BASE + 3),
        arguments=Arguments([put.buffer_id]),
    )
    assert state.handle(run) == []
    stranger = events.TransferArrived(peer="c", run_id=RunId(BASE + 7), edge_id=0, data=_Buffer(9))
    assert state.handle(stranger) == []  # the edge is not its own
    arrived = events.TransferArrived(peer="b", run_id=RunId(BASE + 7), edge_id=0, data=_Buffer(2))
    placed, executed, sent = state.handle(arrived)
    assert (type(placed), executed.task.number, type(sent)) == (events.Place, 1, events.Send)
    state.handle(events.UnitFinished(task=executed.task))
    [last] = state.handle(events.UnitFinished(task=sent.task))
    assert last.task.number == 3
    assert state.memory.starved == []

"""Which run is named as stalled, when, and what its line says."""

from dataclasses import replace

from tests.unit.executor.test_state import BASE, CLIENT, PART, SLICE, train_parts
from tests.unit.ir.test_loops import parts as pipeline_parts
from torchways.executor import events
from torchways.executor.loading import read_program
from torchways.executor.plan import load_program
from torchways.executor.stalls import Stalls, action_text
from torchways.executor.state import ExecutorState
from torchways.ids import BufferId, ClientId, PartId, ProgramId, RunId
from torchways.ir.part import NO_BUFFER, Arguments, ComputeInstruction, LoopAction
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.convert import part_to_proto
from torchways.schedules import make_schedule
from torchways.schedules.actions import parse_action

OTHER = 2 << 40


def watched(budget=0):
    """An executor's core, and what watches it for stalls of ten seconds."""
    return ExecutorState("i0.e1", budget_bytes=budget), Stalls(10.0, "island 0 device 3", lambda _: "mlp at a.py:7")


def load(state, program, *, compiled=True):
    state.handle(events.ProgramArrived(program=program))
    if compiled:
        state.handle(events.ProgramCompiled(part=program.part, failure=None))


def enqueue(state, number, buffer_ids, *, base=BASE, part=PART, values=()):
    return state.handle(
        events.RunEnqueued(
            part=part,
            run_id=RunId(base + number),
            sequence=number,
            first_buffer_id=BufferId(base + 1000 * number),
            arguments=Arguments(buffer_ids, values),
        )
    )


def put(state, buffer_id, nbytes=10):
    put = events.BufferPut(buffer_id=BufferId(buffer_id), slice_id=SLICE, data=b"", spec=None, form="", nbytes=nbytes)
    state.handle(put)


def double(base=BASE, size=10):
    """One computation of one argument."""
    part = PartId(ProgramId(base + 1), SLICE)
    compute = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), donated=())
    return load_program(part, "double", 1, [size, size], (compute,), ((1, 0),))


def test_a_run_that_waits_for_another_executor_is_named_once_until_it_goes_on():
    state, stalls = watched()
    load(state, train_parts()["a"])
    put(state, BASE + 1)
    put(state, BASE + 2)
    commands = enqueue(state, 1, [BufferId(BASE + 1), BufferId(BASE + 2)])
    assert stalls.check(state, 0.0) == []
    for command in commands:
        if isinstance(command, events.Execute | events.Send):
            state.handle(events.UnitFinished(task=command.task))
    assert stalls.check(state, 5.0) == []
    assert stalls.check(state, 14.0) == []
    assert stalls.check(state, 15.0) == [
        f"run {BASE + 1} of step (client 1) waits 10 s: island 0 device 3 never enqueued mlp at a.py:7; "
        "it waits for a value from executor b (edge 1)"
    ]
    assert stalls.check(state, 40.0) == []
    [(client_id, line)] = stalls.lines()
    assert (client_id, "waits 35 s" in line) == (CLIENT, True)
    state.handle(events.TransferArrived(peer="b", run_id=RunId(BASE + 1), edge_id=1, data=b""))
    assert stalls.check(state, 41.0) == [f"run {BASE + 1} goes on, after 36 s without progress"]
    assert stalls.lines() == []


def test_a_host_of_a_gang_waits_for_the_others():
    state, stalls = ExecutorState("i0.e1.h1", gang=True), watched()[1]
    load(state, double())
    put(state, BASE + 9)
    [ready] = enqueue(state, 1, [BufferId(BASE + 9)])
    stalls.check(state, 0.0)
    [line] = stalls.check(state, 10.0)
    assert line.endswith(
        "it waits for its grant: other hosts are not ready, or executors that share these devices come first"
    )
    state.handle(events.UnitGranted(run=ready.run, unit=0))
    assert stalls.check(state, 11.0) == [f"run {BASE + 1} goes on, after 11 s without progress"]


def test_only_the_oldest_run_of_each_client_is_named():
    state, stalls = watched()
    for base in (BASE, OTHER):
        load(state, double(base))
        for number in (1, 2, 3):
            part = PartId(ProgramId(base + 1), SLICE)
            enqueue(state, number, [BufferId(base + 9)], base=base, part=part)
    stalls.check(state, 0.0)
    lines = stalls.check(state, 10.0)
    assert [line.split(":")[0] for line in lines] == [
        f"run {BASE + 1} of double (client 1) waits 10 s",
        f"run {OTHER + 1} of double (client 2) waits 10 s",
    ]
    assert "argument 0, which neither its client nor an earlier run has brought" in lines[0]
    state.handle(events.ClientDropped(client_id=ClientId(2)))
    assert stalls.check(state, 11.0) == [f"run {OTHER + 1} is over, after 11 s without progress"]


def test_memory_is_said_to_be_held_by_whom():
    state, stalls = watched(budget=100)
    put(state, OTHER + 5, nbytes=80)
    load(state, double(size=30))
    enqueue(state, 1, [NO_BUFFER], values=[b"1"])
    stalls.check(state, 0.0)
    [line] = stalls.check(state, 12.0)
    assert line.endswith(
        "never enqueued mlp at a.py:7; it waits for 30 bytes of device memory held by client 2 (80 bytes); "
        "80 of 100 bytes are used"
    )
    state.handle(events.BuffersDropped(buffer_ids=[BufferId(OTHER + 5)]))
    assert stalls.check(state, 13.0) == [f"run {BASE + 1} goes on, after 13 s without progress"]


def test_compilation_and_a_computation_that_does_not_end_are_named():
    state, stalls = watched()
    load(state, double(), compiled=False)
    put(state, BASE + 9)
    enqueue(state, 1, [BufferId(BASE + 9)])
    stalls.check(state, 0.0)
    [line] = stalls.check(state, 10.0)
    assert line.endswith("island 0 device 3 never began it; it waits for its compilation")
    state.handle(events.ProgramCompiled(part=PART, failure=None))
    assert len(stalls.check(state, 11.0)) == 1
    [line] = stalls.check(state, 21.0)
    assert line.endswith("island 0 device 3 never finished mlp at a.py:7; it is on the devices")


def test_an_action_is_named_with_its_schedule():
    action = LoopAction(2, parse_action("1B5"))
    compute = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,), part_of=action)
    state, _ = watched()
    load(state, load_program(PART, "step", 1, [10, 10], (compute,), ((1, 0),)))
    put(state, BASE + 9)
    [execute] = [item for item in enqueue(state, 1, [BufferId(BASE + 9)]) if isinstance(item, events.Execute)]
    assert action_text(execute.task, {2: "1F1B", 1: "GPipe"}) == " (1F1B, stage 1, backward, microbatch 5)"
    assert action_text(execute.task, {2: ""}) == " (stage 1, backward, microbatch 5)"  # a client that says no name
    load(state, double(OTHER))
    put(state, OTHER + 9)
    of_none = enqueue(state, 1, [BufferId(OTHER + 9)], base=OTHER, part=PartId(ProgramId(OTHER + 1), SLICE))
    assert action_text(of_none[0].task, {2: "1F1B"}) == ""


def test_a_loaded_part_knows_its_loops_schedules():
    parts = pipeline_parts(make_schedule("1F1B", 2, 2, 4), 4)
    loop = replace(parts[1].instructions[0], number=3, schedule="1F1B")
    program = pb.SliceProgram(slice_id=3, mesh_shape=[1], part=part_to_proto(replace(parts[1], instructions=(loop,))))
    program.peers.add(slice_index=0, executor_id="other")
    program.peers.add(slice_index=1, executor_id="here")
    loaded, code = read_program(pb.LoadProgram(program_id=1, name="step", program=program), "here", 1, 0)
    assert code.schedules == {3: "1F1B"}
    computed = [unit.instructions[0] for unit in loaded.units if isinstance(unit.instructions[0], ComputeInstruction)]
    assert {instruction.part_of.loop for instruction in computed} == {3}


def test_a_run_behind_others_is_not_stalled():
    state, stalls = watched()
    for base in (BASE, OTHER):
        load(state, double(base))
        put(state, base + 9)
    first = enqueue(state, 1, [BufferId(BASE + 9)])
    second = enqueue(state, 2, [BufferId(OTHER + 9)], base=OTHER, part=PartId(ProgramId(OTHER + 1), SLICE))
    stalls.check(state, 0.0)
    assert [line.split(" of ")[0] for line in stalls.check(state, 10.0)] == [f"run {BASE + 1}"]
    for command in (*first, *second):
        if isinstance(command, events.Execute):
            state.handle(events.UnitFinished(task=command.task))
    assert stalls.check(state, 20.0) == [f"run {BASE + 1} is over, after 20 s without progress"]

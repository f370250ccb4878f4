"""The engine's thread goes on whatever becomes of those who asked it for something."""

import queue
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from torchways.executor import engine as engine_module
from torchways.executor import fetches as module
from torchways.executor.compiler import Call
from torchways.executor.engine import Engine
from torchways.executor.events import BuffersDropped, Execute, MemoryStalled, Place, ReportReady, UnitRefused
from torchways.executor.runs import Cell
from torchways.ids import BufferId, PartId, RunId, RunPart, SliceId, client_range, owner
from torchways.ir.part import ComputeInstruction
from torchways.rpc.torchways_pb2 import Idle as IdleMessage


class Idle:
    """A runtime that has nothing to do."""

    def progress(self):
        return False


def test_what_is_cancelled_before_it_runs_is_left_out():
    engine = Engine("i0.e1", Idle(), 1, "127.0.0.1", lambda reported: None, link_key=bytes(32))
    go_on, ran = threading.Event(), []
    engine.call(lambda: go_on.wait(30))
    given_up = engine.run(lambda: ran.append("given up"))
    assert given_up.cancel()
    go_on.set()
    assert engine.run(lambda: "well").result(30) == "well"
    assert not ran

    def fail():
        raise ValueError("its own error")

    with pytest.raises(ValueError, match="its own error"):
        engine.run(fail).result(30)
    assert engine.run(lambda: "still").result(30) == "still"


def test_who_waits_for_a_buffer_that_nothing_makes_is_told_in_the_end(monkeypatch):
    monkeypatch.setattr(module, "_UNKNOWN_BUFFER_SECONDS", 0.2)
    engine = Engine("i0.e1", Idle(), 1, "127.0.0.1", lambda reported: None, link_key=bytes(32), stall_warning=0.1)
    mine, other = (BufferId(client_range(client)[0] + 1) for client in (1, 2))
    engine.run(lambda: engine.fetches.clients_with_held_runs.add(owner(other))).result(30)
    told, held, given_up = queue.Queue(), queue.Queue(), queue.Queue()
    engine.fetch(other, held.put)
    engine.cancel_fetch(engine.fetch(mine, given_up.put))
    engine.fetch(mine, told.put)
    assert told.get(timeout=30).message.endswith("but no run makes it")
    engine.fetch(mine, told.put)
    told.get(timeout=30)
    assert held.empty()  # though it is older: its run may be here soon
    assert given_up.empty()
    assert engine.run(engine.num_entries).result(30)["fetches"] == 1


class WithRoom(Idle):
    """A runtime whose devices take as many computations as the test lets them; `started` are their keys."""

    shares_memory = True

    def __init__(self):
        self.room = queue.Queue()
        self.started = []
        self.wake = None

    def has_room(self, wake):
        self.wake = wake
        return not self.room.empty()

    def give_room(self, count):
        for _ in range(count):
            self.room.put(None)
        if self.wake is not None:
            self.wake()

    def execute(self, executable, inputs, key):
        self.room.get_nowait()
        self.started.append(key)
        outputs = [torch.tensor(float(executable) + sum(float(value) for value in inputs))]
        return outputs, outputs

    def on_ready(self, buffers, callback):
        callback()

    def to_host(self, buffer):
        return buffer


class Asked(WithRoom):
    """A runtime that tells of no end that it is not asked for after the launch, as torch-xla; it has room for four."""

    def __init__(self):
        super().__init__()
        self.give_room(4)
        self.waiting = []

    def execute(self, executable, inputs, key):
        self.waiting.append(lambda: self.give_room(1))
        return super().execute(executable, inputs, key)

    def on_ready(self, buffers, callback):
        self.waiting.append(callback)

    def progress(self):
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            threading.Timer(0.01, callback).start()
        return False


class Ended(WithRoom):
    """A runtime whose computations have ended when it is asked: it calls back in `progress`, as torch-xla may."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def on_ready(self, buffers, callback):
        self.waiting.append(callback)

    def progress(self):
        waiting, self.waiting = self.waiting, []
        for callback in waiting:
            callback()
        return False


class Hashable(SimpleNamespace):
    """As a task is: by its identity."""

    __hash__ = object.__hash__


class Launching:
    """An engine, and units of computations in a chain for it."""

    def __init__(self, *, gang=False, runtime=None):
        self.runtime = runtime or WithRoom()
        self.reported = queue.Queue()
        self.engine = Engine("i0.e1", self.runtime, 1, "127.0.0.1", self.reported.put, link_key=bytes(32), gang=gang)
        self.ended = []
        self.on_thread(lambda: setattr(self.engine.core, "handle", self.handle))

    def handle(self, event):
        self.ended.append(event)
        return []

    def on_thread(self, work):
        return self.engine.run(work).result(30)

    def unit(self, run_id, source, count):
        """Issues a unit of so many computations, each of which adds 1; returns its run and its output's cell."""
        target = Cell(scheduled=True)
        calls = [Call(1, (slot,), (slot + 1,), (slot,), 0) for slot in range(count)]
        part = PartId(run_id, 1)
        instruction = ComputeInstruction(function_index=0, inputs=(0,), outputs=(1,))
        unit = SimpleNamespace(reads=(0,), writes=(count,), instructions=[instruction])
        run = SimpleNamespace(
            run_id=run_id,
            program=SimpleNamespace(part=part, name="program"),
            cancelled=None,
            checks_values=False,
            came_ns=0,
            device_ns=0,
        )
        task = Hashable(run=run, unit=unit, number=0, awaited_input=False, held_for=None)
        function = SimpleNamespace(name="function", source="")
        self.engine._codes[part] = SimpleNamespace(calls={0: calls}, functions=[function], compiled_ns=0, schedules={})
        self.on_thread(
            lambda: self.engine._launches.start(Execute(task=task, inputs=[source], outputs=[target]), is_granted=False)
        )
        return run, target

    def read(self, cell):
        """Reads a cell; returns where its value will be."""
        found = queue.Queue()
        self.on_thread(lambda: self.engine._exchange._when_on_host(cell, found.put))
        return found


def test_what_comes_while_computations_wait_for_room_is_done_before_them():
    launching = Launching()
    runtime = launching.runtime
    given = Cell(scheduled=True, buffer=torch.tensor(5.0))
    runtime.give_room(2)
    _, first = launching.unit(1, given, 5)
    _, second = launching.unit(2, first, 1)
    assert runtime.started == ["1.1.0.0", "1.1.0.1"]
    assert launching.read(given).get(timeout=30) == 5.0
    of_second, of_first = launching.read(second), launching.read(first)
    assert launching.on_thread(launching.engine.num_entries)["launches"] == 2
    assert of_first.empty()
    runtime.give_room(3)
    assert of_first.get(timeout=30) == 10.0
    assert of_second.empty()
    runtime.give_room(1)
    assert of_second.get(timeout=30) == 11.0
    assert runtime.started == [*(f"1.1.0.{number}" for number in range(5)), "2.1.0.0"]
    assert launching.on_thread(launching.engine.num_entries)["launches"] == 0
    assert launching.on_thread(launching.engine.num_entries)["filling"] == 0


def test_ends_of_what_waited_for_room_are_asked_for(monkeypatch):
    monkeypatch.setattr(Engine, "_idle_seconds", lambda self: None)  # nothing wakes it but what comes
    launching = Launching(runtime=Asked())
    _, target = launching.unit(1, Cell(scheduled=True, buffer=torch.tensor(0.0)), 30)
    assert launching.read(target).get(timeout=30) == 30.0


def test_what_an_end_leads_to_goes_out_at_once(monkeypatch):
    monkeypatch.setattr(Engine, "_idle_seconds", lambda self: None)  # nothing wakes it but what comes
    launching = Launching(runtime=Ended())
    engine = launching.engine
    cell = Cell(scheduled=True, buffer=torch.tensor(5.0))

    def send(value):
        engine._report_later(idle=IdleMessage(epoch=int(value)))

    launching.on_thread(lambda: engine._exchange._when_on_host(cell, send))
    assert [event.idle.epoch for event in launching.reported.get(timeout=30)] == [5]


def test_free_memory_goes_back_once_nothing_is_computed(monkeypatch):
    monkeypatch.setattr(engine_module, "_IDLE_SECONDS", 0.3)
    given_back = queue.Queue()
    monkeypatch.setattr(engine_module.heap, "give_back", lambda: given_back.put(time.monotonic()))
    launching = Launching()
    launching.runtime.give_room(1)
    launched = time.monotonic()
    _, target = launching.unit(1, Cell(scheduled=True, buffer=torch.tensor(1.0)), 1)
    launching.on_thread(lambda: setattr(launching.engine, "_used_memory", time.monotonic()))
    assert launching.read(target).get(timeout=30) == 2.0
    assert given_back.get(timeout=30) > launched + 0.3
    assert launching.on_thread(lambda: "still") == "still"
    assert given_back.empty()  # there is nothing new to give


def test_computations_of_a_cancelled_run_that_wait_for_room_are_left_out():
    launching = Launching()
    runtime = launching.runtime
    runtime.give_room(2)
    cancelled, first = launching.unit(1, Cell(scheduled=True, buffer=torch.tensor(5.0)), 5)
    _, second = launching.unit(2, Cell(scheduled=True, buffer=torch.tensor(7.0)), 1)
    found = launching.read(first)
    failure = launching.engine.failure("Cancelled", "its user wants it no more")

    def cancel():
        cancelled.cancelled = failure

    launching.on_thread(cancel)
    assert found.get(timeout=30) == failure
    runtime.give_room(1)
    assert launching.read(second).get(timeout=30) == 8.0
    assert runtime.started == ["1.1.0.0", "1.1.0.1", "2.1.0.0"]


class Held(WithRoom):
    """A runtime whose computations end when the test says so; `executable` 0 only passes its input on."""

    def __init__(self):
        super().__init__()
        self.waiting = queue.Queue()

    def execute(self, executable, inputs, key):
        if executable == 0:
            self.room.get_nowait()
            return list(inputs), ()
        return super().execute(executable, inputs, key)

    def on_ready(self, buffers, callback):
        self.waiting.put(callback)


@pytest.mark.parametrize("last", ["is left out", "passes on"])
def test_a_unit_has_ended_when_what_it_started_has(last):
    """Also if nothing that was started reads the output of its last computation."""
    launching = Launching(runtime=Held())
    engine, runtime = launching.engine, launching.runtime
    runtime.give_room(1)
    run, _ = launching.unit(1, Cell(scheduled=True, buffer=torch.tensor(5.0)), 2)
    if last == "is left out":
        launching.on_thread(lambda: setattr(run, "cancelled", engine.failure("Cancelled", "its user wants it no more")))
    else:
        [code] = engine._codes.values()
        code.calls[0][1] = Call(0, (1,), (2,), (1,), 0)
    runtime.give_room(1)
    computed = runtime.waiting.get(timeout=30)
    launching.on_thread(lambda: None)
    assert not launching.ended
    assert runtime.waiting.empty()
    computed()
    wait_until(lambda: launching.ended)
    assert run.device_ns > 0


def wait_until(holds, seconds=30):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_waits_for_memory_is_told_though_others_keep_the_executor_busy():
    told = queue.Queue()
    engine = Engine("i0.e1", Idle(), 1, "127.0.0.1", lambda reported: None, link_key=bytes(32), memory_wait=0.2)

    def handle(event):
        told.put(event)
        return []

    def starve():
        engine.core.handle = handle
        engine.core.memory.starved.append(SimpleNamespace(need_bytes=1))
        engine.spans.note_waits = lambda starved: None

    engine.run(starve).result(30)
    deadline = time.monotonic() + 30
    while told.empty() and time.monotonic() < deadline:
        engine.run(lambda: None).result(30)
    assert isinstance(told.get_nowait(), MemoryStalled)


def test_a_host_of_a_gang_starts_all_that_was_granted_at_once():
    launching = Launching(gang=True)
    launching.runtime.give_room(3)
    cell = Cell(scheduled=True, buffer=torch.tensor(5.0))
    assert launching.read(launching.unit(1, cell, 3)[1]).get(timeout=30) == 8.0


def test_a_host_of_a_gang_reports_no_unit_as_ready_whose_input_it_could_not_place():
    """That is known only after the core has said that the unit is ready."""
    launching = Launching(gang=True)
    cell, run = Cell(scheduled=True), RunPart(RunId(7), SliceId(1))
    commands = [
        Place(cell=cell, data=None, spec=SimpleNamespace(shape=(2,))),
        ReportReady(run=run, unit=3, inputs=[cell]),
    ]

    def handle(event):
        launching.ended.append(event)
        return commands if isinstance(event, BuffersDropped) else []

    launching.on_thread(lambda: setattr(launching.engine.core, "handle", handle))
    launching.engine.post(BuffersDropped(buffer_ids=[]))
    [event] = launching.reported.get(timeout=30)
    assert (event.unit_ready.run_id, event.unit_ready.slice_id, event.unit_ready.unit) == (7, 1, 3)
    assert "could not be placed" in event.unit_ready.failure.message
    launching.on_thread(lambda: None)
    assert launching.ended[1:] == [UnitRefused(run=run, unit=3, failure=cell.failure)]

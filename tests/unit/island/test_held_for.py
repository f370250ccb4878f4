"""What a run was held for, as a trace shows it: room, its turn, its client's own runs, an order of islands."""

from torchways.ids import PartId, RunPart
from torchways.island import events as core
from torchways.island.state import SchedulerState

#: Runs whose time is not known yet count 10 ms, twice the window.
WINDOW, RUN_SECONDS = 0.005, 0.01
ROOM, TURN, EARLIER = "room on its devices", "its turn", "its client's earlier runs"


class Island:
    """A scheduler of some executors, each with a slice of every client and a program over all of them."""

    def __init__(self, *executors, clients=(1, 2), islands=()):
        self.scheduler = SchedulerState(window=WINDOW)
        self.now = 0.0
        self.held_for = {}
        self.slices = {}
        for client in clients:
            for number, executor in enumerate(executors):
                slice_id = self.slices[client, executor] = len(self.slices) + 1
                self.handle(
                    core.SliceAdded(
                        slice_id=slice_id, client_id=client, executor_ids=(executor,), device_indices=(number,)
                    )
                )
            parts = {self.slices[client, executor]: None for executor in executors}
            registered = core.ProgramRegistered(
                client_id=client, program_id=client, name="step", parts=parts, islands=islands
            )
            self.handle(registered)
            for executor in executors:
                part = PartId(client, self.slices[client, executor])
                self.handle(core.ProgramLoaded(executor_id=executor, part=part, failure=None))

    def share(self):
        """Each client has a run that ends at once: no longer is one of them alone."""
        for client, executor in self.slices:
            self.run(client, 100 + client, executor)
            self.end(client, 100 + client, executor)
        self.held_for.clear()
        for program in self.scheduler.programs.values():
            program.times.seconds.clear()

    def handle(self, event, now=None):
        self.now = self.now if now is None else now
        asked = []
        for command in self.scheduler.handle(event, self.now):
            if isinstance(command, core.SendEnqueue):
                self.held_for[command.run.run_id] = command.held_for
            elif isinstance(command, core.AskOrder):
                asked.append(command.run_id)
        return asked

    def run(self, client, run_id, *executors, now=None):
        arguments = {self.slices[client, executor]: None for executor in executors}
        request = core.RunRequested(
            client_id=client, program_id=client, run_id=run_id, first_buffer_id=0, arguments=arguments
        )
        return self.handle(request, now)

    def end(self, client, run_id, executor="a", now=None):
        run = RunPart(run_id, self.slices[client, executor])
        ended = core.RunEnded(executor_id=executor, run=run, failure=None, device_seconds=RUN_SECONDS)
        self.handle(ended, now)


def test_room_a_turn_and_earlier_runs():
    island = Island("a")
    island.share()
    island.run(1, 11, "a")
    for run_id in (12, 13):
        island.run(1, run_id, "a")
    island.run(2, 21, "a")
    assert island.held_for == {11: ""}
    island.end(1, 11, now=0.01)
    assert island.held_for == {11: "", 21: ROOM}  # client 2 had less
    island.end(2, 21, now=0.02)
    island.end(1, 12, now=0.03)
    assert island.held_for == {11: "", 21: ROOM, 12: TURN, 13: EARLIER}


def test_a_clients_runs_that_do_not_end():
    island = Island("a")
    island.share()
    island.scheduler.programs[1].times.measured(("a",), RUN_SECONDS)
    for number in range(8):
        island.run(1, number + 1, "a", now=RUN_SECONDS * number)
    assert list(island.held_for) == [1, 2, 3, 4, 5, 6]
    island.end(1, 1)
    island.end(1, 2)
    island.handle(core.TimePassed(), now=1.0)  # the others should have ended long ago
    assert island.held_for[7] == "its client's runs that are admitted, to end"


def test_a_clients_runs_of_unknown_time():
    island = Island("a")
    for number in range(3):
        island.run(1, number + 1, "a", now=RUN_SECONDS * number)
    assert list(island.held_for) == [1, 2]
    island.end(1, 1, now=0.03)
    island.handle(core.TimePassed(), now=0.04)
    assert island.held_for[3] == "its client's runs that are admitted, to end"


def test_room_on_other_devices():
    island = Island("a", "b")
    island.run(1, 1, "b")
    island.run(2, 2, "a", "b")
    island.end(1, 1, "b", now=0.01)
    assert island.held_for == {1: "", 2: "room on its other devices"}


def test_a_place_in_the_order_of_islands():
    island = Island("a", islands=(0, 1))
    assert island.run(1, 1, "a") == [1]
    assert island.held_for == {}
    island.handle(core.RunOrdered(run_id=1))
    assert island.held_for == {1: "its place in the order of all islands"}

"""What an operator is shown, and what a caller with the token alone is not."""

from tests.unit.cli.observations import observation, share
from torchways.cluster.operator import hide_names, make_printable


def test_the_token_alone_shows_no_names():
    found = observation(10, share(1, name="a.py", busy_seconds=5.0))
    hide_names(found)
    text = str(found)
    for name in ("a.py", "[b].py", "run 7", "run 9", "step"):
        assert name not in text
    assert found.schedulers[0].status.device_sets[0].clients[0].busy_seconds == 5.0
    assert [client.client_id for client in found.clients] == [1, 2]


def test_what_clients_called_their_functions_steers_no_terminal():
    found = observation(10, share(1))
    found.schedulers[0].status.waits[:] = ["waits for \x1b]0;title\x07"]
    found.executors[0].status.stalls[:] = ["run 7 at \x1b[2J.py:3"]
    found.executors[0].status.waiting_for[:] = ["run 7 of \u202estep"]
    make_printable(found)
    assert list(found.schedulers[0].status.waits) == ["waits for ?]0;title?"]
    assert list(found.executors[0].status.stalls) == ["run 7 at ?[2J.py:3"]
    assert list(found.executors[0].status.waiting_for) == ["run 7 of ?step"]

"""What an operator is shown, and what a caller with the token alone is not."""

from tests.unit.cli.observations import observation, share
from torchways.cluster.operator import hide_names


def test_the_token_alone_shows_no_names():
    found = observation(10, share(1, name="a.py", busy_seconds=5.0))
    hide_names(found)
    text = str(found)
    for name in ("a.py", "[b].py", "run 7", "run 9", "step"):
        assert name not in text
    assert found.schedulers[0].status.device_sets[0].clients[0].busy_seconds == 5.0
    assert [client.client_id for client in found.clients] == [1, 2]

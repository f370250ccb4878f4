"""What an operator is shown, and what a caller with the token alone is not."""

from tests.unit.cli.observations import observation, share
from torchways.cluster.operator import hide_names, merged_spans
from torchways.ids import client_range
from torchways.rpc import torchways_pb2 as pb

HIDDEN = "of another client"


def span(name, start, run_id=0):
    return pb.Span(name=name, track="device 0", start_ns=start, end_ns=start + 5, run_id=run_id)


def test_spans_of_all_clients_have_their_names_once():
    one, two = client_range(1)[0] + 1, client_range(2)[0] + 1
    answers = {
        1: [span("compile", 1), span("mine", 10, one), span(HIDDEN, 20), span(HIDDEN, 30)],
        2: [span("compile", 1), span(HIDDEN, 10), span("theirs", 20, two), span(HIDDEN, 30), span("later", 40, two)],
    }
    merged = [(item.name, item.start_ns) for item in merged_spans(answers)]
    # What began at 30 was of a client that is gone.
    assert merged == [("compile", 1), ("mine", 10), ("theirs", 20), (HIDDEN, 30), ("later", 40)]


def test_no_client_and_no_spans():
    assert merged_spans({0: []}) == []
    assert [item.name for item in merged_spans({0: [span("compile", 1), span(HIDDEN, 10)]})] == ["compile", HIDDEN]


def test_the_token_alone_shows_no_names():
    found = observation(10, share(1, name="a.py", busy_seconds=5.0))
    hide_names(found)
    text = str(found)
    for name in ("a.py", "[b].py", "run 7", "run 9", "step"):
        assert name not in text
    assert found.schedulers[0].status.device_sets[0].clients[0].busy_seconds == 5.0
    assert [client.client_id for client in found.clients] == [1, 2]

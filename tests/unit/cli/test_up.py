"""How `torchways up` waits for the cluster that it has started."""

from types import SimpleNamespace

from tests.unit.cli.observations import observation
from torchways.cli import up
from torchways.config import ClusterConfig
from torchways.errors import DeadlineExceeded
from torchways.rpc import operator


def test_one_slow_answer_is_not_the_end_of_a_start(monkeypatch):
    answers = [DeadlineExceeded("the cluster did not answer in time"), observation(1)]

    def ask(access, question):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(operator, "ask", ask)
    up._wait_schedulers(SimpleNamespace(address="a:1", token="t", lives=lambda: True), ClusterConfig(islands=1))
    assert answers == []

"""Programs that ask the host tensors that they are called with: a trace for each answer."""

import pytest
import torch
from torch import nn

from tests.local_session import LocalSession
from torchways.capture.tracing.known_values import ArgumentRead
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.controller.variants import VariantOptions
from torchways.errors import DataDependentError


@pytest.fixture
def session():
    return LocalSession()


def program_of(session, function, **options):
    return ProgramFunction(function, session.mesh(), lambda: session, options=VariantOptions(**options))


def masked(x, mask):
    if torch.all(mask == 1):
        return x * 2
    return x * mask


FULL, PART, OTHER = torch.tensor([1, 1, 1]), torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1])


def test_a_trace_serves_all_calls_with_its_answer_and_another_answer_is_traced(session, caplog):
    program = program_of(session, masked)
    x = torch.tensor([1.0, 2.0, 3.0])
    for mask in (FULL, PART, OTHER, FULL, PART):
        assert program(x, mask).tolist() == masked(x, mask).tolist()
    assert program.num_traces == 2
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    line = masked.__code__.co_firstlineno + 1
    assert f"what test_argument_reads.py:{line} in masked reads of mask is False, was True" in record.message


def test_training_may_depend_on_an_argument(session):
    model = make_function(nn.Linear(3, 1, bias=False), session.mesh(), lambda: session)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    @lambda function: ProgramFunction(function, None, lambda: session)
    def step(x, lengths):
        x = x[:, : int(lengths.max())]
        loss = model(nn.functional.pad(x, (0, 3 - x.shape[1]))).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    before = model.weight.cpu().clone()
    for lengths in ([1, 2], [2, 1], [3, 3]):
        step(torch.ones(2, 3), torch.tensor(lengths))
    assert step.num_traces == 2
    torch.testing.assert_close(model.weight.cpu().detach(), before - torch.tensor([[6.0, 6.0, 2.0]]))


def test_the_answer_is_computed_with_what_was_written_in_between(session):
    def function(x, mask):
        counts = torch.zeros(4, dtype=torch.int64)
        part = counts[1:]
        counts[0] = 5
        part += mask
        part.mul_(2)
        counts.add_(1)
        return x + int(counts.sum())

    program = program_of(session, function)
    x = torch.zeros(1)
    for mask in (FULL, PART, FULL, torch.tensor([0, 1, 1])):
        assert program(x, mask).item() == function(x, mask).item()
    assert program.num_traces == 2
    assert (FULL.tolist(), PART.tolist()) == ([1, 1, 1], [1, 0, 1])


def test_two_tensors_may_be_compared(session):
    def function(x, left, right):
        return x if torch.equal(left, right) else -x

    program = program_of(session, function)
    x = torch.ones(1)
    assert [program(x, FULL, mask).item() for mask in (FULL, PART, OTHER, FULL.clone())] == [1, -1, -1, 1]
    assert program.num_traces == 2


def test_positions_are_read_only_where_no_graph_does_without(session, caplog):
    def mean(x, mask):
        return x[mask.nonzero().squeeze(1)] * len(mask.nonzero())

    program = program_of(session, mean)
    x = torch.tensor([1.0, 2.0, 3.0])
    for mask in (PART, FULL, PART):
        torch.testing.assert_close(program(x, mask).cpu(), mean(x, mask))
    assert program.num_traces == 2
    assert "reads of mask is [[0], [1], [2]], was [[0], [2]]" in caplog.text
    rows = program_of(session, lambda x, mask: x[mask == 1].sum())
    assert [rows(x, mask).item() for mask in (PART, FULL)] == [4.0, 6.0]
    assert rows.num_traces == 1


def test_calls_that_ask_nothing_have_no_condition(session, monkeypatch):
    monkeypatch.setattr(ArgumentRead, "again", lambda *_: pytest.fail("nothing was read"))
    program = program_of(session, lambda x, mask: x * mask)
    for mask in (FULL, PART):
        program(torch.ones(3), mask)
    assert program.num_traces == 1


def test_the_traces_kept_are_bounded(session):
    program = program_of(session, lambda x, n: x * int(n), max_variants=2)
    for number in (1, 2, 3, 1):
        assert program(torch.ones(1), torch.tensor(number)).item() == number
    assert program.num_traces == 2


def test_floating_point_numbers_are_not_read(session):
    function = make_function(lambda x, scale: x * scale.item(), session.mesh(), lambda: session)
    with pytest.raises(DataDependentError, match=r"test_argument_reads\.py:.* only bools and integers"):
        function(torch.ones(2), torch.tensor(0.5))


def test_arrays_are_not_read(session):
    function = make_function(masked, session.mesh(), lambda: session)
    ones = make_function(torch.ones_like, session.mesh(), lambda: session)
    with pytest.raises(DataDependentError, match=r"a computed tensor bool\[\] .*in masked"):
        function(torch.ones(3), ones(FULL))
    pick = make_function(lambda x, index: x * int(index), session.mesh(), lambda: session)
    with pytest.raises(DataDependentError, match=r"the array int64\[\] "):
        pick(torch.ones(3), ones(torch.tensor(1)))

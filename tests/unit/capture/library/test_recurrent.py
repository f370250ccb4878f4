"""Recurrent layers, plain and of packed sequences: against eager PyTorch, no processes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError


class Encoder(nn.Module):
    def __init__(self, cls, **options):
        super().__init__()
        self.rnn = cls(3, 2, batch_first=True, **options)

    def forward(self, x, lengths=None):
        if lengths is None:
            return self.rnn(x)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        output, state = self.rnn(packed)
        return pad_packed_sequence(output, batch_first=True), state


def tensors(tree):
    return [leaf.detach().cpu() for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def train(model, wrap, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(x, lengths):
        results = model(x, lengths)
        floats = [leaf for leaf in torch.utils._pytree.tree_leaves(results) if leaf.is_floating_point()]
        loss = sum(value.square().sum() for value in floats)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return results

    step = wrap(step)
    return step, [tensors(step(*batch)) for batch in batches], tensors(model.state_dict())


@pytest.fixture
def session():
    return LocalSession()


LAYERS = {
    "lstm": (nn.LSTM, {}),
    "lstm of two layers and directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 1}),
    "gru": (nn.GRU, {"bidirectional": True}),
    "rnn": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers_train_as_in_eager(session, layer, packed):
    torch.manual_seed(0)
    cls, options = LAYERS[layer]
    eager = Encoder(cls, **options)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    lengths = [torch.tensor([1, 2]), torch.tensor([2, 1])] if packed else [None, None]
    batches = [(torch.randn(2, 2, 3), item) for item in lengths]
    step, *found = train(ours, lambda f: ProgramFunction(f, None, lambda: session), batches)
    _, *expected = train(eager, lambda f: f, batches)
    torch.testing.assert_close(found, expected)
    assert step.num_traces == 1  # one graph for all lengths


def test_dropout_between_layers_drops_in_training_only(session):
    eager = nn.LSTM(3, 4, num_layers=2, dropout=1.0)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    x = torch.randn(2, 3, 3)
    torch.testing.assert_close(tensors(ours(x)), tensors(eager(x)))
    torch.testing.assert_close(tensors(ours.eval()(x)), tensors(eager.eval()(x)))


def test_the_longest_length_is_the_size_of_the_result(session):
    model = Encoder(nn.GRU)
    ours = make_function(copy.deepcopy(model), session.mesh(), lambda: session)
    for lengths in ([3, 1], [2, 2], [1, 2]):
        x = torch.randn(2, 3, 3)
        (found, counts), _ = ours(x, torch.tensor(lengths))
        (expected, _), _ = model(x, torch.tensor(lengths))
        torch.testing.assert_close(found.cpu(), expected)
        assert counts.tolist() == lengths


def test_padding_to_a_total_length_and_layers_between(session):
    layer = nn.Linear(3, 2)

    def run(x, lengths, layer):
        packed = pack_padded_sequence(x, lengths)
        packed = packed._replace(data=layer(packed.data).relu())
        return pad_packed_sequence(packed, padding_value=-1.0, total_length=4)

    ours = make_function(copy.deepcopy(layer), session.mesh(), lambda: session)
    x, lengths = torch.randn(3, 2, 3), torch.tensor([3, 2])
    found = ProgramFunction(lambda x, lengths: run(x, lengths, ours), None, lambda: session)(x, lengths)
    torch.testing.assert_close(tensors(found), tensors(run(x, lengths, layer)))


def test_a_sequence_that_was_packed_outside(session):
    model = nn.LSTM(3, 2, bidirectional=True)
    ours = make_function(copy.deepcopy(model), session.mesh(), lambda: session)

    def run(packed, model):
        output, state = model(packed)
        return pad_packed_sequence(output), state

    packed = pack_sequence([torch.randn(length, 3) for length in (3, 1, 1)])
    found = ProgramFunction(lambda packed: run(packed, ours), None, lambda: session)(packed)
    torch.testing.assert_close(tensors(found), tensors(run(packed, model)))


def test_lengths_that_cannot_be_packed_raise_as_in_eager(session):
    ours = make_function(Encoder(nn.GRU), session.mesh(), lambda: session)
    with pytest.raises(CaptureError, match="greater than 0"):
        ours(torch.randn(2, 3, 3), torch.tensor([3, 0]))
    pack = ProgramFunction(lambda x, n: pack_padded_sequence(x, n).data.sum(), session.mesh(), lambda: session)
    with pytest.raises(CaptureError, match="decreasing order"):
        pack(torch.randn(3, 2, 3), torch.tensor([1, 3]))


def test_onednn_is_as_it_was_after_a_trace(session):
    ours = make_function(nn.LSTM(3, 2), session.mesh(), lambda: session)
    before = torch.backends.mkldnn.enabled
    ours(torch.randn(2, 3, 3))
    assert torch.backends.mkldnn.enabled == before

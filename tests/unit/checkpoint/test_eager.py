"""Checkpoints without a cluster: of plain tensors, as in eager mode."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from torchways import checkpoint
from torchways.errors import CheckpointError, ConfigError


class Counter:
    """Something that says what its state is."""

    def __init__(self):
        self.state = {"position": 0, "by_epoch": {}, "left": [], 3: None}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.extra = "nothing"

    def forward(self, x):
        return self.second(self.first(x).tanh())

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def training(make_optimizer=torch.optim.AdamW):
    model = Net()
    optimizer = make_optimizer(model.parameters(), lr=0.1)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "data": Counter(),
        "best": {"loss": 9.0, "at": [1, 2]},
        "mean": torch.zeros(3),
        "step": 0,
    }


def make_steps(state, count):
    losses = []
    for _ in range(count):
        loss = state["model"](torch.randn(5, 4)).square().mean()
        loss.backward()
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["schedule"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make_optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path, make_optimizer):
    torch.manual_seed(0)
    state = training(make_optimizer)
    make_steps(state, 3)
    state["model"].extra, state["model"].count[...] = "something", 7
    state["data"].state |= {"position": 5, "by_epoch": {1: [2]}}
    state["mean"] += 1
    saving = checkpoint.save(tmp_path, {**state, "best": {"loss": 2.5, "at": [3]}, "step": 3}, step=3)
    expected, drawn = make_steps(state, 4), (random.random(), np.random.rand())
    assert saving.result() == tmp_path / "step_00000003"

    torch.manual_seed(5)
    fresh = training(make_optimizer)
    loaded = checkpoint.load(tmp_path, fresh)
    assert make_steps(fresh, 4) == expected
    assert (random.random(), np.random.rand()) == drawn
    assert loaded["model"] is fresh["model"]
    assert (loaded["step"], loaded["best"]) == (3, {"loss": 2.5, "at": [3]})
    assert fresh["data"].state == {"position": 5, "by_epoch": {1: [2]}, "left": [], 3: None}
    assert (fresh["model"].extra, fresh["model"].count.item()) == ("something", 7)
    assert fresh["mean"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("num_steps", [0, 2])
def test_an_optimizer_forgets_steps_after_the_checkpoint(tmp_path, num_steps):
    """As its own `load_state_dict` has it: what the checkpoint does not have is gone, in a part of its state too."""
    torch.manual_seed(0)
    state = training()
    unused = nn.Parameter(torch.zeros(2))
    state["optimizer"].add_param_group({"params": [unused]})
    make_steps(state, num_steps)
    checkpoint.save(tmp_path, state).result()
    saved = copy.deepcopy(state["optimizer"].state_dict())
    expected = make_steps(state, 4)
    unused.grad = torch.ones(2)
    state["optimizer"].step()
    next(iter(state["optimizer"].state.values()))["max_exp_avg_sq"] = torch.ones(())  # as with other options
    checkpoint.load(tmp_path, state)
    found = state["optimizer"].state_dict()["state"]
    assert {name: set(kinds) for name, kinds in found.items()} == {
        name: set(kinds) for name, kinds in saved["state"].items()
    }
    assert make_steps(state, 4) == expected

    checkpoint.save(tmp_path / "weights", {"model": state["model"]}).result()
    before = copy.deepcopy(state["optimizer"].state_dict())
    checkpoint.load(tmp_path / "weights", state, strict=False)
    after = state["optimizer"].state_dict()["state"]
    assert {name: set(kinds) for name, kinds in after.items()} == {
        name: set(kinds) for name, kinds in before["state"].items()
    }


def test_what_is_saved_does_not_change_afterwards(tmp_path):
    values, plain = torch.zeros(1000), [1, 2]
    saving = checkpoint.save(tmp_path / "one", {"values": values, "plain": plain})
    values += 1
    plain.append(3)
    saving.result()
    found = checkpoint.load(tmp_path / "one", {"values": torch.ones(1000), "plain": None})
    assert found["plain"] == [1, 2]
    assert not found["values"].any()


def test_plain_pytorch_reads_and_writes_the_same(tmp_path):
    model = Net()
    model.extra = "mine"
    checkpoint.save(tmp_path / "ours", {"model": model}).result()
    theirs = Net()
    state = {"model": theirs.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "ours")
    theirs.load_state_dict(state["model"])
    torch.testing.assert_close(theirs.first.weight, model.first.weight, rtol=0, atol=0)
    assert theirs.extra == "mine"

    dcp.save({"model": theirs.state_dict()}, checkpoint_id=tmp_path / "theirs")
    back = Net()
    checkpoint.load(tmp_path / "theirs", {"model": back})
    torch.testing.assert_close(back.second.weight, theirs.second.weight, rtol=0, atol=0)


def test_an_optimizer_by_names_is_as_pytorch_has_it(tmp_path):
    state = training()
    make_steps(state, 2)
    checkpoint.save(tmp_path / "one", {"model": state["model"], "optimizer": state["optimizer"]}).result()
    expected = get_optimizer_state_dict(state["model"], state["optimizer"])
    metadata = dcp.FileSystemReader(tmp_path / "one").read_metadata()
    for name, values in expected["state"].items():
        for kind in values:
            assert f"optimizer.state.{name}.{kind}" in metadata.state_dict_metadata


def test_tied_parameters(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    checkpoint.save(tmp_path / "both", model).result()
    checkpoint.load(tmp_path / "both", other)
    assert torch.equal(other.head.weight, model.embed.weight)
    # A file that has one name of the two is enough.
    dcp.save({"embed.weight": model.embed.weight.detach()}, checkpoint_id=tmp_path / "one")
    other = Tied()
    checkpoint.load(tmp_path / "one", other)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such folder"):
        checkpoint.load(tmp_path / "none", Net())
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="it has no complete checkpoint"):
        checkpoint.load(tmp_path / "empty", Net())
    checkpoint.save(tmp_path / "one", {"model": Net()}).result()
    with pytest.raises(CheckpointError, match=r"does not have other\.weight, other\.bias\. It has model\.count"):
        checkpoint.load(tmp_path / "one", {"other": nn.Linear(2, 2)})
    checkpoint.load(tmp_path / "one", {"other": nn.Linear(2, 2)}, strict=False)
    larger = Net()
    larger.first = nn.Linear(5, 8)
    with pytest.raises(CheckpointError, match=r"model\.first\.weight has the shape \(8, 4\) .*, and \(8, 5\) here"):
        checkpoint.load(tmp_path / "one", {"model": larger})
    for wrong, message in (
        ([Net()], "a checkpoint is of a module or a dictionary of what to keep"),
        ({"random_state": 1}, "'random_state' is the checkpoint's own"),
        ({"models": {1: Net()}}, "keys of a checkpoint are strings; models has 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.save(tmp_path / "two", wrong)
    with pytest.raises(ConfigError, match="keep is 0: it must be at least 1"):
        checkpoint.save(tmp_path, {}, step=1, keep=0)
    with pytest.raises(ConfigError, match="step is -1"):
        checkpoint.save(tmp_path, {}, step=-1)


def test_an_optimizer_of_other_parameters(tmp_path):
    model = Net()
    checkpoint.save(tmp_path / "one", {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=1)}).result()
    fewer = torch.optim.SGD(model.first.parameters(), lr=1)
    with pytest.raises(CheckpointError, match=r"the optimizer optimizer in .* has other parameters in group 0: first"):
        checkpoint.load(tmp_path / "one", {"model": model, "optimizer": fewer})


def test_a_file_that_is_damaged(tmp_path):
    model = Net()
    path = checkpoint.save(tmp_path / "one", model).result()
    [file] = path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "one", model)


def test_what_cannot_be_written_leaves_what_was(tmp_path, caplog):
    model = Net()
    good = checkpoint.save(tmp_path / "run", model, step=1).result()
    (tmp_path / "run" / "step_00000002").write_text("a file where the checkpoint would be")
    (tmp_path / "file").write_text("")
    saving = checkpoint.save(tmp_path / "file" / "run", model, step=1)
    with pytest.raises(CheckpointError, match=r"could not be saved: .*Not a directory.*; there is none before it"):
        saving.result()
    assert "Training goes on" in caplog.text
    checkpoint.load(good, model)
    assert not list((tmp_path / "run").glob(".*partial*"))


@pytest.mark.parametrize(
    "extra",
    [7, b"bytes", [1, [2]], {"seen": 3, "names": ["a"]}, torch.arange(5), {"mean": torch.ones(2), "n": 1}],
)
def test_extra_state_of_any_form(tmp_path, extra):
    """It need not be like the one of the module that is loaded."""
    model = nn.Sequential(Net(), nn.Linear(4, 4))
    model[0].extra = extra
    checkpoint.save(tmp_path, {"model": model}, step=1).result()
    for before in ("nothing", {"seen": 0, "others": 1}, torch.zeros(2)):
        fresh = nn.Sequential(Net(), nn.Linear(4, 4))
        fresh[0].extra = before
        checkpoint.load(tmp_path, {"model": fresh})
        assert type(fresh[0].extra) is type(extra)
        assert str(fresh[0].extra) == str(extra)
    dcp.load({"model": model.state_dict()}, checkpoint_id=tmp_path / "step_00000001")  # it is plain PyTorch's form
    model[0].extra = {"by_number": {5: 1}}
    with pytest.raises(CheckpointError, match=r"model\.0\._extra_state\.by_number has 5"):
        checkpoint.save(tmp_path, {"model": model}, step=2)

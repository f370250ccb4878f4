"""Checkpoints of arrays on slices: executors write and read them, beside the training."""

import copy
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
from torch import nn

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from tests.cluster.conftest import status_of, writer_of
from torchways.array import Array
from torchways.errors import CheckpointError, PlacementError

CONFIG = GPTConfig(vocab_size=17, seq_len=8, d_model=16, n_layers=2, n_heads=2)
SPLIT = {"layers.1": tw.SplitPoint.BEGINNING}


def gpt(seed=0):
    torch.manual_seed(seed)
    return GPT(CONFIG)


def training(model, dropout=0.0):
    """Returns what a checkpoint holds, and a function that makes steps and returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)

    @tw.program
    def step(x):
        logits = F.dropout(model(x), dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), x.roll(1, 1).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def steps(count):
        losses = []
        for _ in range(count):
            losses.append(step(torch.randint(0, 17, (4, 8))))
            schedule.step()
        return [loss.item() for loss in losses]

    return {"model": model, "optimizer": optimizer, "schedule": schedule}, steps


def pipelined(model, meshes, **options):
    return tw.pipeline(model, split_spec=SPLIT, meshes=list(meshes), **options)


@pytest.fixture(scope="module")
def saved(meshes, tmp_path_factory):
    """A checkpoint of a pipeline after three steps, its state then, and the losses of the next three."""
    folder = tmp_path_factory.mktemp("saved")
    state, steps = training(pipelined(gpt(), meshes), dropout=0.1)
    steps(3)
    saving = tw.checkpoint.save(folder, {**state, "step": 3}, step=3)
    values = {name: value.clone() for name, value in state["model"].state_dict().items()}
    losses = steps(3)
    saving.result()
    return folder, values, losses


def test_training_goes_on_bit_for_bit(meshes, saved):
    folder, values, losses = saved
    torch.manual_seed(9)
    state, steps = training(pipelined(gpt(1), meshes), dropout=0.1)
    assert tw.checkpoint.load(folder, {**state, "step": 0})["step"] == 3
    for name, value in state["model"].state_dict().items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, msg=name)
    assert steps(3) == losses


def test_the_executors_write_and_read_the_arrays(saved, meshes):
    """The controller's own file has only what is no array."""
    folder, values, _ = saved
    path = tw.checkpoint.latest(folder)
    sizes = {file.name: file.stat().st_size for file in path.glob("*.distcp")}
    executors = {status_of(mesh).executor_id for mesh in meshes}
    metadata = dcp.FileSystemReader(path).read_metadata()
    file_of = {index.fqn: info.relative_path for index, info in metadata.storage_data.items()}
    assert {file_of[f"model.{name}"] for name in values} == {f"__{executor}_0.distcp" for executor in executors}
    assert file_of["model.layers.0.attention.wq.weight"] != file_of["model.layers.1.attention.wq.weight"]
    assert file_of["step"] == file_of["random_state"] == "__0_0.distcp"
    assert len(sizes) == 3

    state, _ = training(pipelined(gpt(1), meshes))
    tw.checkpoint.load(folder, state)
    # Nothing has run: what a step would bring to the slices is there already.
    for parameter in state["model"].parameters():
        assert isinstance(parameter, Array)
        assert type(parameter._buffer).__name__ == "RemoteBuffer"
    assert all(
        type(value._buffer).__name__ == "RemoteBuffer"
        for values in state["optimizer"].state.values()
        for value in values.values()
    )


def test_plain_pytorch_reads_it(saved):
    folder, values, _ = saved
    state = {"model": gpt(2).state_dict()}
    dcp.load(state, checkpoint_id=tw.checkpoint.latest(folder))
    for name, value in state["model"].items():
        torch.testing.assert_close(value, values[name], rtol=0, atol=0, msg=name)


def elsewhere(kind, model, meshes):
    match kind:
        case "one slice":
            return tw.function(model, mesh=meshes[1])
        case "fully sharded":
            return tw.parallelize_module(model, meshes[0], tw.fully_shard)
        case "other stages":
            return tw.pipeline(model, split_spec={"norm": tw.SplitPoint.BEGINNING}, meshes=[meshes[1], meshes[0]])
        case "replicas":
            return tw.replicate(model, list(meshes))
        case "sharded stages":
            return pipelined(model, meshes, plan=tw.fully_shard)
    raise AssertionError(kind)


PLACES = ["one slice", "fully sharded", "other stages", "replicas", "sharded stages"]


@pytest.fixture(scope="module")
def without_dropout(meshes, tmp_path_factory):
    """For each place, a checkpoint after two steps there, and the losses of the next two in plain PyTorch."""
    plain, _ = training(gpt())
    losses = eager_steps(plain, 2)
    folder = tmp_path_factory.mktemp("eager")
    tw.checkpoint.save(folder, plain, step=2).result()
    return folder, losses, eager_steps(plain, 2)


def eager_steps(state, count):
    """Steps of a plain model, which no program runs."""
    losses = []
    for _ in range(count):
        x = torch.randint(0, 17, (4, 8))
        loss = F.cross_entropy(state["model"](x).flatten(0, 1), x.roll(1, 1).flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(state["model"].parameters(), 1.0)
        state["optimizer"].step()
        state["optimizer"].zero_grad()
        state["schedule"].step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=[pytest.mark.slow] * (name != "sharded stages")) for name in PLACES]
)
def test_it_goes_on_elsewhere_and_comes_back(meshes, without_dropout, place, tmp_path):
    """From plain PyTorch to slices, and from there to plain PyTorch again."""
    folder, _, expected = without_dropout
    state, steps = training(elsewhere(place, gpt(3), meshes))
    tw.checkpoint.load(folder, state)
    saving = tw.checkpoint.save(tmp_path / "before", state)  # before any step, too
    assert steps(2) == pytest.approx(expected, rel=1e-5)
    saving.result()
    tw.checkpoint.save(tmp_path / "after", state).result()
    plain, _ = training(gpt(4))
    tw.checkpoint.load(tmp_path / "before", plain)
    assert eager_steps(plain, 2) == pytest.approx(expected, rel=1e-6)
    tw.checkpoint.load(tmp_path / "after", plain)
    more = eager_steps(plain, 2)
    tw.checkpoint.load(tmp_path / "after", state)
    assert steps(2) == pytest.approx(more, rel=1e-5)


def test_a_snapshot_is_of_its_moment(meshes, tmp_path):
    """Steps that are sent while a checkpoint is written update in place, and change nothing in it."""
    model = tw.function(nn.Linear(600, 600, bias=False), mesh=meshes[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    @tw.program
    def step(x):
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    x = torch.ones(2, 600)
    step(x)
    savings = {}
    for number in range(4):
        savings[number] = tw.checkpoint.save(tmp_path, model, step=number)
        for _ in range(5):
            step(x)
    start = None
    for number, saving in savings.items():
        plain = nn.Linear(600, 600, bias=False)
        tw.checkpoint.load(saving.result(), plain)
        start = plain.weight.detach().clone() if start is None else start
        torch.testing.assert_close(plain.weight.detach(), start - 10.0 * number, rtol=0, atol=1e-3)


def test_only_the_latest_are_kept_and_the_rest_of_a_run_goes_on(meshes, tmp_path):
    state, steps = training(tw.function(gpt(), mesh=meshes[0]))
    for number in range(4):
        steps(1)
        tw.checkpoint.save(tmp_path, state, step=number, keep=2)
    steps(1)
    tw.checkpoint.save(tmp_path, state, step=9, keep=2).result()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000003", "step_00000009"]


def test_a_disk_that_is_full(meshes, tmp_path):
    """The executor's writer may write no more than a little; the last checkpoint stays, and training goes on."""
    state, steps = training(tw.function(gpt(), mesh=meshes[0]))
    steps(1)
    tw.checkpoint.save(tmp_path, state, step=1).result()
    pid = writer_of(meshes[0]).pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        saving = tw.checkpoint.save(tmp_path, state, step=2, keep=1)
        steps(1)
        with pytest.raises(CheckpointError, match=r"could not be saved: .*File too large.*\n.*reported by executor"):
            saving.result()
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    steps(1)
    tw.checkpoint.save(tmp_path, state, step=3, keep=1).result()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_the_writing_process_has_low_priority_and_may_be_lost(meshes, tmp_path):
    state, steps = training(tw.function(gpt(), mesh=meshes[0]))
    steps(1)
    tw.checkpoint.save(tmp_path, state, step=1).result()
    writer = writer_of(meshes[0])
    assert writer.nice() > 0
    writer.send_signal(signal.SIGSTOP)  # in the middle of its work
    saving = tw.checkpoint.save(tmp_path, state, step=2)
    steps(3)  # which does not wait for it
    assert not saving.done()
    writer.kill()
    with pytest.raises(CheckpointError, match=r"the process that writes checkpoints has ended \(exit code -9\)"):
        saving.result()
    steps(1)
    assert tw.checkpoint.save(tmp_path, state, step=3, keep=1).result().name == "step_00000003"
    assert writer_of(meshes[0]).pid != writer.pid


def test_a_value_that_is_gone_is_not_saved(meshes, tmp_path):
    values = {"values": tw.distribute_tensor(torch.ones(4), meshes[0], None)}
    tw.checkpoint.save(tmp_path, values, step=1).result()
    buffer, count = values["values"]._buffer, status_of(meshes[0]).num_buffers
    buffer.session.values.release(meshes[0].slice_id, buffer.buffer_id)
    deadline = time.monotonic() + 30
    while status_of(meshes[0]).num_buffers >= count and time.monotonic() < deadline:
        time.sleep(0.01)
    saving = tw.checkpoint.save(tmp_path, values, step=2)
    with pytest.raises(
        CheckpointError, match=r"(?s)could not be saved: .*was released.*the last complete one is step_0+1\."
    ):
        saving.result()
    assert tw.checkpoint.latest(tmp_path).name == "step_00000001"


def test_a_mesh_that_is_closed(cluster, meshes, tmp_path):
    """The call raises at once, and is in nobody's way."""
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
    values = {"values": tw.distribute_tensor(torch.ones(4), mesh, None)}
    values["values"].tolist()
    mesh.close()
    with pytest.raises(PlacementError, match="is closed"):
        tw.checkpoint.save(tmp_path, values, step=1)
    assert list(tmp_path.iterdir()) == []
    others = {"values": tw.distribute_tensor(torch.ones(4), meshes[0], None)}
    assert tw.checkpoint.save(tmp_path, others, step=2).result().name == "step_00000002"


def test_a_folder_of_several_safetensors(meshes, tmp_path):
    """As `save_pretrained` writes it; tied weights are there once."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tokens = torch.randint(0, 64, (2, 6))
    expected = plain(tokens).logits
    for place in ("fully sharded", "pipeline"):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM(config).eval()
        if place == "pipeline":
            split = {"model.layers.1": tw.SplitPoint.BEGINNING}
            ours = tw.pipeline(copy.deepcopy(model), split_spec=split, meshes=list(meshes))
        else:
            ours = tw.parallelize_module(copy.deepcopy(model), meshes[0], tw.fully_shard)
        tw.checkpoint.load(tmp_path, ours)

        @tw.program
        @torch.no_grad()
        def logits(x, ours=ours):
            return ours(x).logits

        torch.testing.assert_close(logits(tokens).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_state_that_is_no_array_yet(cluster, meshes, tmp_path):
    """A module that no slice has: its arrays go wherever they are used first."""
    values = tw.distribute_tensor(torch.arange(8.0), meshes[0], None)
    saving = tw.checkpoint.save(tmp_path / "one", {"values": values, "nested": {"view": values[2:4]}})
    saving.result()
    target = tw.distribute_tensor(torch.zeros(8), meshes[1], None)
    found = tw.checkpoint.load(tmp_path / "one", {"values": target, "nested": {"view": torch.zeros(2)}})
    assert target.tolist() == list(range(8))
    assert found["nested"]["view"].tolist() == [2, 3]
    assert target.mesh is meshes[1]


def test_what_is_under_way_is_complete_when_the_session_ends(tmp_path):
    code = f"""
import torch, torchways as tw
tw.init(islands=1, devices_per_island=1)
mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
tw.checkpoint.save({str(tmp_path)!r}, {{"x": tw.distribute_tensor(torch.ones(3_000_000), mesh, None)}}, step=1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert tw.checkpoint.load(tmp_path, {"x": torch.zeros(3_000_000)})["x"].all()

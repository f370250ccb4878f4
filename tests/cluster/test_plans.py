"""Sharded training on real executors: every plan agrees with eager PyTorch, and state is where the plan says."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F

import torchways as tw
from recipes.models.gpt import GPT, GPTConfig
from tests.cluster.conftest import status_of
from tests.cluster.test_hugging_face import MAIN, build, check_training

STEPS = 5
VOCAB = 64


@pytest.fixture(scope="module")
def cluster():
    with tw.init(islands=1, devices_per_island=4):
        yield


def _plans(model, mesh, name):
    match name:
        case "data":
            return None
        case "full":
            return tw.fully_shard(model, mesh)
        case "tensor":
            return tw.tensor_parallel(model, mesh)
        case "full x tensor":
            return tw.fully_shard(model, mesh, plan=tw.tensor_parallel(model, mesh))


def _train(model, step_of):
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = step_of(model, opt)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(0, VOCAB, (8, 17), generator=generator)
        losses.append(step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return [loss.item() for loss in losses], opt


def training_step(model, opt):
    def step(x, y):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    return step


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((2, 2), "full x tensor"),
        ((1, 4), "tensor"),
        # Both are trained in test_splitting_a_model_saves_the_memory_of_its_state.
        pytest.param((4, 1), "data", marks=pytest.mark.slow),
        pytest.param((4, 1), "full", marks=pytest.mark.slow),
    ],
)
def test_a_plan_agrees_with_eager(cluster, shape, name):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCAB, seq_len=16, d_model=32, n_layers=2, n_heads=4))
    eager = copy.deepcopy(model)
    expected, _ = _train(eager, training_step)
    mesh = tw.init_device_mesh(shape, mesh_dim_names=("dp", "tp"))
    plan = _plans(model, mesh, name)
    tw.parallelize_module(model, mesh, plan)
    losses, opt = _train(model, lambda model, opt: tw.program(training_step(model, opt)))
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    state = model.state_dict()
    for parameter_name, value in eager.state_dict().items():
        torch.testing.assert_close(state[parameter_name], value, rtol=0, atol=1e-5)
    for parameter_name, parameter in model.named_parameters():
        wanted = (plan or {}).get(parameter_name, {})
        placements = tuple(f"S({wanted[axis].dim})" if axis in wanted else "R" for axis in ("dp", "tp"))
        assert parameter.sharding == placements
        assert opt.state[parameter]["exp_avg"].sharding == placements
    assert all(not status.fallback_counters for status in tw.executor_status())
    mesh.close()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "LlamaForCausalLM")) for name in MAIN],
)
@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ((2, 2), "full x tensor"),
        pytest.param((4, 1), "data", marks=pytest.mark.slow),
        pytest.param((4, 1), "full", marks=pytest.mark.slow),
        pytest.param((1, 4), "tensor", marks=pytest.mark.slow),
    ],
)
def test_models_of_transformers_agree_with_eager(cluster, shape, plan, name):
    mesh = tw.init_device_mesh(shape, mesh_dim_names=("dp", "tp"))
    config, data = MAIN[name]

    def place(model):
        return tw.parallelize_module(model, mesh, _plans(model, mesh, plan))

    check_training(build(name, config), place, data, num_steps=4)
    mesh.close()


def test_splitting_a_model_saves_the_memory_of_its_state(cluster):
    """Parameters, both moments: of each device a quarter, but for what cannot be split."""
    held = {}
    gc.collect()  # models of earlier tests, on the same devices
    for name in ("data", "full"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=VOCAB, seq_len=16, d_model=32, n_layers=2, n_heads=4))
        mesh = tw.init_device_mesh((4, 1), mesh_dim_names=("dp", "tp"))
        tw.parallelize_module(model, mesh, _plans(model, mesh, name))
        _train(model, lambda model, opt: tw.program(training_step(model, opt)))
        [held[name]] = status_of(mesh).client_bytes.values()
        mesh.close()
    assert held["full"] < 0.35 * held["data"]

"""What captured programs compute, against plain PyTorch; no processes (tests/local_session.py runs the parts)."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from tests.unit.capture.models import Model, make_step, pipelined
from torchways.controller.function import make_function, make_parallel
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError, DataDependentError, UserError
from torchways.parallel.pipeline import SplitPoint

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, eps=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4, weight_decay=0.1),
}


@pytest.mark.parametrize(
    ("optimizer", "tied"),
    [
        *((name, False) for name in OPTIMIZERS),
        *(pytest.param(name, True, marks=[pytest.mark.slow] * (name != "adamw")) for name in OPTIMIZERS),
    ],
)
def test_training_agrees_with_eager_with_a_schedule_and_without_tracing_again(optimizer, tied):
    torch.manual_seed(0)
    eager = Model(tied)
    session = LocalSession()
    ours = pipelined(
        session,
        copy.deepcopy(eager),
        {"layers.1": SplitPoint.BEGINNING, "layers.2": SplitPoint.BEGINNING},
        [session.mesh(), session.mesh(), session.mesh()],
    )
    results = {}
    for name, model in (("eager", eager), ("ours", ours)):
        generator = torch.Generator().manual_seed(1)
        opt = OPTIMIZERS[optimizer](model.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 / (1 + step))
        step = make_step(model, opt, clip=True)
        if name == "ours":
            step = ProgramFunction(step, None, lambda: session)
        losses = []
        for _ in range(4):
            x = torch.randint(0, 17, (4, 5), generator=generator)
            loss, norm = step(x, x.roll(1, 1))
            losses.append((loss.item(), norm.item()))
            schedule.step()
        results[name] = losses
    torch.testing.assert_close(torch.tensor(results["ours"]), torch.tensor(results["eager"]), rtol=1e-4, atol=1e-6)
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    # Momentum's first step makes state that is not a constant, so its trace is for that step only.
    assert step.num_traces == 1
    assert session.num_transfers > 0


def test_nothing_leaks_and_old_state_is_donated():
    session = LocalSession()
    model = pipelined(session, Model(), {"layers.1": SplitPoint.BEGINNING}, [session.mesh(), session.mesh()])
    opt = torch.optim.AdamW(model.parameters())
    step = ProgramFunction(make_step(model, opt, clip=False), None, lambda: session)
    counts = []
    for _ in range(4):
        x = torch.randint(0, 17, (4, 5))
        step(x, x)
        counts.append(sum(map(len, session.contents.values())))
    assert counts[1:] == [counts[0]] * 3
    assert counts[0] == 4 * len(list(model.parameters()))
    assert "donate" in str(step)


def test_gradients_kept_between_calls_accumulate():
    session = LocalSession()
    torch.manual_seed(0)
    eager = nn.Linear(3, 2)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)

    def accumulate(model, x):
        loss = model(x).square().sum()
        loss.backward()
        return loss

    program = ProgramFunction(lambda x: accumulate(ours, x), None, lambda: session)
    x = torch.randn(4, 3)
    for _ in range(3):
        accumulate(eager, x)
        program(x)
    torch.testing.assert_close(ours.weight.grad.cpu(), eager.weight.grad)
    assert program.num_traces == 2  # with and without a gradient to add to


def test_buffers_views_and_inplace_operators():
    session = LocalSession()

    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("cache", torch.zeros(4, 3))
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))

        def forward(self, x, position):
            self.cache[position] = x
            self.count += 1
            return self.cache.sum(0), self.count

    cache = make_function(Cache(), session.mesh(), lambda: session)
    for position in range(3):
        total, count = cache(torch.ones(3) * position, position)
    assert total.tolist() == [3, 3, 3]
    assert count.item() == 3
    assert cache.state_dict()["cache"].tolist() == [[0] * 3, [1] * 3, [2] * 3, [0] * 3]


def test_changed_shapes_dtypes_and_modes_trace_again():
    session = LocalSession()
    model = make_function(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), session.mesh(), lambda: session)
    program = ProgramFunction(lambda x: model(x), None, lambda: session)
    program(torch.ones(2, 4))
    program(torch.ones(2, 4) * 2)
    assert program.num_traces == 1
    program(torch.ones(3, 4))
    assert program.num_traces == 2
    model.eval()
    program(torch.ones(3, 4))
    assert program.num_traces == 3


def branch(x):
    if x.sum() > 0:  # the line that the error must name
        return x
    return -x


def test_data_dependent_branch_runs_node_by_node_and_says_why(caplog):
    session = LocalSession()
    line = branch.__code__.co_firstlineno + 1
    program = ProgramFunction(branch, session.mesh(), lambda: session)
    ones = make_function(torch.ones_like, session.mesh(), lambda: session)(torch.ones(2))
    assert program(ones).tolist() == [1.0, 1.0]
    [record] = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"test_programs.py:{line} in branch" in record.message
    assert "runs node by node" in record.message
    assert program(-ones).tolist() == [1.0, 1.0]
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def test_shapes_that_depend_on_values_run_node_by_node():
    session = LocalSession()
    double = make_function(lambda x: x * 2, session.mesh(), lambda: session)

    @lambda function: ProgramFunction(function, None, lambda: session)
    def positive(x):
        y = double(x)
        return double(y[y > 0])

    assert positive(torch.tensor([1.0, -2.0, 3.0])).tolist() == [4.0, 12.0]
    assert positive(torch.tensor([-1.0, -2.0, 5.0])).tolist() == [20.0]
    assert session.num_runs == 4


def test_gradients_need_a_graph():
    session = LocalSession()
    line = make_function(nn.Linear(2, 1), session.mesh(), lambda: session)

    def step(x):
        loss = line(x).sum()
        if loss > 0:
            loss.backward()
        return loss

    for _ in range(2):
        with pytest.raises(DataDependentError, match=r"test_programs\.py:\d+ in step"):
            ProgramFunction(step, None, lambda: session)(torch.full((1, 2), 100.0) * line.weight.cpu().sign())


def test_operator_without_lowering_is_refused_with_its_line():
    session = LocalSession(lowered_ops={"aten::add.Tensor"})

    def program(x):
        return torch.linalg.matrix_exp(x) + 1

    with pytest.raises(CaptureError, match=r"no lowering[\s\S]*linalg_matrix_exp at test_programs\.py:\d+ in program"):
        ProgramFunction(program, session.mesh(), lambda: session)(torch.eye(3))


def test_a_module_without_state_has_nothing_to_build_on_a_slice():
    session = LocalSession()
    with pytest.raises(UserError, match=r"GELU has neither parameters nor buffers .* give the module itself"):
        make_parallel(nn.GELU, session.mesh(), {}, lambda: session)
    gelu = make_parallel(nn.GELU(), session.mesh(), {}, lambda: session)
    torch.testing.assert_close(gelu(torch.ones(2)).cpu(), F.gelu(torch.ones(2)))


def test_scheduler_inside_the_program_steps_as_in_eager():
    def run(place, wrap):
        torch.manual_seed(0)
        model = place(nn.Linear(2, 2))
        opt = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, gamma=0.5)

        def step(x):
            model(x).sum().backward()
            opt.step()
            opt.zero_grad()
            schedule.step()

        step = wrap(step)
        rates = []
        for _ in range(5):
            step(torch.ones(1, 2))
            rates.append((opt.param_groups[0]["lr"], schedule.last_epoch))
        return rates, model.weight.detach().cpu()

    session = LocalSession()
    ours = run(
        lambda model: make_function(model, session.mesh(), lambda: session),
        lambda function: ProgramFunction(function, None, lambda: session),
    )
    expected = run(lambda model: model, lambda function: function)
    assert ours[0] == expected[0]
    torch.testing.assert_close(ours[1], expected[1])


def test_optimizer_built_before_placing_is_refused():
    session = LocalSession()
    model = nn.Linear(2, 2)
    stray = nn.Linear(2, 2)
    model = make_function(model, session.mesh(), lambda: session)
    program = ProgramFunction(lambda x: stray(model(x)), None, lambda: session)
    with pytest.raises(CaptureError, match=r"on no slice is used at test_programs\.py"):
        program(torch.ones(1, 2))


def test_failed_trace_leaves_python_state_as_it_was():
    session = LocalSession()
    model = make_function(nn.Linear(2, 2), session.mesh(), lambda: session)
    opt = torch.optim.AdamW(model.parameters())

    def step(x):
        model(x).sum().backward()
        opt.step()
        raise RuntimeError("after the step")

    with pytest.raises(RuntimeError, match="after the step"):  # the user's own exception, as it is
        ProgramFunction(step, None, lambda: session)(torch.ones(1, 2))
    assert not opt.state
    assert model.weight.grad is None
    assert opt.param_groups[0]["lr"] == 1e-3
    assert opt.param_groups[0]["capturable"] is False


def test_argument_changed_in_place_is_refused():
    session = LocalSession()

    def clear(x):
        x.zero_()

    with pytest.raises(CaptureError, match="changes argument 0"):
        ProgramFunction(clear, session.mesh(), lambda: session)(torch.ones(3))


def test_state_can_be_loaded_and_is_used_next():
    session = LocalSession()
    model = make_function(nn.Linear(2, 2, bias=False), session.mesh(), lambda: session)
    x = torch.ones(1, 2)
    model(x)
    model.load_state_dict({"weight": torch.eye(2) * 5})
    assert model(x).tolist() == [[5, 5]]


class Renamed(nn.Module):
    """Loads what older versions of it saved, and what a wrapper saved; counts how often."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.num_loads = nn.Linear(2, 2), nn.BatchNorm1d(2), 0
        self._register_load_state_dict_pre_hook(self.rename)
        self.register_load_state_dict_post_hook(self.count)

    @staticmethod
    def rename(state, prefix, *rest):
        for key in [key for key in state if key.startswith(f"{prefix}old.")]:
            state[key.replace("old.", "layer.")] = state.pop(key)

    @staticmethod
    def count(module, keys):
        module.num_loads += 1

    def forward(self, x):
        return self.norm(self.layer(x))

    def load_state_dict(self, state):
        return super().load_state_dict({key.removeprefix("module."): value for key, value in state.items()})


def test_hooks_and_overrides_of_load_state_dict_are_called():
    session = LocalSession()
    model = make_function(Renamed(), session.mesh(), lambda: session)
    x = torch.randn(4, 2)
    model(x)  # the values are on the slice
    saved = Renamed()
    state = {key.replace("layer.", "module.old."): value for key, value in saved.state_dict().items()}
    keys = model.load_state_dict(state)
    assert (keys.missing_keys, keys.unexpected_keys, model.num_loads) == ([], [], 1)
    torch.testing.assert_close(model(x).cpu(), saved(x))
    assert model.state_dict()._metadata == saved.state_dict()._metadata

    wrong = {**state, "norm.bias": torch.zeros(3), "surplus": torch.zeros(1)}
    with pytest.raises(
        RuntimeError, match=r'Unexpected key\(s\) in state_dict: "surplus".*\n.*size mismatch for norm.bias'
    ):
        model.load_state_dict(wrong)


def test_state_is_loaded_from_arrays_and_the_old_values_are_not_read(monkeypatch):
    session = LocalSession()
    first, second = (make_function(nn.Linear(2, 2), session.mesh(), lambda: session) for _ in range(2))
    for model in (first, second):
        model(torch.ones(1, 2))
    reads = []
    start_fetch = session.start_fetch
    monkeypatch.setattr(session, "start_fetch", lambda buffer: reads.append(buffer) or start_fetch(buffer))
    state = dict(first.named_parameters())
    theirs, ours = ({parameter._buffer for parameter in model.parameters()} for model in (first, second))
    second.load_state_dict(state)
    assert theirs >= set(reads)
    assert not ours & set(reads)
    assert torch.equal(second.weight.cpu(), first.weight.cpu())
    first.weight.data.zero_()
    assert second.weight.any()
    with pytest.raises(UserError, match="load_state_dict of Linear with assign=True would put other tensors"):
        second.load_state_dict(state, assign=True)

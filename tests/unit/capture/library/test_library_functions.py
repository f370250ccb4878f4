"""Functions of PyTorch's library that decide by values or have operators without lowering: against eager PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError


@pytest.fixture
def session():
    return LocalSession()


def train(model, wrap, loss_of, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(*args):
        loss = loss_of(model, *args)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    step = wrap(step)
    losses = [step(*batch).detach().cpu() for batch in batches]
    return losses, [value.cpu() for value in model.state_dict().values()], getattr(step, "num_traces", 1)


def check(session, eager, loss_of, *batches):
    """Trains `eager` and a copy of it on a slice, and compares losses and state."""
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    *found, num_traces = train(ours, lambda f: ProgramFunction(f, None, lambda: session), loss_of, batches)
    *expected, _ = train(eager, lambda f: f, loss_of, batches)
    torch.testing.assert_close(found, expected)
    assert num_traces == 1


@pytest.mark.parametrize(
    ("mode", "padding", "align"),
    [("bilinear", "zeros", False), ("bilinear", "reflection", True), ("nearest", "border", False)],
)
def test_grid_sample_has_gradients_of_image_and_grid(session, mode, padding, align):
    def loss_of(model, image, grid):
        sampled = F.grid_sample(image * model.weight.sum(), model(grid).tanh() * 1.3, mode, padding, align)
        return sampled.square().mean()

    torch.manual_seed(0)
    check(session, nn.Linear(2, 2), loss_of, *[(torch.randn(1, 2, 4, 4), torch.randn(1, 3, 3, 2))] * 2)


BAGS = {
    "sum": {"mode": "sum"},
    "mean": {"mode": "mean", "padding_idx": 4},
    "max": {"mode": "max"},
    "short rows": {"mode": "sum", "max_norm": 0.5},
}


@pytest.mark.parametrize("kind", BAGS)
def test_bags_of_embeddings(session, kind):
    def loss_of(model, rows, flat, offsets, weights):
        weighted = model(flat, offsets, per_sample_weights=weights) if kind == "sum" else model(flat, offsets)
        return (model(rows).sum(0) + weighted.sum(0)).square().mean()

    rows, offsets = torch.tensor([[1, 2, 3], [4, 4, 0]]), torch.tensor([0, 2, 2])
    batch = (rows, rows.reshape(-1), offsets, torch.arange(6.0))
    check(session, nn.EmbeddingBag(6, 3, **BAGS[kind]), loss_of, batch, batch)


MASKED = {
    "cross entropy of each row": lambda o, y: F.cross_entropy(o, y, reduction="none").mean(),
    "cross entropy": lambda o, y: F.cross_entropy(o, y),
    "weighted": lambda o, y: (F.cross_entropy(o, y, reduction="none") * o.detach().sigmoid()[:, 0]).sum(),
    "squared errors": lambda o, y: F.mse_loss(o, F.one_hot(y, 4).float()),
    "mean of a dimension": lambda o, y: (o - y.unsqueeze(1)).mean(0).square().sum(),
}


@pytest.mark.parametrize("loss", MASKED)
def test_losses_of_the_rows_that_a_mask_selects_share_one_graph(session, loss):
    x, y = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 0, 1])
    masks = torch.tensor([[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]]).bool()
    check(
        session,
        nn.Linear(5, 4),
        lambda model, x, y, mask: MASKED[loss](model(x)[mask], y[mask]),
        *[(x, y, mask) for mask in masks],
    )


def test_rows_that_a_constant_mask_selects_are_as_many_as_in_eager(session):
    mask = torch.tensor([True, False, True])

    def run(x):
        x = x.clone()
        x[~mask] = x[mask].sum(0)
        return F.cross_entropy(x[mask], torch.arange(3)[mask], reduction="none"), x[mask], x

    x = torch.randn(3, 4)
    found = make_function(run, session.mesh(), lambda: session)(x)
    torch.testing.assert_close([value.cpu() for value in found], list(run(x)))


def test_a_mean_of_no_rows_is_nan_as_in_eager(session):
    mean = make_function(lambda x: x[x > 0].mean(), session.mesh(), lambda: session)
    assert mean(-torch.ones(3)).isnan().item()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("concatenated", [False, True], ids=["padded", "concatenated"])
def test_ctc_loss(session, reduction, concatenated):
    def loss_of(model, x, targets, input_lengths, target_lengths):
        log_probs = model(x).log_softmax(-1)
        loss = F.ctc_loss(log_probs, targets, input_lengths, target_lengths, reduction=reduction, zero_infinity=True)
        return loss.sum()

    targets = torch.tensor([1, 2, 2, 3, 1]) if concatenated else torch.tensor([[1, 2, 2], [3, 1, 0]])
    lengths = torch.tensor([3, 2])
    batches = [(torch.randn(4, 2, 5), targets, torch.tensor(given), lengths) for given in ([4, 3], [4, 1])]
    check(session, nn.Linear(5, 4), loss_of, *batches)


def test_ctc_loss_of_what_cannot_be_is_infinite(session):
    log_probs, targets = torch.randn(3, 4).log_softmax(-1), torch.tensor([1, 1, 2])
    loss = make_function(lambda p, t: F.ctc_loss(p, t, (3,), (3,)), session.mesh(), lambda: session)
    assert F.ctc_loss(log_probs, targets, (3,), (3,)).isinf()
    assert loss(log_probs, targets).isinf().item()


def test_the_graph_of_ctc_loss_does_not_grow_with_its_steps():
    def gradient(x):
        x = x.detach().requires_grad_()
        loss = F.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2, 2, 1]]), (len(x),), (4,))
        return torch.autograd.grad(loss, x)[0]

    sizes = []
    for num_steps in (8, 200):
        x, own = torch.randn(num_steps, 1, 3, dtype=torch.float64), LocalSession()
        captured = ProgramFunction(gradient, own.mesh(), lambda own=own: own)
        torch.testing.assert_close(captured(x).cpu(), gradient(x))
        [(_, _, [[graph]])] = own.registered.values()
        sizes.append(len(graph.nodes))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_a_grid_has_a_gradient_in_every_mode(session, mode):
    def gradients(x, grid):
        x, grid = x.detach().requires_grad_(), grid.detach().requires_grad_()
        weights = torch.arange(8.0).reshape(1, 1, 2, 4)
        sampled = F.grid_sample(x, grid, mode=mode, align_corners=False)
        direct = torch.grid_sampler_2d(x, grid, 1 if mode == "nearest" else 0, 0, False)
        return torch.autograd.grad(((sampled + direct.square()) * weights).sum(), [x, grid])

    given = torch.randn(1, 1, 3, 3), torch.rand(1, 2, 4, 2) * 2 - 1
    found = ProgramFunction(gradients, session.mesh(), lambda: session)(*given)
    torch.testing.assert_close([value.cpu() for value in found], list(gradients(*given)))


def test_views_of_one_element_and_selections_of_none_have_gradients(session):
    def gradients(x, mask):
        x = x.detach().requires_grad_()
        strided = torch.as_strided(x, (1,), (1,), 0), torch.as_strided(x, (), (), 2)
        written = torch.as_strided_scatter(x, strided[1] * 3, (), (), 1)
        none = torch.combinations(x[:1], r=4)
        scattered = torch.masked_scatter(x, mask, x[:0])
        total = strided[0].sum() * 2 + strided[1] * 5 + (written * torch.arange(3)).sum() + none.sum()
        return torch.autograd.grad(total + scattered.square().sum(), x)[0]

    given = torch.randn(3), torch.zeros(3, dtype=torch.bool)
    found = ProgramFunction(gradients, session.mesh(), lambda: session)(*given)
    torch.testing.assert_close(found.cpu(), gradients(*given))


def test_running_statistics_without_momentum_are_means_of_all_batches(session):
    batches = [(torch.randn(6, 5) * scale,) for scale in (1.0, 2.0, 3.0)]
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=None))
    check(session, model, lambda model, x: model(x).square().mean() + model[0](x).mean(), *batches)
    forward = nn.BatchNorm1d.forward
    assert "library_modes" not in forward.__code__.co_filename


def test_what_is_refused_is_named_with_a_remedy(session):
    x = torch.randn(2, 5)

    def step_of(model, loss_of, then=lambda model: None):
        ours = make_function(model, session.mesh(), lambda: session)

        def step(*args):
            loss_of(ours, *args).backward()
            then(ours)

        return ProgramFunction(step, None, lambda: session)

    clip = step_of(
        nn.Linear(5, 4),
        lambda model, x: model(x).sum(),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True),
    )
    with pytest.raises(CaptureError, match=r"error_if_nonfinite=True.*test_library_functions.*return the norm"):
        clip(x)
    sparse = step_of(nn.Embedding(5, 4, sparse=True), lambda model, x: model(x).sum())
    with pytest.raises(CaptureError, match=r"sparse=True at test_library_functions.*leave sparse=True out"):
        sparse(torch.tensor([1, 2]))
    plain = step_of(nn.Linear(5, 4), lambda model, x: model(x).sum())
    with (
        pytest.warns(UserWarning, match="Anomaly Detection"),
        torch.autograd.detect_anomaly(),
        pytest.raises(CaptureError, match=r"detect_anomaly looks for NaN.*check_nan=False"),
    ):
        plain(x)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly(check_nan=False):
        plain(x)


@pytest.mark.parametrize("options", [(3, 2, 1, 1), (2, 2, 0, 1), (2, 3, 1, 2), ((3, 2), None, 0, 1)])
def test_pools_with_ceil_mode(session, options):
    x = torch.randn(1, 2, 7, 8)
    pool = make_function(lambda x: F.max_pool2d(x, *options, ceil_mode=True), session.mesh(), lambda: session)
    torch.testing.assert_close(pool(x).cpu(), F.max_pool2d(x, *options, ceil_mode=True))

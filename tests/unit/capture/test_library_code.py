"""What libraries of models do that a small model of one's own does not; no processes."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.local_session import LocalSession
from torchways.array import Array
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import CaptureError, DataDependentError


class Layer:
    """A layer of a cache, as a library writes it: a plain object that is empty at first."""

    def __init__(self):
        self.keys = None
        self.length = 0

    def update(self, keys):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], dim=1)
        self.length += keys.shape[1]
        return self.keys


class Cache:
    def __init__(self):
        self.layers = []

    def update(self, index, keys):
        while len(self.layers) <= index:
            self.layers.append(Layer())
        return self.layers[index].update(keys)


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    logits: torch.Tensor
    cache: Cache | None = None
    note: str = "plain"


class Bag(dict):
    """A kind of dict that pytrees do not know."""


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, cache=None):
        cache = Cache() if cache is None else cache
        for index, layer in enumerate(self.layers):
            x = x + cache.update(index, layer(x)).mean(1, keepdim=True)
        return Output(x, cache, note="decoded")


def test_objects_come_back_as_they_are_and_are_updated_as_in_eager():
    torch.manual_seed(0)
    session = LocalSession()
    eager = Decoder()
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    expected_cache, cache = Cache(), Cache()
    for number in range(4):
        x = torch.randn(2, 3 if number == 0 else 1, 4)
        expected = eager(x, expected_cache)
        result = ours(x, cache)
        assert type(result) is Output
        assert result.note == "decoded"
        assert result.cache is cache
        torch.testing.assert_close(result.logits.cpu(), expected.logits)
        for layer, other in zip(cache.layers, expected_cache.layers, strict=True):
            assert type(layer) is Layer
            assert isinstance(layer.keys, Array)
            assert layer.length == other.length
            torch.testing.assert_close(layer.keys.cpu(), other.keys)
    fresh = ours(torch.randn(2, 3, 4))
    assert fresh.cache is not cache
    assert fresh.cache.layers[1].keys.shape == (2, 3, 4)


def test_an_empty_object_is_known_by_its_class_after_the_first_call():
    session = LocalSession()
    ours = make_function(Decoder(), session.mesh(), lambda: session)
    for _ in range(5):
        ours(torch.randn(2, 3, 4), Cache())
    assert ours._torchways_entry.num_traces <= 2


def test_kinds_of_dicts_are_results():
    session = LocalSession()
    double = make_function(lambda x: Bag(a=x * 2, b=[1, "two"]), session.mesh(), lambda: session)
    result = double(torch.ones(2))
    assert type(result) is Bag
    assert result["a"].tolist() == [2, 2]
    assert result["b"] == [1, "two"]


class Drops(nn.Module):
    """Layer drop that is off, as several libraries write it."""

    def __init__(self, probability):
        super().__init__()
        self.probability = probability
        self.layer = nn.Linear(2, 2)
        self.stray = torch.tensor([0.0, 3.0])  # no buffer

    def forward(self, x):
        for _ in range(2):
            if self.training and torch.rand([]) < self.probability:
                continue
            x = self.layer(x)
        steps = torch.arange(4)
        steps[1] = 7
        if steps.max() > self.stray.max():
            x = x * int(steps.max())
        return x.repeat_interleave(steps.nonzero().shape[0], dim=0)


def test_values_that_depend_on_nothing_can_be_asked():
    session = LocalSession()
    eager = Drops(0.0)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)
    x = torch.randn(2, 2)
    torch.testing.assert_close(ours(x).cpu(), eager(x))


def test_a_random_branch_is_refused_with_its_line():
    session = LocalSession()
    ours = make_function(Drops(0.5), session.mesh(), lambda: session)
    line = Drops.forward.__code__.co_firstlineno + 2
    for _ in range(2):
        with pytest.raises(DataDependentError, match=rf"test_library_code\.py:{line} in forward"):
            ours(torch.randn(2, 2))


def test_a_value_that_depends_on_an_array_through_a_view_cannot_be_asked():
    session = LocalSession()
    make = make_function(lambda x: x * 2, session.mesh(), lambda: session)

    def function(x):
        y = torch.zeros(2)
        y[0] = x.sum()
        return x if y.sum() > 0 else -x

    with pytest.raises(DataDependentError, match=r"a computed tensor bool\[\].*test_library_code"):
        make_function(function, session.mesh(), lambda: session)(make(torch.ones(2)))


class Block(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.reentrant = reentrant

    def inner(self, x, p):
        return x + self.second(F.dropout(F.gelu(self.first(x)), p))

    def forward(self, x, p):
        if self.reentrant is None:
            return self.inner(x, p)
        return checkpoint(self.inner, x, p, use_reentrant=self.reentrant)


def make_sgd_step(model, loss_of):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x):
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def make_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)

    def step(x, p):
        x = x * model[0].second.bias.exp()  # a reentrant checkpoint wants an input with a gradient
        for block in model:
            x = block(x, p)
        loss = x.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_survives(reentrant):
    torch.manual_seed(0)
    session = LocalSession()
    eager = nn.Sequential(Block(None), Block(None))
    ours = nn.Sequential(Block(reentrant), Block(reentrant))
    ours.load_state_dict(eager.state_dict())
    make_function(ours, session.mesh(), lambda: session)
    expected, step = make_step(eager), ProgramFunction(make_step(ours), session.mesh(), lambda: session)
    for _ in range(3):
        x = torch.randn(4, 8)
        torch.testing.assert_close(step(x, 0.0).cpu(), expected(x, 0.0).detach(), rtol=1e-5, atol=1e-6)
    products = session.num_operators("mm") + session.num_operators("addmm")
    assert products > 2 * 2 * 3  # forward, and for each product two in backward: what is above was computed again
    assert session.num_operators("barrier") >= 2  # each block's input, so that XLA does not merge it with the forward


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_drops_the_same_elements_again(reentrant):
    session = LocalSession()
    model = make_function(nn.Sequential(Block(reentrant)), session.mesh(), lambda: session)

    @lambda function: ProgramFunction(function, session.mesh(), lambda: session)
    def step(x):
        x = x * model[0].first.weight.mean().exp()
        model[0](x, 0.5).sum().backward()
        return 0

    step(torch.randn(4, 8))
    assert session.num_operators("bernoulli") + session.num_operators("rand") == 1


def test_assignments_by_mask():
    session = LocalSession()

    def function(x, mask, vector):
        x = x * 1
        x[mask] = 5.0
        x[mask[:, 0]] = vector
        counts = torch.zeros(3, 2, dtype=torch.int64)
        counts[mask] = 2.9
        return x, counts

    x, mask, vector = torch.randn(3, 2), torch.tensor([[True, False], [False, True], [False, False]]), torch.ones(2)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, mask, vector), function(x, mask, vector), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


class Experts(nn.Module):
    """A mixture of experts, as libraries write it: each expert computes the rows that chose it."""

    def __init__(self, style):
        super().__init__()
        self.style = style
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8)) for _ in range(4))

    def forward(self, x):
        weights, chosen = torch.topk(F.softmax(self.gate(x), 1), 2, -1)
        mask = F.one_hot(chosen, 4).permute(2, 1, 0)
        out = torch.zeros_like(x)
        if self.style == "hit":
            for expert in mask.sum(dim=(-1, -2)).greater(0).nonzero():
                place, rows = torch.where(mask[expert].squeeze(0))
                values = self.experts[expert](x[None, rows].reshape(-1, 8)) * weights[rows, place, None]
                out.index_add_(0, rows, values)
        elif self.style == "sliced":
            for expert in mask.sum(dim=(-1, -2)).greater(0).nonzero()[:]:
                _, rows = torch.where(mask[expert[0]])
                values = self.experts[expert[0]](x[rows])
                pairs = values[..., ::2].repeat_interleave(2, -1) + values
                out.index_add_(0, rows, pairs * (weights * (chosen == expert)).sum(-1)[rows, None])
        elif self.style in ("sizes", "bounds"):
            flat, order = chosen.flatten().sort(stable=True)
            rows, sizes = order.div(2, rounding_mode="trunc"), F.one_hot(flat, 4).sum(0)
            out = out.index_add(0, rows, self.grouped(x[rows], sizes) * weights.flatten()[order, None])
        elif self.style == "all":
            for number in range(4):
                rows, place = torch.where(mask[number].T)
                if rows.numel() > 0:
                    out.index_add_(0, rows, self.experts[number](x[rows]) * weights[rows, place].unsqueeze(-1))
        else:
            for number in range(4):
                chosen_here = (chosen == number).any(-1)
                part = torch.zeros_like(x)
                part[chosen_here] = self.experts[number](x[chosen_here]) * (weights * (chosen == number)).sum(-1)[
                    chosen_here
                ].unsqueeze(-1)
                out = out + part
        return out

    def grouped(self, x, sizes):
        """Rows are sorted by expert; the sizes say how many each has."""
        if self.style == "sizes":
            parts = x.split(sizes.tolist(), dim=0)
            return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=0)
        out, ends = torch.zeros_like(x), F.pad(sizes.cumsum(0), (1, 0))
        for number, expert in enumerate(self.experts):
            start, end = ends[number], ends[number + 1]
            out[start:end] = expert(x[start:end])
        return out


@pytest.mark.parametrize("style", ["hit", "sliced", "all", "assigned", "sizes", "bounds"])
def test_mixtures_of_experts_run_in_one_graph(style):
    torch.manual_seed(0)
    session = LocalSession()
    eager = Experts(style)
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)

    def loss_of(model):
        return lambda x: model(x).square().sum()

    expected = make_sgd_step(eager, loss_of(eager))
    step = ProgramFunction(make_sgd_step(ours, loss_of(ours)), None, lambda: session)
    for _ in range(3):
        x = torch.randn(5, 8)
        torch.testing.assert_close(step(x).cpu(), expected(x).detach())
    assert step.num_traces == 1
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_the_loss_of_selected_rows():
    session = LocalSession()

    def loss(logits, labels):
        selected = labels >= 0
        return F.cross_entropy(logits[selected], labels[selected]) + logits[selected].sum()

    logits, labels = torch.randn(6, 3), torch.tensor([0, -1, 2, -1, 1, 1])
    ours = make_function(loss, session.mesh(), lambda: session)
    torch.testing.assert_close(ours(logits, labels).cpu(), loss(logits, labels))


def ends_early(x):
    for row in (x > 0).nonzero():
        return x[row] * 2


def counts(x):
    return x.sum() / x[x > 0].shape[0]


def writes_in_loop(x):
    out = torch.zeros(3)
    for _ in (x > 0).nonzero():
        out.add_(1)
    return out


def carries_over(x):
    total = x * 0
    for row in (x > 0).nonzero():
        total = total + x[row]
    return total


def counts_to(x):
    return [x] * len(range((x > 0).sum(0, keepdim=True).tolist()[0]))


def takes_other_slice(x):
    out, start = x.clone(), x.argmax()
    out[start:] = x[: start + 1]
    return out


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[x > 0],
        lambda x: x[x > 0].amax(),
        lambda x: x[: x.argmax()],
        counts,
        counts_to,
        takes_other_slice,
        writes_in_loop,
        carries_over,
        ends_early,
    ],
)
def test_what_depends_on_the_number_of_selected_rows_is_refused(function):
    session = LocalSession()
    array = make_function(torch.clone, session.mesh(), lambda: session)(torch.tensor([1.0, -1.0, 2.0]))
    with pytest.raises(DataDependentError, match="how many rows"):
        make_function(function, session.mesh(), lambda: session)(array)


def test_operators_along_the_dimension_of_a_scalar():
    session = LocalSession()

    def function(x):
        return x.cumsum(0), x.softmax(0), x.gather(0, torch.tensor([0])), x.max(0)[0], x.squeeze(0)

    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(torch.tensor(3.0)), function(torch.tensor(3.0)), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_operators_without_lowering_are_taken_apart_or_all_reported():
    everything = {"aten::" + name for name in ("mul.Tensor", "add.Tensor", "exp", "pow.Tensor_Scalar")}
    session = LocalSession(lowered_ops=everything)

    def program(x):
        return torch.linalg.matrix_exp(x) + torch.linalg.eigvalsh(x).sum() + torch.special.i0(x).sum()

    with pytest.raises(CaptureError, match=r"linalg_matrix_exp at [\s\S]*_linalg_eigh at [\s\S]*i0 at"):
        ProgramFunction(program, session.mesh(), lambda: session)(torch.eye(3))


class Images(nn.Module):
    """Operators of image models that torch-xla would run on the host."""

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        total = F.adaptive_avg_pool2d(x, (3, 5)).square().mean()
        for mode, flags in (("bilinear", {"align_corners": True}), ("bicubic", {}), ("nearest-exact", {})):
            total = total + F.interpolate(x, size=(5, 12), mode=mode, **flags).square().mean()
        return total + F.interpolate(x, scale_factor=2.0).square().mean()


def test_image_operators_are_taken_apart():
    torch.manual_seed(0)
    session = LocalSession()
    eager = Images()
    ours = make_function(copy.deepcopy(eager), session.mesh(), lambda: session)

    expected = make_sgd_step(eager, eager)
    step = ProgramFunction(make_sgd_step(ours, ours), None, lambda: session)
    for _ in range(2):
        x = torch.randn(2, 3, 8, 8)
        torch.testing.assert_close(step(x).cpu(), expected(x).detach())
    for name, value in eager.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    graphs = [graph for _, _, parts in session.programs.values() for part in parts for graph in part]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    for target in targets:
        assert not any(name in target for name in ("batch_norm", "_adaptive_avg_pool2d", "_weight_norm"))
        assert not ("upsample" in target and "backward" in target)


def test_operators_that_torch_xla_computes_otherwise_are_taken_apart():
    session = LocalSession()

    def function(x, mask, source):
        y = x.clone()
        y.diagonal(-1).fill_(7.0)
        pools = [
            F.avg_pool2d(x[None], 2, padding=1, ceil_mode=True, count_include_pad=False),
            F.avg_pool2d(x[None], 3, 2, ceil_mode=True, divisor_override=5),
        ]
        scattered = x.masked_scatter(mask, source)
        sums = mask.cumsum(1), torch.addmm(x[0], x[1], x[2], beta=2, alpha=3), x.signbit()
        return x.diagonal(-1), x.diagonal(1, 2, 0), y, *pools, scattered, *sums

    x, mask, source = torch.randn(3, 3, 3), torch.rand(3, 3, 3) > 0.5, torch.randn(40)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, mask, source), function(x, mask, source), strict=True):
        torch.testing.assert_close(result.cpu(), expected)
    for name in ("diagonal", "diagonal_scatter", "avg_pool2d", "masked_scatter", "addmm", "signbit"):
        assert session.num_operators(name) == 0


def test_the_gradient_of_a_masked_scatter():
    session = LocalSession()
    x, mask, source = torch.randn(2, 6), torch.rand(2, 6) > 0.5, torch.randn(3, 5)

    def gradient(x, source):
        source = source.detach().requires_grad_()
        (x.masked_scatter(mask, source) * torch.arange(6)).sum().backward()
        return source.grad

    ours = make_function(gradient, session.mesh(), lambda: session)
    torch.testing.assert_close(ours(x, source).cpu(), gradient(x, source))
    assert session.num_operators("masked_select") == 0


def test_elementwise_operators_and_means_by_index_are_taken_apart():
    session = LocalSession()

    def function(x, y, index):
        y = torch.where(y > 1, torch.nan, y)
        mean = x.scatter_reduce(1, index, y.nan_to_num(), "mean")
        alone = x.scatter_reduce(1, index, y.nan_to_num(), "mean", include_self=False)
        return (
            torch.fmax(x, y), torch.fmin(x, y), torch.hypot(x, x + 1), torch.copysign(x, -torch.zeros(6)), x.exp2(),
            mean, alone, x.aminmax()[0], x.amax(),
        )  # fmt: skip

    x, y, index = torch.randn(4, 6), torch.randn(4, 6), torch.randint(0, 6, (4, 3))
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, y, index), function(x, y, index), strict=True):
        torch.testing.assert_close(result.cpu(), expected, equal_nan=True)
    for name in ("fmax", "hypot", "copysign", "exp2"):
        assert session.num_operators(name) == 0


@pytest.mark.parametrize("reduce", ["sum", "prod", "amax", "amin"])
def test_reductions_by_index_without_what_was_there(reduce):
    session = LocalSession()

    def function(x, y, index):
        numbers = (y * 9).to(torch.int64)
        return (
            x.scatter_reduce(1, index, y, reduce, include_self=False),
            torch.ones_like(numbers).scatter_reduce(1, index, numbers, reduce, include_self=False),
        )

    x, y, index = torch.randn(4, 6), torch.randn(4, 6), torch.randint(0, 6, (4, 3))
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x, y, index), function(x, y, index), strict=True):
        torch.testing.assert_close(result.cpu(), expected)


def test_a_diagonal_is_filled_in_a_view():
    session = LocalSession()

    def function(x):
        x = x.clone()
        for row in range(2):
            x[:, row].fill_diagonal_(row, wrap=False)
        return x

    x = torch.randn(3, 2, 4)
    assert torch.equal(make_function(function, session.mesh(), lambda: session)(x).cpu(), function(x))


def test_strides_are_those_of_eager():
    session = LocalSession()

    def function(x):
        x = x.clone().requires_grad_()
        turned = x.transpose(0, 1)
        windows = turned.as_strided((3, 4, 4), (2, 1, 4))
        written = x.transpose(0, 1).clone()
        written.as_strided((2, 2), (1, 4), 1).mul_(3)
        chunks = (x * 2).view(4, 2, 4).transpose(0, 1).as_strided((2, 3, 2, 4), (4, 8, 8, 1))
        (gradient,) = torch.autograd.grad((windows * windows.cumsum(0)).sum() + chunks.pow(2).cumsum(1).sum(), x)
        return windows, written, chunks, gradient

    x = torch.randn(4, 8)
    results = make_function(function, session.mesh(), lambda: session)(x)
    for result, expected in zip(results, function(x), strict=True):
        torch.testing.assert_close(result.cpu(), expected)
    for size, tensor in (((8, 2), lambda x: x[:, 2:]), ((5, 8), lambda x: x)):
        with pytest.raises(CaptureError, match="as_strided"):
            make_function(lambda x, s=size, t=tensor: t(x).as_strided(s, (8, 1)), session.mesh(), lambda: session)(x)


def test_a_number_of_rows_is_known_where_the_mask_is():
    session = LocalSession()

    def function(tokens, images, x):
        mask = (tokens == 7).unsqueeze(-1).expand_as(x)
        if x[mask].numel() != images.numel():
            raise ValueError(f"{x[mask].numel() // 3} tokens for images")
        return x.masked_scatter(mask, images)

    tokens, images, x = torch.tensor([7, 1, 7, 2]), torch.randn(2, 3), torch.randn(4, 3)
    ours = ProgramFunction(function, session.mesh(), lambda: session)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        torch.testing.assert_close(ours(tokens[order], images, x).cpu(), function(tokens[order], images, x))
    assert ours.num_traces == 1
    with pytest.raises(ValueError, match="1 tokens for images"):
        ours(torch.tensor([7, 1, 1, 2]), images, x)


def test_a_tensor_is_made_of_traced_ones():
    session = LocalSession()

    def function(x):
        pair, square = torch.tensor([x[0], x[1]]), torch.tensor([[x[0], 2], [3, x[2]]], dtype=torch.float64)
        return pair, square, torch.as_tensor([x[2], x[0]])

    x = torch.randn(3)
    ours = make_function(function, session.mesh(), lambda: session)
    for result, expected in zip(ours(x), function(x), strict=True):
        torch.testing.assert_close(result.cpu(), expected)

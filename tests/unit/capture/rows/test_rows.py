"""Rows that masks and computed bounds select, against eager PyTorch; no processes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.local_session import LocalSession
from tests.unit.capture.models import make_sgd_step
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.errors import DataDependentError


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


def counts(x):
    return x.sum() / x[x > 0].shape[0]


def ends_early(x):
    for row in (x > 0).nonzero():
        return x[row] * 2


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

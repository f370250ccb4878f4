"""What a new shape costs: why a function is traced anew, how many traces it keeps, and padding to buckets."""

import dataclasses
import logging
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchways as tw
from tests.local_session import LocalSession
from torchways.controller.buckets import Padding
from torchways.controller.function import make_function
from torchways.controller.program import ProgramFunction
from torchways.controller.variants import VariantCache, VariantOptions
from torchways.errors import ConfigError, ShapeError, UserError


@pytest.fixture
def session():
    return LocalSession()


def placed(function, session, mesh=None, **options):
    return ProgramFunction(function, mesh or session.mesh(), lambda: session, options=VariantOptions(**options))


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor
    weight: float = 1.0


# ---- why


def scale(x, batch=None, factor=2.0, *rest):
    total = x * factor
    for item in rest:
        total = total + item.sum()
    if batch is not None:
        total = total + (batch.inputs if isinstance(batch, Batch) else batch["inputs"]).sum()
    return total


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (
            (torch.ones(4, 2),),
            (torch.ones(8, 2),),
            r"x is fp32\[8,2\] on the host, was fp32\[4,2\] on the host",
        ),
        ((torch.ones(4),), (torch.ones(4, dtype=torch.float64),), r"x is fp64\[4\] on the host, was fp32\[4\]"),
        (
            (torch.ones(4), {"inputs": torch.ones(2)}),
            (torch.ones(4), {"inputs": torch.ones(3)}),
            r"batch\['inputs'\] is fp32\[3\]",
        ),
        ((torch.ones(4), Batch(torch.ones(2))), (torch.ones(4), Batch(torch.ones(3))), r"batch.inputs is fp32\[3\]"),
        (
            (torch.ones(4), Batch(torch.ones(2))),
            (torch.ones(4), Batch(torch.ones(2), 3.0)),
            r"batch.weight is 3.0, was 1.0$",
        ),
        ((torch.ones(4), None, 2.0), (torch.ones(4), None, 3.0), r"factor is 3.0, was 2.0$"),
        (
            (torch.ones(4), None, 2.0, torch.ones(1), torch.ones(2)),
            (torch.ones(4), None, 2.0, torch.ones(1), torch.ones(5)),
            r"rest\[1\] is fp32\[5\]",
        ),
        (
            (torch.ones(4),),
            (torch.ones(4), {"inputs": torch.ones(2)}),
            r"the call has 2 tensors and 0 other values, or another nesting, was 1 tensors and 0 other values",
        ),
    ],
)
def test_the_log_names_the_argument_that_differs(session, caplog, first, second, reason):
    run = placed(scale, session)
    run(*first)
    assert caplog.records == []
    run(*second)
    [record] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "tracing scale anew at test_shapes.py:" in record.message
    assert "in test_the_log_names_the_argument_that_differs, for the 2nd time (1 of at most 32 traces kept)" in (
        record.message
    )
    assert re.search(reason, record.message), record.message


def test_the_log_compares_with_the_nearest_signature(session, caplog):
    run = placed(lambda x, y: x.sum() + y.sum(), session, max_variants=2)
    run(torch.ones(1), torch.ones(1))
    run(torch.ones(2), torch.ones(2))
    caplog.clear()
    run(torch.ones(2), torch.ones(3))
    assert "for the 3rd time (2 of at most 2 traces kept: buckets= pads sizes, max_variants= keeps more)" in caplog.text
    assert "y is fp32[3] on the host, was fp32[2] on the host\n" in caplog.text
    assert "x is" not in caplog.text


def test_the_log_names_the_state_that_changed(session, caplog):
    mesh = session.mesh()
    layer = nn.Linear(4, 4)
    make_function(layer, mesh, lambda: session)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)

    def step(x):
        loss = layer(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    run = placed(step, session, mesh)
    x = torch.ones(2, 4)
    run(x)
    run(x)
    assert caplog.text == ""
    optimizer.param_groups[0]["weight_decay"] = 0.2  # hyperparameters are inputs
    run(x)
    assert caplog.text == ""
    optimizer.param_groups[0]["weight_decay"] = 0.0  # but SGD asks whether there is any
    run(x)
    assert "reads of optimizer.param_groups[0]['weight_decay'] is False, was True" in caplog.text
    caplog.clear()
    layer.eval()  # nothing in it asks
    run(x)
    assert caplog.text == ""
    optimizer.param_groups[0]["maximize"] = True
    run(x)
    assert "optimizer.param_groups[0]['maximize'] is True, was False" in caplog.text
    caplog.clear()
    with torch.no_grad():
        placed_forward = placed(lambda x: layer(x), session, mesh)
        placed_forward(x)
    placed_forward(x)
    assert "gradients enabled: True, was False" in caplog.text


def test_the_log_names_a_gradient_that_is_there_now(session, caplog):
    mesh = session.mesh()
    layer = nn.Linear(4, 4)
    make_function(layer, mesh, lambda: session)

    def accumulate(x):
        loss = layer(x).sum()
        loss.backward()
        return loss

    run = placed(accumulate, session, mesh)
    run(torch.ones(2, 4))
    run(torch.ones(2, 4))
    assert "layer.weight.grad is a tensor of shape [4, 4], was None" in caplog.text


# ---- how many


def test_the_least_recently_used_trace_goes_first(session):
    run = placed(lambda x: x * 2, session, max_variants=2)
    for size in (1, 2, 1, 3, 1):  # 2 goes for 3
        assert torch.equal(run(torch.ones(size)).cpu(), torch.full((size,), 2.0))
        assert run.num_traces <= 2
        assert len(session.registered) <= 2
    first = set(session.registered)
    run(torch.ones(1))
    assert set(session.registered) == first  # 1 was never forgotten
    run(torch.ones(2))
    assert set(session.registered) != first
    assert len(session.registered) == 2


def test_variants_of_one_key_count_as_well(session):
    layer = nn.Dropout(0.0)
    make_function(layer, session.mesh(), lambda: session, VariantOptions(max_variants=2))
    for number in range(6):
        layer.p = number / 10
        layer.train(number % 2 == 0)
        layer(torch.ones(3))
    assert layer._torchways_entry.num_traces <= 2


def test_cache_is_least_recently_used():
    cache = VariantCache(3)
    for key, variant in (("a", "a1"), ("a", "a2"), ("b", "b1")):
        cache.add(key, variant)
    assert cache.find("a", lambda variant: variant == "a1") == "a1"
    cache.add("c", "c1")  # a2 is the one used least recently
    assert cache.of_key("a") == ["a1"]
    assert cache.keys() == ["c", "a", "b"]
    cache.add("d", "d1")
    assert cache.keys() == ["d", "c", "a"]
    assert len(cache) == 3
    assert cache.find("b", lambda variant: True) is None
    with pytest.raises(ConfigError, match="max_variants=0: a function keeps one trace at least"):
        VariantCache(0)


# ---- buckets


def masked_mean(x, mask):
    return (x * mask.unsqueeze(-1)).sum((1, 2)) / mask.sum(1)


def test_lengths_cost_as_many_traces_as_buckets(session, caplog):
    sizes = {1: [8, 16, 32]}
    run = placed(masked_mean, session, padding=Padding({"x": sizes, "mask": sizes}))
    torch.manual_seed(0)
    for length in range(1, 33):
        x, mask = torch.randn(2, length, 3), torch.ones(2, length)
        mask[1, length // 2 + 1 :] = 0
        torch.testing.assert_close(run(x, mask=mask).cpu(), masked_mean(x, mask))
    assert run.num_traces == 3
    assert len(caplog.records) == 2


def test_labels_are_padded_with_what_the_loss_ignores(session):
    def loss(batch, weight):
        return F.cross_entropy(weight[batch["inputs"]].flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    buckets = {"batch": {-1: [4, 8]}}
    padding = Padding({"batch['inputs']": {1: [4, 8]}, "batch['labels']": {1: [4, 8]}}, {"batch['labels']": -100})
    run = placed(loss, session, padding=padding)
    weight = torch.randn(5, 5)
    for length in (3, 5, 8):
        batch = {"inputs": torch.randint(5, (2, length)), "labels": torch.randint(5, (2, length))}
        torch.testing.assert_close(run(batch, weight).cpu(), loss(batch, weight))
    assert run.num_traces == 2
    both = placed(lambda batch: batch["a"].sum() + batch["b"].sum(), session, padding=Padding(buckets))
    for length in (1, 2, 3, 4):
        both({"a": torch.ones(length), "b": torch.ones(2, length)})
    assert both.num_traces == 1


def test_outputs_keep_the_padded_size(session):
    run = placed(lambda x: x + 1, session, padding=Padding({"x": {0: [4]}}, 7))
    assert run(torch.zeros(3)).cpu().tolist() == [1, 1, 1, 8]


def test_a_tensor_that_requires_grad_is_not_padded(session):
    """Its gradient would be the padded copy's."""

    def step(batch):
        total = (batch["x"] ** 2).sum()
        total.backward()
        return total

    run = placed(step, session, padding=Padding({"batch": {0: [4, 8]}}))
    fits = torch.ones(4, requires_grad=True)
    run({"x": fits})
    assert fits.grad.tolist() == [2, 2, 2, 2]
    with pytest.raises(
        UserError,
        match=r"batch\['x'\], at test_shapes.py:\d+.*, requires grad, but buckets pad it: a copy of shape \[4\] would",
    ):
        run({"x": torch.ones(3, requires_grad=True)})


def test_what_buckets_refuse(session):
    run = placed(lambda x: x + 1, session, padding=Padding({"x": {1: [4, 8]}}))
    with pytest.raises(ShapeError, match=r"dimension 1 of x is 9, larger than its largest bucket 8 \(buckets \[4, 8\]"):
        run(torch.zeros(2, 9))
    with pytest.raises(ShapeError, match=r"buckets name dimension 1 of x, which has shape \[9\], at test_shapes.py"):
        run(torch.zeros(9))
    other = placed(lambda y: y + 1, session, padding=Padding({"x": {1: [4, 8]}}))
    with pytest.raises(ConfigError, match=r"buckets are given for \['x'\], but the call's tensors are \['y'\]"):
        other(torch.zeros(2, 2))
    with pytest.raises(ConfigError, match=r"buckets of dimension 0 of 'x' are \[8, 4\]: give positive sizes in ascend"):
        tw.program(lambda x: x, buckets={"x": {0: [8, 4]}})
    with pytest.raises(ConfigError, match=r"pad_value names \['y'\], which have no buckets"):
        tw.program(lambda x: x, buckets={"x": {0: [8]}}, pad_value={"y": 1})


def test_modules_have_buckets_by_the_names_of_forward(session):
    layer = nn.Linear(3, 3)
    plain = layer.weight.detach().clone(), layer.bias.detach().clone()
    make_function(layer, session.mesh(), lambda: session, VariantOptions(padding=Padding({"input": {0: [4]}})))
    x = torch.randn(2, 3)
    torch.testing.assert_close(layer(x).cpu()[:2], F.linear(x, *plain))

"""Which shares of devices clients may ask for."""

import math

import pytest

import torchways as tw
from torchways.cluster.shares import ShareLimits
from torchways.errors import ConfigError

LIMITS = ShareLimits(max_weight=8.0, max_priority=3)


@pytest.mark.parametrize("weight", [0.001, 1.0, 8.0])
def test_a_share_within_the_limits(weight):
    assert LIMITS.refusal(weight, -3) is None
    assert LIMITS.refusal(weight, 3) is None


def test_a_client_that_names_no_weight_is_not_refused():
    assert LIMITS.refusal(0.0, 0) is None


@pytest.mark.parametrize("weight", [9.0, 1e-15, 5e-324, -1.0, math.nan, math.inf])
def test_a_weight_beyond_the_limits(weight):
    expected = f"weight must be from 0.001 to 8, this cluster's limit, not {weight:g}"
    assert LIMITS.refusal(weight, 0) == expected


@pytest.mark.parametrize("weight", [0, -1.0, 1e-15, math.nan])
def test_no_session_begins_with_a_weight_that_no_cluster_allows(weight):
    with pytest.raises(ConfigError, match=f"weight must be at least 0.001, not {weight:g}"):
        tw.init(weight=weight)


@pytest.mark.parametrize("priority", [-4, 4])
def test_a_priority_beyond_the_limits(priority):
    assert LIMITS.refusal(1.0, priority) == f"priority must be from -3 to 3, this cluster's limit, not {priority}"

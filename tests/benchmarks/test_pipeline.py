"""Pure parts of benchmarks.pipeline, and of what leads its systems."""

import pytest

from benchmarks.pipeline import PIPELINING, TORCHWAYS, bubble_table, excess, table
from benchmarks.simulated_pipeline import Setting
from torchways.errors import ConfigError
from torchways.schedules import SCHEDULES


@pytest.mark.parametrize(
    ("schedule", "homes"),
    [
        ("1F1B", [0, 1, 2]),
        ("GPipe", [0, 1, 2]),
        ("Interleaved1F1B", [0, 1, 2, 0, 1, 2]),
        ("ZBVZeroBubble", [0, 1, 2, 2, 1, 0]),
    ],
)
def test_slices_of_stages(schedule, homes):
    found = Setting(schedule=schedule, num_slices=3, num_microbatches=12).slice_of_stage
    assert [found[stage] for stage in sorted(found)] == homes


def test_a_schedule_that_does_not_fit():
    with pytest.raises(ConfigError, match="DualPipeV needs at least as many microbatches as stages"):
        _ = Setting(schedule="DualPipeV", num_slices=4, num_microbatches=4).slice_of_stage


def test_every_schedule_fits_the_benchmarks_numbers():
    for name in SCHEDULES:
        for count in (2, 4, 8, 16):
            slices = Setting(schedule=name, num_slices=count, num_microbatches=4 * count).slice_of_stage
            assert set(slices.values()) == set(range(count))


def test_a_row_of_bubbles():
    row = {
        "schedule": "1F1B",
        "slices": 4,
        "stages": 4,
        "microbatches": 16,
        "predicted_ms": 2936.4,
        "measured_ms": 2997.8,
        "theoretical_bubble": 0.158,
        "predicted_bubble": 0.164,
        "measured_bubble": 0.177,
        "transfer_ms": 0.758,
    }
    assert excess(row) == pytest.approx(0.019)
    header, [cells] = bubble_table([row])
    cell = dict(zip(header, cells, strict=True))
    assert (cell["simulated: schedule"], cell["measured, ms"], cell["measured, bubble"]) == ("1F1B", "2,998", "17.7%")
    assert cell["measured - theory"] == "+1.9 points"


def test_a_row_of_training_steps():
    row = {
        "model": "llama tiny",
        "parameters": 1_180_800,
        "batch": "16x128",
        "slices": 2,
        "microbatches": 8,
        "schedule": "1F1B",
        "tokens_s": {"pipeline": 5000.4, TORCHWAYS: 4000.0, PIPELINING: 2500.0},
        "ours_ms": 409.6,
        "ours_over": {TORCHWAYS: 1.25, PIPELINING: 2.0},
        "loss_differences": {TORCHWAYS: 1e-6, PIPELINING: 3e-6},
    }
    header, [cells] = table([row])
    cell = dict(zip(header, cells, strict=True))
    assert (cell["pipeline, tokens/s"], cell["over SPMD"], cell["over pipelining"]) == (5000, 1.25, 2.0)
    assert cell["loss differs"] == 3e-6

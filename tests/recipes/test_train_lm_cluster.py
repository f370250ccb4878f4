"""The main job's command, shortened, on a real cluster: what it prints and what it leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


SHARDED = [
    "parallel.tensor_parallel=2",
    "parallel.fully_shard=true",
    "parallel.init_on_slices=true",
    "train.precision=bf16",
]


PIPELINE = [
    *("parallel=pipeline", "parallel.schedule=ZBVZeroBubble", "parallel.pipeline_stages=4"),
    "parallel.stages_per_island=2",
]


#: Fewer layers where no pipeline needs four.
SHALLOW = ["model.n_layers=2"]


@pytest.mark.parametrize(
    "overrides",
    [SHALLOW, PIPELINE, *(pytest.param(item, marks=pytest.mark.slow) for item in (["parallel=replicate"], SHARDED))],
    ids=["plain", "microbatches", "replicas", "sharded"],
)
def test_train_lm_on_two_islands(tmp_path, overrides):
    command = [
        *(sys.executable, "-m", "torchways.run", "--islands", "2", "--devices-per-island", "2"),
        *(str(ROOT / "recipes" / "train_lm.py"), "model=tiny", "train.steps=6", "train.log_every=3"),
        *("model.seq_len=32", "train.batch_size=16"),
        *("train.trace_step=4", "train.eval_batches=2", f"hydra.run.dir={tmp_path / 'run'}"),
        *overrides,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    run = tmp_path / "run"
    assert {"config.yaml", "loss.png", "metrics.jsonl", "tensorboard", "trace.json"} <= {p.name for p in run.iterdir()}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss_metrics/global_avg_loss"] for record in records if "grad_norm" in record]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    rows = [(event["pid"], event["args"]["name"]) for event in events if event["name"] == "thread_name"]
    assert sum(name.startswith("device") for _, name in rows) == 4


@pytest.mark.parametrize(
    ("override", "text"),
    [("model.n_head=3", "n_head"), ("data.path=/no/such/file", "/no/such/file")],
)
def test_bad_settings_are_one_clear_line(tmp_path, override, text):
    twrun = ["-m", "torchways.run"] if text.startswith("/") else []  # hydra refuses the other before a session begins
    command = [sys.executable, *twrun, "recipes/train_lm.py", override, f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr

"""A recipe that is killed again and again, and started by the same command, has the losses of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = [
    *("model.d_model=16", "model.n_heads=2", "model.seq_len=16", "model.n_layers=2", "train.batch_size=4"),
    *("train.eval_batches=1", "train.eval_every=null", "train.trace_step=null", "train.log_every=1"),
]


def start(folder, run, *overrides, eager=False):
    """Starts the recipe in `folder`, in a process group of its own."""
    (folder / "text.txt").write_text("To be, or not to be, that is the question. " * 100)
    command = [sys.executable, str(ROOT / "recipes" / "train_lm.py"), "data.path=text.txt", f"hydra.run.dir={run}"]
    environment = {**os.environ, "TORCHWAYS_EAGER": "1"} if eager else dict(os.environ)
    return subprocess.Popen(
        [*command, *SMALL, *overrides],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=(folder / f"{run}.err").open("w"),
        start_new_session=True,
    )


def losses_of(folder):
    """Returns the losses by step that all runs in a folder have logged; a step has the same in each of them."""
    found = {}
    for path in sorted(folder.glob("run*/metrics.jsonl")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line that it was killed in
                continue
            if "grad_norm" in record:
                loss = record["loss_metrics/global_avg_loss"]
                assert found.setdefault(record["step"], loss) == loss, (path, record)
    return found


def wait(process, folder, seconds=180):
    code = process.wait(seconds)
    assert code == 0, next(iter(sorted(folder.glob("*.err"))[-1:])).read_text()


@pytest.mark.parametrize(
    ("num_kills", "num_steps", "eager"),
    [(1, 30, True), pytest.param(20, 1000, False, marks=[pytest.mark.slow, pytest.mark.timeout(3000)])],
    ids=["eager", "cluster"],
)
def test_kills_at_random_moments(tmp_path, num_kills, num_steps, eager):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    steps = f"train.steps={num_steps}"
    wait(start(whole, "run", steps, eager=eager), whole, 300)
    dice = random.Random(0)
    checkpoints = killed / "outputs" / "train_lm" / "checkpoints"
    settings = [steps, "checkpoint.every=2", "checkpoint.resume=auto"]
    num_during_saves = 0
    for number in range(num_kills):
        process = start(killed, f"run{number:02}", *settings, eager=eager)
        known = _newest(checkpoints)
        deadline = time.monotonic() + 180
        # Some way into its own work: after at least one checkpoint, at any moment until the next few.
        while _newest(checkpoints) == known and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(dice.random() * 0.2)
        assert process.poll() is None, (killed / f"run{number:02}.err").read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
        num_during_saves += bool(list(checkpoints.glob(".step_*")))
    wait(start(killed, "run99", *settings, eager=eager), killed, 300)
    expected, found = losses_of(whole), losses_of(killed)
    assert found == expected
    assert set(found) == set(range(1, num_steps + 1))
    assert not list(checkpoints.glob(".*"))
    print(f"{num_during_saves} of {num_kills} kills came during a save")
    assert eager or num_during_saves > 0


def _newest(folder):
    return max((path.name for path in folder.glob("step_*")), default="")


def test_a_signal_leaves_a_checkpoint(tmp_path):
    settings = ["train.steps=100000", "checkpoint.every=50000", "checkpoint.resume=auto"]
    process = start(tmp_path, "run0", *settings, eager=True)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "run0" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("grad_norm") >= 3) and time.monotonic() < deadline:
        assert process.poll() is None, (tmp_path / "run0.err").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    [saved] = (tmp_path / "outputs" / "train_lm" / "checkpoints").glob("step_*")
    last = max(losses_of(tmp_path))
    assert saved.name == f"step_{last:08d}"
    again = start(tmp_path, "run1", f"train.steps={last + 2}", *settings[2:], eager=True)
    wait(again, tmp_path)
    assert max(losses_of(tmp_path)) == last + 2
    fresh = start(tmp_path, "run2", "checkpoint.every=5", eager=True)
    assert fresh.wait(60) == 1
    assert f"has checkpoints of an earlier run, up to {saved.name}" in (tmp_path / "run2.err").read_text()

"""Every benchmark runs, without the peers that need environments of their own, and ends with its JSON line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import systems

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "options", "checked"),
    [
        ("dispatch", ["--hosts", "2", "--systems", "torchways", "--seconds", "0.05"], "rows"),
        pytest.param(
            "dispatch",
            ["--hosts", "1", "--systems", "torchways", "torch-xla", "--seconds", "0.05"],
            "rows",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "smallest_torch-xla_compiled",
            ["--hosts", "1", "--loops", "1,2", "--seconds", "0.05"],
            "rows",
            marks=pytest.mark.slow,
        ),
        ("pipeline_dispatch", ["--stages", "1,2", "--seconds", "0.05"], "rows"),
        pytest.param("spmd", ["--quick", "--devices", "1", "--seconds", "0.05"], "rows", marks=pytest.mark.slow),
        pytest.param("spmd", ["--quick", "--devices", "2", "--seconds", "0.05"], "rows", marks=pytest.mark.slow),
        pytest.param("products", ["--threads", "1"], "rows", marks=pytest.mark.slow),
        pytest.param("islands", ["--quick", "--seconds", "0.05"], "rows", marks=pytest.mark.slow),
        pytest.param(
            "pipeline", ["--quick", "--parts", "training", "--seconds", "0.05"], "rows", marks=pytest.mark.slow
        ),
        pytest.param(
            "pipeline",
            ["--parts", "simulated", "--slices", "2", "--pass-seconds", "0.002", "--calls", "1"],
            "simulated",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "generation",
            ["--hidden", "64", "--layers", "1", "--batches", "1", "--chunks", "4", "--tokens", "5"],
            "rows",
            marks=pytest.mark.slow,
        ),
        pytest.param("first_step", ["--models", "1", "--systems", "torchways", "lazy"], "rows", marks=pytest.mark.slow),
        pytest.param("conditions", ["--layers", "1"], "rows", marks=pytest.mark.slow),
        ("transfer", ["--sizes", "4096"], "latency"),
        pytest.param(
            "checkpoints",
            ["--sizes", "nano", "--batch", "2", "--length", "16", "--steps", "2"],
            "rows",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tenancy",
            ["throughput", "--clients", "1,2", "--lengths", "0.3", "--seconds", "0.3"],
            "throughput",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "tenancy", ["shares", "latency", "start", "--share-seconds", "6"], "shares", marks=pytest.mark.slow
        ),
        ("input_pipeline", ["--sizes", "65536", "--devices", "1", "--batches", "6", "--workers", "1"], "rows"),
    ],
)
def test_benchmark_runs(tmp_path, name, options, checked):
    module = name.partition("_torch")[0]
    command = [sys.executable, "-m", f"benchmarks.{module}", "--repeats", "1", "--json", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["benchmark"] == name
    assert result[checked]
    assert result["machine"]["torch"]
    assert (tmp_path / "outputs" / "benchmarks" / f"{name}.png").stat().st_size > 10_000


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_pictures_of_schedules(tmp_path):
    options = ["--pictures", str(tmp_path / "schedules.png"), "--pass-seconds", "0.005"]
    command = [sys.executable, "-m", "benchmarks.pipeline", *options]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "schedules.png").stat().st_size > 50_000


def test_a_peer_that_is_not_installed_is_left_out_with_a_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(systems, "ENVIRONMENTS", tmp_path)
    with systems.running([systems.JAX], 1) as started:
        assert started == []
    assert "jax: not installed; run benchmarks/peers/install.sh" in capsys.readouterr().err

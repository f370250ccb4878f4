"""The recipes' batches are the same whoever reads them, and so is their place in a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils._pytree as pytree

import torchways as tw
from recipes import multi_task, streams
from recipes.data import DataConfig, Loader, TextData
from recipes.models.hugging_face import HuggingFaceConfig
from recipes.span_corruption import SpanConfig
from tests.recipes.test_hugging_face import save_tokenizer, small

ROOT = Path(__file__).parents[2]
SHAPE = {"batch_size": 4, "seed": 3}
KINDS = {
    "windows": (streams.windows, {}),
    "spans": (streams.spans, dataclasses.asdict(SpanConfig())),
    "line_ends": (streams.line_ends, {"turns": [[multi_task.NEXT_BYTE], [multi_task.LINE_END]]}),
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be,\nthat is the question.\n" * 20)
    return path


def plain(batch: Any) -> list[Any]:
    """Returns the values of a batch, in order; arrays are read."""
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(batch)]


def opened(text: Path, loader: Loader, mesh: Any, kind: str, num_workers: int = 0) -> streams.Stream:
    config = DataConfig(path=str(text), loader=loader, num_workers=num_workers)
    batches, options = KINDS[kind]
    return streams.open_stream(config, TextData(config, seq_len=24), mesh, batches, **SHAPE, **options)


def check(text: Path, mesh: Any, kind: str, num_workers: int = 0) -> None:
    here = [plain(batch) for batch in itertools.islice(opened(text, Loader.controller, mesh, kind), 12)]
    stream = opened(text, Loader.hosts, mesh, kind, num_workers)
    assert [plain(batch) for batch in itertools.islice(stream, 5)] == here[:5]
    state = stream.state_dict()
    assert state == {"batch": 5}
    next(stream)  # what came after the checkpoint comes again
    for loader in Loader:  # a run may go on with the other one
        again = opened(text, loader, mesh, kind, num_workers)
        again.load_state_dict(state)
        assert [plain(batch) for batch in itertools.islice(again, 7)] == here[5:]
        assert again.state_dict() == {"batch": 12}


@pytest.mark.parametrize("kind", list(KINDS))
def test_both_loaders_give_the_same_batches_from_any_place(text, kind, monkeypatch):
    monkeypatch.setenv("TORCHWAYS_EAGER", "1")
    check(text, tw.init_device_mesh((1,), mesh_dim_names=("dp",)), kind)


def test_they_do_on_a_slice_too(text, tmp_path):
    with tw.init(islands=1, devices_per_island=2):
        mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
        check(text, mesh, "line_ends", num_workers=2)
        check(text, mesh, "spans")
        small().new_model().save_pretrained(tmp_path / "model")
        save_tokenizer(tmp_path / "model")
        encode = HuggingFaceConfig(path=str(tmp_path / "model"), seq_len=16).codec().encode
        batches = []
        for loader in Loader:
            config = DataConfig(path=str(text), loader=loader)
            data = TextData(config, seq_len=16, encode=encode)
            model = str(tmp_path / "model")
            stream = streams.open_stream(config, data, mesh, streams.windows, tokens_of=model, **SHAPE)
            batches.append([plain(batch) for batch in itertools.islice(stream, 3)])
        assert batches[0] == batches[1]


def start(folder: Path, run: str, *overrides: str) -> subprocess.Popen[str]:
    """Starts train_lm.py under twrun, whose cluster finds the batches in the script's own folder."""
    sizes = ["model.d_model=16", "model.n_heads=2", "model.seq_len=16", "model.n_layers=2", "train.batch_size=4"]
    quick = ["train.eval_batches=1", "train.eval_every=null", "train.trace_step=null", "train.log_every=1"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torchways.run", "--islands", "2", "--devices-per-island", "2"),
            *(str(ROOT / "recipes" / "train_lm.py"), "data.path=text.txt", "train.steps=60", *sizes, *quick),
            *(f"hydra.run.dir={run}", *overrides),
        ],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {record["step"]: record["loss_metrics/global_avg_loss"] for record in records if "grad_norm" in record}


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["two_islands", "replicate"])
def test_a_run_that_is_killed_goes_on_with_the_next_batch(text, tmp_path, parallel):
    options = [f"parallel={parallel}", "data.loader=hosts"]
    whole = start(tmp_path, "whole", *options)
    assert whole.wait(240) == 0, whole.stderr.read()
    resuming = [*options, "checkpoint.every=2", "checkpoint.resume=auto"]
    killed = start(tmp_path, "killed", *resuming)
    checkpoints = tmp_path / "outputs" / "train_lm" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step_*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    again = start(tmp_path, "again", *resuming)
    assert again.wait(240) == 0, again.stderr.read()
    expected, before, after = (losses_of(tmp_path / run) for run in ("whole", "killed", "again"))
    assert before | after == expected
    assert len(expected) == 60
    assert min(after) > 2

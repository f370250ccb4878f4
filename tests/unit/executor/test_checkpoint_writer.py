"""The process that writes checkpoints: what it writes, and whose processor time it takes."""

import asyncio
import os
import threading

import psutil
import pytest
import torch

from torchways.executor import checkpoint_writer
from torchways.executor.checkpoint_writer import CheckpointWriter
from torchways.ids import BufferId
from torchways.rpc import torchways_pb2 as pb

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="priorities of this kind are Linux's")


def _policies(process):
    return {os.sched_getscheduler(thread.id) for thread in process.threads()}


def test_a_checkpoint_is_written_with_idle_time_and_one_that_takes_long_with_more(tmp_path, monkeypatch):
    spec = pb.TensorSpec(dtype="float32", shape=[3])
    buffers = {"weight": (BufferId(1), spec)}
    monkeypatch.setattr(checkpoint_writer, "_IDLE_SECONDS", 0.2)
    came = threading.Event()

    async def save():
        writer = CheckpointWriter()
        before = psutil.Process().children()
        writer.start()
        [process] = set(psutil.Process().children()) - set(before)
        at_first = _policies(process)
        snapshot = writer.snapshot({BufferId(1): spec})
        snapshot.keep(BufferId(1), torch.arange(3.0))
        writing = asyncio.create_task(
            asyncio.to_thread(writer.write, str(tmp_path), "__e_", buffers, snapshot, lambda name: came.wait())
        )
        later = set()
        while later != {os.SCHED_OTHER}:  # the value has not come, so the checkpoint takes long
            await asyncio.sleep(0.02)
            later = _policies(process)
        came.set()
        [saved] = await writing
        process.kill()
        return at_first, saved

    at_first, saved = asyncio.run(asyncio.wait_for(save(), 60))
    assert at_first == {os.SCHED_IDLE}
    content = (tmp_path / saved.file).read_bytes()[saved.offset : saved.offset + saved.length]
    (tmp_path / "value").write_bytes(content)
    torch.testing.assert_close(torch.load(tmp_path / "value"), torch.arange(3.0))

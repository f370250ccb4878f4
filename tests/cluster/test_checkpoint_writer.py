"""The process that writes checkpoints for an executor, by itself."""

import asyncio
import os
from pathlib import Path

import psutil
import pytest
import torch

from torchways.errors import CheckpointError, UserError
from torchways.executor import checkpoint_files
from torchways.executor.checkpoint_writer import CheckpointWriter, Snapshot
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime.base import BufferSpec

VALUES = {
    1: torch.randn(300, 70),
    2: torch.arange(5, dtype=torch.bfloat16),
    3: torch.tensor(True),
    4: torch.empty(0, 3),
    5: torch.randn(40, 40).t(),
}
NAMES = {"weight": 1, "tied": 1, "bias": 2, "flag": 3, "nothing": 4, "turned": 5}


@pytest.fixture(scope="module")
def writer():
    writer = CheckpointWriter()
    writer.start()
    yield writer
    writer._socket.close()
    assert writer._process.wait(10) == 0  # it ends when nobody is at the other end


def spec(value):
    return pb.TensorSpec(dtype=str(value.dtype).removeprefix("torch."), shape=value.shape)


def write(writer, folder, wait_for=None, snapshot=None):
    """Writes all values, each put in its place when it is waited for."""
    snapshot = snapshot or Snapshot({buffer_id: spec(value) for buffer_id, value in VALUES.items()})
    buffers = {name: (buffer_id, spec(VALUES[buffer_id])) for name, buffer_id in NAMES.items()}

    def put(name):
        snapshot.keep(NAMES[name], VALUES[NAMES[name]])

    return writer.write(str(folder), "__x_", buffers, snapshot, wait_for or put)


def test_what_is_written_is_what_was_there(writer, tmp_path):
    for number in range(2):  # the same process again
        (tmp_path / str(number)).mkdir()
        written = write(writer, tmp_path / str(number))
        assert {tensor.name for tensor in written} == set(NAMES)
        for tensor in written:
            value = VALUES[NAMES[tensor.name]]
            piece = pb.Piece(
                file=str(tmp_path / str(number) / tensor.file),
                offset=tensor.offset,
                length=tensor.length,
                source=[0] * value.dim(),
                target=[0] * value.dim(),
                sizes=value.shape,
            )
            form = BufferSpec(dtype=spec(value).dtype, shape=tuple(value.shape), placements=(), mesh=())
            assert torch.equal(checkpoint_files.read(form, [piece]), value), tensor.name


def test_memory_is_used_again(tmp_path, writer):
    async def save(folder):
        folder.mkdir()
        snapshot = writer.snapshot({buffer_id: spec(value) for buffer_id, value in VALUES.items()})
        await asyncio.to_thread(write, writer, folder, snapshot=snapshot)
        writer.give_back(snapshot)
        return snapshot.file

    async def twice():
        return [await save(tmp_path / name) for name in ("first", "second")]

    first, second = asyncio.run(twice())
    assert first is second
    writer._forget()
    del first, second
    [written] = (tmp_path / "second").iterdir()
    assert written.read_bytes() == next((tmp_path / "first").iterdir()).read_bytes()
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    maps = Path(f"/proc/{writer._process.pid}/maps").read_text()
    assert "torchways-checkpoint" not in maps + "".join(links)  # neither process has it any more


def test_a_buffer_of_another_form_is_refused():
    snapshot = Snapshot({1: pb.TensorSpec(dtype="float32", shape=[2])})
    with pytest.raises(UserError, match=r"buffer 1 is torch.float32\[3\], but float32\[2\] is to be saved"):
        snapshot.keep(1, torch.zeros(3))
    with pytest.raises(UserError, match="'load' is no type of a tensor"):
        Snapshot({1: pb.TensorSpec(dtype="load", shape=[2])})


def test_errors_are_those_of_the_disk_and_it_goes_on(writer, tmp_path):
    with pytest.raises(CheckpointError, match=r"No such file or directory"):
        write(writer, tmp_path / "nowhere")
    pid = writer._process.pid
    write(writer, tmp_path)
    assert writer._process.pid == pid


def test_a_value_that_does_not_come(writer, tmp_path):
    def wait_for(name):
        raise UserError(f"{name} was never computed")

    pid = writer._process.pid
    with pytest.raises(UserError, match="weight was never computed"):
        write(writer, tmp_path, wait_for)
    write(writer, tmp_path)  # who waited for its turn has the same process
    assert writer._process.pid == pid
    assert psutil.Process(writer._process.pid).nice() >= 10

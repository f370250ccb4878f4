"""Where executors may read and write, and tensors in pieces of several files."""

import pytest
import safetensors.torch
import torch

from torchways.errors import CheckpointError
from torchways.executor import checkpoint_files
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime.base import BufferSpec


def test_places(monkeypatch, tmp_path):
    checkpoint_files.check_place("/anywhere")
    with pytest.raises(CheckpointError, match="an executor needs an absolute path, and 'here' is none"):
        checkpoint_files.check_place("here")
    monkeypatch.setenv(checkpoint_files.ROOT_VARIABLE, str(tmp_path / "root"))
    checkpoint_files.check_place(str(tmp_path / "root" / "run"))
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path)
    for outside in (tmp_path, tmp_path / "root" / ".." / "x", tmp_path / "root" / "link" / "x", tmp_path / "rooted"):
        with pytest.raises(CheckpointError, match=r"this cluster keeps checkpoints below .*, and .* is elsewhere"):
            checkpoint_files.check_place(str(outside))


def test_pieces_of_several_files(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    safetensors.torch.save_file({"top": whole[:2].contiguous()}, tmp_path / "top")
    safetensors.torch.save_file({"top": whole.double()}, tmp_path / "other")
    specs = {"left": pb.TensorSpec(dtype="float32", shape=[2, 3])}
    [left] = checkpoint_files.write(str(tmp_path), "__a_", specs, lambda name: whole[2:, :3])
    pieces = [
        pb.Piece(file=str(tmp_path / "top"), key="top", source=[0, 0], target=[0, 0], sizes=[2, 6]),
        pb.Piece(
            file=str(tmp_path / left.file),
            offset=left.offset,
            length=left.length,
            source=[0, 0],
            target=[2, 0],
            sizes=[2, 3],
        ),
        pb.Piece(file=str(tmp_path / "other"), key="top", source=[2, 3], target=[2, 3], sizes=[2, 3]),
    ]
    spec = BufferSpec(dtype="float32", shape=(4, 6), placements=("R",), mesh=(1,))
    assert torch.equal(checkpoint_files.read(spec, pieces), whole)
    with pytest.raises(CheckpointError, match=r"do not make up float32\[4, 6\]"):
        checkpoint_files.read(spec, pieces[:2])

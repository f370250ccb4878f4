"""Values to the files of a checkpoint and back, by torch.distributed.checkpoint's own storage classes.

Which values go where, the controller decides (torchways/checkpoint/): it alone has the checkpoint's metadata, whose
format is pickle's. What is read here is safetensors, or what `torch.load` reads with `weights_only`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from torchways.errors import CheckpointError, TorchwaysError
from torchways.rpc import torchways_pb2 as pb
from torchways.runtime.base import BufferSpec

# The storage writer asks tensors for their typed storage.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, "torch.distributed.checkpoint")

#: Where executors may read and write files; everywhere, if it is not set.
ROOT_VARIABLE = "TORCHWAYS_CHECKPOINT_ROOT"


def check_place(path: str) -> None:
    """Checks that this executor may use a path.

    Raises:
        CheckpointError: it is relative, or the cluster's operator has not allowed it.
    """
    if not os.path.isabs(path):
        raise CheckpointError(f"an executor needs an absolute path, and {path!r} is none")
    root = os.environ.get(ROOT_VARIABLE)
    if root and not Path(path).resolve().is_relative_to(Path(root).resolve()):
        raise CheckpointError(f"this cluster keeps checkpoints below {root} ({ROOT_VARIABLE}), and {path} is elsewhere")


def write(
    folder: str, prefix: str, specs: Mapping[str, pb.TensorSpec], value_of: Callable[[str], torch.Tensor]
) -> list[pb.SavedTensor]:
    """Writes tensors to a new file of a checkpoint, and waits until the disk has it.

    Args:
        folder: the checkpoint's.
        prefix: of the file's name.
        specs: of the tensors, by their names in the checkpoint.
        value_of: waits for a tensor; called once for each, in any order.

    Returns:
        Where each of them is.

    Raises:
        OSError: the file cannot be written.
        TorchwaysError: what `value_of` raises.
    """
    writer = FileSystemWriter(folder)
    plan = SavePlan([_write_item(name, spec) for name, spec in specs.items()], storage_data=_StoragePrefix(prefix))
    results = writer.write_data(plan, _Values(value_of)).wait()
    return [
        pb.SavedTensor(
            name=result.index.fqn,
            file=result.storage_data.relative_path,
            offset=result.storage_data.offset,
            length=result.storage_data.length,
        )
        for result in results
    ]


def _write_item(name: str, spec: pb.TensorSpec) -> WriteItem:
    shape, offsets = torch.Size(spec.shape), torch.Size([0] * len(spec.shape))
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets=offsets, sizes=shape),
        properties=TensorProperties(dtype=getattr(torch, spec.dtype)),
        size=shape,
    )
    return WriteItem(index=MetadataIndex(name, offsets), type=WriteItemType.TENSOR, tensor_data=data)


class _Values(DefaultSavePlanner):
    """Gives the storage writer the values that it asks for; the plan is made already."""

    def __init__(self, value_of: Callable[[str], torch.Tensor]) -> None:
        super().__init__()
        self._value_of = value_of

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
        return self._value_of(write_item.index.fqn)


def read(spec: BufferSpec, pieces: Sequence[pb.Piece]) -> torch.Tensor:
    """Returns a tensor that lies in files, in pieces.

    Raises:
        OSError: a file cannot be read.
        CheckpointError: the pieces do not cover the tensor, one of them lies outside it, or a file is damaged.
    """
    if sum(torch.Size(piece.sizes).numel() for piece in pieces) != torch.Size(spec.shape).numel():
        raise CheckpointError(f"the pieces in the checkpoint do not make up {spec.form}")
    value = torch.zeros(spec.shape, dtype=spec.torch_dtype)  # pieces may overlap: nothing of this process shows
    # The reader opens a file once for all that is read of it.
    for is_safetensors in (False, True):
        mine = [piece for piece in pieces if bool(piece.key) is is_safetensors]
        if not mine:
            continue
        reader = HuggingFaceStorageReader("/") if is_safetensors else FileSystemReader("/")
        indices = [MetadataIndex(piece.key, [number]) for number, piece in enumerate(mine)]
        reader.storage_data = {
            index: _StorageInfo(piece.file, piece.offset, piece.length)
            for index, piece in zip(indices, mine, strict=True)
        }
        items = [_read_item(index, piece) for index, piece in zip(indices, mine, strict=True)]
        try:
            reader.read_data(LoadPlan(items), _Target(value)).wait()
        except (OSError, TorchwaysError):
            raise
        except Exception as error:  # a damaged file raises anything
            files = ", ".join(sorted({piece.file for piece in mine}))
            raise CheckpointError(
                f"{spec.form} cannot be read from {files}: damaged, or cut off ({type(error).__name__})"
            ) from error
    return value


def _read_item(index: MetadataIndex, piece: pb.Piece) -> ReadItem:
    return ReadItem(
        type=LoadItemType.TENSOR,
        dest_index=index,
        dest_offsets=torch.Size(piece.target),
        storage_index=index,
        storage_offsets=torch.Size(piece.source),
        lengths=torch.Size(piece.sizes),
    )


class _Target(DefaultLoadPlanner):
    """Takes what the storage reader has read."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self._value = value

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        part = self._value
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, size)
        return part

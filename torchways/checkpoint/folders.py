"""Folders of checkpoints: ``step_00000100`` is complete; what is being written has another name until it is."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from torchways.errors import CheckpointError

#: What torch.distributed.checkpoint writes last.
METADATA = ".metadata"

_STEP = re.compile(r"step_(\d+)")
#: Files of values, by any process that wrote a part.
_DATA = re.compile(r"__.+\.distcp")
_PARTIAL = r"\.partial-[0-9a-f]{8}"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint of ours, or of plain PyTorch."""
    return (folder / METADATA).is_file()


def steps(folder: Path) -> dict[int, Path]:
    """Returns the complete checkpoints in a folder by their steps, in order."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _STEP.fullmatch(path.name))}
    return {step: path for step, path in sorted(found.items()) if is_checkpoint(path)}


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the complete checkpoint of the highest step in a folder, or None if there is none."""
    found = steps(Path(folder))
    return found[max(found)] if found else None


def step_folder(folder: Path, step: int | None) -> Path:
    """Returns where the checkpoint of a step goes; None: the folder itself is the checkpoint."""
    return folder if step is None else folder / f"step_{step:08d}"


def check_replaceable(final: Path) -> None:
    """Checks that a checkpoint may take a place: nothing is there, or an empty folder, or a checkpoint and no more.

    Raises:
        CheckpointError: something else is there, which would be lost.
    """
    if not final.exists() and not final.is_symlink():
        return
    what = f"a checkpoint cannot be saved as {final}"
    if not final.is_dir() or final.is_symlink():
        raise CheckpointError(
            f"{what}: that is no folder. Give a folder of its own, or one for all checkpoints and `step=`"
        )
    others = sorted(path.name for path in final.iterdir() if path.name != METADATA and not _DATA.fullmatch(path.name))
    if others:
        named = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise CheckpointError(
            f"{what}: it would replace that folder, which has other things ({named}). Give a folder of its "
            "own, or `step=`: each checkpoint is then a folder within it"
        )


def begin(final: Path) -> Path:
    """Makes the folder in which a checkpoint is written, and removes what those before it that never ended have left.

    Those before it are the ones of its own name and, of a step's, of other steps: another job may write beside it.

    Raises:
        OSError: it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    names = _STEP.pattern if _STEP.fullmatch(final.name) else re.escape(final.name)
    left = re.compile(rf"\.{names}{_PARTIAL}")
    for path in final.parent.iterdir():
        if left.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    partial = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    return partial


def commit(partial: Path, final: Path) -> None:
    """Gives a checkpoint that is all written its name; one that had it before is there until then.

    Raises:
        OSError: it cannot be renamed.
        CheckpointError: something else has that name by now.
    """
    check_replaceable(final)
    old = None
    if final.exists():
        old = final.with_name(f".{final.name}.partial-{uuid.uuid4().hex[:8]}")
        final.rename(old)
    partial.rename(final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the names, too, must be there after a crash
    finally:
        os.close(folder)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def prune(new: Path, keep: int) -> None:
    """Removes the complete checkpoints beside a new one, but for the `keep` - 1 of the highest steps."""
    others = [path for path in steps(new.parent).values() if path != new]
    for path in others[: max(0, len(others) - (keep - 1))]:
        # Without its metadata it is none any more, however far the removal comes.
        (path / METADATA).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

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
#: A checkpoint that is being written, or that one of the same name is to replace.
_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>partial|replaced)-[0-9a-f]{8}")


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a complete checkpoint of ours, or of plain PyTorch."""
    return (folder / METADATA).is_file()


def steps(folder: Path) -> dict[int, Path]:
    """Returns the complete checkpoints in a folder by their steps, in order."""
    if not folder.is_dir():
        return {}
    paths = [path for path in folder.iterdir() if not path.name.startswith(".")] + _without_successor(folder)
    found = {int(match[1]): path for path in paths if (match := _STEP.fullmatch(_final_name(path)))}
    return {step: path for step, path in sorted(found.items()) if is_checkpoint(path)}


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the complete checkpoint of the highest step in a folder, or None if there is none."""
    found = steps(Path(folder))
    return found[max(found)] if found else None


def find(folder: Path) -> Path | None:
    """Returns the complete checkpoint that a folder is, or that another was to replace there; None: there is none."""
    if folder.exists():
        return folder if is_checkpoint(folder) else None
    beside = _without_successor(folder.parent) if folder.parent.is_dir() else []
    return next((path for path in beside if _final_name(path) == folder.name), None)


def _final_name(path: Path) -> str:
    match = _HIDDEN.fullmatch(path.name)
    return match["name"] if match is not None else path.name


def _without_successor(folder: Path) -> list[Path]:
    """Returns complete checkpoints that gave up their names to others that did not get them: see `commit`."""
    return [
        path
        for path in folder.iterdir()
        if (match := _HIDDEN.fullmatch(path.name))
        and match["kind"] == "replaced"
        and is_checkpoint(path)
        and not (folder / match["name"]).exists()
    ]


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

    A checkpoint that was to be replaced by one of them gets its name back. Those before it are the ones of its own name
    and, of a step's, of other steps: another job may write beside it.

    Raises:
        OSError: it cannot be made.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for path in _without_successor(final.parent):
        if _are_together(path, final):
            path.rename(path.with_name(_final_name(path)))
    for path in final.parent.iterdir():
        if _HIDDEN.fullmatch(path.name) and _are_together(path, final):
            shutil.rmtree(path, ignore_errors=True)
    partial = _hidden(final, "partial")
    partial.mkdir()
    return partial


def _are_together(hidden: Path, final: Path) -> bool:
    name = _final_name(hidden)
    return name == final.name or bool(_STEP.fullmatch(name) and _STEP.fullmatch(final.name))


def _hidden(final: Path, kind: str) -> Path:
    return final.with_name(f".{final.name}.{kind}-{uuid.uuid4().hex[:8]}")


def commit(partial: Path, final: Path) -> None:
    """Gives a checkpoint that is all written its name; one that had it before is there until then.

    If the process is killed between the two renames, the one before is found under its hidden name.

    Raises:
        OSError: it cannot be renamed.
        CheckpointError: something else has that name by now.
    """
    check_replaceable(final)
    old = None
    if final.exists():
        old = _hidden(final, "replaced")
        final.rename(old)
    try:
        partial.rename(final)
    except OSError:
        if old is not None:
            old.rename(final)
        raise
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

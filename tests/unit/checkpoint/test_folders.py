"""Folders of checkpoints: what counts as complete, what is kept, and what is left after a crash."""

import shutil
from pathlib import Path

import pytest
import torch

from torchways import checkpoint
from torchways.checkpoint import folders, latest
from torchways.errors import CheckpointError


def complete(folder, step):
    path = folders.step_folder(folder, step)
    path.mkdir(parents=True)
    (path / folders.METADATA).write_text("all of it")
    return path


def test_latest_is_the_complete_one_of_the_highest_step(tmp_path):
    assert latest(tmp_path / "nothing") is None
    assert latest(tmp_path) is None
    complete(tmp_path, 9)
    expected = complete(tmp_path, 10)
    (tmp_path / "step_00000011").mkdir()  # without its metadata
    (tmp_path / "step_00000012.old").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert latest(tmp_path) == expected
    assert list(folders.steps(tmp_path)) == [9, 10]


def test_steps_are_ordered_by_number(tmp_path):
    for step in (100_000_000, 99_999_999, 7):
        complete(tmp_path, step)
    assert list(folders.steps(tmp_path)) == [7, 99_999_999, 100_000_000]
    assert latest(tmp_path).name == "step_100000000"


def test_what_never_ended_is_removed_by_the_next(tmp_path):
    final = folders.step_folder(tmp_path, 3)
    crashed = folders.begin(final)
    (crashed / "__0_0.distcp").write_bytes(b"half of it")
    (tmp_path / ".mine").mkdir()
    partial = folders.begin(folders.step_folder(tmp_path, 4))
    assert not crashed.exists()
    assert partial.is_dir()
    assert (tmp_path / ".mine").is_dir()
    assert folders.begin(tmp_path / "mine") != partial
    beside = folders.begin(tmp_path / "step_of_mine")
    assert folders.begin(tmp_path / "other").is_dir()
    assert partial.is_dir()  # another job's, beside it
    assert beside.is_dir()
    assert latest(tmp_path) is None


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    final = complete(tmp_path, 3)
    partial = folders.begin(final)
    (partial / folders.METADATA).write_text("the new one")
    assert (final / folders.METADATA).read_text() == "all of it"
    folders.commit(partial, final)
    assert (final / folders.METADATA).read_text() == "the new one"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


@pytest.mark.parametrize("step", [None, 3])
def test_a_kill_between_the_renames_loses_nothing(tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    def save(value):
        final = folders.step_folder(tmp_path / "run", step)
        partial = folders.begin(final)
        (partial / folders.METADATA).write_text(value)
        folders.commit(partial, final)
        return final

    final = save("the old one")
    rename = Path.rename

    def rename_once(path, target):
        if target == final:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(Killed):
        save("the new one")
    monkeypatch.undo()
    assert not final.exists()
    found = folders.find(final)
    assert (found / folders.METADATA).read_text() == "the old one"
    if step is not None:
        assert latest(tmp_path / "run") == found
        assert list(folders.steps(tmp_path / "run")) == [3]
    folders.begin(final)
    assert (final / folders.METADATA).read_text() == "the old one"
    assert folders.find(final) == final
    save("the next one")
    assert (final / folders.METADATA).read_text() == "the next one"
    assert [path.name for path in final.parent.iterdir()] == [final.name]


def test_a_checkpoint_that_cannot_be_renamed_leaves_the_old_one(tmp_path):
    final = complete(tmp_path, 3)
    partial = folders.begin(final)
    shutil.rmtree(partial)
    with pytest.raises(FileNotFoundError):
        folders.commit(partial, final)
    assert [path.name for path in tmp_path.iterdir()] == [final.name]
    assert folders.is_checkpoint(final)


def test_only_the_latest_are_kept(tmp_path):
    for step in (1, 5, 20, 30):
        complete(tmp_path, step)
    (tmp_path / "step_00000002").mkdir()
    folders.prune(tmp_path / "step_00000030", 2)
    assert list(folders.steps(tmp_path)) == [20, 30]
    assert (tmp_path / "step_00000002").is_dir()  # not complete, perhaps somebody's


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [5, 200]), (3, [5, 100, 200]), (5, [5, 50, 100, 200])])
def test_the_new_checkpoint_is_kept_whatever_its_step(tmp_path, caplog, keep, left):
    """As when a run starts anew in a folder that has checkpoints of a longer one."""
    for step in (50, 100, 200):
        complete(tmp_path, step)
    path = checkpoint.save(tmp_path, {"x": torch.ones(2)}, step=5, keep=keep).result()
    assert folders.is_checkpoint(path)
    assert list(folders.steps(tmp_path)) == left
    assert ("step_00000200 is of a higher step" in caplog.text) == (keep > 1)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        folders.begin(folders.step_folder(tmp_path / "file", 1))


def test_nothing_but_a_checkpoint_is_replaced(tmp_path):
    """A checkpoint without a step is a folder of the user's choice: what else is there must not go."""
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    (project / "weights.txt").write_text("mine")
    (tmp_path / "script.py").write_text("mine")
    (tmp_path / "link").symlink_to(project)
    steps = tmp_path / "runs"
    complete(steps, 3)
    mixed = complete(tmp_path / "mixed", None)
    (mixed / "notes.txt").write_text("mine")
    for target in (project, tmp_path / "script.py", tmp_path / "link", steps, mixed):
        with pytest.raises(CheckpointError, match="a checkpoint cannot be saved as"):
            checkpoint.save(target, {"x": torch.ones(2)})
        partial = folders.begin(tmp_path / "other")
        with pytest.raises(CheckpointError):
            folders.commit(partial, target)
        shutil.rmtree(partial)
    assert (project / "weights.txt").read_text() == (tmp_path / "script.py").read_text() == "mine"
    assert list(folders.steps(steps)) == [3]
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "new"):
        for value in (1.0, 2.0):
            checkpoint.save(target, {"x": torch.full((2,), value)}).result()
        found = {"x": torch.zeros(2)}
        checkpoint.load(target, found)
        assert found["x"].tolist() == [2.0, 2.0]


@pytest.mark.parametrize("damage", [lambda data: data[:20], lambda data: bytes(len(data)), lambda data: b""])
@pytest.mark.parametrize("name", [folders.METADATA, "__0_0.distcp"])
def test_a_damaged_checkpoint_is_named(tmp_path, name, damage):
    checkpoint.save(tmp_path / "saved", {"x": torch.ones(100), "step": 3}).result()
    path = tmp_path / "saved" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"checkpoint .*saved cannot be read: .*\w"):
        checkpoint.load(tmp_path / "saved", {"x": torch.zeros(100), "step": 0})


@pytest.mark.parametrize("size", [0, 4, 40])
def test_damaged_safetensors_are_named(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(size)))
    with pytest.raises(CheckpointError, match=r"checkpoint .* cannot be read"):
        checkpoint.load(tmp_path, torch.nn.Linear(2, 2))

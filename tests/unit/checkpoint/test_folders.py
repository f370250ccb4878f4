"""Folders of checkpoints: what counts as complete, what is kept, and what is left after a crash."""

import pytest

from torchways.checkpoint import folders, latest


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
    assert latest(tmp_path) is None


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(tmp_path):
    final = complete(tmp_path, 3)
    partial = folders.begin(final)
    (partial / folders.METADATA).write_text("the new one")
    assert (final / folders.METADATA).read_text() == "all of it"
    folders.commit(partial, final)
    assert (final / folders.METADATA).read_text() == "the new one"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def test_only_the_latest_are_kept(tmp_path):
    for step in (1, 5, 20, 30):
        complete(tmp_path, step)
    (tmp_path / "step_00000002").mkdir()
    folders.prune(tmp_path, 2)
    assert list(folders.steps(tmp_path)) == [20, 30]
    assert (tmp_path / "step_00000002").is_dir()  # not complete, perhaps somebody's


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        folders.begin(folders.step_folder(tmp_path / "file", 1))

"""State files: who holds one, who may read one, and where a token is found."""

import os
import stat
import subprocess
import sys

import pytest

from torchways.errors import ConfigError
from torchways.launch import state_file
from torchways.launch.state_file import ClusterState

STATE = ClusterState(pid=os.getpid(), address="127.0.0.1:7", token="secret", operator_secret="more")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The default folder for state files."""
    for name in ("TORCHWAYS_TOKEN", "TORCHWAYS_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "torchways"


def test_a_held_file_is_that_of_a_living_cluster(folder):
    path = state_file.default_path()
    assert path == folder / "default.json"
    held = state_file.hold(path)
    assert "starting" in refused(path)
    assert state_file.read(path).address == ""
    held.write(ClusterState(pid=1))
    held.write(STATE)
    assert (state_file.read(path), state_file.lives(path)) == (STATE, True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert f"the cluster at 127.0.0.1:7 (pid {os.getpid()}) has this state file" in refused(path)
    held.remove()
    assert (path.exists(), state_file.lives(path)) == (False, False)
    with pytest.raises(FileNotFoundError):
        state_file.read(path)


def refused(path):
    with pytest.raises(ConfigError) as caught:
        state_file.hold(path)
    return str(caught.value)


_DIES = """
import os, sys
from pathlib import Path
from torchways.launch.state_file import ClusterState, hold
hold(Path(sys.argv[1])).write(ClusterState(pid=os.getpid(), address="x" * 500))
os._exit(1)
"""


def test_the_file_of_a_dead_cluster_is_taken_over(folder):
    path = state_file.default_path("mine")
    subprocess.run([sys.executable, "-c", _DIES, str(path)], check=False, timeout=60)
    path.chmod(0o644)
    assert (path.exists(), state_file.lives(path)) == (True, False)
    held = state_file.hold(path)
    held.write(STATE)
    assert state_file.read(path) == STATE
    state_file.remove_stale(path)  # it is not stale
    assert path.exists()
    held.remove()


@pytest.mark.parametrize("text", ["important\n", "{}", '{"pid": 3}', "[1, 2]", '{"lr": 0.1, "pid": 1}'])
def test_what_is_no_state_file_is_left_as_it_is(folder, text):
    path = folder / "notes.txt"
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o644)
    assert "is no state file of a torchways cluster, and is left as it is" in refused(path)
    with pytest.raises(ConfigError, match="is left as it is"):
        state_file.remove_stale(path)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (text, 0o644)
    assert not state_file.lives(path)


def test_a_token_takes_the_place_of_a_token_only(folder):
    path = folder / "token"
    state_file.write_token(path, "one")
    state_file.write_token(path, "two")
    assert state_file.read_token(path) == "two"
    path.write_text("several words\n")
    with pytest.raises(ConfigError, match="is left as it is"):
        state_file.write_token(path, "three")
    assert path.read_text() == "several words\n"


def test_a_file_that_others_may_read_is_refused(folder):
    path = folder / "token"
    state_file.write_token(path, "secret")
    assert state_file.read_token(path) == "secret"
    for mode in (0o640, 0o604, 0o620, 0o777):
        path.chmod(mode)
        with pytest.raises(ConfigError, match=rf"others may read or change it \(mode {mode:o}\): chmod 600 {path}"):
            state_file.read_token(path)
    state_file.write_token(path, "another")
    assert state_file.read_token(path) == "another"


def test_where_a_token_is_found(folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"no token for the cluster at 127\.0\.0\.1:7: set TORCHWAYS_TOKEN, or"):
        state_file.find_token("127.0.0.1:7")
    held = state_file.hold(state_file.default_path("any"))
    held.write(STATE)
    assert state_file.find_token("127.0.0.1:7") == "secret"
    with pytest.raises(ConfigError, match="no token"):
        state_file.find_token("127.0.0.1:8")
    held.path.chmod(0o644)
    with pytest.raises(ConfigError, match=f"chmod 600 {held.path}"):
        state_file.find_token("127.0.0.1:7")
    held.path.chmod(0o600)
    state_file.write_token(folder / "token", "of-a-file")
    monkeypatch.setenv("TORCHWAYS_TOKEN_FILE", str(folder / "token"))
    assert state_file.find_token("127.0.0.1:7") == "of-a-file"
    monkeypatch.setenv("TORCHWAYS_TOKEN_FILE", str(folder / "any.json"))
    assert state_file.find_token("127.0.0.1:7") == "secret"
    monkeypatch.setenv("TORCHWAYS_TOKEN", "of the environment")
    assert state_file.find_token("127.0.0.1:7") == "of the environment"
    monkeypatch.delenv("TORCHWAYS_TOKEN")
    monkeypatch.setenv("TORCHWAYS_TOKEN_FILE", str(folder / "none"))
    with pytest.raises(ConfigError, match="there is no token file"):
        state_file.find_token("127.0.0.1:7")
    held.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a file away")
def test_a_file_of_another_user_is_refused(folder):
    for name, use in (
        ("token", state_file.read_token),
        ("token", lambda path: state_file.write_token(path, "x")),
        ("state.json", state_file.hold),
        ("state.json", state_file.read),
    ):
        path = folder / name
        state_file.write_token(path, "secret")
        os.chown(path, 4711, -1)
        with pytest.raises(ConfigError, match=r"belongs to another user \(uid 4711\): use one of your own"):
            use(path)
        assert path.read_text() == "secret\n"
        path.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can become another user")
def test_whose_cluster_it_is_is_told_to_a_user_who_may_not_look(folder):
    path = state_file.default_path()
    held = state_file.hold(path)
    os.seteuid(4711)
    try:
        with pytest.raises(ConfigError, match=r"cannot read the state file .*belongs to another user \(uid 0\)"):
            state_file.lives(path)
    finally:
        os.seteuid(0)
    held.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only the superuser can give a file away")
def test_the_file_of_another_users_dead_cluster_stays(folder):
    path = state_file.default_path()
    subprocess.run([sys.executable, "-c", _DIES, str(path)], check=False, timeout=60)
    os.chown(path, 4711, -1)
    with pytest.raises(ConfigError, match=r"belongs to another user \(uid 4711\)"):
        state_file.remove_stale(path)
    assert path.exists()


def test_a_token_file_is_checked_without_being_changed(folder):
    path = folder / "token"
    state_file.check_token_file(path)
    assert not path.exists()
    state_file.write_token(path, "one")
    state_file.check_token_file(path)
    assert state_file.read_token(path) == "one"
    path.write_text("several words")
    with pytest.raises(ConfigError, match="is left as it is"):
        state_file.check_token_file(path)


@pytest.mark.parametrize("text", ["", "two words", "{", '{"pid": "x"}', '{"pid": 1, "token": 5}', "{}", "[]", "\x00"])
def test_what_is_no_token_is_refused(folder, text):
    folder.mkdir()
    path = folder / "file"
    path.write_text(text)
    path.chmod(0o600)
    if text == "[]":
        assert state_file.read_token(path) == "[]"  # a word
    else:
        with pytest.raises(ConfigError):
            state_file.read_token(path)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "..", "/etc/x"])
def test_a_name_is_that_of_a_file(folder, name):
    with pytest.raises(ConfigError, match="a cluster cannot be named"):
        state_file.default_path(name)


def test_no_link_is_followed_when_a_file_is_made(folder):
    folder.mkdir()
    target = folder / "target"
    target.write_text("mine")
    (folder / "link").symlink_to(target)
    with pytest.raises(ConfigError, match="cannot write"):
        state_file.hold(folder / "link")
    with pytest.raises(ConfigError, match="cannot write"):
        state_file.write_token(folder / "link", "x")
    assert target.read_text() == "mine"

"""The state file of a cluster that stays: its address and its secrets, for who may read it.

The cluster's node agent holds a lock on the file for as long as it lives, so whether a cluster lives is never a guess:
the kernel gives the lock back however the agent ends. The file has mode 600. Whoever can read it may join the cluster,
see what all clients do, and end it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from torchways.errors import ConfigError
from torchways.rpc.channel import TOKEN_VARIABLE

TOKEN_FILE_VARIABLE = "TORCHWAYS_TOKEN_FILE"

_SUFFIX = ".json"
_MAX_BYTES = 1 << 16
_LOCK_ATTEMPTS = 10
_LOCK_PAUSE_SECONDS = 0.02
_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterState:
    """What the state file holds.

    Attributes:
        pid: of the node agent; ending it ends the cluster.
        address: the resource manager's host:port; empty while the cluster starts.
        token: what clients join with.
        operator_secret: what proves that a caller runs the cluster (rpc/identity.py).
        log_dir: folder with the log of each process; empty if they go to stderr.
        metrics_address: host:port of /metrics; empty if there is none.
    """

    pid: int
    address: str = ""
    token: str = field(default="", repr=False)
    operator_secret: str = field(default="", repr=False)
    log_dir: str = ""
    metrics_address: str = ""


class HeldStateFile:
    """The state file of this process's cluster, locked."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    def write(self, state: ClusterState) -> None:
        """Replaces the content."""
        data = json.dumps(asdict(state), indent=1).encode() + b"\n"
        os.pwrite(self._fd, data, 0)
        os.ftruncate(self._fd, len(data))

    def remove(self) -> None:
        """Removes the file, then gives the lock back."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._fd)


def hold(path: Path) -> HeldStateFile:
    """Makes a cluster's state file, or takes over that of a dead one, with mode 600.

    Raises:
        ConfigError: a cluster that lives has it, it cannot be made, or the file is something else.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                _check_owner(path, os.fstat(fd))
                _lock(fd)
                if _is_at(path, fd):  # else another has removed it since we opened it
                    _check_content(path, os.pread(fd, _MAX_BYTES, 0).decode("utf-8", "replace"))
                    os.fchmod(fd, 0o600)
                    os.ftruncate(fd, 0)
                    return HeldStateFile(path, fd)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
    except BlockingIOError:
        raise ConfigError(f"{path}: {_who_lives(path)} has this state file; {_remedy(path)}") from None
    except OSError as error:
        raise ConfigError(f"cannot write the state file {path}: {error.strerror}; choose another by --state") from error


def _lock(fd: int) -> None:
    """Locks a file; tries for a moment, since who asks whether a cluster lives has the lock for a moment, too."""
    for attempts_left in reversed(range(_LOCK_ATTEMPTS)):
        try:
            return fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not attempts_left:
                raise
            time.sleep(_LOCK_PAUSE_SECONDS)


def _who_lives(path: Path) -> str:
    try:
        state = _parse(path, path.read_text())
    except (OSError, ConfigError):
        return "a cluster that is starting"
    return f"the cluster at {state.address} (pid {state.pid})" if state.address else "a cluster that is starting"


def _remedy(path: Path) -> str:
    return f"end it (torchways down --state {path}), or choose another by --name or --state"


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def read(path: Path) -> ClusterState:
    """Returns what a state file holds, of a cluster that may be dead.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: others may read it, or it is no state file.
    """
    return _parse(path, _read_private(path))


def lives(path: Path) -> bool:
    """Whether the cluster of this state file lives: its node agent holds the file.

    Raises:
        ConfigError: this user may not look at the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError as error:
        raise ConfigError(f"cannot read the state file {path}: {_whose(path) or error.strerror}") from error
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def _whose(path: Path) -> str:
    """Says which other user has a file, or else the folder that keeps us from it; empty if neither is another's."""
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            uid = place.stat().st_uid
            return f"{place} belongs to another user (uid {uid})" if uid != os.geteuid() else ""
    return ""


def remove_stale(path: Path) -> None:
    """Removes the state file of a dead cluster; one that lives by now has its own.

    Raises:
        ConfigError: it is another kind of file, or another user's, and stays.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_content(path, path.read_text(errors="replace"))
    try:
        hold(path).remove()
    except ConfigError:
        if not lives(path):
            raise


def _check_content(path: Path, text: str) -> None:
    """Checks that a file is empty, or a state file: nothing else is overwritten or removed.

    Raises:
        ConfigError: it is something else.
    """
    try:
        found = json.loads(text) if text.strip() else {"pid": 0, "token": ""}
        is_one = isinstance(found, dict) and {"pid", "token"} <= found.keys()
    except ValueError:
        is_one = False
    if not is_one:
        raise ConfigError(
            f"{path} is no state file of a torchways cluster, and is left as it is: name another by --state"
        )


def default_path(name: str = "default") -> Path:
    """Returns where the state file of a cluster of that name is.

    Raises:
        ConfigError: it is no name for a file.
    """
    if not name or name != os.path.basename(name) or name.startswith("."):
        raise ConfigError(
            f"a cluster cannot be named {name!r}: use letters, digits, - and _, or give a path by --state"
        )
    return _folders()[0] / f"{name}{_SUFFIX}"


def _folders() -> list[Path]:
    """Returns the folders where state files may be; the first is where new ones go."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    folders = [Path.home() / ".torchways"]
    return [Path(runtime) / "torchways", *folders] if os.path.isdir(runtime) else folders


def _living_files() -> Iterator[Path]:
    for folder in _folders():
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(ConfigError):  # another user's
                if lives(path):
                    yield path


def state_at(address: str) -> ClusterState | None:
    """Returns the state of this user's cluster at an address, if it has a state file in a default folder.

    Raises:
        ConfigError: there is none, but there is a file that may not be used, which may be its.
    """
    unusable: ConfigError | None = None
    for path in _living_files():
        try:
            state = read(path)
        except FileNotFoundError:
            continue
        except ConfigError as error:
            unusable = error
            continue
        if state.address == address:
            return state
    if unusable is not None:
        raise unusable
    return None


def find_token(address: str) -> str:
    """Returns the token for the cluster at an address.

    It is that of TORCHWAYS_TOKEN, else of the file that TORCHWAYS_TOKEN_FILE names, else of the cluster's state file.

    Raises:
        ConfigError: there is none, or others may read the file.
    """
    if token := os.environ.get(TOKEN_VARIABLE, ""):
        return token
    if name := os.environ.get(TOKEN_FILE_VARIABLE, ""):
        return read_token(Path(name))
    if (state := state_at(address)) is not None:
        return state.token
    raise ConfigError(
        f"no token for the cluster at {address}: set {TOKEN_VARIABLE}, or {TOKEN_FILE_VARIABLE} to a file with it "
        "(the state file that `torchways up` made, for one); twrun sets the token by itself"
    )


def read_token(path: Path) -> str:
    """Returns the token in a file: a state file, or a file that holds the token alone.

    Raises:
        ConfigError: it cannot be read, others may read it, or it holds no token.
    """
    try:
        text = _read_private(path)
    except FileNotFoundError:
        raise ConfigError(f"there is no token file {path}") from None
    token = _parse(path, text).token if text.lstrip().startswith("{") else text.strip()
    if not token or not token.isprintable() or len(token.split()) != 1:
        raise ConfigError(f"the token file {path} holds no token: it must be one word, or a state file")
    return token


def write_token(path: Path, token: str) -> None:
    """Writes a token alone to a file of mode 600, for someone who may join the cluster and no more.

    Raises:
        ConfigError: it cannot be written.
    """
    with _token_file(path) as file:
        file.truncate()
        file.write(token + "\n")


def check_token_file(path: Path) -> None:
    """Checks that `write_token` can write a file, and leaves what is there.

    Raises:
        ConfigError: it cannot.
    """
    is_new = not os.path.lexists(path)
    with _token_file(path):
        if is_new:
            path.unlink()


@contextlib.contextmanager
def _token_file(path: Path) -> Iterator[IO[str]]:
    """Opens a file for a token."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            _check_owner(path, os.fstat(fd))
            if len(os.pread(fd, _MAX_BYTES, 0).split()) > 1:
                raise ConfigError(f"{path} holds something other than a token, and is left as it is: name another file")
            os.fchmod(fd, 0o600)  # before the token is in it
            yield file
    except OSError as error:
        raise ConfigError(f"cannot write the token file {path}: {error.strerror}") from error


def _check_owner(path: Path, found: os.stat_result, *, or_root: bool = False) -> None:
    """Checks that a file is this user's, or the superuser's: whoever owns it can read and change it.

    Raises:
        ConfigError: it is another's.
    """
    if found.st_uid != os.geteuid() and not (or_root and found.st_uid == 0):
        raise ConfigError(f"{path} belongs to another user (uid {found.st_uid}): use one of your own")


def _read_private(path: Path) -> str:
    """Reads a file of secrets.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: it cannot be read, or others may read it.
    """
    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno())
            _check_owner(path, found, or_root=True)
            if found.st_mode & _OPEN_TO_OTHERS:
                mode = stat.S_IMODE(found.st_mode)
                why = f"{path} holds a cluster's token, and others may read or change it (mode {mode:o})"
                raise ConfigError(f"{why}: chmod 600 {path}")
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _parse(path: Path, text: str) -> ClusterState:
    try:
        found = json.loads(text) if text.strip() else {"pid": 0}  # empty: of a cluster that has just begun to start
        kinds = {item.name: int if item.name == "pid" else str for item in fields(ClusterState)}
        given: dict[str, Any] = {name: found[name] for name in kinds if name in found}
        if not all(type(value) is kinds[name] for name, value in given.items()):
            raise ValueError("a field of another kind")
        return ClusterState(**given)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no state file of a torchways cluster: {error}") from error

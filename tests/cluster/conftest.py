"""Fixtures with real processes. One cluster serves a module's tests; what they must not leave behind is checked."""

import collections
import signal
import time

import psutil
import pytest

import torchways as tw
import torchways.api


def cluster_processes():
    """Returns the live torchways processes below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            is_pythons = "multiprocessing.resource_tracker" in " ".join(process.cmdline())  # it stays once it is there
            if process.status() != psutil.STATUS_ZOMBIE and not is_pythons:
                found.append(process)
        except psutil.NoSuchProcess:
            pass
    return found


def wait_gone(pids, seconds=10.0):
    """Returns the pids that are still alive after so long (zombies are gone)."""
    deadline = time.monotonic() + seconds
    alive = set(pids)
    while alive and time.monotonic() < deadline:
        alive = {pid for pid in alive if _is_alive(pid)}
        time.sleep(0.1)
    return alive


def _is_alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, what, seconds=20):
    """Waits until something holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def raise_keyboard_interrupt(*_):
    """Handles a signal as Python handles Ctrl-C."""
    raise KeyboardInterrupt


def interrupted(wait):
    """Waits, and is interrupted soon."""
    saved = signal.signal(signal.SIGALRM, raise_keyboard_interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2, 0.5)  # Python drops an exception that arrives within a `__del__`
    try:
        with pytest.raises(KeyboardInterrupt):
            wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, saved)


def status_of(mesh):
    """Returns what the (first) executor of a slice's devices says of itself; other slices of them are part of it."""
    [executor, *_] = tw.api._current().slices.address(mesh).executors
    [status] = [item for item in tw.executor_status() if item.executor_id == executor.executor_id]
    return status


def writer_of(mesh):
    """Returns the process that writes for a slice's executor."""
    name = f"executor {status_of(mesh).executor_id}"
    [pid] = [pid for role, pid in tw.cluster_info().processes if role == name]
    [writer] = [child for child in psutil.Process(pid).children() if "checkpoint writer" in " ".join(child.cmdline())]
    return writer


@pytest.fixture(scope="module")
def cluster():
    """An embedded cluster of two CPU islands with two devices each."""
    with tw.init(islands=2, devices_per_island=2):
        pids = [pid for _, pid in tw.cluster_info().processes if pid]
        yield tw
    assert wait_gone(pids) == set()
    assert cluster_processes() == []


@pytest.fixture(scope="module")
def meshes(cluster):
    """One slice of each island, all its devices."""
    return [tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=island) for island in (0, 1)]


def pytest_terminal_summary(terminalreporter):
    """Says what became of PyTorch's database of operators (test_operator_database.py)."""
    found = collections.Counter()
    for category in ("passed", "xfailed", "failed"):
        for report in terminalreporter.getreports(category):
            if "test_operator_database.py::test_operator[" in report.nodeid:
                found[dict(report.user_properties).get("operator", category)] += 1
    if found:
        terminalreporter.write_line("operators: " + ", ".join(f"{count} {name}" for name, count in found.items()))

"""However a controller ends, no process of its cluster outlives it by ten seconds."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.cluster.conftest import wait_gone

SCRIPT = """
import sys, time, torch, torchways as tw
tw.init(islands=1, devices_per_island=2)
mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",))
print(tw.function(lambda x: x + 1, mesh=mesh)(torch.zeros(2)).tolist(), flush=True)
print(*[pid for _, pid in tw.cluster_info().processes if pid], flush=True)
how = sys.argv[1]
if how == "exception":
    raise RuntimeError("on purpose")
while how == "wait":
    time.sleep(0.1)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script; what a failed test leaves running is killed."""
    started = []

    def start_script(how, prefix=()):
        path = tmp_path / "script.py"
        path.write_text(SCRIPT)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [*(prefix or [sys.executable]), str(path), how]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment))
        return started[-1]

    yield start_script
    for script in started:
        script.kill()
        script.wait()


def pids_of(script):
    assert script.stdout.readline() == "[1.0, 1.0]\n"
    return [int(pid) for pid in script.stdout.readline().split()]


_slow = pytest.mark.slow
#: Each case starts a cluster and an executor. `make test` takes those that differ: a script that ends, a signal that it
#: handles, and one that it cannot; which exit code follows which signal is tested without executors (test_launch.py).
SIGNALS = [pytest.param(signal.SIGINT, marks=_slow), signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize(("how", "code"), [pytest.param("normal", 0, marks=_slow), ("exception", 1)])
def test_script_ends(start, how, code):
    script = start(how)
    pids = pids_of(script)
    assert len(pids) == 4  # resource manager, agent, scheduler, executor
    assert script.wait(20) == code
    assert wait_gone(pids) == set()


@pytest.mark.parametrize("sent", SIGNALS, ids=lambda sent: sent.name)
def test_script_is_ended(start, sent):
    script = start("wait")
    pids = pids_of(script)
    script.send_signal(sent)
    assert script.wait(20) != 0
    assert wait_gone(pids) == set()


TWRUN = [sys.executable, "-m", "torchways.run", "--islands", "1", "--devices_per_island=2"]
#: twrun passes the signals that it can handle to its script: test_launch.py.
TWRUN_SIGNALS = [pytest.param(signal.SIGINT, marks=_slow), pytest.param(signal.SIGTERM, marks=_slow), signal.SIGKILL]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("normal", 0), ("exception", 1)])
def test_twrun_returns_the_scripts_code(start, how, code):
    script = start(how, TWRUN)
    pids = pids_of(script)
    assert script.wait(20) == code
    assert wait_gone(pids) == set()


@pytest.mark.parametrize("sent", TWRUN_SIGNALS, ids=lambda sent: sent.name)
def test_twrun_is_ended(start, sent):
    script = start("wait", TWRUN)
    pids = pids_of(script)
    pids += [child.pid for child in psutil.Process(script.pid).children(recursive=True)]
    script.send_signal(sent)
    assert script.wait(20) != 0
    assert wait_gone(pids) == set()


def test_twrun_reports_a_killed_script(start):
    script = start("wait", TWRUN)
    pids = pids_of(script)
    [controller] = [child for child in psutil.Process(script.pid).children() if "script.py" in str(child.cmdline())]
    controller.kill()
    assert script.wait(20) == 128 + signal.SIGKILL
    assert "ended by SIGKILL" in script.stderr.read()
    assert wait_gone(pids) == set()


def test_twrun_without_a_script():
    done = subprocess.run([*TWRUN, "no/such/script.py"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no script 'no/such/script.py'" in done.stderr


def test_twrun_help_is_loud():
    done = subprocess.run([*TWRUN, "--help"], capture_output=True, text=True, timeout=60, check=False)
    assert "ONLY THE CONTROLLER RUNS THE SCRIPT" in done.stdout

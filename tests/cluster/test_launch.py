"""Real processes: clusters start and end, and nothing survives its owner. No executor is needed, so these are fast."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time

import grpc
import psutil
import pytest

from torchways.config import ClusterConfig
from torchways.errors import ConfigError
from torchways.launch import embedded
from torchways.rpc import channel, identity
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.operator import OperatorAccess, connected

_KEY = identity.new_cluster_key().hex()
_ONE_ISLAND = ClusterConfig(islands=1, devices_per_island=1)


def family(pid):
    """A process and all below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def wait_for(condition, what, seconds=20):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)
    return result


def assert_gone(processes, seconds=10):
    """Waits until none of the processes runs; one that only its parent has not noticed yet does not."""
    wait_for(lambda: not any(map(_runs, processes)), f"the end of {processes}", seconds)


def _runs(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def title(process):
    """What `ps` calls a process; empty if it is gone."""
    try:
        return process.cmdline()[0]
    except (psutil.NoSuchProcess, IndexError):
        return ""


def named(pid, role):
    """Waits for the process of that role below `pid`."""
    return wait_for(lambda: [p for p in family(pid) if title(p) == f"torchways: {role}"], role)[0]


def cluster_processes(agent_pid):
    """Waits for the manager and the scheduler of a cluster of one island; returns these and the agent."""
    named(agent_pid, "scheduler i0")
    named(agent_pid, "resource manager")
    return wait_for(lambda: len(found := family(agent_pid)) == 4 and found, "four processes")


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv(identity.CLUSTER_KEY_VARIABLE, _KEY)  # as who starts a cluster of several nodes gives it to all
    running = embedded.start_cluster(_ONE_ISLAND)
    processes = cluster_processes(running.agent_pid)
    yield running
    running.close()
    assert_gone(processes, 1)


def test_close_leaves_no_process_and_can_be_repeated():
    running = embedded.start_cluster(_ONE_ISLAND)
    processes = cluster_processes(running.agent_pid)
    running.close()
    assert_gone(processes, 1)
    running.close()


def test_close_at_once_leaves_no_process_either():
    running = embedded.start_cluster(_ONE_ISLAND)
    processes = family(running.agent_pid)
    running.close()
    assert_gone(processes, 1)


async def _attach(address, token, name="a test"):
    async with channel.open_channel(address) as opened:
        stream = pb_grpc.ResourceManagerStub(opened).Attach(
            pb.AttachRequest(name=name), metadata=identity.metadata(token)
        )
        async for event in stream:
            yield event


def test_a_wrong_token_is_refused(cluster):
    async def call():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in _attach(cluster.address, "wrong"):
                pass
        return caught.value.code()

    assert asyncio.run(call()) == grpc.StatusCode.UNAUTHENTICATED


def test_the_token_is_in_no_command_line(cluster):
    for process in family(cluster.agent_pid):
        assert cluster.token not in " ".join(process.cmdline())


def test_a_clients_name_is_short_and_printable(cluster):
    async def call():
        events = _attach(cluster.address, cluster.token, "\x1b[2J" + "x" * 100_000)
        await anext(events)
        secret = identity.ClusterKey(bytes.fromhex(_KEY)).secret_of(identity.Caller(identity.Role.OPERATOR))
        async with connected(OperatorAccess(cluster.address, cluster.token, secret)) as operator:
            found = await operator.observe()
        await events.aclose()
        return [client.name for client in found.clients]

    assert asyncio.run(call()) == ["?[2J" + "x" * 196]


def test_clients_are_told_that_the_cluster_closes(cluster):
    async def call():
        events = _attach(cluster.address, cluster.token)
        assert (await anext(events)).attached.client_id == 1
        closing = asyncio.create_task(asyncio.to_thread(cluster.close))
        event = await asyncio.wait_for(anext(events), 10)
        await events.aclose()
        await closing
        return event.closing.reason

    assert asyncio.run(call()) == "it was told to end"


def test_clients_are_told_of_a_lost_scheduler(cluster):
    async def call():
        events = _attach(cluster.address, cluster.token)
        await anext(events)
        named(cluster.agent_pid, "scheduler i0").kill()
        event = await asyncio.wait_for(anext(events), 10)
        await events.aclose()
        return event.closing.reason

    assert "scheduler i0 ended: process" in (reason := asyncio.run(call()))
    assert reason.endswith("ended by signal 9 (SIGKILL)")


_OWNER = """
import os, sys, time
from torchways.config import ClusterConfig
from torchways.launch.embedded import start_cluster
cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=1))
if "fork" in sys.argv and os.fork() == 0:
    time.sleep(60)  # holds the pipe to the agent open
print(cluster.agent_pid, flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def owner(*arguments):
    """A process with an embedded cluster of its own; yields it and its cluster's processes."""
    process = subprocess.Popen([sys.executable, "-c", _OWNER, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process, cluster_processes(int(process.stdout.readline()))
    finally:
        for member in family(process.pid):
            member.kill()
        process.wait()
        process.stdout.close()


def test_killing_the_owner_ends_the_cluster():
    with owner() as (process, processes):
        process.kill()
        assert_gone(processes)


def test_killing_the_owner_ends_the_cluster_though_a_fork_of_it_lives():
    with owner("fork") as (process, processes):
        (fork,) = [p for p in family(process.pid)[1:] if p not in processes]
        process.kill()
        assert_gone(processes)
        fork.kill()


def test_killing_the_agent_ends_the_cluster():
    with owner() as (_, processes):
        processes[0].kill()
        assert_gone(processes[1:])


def test_killing_the_resource_manager_ends_the_cluster():
    with owner() as (_, processes):
        named(processes[0].pid, "resource manager").kill()
        assert_gone(processes)


def test_ctrl_c_does_not_reach_the_cluster(cluster):
    for process in family(cluster.agent_pid):
        assert os.getsid(process.pid) == cluster.agent_pid
        process.send_signal(signal.SIGINT)
    assert len(cluster_processes(cluster.agent_pid)) == 4
    assert asyncio.run(anext(_attach(cluster.address, cluster.token))).attached.client_id == 1


def test_a_cluster_that_cannot_start_says_why(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = ClusterConfig(islands=1, devices_per_island=1, log_dir=str(blocked))
    with pytest.raises(ConfigError, match=r"cannot log to the folder .*file: .*; choose another log_dir"):
        embedded.start_cluster(config)


def test_log_dir_gets_a_file_for_each_process(tmp_path):
    config = ClusterConfig(islands=1, devices_per_island=1, log_level="info", log_dir=str(tmp_path / "logs"))
    running = embedded.start_cluster(config)
    try:
        wait_for(lambda: (tmp_path / "logs" / "scheduler_i0.log").exists(), "the scheduler's log")
        log = tmp_path / "logs" / "resource_manager.log"
        wait_for(lambda: "waiting for nodes" in log.read_text(), "a line of the resource manager")
    finally:
        running.close()


def test_a_node_without_the_clusters_key_cannot_join(cluster):
    command = [sys.executable, "-m", "torchways.launch", "--join", cluster.address]
    environment = {**os.environ, channel.TOKEN_VARIABLE: cluster.token}
    del environment[identity.CLUSTER_KEY_VARIABLE]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode != 0
    assert "no cluster key: TORCHWAYS_CLUSTER_KEY must be 64 hexadecimal digits" in done.stderr


def test_another_node_joins_with_islands_of_its_own(cluster):
    command = [sys.executable, "-m", "torchways.launch", "--join", cluster.address, "--devices-per-island", "3"]
    environment = {**os.environ, channel.TOKEN_VARIABLE: cluster.token}
    node = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    async def islands():
        async with channel.open_channel(cluster.address) as opened:
            stub = pb_grpc.ResourceManagerStub(opened)
            info = await stub.DescribeCluster(
                pb.DescribeClusterRequest(), metadata=identity.metadata(cluster.token), timeout=10
            )
            return [island.num_devices for island in info.islands if island.scheduler_address]

    try:
        wait_for(lambda: asyncio.run(islands()) == [1, 3], "the second island")
        processes = family(node.pid)
        assert len(processes) == 3  # the agent, its scheduler and the template of executors
    finally:
        node.stdin.close()
        node.wait(10)
    assert_gone(processes)


# ---- twrun


def twrun(*arguments, **options):
    command = [sys.executable, "-m", "torchways.run", "--islands=1", "--devices_per_island=1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def write_script(folder, text):
    path = folder / "script.py"
    path.write_text("import os, signal, sys, time\n" + text)
    return str(path)


@pytest.mark.parametrize(
    ("text", "code", "error"),
    [
        ("print(__name__, sys.argv[1:], 'TORCHWAYS_ADDRESS' in os.environ, 'TORCHWAYS_TOKEN' in os.environ)", 0, ""),
        ("sys.exit(7)", 7, ""),
        ("raise ValueError('mine')", 1, "ValueError: mine"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "twrun: the script was ended by SIGKILL"),
    ],
)
def test_twrun_exits_as_its_script_does(tmp_path, text, code, error):
    process = twrun(write_script(tmp_path, text), "--islands", "9")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, error in err) == (code, True)
    assert "torchways" not in err.replace("torchways/", "") or error
    if code == 0:
        assert out == "__main__ ['--islands', '9'] True True\n"


def test_twrun_runs_modules_and_commands(tmp_path):
    write_script(tmp_path, "print('a module')")
    process = twrun("-m", "script", cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert process.communicate(timeout=60)[0] == "a module\n"
    process = twrun("--no-python", "sh", "-c", "echo a command; exit 3")
    assert (process.communicate(timeout=60)[0], process.returncode) == ("a command\n", 3)


_WAITING = "print('running', flush=True)\ntime.sleep(60)"
_STUBBORN = """
def handler(number, frame): print('no', flush=True)
signal.signal(signal.SIGINT, handler)
print('running', flush=True)
while True: time.sleep(60)
"""


def start_waiting(tmp_path, text=_WAITING):
    """Returns twrun in a session of its own, with its script running, and all its processes."""
    process = twrun(write_script(tmp_path, text), start_new_session=True)
    assert process.stdout.readline() == "running\n"
    return process, wait_for(lambda: len(found := family(process.pid)) == 6 and found, "six processes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
def test_twrun_passes_signals_to_its_script(tmp_path, number, code):
    process, processes = start_waiting(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
    assert_gone(processes, 1)


def test_a_second_ctrl_c_kills_the_script(tmp_path):
    process, processes = start_waiting(tmp_path, _STUBBORN)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "no\n"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 137
    assert_gone(processes, 1)


def test_killing_twrun_ends_script_and_cluster(tmp_path):
    process, processes = start_waiting(tmp_path)
    process.kill()
    process.communicate(timeout=20)
    assert_gone(processes)


def test_a_signal_while_the_cluster_starts_leaves_nothing(tmp_path):
    process = twrun(write_script(tmp_path, _WAITING), start_new_session=True)
    processes = wait_for(lambda: len(found := family(process.pid)) > 1 and found, "the agent")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (143, "")
    assert "Traceback" not in err
    assert_gone(processes, 1)


def test_twrun_shows_a_cluster_process_that_dies(tmp_path):
    process, processes = start_waiting(tmp_path)
    scheduler = named(process.pid, "scheduler i0")
    scheduler.kill()
    assert f"scheduler i0 (pid {scheduler.pid}) ended: signal 9 (SIGKILL)" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert_gone(processes, 1)

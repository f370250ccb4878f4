"""The command-line program `torchways`, with real processes: clusters that stay, who may join them, how they end."""

import contextlib
import gzip
import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import termios
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

import torchways as tw
from tests.cluster.test_launch import assert_gone, family, wait_for
from torchways.errors import ClusterLost
from torchways.launch import state_file

SCRIPT = """
import sys, torch, torchways as tw
tw.init(*sys.argv[1:])
mesh = tw.init_device_mesh((2,), mesh_dim_names=("dp",), island=0)
array = tw.distribute_tensor(torch.arange(8.0), mesh)

@tw.program(mesh=mesh)
def double(x):
    return (x * 2).sum()

print(double(array).item(), flush=True)
"""
#: It goes on until its stdin is closed.
BUSY = (
    SCRIPT
    + """
import threading
threading.Thread(target=lambda: (sys.stdin.read(), ended.append(True)), daemon=True).start()
ended = []
while not ended:
    double(array).item()
tw.shutdown()
"""
)


@pytest.fixture(autouse=True)
def signals():
    """Signals act as usual: a background job and nohup ignore some, and what they start honours that."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """The environment of a user without clusters; state files go to a folder of the test's."""
    for name in ("TORCHWAYS_ADDRESS", "TORCHWAYS_TOKEN", "TORCHWAYS_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")]))
    yield tmp_path
    for path in filter(state_file.lives, runtime.glob("torchways/*.json")):  # of a test that failed
        with contextlib.suppress(ProcessLookupError):
            os.kill(state_file.read(path).pid, signal.SIGKILL)
        path.unlink(missing_ok=True)


def torchways(*arguments, code=0, **variables):
    """Runs the program; returns what it printed, once its exit code is checked."""
    done = subprocess.run(
        [sys.executable, "-m", "torchways", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **variables},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def up(*arguments):
    """Starts a cluster of one island of two devices, which stays; returns what it says of itself."""
    size = ("--islands", "1", "--devices-per-island", "2")
    return json.loads(torchways("up", *size, "--detach", "--json", *arguments))


@contextlib.contextmanager
def running(*arguments):
    """A cluster that stays; ended at the end, with all its processes."""
    facts = up(*arguments)
    processes = family(facts["pid"])
    try:
        yield facts
    finally:
        processes += family(facts["pid"])
        torchways("down", "--state", facts["state"])
        assert_gone(set(processes), 1)
        assert not os.path.exists(facts["state"])


@pytest.fixture
def cluster(environment):
    with running("--metrics-port", "0") as facts:
        yield facts


def run_script(path, *command):
    done = subprocess.run([*command], capture_output=True, text=True, timeout=120, check=False, cwd=path.parent)
    return done.returncode, done.stdout, done.stderr


def write_script(folder, text, name="script.py"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_cluster_stays_for_one_script_after_the_other(cluster, environment):
    path = write_script(environment, SCRIPT)
    assert stat.S_IMODE(os.stat(cluster["state"]).st_mode) == 0o600
    token = json.loads(Path(cluster["state"]).read_text())["token"]
    for process in family(cluster["pid"]):
        assert token not in " ".join(process.cmdline())
        assert os.getsid(process.pid) == cluster["pid"]  # a session of its own

    # The token of the first is found in the state file of this address.
    assert run_script(path, sys.executable, str(path), cluster["address"])[:2] == (0, "56.0\n")
    twrun = (sys.executable, "-m", "torchways.run", "--address", cluster["address"])
    code, out, error = run_script(path, *twrun, str(path))
    assert (code, out) == (0, "56.0\n"), error

    facts = json.loads(torchways("status", "--json"))
    assert facts["address"] == cluster["address"]
    assert [(i["island"], i["platform"], i["num_devices"]) for i in facts["islands"]] == [(0, "cpu", 2)]
    assert (facts["clients"], facts["unreachable"]) == ([], [])
    # The executor stays for a while, ready for the next script.
    names = {process["name"] for process in facts["processes"]}
    assert names == {"node agent", "resource manager", "scheduler i0", "executor i0.e1"}
    assert all(process["rss_bytes"] > 1e6 and psutil.pid_exists(process["pid"]) for process in facts["processes"])
    assert "executor i0.e1" in torchways("status")
    assert torchways("status", "--address-only") == cluster["address"] + "\n"

    error = torchways("up", "--detach", code=1)
    assert f"torchways up: a cluster runs already with the state file {cluster['state']}: end it" in error


@contextlib.contextmanager
def busy_client(folder, address, text=BUSY, name="script.py"):
    """A script that computes without end, once it has printed 56.0."""
    path = write_script(folder, text, name)
    process = subprocess.Popen(
        [sys.executable, str(path), address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "56.0\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def test_an_operator_sees_what_clients_do(cluster, environment):
    with busy_client(environment, cluster["address"]) as client:
        facts = json.loads(torchways("status", "--json"))
        assert [item["name"] for item in facts["clients"]] == [f"script.py pid {client.pid}"]
        [item] = facts["islands"][0]["slices"]
        assert (item["shape"], item["axis_names"], item["devices"], item["state"]) == ([2], ["dp"], [0, 1], "ready")

        trace = environment / "t.json.gz"
        printed = torchways("trace", "--seconds", "0.5", "-o", str(trace))
        assert "of 1 executor, 1 scheduler and 1 client in 0.5 s" in printed
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
            "executor i0.e1",
            "scheduler i0",
            f"client 1: script.py pid {client.pid}",
        }
        computed = [event for event in events if event["ph"] == "X" and "double" in event["name"]]
        assert len(computed) > 2  # with its name, though it is another's

        stacks = torchways("stacks")
        for name in ("node agent", "resource manager", "scheduler i0", "executor i0.e1"):
            assert f"== {name} (pid " in stacks
        assert 'torchways/executor/engine.py", line ' in stacks
        [only] = json.loads(torchways("stacks", "--process", "scheduler i0", "--json"))
        assert only["name"] == "scheduler i0"
        assert "most recent call first" in only["text"]
        [other] = json.loads(torchways("stacks", "--pid", str(only["pid"]), "--json"))
        assert other["pid"] == only["pid"]
        assert "the cluster has no process executor i7.e1" in torchways("stacks", "--process", "executor i7.e1", code=1)

        frame = json.loads(torchways("top", "--json", "--interval", "0.5"))
        assert [item["name"] for item in frame["clients"]] == [f"script.py pid {client.pid}"]
        assert [item["executor_id"] for item in frame["executors"]] == ["i0.e1"]
        text = torchways("top", "--once", "--interval", "0.2", COLUMNS="200")
        assert "i0.e1" in text
        assert f"script.py pid {client.pid}" in text


def traced(folder, *arguments):
    """Returns what `torchways trace` printed, the spans, and the names of the processes that they are of."""
    path = folder / "clients.json"
    printed = torchways("trace", "-o", str(path), *arguments)
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return printed, [event for event in events if event["ph"] == "X"], names


def test_a_trace_has_clients_and_why_their_runs_were_held(cluster, environment):
    # Each keeps several runs in flight, of some milliseconds.
    heavy = BUSY.replace("return (x * 2).sum()", "return (sum(x @ x for _ in range(20)) * 0 + 1).mean() * 56")
    flood = heavy.replace("arange(8.0)", "ones(256, 256)").replace(
        "    double(array).item()", "    [double(array) for _ in range(6)][-1].item()"
    )
    with (
        busy_client(environment, cluster["address"], flood, "a.py") as one,
        busy_client(environment, cluster["address"], flood, "b.py") as two,
    ):
        labels = {f"client 1: a.py pid {one.pid}": 1, f"client 2: b.py pid {two.pid}": 2}
        reasons = set()

        def held_for_all():
            printed, spans, names = traced(environment, "--seconds", "0.5")
            if "of 1 executor, 1 scheduler and 2 clients in 0.5 s" not in printed:
                return False  # a machine under load may not answer in time
            assert set(labels) <= set(names.values())
            reasons.update(span["name"].partition(": ")[2] for span in spans if span["cat"] == "held")
            for label, client_id in labels.items():
                own = [span for span in spans if names[span["pid"]] == label]
                if not {"dispatch", "read"} <= {span["cat"] for span in own}:
                    return False
                assert {span["args"].get("client") for span in own} == {client_id}
            return reasons >= {"its turn", "room on its devices", "its client's earlier runs"}

        wait_for(held_for_all, "a run of each client that was held for its turn, for room and for earlier runs", 60)

        os.kill(two.pid, signal.SIGSTOP)
        try:
            printed, spans, names = traced(environment, "--seconds", "0.2")
        finally:
            os.kill(two.pid, signal.SIGCONT)
        # It may be given up before the deadline: its connection does not answer either.
        assert re.search("without client 2: it (did not answer within 5 s|has left)\n", printed)
        assert set(labels) & set(names.values()) == {f"client 1: a.py pid {one.pid}"}
        assert "compute" in {span["cat"] for span in spans}


def test_the_token_alone_shows_no_names_stacks_and_traces(environment):
    token_file = environment / "token"
    with running("--token-file", str(token_file), "--state", str(environment / "mine.json")) as facts:
        assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
        address = ("--address", facts["address"])
        friend = {"TORCHWAYS_TOKEN_FILE": str(token_file)}
        with busy_client_with(friend, environment, facts["address"]):
            [client] = json.loads(torchways("status", "--json", *address, **friend))["clients"]
            assert client["name"] == ""
            for command in ("stacks", "trace"):
                error = torchways(command, *address, code=1, **friend)
                assert f"torchways {command}: this needs the operator's secret of the cluster at" in error

        token_file.chmod(0o644)
        error = torchways("status", *address, code=1, **friend)
        assert error == (
            f"torchways status: {token_file} holds a cluster's token, and others may read or change it (mode 644): "
            f"chmod 600 {token_file}\n"
        )
        path = write_script(environment, SCRIPT)
        os.environ.update(friend)
        try:
            code, _, error = run_script(path, sys.executable, str(path), facts["address"])
        finally:
            del os.environ["TORCHWAYS_TOKEN_FILE"]
        assert (code, f"chmod 600 {token_file}" in error) == (1, True)

        assert "refuses this token" in torchways("status", *address, code=1, TORCHWAYS_TOKEN="wrong")
        assert "no token for the cluster at" in torchways("status", *address, code=1)


@contextlib.contextmanager
def busy_client_with(variables, folder, address):
    """As `busy_client`, with more environment variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        with busy_client(folder, address) as process:
            yield process


def test_prometheus_gets_metrics_with_the_token(cluster, environment):
    token = json.loads(Path(cluster["state"]).read_text())["token"]
    url = f"http://{cluster['metrics_address']}/metrics"

    def get(address, header=None):
        request = urllib.request.Request(address, headers={"Authorization": header} if header else {})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.read().decode()

    for header in (None, "Bearer wrong", f"Basic {token}", "Bearer "):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(url, header)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(url.replace("/metrics", "/other"), f"Bearer {token}")
    with busy_client(environment, cluster["address"]):
        page = get(url, f"Bearer {token}")
    assert 'torchways_devices{island="0"} 2.0' in page
    assert 'torchways_slices{island="0",state="ready"} 1.0' in page
    assert "torchways_clients 1.0" in page
    assert 'torchways_buffer_bytes{client="1",executor="i0.e1",island="0"}' in page
    assert "# TYPE torchways_functions_compiled_total counter" in page
    assert "# TYPE torchways_device_busy_seconds_total counter" in page


def test_top_draws_on_a_terminal_until_it_is_told_to_quit(cluster):
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    command = [sys.executable, "-m", "torchways", "top", "--interval", "0.2"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=environment)
    shown = b""

    def shows(text):
        nonlocal shown
        while select.select([ours], [], [], 0)[0]:
            shown += os.read(ours, 65536)
        return text in shown

    try:
        wait_for(lambda: shows(b"Clients, by got"), "a frame")
        os.write(ours, b"s")
        wait_for(lambda: shows(b"Clients, by queue"), "another order")
        os.write(ours, b"p")
        wait_for(lambda: shows(b"PAUSED"), "a pause")
        os.write(ours, b"q")
        wait_for(lambda: (shows(b""), process.poll())[1] is not None, "its end")
        assert (process.returncode, process.stderr.read()) == (0, b"")
        assert shows(b"\x1b[?1049l")  # the screen as it was
        assert termios.tcgetattr(theirs) == before
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(ours)
        os.close(theirs)


def test_of_two_that_start_at_once_with_one_state_file_one_does(environment):
    command = [sys.executable, "-m", "torchways", "up", "--islands", "1", "--devices-per-island", "1", "--detach"]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert "state file" in "".join(errors)
    assert "is down" in torchways("down")


def test_an_address_that_is_not_ours_is_named(environment):
    text = torchways("up", "--host", "192.0.2.1", "--name", "short", "--detach", code=1)  # an address for examples
    assert "Cannot assign requested address" in text


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="needs IPv6")
def test_a_cluster_may_have_an_ipv6_address(environment):
    with running("--host", "::1", "--platform", "simulated", "--metrics-port", "0") as facts:
        assert re.fullmatch(r"\[::1\]:\d+", facts["address"])
        path = write_script(environment, SCRIPT)
        environ_of_script = ("env", f"TORCHWAYS_TOKEN_FILE={facts['state']}")
        assert run_script(path, *environ_of_script, sys.executable, str(path), facts["address"]) == (0, "56.0\n", "")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://{facts['metrics_address']}/metrics", timeout=10)


def test_a_port_that_is_taken_is_named(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = torchways("up", "--islands", "1", "--detach", "--metrics-port", str(port), code=1)
    assert (
        f"/metrics cannot be served at 127.0.0.1:{port} (Address already in use); choose another metrics port" in error
    )
    assert "no cluster runs" in torchways("down", code=1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_cluster_in_the_foreground(environment, number):
    command = [sys.executable, "-m", "torchways", "up", "--islands", "1", "--devices-per-island", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    facts = json.loads(process.stdout.readline())
    processes = family(process.pid)
    assert len(processes) >= 4
    assert json.loads(torchways("status", "--json"))["address"] == facts["address"]
    process.send_signal(number)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert_gone(processes, 1)
    assert not os.path.exists(facts["state"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=["TERM", "HUP", "KILL"])
def test_a_signal_while_it_starts_leaves_no_cluster_that_nobody_announced(environment, number):
    command = [sys.executable, "-m", "torchways", "up", "--islands", "1", "--devices-per-island", "1", "--detach"]
    path = environment / "runtime" / "torchways" / "default.json"
    for _ in range(10):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        wait_for(path.exists, "the state file")  # the node agent runs
        processes = family(process.pid)
        process.send_signal(number)
        announced = process.communicate(timeout=30)[0]
        if not announced:
            break
        torchways("down")  # the signal came too late
    assert not announced
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert_gone(processes)
    wait_for(lambda: not path.exists(), "the end of the state file")


def test_nohup_keeps_a_cluster_in_the_foreground(environment):
    command = [
        "nohup",
        sys.executable,
        "-m",
        "torchways",
        "up",
        "--islands",
        "1",
        "--devices-per-island",
        "1",
        "--json",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    facts = json.loads(process.stdout.readline())
    processes = family(process.pid)
    process.send_signal(signal.SIGHUP)  # as at a logout
    assert json.loads(torchways("status", "--json"))["address"] == facts["address"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert_gone(processes, 1)


def test_a_token_file_that_cannot_be_written_is_refused_before_the_start(environment):
    path = environment / "notes.txt"
    path.write_text("several words\n")
    error = torchways("up", "--islands", "1", "--detach", "--token-file", str(path), code=1)
    assert (
        error == f"torchways up: {path} holds something other than a token, and is left as it is: name another file\n"
    )
    assert not (environment / "runtime" / "torchways" / "default-logs").exists()  # no node agent has run


def test_down_ends_a_cluster_in_the_foreground(environment):
    command = [sys.executable, "-m", "torchways", "up", "--islands", "1", "--devices-per-island", "1", "--name", "mine"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("cluster of 1 x 1 cpu devices at 127.0.0.1:")
    processes = family(process.pid)
    assert "is down" in torchways("down", "--name", "mine")
    _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (0, "the cluster was ended\n")
    assert_gone(processes, 1)


def test_a_dead_cluster_leaves_nothing_in_the_way(environment):
    error = torchways("down", code=1)
    path = environment / "runtime" / "torchways" / "default.json"
    assert error.startswith(f"torchways down: no cluster runs that has the state file {path}")
    assert "no cluster runs that has the state file" in torchways("status", code=1)

    facts = up()
    processes = family(facts["pid"])
    os.kill(facts["pid"], signal.SIGKILL)
    assert_gone(processes)
    assert path.exists()
    assert "start one (`torchways up --detach`)" in torchways("top", "--once", code=1)
    with running() as again:  # in place of the stale file
        assert (again["state"], again["pid"]) != (str(path), facts["pid"])
    facts = up()
    processes = family(facts["pid"])
    os.kill(facts["pid"], signal.SIGKILL)
    assert_gone(processes)
    assert "has ended already, unasked; its state file is removed now" in torchways("down", code=1)
    assert not path.exists()


def test_a_cluster_that_loses_its_resource_manager_ends(environment):
    facts = up("--name", "short", "--log-format", "json")
    processes = family(facts["pid"])
    [manager] = [
        p for p in json.loads(torchways("status", "--name", "short", "--json"))["processes"] if "manager" in p["name"]
    ]
    os.kill(manager["pid"], signal.SIGKILL)
    assert_gone(processes)
    wait_for(lambda: not os.path.exists(facts["state"]), "the end of the state file")
    lines = [json.loads(line) for line in (Path(facts["log_dir"]) / "node_agent.log").read_text().splitlines()]
    assert lines[-1]["message"].startswith("ending the cluster: the resource manager")
    assert (lines[-1]["process"], lines[-1]["pid"], lines[-1]["level"]) == ("node agent", facts["pid"], "error")


def test_a_cluster_that_loses_a_scheduler_ends(environment, monkeypatch):
    """It could give nobody a slice: its clients hear why, and it is gone."""
    facts = up("--name", "short")
    processes = family(facts["pid"])
    monkeypatch.setenv("TORCHWAYS_TOKEN_FILE", facts["state"])
    with tw.init(facts["address"]):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
        assert tw.program(lambda x: x + 1, mesh=mesh)(torch.ones(2)).tolist() == [2.0, 2.0]
        status = json.loads(torchways("status", "--name", "short", "--json"))
        [scheduler] = [process for process in status["processes"] if process["name"] == "scheduler i0"]
        os.kill(scheduler["pid"], signal.SIGKILL)

        def heard():
            try:
                tw.init_device_mesh((1,), mesh_dim_names=("dp",), island=0)
            except ClusterLost as error:
                return "scheduler i0 ended" in str(error)
            return False

        wait_for(heard, "word of the scheduler's end")
    assert_gone(processes)
    wait_for(lambda: not os.path.exists(facts["state"]), "the end of the state file")


def test_a_file_that_is_no_state_file_is_left_as_it_is(environment, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("important")
    for arguments in (("down",), ("up", "--detach")):
        assert "is left as it is" in torchways(*arguments, "--state", str(path), code=1)
    assert path.read_text() == "important"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("up", "--islands", "0"), "islands must be a whole number of at least 1, not 0"),
        (
            ("up", "--host", "0.0.0.0"),
            "host must name an address of this machine that clients can reach, not '0.0.0.0'",
        ),
        (("up", "--policy", "fairest"), "policy must be one of proportional_share, first_come_first_served, priority"),
        (("up", "--policy", "collections:Counter"), "policy collections:Counter is no policy"),
        (("up", "--window", "0"), "window must be longer than 0 s"),
        (("up", "--log-level", "loud"), "--log-level must be one of debug, info, warning, error, not 'loud'"),
        (("up", "--window", "1e300"), "--window must be a number of seconds, not 1e+300"),
        (("up", "--stall-warning", "nan"), "--stall-warning must be a number of seconds, not nan"),
        (("up", "--name", ""), "a cluster cannot be named ''"),
        (("down", "--timeout", "-1"), "--timeout must be a number of seconds that is not negative, not -1"),
        (("down", "--timeout", "nan"), "--timeout must be a number of seconds that is not negative, not nan"),
        (("status", "--name", "a/b"), "a cluster cannot be named 'a/b'"),
        (("top", "--interval", "0"), "--interval must be between 0.1 and 60 seconds, not 0"),
        (("trace", "--seconds", "-1"), "--seconds must be above 0"),
        (("trace", "--from", "t.json"), "--from needs --png"),
        (("frobnicate",), "invalid choice: 'frobnicate'"),
        ((), "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_is_refused(environment, arguments, text):
    assert text in torchways(*arguments, code=2)


@pytest.mark.parametrize("command", ["up", "down", "status", "top", "trace", "stacks"])
def test_help_has_examples(command):
    assert f"examples:\n  torchways {command}" in torchways(command, "--help")

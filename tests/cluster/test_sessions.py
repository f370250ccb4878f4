"""Sessions one after the other, in processes of their own: they leave nothing behind, and print nothing."""

import os
import subprocess
import sys

SEVERAL = """
import torch, torchways as tw
for number in range(2):
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        add = tw.function(lambda x: x + 1, mesh=mesh)
        xs = [add(torch.zeros(2)) for _ in range(20)]
        print(xs[-1].tolist() if number else "", flush=True)
        del xs
"""


def run(script, tmp_path, **environment):
    path = tmp_path / "script.py"
    path.write_text(script)
    folder = tmp_path / "tmp"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder), **environment}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment, timeout=240)
    # torch._inductor, which PyTorch's own modules import, keeps its cache there.
    return done, [item.name for item in folder.iterdir() if not item.name.startswith("torchinductor")]


def test_sessions_one_after_the_other_print_nothing_and_leave_no_files(tmp_path):
    done, files = run(SEVERAL, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "\n[1.0, 1.0]\n"
    assert files == []


LOST = """
import os, signal, time, torch, torchways as tw
with tw.init(islands=1, devices_per_island=1):
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
    slow = tw.function(lambda x: torch.linalg.matrix_power(x, 4000).sum(), mesh=mesh)
    arrays = [slow(torch.eye(600)) for _ in range(4)]
    values = [tw.distribute_tensor(torch.ones(1000), mesh) for _ in range(20)]
    reads = [array._buffer.session.values.start_fetch(array._buffer) for array in arrays + values]
    for read in reads[:10]:
        read.cancel()
    [pid] = [pid for name, pid in tw.cluster_info().processes if name.startswith("executor")]
    os.kill(pid, signal.SIGKILL)
    for read in reads[10:]:
        try:
            read.result(20)
        except tw.errors.ExecutorLost:
            pass
    time.sleep(0.5)
"""


def test_a_lost_executor_is_reported_once_and_in_our_words(tmp_path):
    done, files = run(LOST, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "never retrieved" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "executor i0.e1 is lost: process" in done.stderr
    assert files == []


def test_grpcs_support_of_forks_is_off_and_who_wanted_it_is_told(tmp_path):
    script = "import torchways, os; print(os.environ['GRPC_ENABLE_FORK_SUPPORT'])"
    done, _ = run(script, tmp_path, GRPC_ENABLE_FORK_SUPPORT="1")
    assert done.stdout == "0\n"
    assert "torchways sets GRPC_ENABLE_FORK_SUPPORT=0" in done.stderr


WAITING = """
import sys, threading, torch, torchways as tw
def read(array):
    try:
        array.item()
    except tw.errors.TorchwaysError as error:
        sys.stdout.write(type(error).__name__ + "\\n")
with tw.init(islands=1, devices_per_island=1):
    mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
    slow = tw.function(lambda x: torch.linalg.matrix_power(x, 1 << 40).sum(), mesh=mesh)
    known = tw.distribute_tensor(torch.ones(2), mesh)
    known.cpu()
    made = [slow(torch.eye(1500)) for _ in range(9)]
    threads = [threading.Thread(target=read, args=(array,)) for array in made[-2:]]
    for thread in threads:
        thread.start()
    known.cpu()  # behind their requests
    END
for thread in threads:
    thread.join(60)
    assert not thread.is_alive()
"""


def test_who_waits_in_another_thread_is_told_that_the_session_ends(tmp_path):
    done, _ = run(WAITING.replace("END", "pass"), tmp_path)
    assert (done.returncode, done.stdout) == (0, "SessionClosed\nSessionClosed\n"), done.stderr


def test_who_waits_is_told_that_the_cluster_is_gone(tmp_path):
    end = """
    import os, signal
    [pid] = [pid for name, pid in tw.cluster_info().processes if name.startswith("resource manager")]
    os.kill(pid, signal.SIGKILL)
    for thread in threads:
        thread.join(60)"""
    done, _ = run(WAITING.replace("    END", end), tmp_path)
    assert "ClusterLost\n" in done.stdout, done.stderr
    assert done.stdout in ("ClusterLost\n" * 2, "ClusterLost\nExecutorLost\n", "ExecutorLost\nClusterLost\n"), done

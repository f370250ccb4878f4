"""The command line starts at once: what it imports, and which cluster a subcommand means."""

import subprocess
import sys

import pytest

from torchways.cli.main import parser
from torchways.cli.target import access
from torchways.errors import ClusterLost
from torchways.launch import state_file
from torchways.launch.state_file import ClusterState


def test_help_imports_next_to_nothing():
    slow = "{'torch', 'grpc', 'asyncio', 'rich'}"
    code = f"import sys, torchways.cli.main as m; m.parser().format_help(); sys.exit(bool({slow} & {{*sys.modules}}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def clusters(monkeypatch, tmp_path):
    """Two clusters of this user's."""
    for name in ("TORCHWAYS_ADDRESS", "TORCHWAYS_TOKEN", "TORCHWAYS_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    held = []
    for name in ("default", "mine"):
        held.append(state_file.hold(state_file.default_path(name)))
        held[-1].write(ClusterState(pid=1, address=f"{name}:1", token=f"{name}'s", operator_secret=f"{name}'s secret"))
    yield monkeypatch
    for file in held:
        file.remove()


def target(*flags):
    return tuple(access(parser().parse_args(["status", *flags])))


DEFAULT, MINE = (("default:1", "default's", "default's secret"), ("mine:1", "mine's", "mine's secret"))


def test_which_cluster_is_meant(clusters):
    assert target() == DEFAULT
    assert target("--name", "mine") == MINE
    assert target("--state", str(state_file.default_path("mine"))) == MINE
    assert target("--address", "mine:1") == MINE
    clusters.setenv("TORCHWAYS_ADDRESS", "mine:1")
    assert target() == MINE
    assert target("--name", "default") == DEFAULT
    clusters.setenv("TORCHWAYS_TOKEN", "a guest's")
    assert target() == ("mine:1", "a guest's", "mine's secret")
    clusters.setenv("TORCHWAYS_ADDRESS", "elsewhere:1")
    assert target() == ("elsewhere:1", "a guest's", "")


def test_a_cluster_that_does_not_run_or_is_not_ready(clusters):
    with pytest.raises(ClusterLost, match=r"no cluster runs .*: start one \(`torchways up --name other --detach`\)"):
        target("--name", "other")
    starting = state_file.hold(state_file.default_path("other"))
    with pytest.raises(ClusterLost, match="is starting; ask again"):
        target("--name", "other")
    starting.remove()

"""The command line of twrun."""

import pytest

from torchways import run


def parse(*arguments):
    return run.parser().parse_args(run.normalize(arguments))


def test_flags_are_spelled_with_dash_or_underscore():
    dashes = parse("--devices-per-island", "4", "--log-level", "info", "--log-dir=a_b", "s.py")
    underscores = parse("--devices_per_island", "4", "--log_level", "info", "--log_dir=a_b", "s.py")
    assert dashes == underscores
    assert (dashes.devices_per_island, dashes.log_level, dashes.log_dir) == (4, "info", "a_b")


def test_what_follows_the_script_is_the_scripts():
    parsed = parse("--islands", "3", "s.py", "--islands", "7", "-m", "--a_b=c_d", "--", "x")
    assert (parsed.islands, parsed.script, parsed.module) == (3, "s.py", False)
    assert parsed.script_args == ["--islands", "7", "-m", "--a_b=c_d", "--", "x"]


def test_values_keep_their_underscores():
    assert parse("--log_dir", "my_logs", "my_script.py").log_dir == "my_logs"
    assert parse("-m", "my_package.my_module").script == "my_package.my_module"


@pytest.mark.parametrize(
    ("flags", "tail"),
    [((), ["s.py", "1"]), (("-m",), ["-m", "s.py", "1"]), (("--no_python",), None)],
)
def test_how_the_script_is_run(flags, tail):
    command = run._command(parse(*flags, "s.py", "1"))
    assert command[1:] == tail if tail is not None else command == ["s.py", "1"]


def test_settings_of_a_new_cluster_cannot_go_with_an_address(tmp_path, capsys):
    script = tmp_path / "s.py"
    script.touch()
    assert run._missing(parse("--address", "host:1", "--log_level", "info", str(script))) is None
    with pytest.raises(SystemExit) as caught:
        run.main(["--address=host:1", "--islands", "1", "--memory-budget=5", str(script)])
    assert caught.value.code == 2
    assert "twrun: --islands, --memory-budget cannot go with --address" in capsys.readouterr().err


def test_help_says_that_only_the_controller_runs_the_script():
    assert "ONLY THE CONTROLLER RUNS THE SCRIPT" in run.parser().format_help()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["missing.py"], "there is no script 'missing.py'"),
        (["-m", "no_such_module.x"], "there is no module 'no_such_module.x'"),
        (["--no-python", "no-such-command"], "there is no command 'no-such-command'"),
        (["--islands", "0", __file__], "islands must be a whole number of at least 1, not 0"),
        (["--policy", "no_such_module:Fair", __file__], "No module named 'no_such_module'"),
        (["--policy", "collections:Counter", __file__], "policy collections:Counter is no policy"),
        (["--dev", "4", __file__], "unrecognized arguments"),
        (["--platform", "gpu", __file__], "invalid choice: 'gpu'"),
        ([], "the following arguments are required: script"),
    ],
)
def test_mistakes_exit_with_2_before_anything_is_started(arguments, text, capsys, monkeypatch):
    monkeypatch.setenv("TORCHWAYS_LOG_LEVEL", "warning")
    monkeypatch.setattr(run, "setup_logging", lambda role: None)
    monkeypatch.setattr(run, "start_cluster", lambda config: pytest.fail("started a cluster"))
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert text in capsys.readouterr().err

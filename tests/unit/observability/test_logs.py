"""Log lines as JSON."""

import json
import logging
import os
import subprocess
import sys

from torchways.observability import process
from torchways.observability.logs import JsonFormatter, text_formatter


def test_a_line_is_one_object():
    try:
        raise ValueError("bad\nvalue")
    except ValueError:
        record = logging.LogRecord("torchways.x", logging.ERROR, "x.py", 1, "run %d\nfailed", (7,), sys.exc_info())
    record.created = 0.0625
    line = JsonFormatter("scheduler i0").format(record)
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("exception").endswith("ValueError: bad\nvalue")
    assert found == {
        "time": "1970-01-01T00:00:00.062Z",
        "level": "error",
        "process": "scheduler i0",
        "pid": os.getpid(),
        "logger": "torchways.x",
        "message": "run 7\nfailed",
    }


def test_a_line_for_people_steers_no_terminal():
    record = logging.LogRecord("torchways.x", logging.ERROR, "x.py", 1, "client %s\nand\tmore", ("\x1b[2J",), None)
    assert text_formatter("a test").format(record).endswith("torchways.x: client ?[2J\nand\tmore")


def test_an_exception_that_nobody_catches_is_a_line_too():
    code = "from torchways.observability.process import setup_process; setup_process('a test'); 1 / 0"
    environment = {**os.environ, process.LOG_FORMAT_VARIABLE: "json"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False, timeout=60)
    found = json.loads(done.stderr)
    assert (done.returncode, found["level"], found["process"]) == (1, "critical", "a test")
    assert found["exception"].endswith("ZeroDivisionError: division by zero")


def test_the_environment_chooses_the_form(monkeypatch, capsys):
    root = logging.getLogger("torchways")
    before = (root.handlers[:], root.level, root.propagate)
    try:
        for form in ("json", "text"):
            monkeypatch.setenv(process.LOG_FORMAT_VARIABLE, form)
            process.setup_logging("a test")
            logging.getLogger("torchways.x").warning("hello")
    finally:
        root.handlers[:], root.level, root.propagate = before
    as_json, as_text = capsys.readouterr().err.splitlines()
    assert json.loads(as_json)["message"] == "hello"
    assert as_text.endswith(f"W [a test {os.getpid()}] torchways.x: hello")

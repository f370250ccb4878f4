"""What every torchways process does first: title, log, stack dumps, and dying with its parent."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from types import TracebackType

import setproctitle

from torchways.observability.logs import JsonFormatter, text_formatter

LOG_LEVEL_VARIABLE = "TORCHWAYS_LOG_LEVEL"
#: "text" (the default) or "json".
LOG_FORMAT_VARIABLE = "TORCHWAYS_LOG_FORMAT"
LOG_LEVELS = ("debug", "info", "warning", "error")

_PR_SET_PDEATHSIG = 1
_PR_SET_TIMERSLACK = 29
_PR_SET_CHILD_SUBREAPER = 36
_TIMER_SLACK_NS = 1_000


def setup_process(role: str) -> None:
    """Names this process `role` in `ps` and in its log lines, and dumps all stacks to stderr on SIGUSR1."""
    setproctitle.setproctitle(f"torchways: {role}")
    setup_logging(role)
    if _is_json():
        sys.excepthook = _log_uncaught
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)


def setup_logging(role: str) -> None:
    """Sends the `torchways` loggers to stderr, each line with time, level, `role` and pid, as text or as JSON."""
    level = os.environ.get(LOG_LEVEL_VARIABLE, "warning").upper()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role) if _is_json() else text_formatter(role))
    root = logging.getLogger("torchways")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def _is_json() -> bool:
    return os.environ.get(LOG_FORMAT_VARIABLE, "text").lower() == "json"


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger("torchways").critical("ended by an exception: %s", error, exc_info=(kind, error, traceback))


def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel to kill this process when its parent ends, however it ends (Linux; elsewhere does nothing).

    `parent_pid` is the pid that started us: if it is gone already, this process exits.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Makes this process the parent of what its descendants leave behind when they end (Linux only)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def precise_timers() -> None:
    """Lets short sleeps of this thread, and of threads that it starts later, end when they should (Linux).

    The kernel may end a sleep 50 us late by default, which is longer than many computations.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, _TIMER_SLACK_NS, 0, 0, 0)

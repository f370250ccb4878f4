"""The two forms of a log line: text for people, and one JSON object per line for programs."""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime

from torchways.observability.text import printable


def text_formatter(role: str) -> logging.Formatter:
    """Returns the form for people."""
    form = f"%(asctime)s.%(msecs)03d %(levelname).1s [{role} {os.getpid()}] %(name)s: %(message)s"
    return _TextFormatter(form, "%H:%M:%S")


class _TextFormatter(logging.Formatter):
    """Lines have names of clients' in them, and are read on terminals."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record's line."""
        return printable(super().format(record), keep="\n\t")


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, process (its role), pid, logger, message; exception, if any."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record's line."""
        time = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": time.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._role,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)

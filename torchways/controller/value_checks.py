"""Whether runs check their values: `tw.check_values`, or TORCHWAYS_CHECK_VALUES=1."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator

CHECK_VARIABLE = "TORCHWAYS_CHECK_VALUES"

_checks: contextvars.ContextVar[bool] = contextvars.ContextVar("check_values", default=False)


@contextlib.contextmanager
def check_values() -> Iterator[None]:
    """See `tw.check_values`."""
    token = _checks.set(True)
    try:
        yield
    finally:
        _checks.reset(token)


def checks_values() -> bool:
    """Whether a run that is sent now checks its values."""
    return _checks.get() or os.environ.get(CHECK_VARIABLE, "") not in ("", "0")

"""Which line of the user's code is running: for error messages, failures and traces."""

from __future__ import annotations

import os
import sys
import sysconfig

import torch

_STDLIB = sysconfig.get_paths()["stdlib"]
#: Code below these folders is never the user's line.
_SKIPPED = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep,
    os.path.join(_STDLIB, "contextlib.py"),
    os.path.join(_STDLIB, "functools.py"),
    "<",
)


def user_line() -> str:
    """Returns the innermost frame outside torch and torchways as ``train.py:41 in train_step``; may be empty."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_SKIPPED):
            return f"{os.path.basename(code.co_filename)}:{frame.f_lineno} in {code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def is_user_file(filename: str) -> bool:
    """Whether code of this file may be the user's."""
    return not filename.startswith(_SKIPPED)

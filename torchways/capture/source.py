"""The line of the user's code that is running, or that raised an error: for messages, failures and traces."""

from __future__ import annotations

import dis
import os
import sys
import sysconfig
import traceback

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


def is_users_error(error: BaseException) -> bool:
    """Whether the user's own code raised an exception, which eager PyTorch would raise as well."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not is_user_file(last.tb_frame.f_code.co_filename):
        return False
    operation = dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]]
    return operation == "RAISE_VARARGS" or isinstance(error, (ArithmeticError, LookupError, NameError))


def line_of_error(error: BaseException) -> str:
    """Returns the innermost user line of an exception's traceback."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if is_user_file(frame.filename)]
    if not lines:
        return ""
    return f"{lines[-1].filename.rsplit('/', 1)[-1]}:{lines[-1].lineno} in {lines[-1].name}"

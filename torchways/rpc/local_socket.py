"""What both ends of an executor's local socket share: local_values.py here, and executor/local_values.py."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator

#: Before each message: its size, and whether a file comes with it.
HEADER = struct.Struct("<I?")


@contextlib.contextmanager
def short_name(path: str) -> Iterator[str]:
    """Gives a socket's path by way of its folder: a socket's own path has at most 107 bytes."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{os.path.basename(path)}"
    finally:
        os.close(folder)

"""The free memory of this process's heap, which glibc keeps (launch/environment.py)."""

from __future__ import annotations

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's own


def give_back() -> None:
    """Gives what is free of the heap back to the kernel. Other threads may use the heap meanwhile, and wait for it.

    Large blocks are aligned, so a new one does not fit where one of its size was, and each of them makes the heap
    larger: without this, a training step's executor grew to three times what its arrays and computations take.
    """
    if _trim is not None:
        _trim(0)

"""Memory for large values that peers send."""

from __future__ import annotations

import collections
import mmap
import weakref

import numpy as np
import torch

#: Smaller values fit a thread's arena, and malloc keeps their memory.
_MIN_BYTES = 32 << 20
#: How much of it is kept for values to come.
_KEPT_BYTES = 256 << 20


class ReceivedMemory:
    """Keeps the memory of values that are let go for those to come; any thread.

    Fresh pages cost as much as to receive what is written to them. malloc would take some for every value of 64 MB or
    more, for which a thread's arena has no place: such values then come at half of the speed.
    """

    def __init__(self) -> None:
        self._free: collections.deque[mmap.mmap] = collections.deque()

    def take(self, size: int) -> torch.Tensor:
        """Returns a tensor of so many bytes. Whoever lets go of it last gives its memory back, and takes the GIL."""
        if size < _MIN_BYTES:
            return torch.empty(size, dtype=torch.uint8)
        block = self._fitting(size)
        array = np.frombuffer(block, np.uint8, count=size)
        weakref.finalize(array, self._put_back, block).atexit = False
        return torch.from_numpy(array)

    def clear(self) -> None:
        """Gives what is not in use back to the kernel."""
        self._free.clear()

    def _fitting(self, size: int) -> mmap.mmap:
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # another thread was quicker
                break
            if size <= len(block) <= 2 * size:
                return block
            self._free.append(block)
        return mmap.mmap(-1, size)

    def _put_back(self, block: mmap.mmap) -> None:
        # No lock: this may come while any line of Python runs, of this class's too. `deque` needs none.
        self._free.append(block)
        while sum(map(len, list(self._free))) > _KEPT_BYTES:
            try:
                self._free.popleft()
            except IndexError:
                return

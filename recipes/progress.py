"""The progress bar of a training run."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import deque
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Shows steps done, loss, tokens a second and step time; times are medians over recent reads of the loss.

    Steps are dispatched ahead of their computation, so a step's time is known only between two reads: the time
    between them over the steps between them. On a terminal the bar is redrawn in place; elsewhere each read prints it
    on a line of its own.
    """

    def __init__(
        self, *, num_steps: int, tokens_per_step: int, first: int = 0, recent: int = 10, file: TextIO | None = None
    ) -> None:
        self._file = file or sys.stderr
        # Recorders and CI give terminals of no size, on which tqdm draws nothing: they get lines, too.
        self._redraws = self._file.isatty() and 0 not in os.get_terminal_size(self._file.fileno())
        self.tokens_per_step = tokens_per_step
        self._step_times_s: deque[float] = deque(maxlen=recent)
        self._bar = tqdm(
            total=num_steps,
            initial=first,
            unit="step",
            file=self._file,
            dynamic_ncols=self._redraws,
            ncols=None if self._redraws else 120,
            delay=0 if self._redraws else float("inf"),  # never draws by itself
        )
        self._since = time.perf_counter()
        self._first = first

    def restart_clock(self) -> None:
        """Leaves out of the step time what was done since the last read, e.g. an evaluation."""
        self._since = time.perf_counter()

    def advance(self, num_steps: int, *, loss: float) -> float:
        """Counts `num_steps` as done, now that their loss is known, and returns the seconds each took."""
        now = time.perf_counter()
        step_time_s, self._since = (now - self._since) / num_steps, now
        if self._bar.n == self._first and num_steps < self._bar.total:
            self._first_time_s = step_time_s  # holds the compilation: not a sample of what is to come
        else:
            self._step_times_s.append(step_time_s)
        self._bar.set_postfix_str(
            f"loss {loss:.3f}, {self.tokens_per_s:,.0f} tokens/s, {1e3 * self.step_time_s:.0f} ms/step", refresh=False
        )
        self._bar.update(num_steps)
        if self._redraws:
            self._bar.refresh()
        else:
            print(self._bar, file=self._file, flush=True)
        return step_time_s

    @property
    def step_time_s(self) -> float:
        """Median of the recent step times in seconds; the first read, which holds compilation, counts only alone."""
        return statistics.median(self._step_times_s) if self._step_times_s else self._first_time_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second at that step time."""
        return self.tokens_per_step / self.step_time_s

    def close(self) -> None:
        """Leaves the bar on the terminal; a second call does nothing."""
        self._bar.close()

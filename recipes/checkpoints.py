"""Checkpoints of a training run: where it goes on, when one is written, and what a signal does."""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torchways as tw
from recipes.models.trained_gpt import DESCRIPTION, write_description
from recipes.settings import CheckpointConfig
from torchways.errors import CheckpointError, ConfigError

log = logging.getLogger("checkpoints")

_STEP = "step"


class Checkpoints:
    """Saves what a run needs to go on, every few steps and when it is told to end.

    Inside a ``with`` statement, the first SIGTERM or Ctrl-C only sets `signal`; the next one acts as it always does.

    Attributes:
        signal: the signal that came, or None.
    """

    def __init__(
        self, config: CheckpointConfig, state: Mapping[str, Any], description: Mapping[str, Any] | None = None
    ) -> None:
        """Writes nothing yet.

        Args:
            config: the settings.
            state: what a checkpoint holds.
            description: what other recipes need to know of the model; None: they cannot load it.
        """
        self._config = config
        self._description = description
        self._state = state
        self._folder = Path(config.folder)
        self._handlers: dict[int, Any] = {}
        self.signal: signal.Signals | None = None

    def resume(self) -> int:
        """Loads what the run goes on from; returns the number of steps that were made before.

        Raises:
            ConfigError: a new run would write where an older one has its checkpoints.
            CheckpointError: the checkpoint that was named cannot be loaded.
        """
        resume, latest = self._config.resume, tw.checkpoint.latest(self._folder)
        if resume is None:
            if self._config.every is not None and latest is not None:
                raise ConfigError(
                    f"checkpoint.folder={self._folder} has checkpoints of an earlier run, up to {latest.name}; go on "
                    "from there with checkpoint.resume=auto, or give another folder"
                )
            return 0
        path = latest if resume == "auto" else Path(resume)
        if path is None:
            log.info("no checkpoint in %s: starting anew", self._folder)
            return 0
        done: int = tw.checkpoint.load(path, {**self._state, _STEP: 0})[_STEP]
        log.info("going on after step %d, from %s", done, path)
        return done

    def after(self, step: int, *, is_last: bool) -> None:
        """Saves a checkpoint of the run as it is after a step, if it is time."""
        every = self._config.every
        if every is None or not (is_last or step % every == 0):
            return
        saving = tw.checkpoint.save(self._folder, {**self._state, _STEP: step}, step=step, keep=self._config.keep)
        if is_last:
            try:
                log.info("saved %s", saving.result())
            except CheckpointError:  # it is in the log; the results of the training are worth having
                pass

    def __enter__(self) -> Checkpoints:
        if self._config.every is not None:
            if self._description is not None:
                self._describe(self._description)
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def _describe(self, description: Mapping[str, Any]) -> None:
        try:
            write_description(self._folder, description)
        except OSError as error:  # no reason to end the training, as with checkpoints themselves
            log.error("%s cannot be written in %s: %s", DESCRIPTION, self._folder, error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        log.warning("%s: ending after this step; once more ends at once", self.signal.name)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

"""What the core has decided while it handles one event."""

from __future__ import annotations

from torchways.executor.events import Command
from torchways.executor.memory import Taker


class Agenda:
    """Commands for the shell, in order, and what to look at again before the core is done with the event."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.ready: list[Taker] = []

    def take_commands(self) -> list[Command]:
        """Returns the commands, once."""
        commands, self.commands = self.commands, []
        return commands

    def take_ready(self) -> list[Taker]:
        """Returns what is to be looked at, once."""
        ready, self.ready = self.ready, []
        return ready

"""Checkpoints: `tw.checkpoint.save`, `tw.checkpoint.load` and `tw.checkpoint.latest`.

A checkpoint is a folder as `torch.distributed.checkpoint` writes it. The controller says what goes where and writes the
small things; each executor writes and reads the arrays that are on its devices.
"""

from torchways.checkpoint.folders import latest
from torchways.checkpoint.loading import load
from torchways.checkpoint.saving import Saving, save

__all__ = ["Saving", "latest", "load", "save"]

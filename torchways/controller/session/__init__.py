"""The controller's session with a cluster: `session.py` has what others call, and the files beside it one job each.

`connections.py` keeps the connections and what is lost of them, `slices.py` the slices, `programs.py` what is
registered, `runs.py` what is in flight, `values.py` reads, writes and gives back what is on slices (`puts.py`: what is
on its way there), `loop.py` has the thread of all of it, and `spans.py` this client's part of a trace.
"""

from torchways.controller.session.runs import run_seconds
from torchways.controller.session.session import Session

__all__ = ["Session", "run_seconds"]

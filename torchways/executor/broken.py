"""Which runs a broken link has taken values of, so that it can be opened anew.

A value that was sent may not have arrived when its link broke, and the ends notice the break at different times. So the
ends agree by runs, whose ids rise within a client. Each end counts as broken all runs that it had when it gave the link
up, and tells the peer, on the next link, up to which run of each client that is (`newest`). What is broken at one end
is so at both: there it fails, on whatever link. A run behind these had come to neither end, so it has sent nothing over
the old link, and goes over the new one alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torchways.errors import Failure
from torchways.ids import ClientId, RunId, owner


class BrokenLinks:
    """See the module's docstring."""

    def __init__(self) -> None:
        self._newest: dict[str, dict[ClientId, RunId]] = {}
        #: Of the peers of `_newest`.
        self._failures: dict[str, Failure] = {}

    def note(self, peer: str, newest: Mapping[ClientId, RunId], failure: Failure) -> None:
        """Takes note that runs up to the newest of each client are broken between this end and a peer."""
        if not newest:
            return
        self._failures[peer] = failure
        known = self._newest.setdefault(peer, {})
        for client_id, run_id in newest.items():
            known[client_id] = max(run_id, known.get(client_id, run_id))

    def newest(self, peer: str) -> Mapping[ClientId, RunId]:
        """Returns the newest run of each client that is broken between this end and a peer."""
        return self._newest.get(peer, {})

    def failure(self, peer: str, run_id: RunId) -> Failure | None:
        """Returns why a run exchanges no values with a peer; None: it does."""
        known = self._newest.get(peer)
        if known is None or run_id > known.get(owner(run_id), -1):
            return None
        return self._failures.get(peer)

    def drop_client(self, client_id: ClientId) -> None:
        """Forgets a client's runs: none comes any more."""
        for peer, known in list(self._newest.items()):
            known.pop(client_id, None)
            if not known:
                del self._newest[peer], self._failures[peer]

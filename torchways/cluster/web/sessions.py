"""Who may see the page: the cluster's token shows it without names, the operator's secret with them.

A browser sends either once, and gets a cookie that proves no more than that, for some hours. The cookie is not the
token: browsers send a host's cookies to all of its ports.
"""

from __future__ import annotations

import enum
import hmac

from torchways.rpc.identity import Caller, ClusterKey, Role

#: How long a cookie is good for.
SESSION_SECONDS = 12 * 3600


class Viewer(enum.StrEnum):
    """What a request proves."""

    VIEWER = "viewer"
    """Has the cluster's token."""
    OPERATOR = "operator"
    """Has the operator's secret, which the state file of `torchways up` holds."""


class Sessions:
    """Checks secrets and cookies; it keeps no list of sessions.

    Args:
        token: the cluster's.
        key: the cluster's.
    """

    def __init__(self, token: str, key: ClusterKey) -> None:
        self._secrets = {
            Viewer.VIEWER: token.encode(),
            Viewer.OPERATOR: key.secret_of(Caller(Role.OPERATOR)).encode(),
        }
        self._key = key

    def of_secret(self, secret: str) -> Viewer | None:
        """Returns what a secret proves; None: nothing."""
        given = secret.encode("utf-8", "replace")
        proven = [viewer for viewer, known in self._secrets.items() if hmac.compare_digest(given, known)]
        return proven[0] if proven else None

    def of_header(self, header: str) -> Viewer | None:
        """Returns what the header `Authorization` proves."""
        scheme, _, secret = header.partition(" ")
        return self.of_secret(secret) if scheme == "Bearer" else None

    def cookie(self, viewer: Viewer, now: float) -> str:
        """Returns the cookie of who has proved something, at Unix time `now`."""
        ends = int(now) + SESSION_SECONDS
        return f"{viewer}.{ends}.{self._proof(viewer, ends)}"

    def of_cookie(self, cookie: str, now: float) -> Viewer | None:
        """Returns what a cookie proves at Unix time `now`."""
        name, _, rest = cookie.partition(".")
        ends, _, proof = rest.partition(".")
        if name not in set(Viewer) or not (ends.isascii() and ends.isdigit()) or len(ends) > 12:
            return None
        is_right = hmac.compare_digest(proof.encode("utf-8", "replace"), self._proof(name, int(ends)).encode())
        return Viewer(name) if is_right and now < int(ends) else None

    def _proof(self, name: str, ends: int) -> str:
        return self._key.derive(f"web session/{name}/{ends}").hex()

"""What the two ends of a link prove who they are with."""

from __future__ import annotations

import hashlib
import hmac


def link_secret(key: bytes, one: str, other: str) -> bytes:
    """Returns what the two ends of one link have in common, in whichever order they are named."""
    smaller, larger = sorted((one, other))
    return hmac.digest(key, f"link/{smaller}/{larger}".encode(), hashlib.sha256)

"""The cluster's link key: who knows it can open links to the cluster's processes.

The resource manager makes it, node agents pass it on to the processes that they start, and clients never see it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets

from torchways.errors import ConfigError

LINK_KEY_VARIABLE = "TORCHWAYS_LINK_KEY"

_KEY_BYTES = 32


def make_link_key() -> bytes:
    """Returns a new key."""
    return secrets.token_bytes(_KEY_BYTES)


def take_link_key() -> bytes:
    """Returns the key that this process was started with, and removes it from the environment.

    Raises:
        ConfigError: the environment has none, or something else in its place.
    """
    text = os.environ.pop(LINK_KEY_VARIABLE, "")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"no link key: {LINK_KEY_VARIABLE} must be {2 * _KEY_BYTES} hexadecimal digits; "
            "a node agent sets it for the processes that it starts"
        )
    return key


def link_secret(key: bytes, one: str, other: str) -> bytes:
    """Returns what the two ends of one link have in common, in whichever order they are named."""
    smaller, larger = sorted((one, other))
    return hmac.digest(key, f"link/{smaller}/{larger}".encode(), hashlib.sha256)

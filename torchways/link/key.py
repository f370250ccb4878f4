"""What the two ends of a link prove who they are with, and what proves where one listens."""

from __future__ import annotations

import hashlib
import hmac


def link_secret(key: bytes, one: str, other: str) -> bytes:
    """Returns what the two ends of one link have in common, in whichever order they are named."""
    smaller, larger = sorted((one, other))
    return hmac.digest(key, f"link/{smaller}/{larger}".encode(), hashlib.sha256)


def signed_address(key: bytes, name: str, address: str) -> str:
    """Returns where a process listens, with a proof that one which has the key said so."""
    return f"{address}/{_proof(key, name, address)}"


def checked_address(key: bytes, name: str, signed: str) -> str | None:
    """Returns the address that `signed_address` signed for a process; None: it signed none such."""
    address, _, proof = signed.rpartition("/")
    expected = _proof(key, name, address).encode()
    return address if hmac.compare_digest(expected, proof.encode(errors="surrogatepass")) else None


def _proof(key: bytes, name: str, address: str) -> str:
    text = f"address/{len(name)}/{name}/{address}"
    return hmac.digest(key, text.encode(errors="surrogatepass"), hashlib.sha256).hex()

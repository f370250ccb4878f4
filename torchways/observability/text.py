"""Texts of clients as operators may see them: names and messages that reach a terminal or a log."""

from __future__ import annotations

#: Of a name that a client gives, the characters that are kept.
MAX_NAME = 200


def printable(text: str, *, keep: str = "") -> str:
    """Returns a text without what could steer a terminal: each such character, but for `keep`, becomes a "?"."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() or character in keep else "?" for character in text)


def printable_name(name: str) -> str:
    """Returns a name that a client gave as it is kept: short, and printable."""
    return printable(name[:MAX_NAME])

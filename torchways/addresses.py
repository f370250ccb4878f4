"""Addresses of servers as processes tell them to one another: ``host:port``, and ``[host]:port`` for IPv6."""

from __future__ import annotations

import ipaddress
import socket


def address_of(host: str, port: int) -> str:
    """Returns the address of a port of a host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def host_and_port(address: str) -> tuple[str, int]:
    """Returns what `address_of` was given."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def family_of(host: str) -> socket.AddressFamily:
    """Returns the kind of socket that listens on a host."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def is_wildcard(host: str) -> bool:
    """Whether a host stands for all addresses of a machine: one can listen there, and nobody can connect there."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        pass
    try:
        return socket.inet_aton(host) == bytes(4)  # "0", for one
    except OSError:
        return host in ("", "*")

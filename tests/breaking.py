"""Breaks connections between two processes that both live, as a network does."""

import contextlib
import ctypes
import errno
import os
import socket

import psutil
import pytest

_PIDFD_GETFD = 438  # on all of Linux's architectures


def break_connections(pid, other):
    """Breaks every TCP connection between two processes; returns how many there were."""
    theirs = {(item.laddr, item.raddr) for item in _connections(other)}
    found = [item.fd for item in _connections(pid) if (item.raddr, item.laddr) in theirs]
    num_broken = 0
    for fd in found:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            with socket.socket(fileno=_duplicate(pid, fd)) as connection:
                connection.shutdown(socket.SHUT_RDWR)
            num_broken += 1
    return num_broken


def _connections(pid):
    found = psutil.Process(pid).net_connections("tcp")
    return [item for item in found if item.status == psutil.CONN_ESTABLISHED]


def _duplicate(pid, fd):
    """Returns a descriptor of ours for another process's socket."""
    process = os.pidfd_open(pid)
    try:
        ours = ctypes.CDLL(None, use_errno=True).syscall(_PIDFD_GETFD, process, fd, 0)
    finally:
        os.close(process)
    error = ctypes.get_errno()
    if ours < 0 and error in (errno.EPERM, errno.ENOSYS):
        pytest.skip(f"this system does not let a test take another process's socket: {os.strerror(error)}")
    if ours < 0:
        raise OSError(error, os.strerror(error))
    return ours

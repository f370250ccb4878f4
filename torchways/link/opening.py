"""How links come up: a listener for the ends that connect, and the search for a peer from this end.

The end with the larger id connects. A link has two connections, its channels. Each is authenticated for itself
(handshake.py). Whoever connects and does not prove who it is costs its own connection: others are in handshake at the
same time, each has a deadline, and where there are too many, the oldest goes. A peer whose connection went so connects
again.

A link that broke can be opened again, under a higher number: what was admitted under a lower one is not mixed with it.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from torchways.addresses import address_of, family_of, host_and_port
from torchways.link.handshake import ADMITTED, REFUSED, Accepting, Connecting, HandshakeError

logger = logging.getLogger(__name__)

#: The first is for small frames, which nothing may hold up; the second for large ones.
PROMPT, BULK = 0, 1
_CHANNELS = (PROMPT, BULK)

#: Both ends load a program at about the same time; compiling happens elsewhere.
_OPEN_SECONDS = 120.0
#: How often an end that waits for its peer looks whether that still lives.
_LOOK_SECONDS = 1.0
_DIAL_SECONDS = 5.0
#: Longest a connection may take to prove who it is, and how many may do so at a time.
_STRANGER_SECONDS = 5.0
_MAX_STRANGERS = 64
_RETRY_SECONDS = (0.02, 1.0)
#: Peers whose links' numbers are remembered beside those whose connections wait here.
_MAX_NUMBERS = 1_000


class LinkError(Exception):
    """No link to a peer could be opened; says why."""


class Channels(NamedTuple):
    """A link's connections, and its number."""

    prompt: socket.socket
    bulk: socket.socket
    number: int


@dataclasses.dataclass(slots=True)
class _Arrival:
    """A peer's connections for one link: which were admitted, and those that nobody has taken yet."""

    number: int
    admitted: set[int] = dataclasses.field(default_factory=set)
    connections: dict[int, socket.socket] = dataclasses.field(default_factory=dict)
    is_taken: bool = False


class Acceptor:
    """Where others connect: one socket, bound to one address, and a thread that does the handshakes.

    Args:
        me: id of this end.
        host: address to listen on, and no other.
        stranger_seconds: how long a connection may take to prove who it is.

    Attributes:
        address: host:port.
    """

    def __init__(self, me: str, host: str, *, stranger_seconds: float = _STRANGER_SECONDS) -> None:
        self.me = me
        self._stranger_seconds = stranger_seconds
        self._socket = socket.create_server((host, 0), family=family_of(host), backlog=128)
        self._socket.setblocking(False)
        self.address = address_of(host, self._socket.getsockname()[1])
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        #: Connections in handshake and their deadlines (monotonic), oldest first.
        self._strangers: dict[socket.socket, tuple[Accepting, float]] = {}
        threading.Thread(target=self._run, name=f"accept {me}", daemon=True).start()

    def key_of(self, peer: str) -> bytes:
        """Returns the key that this end has in common with who names itself so.

        Raises:
            HandshakeError: it has none.
        """
        raise NotImplementedError

    def admit(self, peer: str, channel: int, number: int) -> Callable[[socket.socket], None] | None:
        """Returns what takes a connection whose other end has proved who it is; None: it is refused."""
        raise NotImplementedError

    # ---- the thread

    def _run(self) -> None:
        while True:
            deadlines = [deadline for _, deadline in self._strangers.values()]
            timeout = max(0.0, deadlines[0] - time.monotonic()) if deadlines else None
            for key, _ in self._selector.select(timeout):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is self._socket:
                    self._accept()
                elif connection in self._strangers:
                    self._go_on(connection)
            now = time.monotonic()
            for connection, (_, deadline) in list(self._strangers.items()):
                if deadline > now:
                    break
                self._dismiss(connection, f"it did not prove who it is in {self._stranger_seconds:g} s")

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:  # it has gone again, or there are no file descriptors left
            logger.warning("a connection could not be accepted: %s", error)
            if self._strangers:
                self._dismiss(next(iter(self._strangers)), "its place is needed")
            else:
                time.sleep(_RETRY_SECONDS[0])
            return
        connection.setblocking(False)
        if len(self._strangers) >= _MAX_STRANGERS:
            self._dismiss(next(iter(self._strangers)), "there are too many others")
        self._strangers[connection] = (Accepting(self.me, self.key_of), time.monotonic() + self._stranger_seconds)
        self._selector.register(connection, selectors.EVENT_READ)

    def _go_on(self, connection: socket.socket) -> None:
        handshake, _ = self._strangers[connection]
        try:
            data = connection.recv(handshake.num_wanted)
            if not data:
                self._dismiss(connection, "it closed the connection")
                return
            answer = handshake.receive(data)
            if answer and connection.send(answer) < len(answer):
                raise HandshakeError("it takes no answer")
            if handshake.is_done:
                self._admit(connection, handshake)
        except BlockingIOError:
            return
        except (OSError, HandshakeError) as error:
            self._dismiss(connection, str(error))

    def _admit(self, connection: socket.socket, handshake: Accepting) -> None:
        take = self.admit(handshake.peer, handshake.channel, handshake.number)
        if take is None:
            connection.send(REFUSED)
            self._dismiss(connection, f"{handshake.peer} needs no other for channel {handshake.channel}")
            return
        connection.send(ADMITTED)
        self._selector.unregister(connection)
        del self._strangers[connection]
        tune(connection)
        take(connection)

    def _dismiss(self, connection: socket.socket, reason: str) -> None:
        logger.info("closing a connection to %s: %s", self.address, reason)
        self._selector.unregister(connection)
        del self._strangers[connection]
        connection.close()


class Listener(Acceptor):
    """Where a process's peers connect for links.

    Args:
        key: the cluster's link key.
    """

    def __init__(self, me: str, host: str, key: bytes, *, stranger_seconds: float = _STRANGER_SECONDS) -> None:
        self.key = key
        #: Called with a peer and a number, on some thread, when the peer opens its link anew under this number, though
        #: the one before was taken: the peer has given that up.
        self.on_anew: Callable[[str, int], None] = lambda peer, number: None
        #: The newest of each peer.
        self._arrivals: dict[str, _Arrival] = {}
        self._changed = threading.Condition()
        super().__init__(me, host, stranger_seconds=stranger_seconds)

    def take(self, peer: str, timeout: float) -> Channels | None:
        """Waits for a peer's connections; returns them, or None after `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_complete(peer), timeout):
                return None
            arrival = self._arrivals[peer]
            arrival.is_taken = True
            prompt, bulk = (arrival.connections.pop(channel) for channel in _CHANNELS)
        return Channels(prompt, bulk, arrival.number)

    def _is_complete(self, peer: str) -> bool:
        arrival = self._arrivals.get(peer)
        return arrival is not None and len(arrival.connections) == len(_CHANNELS)

    def key_of(self, peer: str) -> bytes:
        """See `Acceptor`."""
        if peer <= self.me:
            raise HandshakeError(f"it calls itself {peer!r}, which does not connect to {self.me}")
        return self.key

    def admit(self, peer: str, channel: int, number: int) -> Callable[[socket.socket], None] | None:
        """See `Acceptor`."""
        with self._changed:
            arrival = self._arrivals.get(peer)
            if channel not in _CHANNELS or (arrival is not None and number < arrival.number):
                return None
            if arrival is None or number > arrival.number:
                arrival = self._begin(peer, number)
            if channel in arrival.admitted:
                return None
            arrival.admitted.add(channel)
        admitted = arrival

        def keep(connection: socket.socket) -> None:
            with self._changed:
                admitted.connections[channel] = connection
                self._changed.notify_all()

        return keep

    def _begin(self, peer: str, number: int) -> _Arrival:
        old = self._arrivals.pop(peer, None)
        if old is not None:
            for connection in old.connections.values():
                connection.close()
            if old.is_taken:
                self.on_anew(peer, number)
        for other in [key for key, item in self._arrivals.items() if not item.connections][:-_MAX_NUMBERS]:
            del self._arrivals[other]
        new = self._arrivals[peer] = _Arrival(number)
        return new


def open_channels(listener: Listener, peer: str, address: str) -> Channels:
    """Waits for the link between the listener's process and a peer; returns its connections.

    Args:
        address: host:port of the peer's listener, which exists for as long as the peer.

    Raises:
        LinkError: there is none.
    """
    deadline = time.monotonic() + _OPEN_SECONDS
    if listener.me < peer:
        return _await(listener, peer, address, deadline)
    number = time.monotonic_ns()  # an id is one process's, and so rises with each of its links
    prompt, bulk = (
        connect(functools.partial(Connecting, listener.me, peer, channel, listener.key, number), address, deadline)
        for channel in _CHANNELS
    )
    return Channels(prompt, bulk, number)


def tune(connection: socket.socket) -> None:
    """Has a connection send at once, and notice in some ten seconds that the other machine is gone."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A machine that is gone closes nothing.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The last is for what was sent and not acknowledged, milliseconds: keepalive does not look meanwhile.
    for option, value in (
        ("TCP_KEEPIDLE", 5),
        ("TCP_KEEPINTVL", 2),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 12_000),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _await(listener: Listener, peer: str, address: str, deadline: float) -> Channels:
    while time.monotonic() < deadline:
        taken = listener.take(peer, _LOOK_SECONDS)
        if taken is not None:
            return taken
        try:  # nothing else tells that a peer has died before it connected
            _dial(address, _DIAL_SECONDS).close()
        except TimeoutError:  # there may be many strangers in the way
            continue
        except OSError as error:
            raise LinkError(_unreachable(error)) from error
    raise LinkError(f"it did not connect in {_OPEN_SECONDS:g} s")


def connect(handshake: Callable[[], Connecting], address: str, deadline: float) -> socket.socket:
    """Returns an authenticated connection to where somebody listens, for as long as that somebody lives.

    Args:
        handshake: returns this end's part, for each try.
        address: host:port.
        deadline: of the last try, monotonic seconds.

    Raises:
        LinkError: there is none.
    """
    seconds = deadline - time.monotonic()
    pause = _RETRY_SECONDS[0]
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = _dial(address, min(left, _DIAL_SECONDS))
        except TimeoutError:
            continue
        except OSError as error:
            raise LinkError(_unreachable(error)) from error
        try:
            connection.settimeout(left)
            _shake_hands(connection, handshake())
        except HandshakeError as error:
            connection.close()
            raise LinkError(str(error)) from error
        except OSError as error:  # it may have had to make room among strangers; if it is gone, dialling tells
            connection.close()
            logger.info("connecting to %s again: %s", address, error)
            time.sleep(pause)
            pause = min(2 * pause, _RETRY_SECONDS[1])
        else:
            tune(connection)
            return connection
    raise LinkError(f"it did not answer in {seconds:.0f} s")


def _dial(address: str, timeout: float) -> socket.socket:
    return socket.create_connection(host_and_port(address), timeout)


def _unreachable(error: OSError) -> str:
    return "it is gone" if isinstance(error, ConnectionRefusedError) else f"it cannot be reached ({error})"


def _shake_hands(connection: socket.socket, handshake: Connecting) -> None:
    """Authenticates a connection, which has a timeout.

    Raises:
        HandshakeError: the other end is not the peer, or refuses.
        OSError: the connection ended.
    """
    connection.sendall(handshake.first)
    while not handshake.is_done:
        data = connection.recv(handshake.num_wanted)
        if not data:
            raise ConnectionResetError("it closed the connection during the handshake")
        connection.sendall(handshake.receive(data))

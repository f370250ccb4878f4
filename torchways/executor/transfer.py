"""The data plane: values between executors, without the controller. Each is a frame of a link (torchways/link)."""

from __future__ import annotations

import functools
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import psutil
import torch

from torchways.errors import AccessDenied, Failure
from torchways.executor.received_memory import ReceivedMemory
from torchways.ids import ClientId, RunId
from torchways.link.connection import Frame
from torchways.link.frames import FrameError, Header, Limits
from torchways.link.inbox import Inbox
from torchways.link.key import checked_address, signed_address
from torchways.link.link import SMALL_BYTES, Link
from torchways.link.opening import Listener

#: `_BROKEN`: the newest run of each client of which earlier links have taken values (broken.py).
_VALUE, _FAILURE, _BROKEN = 0, 1, 2
#: A client's id and its newest run.
_NEWEST = struct.Struct("<QQ")
_MAX_NEWEST = SMALL_BYTES // _NEWEST.size
#: After a link has broken, its peer is looked for again so soon; where it broke at once, later.
_AGAIN_SECONDS, _SLOWLY_SECONDS = 0.1, 5.0
_SHORT_SECONDS = 1.0
#: In longer failures texts are shortened, to so many characters that they fit into a small frame in any script.
_LONG_BYTES = 16 << 10
_MAX_CHARACTERS = 1500

#: Called with (peer, run, edge, phase, bytes or failure).
OnArrived: TypeAlias = Callable[[str, RunId, int, int, "torch.Tensor | Failure"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A value to send: a CPU tensor that must not change until `on_sent` (called on some thread), or a failure."""

    run_id: RunId
    edge_id: int
    phase: int
    value: torch.Tensor | Failure
    on_sent: Callable[[Failure | None], None] | None = None


class DataPlane:
    """This executor's end of all its links. All methods are for the thread that waits at the inbox.

    Args:
        executor_id: this executor.
        host: address to listen on, and no other.
        link_key: the cluster's.
        inbox: where that thread waits; callables among its items are called.
        on_arrived: called for each value, of a large one on another thread; `phase` is the sender's. A value is a flat
            uint8 tensor of whatever size came: whoever uses it must check that.
        on_lost: called with (peer, reason) when a link breaks. After that nothing comes over it but what is on its way
            to `on_arrived`, and `connect` opens another.
        newest: returns, for a peer, the newest run of each client that is broken between this end and the peer.
        on_broken: called with (peer, newest run of each client that is broken at the peer's end), which is what the
            peer's `newest` returned when the link was opened.
    """

    def __init__(
        self,
        executor_id: str,
        host: str,
        link_key: bytes,
        inbox: Inbox[Any],
        on_arrived: OnArrived,
        on_lost: Callable[[str, str], None],
        newest: Callable[[str], Mapping[ClientId, RunId]] = lambda peer: {},
        on_broken: Callable[[str, Mapping[ClientId, RunId]], None] = lambda peer, newest: None,
    ) -> None:
        #: A value may come before the program that says how large it is: none is larger than this machine's memory.
        self.limits: Limits = {_VALUE: psutil.virtual_memory().total, _FAILURE: SMALL_BYTES, _BROKEN: SMALL_BYTES}
        self._on_lost = on_lost
        self._newest = newest
        self._on_broken = on_broken
        self._inbox = inbox
        self._on_arrived = on_arrived
        self._link_key = link_key
        self._listener = Listener(executor_id, host, link_key)
        self._listener.on_anew = lambda peer, number: inbox.put(lambda: self._open_anew(peer, number))
        self.address = self._listener.address
        #: For the peers, which get it from clients: these cannot make one up.
        self.signed_address = signed_address(link_key, executor_id, self.address)
        #: Those that are open, or being opened.
        self._links: dict[str, Link] = {}
        #: When each was opened, monotonic seconds.
        self._opened: dict[Link, float] = {}
        self._memory = ReceivedMemory()

    def checked_address(self, peer: str, signed: str) -> str:
        """Returns the address in a peer's signed one, as a client sent it.

        Raises:
            AccessDenied: the peer has not signed it.
        """
        address = checked_address(self._link_key, peer, signed)
        if address is None:
            raise AccessDenied(f"{signed[:100]!r} is not where an executor {peer[:100]!r} of this cluster listens")
        return address

    def connect(self, peer: str, address: str) -> None:
        """Opens the link to a peer in the background, if there is none."""
        if peer not in self._links:
            self._links[peer] = Link(self._listener, peer, address, self._inbox, self)

    def send(self, peer: str, outgoing: Outgoing) -> None:
        """Queues a value; it goes out with `flush` at the latest."""
        value, on_sent = outgoing.value, outgoing.on_sent

        def sent(broken: str | None) -> None:
            if on_sent is not None:
                on_sent(_lost(peer, broken) if broken is not None else None)

        is_failure = isinstance(value, Failure)
        frame = Frame(
            kind=_FAILURE if is_failure else _VALUE,
            label=(outgoing.phase, outgoing.run_id, outgoing.edge_id),
            payload=memoryview(encode_failure(value)) if isinstance(value, Failure) else _bytes_of(value),
            on_sent=sent if on_sent is not None else None,
        )
        link = self._links.get(peer)
        if link is not None:
            link.send(frame)
        elif frame.on_sent is not None:
            frame.on_sent("there is no link to it")

    def flush(self) -> None:
        """Sends what is queued, small values together."""
        for link in self._links.values():
            link.flush()

    def give_memory_back(self) -> None:
        """Gives what is kept for values to come back to the kernel."""
        self._memory.clear()

    def _open_anew(self, peer: str, number: int) -> None:
        """Takes the link that a peer has opened in place of one that this end has taken for whole."""
        link = self._links.get(peer)
        if link is not None and link.number is not None and link.number < number:
            link.lose("its peer has given it up")
            self._forget(link, "its peer has given it up")
            self.connect(peer, link.address)

    def _forget(self, link: Link, reason: str) -> None:
        """Takes note, on this thread, that a link is lost."""
        peer = link.peer
        if self._links.get(peer) is not link:
            return
        del self._links[peer]
        opened = self._opened.pop(link, None)
        self._on_lost(peer, reason)
        if opened is not None:
            # The peer may have a run already that has failed here, and learns so on the next link alone: each end opens
            # it, though no run here needs it. If the peer is gone, that is known at once.
            is_short = time.monotonic() < opened + _SHORT_SECONDS
            again = functools.partial(self.connect, peer, link.address)
            self._inbox.later(_SLOWLY_SECONDS if is_short else _AGAIN_SECONDS, again)

    # ---- what links call (link.Receiver)

    def on_open(self, link: Link) -> None:
        """See `Receiver`."""
        self._opened[link] = time.monotonic()
        entries = [_NEWEST.pack(*entry) for entry in self._newest(link.peer).items()]
        for begin in range(0, len(entries), _MAX_NEWEST):
            data = b"".join(entries[begin : begin + _MAX_NEWEST])
            link.send(Frame(kind=_BROKEN, label=(0, 0, 0), payload=data))

    def on_lost(self, link: Link, reason: str) -> None:
        """See `Receiver`."""
        self._inbox.put(lambda: self._forget(link, reason))

    def allocate(self, size: int) -> tuple[torch.Tensor, memoryview]:
        """See `Receiver`."""
        value = self._memory.take(size)
        return value, value.numpy().data

    def on_frame(self, peer: str, header: Header, payload: bytearray | torch.Tensor) -> None:
        """See `Receiver`."""
        phase, run_id, edge_id = header.label
        if header.kind == _BROKEN:
            if len(payload) % _NEWEST.size or not isinstance(payload, bytearray):
                raise FrameError(f"it sent {len(payload)} bytes of broken runs")
            self._on_broken(peer, {ClientId(client): RunId(run) for client, run in _NEWEST.iter_unpack(payload)})
            return
        if header.kind == _FAILURE:
            assert isinstance(payload, bytearray)
            value: torch.Tensor | Failure = decode_failure(payload)
        elif isinstance(payload, bytearray):
            value = torch.frombuffer(payload, dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
        else:
            value = payload
        self._on_arrived(peer, RunId(run_id), edge_id, phase, value)


def encode_failure(failure: Failure) -> bytes:
    """Returns a failure as JSON of at most `SMALL_BYTES`: of long texts the beginning, of tracebacks the end."""
    content = asdict(failure)
    data = json.dumps(content, ensure_ascii=False).encode(errors="replace")
    if len(data) > _LONG_BYTES:
        texts = {name: text[:_MAX_CHARACTERS] for name, text in content.items() if isinstance(text, str)}
        texts["traceback"] = failure.traceback[-_MAX_CHARACTERS:]
        data = json.dumps({**content, **texts}, ensure_ascii=False).encode(errors="replace")
    return data


def decode_failure(data: bytes | bytearray) -> Failure:
    """Reads what `encode_failure` wrote.

    Raises:
        FrameError: that is not what it is.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"it sent a failure that is not JSON: {error}") from None
    types = {field.name: int if field.name == "run_id" else str for field in fields(Failure)}
    if not isinstance(content, dict) or content.keys() != types.keys():
        raise FrameError(f"it sent a failure without the fields {', '.join(types)}")
    for name, value in content.items():
        if type(value) is not types[name] or not _fits(value):
            raise FrameError(f"it sent a failure whose {name} is wrong")
    return Failure(**content)


def _fits(value: str | int) -> bool:
    """Whether protobuf takes a value, in which a failure goes on to the user."""
    if isinstance(value, int):
        return 0 <= value < 1 << 64
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _lost(peer: str, reason: str) -> Failure:
    return Failure(kind="ExecutorLost", message=f"executor {peer} is lost, or the link to it ({reason})")


def _bytes_of(value: torch.Tensor) -> memoryview:
    """Returns a tensor's bytes; where it is contiguous, without a copy."""
    flat = value.contiguous().reshape(-1)
    return (flat if flat.dtype == torch.uint8 else flat.view(torch.uint8)).numpy().data

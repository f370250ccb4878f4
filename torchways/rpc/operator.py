"""The operator's end of the cluster: what `torchways status`, `top`, `stacks` and `trace` ask the resource manager."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import grpc
import grpc.aio

from torchways.errors import AccessDenied, ClusterLost, DeadlineExceeded
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Caller, Role, metadata
from torchways.rpc.spans import Span, span_from_proto

_T = TypeVar("_T")

_CALL_SECONDS = 10.0
_TRACE_SECONDS = 30.0


class OperatorAccess(NamedTuple):
    """Where a cluster is and what proves who asks; without `operator_secret`, the token alone."""

    address: str
    token: str
    operator_secret: str = ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call."""
        if not self.operator_secret:
            return metadata(self.token)
        return metadata(self.token, Caller(Role.OPERATOR), self.operator_secret)


class Stacks(NamedTuple):
    """What a process printed; `text` is empty where it printed nothing in time."""

    name: str
    pid: int
    host: str
    text: str


class ClusterTrace(NamedTuple):
    """What processes did: the spans of each, by its name, and why others have none."""

    spans: dict[str, list[Span]]
    missing: dict[str, str]


class OperatorClient:
    """One connection to the resource manager; see `connected`."""

    def __init__(self, access: OperatorAccess, opened: grpc.aio.Channel) -> None:
        self._access = access
        self._stub = pb_grpc.OperatorStub(opened)

    async def observe(self) -> pb.Observation:
        """Returns what the cluster does now.

        Raises:
            ClusterLost, AccessDenied, DeadlineExceeded: as all methods.
        """
        with _explained(self._access):
            return await self._stub.Observe(
                pb.ObserveRequest(), metadata=self._access.metadata(), timeout=_CALL_SECONDS
            )

    async def stacks(self, pids: Sequence[int] = (), names: Sequence[str] = ()) -> list[Stacks]:
        """Has processes print their stacks; all of them where none is named."""
        request = pb.DumpStacksRequest(pids=pids, names=names)
        with _explained(self._access):
            answers = self._stub.DumpStacks(request, metadata=self._access.metadata(), timeout=_CALL_SECONDS)
            return [Stacks(answer.name, answer.pid, answer.host, answer.text) async for answer in answers]

    async def trace(self, since_ns: int) -> ClusterTrace:
        """Returns the spans of each scheduler, executor and client that ended after a time.

        Times are those of the resource manager's clock. Devices have their numbers on the island, as in the track
        "island 0 device 3".
        """
        request = pb.TraceRequest(since_ns=since_ns)
        found = ClusterTrace({}, {})
        with _explained(self._access):
            async for part in self._stub.CollectTrace(
                request, metadata=self._access.metadata(), timeout=_TRACE_SECONDS
            ):
                if part.missing:
                    found.missing[part.name] = part.missing
                else:
                    found.spans.setdefault(part.name, []).extend(_on_island(part))
        return found


def _on_island(part: pb.ProcessSpans) -> list[Span]:
    """Returns a process's spans, those of an executor on tracks of the island's devices."""
    island = part.name.partition(" i")[2].partition(".")[0]
    tracks = {f"device {n}": f"island {island} device {index}" for n, index in enumerate(part.device_indices)}
    spans = map(span_from_proto, part.spans)
    return [span._replace(track=tracks.get(span.track, span.track)) for span in spans]


class _explained:
    """Raises what went wrong with a call as one of torchways' errors."""

    def __init__(self, access: OperatorAccess) -> None:
        self._access = access

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, grpc.aio.AioRpcError):
            return
        address = self._access.address
        match error.code():
            case grpc.StatusCode.UNAUTHENTICATED:
                raise AccessDenied(
                    f"the cluster at {address} refuses this token: is it that of another cluster?"
                ) from error
            case grpc.StatusCode.PERMISSION_DENIED:
                raise AccessDenied(
                    f"this needs the operator's secret of the cluster at {address}, which is in the state file that "
                    "`torchways up` made: name it by --state; the token alone shows no stacks and traces"
                ) from error
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded(f"the cluster at {address} did not answer in time") from error
        raise ClusterLost(
            f"the cluster at {address} cannot be reached ({error.code().name}): has it ended? `torchways up` starts one"
        ) from error


@asynccontextmanager
async def connected(access: OperatorAccess) -> AsyncIterator[OperatorClient]:
    """Opens a connection."""
    async with channel.open_channel(access.address) as opened:
        yield OperatorClient(access, opened)


def ask(access: OperatorAccess, question: Callable[[OperatorClient], Coroutine[Any, Any, _T]]) -> _T:
    """Asks one thing on a connection of its own, and waits for the answer."""

    async def run() -> _T:
        async with connected(access) as client:
            return await question(client)

    return asyncio.run(run())

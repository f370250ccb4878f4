"""gRPC channels and servers as torchways uses them: callers that prove who they are, dead peers noticed.

Every call carries the cluster's token and, but for a newcomer's, who makes it (identity.py); a server refuses others.
A process that ends is noticed at once, and a peer whose machine is gone within about ten seconds: nothing acknowledges
what was sent. A process that is stopped (Ctrl-Z, a debugger) is taken for gone after about a minute: it answers no
pings, and the calls that are open end. One that is busy answers them: gRPC's own threads do, without Python's lock. A
stream has a call that is open as long as it is (streams.py).
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from torchways.addresses import address_of
from torchways.errors import ClusterLost, ConfigError
from torchways.rpc.identity import IDENTITY_KEY, TOKEN_KEY, Caller, Identifies, Role, may_call

logger = logging.getLogger(__name__)

TOKEN_VARIABLE = "TORCHWAYS_TOKEN"

#: A larger message is refused before it is parsed. What may be larger goes in chunks (`PutBuffer`) or on a stream.
MAX_MESSAGE_BYTES = 8 << 20

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    ("grpc.http2.ping_timeout_ms", 60_000),  # of a process that is stopped: its kernel still acknowledges
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS: list[tuple[str, Any]] = [
    *_OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
]


def cluster_token() -> str:
    """Returns the token that this process was started with.

    Raises:
        ConfigError: the environment has none.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token:
        raise ConfigError(
            f"no cluster token: set {TOKEN_VARIABLE} to the token that the cluster was started with "
            "(twrun and tw.init() set it for the processes that they start)"
        )
    return token


def open_channel(address: str) -> grpc.aio.Channel:
    """Returns a channel to `address` (host:port); pass `identity.metadata` with each call on it."""
    return grpc.aio.insecure_channel(address, options=_OPTIONS)


def caller(context: grpc.aio.ServicerContext, key: Identifies) -> Caller:
    """Returns who makes the call that a method of `make_server`'s server handles."""
    return _caller(context.invocation_metadata(), key)


def _caller(metadata: Any, key: Identifies) -> Caller:
    for name, value in metadata or ():
        if name == IDENTITY_KEY:
            found = key.identify(value if isinstance(value, str) else value.decode("ascii", "replace"))
            return found or Caller(Role.NEWCOMER)
    return Caller(Role.NEWCOMER)


class _Gatekeeper(grpc.aio.ServerInterceptor):
    """Refuses every call that does not carry the cluster's token, or that its caller's role may not make."""

    def __init__(self, token: str, key: Identifies) -> None:
        self._token = token.encode()
        self._key = key

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        metadata = handler_call_details.invocation_metadata
        sent: Sequence[str | bytes] = [value for name, value in metadata or () if name == TOKEN_KEY]
        given = sent[0] if sent else b""
        given = given.encode() if isinstance(given, str) else given
        if not hmac.compare_digest(given, self._token):
            logger.warning("refused a call of %s without the cluster's token", handler_call_details.method)
            return _refusal_like(
                handler, grpc.StatusCode.UNAUTHENTICATED, "this cluster needs its token; set TORCHWAYS_TOKEN"
            )
        who = _caller(metadata, self._key)
        if may_call(who, handler_call_details.method):
            return handler
        logger.warning("refused a call of %s by %s", handler_call_details.method, who)
        return _refusal_like(handler, grpc.StatusCode.PERMISSION_DENIED, f"{who} may not call this")


def _refusal_like(handler: grpc.RpcMethodHandler, code: grpc.StatusCode, reason: str) -> grpc.RpcMethodHandler:
    """Returns a handler of the same arity as `handler` that refuses every call, and parses nothing of it."""

    async def refuse(request_or_iterator: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, reason)

    async def refuse_stream(request_or_iterator: object, context: grpc.aio.ServicerContext) -> Any:
        await refuse(request_or_iterator, context)
        yield  # pragma: no cover - makes this an async generator

    name = ("stream" if handler.request_streaming else "unary") + (
        "_stream" if handler.response_streaming else "_unary"
    )
    make = getattr(grpc, f"{name}_rpc_method_handler")
    return make(
        refuse_stream if handler.response_streaming else refuse,
        request_deserializer=None,
        response_serializer=handler.response_serializer,
    )


def make_server(token: str, key: Identifies) -> grpc.aio.Server:
    """Returns an unstarted server that refuses callers without `token`, and calls that are not the caller's to make."""
    return grpc.aio.server(interceptors=[_Gatekeeper(token, key)], options=_SERVER_OPTIONS)


async def start_server(server: grpc.aio.Server, host: str) -> str:
    """Starts `server` on a free port of `host` (loopback unless told otherwise) and returns its address."""
    port = server.add_insecure_port(address_of(host, 0))
    await server.start()
    return address_of(host, port)


def lost(what: str, error: grpc.aio.AioRpcError) -> ClusterLost:
    """Returns the error that a failed call to `what` raises in the user's process."""
    return ClusterLost(f"{what} cannot be reached ({error.code().name}: {error.details()}); see its log")

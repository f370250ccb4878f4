"""Who calls, and what they may do: roles of processes, clients and their secrets, owners of what is named.

A cluster has one random key. Its own processes have it (their node agent passes it on in their environment), clients
have not. From it derive a secret for each client, which the resource manager gives it when it attaches, and one for
each role. So whoever has the key can tell from a call alone who makes it: no process keeps a list of clients.

The cluster's token lets a client attach, and no more.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torchways.errors import AccessDenied, ConfigError
from torchways.ids import BufferId, ClientId, ProgramId, RunId, SliceId, owner

CLUSTER_KEY_VARIABLE = "TORCHWAYS_CLUSTER_KEY"
#: Of a data process: the secret of its client.
CLIENT_SECRET_VARIABLE = "TORCHWAYS_CLIENT_SECRET"

#: Metadata of a call: the cluster's token, and "role:client id:secret".
TOKEN_KEY = "torchways-token"
IDENTITY_KEY = "torchways-identity"

_KEY_BYTES = 32
_NO_CLIENT = ClientId(0)


class Role(enum.StrEnum):
    """What a caller is."""

    NEWCOMER = "newcomer"
    """Has the cluster's token, and is not attached."""
    CLIENT = "client"
    NODE = "node"
    MANAGER = "manager"
    SCHEDULER = "scheduler"
    OPERATOR = "operator"
    """Runs the cluster: who can read the state file of `torchways up`. Sees what all clients do."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call; `client_id` is 0 for all but clients."""

    role: Role
    client_id: ClientId = _NO_CLIENT

    def __str__(self) -> str:
        return f"client {self.client_id}" if self.role is Role.CLIENT else f"a {self.role}"


#: Who may call what. A method that is not here may be called by nobody.
METHODS: Mapping[str, frozenset[Role]] = {
    "ResourceManager/Attach": frozenset({Role.NEWCOMER}),
    "ResourceManager/ReserveSlice": frozenset({Role.CLIENT}),
    "ResourceManager/WaitSlice": frozenset({Role.CLIENT}),
    "ResourceManager/ReleaseSlice": frozenset({Role.CLIENT}),
    "ResourceManager/StartDataProcess": frozenset({Role.CLIENT}),
    "ResourceManager/WaitDataProcess": frozenset({Role.CLIENT}),
    "ResourceManager/EndDataProcess": frozenset({Role.CLIENT}),
    "ResourceManager/DescribeCluster": frozenset({Role.CLIENT, Role.NEWCOMER}),
    "ResourceManager/JoinNode": frozenset({Role.NODE}),
    "ResourceManager/AnswerTrace": frozenset({Role.CLIENT}),
    "ResourceManager/CutOffExecutor": frozenset({Role.SCHEDULER}),
    "RunOrder/OrderRuns": frozenset({Role.SCHEDULER}),
    "Operator/Observe": frozenset({Role.OPERATOR, Role.NEWCOMER}),
    "Operator/DumpStacks": frozenset({Role.OPERATOR}),
    "Operator/CollectTrace": frozenset({Role.OPERATOR}),
    "Scheduler/Connect": frozenset({Role.CLIENT}),
    "Scheduler/AddSlice": frozenset({Role.MANAGER}),
    "Scheduler/RemoveSlice": frozenset({Role.MANAGER}),
    "Scheduler/RemoveExecutor": frozenset({Role.MANAGER}),
    "Scheduler/GetStatus": frozenset({Role.MANAGER}),
    "Scheduler/DescribePrograms": frozenset({Role.OPERATOR}),
    "Scheduler/CollectTrace": frozenset({Role.CLIENT, Role.MANAGER, Role.OPERATOR}),
    "Executor/Control": frozenset({Role.SCHEDULER}),
    "Executor/PutBuffer": frozenset({Role.CLIENT}),
    "Executor/ReadBuffers": frozenset({Role.CLIENT}),
    "Executor/SaveBuffers": frozenset({Role.CLIENT}),
    "Executor/LoadBuffers": frozenset({Role.CLIENT}),
    "Executor/GetStatus": frozenset({Role.CLIENT, Role.MANAGER}),
    "Executor/CollectTrace": frozenset({Role.CLIENT, Role.MANAGER, Role.OPERATOR}),
    "DataProcess/OpenDataset": frozenset({Role.CLIENT}),
    "DataProcess/BeginPass": frozenset({Role.CLIENT}),
    "DataProcess/TakeBatch": frozenset({Role.CLIENT}),
}


class Identifies(Protocol):
    """What tells who makes a call: the cluster's key, or, without it, one identity that is known."""

    def identify(self, text: str) -> Caller | None:
        """Returns the caller that a call's identity proves; None: it proves nothing."""


@dataclass(frozen=True, slots=True)
class OneIdentity:
    """One client's identity, in a process that has been given no more; see `Identifies`."""

    caller: Caller
    secret: str = field(repr=False)

    def __str__(self) -> str:
        """As in the metadata of its calls."""
        return f"{self.caller.role}:{self.caller.client_id}:{self.secret}"

    def identify(self, text: str) -> Caller | None:
        """See `Identifies`."""
        return self.caller if hmac.compare_digest(text.encode(), str(self).encode()) else None


def may_call(caller: Caller, method: str) -> bool:
    """Whether a caller may call a method, "/torchways.v1.Scheduler/Connect"."""
    return caller.role in METHODS.get(method.rpartition(".")[2], frozenset())


class ClusterKey:
    """The key that a cluster's own processes share, and what derives from it."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    def hex(self) -> str:
        """Returns it as text, for the environment of a process of the cluster."""
        return self._key.hex()

    def derive(self, label: str) -> bytes:
        """Returns a secret that says nothing of the key, nor of secrets with other labels."""
        return hmac.digest(self._key, label.encode(), hashlib.sha256)

    def secret_of(self, caller: Caller) -> str:
        """Returns what a caller proves its role with."""
        return self.derive(f"{caller.role}/{caller.client_id}").hex()

    def identify(self, text: str) -> Caller | None:
        """Returns the caller that a call's identity proves; None: it proves nothing."""
        role, _, rest = text.partition(":")
        number, _, secret = rest.partition(":")
        if role not in set(Role) or not number.isascii() or not number.isdigit() or len(number) > 10:
            return None
        caller = Caller(Role(role), ClientId(int(number)))
        is_right = hmac.compare_digest(secret.encode(), self.secret_of(caller).encode())
        return caller if is_right and caller.role is not Role.NEWCOMER else None


def new_cluster_key() -> ClusterKey:
    """Returns a random key."""
    return ClusterKey(secrets.token_bytes(_KEY_BYTES))


def take_cluster_key() -> ClusterKey:
    """Returns the key that this process was started with, and removes it from the environment.

    Raises:
        ConfigError: the environment has none, or something else in its place.
    """
    text = os.environ.pop(CLUSTER_KEY_VARIABLE, "")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(
            f"no cluster key: {CLUSTER_KEY_VARIABLE} must be {2 * _KEY_BYTES} hexadecimal digits; "
            "the node agent sets it for the processes that it starts"
        )
    return ClusterKey(key)


def metadata(token: str, caller: Caller | None = None, secret: str = "") -> tuple[tuple[str, str], ...]:
    """Returns the metadata of a call: of a newcomer, or of a caller that proves who it is."""
    if caller is None:
        return ((TOKEN_KEY, token),)
    return ((TOKEN_KEY, token), (IDENTITY_KEY, f"{caller.role}:{caller.client_id}:{secret}"))


def check_owner(
    client_id: ClientId,
    *,
    ids: Iterable[ProgramId | RunId | BufferId] = (),
    slices: Iterable[SliceId] = (),
    owners: Mapping[SliceId, ClientId] | None = None,
) -> None:
    """Checks that a client owns all that it names.

    Args:
        client_id: who names it.
        ids: of programs, runs and buffers, which say whose they are.
        slices: whose they are, `owners` says; one that is not there is gone, and nothing can be done to it.

    Raises:
        AccessDenied: something belongs to another.
    """
    for identity in ids:
        if owner(identity) != client_id:
            raise AccessDenied(f"client {client_id} names {identity}, which is not its own")
    for slice_id in slices:
        if owners is not None and owners.get(slice_id, client_id) != client_id:
            raise AccessDenied(f"client {client_id} names slice {slice_id}, which is not its own")

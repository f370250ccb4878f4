"""Values over the local socket: what comes is placed, and what is not the sender's, or no value, is refused."""

import os
import socket
import tempfile

import pytest
import torch

from torchways.errors import AccessDenied, InfraError, UserError
from torchways.executor.local_values import LocalValues
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.identity import Caller, ClusterKey, OneIdentity, Role
from torchways.rpc.local_socket import HEADER
from torchways.rpc.local_values import LocalExecutors, shareable

KEY = ClusterKey(bytes(32))
FIRST = 1 << 40


def identity(client_id=1, role=Role.CLIENT):
    caller = Caller(role, client_id)
    return OneIdentity(caller, KEY.secret_of(caller))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Yields the path of a socket, and what came over it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        events = []
        values = LocalValues("token", KEY, 2, events.append)
        yield values.address, events
        values.close()


def chunk(tensor, buffer_id=FIRST, placements=("S(0)",), mesh=(2,)):
    dtype = str(tensor.dtype).removeprefix("torch.")
    spec = pb.TensorSpec(dtype=dtype, shape=tensor.shape, placements=placements)
    return pb.PutChunk(buffer_id=buffer_id, slice_id=3, mesh_shape=mesh, value=pb.HostValue(spec=spec))


def put(path, *tensors, who=None, token="token", **options):
    executors = LocalExecutors([path], token, str(who or identity()))
    try:
        executors.put([(chunk(tensor, FIRST + i, **options), shareable(tensor)) for i, tensor in enumerate(tensors)])
    finally:
        executors.close()


def test_values_of_all_sizes_arrive_in_order(server):
    path, events = server
    tensors = [
        torch.rand(40, 500),
        torch.arange(6.0),
        torch.empty(0, 2),
        torch.rand(500, 60).t(),
        *[torch.ones(2)] * 70,
    ]
    tensors.append(torch.rand(100, 1000).share_memory_()[20:40])  # a part of a file
    put(path, *tensors)
    assert [event.buffer_id - FIRST for event in events] == list(range(len(tensors)))
    for event, tensor in zip(events, tensors, strict=True):
        assert torch.equal(event.data.view(tensor.dtype).reshape(tensor.shape), tensor)
        assert (event.slice_id, event.spec.placements, event.nbytes) == (3, ("S(0)",), -(-tensor.nbytes // 2))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"who": identity(2)}, AccessDenied, "client 2 names"),
        ({"who": identity(1, Role.SCHEDULER)}, AccessDenied, "does not prove whose it is"),
        ({"who": OneIdentity(Caller(Role.CLIENT, 1), "guess")}, AccessDenied, "does not prove whose it is"),
        ({"token": "another"}, AccessDenied, "does not prove whose it is"),
        ({"mesh": (3,)}, UserError, r"a mesh \(3,\) is not one of 2 devices"),
        ({"placements": ("S(9)",)}, UserError, "there is no placement"),
    ],
)
def test_what_is_not_the_senders_is_refused_and_others_go_on(server, options, error, match):
    path, events = server
    for size in (4, 40_000):
        with pytest.raises(error, match=match):
            put(path, torch.ones(size), **options)
    assert events == []
    put(path, torch.ones(4))
    assert len(events) == 1


def send(path, message, fd=None, *, says_file=None):
    """Sends one message by hand; returns the failure that answers it, None where the connection ends."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(path)
        has_file = fd is not None if says_file is None else says_file
        socket.send_fds(connection, [HEADER.pack(len(message), has_file)], [fd] if fd is not None else [])
        try:
            connection.sendall(message)
            head = connection.recv(HEADER.size)
        except ConnectionError:
            return None
        return pb.LocalPutResponse.FromString(connection.recv(1 << 16)).failure if head else None


def test_files_that_are_too_short_or_none_cost_their_sender_the_value_alone(server, tmp_path):
    path, events = server
    message = pb.LocalPut(token="token", identity=str(identity()), put=chunk(torch.ones(40_000))).SerializeToString()
    short = tmp_path / "short"
    short.write_bytes(bytes(159_999))
    fd = os.open(short, os.O_RDONLY)
    assert "has fewer than 0 + 160,000 bytes" in send(path, message, fd).message
    os.close(fd)
    read, write = os.pipe()
    assert "has fewer than" in send(path, message, read).message
    os.close(read)
    os.close(write)
    huge = pb.LocalPut(token="token", identity=str(identity()), put=chunk(torch.empty(1 << 40, device="meta")))
    memory = os.memfd_create("sparse")
    os.truncate(memory, 1 << 42)
    assert "cannot be read" in send(path, huge.SerializeToString(), memory).message
    assert "40000" in send(path, message).message.replace(",", "")  # no content at all
    assert send(path, message, memory, says_file=False) is None
    assert send(path, message, says_file=True) is None
    assert "message cannot be read" in send(path, b"\xff\xff").message
    os.close(memory)
    assert events == []
    before = len(os.listdir("/proc/self/fd"))
    put(path, torch.ones(40_000))
    assert len(events) == 1
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_no_executor_no_value(tmp_path):
    with pytest.raises(InfraError, match=r"cannot be reached at .*nothing"):
        LocalExecutors([str(tmp_path / "nothing")], "token", "x")


def test_the_path_may_be_longer_than_a_sockets(tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 200)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    events = []
    values = LocalValues("token", KEY, 2, events.append)
    put(values.address, torch.ones(4))
    assert len(events) == 1
    values.close()

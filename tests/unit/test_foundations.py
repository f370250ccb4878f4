"""Errors, meshes, ids, messages, traces: what everything stands on."""

import asyncio

import grpc
import pytest
from torch.distributed.tensor import Replicate, Shard

from torchways import errors
from torchways.config import ClusterConfig
from torchways.ids import ClientId, client_range, owner
from torchways.mesh import VirtualSlice, check_mesh, normalize_placements, tensor_text
from torchways.observability.trace import chrome_trace
from torchways.rpc import channel, convert, identity
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.spans import Span


@pytest.mark.parametrize("cls", errors.ERROR_CLASSES.values())
def test_every_error_crosses_processes_as_itself(cls):
    failure = errors.Failure(kind=cls.__name__, message="what happened", source="train.py:3 in step", run_id=7)
    error = convert.failure_from_proto(convert.failure_to_proto(failure)).to_error()
    assert type(error) is cls
    assert "what happened" in str(error)
    assert "train.py:3 in step" in str(error)


def test_an_unknown_error_is_our_bug():
    failure = errors.failure_from(ZeroDivisionError("x"), process="executor i0.e1")
    assert isinstance(failure.to_error(), errors.InternalError)
    assert "ZeroDivisionError: x" in str(failure.to_error())


def test_remote_errors_carry_function_line_and_traceback():
    failure = errors.Failure(
        kind="RemoteError", message="m", function="f/0", source="a.py:1 in f", traceback="Traceback ...", run_id=3
    )
    error = failure.to_error()
    assert (error.function, error.source, error.run_id) == ("f/0", "a.py:1 in f", 3)
    assert "remote traceback:\nTraceback ..." in str(error)


def test_ids_name_their_client():
    first, end = client_range(ClientId(3))
    assert owner(first) == owner(end - 1) == 3
    assert owner(end) == 4


def test_meshes_are_spelled_as_device_meshes():
    mesh = VirtualSlice(shape=(2, 4), mesh_dim_names=("dp", "tp"))
    assert (mesh.size(), mesh.size(1), mesh.ndim, str(mesh)) == (8, 4, 2, "('dp'=2,'tp'=4)")
    assert (mesh["tp"].shape, mesh["tp"].root) == ((4,), mesh)
    assert normalize_placements([Shard(0), Replicate()], mesh, (4, 4)) == ("S(0)", "R")
    assert normalize_placements([Replicate(), Shard(-1)], mesh, (4, 4)) == ("R", "S(1)")
    assert normalize_placements(("tp", None), mesh, (4, 4)) == ("R", "S(0)")
    assert normalize_placements((None, ("dp", "tp")), mesh, (4, 8)) == ("S(1)", "S(1)")
    assert normalize_placements((), mesh, (4, 4)) == ("R", "R")
    assert normalize_placements([Shard(0)], mesh["tp"], (4, 4)) == ("R", "S(0)")
    assert tensor_text("float32", (2048, 256), ("S(0)", "R")) == "fp32[2048,256][S(0)]"
    assert tensor_text("int64", (), ("R", "R")) == "int64[][R]"
    with pytest.raises(errors.PlacementError, match=r"no axis 'pp'; its axes are \('dp', 'tp'\)"):
        mesh["pp"]
    with pytest.raises(errors.PlacementError, match="1 placements"):
        normalize_placements([Shard(0)], mesh, (4, 4))
    with pytest.raises(errors.PlacementError, match="unknown placement 'P'"):
        normalize_placements(["P", "R"], mesh, (4, 4))
    with pytest.raises(errors.PlacementError, match="different from each other"):
        check_mesh((2, 2), ("dp", "dp"))


@pytest.mark.parametrize(
    "bad",
    [
        {"islands": 0},
        {"devices_per_island": -1},
        {"platform": "gpu"},
        {"policy": "fairest"},
        {"policy": "module:"},
        {"policy": ":Class"},
        {"max_weight": 0.0},
        {"max_weight": float("inf")},
        {"max_priority": -1},
        {"metrics_port": 70_000},
        {"log_format": "xml"},
    ],
)
def test_bad_cluster_settings(bad):
    [(name, value)] = bad.items()
    with pytest.raises(errors.ConfigError, match=rf"{name} must be.*{value}"):
        ClusterConfig(**bad)


def test_chrome_trace_has_named_rows():
    spans = [
        Span(name="f", track="device 0", start_ns=2_000, end_ns=5_000, run_id=1),
        Span(name="send", track="transfer", start_ns=5_000, end_ns=6_000, run_id=1, sent_bytes=8),
    ]
    events = chrome_trace({"i0.e1": spans})["traceEvents"]
    assert [event["args"].get("name") for event in events] == ["i0.e1", "device 0", "transfer", None, None]
    assert [(event["ts"], event["dur"]) for event in events[3:]] == [(0, 3), (3, 1)]
    assert [event["args"].get("sent_bytes") for event in events[3:]] == [None, 8]


def test_a_caller_without_the_token_is_refused():
    class Manager(pb_grpc.ResourceManagerServicer):
        async def DescribeCluster(self, request, context):
            return pb.ClusterInfo()

        async def Attach(self, request, context):
            yield pb.ClusterEvent()

    async def call():
        server = channel.make_server("right", identity.new_cluster_key())
        pb_grpc.add_ResourceManagerServicer_to_server(Manager(), server)
        address = await channel.start_server(server, "127.0.0.1")
        assert address.startswith("127.0.0.1:")
        async with channel.open_channel(address) as open_channel:
            stub = pb_grpc.ResourceManagerStub(open_channel)
            request = pb.DescribeClusterRequest()
            assert await stub.DescribeCluster(request, metadata=identity.metadata("right"), timeout=5)
            for metadata in (identity.metadata("wrong"), None):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.DescribeCluster(request, metadata=metadata, timeout=5)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Attach(pb.AttachRequest(), metadata=metadata, timeout=5).read()
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        await server.stop(0)

    asyncio.run(asyncio.wait_for(call(), 30))

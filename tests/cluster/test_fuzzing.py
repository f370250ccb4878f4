"""Random messages to every method: no process ends, and another client's results stay right.

What a client may call is tried as a client; what only the cluster's processes may call, as they would, but for what
names the victim: they could end it in good order.
"""

import asyncio
import contextlib
import random

import grpc
import pytest

from tests.cluster.test_access import attacker, victim  # noqa: F401 (a fixture)
from tests.streams import Lost, TestStream
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.identity import Role

_LABELS = ("float32", "int64", "R", "S(0)", "S(7)", "dp", "", "\x00", "os", "x" * 300)


def random_message(dice, message, numbers, depth=0):
    """Fills a message with fields of any kind; `numbers` are ids that mean something."""
    for field in message.DESCRIPTOR.fields:
        if dice.random() < (0.25 if depth else 0.1):
            continue
        many = field.is_repeated
        count = dice.choice((0, 1, 1, 2, 3)) if many else 1
        for _ in range(count):
            if field.type == field.TYPE_MESSAGE:
                if depth < 6:
                    part = getattr(message, field.name)
                    random_message(dice, part.add() if many else part, numbers, depth + 1)
                    if not many:
                        part.SetInParent()
                continue
            value = _value(dice, field, numbers)
            if many:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)
    return message


def _value(dice, field, numbers):
    match field.type:
        case field.TYPE_STRING:
            return dice.choice(_LABELS)
        case field.TYPE_BYTES:
            return dice.randbytes(dice.choice((0, 1, 8, 100)))
        case field.TYPE_DOUBLE | field.TYPE_FLOAT:
            return dice.choice((0.0, 1.5, float("nan"), float("inf")))
        case field.TYPE_BOOL:
            return dice.random() < 0.5
        case field.TYPE_INT64 | field.TYPE_INT32 | field.TYPE_SINT32:
            return dice.choice((0, 1, 2, 4, -1, 1 << 20, (1 << 31) - 1))
        case field.TYPE_UINT32:
            return dice.choice((0, 1, 2, 3, 7, 1 << 20, (1 << 32) - 1))
    return dice.choice((*numbers, 0, (1 << 64) - 1))


async def open_stream(method, messages, metadata, codes):
    """Sends messages on a stream, and notes the error that it ends with, if it does."""
    call = method(iter(messages), metadata=metadata, timeout=5)
    try:
        await asyncio.wait_for(call.read(), 0.2)
    except TimeoutError:
        pass
    except grpc.aio.AioRpcError as error:
        codes.append(error.code())
    finally:
        call.cancel()


async def say(method, messages, metadata, codes, request=None):
    """Says something on a stream of ours, and sees whether there is an answer."""
    try:
        stream = await TestStream.opened(
            method(request or pb.OpenStream(), metadata=metadata, timeout=5), pb.ReadAnswer
        )
    except grpc.aio.AioRpcError as error:
        codes.append(error.code())
        return
    stream.send(*messages)
    with contextlib.suppress(TimeoutError, Lost):
        await asyncio.wait_for(stream.read(), 0.2)
    stream.close()


async def fuzz(victim, dice, num_messages):  # noqa: F811
    async with attacker(victim) as (client_id, mine, (manager, scheduler, executor)):
        request = pb.ReserveSliceRequest(shape=[1], axis_names=["x"])
        slice_id = (await manager.ReserveSlice(request, metadata=mine)).reservation.slice_id
        await manager.WaitSlice(pb.WaitSliceRequest(slice_id=slice_id), metadata=mine)
        first = (client_id << 40) + 1
        own = [first, first + 1, first + 2, slice_id]
        numbers = [
            1,
            2,
            *own,
            *own,
            victim.buffer_id,
            victim.slice_id,
            victim.program_ids[0],
            victim.program_ids[0] + 5,
        ]

        codes = []

        async def one_call(method, message, *, streams_in=False, streams_out=False):
            random_message(dice, message, numbers)
            try:
                call = method(iter([message]) if streams_in else message, metadata=mine, timeout=0.5)
                if streams_out:
                    async for _ in call:
                        pass
                else:
                    await call
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())

        def many(kind):
            return [random_message(dice, kind(), numbers) for _ in range(20)]

        sent = 0
        while sent < num_messages:
            await say(scheduler.Connect, many(pb.ClientMessage), mine, codes)
            await say(executor.ReadBuffers, many(pb.ReadRequest), mine, codes)
            await one_call(executor.PutBuffer, pb.PutChunk(), streams_in=True)
            await one_call(executor.CollectTrace, pb.TraceRequest(), streams_out=True)
            await one_call(executor.GetStatus, pb.StatusRequest())
            await one_call(manager.ReleaseSlice, pb.ReleaseSliceRequest())
            await one_call(manager.DescribeCluster, pb.DescribeClusterRequest())
            await one_call(manager.ReserveSlice, pb.ReserveSliceRequest())
            await one_call(manager.WaitSlice, pb.WaitSliceRequest())
            await one_call(manager.StartDataProcess, pb.StartDataProcessRequest())
            await one_call(manager.WaitDataProcess, pb.WaitDataProcessRequest())
            await one_call(manager.EndDataProcess, pb.EndDataProcessRequest())
            await one_call(manager.AnswerTrace, pb.TraceAnswer(), streams_in=True)
            sent += 51
        # Refused, answered with an error, or waiting for what never comes; the processes are there.
        assert grpc.StatusCode.UNAVAILABLE not in codes


async def fuzz_as_the_cluster(victim, dice, num_messages):  # noqa: F811
    """Random messages with the roles of the cluster's own processes."""
    foreign = 77 << 40
    numbers = [foreign + number for number in range(4)] + [900, 901]
    codes = []
    async with contextlib.AsyncExitStack() as stack:
        manager, order, operator, scheduler, executor = [
            stub(await stack.enter_async_context(channel.open_channel(address)))
            for stub, address in (
                (pb_grpc.ResourceManagerStub, victim.manager),
                (pb_grpc.RunOrderStub, victim.manager),
                (pb_grpc.OperatorStub, victim.manager),
                (pb_grpc.SchedulerStub, victim.scheduler),
                (pb_grpc.ExecutorStub, victim.executor),
            )
        ]

        async def one_call(role, method, message, *, streams_out=False):
            random_message(dice, message, numbers)
            try:
                call = method(message, metadata=victim.metadata_of(role), timeout=0.5)
                if streams_out:
                    async for _ in call:
                        pass
                else:
                    await call
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())

        sent = 0
        while sent < num_messages:
            await one_call(Role.SCHEDULER, manager.CutOffExecutor, pb.CutOffExecutorRequest())
            await one_call(Role.MANAGER, scheduler.AddSlice, pb.AddSliceRequest())
            await one_call(Role.MANAGER, scheduler.RemoveSlice, pb.RemoveSliceRequest())
            await one_call(Role.MANAGER, scheduler.RemoveExecutor, pb.RemoveExecutorRequest())
            await one_call(Role.MANAGER, scheduler.GetStatus, pb.SchedulerStatusRequest())
            await one_call(Role.MANAGER, executor.GetStatus, pb.StatusRequest())
            await one_call(Role.OPERATOR, operator.Observe, pb.ObserveRequest())
            await one_call(Role.OPERATOR, operator.CollectTrace, pb.TraceRequest(), streams_out=True)
            await one_call(Role.OPERATOR, operator.DumpStacks, pb.DumpStacksRequest(), streams_out=True)
            commands = [random_message(dice, pb.ExecutorCommand(), numbers) for _ in range(20)]
            # These it would rightly do: hold its computations back, and drop the victim.
            rightly = {"set_grants_needed", "drop_client"}
            commands = [item for item in commands if item.WhichOneof("command") not in rightly]
            await say(executor.Control, commands, victim.metadata_of(Role.SCHEDULER), codes)
            asked = [random_message(dice, pb.OrderEvent(), numbers) for _ in range(5)]
            await say(
                order.OrderRuns, asked, victim.metadata_of(Role.SCHEDULER), codes, pb.OrderRunsRequest(island_id=7)
            )
            events = [random_message(dice, pb.NodeEvent(), numbers) for _ in range(2)]
            events = [event for event in events if not event.HasField("joined")]
            await open_stream(manager.JoinNode, events, victim.metadata_of(Role.NODE), codes)
            sent += 32
        assert grpc.StatusCode.UNAVAILABLE not in codes


def run(victim, seed, num_messages):  # noqa: F811
    asyncio.run(asyncio.wait_for(fuzz(victim, random.Random(seed), num_messages), 500))
    victim.is_well()


@pytest.mark.parametrize("seed", range(2))
def test_random_messages_of_the_clusters_own_processes_disturb_nobody(victim, seed):  # noqa: F811
    asyncio.run(asyncio.wait_for(fuzz_as_the_cluster(victim, random.Random(seed), 250), 500))
    victim.is_well()


@pytest.mark.parametrize("seed", range(2))
def test_random_messages_disturb_nobody(victim, seed):  # noqa: F811
    run(victim, seed, 250)


@pytest.mark.slow
def test_ten_thousand_random_messages_disturb_nobody(victim):  # noqa: F811
    for seed in range(10):
        run(victim, 100 + seed, 1000)
        asyncio.run(asyncio.wait_for(fuzz_as_the_cluster(victim, random.Random(200 + seed), 1000), 500))
        victim.is_well()

"""Random messages to every method that a client may call: no process ends, and another client's results stay right."""

import asyncio
import random

import grpc
import pytest

from tests.cluster.test_access import attacker, victim  # noqa: F401 (a fixture)
from torchways.rpc import torchways_pb2 as pb

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
        case field.TYPE_INT64 | field.TYPE_INT32:
            return dice.choice((0, 1, 2, 4, -1, 1 << 20, (1 << 31) - 1))
        case field.TYPE_UINT32:
            return dice.choice((0, 1, 2, 3, 7, 1 << 20, (1 << 32) - 1))
    return dice.choice((*numbers, 0, 1, 2, (1 << 64) - 1))


async def fuzz(victim, dice, num_messages):  # noqa: F811
    async with attacker(victim) as (client_id, mine, (manager, scheduler, executor)):
        request = pb.ReserveSliceRequest(shape=[1], axis_names=["x"])
        slice_id = (await manager.ReserveSlice(request, metadata=mine)).reservation.slice_id
        await manager.WaitSlice(pb.WaitSliceRequest(slice_id=slice_id), metadata=mine)
        first = (client_id << 40) + 1
        own = [first, first + 1, first + 2, slice_id]
        numbers = [*own, *own, victim.buffer_id, victim.slice_id, victim.program_ids[0], victim.program_ids[0] + 5]

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

        async def connect():
            def messages():
                yield pb.ClientMessage(hello=pb.ClientHello())
                for _ in range(20):
                    yield random_message(dice, pb.ClientMessage(), numbers)

            stream = scheduler.Connect(iter([pb.ClientMessages(messages=list(messages()))]), metadata=mine, timeout=5)
            try:
                await asyncio.wait_for(stream.read(), 0.2)
            except TimeoutError:
                pass
            except grpc.aio.AioRpcError as error:
                codes.append(error.code())
            finally:
                stream.cancel()

        sent = 0
        while sent < num_messages:
            await connect()
            await one_call(executor.PutBuffer, pb.PutChunk(), streams_in=True)
            await one_call(executor.FetchBuffer, pb.FetchRequest(), streams_out=True)
            await one_call(executor.CollectTrace, pb.TraceRequest())
            await one_call(manager.ReserveSlice, pb.ReserveSliceRequest())
            await one_call(manager.WaitSlice, pb.WaitSliceRequest())
            sent += 25
        # Refused, answered with an error, or waiting for what never comes; the processes are there.
        assert grpc.StatusCode.UNAVAILABLE not in codes


def run(victim, seed, num_messages):  # noqa: F811
    asyncio.run(asyncio.wait_for(fuzz(victim, random.Random(seed), num_messages), 500))
    victim.is_well()


@pytest.mark.parametrize("seed", range(2))
def test_random_messages_disturb_nobody(victim, seed):  # noqa: F811
    run(victim, seed, 250)


@pytest.mark.slow
def test_ten_thousand_random_messages_disturb_nobody(victim):  # noqa: F811
    for seed in range(10):
        run(victim, 100 + seed, 1000)

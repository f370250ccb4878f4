"""Streams and the calls that hold them: each ends with the other, and nothing of either stays."""

import asyncio

import grpc
import pytest

from tests.streams import StreamEnd, calls_of, offering
from torchways.link.opening import LinkError
from torchways.rpc import streams
from torchways.rpc.identity import new_cluster_key


def on_a_loop(test):
    """Runs a test's coroutine with an `Offering` and calls of it; all must be over in the end, and no offer be left."""

    def run():
        async def with_offering():
            key = new_cluster_key()
            async with offering(key) as (service, address), calls_of(address, key) as call:
                await test(service, call)
                while service.num_calls or [  # noqa: ASYNC110 - nothing else tells
                    task for task in asyncio.all_tasks() if "stream" in task.get_name()
                ]:
                    await asyncio.sleep(0.01)
                assert service.server._offers == {}

        asyncio.run(asyncio.wait_for(with_offering(), 60))

    run.__name__ = test.__name__
    return run


async def connected(service, call):
    near = StreamEnd()
    opened = call()
    await streams.open_offered(opened, near.stream)
    return near, await service.ends.get(), opened


@on_a_loop
async def test_a_stream_that_is_closed_ends_its_call_and_what_was_sent_before_arrives(service, call):
    near, far, opened = await connected(service, call)
    messages = [b"%d" % number for number in range(1000)]
    for message in messages:
        near.stream.send(message)
    near.stream.flush()
    near.stream.close()
    assert [await far.arrived.get() for _ in messages] == messages
    assert await far.lost.get() == "the connection was closed"
    assert await opened.code() is grpc.StatusCode.CANCELLED
    assert near.lost.empty()


@on_a_loop
async def test_a_stream_that_is_lost_where_it_was_offered_ends_its_call(service, call):
    near, far, opened = await connected(service, call)
    far.stream.lose("it has had enough")
    assert await near.lost.get() == "the connection was closed"
    assert (await opened.code()) in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)  # whichever end was first


@on_a_loop
async def test_a_call_that_ends_takes_its_stream_along_at_both_ends(service, call):
    near, far, opened = await connected(service, call)
    opened.cancel()  # as if it were lost
    assert (await near.lost.get()).startswith("it does not answer any more: ")
    assert far.stream.is_closed or await far.lost.get()


@on_a_loop
async def test_a_stream_that_was_closed_before_it_is_open_ends_its_call(service, call):
    near, opened = StreamEnd(), call()
    near.stream.close()
    await streams.open_offered(opened, near.stream)
    assert await opened.code() is grpc.StatusCode.CANCELLED
    assert await (await service.ends.get()).lost.get() == "the connection was closed"


@on_a_loop
async def test_who_gives_up_before_it_is_connected_leaves_no_offer(service, call):
    opened = call()
    await opened.read()
    assert len(service.server._offers) == 1
    opened.cancel()


@on_a_loop
async def test_a_stream_that_is_not_to_be_had_any_more_ends_its_call(service, call):
    service.refuses = True
    near, opened = StreamEnd(), call()
    await streams.open_offered(opened, near.stream)
    assert await near.lost.get() == "the connection was closed"
    assert await opened.code() in (grpc.StatusCode.OK, grpc.StatusCode.CANCELLED)


def test_an_offer_that_nobody_takes_ends(monkeypatch):
    monkeypatch.setattr(streams, "OFFER_SECONDS", 0.1)

    @on_a_loop
    async def run(service, call):
        opened = call()
        await opened.read()
        assert await opened.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await opened.details() == "nobody connected in 0.1 s"

    run()


@on_a_loop
async def test_an_offer_that_does_not_come_in_time_is_no_connection(service, call):
    async def silent(context, *_):
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "offer", silent)
        with pytest.raises(LinkError, match=r"it did not answer in 0\.1 s"):
            await streams.open_offered(call(), StreamEnd().stream, 0.1)

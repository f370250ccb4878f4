"""A client's stream of reads, message by message."""

import asyncio
from collections import defaultdict

import torch

import torchways as tw
from tests.streams import TestStream
from torchways.api import _current as current_session
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc


def test_reads_of_one_stream_have_one_answer_each_and_none_if_given_up():
    with tw.init(islands=1, devices_per_island=1):
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        large = tw.distribute_tensor(torch.arange(3 << 20), mesh)
        small = tw.distribute_tensor(torch.arange(3.0), mesh)
        session = current_session()
        large.cpu(), small.cpu()
        big, little = large._buffer.buffer_id, small._buffer.buffer_id
        nothing = session.new_ids(1)
        requests = [
            pb.ReadRequest(read_id=1, buffer_id=big),
            pb.ReadRequest(read_id=2, buffer_id=little),
            pb.ReadRequest(read_id=2, buffer_id=big),
            pb.ReadRequest(read_id=3, buffer_id=nothing),
            pb.ReadRequest(read_id=3, give_up=True),
            pb.ReadRequest(read_id=4, buffer_id=little, only_ready=True),
            pb.ReadRequest(read_id=5, buffer_id=nothing, only_ready=True),
            pb.ReadRequest(read_id=6, give_up=True),
            pb.ReadRequest(read_id=7, buffer_id=nothing),
        ]
        late = [pb.ReadRequest(read_id=7, give_up=True), pb.ReadRequest(read_id=8, buffer_id=little)]
        address = session.slices.address(mesh).executors[0].address

        async def read():
            found = defaultdict(list)
            async with channel.open_channel(address) as opened:
                call = pb_grpc.ExecutorStub(opened).ReadBuffers(
                    pb.OpenStream(), metadata=session.connections.manager.metadata
                )
                stream = await TestStream.opened(call, pb.ReadAnswer)
                stream.send(*requests)
                while not {8, 1} <= {read_id for read_id, answers in found.items() if answers[-1].is_last}:
                    answer = await stream.read()
                    found[answer.read_id].append(answer)
                    if answer.read_id == 5:  # so the seventh waits by now
                        stream.send(*late)
                stream.close()
            return found

        found = asyncio.run(asyncio.wait_for(read(), 60))
        assert set(found) == {1, 2, 4, 5, 8}
        for answers in found.values():
            assert [answer.is_last for answer in answers] == [False] * (len(answers) - 1) + [True]
        assert len(found[1]) > 1
        assert torch.equal(
            torch.frombuffer(bytearray(b"".join(answer.data for answer in found[1])), dtype=torch.int64), large.cpu()
        )
        assert [list(found[1][0].spec.shape), found[1][0].spec.dtype] == [[3 << 20], "int64"]
        assert found[2][0].data == found[8][0].data == torch.arange(3.0).numpy().tobytes()
        assert (found[4][0].ready, found[5][0].ready) == (True, False)

"""What a client may not do: each attack is tried with the cluster's token, and another client goes on undisturbed."""

import asyncio
import contextlib

import grpc
import pytest
import torch

import torchways as tw
from tests.streams import Lost, TestStream
from torchways.api import _current as current_session
from torchways.config import ClusterConfig
from torchways.launch.embedded import start_cluster
from torchways.rpc import channel
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc import torchways_pb2_grpc as pb_grpc
from torchways.rpc.channel import TOKEN_VARIABLE
from torchways.rpc.identity import CLUSTER_KEY_VARIABLE, Caller, Role, metadata, new_cluster_key
from torchways.rpc.operator import OperatorAccess, connected

ELEMENTS = torch.arange(4.0).numpy().tobytes()
SPEC = {"dtype": "float32", "shape": [4], "placements": ["R"]}


@pytest.fixture(scope="module")
def victim():
    """A session that computes; yields what an attacker may have learnt of it, and a check that it is undisturbed."""
    tw.shutdown()
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        key = new_cluster_key()
        patch.setenv(CLUSTER_KEY_VARIABLE, key.hex())
        cluster = start_cluster(ClusterConfig(islands=1, devices_per_island=1))
        stack.callback(cluster.close)
        patch.delenv(CLUSTER_KEY_VARIABLE)
        patch.setenv("TORCHWAYS_ADDRESS", cluster.address)
        patch.setenv(TOKEN_VARIABLE, cluster.token)
        stack.enter_context(tw.init())
        mesh = tw.init_device_mesh((1,), mesh_dim_names=("dp",))
        weight = tw.distribute_tensor(torch.ones(4), mesh)

        @tw.program(mesh=mesh)
        def step(x):
            return (weight + x).sum()

        def is_well():
            assert weight.tolist() == [1.0] * 4
            assert step(torch.ones(4)).item() == 8.0

        is_well()
        yield Victim(cluster, key, mesh, weight._buffer.buffer_id, is_well)


class Victim:
    def __init__(self, cluster, key, mesh, buffer_id, is_well):
        session = current_session()
        address = session.slices.address(mesh)
        self.manager, self.token = cluster.address, cluster.token
        self.scheduler, self.executor = address.scheduler_address, address.executors[0].address
        self.client_id, self.slice_id, self.buffer_id = session.connections.manager.client_id, mesh.slice_id, buffer_id
        self.program_ids = list(session.programs._programs)
        self.executor_id = address.executors[0].executor_id
        self.is_well, self.key = is_well, key
        operator_secret = key.secret_of(Caller(Role.OPERATOR))
        self.operator_access = OperatorAccess(self.manager, self.token, operator_secret)

    def metadata_of(self, role):
        """What a process of the cluster calls with."""
        caller = Caller(role)
        return metadata(self.token, caller, self.key.secret_of(caller))


@contextlib.asynccontextmanager
async def attacker(victim):
    """An attached client: yields its id, its metadata, and stubs of all services."""
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(channel.open_channel(address))
            for address in (victim.manager, victim.scheduler, victim.executor)
        ]
        stubs = (
            pb_grpc.ResourceManagerStub(opened[0]),
            pb_grpc.SchedulerStub(opened[1]),
            pb_grpc.ExecutorStub(opened[2]),
        )
        told = stubs[0].Attach(pb.AttachRequest(name="attacker"), metadata=metadata(victim.token))
        attached = (await told.read()).attached
        me = Caller(Role.CLIENT, attached.client_id)
        yield attached.client_id, metadata(victim.token, me, attached.secret), stubs


def attack(victim, action):
    """Runs `action(client_id, metadata, stubs)` as an attacker; then the victim must be well."""

    async def run():
        async with attacker(victim) as (client_id, mine, stubs):
            await asyncio.wait_for(action(client_id, mine, *stubs), 60)

    asyncio.run(run())
    victim.is_well()


@contextlib.contextmanager
def refused(code=grpc.StatusCode.PERMISSION_DENIED):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() == code


def test_status_tells_a_client_nothing_of_another(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        told = await executor.GetStatus(pb.StatusRequest(), metadata=mine)
        assert not told.client_bytes
        for _ in range(100):  # until what the victim has read last is given back
            everything = await executor.GetStatus(pb.StatusRequest(), metadata=victim.metadata_of(Role.MANAGER))
            if everything.client_bytes[victim.client_id] == 16:
                return
            await asyncio.sleep(0.1)
        pytest.fail(f"the victim has {everything.client_bytes}")

    attack(victim, action)


async def connect(scheduler, metadata):
    return await TestStream.opened(scheduler.Connect(pb.OpenStream(), metadata=metadata), pb.SchedulerMessage)


async def open_reads(executor, metadata):
    return await TestStream.opened(executor.ReadBuffers(pb.OpenStream(), metadata=metadata), pb.ReadAnswer)


async def read(executor, metadata, buffer_id):
    stream = await open_reads(executor, metadata)
    stream.send(pb.ReadRequest(read_id=1, buffer_id=buffer_id))
    answers = [await stream.read()]
    while not answers[-1].is_last:
        answers.append(await stream.read())
    stream.close()
    return answers


def test_buffers_of_another_are_not_read_nor_written(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        assert [answer.failure.kind for answer in await read(executor, mine, victim.buffer_id)] == ["AccessDenied"]
        value = pb.HostValue(spec=pb.TensorSpec(**SPEC), data=ELEMENTS)
        chunk = pb.PutChunk(buffer_id=victim.buffer_id, value=value, slice_id=victim.slice_id, mesh_shape=[1])
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await executor.PutBuffer(iter([chunk]), metadata=mine)

    attack(victim, action)


def test_buffers_of_another_are_not_saved_nor_loaded(victim, tmp_path):
    async def action(client_id, mine, manager, scheduler, executor):
        spec = pb.TensorSpec(**SPEC)

        async def saved(buffer_id, folder=tmp_path, prefix="__"):
            buffers = [pb.NamedBuffer(name="x", buffer_id=buffer_id, spec=spec)]
            request = pb.SaveRequest(folder=str(folder), prefix=prefix, buffers=buffers)
            return [answer.failure.kind async for answer in executor.SaveBuffers(request, metadata=mine)]

        async def loaded(buffer_id, piece):
            buffer = pb.LoadedBuffer(buffer_id=buffer_id, spec=spec, pieces=[piece])
            request = pb.LoadRequest(slice_id=victim.slice_id, mesh_shape=[1], buffers=[buffer])
            return (await executor.LoadBuffers(request, metadata=mine)).failure.kind

        own = (client_id << 40) + 1
        assert await saved(victim.buffer_id) == ["AccessDenied"]
        assert await saved(own, folder="relative") == ["CheckpointError"]
        assert await saved(own, prefix="../../x") == ["UserError"]
        assert list(tmp_path.iterdir()) == []
        # A pickle that would run code, bytes that are no file of ours, a box outside the tensor, and one too few.
        marker = tmp_path / "ran"
        torch.save({"x": Marker(marker)}, tmp_path / "pickle")
        (tmp_path / "noise").write_bytes(bytes(range(256)))
        box = {"source": [0], "target": [0], "sizes": [4]}
        for name in ("pickle", "noise", "none"):
            piece = pb.Piece(file=str(tmp_path / name), length=1 << 20, **box)
            assert await loaded(own, piece) == "CheckpointError"
            assert await loaded(own, pb.Piece(file=str(tmp_path / name), key="x", **box)) == "CheckpointError"
            assert await loaded(victim.buffer_id, piece) == "AccessDenied"
        torch.save(torch.ones(4), tmp_path / "good")
        size = (tmp_path / "good").stat().st_size
        for wrong in ({"target": [1 << 40]}, {"target": [-2]}, {"sizes": [2]}, {"sizes": []}):
            piece = pb.Piece(file=str(tmp_path / "good"), length=size, **{**box, **wrong})
            assert await loaded(own, piece) == "CheckpointError", wrong
        assert not marker.exists()

    attack(victim, action)


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def messages_of(victim, client_id):
    """What an attacker may tell a scheduler, and whether it is answered; programs and runs fail with a typed error."""
    mine = client_id << 40
    part = pb.SliceProgram(slice_id=victim.slice_id, mesh_shape=[1])
    arguments = [pb.SliceArguments(slice_id=victim.slice_id, arguments=b"\xff not a message")]
    program_id = victim.program_ids[0]
    theirs = pb.RunProgram(program_id=program_id, run_id=mine + 9, first_buffer_id=mine + 10, slices=arguments)
    forged = pb.RunProgram(
        program_id=program_id, run_id=program_id + 1000, first_buffer_id=program_id + 1001, slices=arguments
    )
    return [
        (pb.ClientMessage(run_program=theirs), "AccessDenied"),
        (pb.ClientMessage(run_program=forged), "AccessDenied"),
        (
            pb.ClientMessage(register_program=pb.RegisterProgram(program_id=mine + 1, name="p", slices=[part])),
            "AccessDenied",
        ),
        (pb.ClientMessage(forget_program=pb.ForgetProgram(program_id=program_id)), None),
        (
            pb.ClientMessage(
                release_buffers=pb.ReleaseBuffers(slice_id=victim.slice_id, buffer_ids=[victim.buffer_id])
            ),
            None,
        ),
        (pb.ClientMessage(close_slice=pb.CloseSlice(slice_id=victim.slice_id)), None),
    ]


def test_programs_runs_buffers_and_slices_of_another_are_not_touched(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        attacks = messages_of(victim, client_id)

        stream = await connect(scheduler, mine)
        stream.send(*(message for message, _ in attacks))
        answers = [await stream.read() for _ in range(3)]
        kinds = [getattr(answer, answer.WhichOneof("message")).failure.kind for answer in answers]
        assert kinds == ["AccessDenied"] * 3
        stream.close()
        with refused():
            await manager.ReleaseSlice(pb.ReleaseSliceRequest(slice_id=victim.slice_id), metadata=mine)
        info = await manager.WaitSlice(pb.WaitSliceRequest(slice_id=victim.slice_id), metadata=mine)
        assert info.failure.kind == "AccessDenied"

    attack(victim, action)


def test_nobody_is_another_client_nor_a_process_of_the_cluster(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        secret = dict(mine)["torchways-identity"].rpartition(":")[2]
        for caller in (Caller(Role.CLIENT, victim.client_id), Caller(Role.NODE), Caller(Role.SCHEDULER)):
            forged = metadata(victim.token, caller, secret)
            with refused():
                await scheduler.Connect(pb.OpenStream(), metadata=forged).read()
            with refused():
                await manager.ReserveSlice(pb.ReserveSliceRequest(shape=[1], axis_names=["x"]), metadata=forged)
        for known in (mine, metadata(victim.token)):
            with refused():
                # It says nothing: what gRPC raises for a message to a call that is refused meanwhile is chance.
                await manager.JoinNode(iter([]), metadata=known).read()
            with refused():
                await executor.Control(pb.OpenStream(), metadata=known).read()
            async with channel.open_channel(victim.manager) as opened:
                with refused():
                    await pb_grpc.RunOrderStub(opened).OrderRuns(pb.OrderRunsRequest(), metadata=known).read()
            with refused():
                await manager.CutOffExecutor(pb.CutOffExecutorRequest(executor_id=victim.executor_id), metadata=known)
            with refused():
                await scheduler.AddSlice(pb.AddSliceRequest(slice_id=99), metadata=known)
            with refused():
                await scheduler.RemoveSlice(pb.RemoveSliceRequest(slice_id=victim.slice_id), metadata=known)
            with refused():
                await scheduler.RemoveExecutor(pb.RemoveExecutorRequest(executor_id=victim.executor_id), metadata=known)

    attack(victim, action)


def test_streams_end_with_what_is_no_message_and_are_few(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        stream = await connect(scheduler, mine)
        with refused(grpc.StatusCode.ALREADY_EXISTS):
            await connect(scheduler, mine)
        stream.send(b"\xff\xff")
        with pytest.raises(Lost):
            await stream.read()
        # Reads: so many streams and no more; another client's are none of them.
        streams = []
        for _ in range(8):
            streams.append(await open_reads(executor, mine))
            streams[-1].send(pb.ReadRequest(read_id=1, buffer_id=(client_id << 40) + 1, only_ready=True))
            assert (await streams[-1].read()).is_last
        with pytest.raises(Lost):
            await (await open_reads(executor, mine)).read()
        streams[0].send(b"\xff\xff")
        with pytest.raises(Lost):
            await streams[0].read()
        again = await open_reads(executor, mine)
        again.send(pb.ReadRequest(read_id=1, buffer_id=(client_id << 40) + 1, only_ready=True))
        assert (await again.read()).is_last
        victim.is_well()
        for opened in (*streams[1:], again):
            opened.close()

    attack(victim, action)


def test_programs_without_end_cost_a_client_its_stream(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        stream = await connect(scheduler, mine)
        for number in range(16_384):
            program = pb.RegisterProgram(program_id=(client_id << 40) + number, name="n" * 2_000)
            stream.send(pb.ClientMessage(register_program=program))
            assert (await stream.read()).program_ready.failure.kind == "InternalError"  # it has no parts
        known = victim.metadata_of(Role.OPERATOR)
        listed = await scheduler.DescribePrograms(pb.ProgramsRequest(), metadata=known)
        assert {len(item.name) for item in listed.programs if item.program_id >> 40 == client_id} == {200}
        stream.send(pb.ClientMessage(register_program=pb.RegisterProgram(program_id=(client_id << 40) + 20_000)))
        with pytest.raises(Lost):
            await stream.read()

    attack(victim, action)


def test_what_is_too_large_is_refused(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        large = bytes(channel.MAX_MESSAGE_BYTES)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await executor.PutBuffer(iter([pb.PutChunk(more=large)]), metadata=mine)
        with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
            await manager.Attach(pb.AttachRequest(name=large.decode()), metadata=metadata(victim.token)).read()
        # More than the value that was announced.
        value = pb.HostValue(spec=pb.TensorSpec(**SPEC), data=ELEMENTS)
        chunk = pb.PutChunk(buffer_id=(client_id << 40) + 1, slice_id=1, mesh_shape=[1], value=value)
        with refused(grpc.StatusCode.INVALID_ARGUMENT):
            await executor.PutBuffer(iter([chunk, pb.PutChunk(more=b"x")]), metadata=mine)

    attack(victim, action)


def forged_spans(victim):
    """Spans that would have been another's, or made a trace of years."""
    whole = {"start_ns": -(1 << 63), "end_ns": (1 << 63) - 1}
    run_id, client_id = victim.program_ids[0], victim.client_id
    return [
        pb.Span(name="forged", kind="dispatch", run_id=run_id, client_id=client_id, edge_id=1, sent_bytes=9, **whole),
        pb.Span(name="forged", kind="compute", track="device 0", run_id=run_id, client_id=client_id, **whole),
        pb.Span(name="forged", kind="read", action="no action", loop=1, **whole),
    ]


@pytest.mark.parametrize(
    ("says", "missing"),
    [
        (
            lambda victim: [
                pb.TraceResponse(now_ns=1 << 61, clock_id="x"),
                pb.TraceResponse(spans=forged_spans(victim)),
            ],
            "",
        ),
        (lambda victim: [pb.TraceResponse(now_ns=-5)], "it has no time that could be"),
        (
            lambda victim: [pb.TraceResponse(clock_id="x" * (1 << 20))] * 9,
            "it sent more than 20,001 spans or 8,388,608 bytes",
        ),
        (lambda victim: [], "it did not answer within 5 s"),
        (None, "it did not answer within 5 s"),
    ],
    ids=["forged", "no time", "too much", "nothing", "silence"],
)
def test_a_clients_spans_spoil_nobodys_trace(victim, says, missing):
    """An operator has a trace of all others, whatever one client answers."""

    async def run():
        async with channel.open_channel(victim.manager) as opened, connected(victim.operator_access) as operator:
            manager = pb_grpc.ResourceManagerStub(opened)
            told = manager.Attach(pb.AttachRequest(name="attacker"), metadata=metadata(victim.token))
            attached = (await told.read()).attached
            mine = metadata(victim.token, Caller(Role.CLIENT, attached.client_id), attached.secret)

            async def answer():
                while (event := await told.read()) is not grpc.aio.EOF:
                    number = event.trace_wanted.number
                    for forged in (mine, metadata(victim.token)):  # for another, and as nobody
                        with refused():
                            wrong = pb.TraceAnswer(number=number + 1000)
                            await manager.AnswerTrace(iter([wrong]), metadata=forged)
                    if says is not None:
                        answers = [pb.TraceAnswer(number=number, response=response) for response in says(victim)]
                        with contextlib.suppress(grpc.aio.AioRpcError):
                            await manager.AnswerTrace(iter(answers), metadata=mine)

            answering = asyncio.create_task(answer())
            before = (await operator.observe()).time_ns
            await asyncio.to_thread(victim.is_well)
            trace = await operator.trace(before)
            answering.cancel()
            me, them = f"client {attached.client_id}", f"client {victim.client_id}"
            assert trace.missing == ({me: missing} if missing else {})
            assert {"dispatch", "read"} == {span.kind for span in trace.spans[them]}
            assert {span.client_id for span in trace.spans[them]} == {victim.client_id}
            runs = {span.run_id for span in trace.spans[them] if span.kind == "dispatch"}
            assert runs <= {span.run_id for spans in trace.spans.values() for span in spans if span.kind == "admitted"}
            for span in trace.spans.get(me, ()):
                assert (span.name, span.run_id, span.client_id) == ("forged", 0, attached.client_id)
                assert (span.kind, span.edge_id, span.sent_bytes, span.part_of) == (span.track, None, 0, None)
                assert span.start_ns >= before
            assert len(trace.spans.get(me, ())) == (0 if missing else 2)

    asyncio.run(run())
    victim.is_well()


def malformed_parts(slice_id):
    """Parts that cannot be carried out: each would have ended an executor that believed it."""
    spec = pb.TensorSpec(**SPEC)
    archive = pb.Function(name="f", graph=b"PK\x03\x04" + bytes(100))
    compute = pb.Instruction(compute=pb.Compute(inputs=[0], outputs=[1]))

    def part(mesh_shape=(1,), **fields):
        return pb.SliceProgram(
            slice_id=slice_id, mesh_shape=mesh_shape, part=pb.Part(**{"slots": [spec, spec], **fields})
        )

    return {
        "another mesh": part(mesh_shape=[3]),
        "a negative mesh": part(mesh_shape=[-1, -1], slots=[]),
        "no such function": part(num_args=1, instructions=[compute]),
        "an archive": part(num_args=1, instructions=[compute], functions=[archive]),
        "a value from nowhere": part(functions=[archive], instructions=[compute]),
        "a value that is not there": part(
            num_args=1,
            functions=[archive],
            instructions=[pb.Instruction(compute=pb.Compute(inputs=[0], outputs=[1 << 30]))],
        ),
        "more arguments than values": part(num_args=1 << 31),
        "no such dtype": part(slots=[pb.TensorSpec(dtype="os", shape=[1], placements=["R"])]),
        "no such shape": part(slots=[pb.TensorSpec(dtype="float32", shape=[-4], placements=["R"])]),
        "no such placement": part(slots=[pb.TensorSpec(dtype="float32", shape=[4], placements=["S(9)"])]),
        "a stranger": part(num_args=1, instructions=[pb.Instruction(send=pb.Send(slot=0, peer=77))]),
        "an edge that is used twice": part(num_args=1, instructions=[pb.Instruction(send=pb.Send(slot=0, peer=0))] * 2),
        "no result": part(num_args=1, results=[pb.ResultSlot(slot=1)]),
        "nothing": part(instructions=[pb.Instruction()]),
    }


def test_a_client_chooses_no_address_of_an_executor(victim):
    """An executor that believed one would give up its link to a peer, for all clients."""

    async def action(client_id, mine, manager, scheduler, executor):
        request = pb.ReserveSliceRequest(shape=[1], axis_names=["x"])
        slice_id = (await manager.ReserveSlice(request, metadata=mine)).reservation.slice_id
        info = await manager.WaitSlice(pb.WaitSliceRequest(slice_id=slice_id), metadata=mine)
        stream = await connect(scheduler, mine)
        signed = info.executors[0].data_address
        address, _, proof = signed.rpartition("/")
        part = pb.Part(
            slots=[pb.TensorSpec(**SPEC)], num_args=1, instructions=[pb.Instruction(send=pb.Send(slot=0, peer=1))]
        )
        for number, data_address in enumerate(("127.0.0.1:1", f"127.0.0.1:1/{proof}", address, signed, "")):
            program = pb.RegisterProgram(program_id=(client_id << 40) + number, name="p")
            program.slices.add(slice_id=slice_id, mesh_shape=[1], part=part)
            program.slices[0].peers.add(slice_index=1, executor_id="i0.e99", data_address=data_address)
            stream.send(pb.ClientMessage(register_program=program))
            failure = (await stream.read()).program_ready.failure
            assert failure.kind == "AccessDenied"
            assert "is not where an executor 'i0.e99' of this cluster listens" in failure.message
        stream.close()

    attack(victim, action)


def test_malformed_programs_and_arguments_fail_their_client_alone(victim):
    async def action(client_id, mine, manager, scheduler, executor):
        request = pb.ReserveSliceRequest(shape=[1], axis_names=["x"])
        slice_id = (await manager.ReserveSlice(request, metadata=mine)).reservation.slice_id
        await manager.WaitSlice(pb.WaitSliceRequest(slice_id=slice_id), metadata=mine)
        stream = await connect(scheduler, mine)
        first = (client_id << 40) + 1

        async def answer():
            message = await stream.read()
            return getattr(message, message.WhichOneof("message"))

        for number, (what, part) in enumerate(malformed_parts(slice_id).items()):
            program = pb.RegisterProgram(program_id=first + number, name=what, slices=[part])
            stream.send(pb.ClientMessage(register_program=program))
            assert (await answer()).failure.kind, what
        # A good program, and arguments that are none.
        good = pb.SliceProgram(
            slice_id=slice_id,
            mesh_shape=[1],
            part=pb.Part(slots=[pb.TensorSpec(**SPEC)], num_args=1, results=[pb.ResultSlot(slot=0)]),
        )
        stream.send(
            pb.ClientMessage(register_program=pb.RegisterProgram(program_id=first + 50, name="good", slices=[good]))
        )
        assert not (await answer()).HasField("failure")
        wrong = {
            "not a message": b"\xff\xff",
            "none": b"",
            "another's": pb.Arguments(buffer_ids=[victim.buffer_id]).SerializeToString(),
            "a value that is not there": pb.Arguments(buffer_ids=[0]).SerializeToString(),
        }
        for number, (what, arguments) in enumerate(wrong.items()):
            run = pb.RunProgram(
                program_id=first + 50,
                run_id=first + 100 + number,
                first_buffer_id=first + 200 + number,
                slices=[pb.SliceArguments(slice_id=slice_id, arguments=arguments)],
            )
            stream.send(pb.ClientMessage(run_program=run))
            assert (await answer()).failure.kind == "AccessDenied", what
            answers = await read(executor, mine, first + 200 + number)
            assert answers[0].failure.kind == "AccessDenied", what
        stream.close()

    attack(victim, action)

"""The web page's parts without a server: cookies, graphs and their drawing."""

import random
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.cluster.test_fuzzing import random_message
from tests.unit.cli.observations import observation, share
from torchways.cluster.web.drawing import draw
from torchways.cluster.web.layout import layout
from torchways.cluster.web.sessions import SESSION_SECONDS, Sessions, Viewer
from torchways.cluster.web.watch import point
from torchways.island.outline import MAX_INSTRUCTIONS, Outlines, outline_of
from torchways.rpc import torchways_pb2 as pb
from torchways.rpc.activity import activity_between
from torchways.rpc.identity import Caller, ClusterKey, Role

KEY = ClusterKey(bytes(32))
SESSIONS = Sessions("the token", KEY)


def test_a_cookie_proves_what_its_secret_did_and_for_some_hours():
    assert SESSIONS.of_secret("the token") is Viewer.VIEWER
    assert SESSIONS.of_secret(KEY.secret_of(Caller(Role.OPERATOR))) is Viewer.OPERATOR
    for role in (Role.MANAGER, Role.NODE, Role.SCHEDULER):
        assert SESSIONS.of_secret(KEY.secret_of(Caller(role))) is None
    assert SESSIONS.of_header("Bearer the token") is Viewer.VIEWER
    assert SESSIONS.of_header("Basic the token") is None
    cookie = SESSIONS.cookie(Viewer.VIEWER, 1000.0)
    assert SESSIONS.of_cookie(cookie, 1000.0 + SESSION_SECONDS - 1) is Viewer.VIEWER
    assert SESSIONS.of_cookie(cookie, 1000.0 + SESSION_SECONDS) is None
    assert Sessions("the token", ClusterKey(bytes(31) + b"1")).of_cookie(cookie, 1000.0) is None


@given(st.text(max_size=100))
def test_no_cookie_is_believed_or_raises(text):
    for cookie in (text, f"operator.{text}", f"operator.99999999999.{text}"):
        assert SESSIONS.of_cookie(cookie, 0.0) is None
    assert SESSIONS.of_secret(text) is None


def compute(function, inputs, outputs):
    return pb.Instruction(compute=pb.Compute(function_index=function, inputs=inputs, outputs=outputs))


def program(*parts):
    """A program of one part a slice, whose slots are all float32[4]."""
    spec = pb.TensorSpec(dtype="float32", shape=[4], placements=["R"])
    function = pb.Function(name="step/a<b>&", source="train.py:3 in step", graph=b"x" * 1000, num_operators=2)
    return pb.RegisterProgram(
        program_id=5,
        name="step",
        slices=[
            pb.SliceProgram(
                slice_id=index + 1,
                mesh_shape=[2],
                part=pb.Part(
                    slice_index=index,
                    functions=[function],
                    slots=[spec] * 8,
                    num_args=1,
                    instructions=instructions,
                    results=[pb.ResultSlot(slot=2)],
                ),
            )
            for index, instructions in enumerate(parts)
        ],
    )


def two_slices():
    there = [
        compute(0, [0], [1]),
        pb.Instruction(send=pb.Send(slot=1, edge_id=0, peer=1)),
        pb.Instruction(receive=pb.Receive(slot=2, edge_id=1, peer=1)),
    ]
    back = [
        pb.Instruction(receive=pb.Receive(slot=1, edge_id=0, peer=0)),
        compute(0, [1], [2]),
        pb.Instruction(send=pb.Send(slot=2, edge_id=1, peer=0)),
    ]
    return program(there, back)


def test_an_outline_has_no_graphs():
    outline = outline_of(two_slices())
    assert b"x" * 1000 not in outline.SerializeToString()
    assert [function.name for function in outline.slices[0].part.functions] == ["step/a<b>&"]
    assert outline.num_instructions == 6


def test_outlines_are_kept_of_a_clients_newest_programs():
    outline = outline_of(two_slices())
    content = outline.SerializeToString()
    outlines = Outlines(max_bytes=3 * len(content))
    other = outlines.keep(2, outline)
    mine = [outlines.keep(1, outline) for _ in range(5)]
    assert [kept.content for kept in mine] == [b"", b"", content, content, content]
    assert other.content == content
    assert {kept.num_instructions for kept in mine} == {6}
    outlines.forget(1)
    assert outlines.keep(1, outline).content == content


def test_a_graph_has_a_column_a_slice_and_what_is_received_is_below_what_is_sent():
    graph = layout([outline_of(two_slices())])
    assert graph.columns == ["@0  slice 1 (2)", "@1  slice 2 (2)"]
    found = {(node.column, node.lines[0]): node.row for node in graph.nodes}
    assert found[0, "send to @1"] < found[1, "receive from @0"]
    assert found[1, "send to @0"] < found[0, "receive from @1"]
    ends = {(graph.nodes[line.source].lines[0], graph.nodes[line.target].lines[0]) for line in graph.lines}
    assert ends == {  # what arguments go to is not drawn: often, that is everything
        ("step/a<b>&", "send to @1"),
        ("send to @1", "receive from @0"),
        ("receive from @0", "step/a<b>&"),
        ("step/a<b>&", "send to @0"),
        ("send to @0", "receive from @1"),
        ("receive from @1", "1 result"),
        ("step/a<b>&", "1 result"),
    }


def test_a_drawing_is_xml_with_names_as_text():
    root = ElementTree.fromstring(draw('<script>"\x00', layout([outline_of(two_slices())])))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("step/a<b>&") == 2
    assert "train.py:3 in step" in texts
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_a_loop_is_drawn_with_its_body():
    item = pb.BodyInstruction(stage=0, kind="F", instruction=compute(0, [0], [1]))
    body = pb.LoopBody(slots=[pb.TensorSpec(dtype="float32")] * 2, inputs=[0], instructions=[item])
    order = pb.Repeat(actions=[pb.Action(stage=0, kind="F", microbatch=0)], times=8, step=1)
    loop = pb.Instruction(loop=pb.Loop(bodies=[body], num_turns=8, order=[order], outputs=[2]))
    graph = layout([outline_of(program([loop]))])
    assert [node.lines for node in graph.nodes] == [
        ("1 argument",),
        ("loop of 8 turns", "(0F0) x 8"),
        ("0F step/a<b>&", "train.py:3 in step"),
        ("1 result",),
    ]


def test_a_large_program_is_counted():
    many = [compute(0, [0], [1])] * (MAX_INSTRUCTIONS + 1)
    sends = [pb.Instruction(send=pb.Send(slot=1, edge_id=edge, peer=1)) for edge in range(3)]
    outline = outline_of(program(many + sends, [compute(0, [0], [1])]))
    assert outline.ByteSize() < 1000
    graph = layout([outline])
    assert [node.lines for node in graph.nodes] == [
        ("2,004 instructions", "2,001 x compute", "3 x send"),
        ("1 instructions", "1 x compute"),
    ]
    assert [line.label for line in graph.lines] == ["3 values"]
    ElementTree.fromstring(draw("large", graph))


@pytest.mark.parametrize("seed", range(200))
def test_whatever_a_client_registers_can_be_drawn(seed):
    message = random_message(random.Random(seed), pb.RegisterProgram(), (1, 2, 3))
    ElementTree.fromstring(draw("any", layout([outline_of(message), outline_of(two_slices())])))


def test_a_point_of_the_timeline_is_each_clients_part_of_all_devices():
    before = observation(10, share(1, busy_seconds=1.0), share(2, busy_seconds=1.0))
    after = observation(12, share(1, busy_seconds=2.5), share(2, busy_seconds=1.0))
    assert point(activity_between(before, after)) == {"time": 12.0, "seconds": 2.0, "busy": {"1": 0.75}}

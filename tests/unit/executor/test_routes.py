"""Which hosts exchange values: of slices with as many hosts, and with more or fewer."""

from torchways.executor.routes import Routes, SumRoute, find_routes
from torchways.ir.part import AllReduceInstruction, ReceiveInstruction, SendInstruction, SlicePart


def part(slice_index, *instructions):
    return SlicePart(slice_index=slice_index, functions=(), slots=(), num_args=0, instructions=instructions, results=())


def test_each_host_of_the_receiving_slice_gets_a_value_from_one_host():
    sender = part(0, SendInstruction(slot=0, edge_id=5, peer=1))
    receiver = part(1, ReceiveInstruction(slot=0, edge_id=5, peer=0))
    for senders, receivers in (["a"], ["x"]), (["a", "b"], ["x", "y", "z"]), (["a", "b", "c"], ["x"]):
        hosts = {0: senders, 1: receivers}
        targets = {me: find_routes(sender, me, hosts).targets[5] for me in senders}
        assert sorted(peer for peers in targets.values() for peer in peers) == receivers
        for me in receivers:
            assert me in targets[find_routes(receiver, me, hosts).senders[5]]


def test_a_host_that_sends_to_nobody_has_no_targets():
    sender = part(0, SendInstruction(slot=0, edge_id=5, peer=1))
    assert find_routes(sender, "b", {0: ["a", "b"], 1: ["x"]}).targets == {5: ()}


def test_hosts_of_one_number_sum_and_the_others_of_a_slice_follow_one_of_them():
    members = (0, 1)
    hosts = {0: ["a", "b", "c", "d", "e"], 1: ["x", "y"]}
    sums = {
        me: find_routes(
            part(index, AllReduceInstruction(input=0, output=1, edge_id=2, members=members)), me, hosts
        ).sums[2]
        for index, executors in hosts.items()
        for me in executors
    }
    assert sums == {
        "a": SumRoute(members=("a", "x"), followers=("c", "e")),
        "b": SumRoute(members=("b", "y"), followers=("d",)),
        "c": SumRoute(members=("a",)),
        "d": SumRoute(members=("b",)),
        "e": SumRoute(members=("a",)),
        "x": SumRoute(members=("a", "x")),
        "y": SumRoute(members=("b", "y")),
    }


def test_slices_on_the_same_devices_bring_their_values_together():
    reduce = AllReduceInstruction(input=0, output=1, edge_id=2, members=(0, 1, 2))
    route = find_routes(part(1, reduce), "a", {0: ["a"], 1: ["a"], 2: ["x"]}).sums[2]
    assert (route.members, route.num_local) == (("a", "a", "x"), 2)


def test_a_part_without_edges_has_no_routes():
    assert find_routes(part(0), "a", {0: ["a"]}) == Routes()

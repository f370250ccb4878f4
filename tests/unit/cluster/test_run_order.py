"""The order of runs over several islands: one on all of them, whoever asks first, and nobody who is gone is awaited."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sizes import sizes
from torchways.cluster.run_order import Ordered, RunOrder


def order_of(*islands):
    order = RunOrder()
    for island_id in islands:
        order.join(island_id)
    return order


def test_a_run_is_next_when_all_of_its_islands_have_asked():
    order = order_of(0, 1, 2)
    assert order.ask(0, 11, 1, [0, 2]) == []
    assert order.ask(2, 11, 1, [0, 2]) == [Ordered(0, 11), Ordered(2, 11)]
    assert not order.runs


def test_a_clients_runs_keep_its_order():
    order = order_of(0, 1)
    assert order.ask(0, 11, 1, [0, 1]) == []
    assert order.ask(0, 12, 1, [0, 1]) == []
    assert order.ask(1, 11, 1, [0, 1]) == [Ordered(0, 11), Ordered(1, 11)]
    assert order.ask(1, 12, 1, [0, 1]) == [Ordered(0, 12), Ordered(1, 12)]


def test_islands_and_clients_that_are_gone_are_not_waited_for():
    order = order_of(0, 1, 2)
    assert order.ask(0, 11, 1, [0, 1]) == []
    assert order.leave(1) == [Ordered(0, 11)]
    assert order.ask(0, 21, 2, [0, 2]) == []
    assert order.client_gone(2, 2) == [Ordered(0, 21)]
    assert order.ask(0, 22, 2, [0, 2]) == [Ordered(0, 22)]
    assert order.ask(0, 12, 1, [0, 1]) == [Ordered(0, 12)]


def test_a_run_that_an_island_will_not_run_goes_on_elsewhere():
    order = order_of(0, 1)
    assert order.ask(0, 11, 1, [0, 1]) == []
    assert order.ask(0, 12, 1, [0, 1]) == []
    assert order.ask(1, 11, 1, [0, 1], is_withdrawn=True) == [Ordered(0, 11)]
    assert order.ask(0, 12, 1, [0, 1], is_withdrawn=True) == []
    assert order.ask(1, 12, 1, [0, 1], is_withdrawn=True) == []
    assert not order.runs


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 2), st.integers(1, 2)),
        st.tuples(st.just("withdraw"), st.integers(0, 2), st.integers(1, 2)),
        st.tuples(st.just("client gone"), st.integers(0, 2), st.integers(1, 2)),
        st.tuples(st.just("island gone"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([(0, 1), (1, 2), (0, 2), (0, 1, 2)]), min_size=1, max_size=12), _STEPS)
def test_any_order_of_asking_gives_one_order_and_leaves_nothing(spans, steps):
    """Each client has runs over some islands; each island asks for a client's in its order, or gives up."""
    order = order_of(0, 1, 2)
    runs = {client: [(100 * client + number, islands) for number, islands in enumerate(spans)] for client in (1, 2)}
    left = {(i, c): [(r, islands) for r, islands in runs[c] if i in islands] for i in range(3) for c in (1, 2)}
    gone, told = set(), defaultdict(list)

    def tell(ordered):
        for item in ordered:
            told[item.island_id].append(item.run_id)

    def step(kind, island, client):
        if kind == "island gone":
            if island not in gone:
                gone.add(island)
                tell(order.leave(island))
            for key in [key for key in left if key[0] == island]:
                left[key] = []
        elif island not in gone and kind == "client gone":
            for run_id, islands in left[island, client]:
                tell(order.ask(island, run_id, client, islands, is_withdrawn=True))
            left[island, client] = []
            tell(order.client_gone(island, client))
        elif island not in gone and left[island, client]:
            run_id, islands = left[island, client].pop(0)
            tell(order.ask(island, run_id, client, islands, is_withdrawn=kind == "withdraw"))

    for item in steps:
        step(*item)
    while any(left.values()):  # every island asks for all that is left
        for island, client in list(left):
            step("ask", island, client)
    assert not order.runs
    assert not order._queues
    for one in told.values():
        assert len(one) == len(set(one))
        for other in told.values():
            common = set(one) & set(other)
            assert [run for run in one if run in common] == [run for run in other if run in common]


def test_nothing_grows_with_the_number_of_runs_and_clients():
    order = RunOrder(max_gone_clients=2)
    order.join(0)
    order.join(1)
    after = []
    for client in range(1, 30):
        for number in range(5):
            run_id = 100 * client + number
            for island in (0, 1):
                order.ask(island, run_id, client, [0, 1], is_withdrawn=number == 3 and island == 1)
        for island in (0, 1):
            order.client_gone(island, client)
        after.append(sizes(order))
    assert after[-1] == after[3]

"""Batches in this process: order, positions and seeds, and the spec as JSON."""

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from tests import datasets
from torchways.data.batches import Batches, _Order
from torchways.data.spec import LoaderSpec, Position
from torchways.errors import ConfigError, DataError


def spec(name="Rows", *args, **options):
    return LoaderSpec(dataset=f"tests.datasets:{name}", args=args, **{"kwargs": {}, "rules": {}, **options})


def test_specs_and_positions_come_back_from_json():
    one = spec("Rows", 3, [1, {"a": None}], batch_size=4, rules={"x": (None, ("dp", "tp")), "": ("R",)})
    assert LoaderSpec.from_json(one.to_json()) == one
    where = Position(epoch=3, batch=4, state={"d": []})
    assert Position.from_json(where.to_json()) == where
    for text in ("{", "[]", '{"epoch": 1}', '{"epoch": 1, "batch": -1, "state": null}'):
        with pytest.raises(ConfigError):
            Position.from_json(text)


@pytest.mark.parametrize("batch", [0, 1, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_order_is_a_distributed_samplers_from_any_position_on(batch, drop_last):
    sampler = DistributedSampler(range(10), num_replicas=1, rank=0, shuffle=True, seed=5)
    sampler.set_epoch(2)
    rows = list(sampler)
    batches = [rows[start : start + 3] for start in range(0, 10, 3)][: 3 if drop_last else 4]
    options = {"batch_size": 3, "shuffle": True, "seed": 5, "drop_last": drop_last}
    order = _Order(spec(**options), 10, Position(epoch=2, batch=batch))
    assert [keys[1:] for keys in order] == batches[batch:]
    assert len(order) == len(batches[batch:])
    whole = _Order(spec(**options), 10, Position(epoch=2))
    assert [keys[0] for keys in order] == [keys[0] for keys in whole][batch:]


def test_parts_of_a_batch_are_its_rows_in_order():
    parts = [list(_Order(spec(batch_size=4, num_parts=2, part_index=i), 8, Position())) for i in (0, 1)]
    assert [[keys[1:] for keys in part] for part in parts] == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


@pytest.mark.parametrize(
    ("name", "collate"), [("Noisy", None), ("Rows", "tests.datasets:with_noise")], ids=["items", "collate_fn"]
)
def test_random_numbers_depend_on_seed_epoch_and_batch_alone(name, collate):
    def noise(epoch, batch, **options):
        batches = Batches(spec(name, 12, batch_size=4, collate_fn=collate, **options))
        items = batches.begin(Position(epoch=epoch, batch=batch))
        values = next(items)[0][1]
        items.close()
        return tuple(values.flatten().tolist())

    found = {(e, b): noise(e, b) for e in (0, 1) for b in (0, 1)}
    assert len(set(found.values())) == 4
    assert noise(1, 1, num_workers=1) == found[1, 1]
    assert noise(0, 0, seed=1) not in found.values()
    before = torch.get_rng_state()
    noise(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_random_numbers_of_an_iterable_depend_on_seed_and_epoch_alone(lazily, num_workers):
    def begin(position, **options):
        batches = Batches(spec("RandomOrder", 8, lazily, batch_size=2, num_workers=num_workers, **options))
        items = batches.begin(position)
        for batch, behind in items:
            yield batch.tolist(), behind
            torch.rand(3)  # the user's own numbers, between two batches

    torch.manual_seed(0)
    found = list(begin(Position(epoch=1)))
    for batch in (0, 1, 3):
        position = found[batch - 1][1] if batch else Position(epoch=1)
        assert [rows for rows, _ in begin(position)] == [rows for rows, _ in found[batch:]]
    assert [rows for rows, _ in begin(Position(epoch=2))] != [rows for rows, _ in found]
    assert [rows for rows, _ in begin(Position(epoch=1), seed=5)] != [rows for rows, _ in found]
    before = torch.get_rng_state()
    next(Batches(spec("RandomOrder", 8, lazily, batch_size=2, num_workers=num_workers)).begin(Position()))
    assert torch.equal(torch.get_rng_state(), before)


def test_items_that_are_batches():
    batches = Batches(spec("Rows", 5, batch_size=None, shuffle=True))
    items = list(batches.begin(Position(batch=1)))
    assert [position.batch for _, position in items] == [2, 3, 4, 5]
    assert len({item["label"] for item, _ in items}) == 4
    assert batches.num_batches == 5


def test_an_error_names_the_item_and_keeps_its_type():
    items = Batches(spec("Failing", 8, 5, "raise", batch_size=2)).begin(Position(epoch=1, batch=2))
    with pytest.raises(
        DataError, match="batch 2 of epoch 1 cannot be read: ValueError: row 5 is broken while read"
    ) as e:
        next(items)
    assert isinstance(e.value.__cause__, ValueError)


def test_iterable_datasets_hear_of_the_epoch():
    made = Batches(spec("Counting", 4, batch_size=2))
    assert made.num_batches is None
    assert [batch.tolist() for batch, _ in made.begin(Position(epoch=2))] == [[2000, 2001], [2002, 2003]]
    assert datasets.Counting(4).epoch == 0


#: Error, its text, dataset, arguments and options.
REFUSED = {
    "import": (
        DataError,
        "dataset 'tests.nothing:Rows' cannot be imported .*ModuleNotFoundError",
        "tests.nothing:Rows",
        (),
        {},
    ),
    "name": (
        DataError,
        "'tests.datasets:Nothing' cannot be imported .*has no attribute 'Nothing'",
        "tests.datasets:Nothing",
        (),
        {},
    ),
    "type": (
        ConfigError,
        "'tests.datasets:NOT_CALLABLE' is a int, which cannot be called",
        "tests.datasets:NOT_CALLABLE",
        (),
        {},
    ),
    "raises": (
        DataError,
        "cannot be made: FileNotFoundError: no such text",
        "tests.datasets:Refusing",
        ("no such text",),
        {},
    ),
    "argument": (
        DataError,
        "'tests.datasets:Rows' cannot be made: TypeError: .*unexpected keyword",
        "tests.datasets:Rows",
        (),
        {"kwargs": {"rows": 3}},
    ),
    "shape": (ConfigError, "a Shapeless, has no __getitem__ and __len__", "tests.datasets:Shapeless", (), {}),
    "length": (DataError, "the length of dataset .* cannot be known: TypeError", "tests.datasets:Rows", ("four",), {}),
    "order": (
        ConfigError,
        "decides its own order: leave shuffle=False",
        "tests.datasets:Counting",
        (4,),
        {"shuffle": True},
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_cannot_be_made_says_why(refused):
    error, match, name, args, options = REFUSED[refused]
    with pytest.raises(error, match=match):
        Batches(LoaderSpec(dataset=name, args=args, **{"kwargs": {}, "rules": {}, **options}))

"""Best fit, borders, one exact order: every row once a pass, whenever a batch is asked for."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data import Dataset, PackedBatches, pack
from jaxft.data.packing import collate_packs
from jaxft.data.tokens import example
from jaxft.errors import DataError


def rows(n, first=1, longest=40, seed=0):
    """Return n examples of many lengths; the first token tells them apart."""
    lengths = np.random.default_rng(seed).integers(1, longest, n)
    return [example([first + i, *[5] * int(t)], [True] * (int(t) + 1)) for i, t in enumerate(lengths)]


def ids(batches, numbers):
    return [int(row.input_ids[0]) for n in numbers for packed in batches.examples(n) for row in packed]


def best_fit_decreasing(lengths, limit):
    """The textbook's, quadratic: of the packs with the least room, the one that has had it for longest."""
    packs = []  # (room, since, rows)
    for since, row in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [p for p in packs if p[0] >= lengths[row]]
        if fitting:
            chosen = min(fitting, key=lambda p: p[:2])
        else:
            packs.append(chosen := [limit, 0, []])
        chosen[0], chosen[1] = chosen[0] - lengths[row], since
        chosen[2].append(row)
    return [p[2] for p in packs]


def first_fit(lengths, limit):
    rooms = []
    for n in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= n), None)
        if at is None:
            rooms.append(limit - n)
        else:
            rooms[at] -= n
    return len(rooms)


@settings(deadline=None, max_examples=300)
@given(
    st.integers(1, 60).flatmap(lambda limit: st.tuples(st.lists(st.integers(1, limit), max_size=60), st.just(limit)))
)
def test_pack(case):
    lengths, limit = case
    packs = pack(lengths, limit)
    assert sorted(row for packed in packs for row in packed) == list(range(len(lengths)))
    sums = sorted(sum(lengths[row] for row in packed) for packed in packs)
    assert all(0 < n <= limit for n in sums)
    assert len(packs) >= -(-sum(lengths) // limit)
    assert len(sums) < 2 or sums[0] + sums[1] > limit  # no two would go into one
    assert packs == best_fit_decreasing(lengths, limit) == pack(lengths, limit)


@pytest.mark.parametrize(("mean", "spread", "limit"), [(4.5, 0.6, 1024), (5.5, 0.8, 2048), (6.0, 1.0, 4096)])
def test_lengths_of_text_leave_no_room(mean, spread, limit):
    lengths = np.random.default_rng(0).lognormal(mean, spread, 3000).astype(int).clip(1, limit).tolist()
    made = len(pack(lengths, limit))
    assert -(-sum(lengths) // limit) <= made <= first_fit(lengths, limit)
    assert sum(lengths) / (made * limit) > 0.99
    examples = [example([1] * n, [True] * n) for n in lengths]
    batches = PackedBatches([Dataset(examples)], batch_size=1, length=limit)
    assert batches.filled > 0.99
    assert f"3,000 rows make {batches.packs} packs of {limit:,} tokens" in str(batches)
    assert f"{100 * batches.filled:.2f} % filled" in str(batches)


def test_many_rows_take_no_quadratic_time():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(int).clip(1, 8192).tolist()
    began = time.process_time()
    packs = pack(lengths, 8192)
    assert time.process_time() - began < 10  # a search through all packs takes minutes
    assert sum(map(len, packs)) == 100_000


def test_rows_longer_than_a_pack():
    with pytest.raises(
        DataError, match="no pack of 8 tokens: cut them first\n  - row 1 has 9 tokens\n  - row 3 has 10"
    ):
        pack([8, 9, 1, 10], 8)
    long = example([1] * 9, [True] * 9, place="rows.jsonl:3")
    with pytest.raises(DataError) as caught:
        PackedBatches([Dataset([*rows(9, longest=7), long])], batch_size=1, length=8)
    message = str(caught.value)
    assert message.startswith("rows that fit into no pack of 8 tokens: make packs longer (data.max_length)")
    assert message.endswith("max_length=8), which cuts them\n  - rows.jsonl:3: it has 9 tokens")


def test_a_batch_of_packs():
    one, two = example([5, 6, 7], [True] * 3), example([8, 9], [False, True])
    batch = collate_packs([[one, two], [two]], 6, rows=3)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0], [8, 9, 0, 0, 0, 0], [0] * 6]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100], [-100, 9, *[-100] * 4], [-100] * 6]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2, 0]
    assert {x.dtype.name for x in batch.values()} == {"int32"}


def test_no_label_crosses_a_border_in_any_batch():
    batches, borders = PackedBatches([Dataset(rows(200))], batch_size=2, length=64, epochs=1), 0
    for n in range(len(batches)):
        batch = batches[n]
        assert {x.shape for x in batch.values()} == {(2, 64)}
        new = np.diff(batch["segment_ids"], axis=1, prepend=0) != 0
        assert (batch["labels"][new] == -100).all()
        assert (batch["labels"][batch["segment_ids"] == 0] == -100).all()
        borders += int((new & (batch["segment_ids"] > 0)).sum())
    assert borders == 200


def test_every_row_once_a_pass_in_other_company():
    data = Dataset(rows(2000, longest=20))
    batches = PackedBatches([data], batch_size=1, length=24, seed=0)
    assert batches.windows == 1  # 512 packs and a little
    small = PackedBatches([data], batch_size=1, length=24, seed=0, epochs=2)
    first = [frozenset(int(r.input_ids[0]) for r in batches.examples(n)[0]) for n in range(batches.packs)]
    second = [frozenset(ids(batches, [n])) for n in range(batches.packs, len(small))]
    for one in (first, second):
        assert sorted(i for packed in one for i in packed) == list(range(1, 2001))
    assert len(set(first) & set(second)) < len(first) / 4
    other = PackedBatches([data], batch_size=1, length=24, seed=1)
    assert ids(other, range(40)) != ids(batches, range(40))


@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize(("epochs", "size"), [(1, 1), (3, 4), (0.5, 2), (1.5, 7)])
def test_a_run_of_epochs_sees_each_row_so_often(monkeypatch, windows, epochs, size):
    monkeypatch.setattr("jaxft.data.packing.WINDOW", 30 // windows)
    batches = PackedBatches([Dataset(rows(101))], batch_size=size, length=64, epochs=epochs)
    assert batches.windows == windows
    seen = Counter(ids(batches, range(len(batches))))
    assert seen.total() == np.ceil(101 * epochs)
    assert set(seen.values()) <= {int(epochs), int(np.ceil(epochs))}
    assert batches.examples(len(batches) - 1) and not batches.examples(len(batches))
    assert batches[len(batches) - 1]["input_ids"].shape == (size, 64)


def test_any_batch_can_be_asked_for_first(monkeypatch):
    monkeypatch.setattr("jaxft.data.packing.WINDOW", 10)
    data = [Dataset(rows(90)), Dataset(rows(70, first=1000), "b", 2.0)]
    one, other = (PackedBatches(data, batch_size=3, length=64, seed=5, steps=30) for _ in range(2))
    assert one.windows > 2
    forwards = [one[n] for n in range(30)]
    for n in reversed(range(30)):
        again = other[n]
        assert all(np.array_equal(again[key], forwards[n][key]) for key in again)
    it = PackedBatches(data, batch_size=3, length=64, seed=5, steps=30).iterate(23)
    for n in range(23, 30):
        assert np.array_equal(next(it)["input_ids"], forwards[n]["input_ids"])
    with pytest.raises(StopIteration):
        next(it)


def test_a_mixture_has_its_shares_in_every_window(monkeypatch):
    monkeypatch.setattr("jaxft.data.packing.WINDOW", 10)
    data = [Dataset(rows(100), "small", 3.0), Dataset(rows(300, first=1000), "large", 1.0)]
    batches = PackedBatches(data, batch_size=1, length=64, epochs=1)
    assert batches.windows > 5
    for window in range(batches.windows):
        dealt = [int(row.input_ids[0]) < 1000 for packed in batches._deal(window) for row in packed]
        assert abs(sum(dealt) - 0.75 * len(dealt)) <= 1
    seen = Counter(i for i in ids(batches, range(len(batches))) if i < 1000)
    assert seen.total() == 300 and set(seen.values()) == {3}


def test_the_shorter_of_steps_and_epochs():
    make = lambda **length: len(PackedBatches([Dataset(rows(100))], batch_size=2, length=64, **length))
    whole = make(epochs=1)
    assert make(steps=3) == make(steps=3, epochs=1) == 3
    assert make(steps=500, epochs=1) == whole < 500 == make(steps=500)


def test_fewer_packs_than_a_batch():
    with pytest.raises(
        DataError, match="packed into 99 tokens each, 8 rows become 2, fewer than one batch of 3: lower train"
    ):
        PackedBatches([Dataset([example([1] * 20, [True] * 20)] * 8)], batch_size=3, length=99)

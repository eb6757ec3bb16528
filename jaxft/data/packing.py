"""Packed batches: rows put end to end into packs of one length, so that hardly a token of a batch is padding."""

import math
import sys
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import DataError, refuse
from .batches import Batch, ahead, endless_order
from .source import Dataset
from .tokens import IGNORED, Example

WINDOW = 512  # packs that the rows packed together make, about: enough that the last, part-filled one hardly counts


def pack(lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Put rows into few packs, best-fit decreasing: the longest row first, each where the least room is left over.

    As `trl.pack_dataset(..., strategy="bfd")` does, pack by pack; on rows of text it leaves under 1 % of the room
    (Ding et al. 2024). One bisection a row, among the different rooms that are left.

    Args:
        lengths: Tokens of each row.
        limit: Tokens of a pack.

    Returns:
        The row numbers of each pack. Of rows of one length the earlier comes first, of packs with the same room the
        one that has had it for longer.

    Raises:
        DataError: A row is longer than a pack.

    >>> pack([5, 2, 4, 3, 2], 8)
    [[0, 3], [2, 1, 4]]
    """
    long = [f"row {row} has {length} tokens" for row, length in enumerate(lengths) if length > limit]
    refuse(DataError, f"rows that fit into no pack of {limit} tokens: cut them first", long)
    packs: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once, of the packs that still have any
    having: dict[int, deque[list[int]]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        at = bisect_left(rooms, lengths[row])
        if at == len(rooms):
            room = limit
            packs.append(chosen := [])
        else:
            room = rooms[at]
            chosen = having[room].popleft()
            if not having[room]:
                del rooms[at]
        chosen.append(row)
        if left := room - lengths[row]:
            if not having.setdefault(left, deque()):
                insort(rooms, left)
            having[left].append(chosen)
    return packs


def collate_packs(packs: Sequence[Sequence[Example]], length: int, *, rows: int | None = None) -> Batch:
    """Put the rows of each pack end to end.

    Args:
        packs: Rows of at most `length` tokens together.
        length: Tokens of a pack, and the width of the batch.
        rows: Packs of the batch; missing ones are padding and count nothing.

    Returns:
        `input_ids`, `labels` (-100 at the first token of each row and at padding), `segment_ids` (1, 2, ... and 0 at
        padding), `position_ids` (from 0 in each row) and `attention_mask`, each `[rows, length]` int32.

    >>> from jaxft.data.tokens import example
    >>> batch = collate_packs([[example([5, 6], [True, True]), example([7, 8], [False, True])]], 5)
    >>> batch["labels"].tolist(), batch["segment_ids"].tolist(), batch["position_ids"].tolist()
    ([[-100, 6, -100, 8, -100]], [[1, 1, 2, 2, 0]], [[0, 1, 0, 1, 0]])
    """
    ids, labels, segments, positions = (np.zeros((rows or len(packs), length), np.int32) for _ in range(4))
    for i, packed in enumerate(packs):
        lengths = [len(row) for row in packed]
        n = sum(lengths)
        ids[i, :n] = np.concatenate([row.input_ids for row in packed])
        labels[i, :n] = np.concatenate([row.labels for row in packed])
        segments[i, :n] = np.repeat(np.arange(1, len(packed) + 1), lengths)
        positions[i, :n] = np.concatenate([np.arange(m) for m in lengths])
    labels[positions == 0] = IGNORED  # nothing is predicted across a border, nor in padding
    mask = (segments != 0).astype(np.int32)
    return {
        "input_ids": ids,
        "labels": labels,
        "segment_ids": segments,
        "position_ids": positions,
        "attention_mask": mask,
    }


class PackedBatches:
    """The packed batches of a training run, by number: batch n is the same whenever it is asked for.

    The rows come in the order of `TrainBatches`. A pass, which is as many rows as there are, is cut into windows of
    about 512 packs; the rows of a window are packed by themselves, and the packs change places. So each row comes
    once a pass, in other company each time, and of a mixture every window has its exact share. Batch n is the next
    `batch_size` packs after those of batch n - 1: where it begins follows from the lengths of the rows before it.

    Args:
        datasets: One data set, or the sources of a mixture.
        batch_size: Packs of a batch.
        length: Tokens of a pack, and the width of every batch, so that one program is compiled.
        seed: Of every order.
        steps: Batches of the run.
        epochs: Passes of the run: it ends when each row has come so often, its last batch filled up with padding.
            With `steps` too, what ends first; with neither, it is endless.

    Attributes:
        packs: Packs of the first pass.
        filled: Share of them that is rows and not padding.

    Raises:
        DataError: A row is longer than a pack, or the rows make fewer packs than one batch.

    >>> from jaxft.data.tokens import example
    >>> rows = [example([i] * (i % 3 + 2), [True] * (i % 3 + 2)) for i in range(1, 13)]
    >>> batches = PackedBatches([Dataset(rows)], batch_size=1, length=18, epochs=1)
    >>> len(batches), batches[0]["input_ids"].shape, batches.filled
    (2, (1, 18), 1.0)
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        batch_size: int,
        length: int,
        seed: int = 0,
        steps: int | None = None,
        epochs: float | None = None,
    ):
        _check_lengths(datasets, length)
        self.order, self.datasets = endless_order(datasets, seed), datasets
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.rows = sum(map(len, datasets))
        self.last = sys.maxsize if epochs is None else math.ceil(epochs * self.rows)  # rows of the order that are seen
        share = np.array([data.weight for data in datasets])
        mean = [sum(map(len, data.examples)) / max(1, len(data)) for data in datasets]
        self.windows = max(1, int(self.rows * (share @ mean) / share.sum() / (WINDOW * length)))  # of a pass
        self._starts = [0]  # packs before each window, as far as they have been counted
        self._window = lru_cache(2)(self._deal)  # two, since a batch can lie in both
        first = [rows for _ in range(self.windows) for rows in self._count()]
        self.packs, tokens = len(first), sum(len(row) for rows in first for row in rows)
        if self.packs < batch_size:
            raise DataError(
                f"packed into {length:,} tokens each, {sum(map(len, first)):,} rows become {self.packs:,}, fewer than "
                f"one batch of {batch_size}: lower train.batch_size, which counts packs here, or data.max_length"
            )
        self.filled = tokens / (self.packs * length)
        self.steps = 1 << 40 if steps is None else steps
        if epochs is not None:
            while self._begin(len(self._starts) - 1) < self.last:
                self._count()
            self.steps = min(self.steps, math.ceil(self._starts[-1] / batch_size))

    def __len__(self) -> int:
        return self.steps

    def __str__(self) -> str:
        rows = min(self.rows, self.last)
        made = f"{rows:,} rows make {self.packs:,} packs of {self.length:,} tokens ({rows / self.packs:.1f} rows each)"
        return f"packing: {made}, {100 * self.filled:.2f} % filled"

    def __getitem__(self, n: int) -> Batch:
        """Return batch n."""
        return collate_packs(self.examples(n), self.length, rows=self.batch_size)

    def examples(self, n: int) -> list[list[Example]]:
        """Return the rows of batch n, pack by pack; of the run's last batch there may be fewer packs."""
        first = n * self.batch_size
        while self._starts[-1] < first + self.batch_size and self._begin(len(self._starts) - 1) < self.last:
            self._count()
        return [self._pack(number) for number in range(first, min(first + self.batch_size, self._starts[-1]))]

    def iterate(self, start: int = 0) -> Any:
        """Return an iterator over batches from number `start`, made ahead by grain in a thread."""
        return ahead(self, start)

    def _begin(self, window: int) -> int:
        """Return where in the order a window begins; no window lies in two passes."""
        return window * self.rows // self.windows

    def _count(self) -> list[list[Example]]:
        """Deal the next window that has not been counted, and count it."""
        packs = self._window(len(self._starts) - 1)
        self._starts.append(self._starts[-1] + len(packs))
        return packs

    def _pack(self, number: int) -> list[Example]:
        window = bisect_right(self._starts, number) - 1
        return self._window(window)[number - self._starts[window]]

    def _deal(self, window: int) -> list[list[Example]]:
        picked = [self.order[i] for i in range(self._begin(window), min(self._begin(window + 1), self.last))]
        rows = [self.datasets[source].examples[row] for source, row in picked]
        packs = pack([len(row) for row in rows], self.length)
        places = np.random.default_rng([self.seed, window]).permutation(len(packs))
        return [[rows[i] for i in packs[place]] for place in places]


def _check_lengths(datasets: Sequence[Dataset], length: int) -> None:
    refuse(
        DataError,
        f"rows that fit into no pack of {length:,} tokens: make packs longer (data.max_length), or read the rows by "
        f"load_dataset(..., max_length={length}), which cuts them",
        [
            f"{row.place or f'row {i} of {data.name}'}: it has {len(row):,} tokens"
            for data in datasets
            for i, row in enumerate(data.examples)
            if len(row) > length
        ],
    )

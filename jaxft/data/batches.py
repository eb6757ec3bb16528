"""Batches of equal work: rows of like length together, padded to few widths, in one exact order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..errors import DataError
from .source import Dataset
from .tokens import IGNORED, Example

Batch = dict[str, np.ndarray[Any, Any]]
NARROWEST = 32
WINDOW = 16  # batches whose rows are sorted by length together


def width_of(length: int) -> int:
    """Return the width that a row is padded to: 32, 48, 64, 96, 128, 192, ..., so that few programs are compiled.

    >>> [width_of(n) for n in (1, 33, 64, 65, 200)]
    [32, 48, 64, 96, 256]
    """
    width = NARROWEST
    while width < length:  # powers of two, and half-way between them
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


def collate(examples: Sequence[Example], *, rows: int | None = None) -> Batch:
    """Pad examples to one width.

    Args:
        examples: Rows of any lengths.
        rows: Rows of the batch; missing ones are padding and count nothing.

    Returns:
        `input_ids`, `labels` (-100 at padding) and `attention_mask`, each `[rows, width]` int32. What id stands in the
        padding means nothing, so a tokenizer without a pad token will do, and a pad token that is the end token too.

    >>> from jaxft.data.tokens import example
    >>> collate([example([5, 6, 7], [False, True, True])])["labels"][0, :4].tolist()
    [-100, 6, 7, -100]
    """
    shape = (rows or len(examples), width_of(max(map(len, examples))))
    ids, labels, mask = np.zeros(shape, np.int32), np.full(shape, IGNORED, np.int32), np.zeros(shape, np.int32)
    for i, row in enumerate(examples):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = row.input_ids, row.labels, 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def endless_order(datasets: Sequence[Dataset], seed: int) -> Any:
    """Return the rows of a run, `order[i]` a pair (source, row) for any i: shuffled anew each time round.

    Of a mixture each source comes as often as its weight says, within one row at every point.

    >>> from jaxft.data.tokens import example
    >>> order = endless_order([Dataset([example([1], [True])] * 3)], seed=0)
    >>> sorted(order[i] for i in range(3)) == sorted(order[i] for i in range(3, 6)) == [(0, 0), (0, 1), (0, 2)]
    True
    """
    import grain

    orders = [
        grain.MapDataset.source(list(range(len(data)))).seed(seed + i).shuffle().repeat().map(lambda row, i=i: (i, row))
        for i, data in enumerate(datasets)
    ]
    weights = np.array([data.weight for data in datasets], float)
    return grain.MapDataset.mix(orders, (weights / weights.sum()).tolist()) if len(orders) > 1 else orders[0]


def ahead(batches: Any, start: int) -> Any:
    """Return an iterator over batches from number `start`, made ahead by grain in a thread."""
    import grain

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(batches)[start:].to_iter_dataset(options))


class TrainBatches:
    """The batches of a training run, by number: batch n is the same whenever it is asked for.

    The rows come in an endless order, shuffled anew each time round; of a mixture, each source as often as its weight
    says, within one row at every point of the order. Of 16 batches the rows are sorted by length and dealt out in
    order, so that a batch holds rows of like length; then the 16 change places.
    The last window ends where the run ends: what the run sees is the beginning of the order, and nothing else.

    Args:
        datasets: One data set, or the sources of a mixture.
        batch_size: Rows of a batch.
        seed: Of every order.
        steps: Batches of the run; None: endless.
        collate: Makes a batch of rows, called as `collate(examples, rows=batch_size)`.
        window: Batches whose rows are sorted by length together; 1: none, a batch's rows are a random draw.

    Raises:
        DataError: Fewer rows than one batch.

    >>> from jaxft.data.tokens import example
    >>> rows = [example([i, i], [True, True]) for i in range(10)]
    >>> batches = TrainBatches([Dataset(rows)], batch_size=2, steps=5)
    >>> sorted(int(i) for n in range(5) for i in batches[n]["input_ids"][:, 0])
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        batch_size: int,
        seed: int = 0,
        steps: int | None = None,
        collate: Callable[..., Batch] = collate,
        window: int = WINDOW,
    ):
        rows = sum(map(len, datasets))
        if rows < batch_size:
            raise DataError(f"{rows} rows are fewer than one batch of {batch_size}: lower train.batch_size")
        self.order = endless_order(datasets, seed)
        self.datasets, self.batch_size, self.seed = datasets, batch_size, seed
        self.steps = 1 << 40 if steps is None else steps
        self.collate, self.window = collate, window
        self._window: tuple[int, list[list[Any]]] = (-1, [])

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, n: int) -> Batch:
        """Return batch n."""
        return self.collate(self.examples(n), rows=self.batch_size)

    def examples(self, n: int) -> list[Any]:
        """Return the rows of batch n."""
        window, place = divmod(n, self.window)
        if self._window[0] != window:
            self._window = (window, self._deal(window))
        return self._window[1][place]

    def _deal(self, window: int) -> list[list[Any]]:
        size, first = self.batch_size, window * self.window
        batches = min(self.window, self.steps - first)
        picked = [self.order[i] for i in range(first * size, (first + batches) * size)]
        rows = sorted((self.datasets[source].examples[row] for source, row in picked), key=len)
        places = np.random.default_rng([self.seed, window]).permutation(batches)
        return [rows[p * size : (p + 1) * size] for p in places]

    def iterate(self, start: int = 0) -> Any:
        """Return an iterator over batches from number `start`, made ahead by grain in a thread."""
        return ahead(self, start)


class GroupedBatches(TrainBatches):
    """The batches of a run whose rows have a class (`value`): each row that is drawn comes with another of its class.

    So every batch holds positives, however many classes there are; a row that is the only one of its class comes alone
    and another is drawn. Arguments as of `TrainBatches`; a round of the order is seen in twice as many batches.

    >>> from jaxft.data.columns import Texts, collate_texts
    >>> rows = [Texts({"text": {"input_ids": np.array([i + 1])}}, {}, i % 4, "") for i in range(12)]
    >>> batches = GroupedBatches([Dataset(rows)], batch_size=4, collate=collate_texts, steps=5)
    >>> sorted(np.unique(batches[3]["labels"], return_counts=True)[1].tolist()) in ([2, 2], [4])
    True
    """

    def __init__(self, datasets: Sequence[Dataset], **options: Any):
        super().__init__(datasets, **options)
        self.classes: dict[Any, list[tuple[int, int]]] = {}
        for source, data in enumerate(datasets):
            for row, example in enumerate(data.examples):
                self.classes.setdefault(example.value, []).append((source, row))

    def examples(self, n: int) -> list[Any]:
        """Return the rows of batch n."""
        picked: list[tuple[int, int]] = []
        draw = np.random.default_rng([self.seed, n])
        drawn = n * -(-self.batch_size // 2)
        while len(picked) < self.batch_size:
            first = tuple(self.order[drawn])
            drawn += 1
            others = [at for at in self.classes[self._row(first).value] if at != first]
            picked += [first, others[draw.integers(len(others))]] if others else [first]
        return [self._row(at) for at in picked[: self.batch_size]]

    def _row(self, at: Any) -> Any:
        return self.datasets[at[0]].examples[at[1]]


def eval_batches(
    examples: Sequence[Any], batch_size: int, collate: Callable[..., Batch] = collate, *, by_length: bool = True
) -> Iterator[Batch]:
    """Yield every example once, rows of like length together or as they come; the last batch is filled up.

    >>> from jaxft.data.tokens import example
    >>> rows = [example([i] * 3, [True] * 3) for i in range(3)]
    >>> [int((batch["attention_mask"].sum(1) > 0).sum()) for batch in eval_batches(rows, 2)]
    [2, 1]
    """
    order = sorted(examples, key=len) if by_length else examples
    for start in range(0, len(order), batch_size):
        yield collate(order[start : start + batch_size], rows=batch_size)

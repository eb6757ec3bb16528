"""What a contrastive run measures, on vectors and rows made by hand."""

import numpy as np

from jaxft.data import Texts
from jaxft.tasks import contrastive
from jaxft.tasks.task import spread


def row(value=None, **same):
    return Texts({"text": {"input_ids": np.array([1], np.int32)}}, same, value, "")


def test_an_equal_text_counts_as_the_positive():
    """Two anchors have one and the same positive; the third's negative is nearer than its positive."""
    rows = [row(anchor=0, positive=5), row(anchor=1, positive=5), row(anchor=2, positive=6)]
    columns = {
        "anchor": np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]),
        "positive": np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]),
        "negative": np.array([[-1.0, 0.0], [-1.0, 0.1], [0.0, 1.0]]),
    }
    rows = [Texts(r.tokens, {**r.same, "negative": 10 + i}, None, "") for i, r in enumerate(rows)]
    found = contrastive.retrieval(columns, rows)
    assert found == {"recall_at_1": 2 / 3, "recall_at_5": 1.0, "recall_at_10": 1.0, "mrr": (1 + 1 + 1 / 2) / 3}


def test_held_out_rows_are_mixed_and_stay_two_by_two():
    rows = [row(value) for value in (0, 0, 0, 0, 1, 1, 2, 2, 2)]
    mixed = contrastive.mix(rows)
    assert sorted(map(id, mixed)) == sorted(map(id, rows)) and mixed != rows
    values = [r.value for r in mixed]
    alone = [i for i, v in enumerate(values) if v not in (values[i - 1 : i] + values[i + 1 : i + 2])]
    assert len(alone) <= 1  # the third of class 2


def test_references_have_every_class(monkeypatch):
    monkeypatch.setattr(contrastive, "REFERENCES", 4)
    rows = [row(value) for value in (0, 0, 0, 0, 0, 1, 1, 1)]
    assert [r.value for r in contrastive.references(rows)] == [0, 0, 1, 1]
    assert [r.value for r in spread(rows, 4)] == [0, 0, 0, 1]

"""Texts side by side: what becomes of each format, of labels and scores, and of rows that cannot be used."""

import json
from collections import Counter

import numpy as np
import pytest
from texts import make_tokenizer
from tokenizers.processors import TemplateProcessing

import jaxft
from jaxft.data import Dataset, GroupedBatches, Reading, TrainBatches, load_columns
from jaxft.data.columns import collate_texts, pad
from jaxft.data.labels import as_label, class_id, classes_of
from jaxft.errors import DataError

TOY = jaxft.testing.ToyTokenizer()


def load(tmp_path, rows, format, max_length=16, skip=False, columns=None, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_columns(file, TOY, Reading(format, max_length, **options), skip_bad_rows=skip, columns=columns)


def test_pairs_and_triplets(tmp_path):
    rows = [
        {"anchor": "ab", "positive": "abc", "negative": ["b", "cc"]},
        {"anchor": "c", "positive": "ab", "negative": ["dddddddddd", "a"]},
    ]
    data = load(tmp_path, rows, "triplets")
    batch = collate_texts(data.examples)
    assert sorted(batch) == sorted(
        f"{column}_{part}"
        for column in ("anchor", "positive", "negative", "negative_2")
        for part in ("input_ids", "attention_mask", "ids")
    )
    assert batch["negative_input_ids"].shape == (2, 12)  # ten letters, on the ladder 8, 12, 16
    assert batch["positive_input_ids"][0].tolist() == [1, 2, 3, *[0] * 9]  # as wide: widths of a batch are few
    assert batch["positive_attention_mask"][0].tolist() == [1, 1, 1, *[0] * 9]
    assert batch["anchor_ids"][0] == batch["positive_ids"][1]  # the same text
    assert len({*batch["anchor_ids"].tolist(), *batch["positive_ids"].tolist()}) == 3
    assert all(x.shape[0] == 2 and x.dtype == np.int32 for x in batch.values())


def test_labels_scores_and_second_texts(tmp_path):
    data = load(tmp_path, [{"text": "ab", "label": "b"}, {"text": "a", "label": 0}], "labelled", labels=("a", "b"))
    assert [row.value for row in data.examples] == [1, 0]
    assert collate_texts(data.examples, rows=3)["labels"].tolist() == [1, 0, -100]
    two = load(tmp_path, [{"text": "ab", "text_pair": "cd", "label": "2.5"}], "labelled", max_length=3)
    batch = collate_texts(two.examples)
    assert batch["input_ids"][0, :4].tolist() == [1, 2, 3, 0]
    assert batch["token_type_ids"][0, :4].tolist() == [0, 0, 1, 0]
    assert batch["labels"].tolist() == [2.5]
    assert two.cut == 1
    scored = [{"a": "x", "b": "y", "score": 4}, {"a": "x", "b": "y", "score": "1"}]
    names = {"sentence1": "a", "sentence2": "b"}
    data = load(tmp_path, scored, "scored_pairs", score_range=(0, 5), columns=names)
    assert collate_texts(data.examples)["score"].tolist() == pytest.approx([0.8, 0.2])


def test_a_second_text_in_some_rows(tmp_path):
    """The type of a text that stands alone is 0, whether it comes first or not."""
    rows = [{"text": "ab", "label": 0}, {"text": "a", "text_pair": "bc", "label": 1}]
    for order, want in ((1, [[0, 0, 0], [0, 1, 1]]), (-1, [[0, 1, 1], [0, 0, 0]])):
        data = load(tmp_path, rows[::order], "labelled", labels=("a", "b"))
        assert collate_texts(data.examples)["token_type_ids"][:, :3].tolist() == want


def test_known_texts_are_shared_by_sources(tmp_path):
    reading = Reading("pairs", 8)
    file = tmp_path / "a.csv"
    file.write_text("anchor,positive\nab,c\n")
    first, second = (load_columns(file, TOY, reading).examples[0] for _ in range(2))
    assert first.same == second.same


def test_texts_that_are_the_same_tokens_are_the_same(tmp_path):
    """Cut to its first letters one text is the other, in their vectors too."""
    rows = [{"anchor": "abc", "positive": "x"}, {"anchor": "abd", "positive": "abe"}]
    first, second = load(tmp_path, rows, "pairs", max_length=2).examples
    assert first.same["anchor"] == second.same["anchor"] == second.same["positive"] != first.same["positive"]


@pytest.mark.parametrize(("max_length", "pair"), [(1, None), (2, "end")])
def test_a_length_without_room_for_special_tokens(tmp_path, max_length, pair):
    """The tokenizer of such a BERT cuts nothing off then."""
    file, tokenizer = tmp_path / "rows.jsonl", make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    file.write_text(json.dumps({"text": "the cat", "text_pair": pair, "label": 0}))
    with pytest.raises(DataError, match=f"rows.jsonl:1: max_length {max_length}: . special tokens leave no"):
        load_columns(file, tokenizer, Reading("labelled", max_length, labels=("a", "b")))
    if pair is None:
        with pytest.raises(DataError, match=f"max_length {max_length}: 2 special tokens leave no room"):
            jaxft.embed(jaxft.testing.tiny_llama(), tokenizer, ["the cat"], max_length=max_length)


BAD = [
    ("pairs", {"anchor": "a"}, "positive: text is expected, the row has no such column; it has 'anchor'"),
    ("pairs", {"anchor": "  ", "positive": "b"}, "anchor: it is empty"),
    ("triplets", {"anchor": "a", "positive": "b", "negative": ["c", ""]}, "negative: it is empty"),
    ("labelled", {"text": "a", "label": "z"}, "label: 'z' is none of the 2 classes"),
    ("labelled", {"text": "a", "label": 2}, "label: 2 is none of the 2 classes"),
    ("labelled", {"text": "a", "label": None}, "label: a class number or name is expected, this is NoneType"),
    (
        "labelled",
        {"text": "a", "label": 1.5},
        "label: a class number or name is expected, this is float: 1.5; to predict numbers",
    ),
    ("labelled", {"text": "a"}, "label: the row has no such column; it has 'text'"),
    (
        "scored_pairs",
        {"sentence1": "a", "sentence2": "b", "score": 1.5},
        "score: 1.5 is outside 0 to 1; data.score_r",
    ),
    ("scored_pairs", {"sentence1": "a", "sentence2": "b", "score": "high"}, "score: a finite number is expected"),
    ("scored_pairs", {"sentence1": "a", "sentence2": "b", "score": None}, "score: a finite number is expected"),
    ("scored_pairs", {"sentence1": "a", "sentence2": "b", "score": "nan"}, "score: a finite number is expected"),
]
GOOD = {
    "pairs": {"anchor": "a", "positive": "b"},
    "triplets": {"anchor": "a", "positive": "b", "negative": ["c", "d"]},
    "labelled": {"text": "a", "label": "p"},
    "scored_pairs": {"sentence1": "a", "sentence2": "b", "score": 1},
}


@pytest.mark.parametrize(("format", "row", "reason"), BAD)
def test_a_bad_row_is_named(tmp_path, format, row, reason):
    labels = {"labels": ("p", "q")} if format == "labelled" else {}
    with pytest.raises(DataError, match="1 of 2 rows cannot be used") as refused:
        load(tmp_path, [GOOD[format], row], format, **labels)
    assert f"rows.jsonl:2: {reason}" in str(refused.value)
    data = load(tmp_path, [GOOD[format], row], format, skip=True, **labels)
    assert (len(data), [bad.place[-7:] for bad in data.skipped]) == (1, ["jsonl:2"])


def test_negatives_are_as_many_in_each_row(tmp_path):
    rows = [GOOD["triplets"], {**GOOD["triplets"], "negative": "c"}]
    with pytest.raises(DataError, match="jsonl:2: negative: 1 texts, but 2 in the first row"):
        load(tmp_path, rows, "triplets")


def test_classes():
    assert classes_of([2, 0]) == ("0", "1", "2")
    assert class_id(1, ("b", "a")) == 1
    with pytest.raises(DataError, match="nearest: 'shoes'"):
        class_id("shoe", ("hats", "shoes"))
    with pytest.raises(DataError, match="label: 2 is none of the 3 classes"):
        class_id(2, ("1", "a", "b"))  # as an index it would be b
    with pytest.raises(DataError, match="label: 2000000000 is far too great for a class among 2 labels"):
        classes_of([0, 2_000_000_000])
    assert (as_label("--5"), as_label("5-"), as_label("7")) == ("--5", "5-", 7)


def test_a_text_is_never_padded_past_the_table():
    text = {"input_ids": np.arange(9, dtype=np.int32)}
    assert [pad([text], 1, limit)["input_ids"].shape[1] for limit in (None, 10, 9)] == [12, 10, 9]


def classes(counts):
    rows = [(c, n) for c, count in enumerate(counts) for n in range(count)]
    return [
        Dataset([jaxft.data.Texts({"text": {"input_ids": np.array([c, n], np.int32)}}, {}, c, "") for c, n in rows])
    ]


def test_every_batch_of_classes_has_positives():
    batches = GroupedBatches(classes([9, 2, 4, 1]), batch_size=6, collate=collate_texts, steps=20)
    seen = Counter()
    for n in range(20):
        batch = batches[n]
        rows = list(map(tuple, batch["input_ids"][:, :2].tolist()))
        seen.update(rows)
        assert len(rows) == 6
        left = list(rows)
        while len(left) > 1:  # the partner of the last may be cut off
            first = left.pop(0)
            if first[0] != 3:  # the class of one row
                mate = left.pop(0)
                assert mate[0] == first[0] and mate != first
        assert all(np.array_equal(batch[name], batches[n][name]) for name in batch)
    assert len(seen) == 16  # every row comes


def test_random_batches_keep_the_order():
    """Without a window a batch is a run of the order: lengths do not choose the negatives."""
    data = classes([20])
    batches = TrainBatches(data, batch_size=5, collate=collate_texts, window=1, steps=4)
    seen = [int(n) for i in range(4) for n in batches[i]["input_ids"][:, 1]]
    assert sorted(seen) == list(range(20))
    assert [sorted(seen[i : i + 5]) for i in (0, 5)] != [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]

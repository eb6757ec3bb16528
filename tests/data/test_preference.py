"""Answers that were compared: their tokens and labels, what is left out, and rows that cannot be used."""

import json

import numpy as np
import pytest
from texts import CHATML, make_tokenizer

import jaxft
from jaxft.data import Dataset, TrainBatches, collate_comparisons, load_comparisons
from jaxft.data.tokens import example
from jaxft.errors import DataError

TOY = jaxft.testing.ToyTokenizer()
USER, MORE = {"role": "user", "content": "the cat?"}, {"role": "user", "content": "and?"}
YES, NO = {"role": "assistant", "content": "it is"}, {"role": "assistant", "content": "there it sat"}
END = {"role": "assistant", "content": "the end"}


def load(tmp_path, rows, tokenizer=TOY, format="preference", **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_comparisons(file, tokenizer, format=format, **options)


def said(tokenizer, row):
    """Return the prompt and the trained part of each answer of a row, as text."""
    return [
        (tokenizer.decode(a.input_ids[: a.prompt]), tokenizer.decode([i for i in a.labels if i != -100]))
        for a in row.answers
    ]


def test_prompt_and_answers_are_tokenised_apart(tmp_path):
    """The begin token once, the end token once, labels on the answer alone: exact to the token."""
    tokenizer = make_tokenizer()
    row = {"prompt": "the c", "chosen": "at", "rejected": "at sat</s>", "margin": 2}
    (pair,) = load(tmp_path, [row], tokenizer).examples
    apart = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for answer, text in zip(pair.answers, ("at", "at sat"), strict=True):
        prompt = [*begin, *apart("the c")]
        assert answer.input_ids.tolist() == [*prompt, *apart(text), *end]
        assert answer.labels.tolist() == [-100] * len(prompt) + [*apart(text), *end]
        assert answer.prompt == len(prompt)
    assert apart("the cat") != [*apart("the c"), *apart("at")]  # which is what would come of them jointly
    assert (pair.margin, len(pair), pair.place[-12:]) == (2.0, len(pair.answers[1]), "rows.jsonl:1")


IMPLICIT = [
    ("Q: why? A: yes", "Q: why? A: no", ("Q: why? A:", " yes", " no")),  # the space goes with the answers, as in trl
    ("A: the mat", "A: the man", ("A: the", " mat", " man")),  # no word is cut in two
    ("on the mat", "on the mat and on", ("on the", " mat", " mat and on")),  # neither answer may be empty
    ("Q: hi A: yes, sir", "Q: hi A: yes", ("Q: hi A:", " yes, sir", " yes")),
    ("mat and", "mat", ("", "mat and", "mat")),
    ("猫在哪里?在这", "猫在哪里?不在", ("猫在哪里?", "在这", "不在")),
    ("mat", "cat", ("", "mat", "cat")),
]


@pytest.mark.parametrize(("chosen", "rejected", "expected"), IMPLICIT)
def test_whole_texts_without_a_prompt(tmp_path, chosen, rejected, expected):
    tokenizer, row = make_tokenizer(), {"prompt": None, "chosen": chosen, "rejected": rejected}
    prompt, *answers = expected
    (pair,) = load(tmp_path, [row], tokenizer).examples
    assert said(tokenizer, pair) == [(f"<s>{prompt}", f"{answer}</s>") for answer in answers]


CHATS = {
    "apart": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "with keys of their own": {"chosen": [{**USER, "id": 1}, YES], "rejected": [{**USER, "id": 2}, NO]},
    "with the prompt as text too": {"prompt": "the cat?", "chosen": [USER, YES], "rejected": [USER, NO]},
}


@pytest.mark.parametrize("form", CHATS)
def test_conversations(tmp_path, form):
    """They end with the token that ends the turn, where an answer that is drawn ends too."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    (pair,) = load(tmp_path, [CHATS[form]], tokenizer).examples
    asked = "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"
    assert said(tokenizer, pair) == [(asked, "it is<|im_end|>"), (asked, "there it sat<|im_end|>")]
    assert [tokenizer.decode(a.input_ids)[-10:] for a in pair.answers] == ["<|im_end|>"] * 2
    assert [a.answer for a in pair.answers] == ["it is", "there it sat"]


def test_turns_of_the_assistant_before_the_border_are_no_answer(tmp_path):
    """And what it says after it is, turn by turn, but not what the user says between."""
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = {"chosen": [USER, YES, MORE, END, MORE, NO], "rejected": [USER, YES, MORE, NO]}
    (pair,) = load(tmp_path, [row], tokenizer).examples
    asked = tokenizer.apply_chat_template([USER, YES, MORE], tokenize=False, add_generation_prompt=True)
    assert said(tokenizer, pair) == [
        (asked, "the end<|im_end|>there it sat<|im_end|>"),
        (asked, "there it sat<|im_end|>"),
    ]


def test_rankings_of_different_length(tmp_path):
    rows = [{"prompt": "ab", "answers": ["c", "d", "e"]}, {"prompt": "b", "answers": ["a", "cd"]}]
    data = load(tmp_path, rows, format="ranking")
    assert [[said(TOY, row)[k][1] for k in range(len(row.answers))] for row in data.examples] == [
        ["c", "d", "e"],
        ["a", "cd"],
    ]
    batch = collate_comparisons(data.examples, rows=3, count=3)
    assert sorted(batch) == sorted(
        f"answer_{k}_{kind}" for k in (1, 2, 3) for kind in ("input_ids", "attention_mask", "labels")
    )
    there = np.stack([batch[f"answer_{k}_attention_mask"].any(1) for k in (1, 2, 3)], 1)
    assert there.tolist() == [[True, True, True], [True, True, False], [False] * 3]
    talks = [{"prompt": [USER], "answers": [[YES], [NO], [END]]}]
    (talk,) = load(tmp_path, talks, make_tokenizer(chat_template=CHATML), format="ranking").examples
    assert [answer.answer for answer in talk.answers] == ["it is", "there it sat", "the end"]


def test_a_batch_by_hand():
    """One width for both answers; missing rows are padding in every array."""
    row = lambda *answers: jaxft.data.Comparison(
        tuple(example([5, 6, *a], [False, False, *[True] * len(a)], prompt=2) for a in answers)
    )
    batch = collate_comparisons([row([7], [8, 9]), row([1, 2, 3], [4])], rows=3, limit=5, margins=True)
    assert {name: x.tolist() for name, x in batch.items() if name.startswith("chosen")} == {
        "chosen_input_ids": [[5, 6, 7, 0, 0], [5, 6, 1, 2, 3], [0] * 5],
        "chosen_attention_mask": [[1, 1, 1, 0, 0], [1] * 5, [0] * 5],
        "chosen_labels": [[-100, -100, 7, -100, -100], [-100, -100, 1, 2, 3], [-100] * 5],
    }
    assert batch["rejected_labels"].tolist() == [[-100, -100, 8, 9, -100], [-100, -100, 4, -100, -100], [-100] * 5]
    assert np.isnan(batch["margin"]).all() and batch["margin"].dtype == np.float32
    assert collate_comparisons([row([7], [8])])["rejected_input_ids"].shape == (1, 32)


def test_longer_rows_are_left_out_and_never_cut(tmp_path):
    """Where the rejected answer is the longer one too, and of a ranking any."""
    rows = [{"prompt": "ab", "chosen": "c", "rejected": r} for r in ("d", "dd", "de")]
    data = load(tmp_path, [*rows[:2], {**rows[0], "chosen": "ccc"}], max_length=5)
    assert [len(row) for row in data.examples] == [4, 5]
    (dropped,) = data.dropped
    assert dropped.place.endswith("jsonl:3") and dropped.reason == "6 tokens, more than max_length 5"
    with pytest.raises(DataError, match=r"no row is left to use[\s\S]*jsonl:1: 4 tokens, more than max_length 3"):
        load(tmp_path, rows, max_length=3)
    lists = [{"prompt": "a", "answers": ["b", "c", "ddd"]}, {"prompt": "a", "answers": ["b", "c"]}]
    assert len(load(tmp_path, lists, format="ranking", max_length=4).examples) == 1


P = {"prompt": "ab"}
BAD = [
    ({**P, "chosen": "c", "rejected": "c"}, "chosen and rejected are the same: 'c'"),
    ({**P, "chosen": "c"}, "rejected: text is expected, the row has no such column; it has 'prompt', 'chosen'"),
    ({**P, "chosen": "c", "rejected": "  "}, "rejected: it is empty"),
    ({**P, "chosen": 3, "rejected": "c"}, "chosen: text is expected, this is int: 3"),
    (
        {**P, "chosen": "c", "rejected": [YES]},
        "answers of one kind are expected, but chosen is text and rejected is a list",
    ),
    ({"prompt": "", "chosen": "c", "rejected": "d"}, "prompt: it is empty"),
    ({"prompt": [USER], "chosen": "c", "rejected": "d"}, "prompt is a list of turns, but chosen is text: give the an"),
    ({"prompt": [USER], "chosen": [YES, MORE], "rejected": [NO]}, "chosen: an answer ends with the assistant's turn"),
    ({"prompt": [USER], "chosen": YES, "rejected": NO}, "chosen: this is a single turn; a list of turns is expected"),
    ({"prompt": USER, "chosen": [YES], "rejected": [NO]}, "prompt: this is a single turn; a list of turns is expected"),
    ({"chosen": [YES], "rejected": [NO]}, "prompt: it is empty: the answers have no common first turns"),
    ({**P, "chosen": "c", "rejected": "d", "margin": "far"}, "margin: a finite number is expected, this is 'far'"),
    ({**P, "chosen": [YES], "rejected": [NO]}, "prompt is text, but chosen is a list of turns: give the prompt as"),
    ({"prompt": [USER, YES], "chosen": [END], "rejected": [NO]}, "prompt: it ends with the assistant's turn"),
    ({"prompt": [USER], "chosen": [MORE, YES], "rejected": [NO]}, "chosen: an answer begins with the assistant's turn"),
    ({"chosen": [USER, YES], "rejected": [USER, YES, MORE, NO]}, "prompt: it ends with the assistant's turn"),
    ({"prompt": [USER], "chosen": [YES], "rejected": [{**NO, "content": " "}]}, "rejected: the assistant says nothing"),
    ({"prompt": [USER], "chosen": [YES], "rejected": [YES]}, "chosen and rejected are the same: 'it is'"),
    ({"prompt": [USER], "chosen": [YES], "rejected": ["no"]}, "rejected: a list of turns is expected"),
]
LISTS = [
    ({**P, "answers": ["c"]}, "answers: a list of two answers at least is expected, best first; this is 1 of them"),
    ({**P, "answers": "c"}, "answers: a list of two answers at least is expected, best first; this is 'c'"),
    ({"answers": ["c", "d"]}, "prompt: text is expected, the row has no such column"),
    ({**P, "answers": ["c", "d", "c"]}, "answers[0] and answers[2] are the same: 'c'"),
    ({**P, "answers": ["c", None]}, "answers[1]: text is expected, this is null"),
    ({**P, "answers": [[YES], [NO]]}, "prompt is text, but answers[0] is a list of turns: give the prompt as"),
    ({"prompt": [USER], "answers": [YES, NO]}, "answers[0]: this is a single turn; a list of turns is expected"),
]


@pytest.mark.parametrize(
    ("format", "row", "reason"), [*(("preference", *bad) for bad in BAD), *(("ranking", *bad) for bad in LISTS)]
)
def test_bad_rows_are_named_or_left_out(tmp_path, format, row, reason):
    good = {"preference": {**P, "chosen": "c", "rejected": "d"}, "ranking": {**P, "answers": ["c", "d"]}}[format]
    tokenizer = make_tokenizer(chat_template=CHATML)
    with pytest.raises(DataError) as raised:
        load(tmp_path, [good, row], tokenizer, format=format)
    assert f"rows.jsonl:2: {reason}" in str(raised.value)
    data = load(tmp_path, [good, row], tokenizer, format=format, skip_bad_rows=True)
    assert (len(data), [bad.place[-12:] for bad in data.skipped]) == (1, ["rows.jsonl:2"])


@pytest.mark.parametrize("margin", [None, "", " ", float("nan"), "nan"])
def test_a_margin_that_is_none(tmp_path, margin):
    (pair,) = load(tmp_path, [{**P, "chosen": "c", "rejected": "d", "margin": margin}]).examples
    assert pair.margin is None


def test_what_the_tokenizer_lacks(tmp_path):
    with pytest.raises(DataError, match="no chat template"):
        load(tmp_path, [CHATS["apart"]], make_tokenizer())
    plain = make_tokenizer(eos_token=None)
    with pytest.raises(DataError, match="^the tokenizer has no end token"):
        load(tmp_path, [{**P, "chosen": "c", "rejected": "d"}], plain)
    refuses = "{{ raise_exception('no system here') }}"
    with pytest.raises(DataError, match=r"jsonl:1: the chat template refuses this conversation: no system here"):
        load(tmp_path, [CHATS["apart"]], make_tokenizer(chat_template=refuses))


def test_formats_and_columns(tmp_path):
    row = {"question": "ab", "chosen": "c", "rejected": "d"}
    assert len(load(tmp_path, [row], columns={"prompt": "question"})) == 1
    with pytest.raises(DataError, match="preference rows have no such column; nearest: 'chosen'"):
        load(tmp_path, [row], columns={"chosn": "question"})
    with pytest.raises(DataError, match="format 'pairs' is unknown"):
        load(tmp_path, [row], format="pairs")


def test_rows_are_told_apart_and_dealt_out():
    """Their fingerprints differ where an answer, the order or the margin does; batches take them as any rows."""
    one = lambda *ids, margin=None: jaxft.data.Comparison(
        tuple(example([5, i], [False, True], prompt=1) for i in ids), margin
    )
    rows = [one(1, 2), one(2, 1), one(1, 2, margin=1.0), one(1, 3)]
    assert len({b"".join(row.parts()) for row in rows}) == 4
    batches = TrainBatches([Dataset(rows)], batch_size=2, steps=2, collate=collate_comparisons)
    seen = sorted(int(i) for n in range(2) for i in batches[n]["rejected_input_ids"][:, 1])
    assert seen == [1, 2, 2, 3]

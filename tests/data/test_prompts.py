"""Prompts: their tokens, the columns beside them, what is left out, and rows that cannot be used."""

import hashlib
import json

import numpy as np
import pytest
from texts import CHATML, make_tokenizer

import jaxft
from jaxft.data import Dataset, Prompt, TrainBatches, collate_prompts, load_prompts, numbered
from jaxft.data.prompts import columns_of
from jaxft.errors import DataError

TOY = jaxft.testing.ToyTokenizer()


def load(tmp_path, rows, tokenizer=TOY, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(file, tokenizer, **options)


def test_a_text_is_the_beginning_of_a_row(tmp_path):
    """The begin token once, no end token, and every other column as it is."""
    tokenizer = make_tokenizer()
    row = {"prompt": "the cat", "answer": "7", "tags": ["a", {"b": 1}], "none": None}
    (prompt,) = load(tmp_path, [row], tokenizer).examples
    assert prompt.input_ids.tolist() == tokenizer("the cat")["input_ids"]
    assert prompt.input_ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in prompt.input_ids
    assert (prompt.said, prompt.place[-12:]) == ("the cat", "rows.jsonl:1")
    assert prompt.columns == {"answer": "7", "tags": ["a", {"b": 1}], "none": None}


def test_a_conversation_ends_where_the_assistant_is_to_speak(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the end?"}]
    (prompt,) = load(tmp_path, [{"prompt": turns, "answer": 1}], tokenizer).examples
    said = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nthe end?<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.said == said
    assert prompt.input_ids.tolist() == tokenizer(said, add_special_tokens=False)["input_ids"]


def test_columns_have_other_names_in_the_file(tmp_path):
    row = {"question": "ab", "solution": "4", "left": 1}
    (prompt,) = load(tmp_path, [row], columns={"prompt": "question", "answer": "solution"}).examples
    assert (prompt.said, prompt.columns) == ("ab", {"answer": "4", "left": 1})


def test_longer_prompts_are_left_out_and_never_cut(tmp_path):
    data = load(tmp_path, [{"prompt": "abc"}, {"prompt": "abcd"}, {"prompt": "a"}], max_length=3)
    assert [len(row) for row in data.examples] == [3, 1]
    (dropped,) = data.dropped
    assert dropped.place.endswith("jsonl:2") and "4 tokens, more than max_length 3" in dropped.reason
    with pytest.raises(DataError, match=r"no row is left to use[\s\S]*jsonl:1: the prompt has 3 tokens"):
        load(tmp_path, [{"prompt": "abc"}], max_length=2)


BAD = [
    ({"answer": 1}, "prompt: text is expected, the row has no such column; it has 'answer'"),
    ({"prompt": " "}, "prompt: it is empty"),
    ({"prompt": 3}, "prompt: text is expected, this is int: 3"),
    ({"prompt": "a\ud800"}, "prompt: half a character"),
    ({"prompt": []}, "prompt: a list of turns is expected"),
    ({"prompt": [{"role": "robot", "content": "a"}]}, "prompt: unknown role 'robot'"),
    ({"prompt": [{"role": "user"}]}, "content: text is expected"),
    (
        {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        "prompt: the last turn is the assistant's",
    ),
    ({"prompt": [{"role": "user", "content": "a"}]}, "the rows are conversations, but the tokenizer has no chat"),
    ({"prompt": "a", "completions": "b"}, "completions: a reward function gets something else by this name"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named(tmp_path, row, reason):
    with pytest.raises(DataError, match="1 of 2 rows cannot be used") as refused:
        load(tmp_path, [{"prompt": "a"}, row])
    assert f"rows.jsonl:2: {reason}" in str(refused.value)
    data = load(tmp_path, [{"prompt": "a"}, row], skip_bad_rows=True)
    assert (len(data), [bad.place[-7:] for bad in data.skipped]) == (1, ["jsonl:2"])


def test_a_template_that_refuses(tmp_path):
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(DataError, match="prompt: the chat template refuses this conversation: no system"):
        load(tmp_path, [{"prompt": [{"role": "user", "content": "a"}]}], tokenizer)


def test_a_tokenizer_without_an_end_token(tmp_path):
    with pytest.raises(DataError, match="the tokenizer has no end token"):
        load(tmp_path, [{"prompt": "the cat"}], make_tokenizer(eos_token=None))


def test_a_row_lacks_a_column_that_is_named(tmp_path):
    with pytest.raises(DataError, match="jsonl:2: solution: the row has no such column; it has 'prompt'"):
        load(tmp_path, [{"prompt": "a", "solution": 1}, {"prompt": "b"}], columns={"answer": "solution"})


def prompts(*texts):
    return [Prompt(np.array(TOY(text)["input_ids"], np.int32), text, {"n": i}) for i, text in enumerate(texts)]


def test_batches_are_padded_left_to_one_width_and_carry_their_rows():
    first, second = numbered([Dataset(prompts("abc", "b")), Dataset(prompts("cc"))])
    batch = collate_prompts([second.examples[0], first.examples[1]], width=4, rows=3, repeat=2)
    assert batch["input_ids"].tolist() == [[0, 0, 3, 3]] * 2 + [[0, 0, 0, 2]] * 2 + [[0, 0, 3, 3]] * 2
    assert batch["attention_mask"].tolist() == [[0, 0, 1, 1]] * 2 + [[0, 0, 0, 1]] * 2 + [[0, 0, 1, 1]] * 2
    assert batch["row"].tolist() == [2, 2, 1, 1, -1, -1]
    assert all(x.dtype == np.int32 for x in batch.values())
    with pytest.raises(DataError, match="prompts wider than their batch"):
        collate_prompts(first.examples, width=2)


def test_the_batches_of_a_run():
    from functools import partial

    data = numbered([Dataset(prompts("abc", "b", "cd", "a"))])
    collate = partial(collate_prompts, width=3, repeat=2)
    batches = TrainBatches(data, batch_size=2, steps=2, window=1, collate=collate)
    seen = [batches[n]["row"].tolist() for n in range(2)]
    assert all(row[0] == row[1] and row[2] == row[3] for row in seen)
    assert sorted(n for row in seen for n in row[::2]) == [0, 1, 2, 3]


def test_a_row_is_told_from_others_by_its_columns_too():
    def digest(prompt):
        return hashlib.sha256(b"".join(prompt.parts())).hexdigest()

    ids = np.array([1], np.int32)
    digests = {digest(Prompt(ids, "a", {"answer": x, "n": 1})) for x in ("3", 3, None, "\ud800")}
    assert len(digests) == 4
    assert digest(Prompt(ids, "a", {"n": 1, "answer": 3})) in digests  # in whatever order


def test_columns_that_some_rows_lack():
    assert columns_of(prompts("a", "b")) == {"n": [0, 1]}
    assert columns_of([Prompt(np.array([1]), "a"), *prompts("b")]) == {"n": [None, 0]}

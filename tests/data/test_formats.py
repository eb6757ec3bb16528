"""The mask, exact to the token: what is trained is decoded and looked at, for every format and language."""

import json

import numpy as np
import pytest
from texts import CHATML, make_tokenizer

from jaxft.data import FORMATS, Template, load_dataset
from jaxft.errors import DataError
from jaxft.testing import ToyTokenizer

ZH, EN = "识别并解释这些理论。", "Name the cat, e\u0301 \U0001f600."


def load(tmp_path, rows, tokenizer, format, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(file, tokenizer, format=format, **options)


def only(tmp_path, row, tokenizer, format, **options):
    (one,) = load(tmp_path, [row], tokenizer, format, **options).examples
    return one


def trained(tokenizer, example):
    return tokenizer.decode(example.labels[example.labels != -100])


def given(tokenizer, example):
    return tokenizer.decode(example.input_ids[: example.prompt])


def test_the_formats_are_these():
    assert list(FORMATS) == ["instruction", "prompt_completion", "messages", "text"]


@pytest.mark.parametrize("answer", [ZH, EN, " spaced ", "a\u2028b", "ends</s>"])
@pytest.mark.parametrize("more", [{}, {"input": ""}, {"input": None}, {"input": "  "}, {"input": "a {instruction} x"}])
def test_instruction(tmp_path, tokenizer, answer, more):
    row = only(tmp_path, {"instruction": ZH, "output": answer, **more}, tokenizer, "instruction")
    whole = answer if answer.endswith("</s>") else answer + "</s>"  # the end token always, and once
    assert trained(tokenizer, row) == whole
    part = f"### Input:\n{more['input']}\n\n" if (more.get("input") or "").strip() else ""
    assert given(tokenizer, row) == f"<s>### Instruction:\n{ZH}\n\n{part}### Response:\n"
    assert tokenizer.decode(row.input_ids) == given(tokenizer, row) + whole
    assert row.answer == answer


def test_a_template_of_ones_own(tmp_path, tokenizer):
    mine = Template("Q: {instruction} ({input})\nA:", "Q: {instruction}\nA:")
    row = only(tmp_path, {"instruction": "Add", "input": "1 2", "output": "3"}, tokenizer, "instruction", template=mine)
    assert given(tokenizer, row) == "<s>Q: Add (1 2)\nA:"
    with pytest.raises(DataError, match=r"template.prompt_input must hold {instruction} and {input}"):
        Template("{instruction}", "{instruction}")
    with pytest.raises(DataError, match=r"template.prompt_no_input must hold {instruction} and no other"):
        Template("{instruction} {input}", "{instruction} {output}")


def test_prompt_and_completion_are_tokenised_apart(tmp_path):
    """Jointly "th" + "e" is one token: the border would move into the prompt."""
    tokenizer = make_tokenizer()
    joint = tokenizer("th" + "e cat")["input_ids"]
    row = only(tmp_path, {"prompt": "th", "completion": "e cat"}, tokenizer, "prompt_completion")
    assert row.input_ids.tolist() != [*joint, tokenizer.eos_token_id]
    assert given(tokenizer, row) == "<s>th"
    assert trained(tokenizer, row) == "e cat</s>"
    assert row.input_ids.tolist().count(tokenizer.bos_token_id) == 1


def test_begin_and_end_stand_once(tmp_path, tokenizer):
    row = only(tmp_path, {"text": "<s>the cat</s>"}, tokenizer, "text")
    assert tokenizer.decode(row.input_ids) == "<s>the cat</s>"
    row = only(tmp_path, {"text": "the cat"}, tokenizer, "text")
    assert tokenizer.decode(row.input_ids) == "<s>the cat</s>"
    assert row.labels.tolist() == row.input_ids.tolist()
    row = only(tmp_path, {"text": "<s><|im_start|>user\nhi<|im_end|>\n"}, tokenizer, "text")  # rendered elsewhere
    assert tokenizer.decode(row.input_ids) == "<s><|im_start|>user\nhi<|im_end|>\n"
    row = only(tmp_path, {"prompt": "<s>the", "completion": " cat</s>"}, tokenizer, "prompt_completion")
    assert tokenizer.decode(row.input_ids) == "<s>the cat</s>"


@pytest.mark.parametrize("kind", ["unk_token", "pad_token", "bos_token"])
def test_a_special_token_that_ends_nothing_is_no_end(tmp_path, kind):
    odd = make_tokenizer(begin=False, additional_special_tokens=[], **{kind: "<|im_end|>"})
    row = only(tmp_path, {"prompt": "the", "completion": "cat<|im_end|>"}, odd, "prompt_completion")
    assert trained(odd, row) == "cat<|im_end|></s>"


def test_a_pad_token_that_is_the_end_token_changes_nothing(tmp_path, tokenizer):
    both = make_tokenizer(pad_token="</s>")
    rows = [only(tmp_path, {"prompt": "the", "completion": "cat"}, t, "prompt_completion") for t in (tokenizer, both)]
    assert rows[0].labels.tolist() == rows[1].labels.tolist()
    assert rows[1].labels[-1] == both.eos_token_id


def test_truncation_never_shifts_the_mask(tmp_path, tokenizer):
    row = {"prompt": "the cat sat", "completion": " on the mat"}
    whole = only(tmp_path, row, tokenizer, "prompt_completion")
    seen = 0
    for length in range(whole.prompt + 1, len(whole) + 2):
        data = load(tmp_path, [row], tokenizer, "prompt_completion", max_length=length)
        (cut,) = data.examples
        assert cut.input_ids.tolist() == whole.input_ids[:length].tolist()
        assert cut.labels.tolist() == [-100] * whole.prompt + whole.input_ids[whole.prompt : length].tolist()
        assert data.cut == (length < len(whole))
        seen += 1
    assert seen == len(whole) - whole.prompt + 1 > 3


def test_an_answer_that_is_cut_away_is_listed(tmp_path, tokenizer):
    rows = [{"prompt": "the", "completion": "a"}, {"prompt": "the cat " * 20, "completion": "b"}]
    data = load(tmp_path, rows, tokenizer, "prompt_completion", max_length=16)
    assert len(data) == 1
    assert len(data.dropped) == 1
    assert str(data.dropped[0]).startswith(f"{tmp_path}/rows.jsonl:2: nothing to train is left")
    with pytest.raises(DataError, match="no row is left to use"):
        load(tmp_path, rows[1:], tokenizer, "prompt_completion", max_length=16)


BAD = [
    ("instruction", {"instruction": "say"}, "output: text is expected, the row has no such column"),
    ("instruction", {"instruction": "say", "output": 5}, "output: text is expected, this is int: 5"),
    ("instruction", {"instruction": "say", "output": None}, "output: text is expected, this is null"),
    ("instruction", {"instruction": ["say"], "output": "x"}, "instruction: text is expected, this is list"),
    ("instruction", {"instruction": "say", "input": 7, "output": "x"}, "input: text is expected, this is int"),
    ("instruction", {"instruction": "say", "output": ""}, "output: it is empty"),
    ("instruction", {"instruction": " \n", "output": "x"}, "instruction: it is empty"),
    ("prompt_completion", {"prompt": "", "completion": "x"}, "prompt: it is empty"),
    ("prompt_completion", {"prompt": "x", "completion": " "}, "completion: it is empty"),
    ("text", {"text": "\ud800"}, "text: half a character"),
    ("text", {"text": float("nan")}, "text: text is expected, this is float: nan"),
    ("messages", {"messages": "hi"}, "messages: a list of turns is expected"),
    ("messages", {"messages": []}, "messages: a list of turns is expected"),
    ("messages", {"messages": [{"role": "user", "content": "x"}]}, "messages: the assistant says nothing"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "messages: unknown role 'robot'; there are system"),
    ("messages", {"messages": [{"role": "user"}]}, "content: text is expected"),
    (
        *("messages", {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}]}),
        "messages: tool_calls are not supported",
    ),
]


@pytest.mark.parametrize(("format", "row", "message"), BAD)
def test_a_bad_row_is_named(tmp_path, tokenizer, format, row, message):
    tokenizer = make_tokenizer(chat_template=CHATML)
    good = {
        "instruction": {"instruction": "a", "output": "b"},
        "prompt_completion": {"prompt": "a", "completion": "b"},
        "text": {"text": "a"},
        "messages": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    }[format]
    with pytest.raises(DataError) as raised:
        load(tmp_path, [good, row, good], tokenizer, format)
    assert f"{tmp_path}/rows.jsonl:2: {message}" in str(raised.value)
    assert "1 of 3 rows cannot be used" in str(raised.value)
    data = load(tmp_path, [good, row, good], tokenizer, format, skip_bad_rows=True)
    assert len(data) == 2
    assert [message in str(bad) for bad in data.skipped] == [True]


def test_columns_of_other_names(tmp_path, tokenizer):
    rows = [{"question": "the", "answer": "cat"}]
    names = {"prompt": "question", "completion": "answer"}
    (row,) = load(tmp_path, rows, tokenizer, "prompt_completion", columns=names).examples
    assert trained(tokenizer, row) == "cat</s>"
    with pytest.raises(DataError, match="promt: prompt_completion rows have no such column; nearest: 'prompt'"):
        load(tmp_path, rows, tokenizer, "prompt_completion", columns={"promt": "question"})
    with pytest.raises(DataError, match="frage: the row has no such column; it has 'question', 'answer'"):
        load(tmp_path, rows, tokenizer, "prompt_completion", columns={"prompt": "frage"})


def test_what_the_tokenizer_lacks(tmp_path):
    with pytest.raises(DataError, match="format 'instructions' is unknown; nearest: 'instruction'"):
        load(tmp_path, [{"text": "a"}], ToyTokenizer(), "instructions")
    with pytest.raises(DataError, match="has no end token"):
        load(tmp_path, [{"text": "a"}], make_tokenizer(eos_token=None), "text")
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        load(tmp_path, [{"messages": []}], make_tokenizer(), "messages")


def test_the_first_token_of_a_row_does_not_count(tmp_path, tokenizer):
    row = only(tmp_path, {"text": "the cat"}, tokenizer, "text")
    assert row.trained == len(row) - 1 == int(np.sum(row.labels[1:] != -100))

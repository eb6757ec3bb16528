"""Conversations by every style of chat template: the assistant's words and end of turn are trained, nothing else."""

import pytest
from texts import CHATML, make_tokenizer

from jaxft.data.chat import chat_prompt, encode_chat
from jaxft.errors import DataError

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "the cat? "},
    {"role": "assistant", "content": "  the mat  "},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "the cat? 你好 the mat"},
]
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }} {% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
)
INSIDE = MARKED.replace(" {% endgeneration %}{% else %}", "<|im_end|>{% endgeneration %}{% else %}").replace(
    "{% endif %}<|im_end|>\n", "<|im_end|>{% endif %}\n"
)
EXPECTED = [
    (CHATML, ["  the mat  <|im_end|>", "the cat? 你好 the mat<|im_end|>"]),
    (LLAMA2, [" the mat </s>", " the cat? 你好 the mat </s>"]),  # " the" is one token: the space goes with it
    (PLAIN, ["  the mat  ", " the cat? 你好 the mat\n</s>"]),  # the line's end leads to the end token
    (MARKED, ["  the mat   <|im_end|>", "the cat? 你好 the mat <|im_end|>"]),
    (INSIDE, ["  the mat  <|im_end|>", "the cat? 你好 the mat<|im_end|>"]),
]


def stretches(tokenizer, row):
    """Return the text of each unbroken stretch of trained tokens."""
    found, last = [], False
    for label in row.labels:
        if label != -100 and not last:
            found.append([])
        if label != -100:
            found[-1].append(int(label))
        last = label != -100
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize(("template", "expected"), EXPECTED, ids=["chatml", "llama2", "plain", "marked", "inside"])
def test_exactly_what_the_assistant_said_is_trained(template, expected):
    tokenizer = make_tokenizer(chat_template=template)
    row = encode_chat(tokenizer, TURNS)
    assert stretches(tokenizer, row) == expected
    text = tokenizer.decode(row.input_ids)
    assert text.count("<s>") == template.count("bos_token") * 2  # as the template writes them, and none more
    assert row.answer == TURNS[-1]["content"]
    asked = tokenizer.decode(row.input_ids[: row.prompt])
    assert asked.rstrip() == text[: text.rindex("the cat? 你好")].rstrip()
    plain = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text == plain + ("</s>" if template is PLAIN else "")


def test_the_prompt_is_what_the_model_is_asked_with():
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = encode_chat(tokenizer, TURNS)
    assert row.input_ids[: row.prompt].tolist() == chat_prompt(tokenizer, TURNS[:-1])


def test_the_same_words_in_the_question_are_not_trained():
    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the cat"}]
    row = encode_chat(tokenizer, turns)
    assert stretches(tokenizer, row) == ["the cat<|im_end|>"]
    assert row.prompt > len(row) // 2


def test_one_token_that_begins_and_ends():
    """GPT-2's way: the end token is the begin token, and still it ends a turn and is trained."""
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(begin=False, bos_token="</s>", chat_template=template)
    assert stretches(tokenizer, encode_chat(tokenizer, TURNS)) == ["  the mat  </s>", "the cat? 你好 the mat</s>"]


def test_what_the_model_must_write_before_its_words_is_trained():
    """A block of thoughts that the template adds, after the prompt that asks for the turn."""
    block = "{{ '<think>\\n\\n</think>\\n\\n' if m['role'] == 'assistant' and loop.last else '' }}"
    template = CHATML.replace("\n{{ m['content'] }}", "\n" + block + "{{ m['content'] }}")
    tokenizer = make_tokenizer(chat_template=template)
    row = encode_chat(tokenizer, TURNS)
    expected = ["  the mat  <|im_end|>", "<think>\n\n</think>\n\nthe cat? 你好 the mat<|im_end|>"]
    assert stretches(tokenizer, row) == expected
    assert row.input_ids[: row.prompt].tolist() == chat_prompt(tokenizer, TURNS[:-1])


def test_a_conversation_whose_last_answer_is_cut_away_has_none():
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = encode_chat(tokenizer, TURNS)
    cut = row.cut(row.prompt)
    assert (cut.prompt, cut.answer) == (0, None)
    assert cut.trained > 0
    assert row.cut(row.prompt + 1).answer == row.answer


def test_a_conversation_that_ends_with_a_question():
    tokenizer = make_tokenizer(chat_template=CHATML)
    row = encode_chat(tokenizer, TURNS[:4])
    assert stretches(tokenizer, row) == ["  the mat  <|im_end|>"]
    assert row.answer == "  the mat  "


@pytest.mark.parametrize("change", ["[2:]", ".split('cat')[-1]"])
def test_a_template_that_rewrites_answers_is_refused(change):
    tokenizer = make_tokenizer(chat_template="{% for m in messages %}{{ m['content']" + change + " }}{% endfor %}")
    with pytest.raises(DataError, match="rewrites what the assistant said"):
        encode_chat(tokenizer, TURNS)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        chat_template = CHATML
        is_fast = False

    with pytest.raises(DataError, match="need a fast tokenizer"):
        encode_chat(Slow(), TURNS)


def test_where_the_template_marks_answers_the_mask_is_that_of_transformers():
    tokenizer = make_tokenizer(chat_template=INSIDE)
    coded = tokenizer.apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_offsets_mapping=False
    )
    row = encode_chat(tokenizer, TURNS)
    assert row.input_ids.tolist() == coded["input_ids"]
    assert (row.labels != -100).astype(int).tolist() == coded["assistant_masks"]
    assert 0 < sum(coded["assistant_masks"]) < len(row)

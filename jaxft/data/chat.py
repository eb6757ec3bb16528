"""Conversations through the tokenizer's chat template: which tokens the assistant said, exact to the token."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import DataError
from .tokens import Example, continuing, end_token, example

ROLES = ("system", "developer", "user", "assistant", "tool")
OPEN, CLOSE = "\ue0f0", "\ue0f1"  # private characters: no template and no text has a use for them
TIDIED: tuple[Callable[[str], str], ...] = (  # many templates trim what they are given
    str,
    str.strip,
    str.lstrip,
    str.rstrip,
    lambda said: said.strip("\n"),
    lambda said: said.lstrip("\n"),
)
GENERATION = re.compile(r"{%-?\s*generation\s*-?%}")


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> Example:
    """Render a conversation once and train what the assistant said: its words and the end of its turn, no header.

    Where the template marks them (`{% generation %}`), its marks are followed. Elsewhere the words are found in the
    rendered text; a turn begins where the prompt that asks for it ends, and its end is the special token that follows.
    After the last turn the end token is added if the template writes none.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Turns, each a dict of `role` and `content`.

    Returns:
        The example; its prompt ends where the last answer begins.

    Raises:
        DataError: No chat template, or one that rewrites the answers so that they cannot be found.
    """
    check_template(tokenizer)
    text, spans = _rendered(tokenizer, messages)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(coded["input_ids"])
    offsets: list[tuple[int, int]] = list(coded["offset_mapping"])
    spans = [(start, _turn_end(tokenizer, text, end)) for start, end in spans]
    unended = messages[-1]["role"] == "assistant" and not _ends(tokenizer, text[spans[-1][0] : spans[-1][1]])
    if (
        unended
    ):  # what the template writes after the last answer leads to the end token, and is written by the model too
        spans[-1] = (spans[-1][0], len(text))
    inside = [any(_said(text, a, b, start, end) for start, end in spans) for a, b in offsets]
    if unended:
        ids, inside = [*ids, end_token(tokenizer)], [*inside, True]
    prompt = next((i for i, (_, b) in enumerate(offsets) if b > spans[-1][0] and inside[i]), len(ids))
    answer = next(m["content"] for m in reversed(messages) if m["role"] == "assistant")
    return example(ids, inside, prompt=prompt, answer=answer)


def _said(text: str, a: int, b: int, start: int, end: int) -> bool:
    """Tell whether a token holds a letter of an answer, and of the header before it at most white space.

    One that joins a space to the first word, which a model writes as one, is of the answer.
    """
    return max(a, start) < min(b, end) and not text[a:start].strip()


def check_template(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot render conversations."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the rows are conversations, but the tokenizer has no chat template: use the tokenizer of a chat model, "
            "set tokenizer.chat_template and save it into the model's folder, or give the rows as plain text"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("conversations need a fast tokenizer (tokenizer.json), which tells where each token stands")


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the ids that ask the assistant for its next turn."""
    return continuing(tokenizer, asking(tokenizer, messages))


def asking(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """Return the text that asks the assistant for its next turn, special tokens written out."""
    check_template(tokenizer)
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and from where to where the assistant speaks in it."""
    if GENERATION.search(str(tokenizer.chat_template)):
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        texts, marks = rendered
        if not marks[0]:
            raise DataError("the chat template marks no answer ({% generation %}) in this conversation")
        return texts[0], [(int(mark[0]), int(mark[1])) for mark in marks[0]]
    plain = tokenizer.apply_chat_template(list(messages), tokenize=False)
    for tidy in TIDIED:
        marked = [
            {**m, "content": f"{OPEN}{tidy(m['content'])}{CLOSE}"} if m["role"] == "assistant" else m for m in messages
        ]
        text = tokenizer.apply_chat_template(marked, tokenize=False)
        spans = _take_marks(text)
        if spans is not None and text.replace(OPEN, "").replace(CLOSE, "") == plain:
            said = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            begun = [_asked(tokenizer, messages[:i], plain, at) for i, (at, _) in zip(said, spans, strict=True)]
            return plain, [(start, end) for start, (_, end) in zip(begun, spans, strict=True)]
    raise DataError(
        "the chat template rewrites what the assistant said, so it cannot be found in the rendered text: mark the "
        "answers in the template with {% generation %} ... {% endgeneration %}"
    )


def _asked(tokenizer: Any, before: Sequence[dict[str, str]], text: str, words: int) -> int:
    """Return where the model begins to write a turn: where the prompt that asks for it ends, or at its words.

    Between the two stand a space, or an empty block of thoughts, that it must write itself.
    """
    try:
        asked, plain = (
            tokenizer.apply_chat_template(list(before), tokenize=False, add_generation_prompt=on)
            for on in (True, False)
        )
    except Exception:  # a template that cannot render what stands before the first answer
        return words
    if not text.startswith(asked) or len(asked) > words:
        return words
    return len(asked) if asked != plain or not text[len(asked) : words].strip() else words


def _take_marks(text: str) -> list[tuple[int, int]] | None:
    """Return where the marked parts stand once the marks are gone; None where a mark was lost on the way."""
    spans, at, start = [], 0, None
    for letter in text:
        if letter == OPEN and start is None:
            start = at
        elif letter == CLOSE and start is not None:
            spans.append((start, at))
            start = None
        elif letter in (OPEN, CLOSE):
            return None
        else:
            at += 1
    return spans if spans and start is None else None


def _specials(tokenizer: Any) -> list[str]:
    added = [t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()]
    return sorted(
        {*added, *tokenizer.all_special_tokens} - ({tokenizer.bos_token} - {tokenizer.eos_token}), key=len, reverse=True
    )


def _turn_end(tokenizer: Any, text: str, end: int) -> int:
    """Return where a turn ends: past the special token that follows the words, white space between them included."""
    at = end + len(text[end:]) - len(text[end:].lstrip())
    following = next((s for s in _specials(tokenizer) if s and text.startswith(s, at)), None)
    return end if following is None or _ends(tokenizer, text[:end]) else at + len(following)


def _ends(tokenizer: Any, said: str) -> bool:
    return any(said.rstrip().endswith(s) for s in _specials(tokenizer) if s)

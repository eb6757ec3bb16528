"""What the columns of a row mean: one function a format, from columns to an example."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DataError
from .chat import ROLES, encode_chat
from .rows import SHOWN
from .templates import Template
from .tokens import Example, closed, closed_text, continuing, example, opening

Encode = Callable[[Any, Mapping[str, Any], Template], Example]
SURROGATE = re.compile("[\ud800-\udfff]")


def prompt_and_completion(tokenizer: Any, prompt: str, completion: str) -> Example:
    """Tokenise a prompt and its completion apart, join them, and train the completion and the end token.

    Apart, since jointly the border between them moves: a token that holds the end of one and the beginning of the
    other does not exist when the model is asked.

    Args:
        tokenizer: A tokenizer of transformers.
        prompt: What is given.
        completion: What should follow.

    Returns:
        The example.
    """
    first = opening(tokenizer, prompt)
    second = closed(tokenizer, continuing(tokenizer, completion))
    trained = [False] * len(first) + [True] * len(second)
    return example([*first, *second], trained, prompt=len(first), answer=completion)


def _instruction(tokenizer: Any, fields: Mapping[str, Any], template: Template) -> Example:
    texts = {name: text_of(fields, name) for name in ("instruction", "output")}
    given = fields.get("input")
    texts["input"] = text_of(fields, "input", empty=True) if given is not None else ""
    return prompt_and_completion(tokenizer, template.render(texts), texts["output"])


def _prompt_completion(tokenizer: Any, fields: Mapping[str, Any], template: Template) -> Example:
    del template
    return prompt_and_completion(tokenizer, text_of(fields, "prompt"), text_of(fields, "completion"))


def _messages(tokenizer: Any, fields: Mapping[str, Any], template: Template) -> Example:
    del template
    said = turns_of(fields, "messages")
    answers = [turn["content"] for turn in said if turn["role"] == "assistant"]
    if not any(answer.strip() for answer in answers):
        raise DataError("messages: the assistant says nothing in this conversation, so nothing would be trained")
    return encode_chat(tokenizer, said)


def _document(tokenizer: Any, fields: Mapping[str, Any], template: Template) -> Example:
    del template
    ids = closed_text(tokenizer, opening(tokenizer, text_of(fields, "text")))
    return example(ids, [True] * len(ids))


COLUMNS = {
    "instruction": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
}
FORMATS: dict[str, Encode] = {
    "instruction": _instruction,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "text": _document,
}


def turns_of(fields: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a column that must hold a conversation: turns of role and content.

    Raises:
        DataError: It is missing, no list of turns, or one of them has no role, an unknown one, or no content.
    """
    turns = fields.get(name)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{name}: a list of turns is expected, {_lacks(name, fields)}")
    if any(turn.get("tool_calls") for turn in turns):
        raise DataError(
            f"{name}: tool_calls are not supported: leave the conversation out, or write the call as content"
        )
    return [{**turn, "role": _role(turn, name), "content": text_of(turn, "content", empty=True)} for turn in turns]


def _role(turn: Mapping[str, Any], name: str) -> str:
    role = text_of(turn, "role")
    if role not in ROLES:
        raise DataError(f"{name}: unknown role {role!r}; there are {', '.join(ROLES)}")
    return role


def text_of(fields: Mapping[str, Any], name: str, *, empty: bool = False) -> str:
    """Return a column that must hold text.

    Raises:
        DataError: It is missing, no text, empty where it must not be, or holds half a character.
    """
    value = fields.get(name)
    if not isinstance(value, str):
        raise DataError(f"{name}: text is expected, {_lacks(name, fields)}")
    if not empty and not value.strip():
        raise DataError(f"{name}: it is empty")
    bad = SURROGATE.search(value)
    if bad:
        raise DataError(f"{name}: half a character (a lone surrogate) at {bad.start()}: {value[:SHOWN]!a}")
    return value


def _lacks(name: str, fields: Mapping[str, Any]) -> str:
    if name not in fields:
        return f"the row has no such column; it has {', '.join(map(repr, fields)) or 'none'}"
    value = fields[name]
    return f"this is {'null' if value is None else type(value).__name__}: {str(value)[:SHOWN]}"

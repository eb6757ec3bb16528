"""How an instruction becomes a prompt."""

import dataclasses
import re
from collections.abc import Mapping

from ..errors import DataError


@dataclasses.dataclass(frozen=True)
class Template:
    r"""The text put around the columns of an instruction; the answer follows it directly.

    Attributes:
        prompt_input: For a row with an input: holds `{instruction}` and `{input}`.
        prompt_no_input: For a row whose input is empty: the input's part is dropped whole.

    Raises:
        DataError: A place for a column is missing, or there is one that is no column.

    >>> Template().render({"instruction": "Say hi.", "input": ""})
    '### Instruction:\nSay hi.\n\n### Response:\n'
    >>> Template("{instruction} {input} =", "{instruction} =").render({"instruction": "Add {x}", "input": "1 2"})
    'Add {x} 1 2 ='
    """

    prompt_input: str = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
    prompt_no_input: str = "### Instruction:\n{instruction}\n\n### Response:\n"

    def __post_init__(self) -> None:
        for name, needed in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
            found = set(re.findall(r"{(\w*)}", getattr(self, name)))
            if found != needed:
                want = " and ".join(f"{{{n}}}" for n in sorted(needed, reverse=True))
                raise DataError(f"template.{name} must hold {want} and no other {{...}}: {getattr(self, name)!r}")

    def render(self, fields: Mapping[str, str]) -> str:
        """Return the prompt of a row; braces in the row's own text stay as they are."""
        form = self.prompt_input if (fields.get("input") or "").strip() else self.prompt_no_input
        return re.sub(r"{(instruction|input)}", lambda m: fields[m[1]], form)

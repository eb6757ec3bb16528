"""How tasks on encoders read texts: sources to rows of tokens, as long as the model has positions for."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Source
from ..data import Dataset
from ..data.columns import Reading, collate_texts, label_values, load_columns, text_width
from ..data.labels import as_label, classes_of
from ..errors import BatchError, ConfigError, DataError, refuse
from .start import base_shape, tokenizer_of
from .task import Data, Task, spread


class OfTexts(Task):
    """A task on texts."""

    def length(self) -> int:
        """Return how long a text may be: by config, positions of the model, and sentence-transformers folder."""
        shape = base_shape(self.config)
        if hasattr(shape, "image_size"):
            raise ConfigError("model: it reads images, and these rows are texts")
        limits = [self.config.data.max_length, getattr(shape, "n_positions", None), shape.max_seq_length]
        return min(limit for limit in limits if limit is not None)

    def read_texts(self, *, train: bool, labels: Sequence[str] | None) -> Data:
        """Read sources of texts.

        Args:
            train: Whether the training rows are wanted too.
            labels: Names of the classes; None: labels are numbers, or there are none.
        """
        config, tokenizer, length, known = self.config, tokenizer_of(self.config), self.length(), dict[bytes, int]()

        def read(source: Source) -> Dataset:
            return load_columns(
                source.path,
                tokenizer,
                Reading(source.format, length, labels, config.data.score_range, known),
                columns=source.columns,
                split=source.split,
                skip_bad_rows=config.data.skip_bad_rows,
                name=source.name,
                weight=source.weight,
            )

        training, held_out = self.read_all(read, train=train)
        return Data(tokenizer, training, held_out, tuple(labels or ()))

    def some(self, rows: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """Return so many of the held-out rows, at even distances."""
        return spread(rows, limit)

    def collate(self) -> Any:
        """Return what makes a batch of rows."""
        return partial(collate_texts, limit=self.length())

    def widest(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch of one column, as shapes."""
        ids = jax.ShapeDtypeStruct((self.config.train.batch_size, text_width(self.length())), jnp.int32)
        return {"input_ids": ids, "attention_mask": ids}

    def check_fit(self, data: Data, model: Any) -> None:
        """Refuse rows with tokens that the model does not know, or longer than it has positions for.

        Raises:
            BatchError: The tokenizer is not this model's, or its virtual tokens leave too few positions.
        """
        positions, known, ids = model.positions_left(), model.config.vocab_size, np.zeros(1, int)
        for row in (row for part in (*data.train, *data.held_out) for row in part.examples):
            top = max(int(tokens["input_ids"].max()) for tokens in row.tokens.values())
            if top >= known:
                raise BatchError(
                    f"{row.place}: it has the token {top}, but the model knows {known}: the tokenizer is not this "
                    "model's"
                )
            kinds = max(int(tokens.get("token_type_ids", ids).max()) for tokens in row.tokens.values())
            if kinds >= getattr(model.config, "type_vocab_size", kinds + 1):
                raise BatchError(
                    f"{row.place}: two texts, but the model knows {model.config.type_vocab_size} type of token: join "
                    "them yourself, into one text"
                )
            if positions is not None and len(row) > positions:
                raise BatchError(
                    f"{row.place}: it has {len(row)} tokens, but the model has {positions} positions beside its "
                    f"virtual tokens: set data.max_length to {positions}"
                )


def check_scores_differ(data: Data) -> None:
    """Refuse held-out rows whose numbers are all the same: no correlation with them is defined.

    Raises:
        DataError: They are.
    """
    for part in data.held_out:
        if len({row.value for row in part.examples}) < 2:
            raise DataError(f"{part.name}: every row has the same number, so there is no correlation to measure")


def check_known(data: Data) -> None:
    """Refuse held-out rows of a class that no training row has.

    Raises:
        DataError: They are named.
    """
    there = {row.value for part in data.train for row in part.examples}
    strange = [row for part in data.held_out for row in part.examples if row.value not in there]
    what = "held-out rows of classes that no training row has"
    refuse(DataError, what, [f"{row.place}: {data.labels[row.value]!r}" for row in strange])


def check_positives(data: Data, *, held_out: bool = False) -> None:
    """Refuse rows of classes of which none has two rows, or that are all of one class.

    Raises:
        DataError: There are no positives, or no negatives.
    """
    parts, key = (data.held_out, "data.eval") if held_out else (data.train, "data.train")
    values = [row.value for part in parts for row in part.examples]
    if len(set(values)) == 1 and not held_out:
        raise DataError(f"{key}: all rows are of one class, so nothing is pushed apart")
    if len(set(values)) == len(values):
        raise DataError(f"{key}: every class has one row, so there are no positives to pull together")


def classes_in(sources: Sequence[Source]) -> tuple[str, ...]:
    """Return the names of the classes that occur in sources of labelled rows, in order.

    Raises:
        DataError: A source that cannot be read, or has no label.
    """
    found: list[int | str] = []
    for source in sources:
        for value in label_values(source.path, source.columns, source.split):
            try:
                found.append(as_label(value))
            except DataError:
                continue  # a bad row, which is named where rows are read
    if all(isinstance(label, int) for label in found):
        return classes_of(found)
    return classes_of([str(label) for label in found])

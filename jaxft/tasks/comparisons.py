"""How tasks read answers that were compared: sources to rows of tokens, as long as the model has positions for."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..config import Config, Source
from ..data import Dataset, TrainBatches, prompt_and_completion
from ..data.batches import Batch, width_of
from ..data.preference import Comparison, collate_comparisons, columns_of, load_comparisons
from ..data.tokens import Example, continuing, example
from ..errors import BatchError, ConfigError, DataError
from ..models.encoder import TextEncoder
from ..models.hub import family_of
from .start import base_shape, tokenizer_of
from .task import Data, Task, steps_of

RANKED = 4  # answers of a ranking that a plan, which reads no rows, takes for granted


class OfComparisons(Task):
    """A task on answers that were compared.

    Attributes:
        count: The most answers that a row has.
        positions: Tokens that a row may have; None: the model has no table of positions.
    """

    positions: int | None = None

    def __init__(self, config: Config, begun: Config | None = None):
        super().__init__(config, begun)
        sources = (*config.data.train, *(config.data.eval or ()))
        self.count = RANKED if any(source.format == "ranking" for source in sources) else 2

    def is_encoder(self) -> bool:
        """Tell whether the model reads in both directions.

        Raises:
            ConfigError: It reads images.
        """
        shape = base_shape(self.config)
        if hasattr(shape, "image_size"):
            raise ConfigError("model: it reads images, and these rows are texts")
        return issubclass(family_of(shape.replace(labels=())), TextEncoder)

    def load_data(self, *, train: bool = True) -> Data:
        """Read the rows. Arguments and errors as of the task."""
        config, encoder, tokenizer = self.config, self.is_encoder(), tokenizer_of(self.config)
        self.positions = getattr(base_shape(config), "n_positions", None)
        length = min(config.data.max_length, self.positions or config.data.max_length)

        def read(source: Source) -> Dataset:
            return load_comparisons(
                source.path,
                tokenizer,
                format=source.format,
                max_length=length,
                join=one_text if encoder else prompt_and_completion,
                columns=source.columns,
                split=source.split,
                skip_bad_rows=config.data.skip_bad_rows,
                name=source.name,
                weight=source.weight,
            )

        training, held_out = self.read_all(read, train=train)
        self.count = max(len(row.answers) for part in (*training, *held_out) for row in part.examples)
        return Data(tokenizer, training, held_out)

    def collate(self) -> Any:
        """Return what makes a batch of rows."""
        return self.pad

    def pad(self, examples: Sequence[Comparison], *, rows: int | None = None) -> Batch:
        """Return a batch of rows, as wide as the model has positions for."""
        return collate_comparisons(examples, rows=rows, count=self.count, limit=self.positions)

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches: as many as asked for, or enough to see each row `epochs` times.

        Raises:
            DataError: Fewer rows than one batch.
        """
        t, steps = self.config.train, steps_of(self.config, data.train)
        return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps, collate=self.collate())

    def check_fit(self, data: Data, model: Any) -> None:
        """Refuse rows with tokens that the model does not know, or that it has no positions for; batches keep to these.

        Raises:
            BatchError: The tokenizer is not this model's, or its virtual tokens leave too few positions.
        """
        known, self.positions = model.config.vocab_size, model.positions_left()
        for row in (row for part in (*data.train, *data.held_out) for row in part.examples):
            top = max(int(answer.input_ids.max()) for answer in row.answers)
            if top >= known:
                raise BatchError(
                    f"{row.place}: it has the token {top}, but the model knows {known}: the tokenizer is not this "
                    "model's"
                )
            if self.positions is not None and len(row) > self.positions:
                raise BatchError(
                    f"{row.place}: it has {len(row)} tokens, but the model has {self.positions} positions beside its "
                    f"virtual tokens: set data.max_length to {self.positions}"
                )

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the widest batch, as shapes."""
        width = width_of(self.config.data.max_length)
        width = min(width, getattr(base_shape(self.config), "n_positions", width))
        ids = jax.ShapeDtypeStruct((self.config.train.batch_size, width), jnp.int32)
        kinds = ("input_ids", "attention_mask", "labels")
        return {f"{column}_{kind}": ids for column in columns_of(self.count) for kind in kinds}


def one_text(tokenizer: Any, prompt: str, answer: str) -> Example:
    """Return a prompt and an answer as one text of an encoder, `[CLS] prompt answer [SEP]`, tokenised apart.

    Raises:
        DataError: The tokenizer has no token for the end of a text.
    """
    end = getattr(tokenizer, "sep_token_id", None)
    end = getattr(tokenizer, "eos_token_id", None) if end is None else end
    if end is None:
        raise DataError("the tokenizer has neither a separator (sep_token) nor an end token (eos_token)")
    first, second = list(tokenizer(prompt)["input_ids"]), continuing(tokenizer, answer)
    first, second = first[:-1] if first[-1:] == [end] else first, [*second, end]
    return example([*first, *second], [False] * len(first) + [True] * len(second), prompt=len(first), answer=answer)

"""How tasks read images: sources to rows of grey levels, as large as the model sees them."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Source
from ..data import Dataset, ImageDataset, ImageProcessor, load_images, read_processor
from ..data.batches import Batch
from ..data.tokens import IGNORED
from ..errors import ConfigError
from .start import base_folder, base_shape
from .task import Data, Task, spread


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of a source.

    Attributes:
        source: The images that it is one of.
        index: Which one.
    """

    source: ImageDataset
    index: int

    def __len__(self) -> int:
        return 1  # all are of one size

    @property
    def value(self) -> int | None:
        """The number of its class."""
        return None if self.source.labels is None else int(self.source.labels[self.index])

    @property
    def place(self) -> str:
        """Where it lies."""
        return self.source.places[self.index]

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this image from others."""
        yield f"{self.value!r}\n".encode()
        yield self.source.images[self.index].tobytes()


class OfPictures(Task):
    """A task on images."""

    def processor(self) -> ImageProcessor:
        """Return how an image becomes what the model reads.

        Raises:
            ConfigError: It reads none.
        """
        shape = base_shape(self.config)
        if not hasattr(shape, "image_size"):
            raise ConfigError("model: it reads texts, and these rows are images; a ViT reads images")
        folder = "" if self.config.model.path is None else base_folder(self.config)
        return read_processor(folder, size=shape.image_size, channels=shape.num_channels)

    def read_pictures(self, classes: Sequence[str] | None = None) -> Data:
        """Read all sources of images: the classes are those given, or those of the first."""
        processor, found = self.processor(), list(classes or ())

        def read(source: Source) -> Dataset:
            images = load_images(
                source.path,
                processor,
                split=source.split,
                columns=source.columns,
                classes=found or None,
                skip_bad_rows=self.config.data.skip_bad_rows,
                name=source.name,
                weight=source.weight,
            )
            found.extend(images.classes if not found else ())
            rows = [Picture(images, i) for i in range(len(images))]
            return Dataset(rows, images.name, images.weight, images.skipped)

        training, held_out = self.read_all(read, train=True)
        return Data(processor, training, held_out, tuple(found))

    def some(self, rows: Sequence[Any], limit: int | None) -> Sequence[Any]:
        """Return so many of the held-out rows, at even distances."""
        return spread(rows, limit)

    def collate(self) -> Any:
        """Return what makes a batch of rows."""
        return collate_pictures

    def widest(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return a batch, as shapes."""
        p = self.processor()
        return {"pixel_values": jax.ShapeDtypeStruct((self.config.train.batch_size, p.channels, *p.size), jnp.float32)}


def collate_pictures(examples: Sequence[Picture], *, rows: int | None = None) -> Batch:
    """Make a batch of images: `pixel_values` `[B, C, H, W]`, and `labels` `[B]` where there are any.

    Missing rows are black images, their label -100.
    """
    rows = rows or len(examples)
    levels = np.stack([row.source.images[row.index] for row in examples])
    missing = rows - len(levels)
    levels = np.concatenate([levels, np.zeros((missing, *levels.shape[1:]), levels.dtype)])
    batch: Batch = {"pixel_values": examples[0].source.processor(levels)}
    values: list[Any] = [row.value for row in examples]
    if values[0] is not None:
        batch["labels"] = np.array([*values, *[IGNORED] * missing], np.int32)
    return batch

"""Contrastive tuning of images: two views of each, images of classes, and regions of images for detection."""

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ..config import Source
from ..data import (
    Augmentation,
    Dataset,
    ImageProcessor,
    RegionDataset,
    TrainBatches,
    load_regions,
    region_features,
    two_views,
)
from ..data.batches import Batch
from ..embedding import embed_images
from ..errors import ConfigError, DataError
from ..losses import make_contrastive_loss
from ..losses.contrastive import by_class as by_class_of
from ..losses.entropy import IGNORED
from ..losses.pairs import KINDS
from ..methods.temperature import temperature_of
from ..models.seams import number
from ..train.evaluate import evaluate_loss
from ..train.step import ModelLoss
from .contrastive import ContrastiveTask, by_class, classes, references
from .pictures import OfPictures, collate_pictures
from .task import Data, steps_of
from .texts import check_known, check_positives

VIEWS = number("views")


class ImageContrast(OfPictures, ContrastiveTask):
    """Of whole images: the two views of one are positives (`nt_xent`), or all views of one class."""

    formats = ("images",)
    losses: ClassVar[dict[str, tuple[str, ...]]] = {"images": ("nt_xent", "supervised_contrastive")}

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        asked = self.options.augmentation
        views = Augmentation() if asked is None else Augmentation(**asked.model_dump())
        return make_view_loss(self.kind, self.processor(), views, chunk=self.options.chunk, **self.given())

    def load_data(self, *, train: bool = True) -> Data:
        """Read the images, those for training always: the held-out ones are compared with them."""
        del train
        data = self.read_pictures()
        bare = [part.name for part in (*data.train, *data.held_out) if part.examples[0].value is None]
        if bare and len(bare) < len(data.train) + len(data.held_out):
            raise DataError(f"{', '.join(bare)}: images without labels beside others that have them: give all or none")
        if self.kind == "supervised_contrastive":
            if bare:
                raise DataError("contrastive.loss: supervised_contrastive needs labels, which these images do not have")
            check_positives(data)
        if not bare and data.held_out:
            check_known(data)
        return data

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches."""
        self.check_rows()
        t, steps = self.config.train, steps_of(self.config, data.train)
        return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps, collate=self.collate())

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss of two views, and of images with labels how well their vectors tell the classes.

        The loss is that of whole batches, so that every image has as many negatives.
        """
        size = min(batch_size, *map(len, data.held_out))
        whole = [dataclasses.replace(d, examples=d.examples[: len(d) // size * size]) for d in data.held_out]
        figures = evaluate_loss(model, self.loss, whole, batch_size=size, collate=self.collate(), by_length=False)
        rows = [row for part in data.held_out for row in part.examples]

        def vectors(rows: list[Any]) -> Any:
            parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
            return np.concatenate(
                [embed_images(model, collate_pictures(part)["pixel_values"], batch_size) for part in parts]
            )

        found = vectors(rows)
        known = references([row for part in data.train for row in part.examples])
        if len(set(map(value_of, known))) < 2:
            return figures, found
        return {**figures, **by_class(vectors(known), classes(known), found, classes(rows))}, found

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return a batch, as shapes."""
        return {**self.widest(), "labels": jax.ShapeDtypeStruct((self.config.train.batch_size,), jnp.int32)}


def value_of(row: Any) -> int | None:
    """Return the class of a row."""
    return row.value


def make_view_loss(kind: str, processor: ImageProcessor, options: Augmentation, **more: Any) -> ModelLoss:
    """Make the model loss of images: two views are made of each in the step, and compared.

    Args:
        kind: `"nt_xent"` (SimCLR): the views of one image are positives; `"supervised_contrastive"`: those of a class.
        processor: How the images of a batch were prepared: views are made of what they were before it.
        options: How much a view differs from its image.
        more: Options of the loss, `temperature` and `chunk`.

    Returns:
        `loss(model, batch, *, key)` of `pixel_values` `[B, C, H, W]`, and `labels` `[B]` where classes count. Without a
        key the views are always the same ones, so that evaluations can be compared.
    """
    compare = make_contrastive_loss(kind, **more)

    def loss(model: Any, batch: Any, *, key: jax.Array | None) -> Any:
        draw = jax.random.key(0) if key is None else jax.random.fold_in(key, VIEWS)
        views = two_views(draw, processor.unit(batch["pixel_values"]), options)
        pixels = {f"view{n}_pixel_values": processor.prepare(view) for n, view in enumerate(views, 1)}
        labels = {"labels": batch["labels"]} if kind == "supervised_contrastive" else {}
        return compare(model, {**pixels, **labels}, key=key)

    return loss


@dataclasses.dataclass(frozen=True)
class Boxed:
    """One image with boxes of a source.

    Attributes:
        source: The images that it is one of.
        index: Which one.
    """

    source: RegionDataset
    index: int

    def __len__(self) -> int:
        return 1

    @property
    def place(self) -> str:
        """Where it lies."""
        return self.source.places[self.index]

    @property
    def labels(self) -> np.ndarray[Any, Any]:
        """The class of each box, -100 at padding."""
        return np.where(self.source.mask[self.index], self.source.labels[self.index], IGNORED)

    def parts(self) -> Iterator[bytes]:
        """Yield the bytes that tell this image from others."""
        yield self.labels.tobytes()
        yield self.source.boxes[self.index].tobytes()
        yield self.source.images[self.index].tobytes()


class RegionContrast(OfPictures, ContrastiveTask):
    """Of regions, for detectors: the patches under a box as one vector, boxes of one class as positives."""

    formats = ("regions",)
    losses: ClassVar[dict[str, tuple[str, ...]]] = {"regions": ("supervised_contrastive",)}

    @cached_property
    def loss(self) -> ModelLoss:
        """The loss of a step."""
        temperature = {**KINDS[self.kind][1], **self.given()}["temperature"]
        if self.options.chunk is not None:
            raise ConfigError("contrastive.chunk: the regions of a batch are compared at once; take fewer images")

        def loss(model: Any, batch: Any, *, key: jax.Array | None) -> Any:
            vectors = regions(model, batch, key)
            labels, t = batch["box_classes"].reshape(-1), temperature_of(model, temperature)
            losses, anchors, hits = by_class_of(vectors.reshape(-1, vectors.shape[-1]), labels, t)
            weight = anchors.sum().astype(jnp.float32)
            right = (anchors & hits).sum().astype(jnp.float32)
            return jnp.where(anchors, losses, 0).sum(), weight, {"in_batch_accuracy": (right, weight)}

        return loss

    def load_data(self, *, train: bool = True) -> Data:
        """Read the images and boxes, those for training always."""
        del train
        processor, found = self.processor(), list[str]()

        def read(source: Source) -> Dataset:
            options: dict[str, Any] = {"split": source.split, "columns": source.columns, "classes": found or None}
            images = load_regions(source.path, processor, **options, skip_bad_rows=self.config.data.skip_bad_rows)
            found.extend(images.classes if not found else ())
            rows = [Boxed(images, i) for i in range(len(images))]
            return Dataset(rows, source.name, source.weight, images.skipped)

        training, held_out = self.read_all(read, train=True)
        there = {label for part in training for row in part.examples for label in row.labels.tolist()} - {IGNORED}
        if len(there) < 2:
            raise DataError("data.train: all boxes are of one class, so there is nothing to push apart")
        return Data(processor, training, held_out, tuple(found))

    def collate(self) -> Any:
        """Return what makes a batch of rows."""
        return collate_boxes

    def make_batches(self, data: Data) -> TrainBatches:
        """Return the batches."""
        t, steps = self.config.train, steps_of(self.config, data.train)
        return TrainBatches(data.train, batch_size=t.batch_size, seed=t.seed, steps=steps, collate=collate_boxes)

    def evaluate(self, model: Any, data: Data, batch_size: int) -> tuple[dict[str, float], Any]:
        """Return the loss, and how well the vectors of regions tell the classes."""
        figures = evaluate_loss(model, self.loss, data.held_out, batch_size=batch_size, collate=collate_boxes)
        rows, known = ([row for part in kind for row in part.examples] for kind in (data.held_out, data.train))
        found, labels = region_vectors(model, rows, batch_size)
        there, theirs = region_vectors(model, known, batch_size)
        return {**figures, **by_class(there, theirs, found, labels)}, found

    def values(self, data: Data) -> list[Any]:
        """Return the class of each held-out region."""
        rows = [row for part in data.held_out for row in part.examples]
        return [int(label) for row in rows for label in row.labels if label != IGNORED]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return a batch, as shapes: of ten boxes an image, which only the rows know."""
        rows, boxes = self.config.train.batch_size, 10
        shape = {"boxes": ((rows, boxes, 4), jnp.float32), "box_classes": ((rows, boxes), jnp.int32)}
        return {**self.widest(), **{name: jax.ShapeDtypeStruct(*of) for name, of in shape.items()}}


def regions(model: Any, batch: Any, key: jax.Array | None) -> jax.Array:
    """Return the vector of each box, `[B, K, D]`: the mean of the patches under it."""
    hidden = model.hidden(pixel_values=batch["pixel_values"], key=key)
    return region_features(hidden[:, 1:], batch["boxes"], model.config.grid)


def collate_boxes(examples: Any, *, rows: int | None = None) -> Batch:
    """Make a batch of images with boxes: `pixel_values`, `boxes` `[B, K, 4]`, `box_classes` `[B, K]` (-100: none)."""
    rows = rows or len(examples)
    most = max(len(row.labels) for row in examples)
    levels = np.stack([row.source.images[row.index] for row in examples])
    levels = np.concatenate([levels, np.zeros((rows - len(levels), *levels.shape[1:]), levels.dtype)])
    boxes, labels = np.zeros((rows, most, 4), np.float32), np.full((rows, most), IGNORED, np.int32)
    for i, row in enumerate(examples):
        boxes[i, : len(row.labels)], labels[i, : len(row.labels)] = row.source.boxes[row.index], row.labels
    return {"pixel_values": examples[0].source.processor(levels), "boxes": boxes, "box_classes": labels}


def region_vectors(model: Any, rows: list[Boxed], batch_size: int) -> tuple[Any, list[Any]]:
    """Return the vectors of all boxes of some images `[N, D]`, and their classes."""
    vectors, labels = [], []
    for start in range(0, len(rows), batch_size):
        batch = collate_boxes(rows[start : start + batch_size], rows=batch_size)
        there = batch["box_classes"] != IGNORED
        vectors.append(np.asarray(_regions(model, batch))[there])
        labels += batch["box_classes"][there].tolist()
    return np.concatenate(vectors), labels


_regions = jax.jit(lambda model, batch: regions(model, batch, None))

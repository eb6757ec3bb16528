"""Augmentations of pictures in JAX: pure functions of a key and images `[B, C, H, W]` with values from 0 to 1.

Each image draws from a key of its own, folded from its place in the batch, so what happens to it does not depend on the
others. Strengths at zero leave the images as they are. `ImageProcessor.unit` goes before, `prepare` comes after.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2, as PIL's


def each(change: Callable[..., jax.Array]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Turn `change(key, image [C, H, W])` into a function of one key and a batch."""

    def apply(key: jax.Array, images: jax.Array) -> jax.Array:
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(jnp.arange(len(images)))
        return jax.vmap(change)(keys, images)

    return apply


def sometimes(key: jax.Array, probability: float, changed: jax.Array, image: jax.Array) -> jax.Array:
    """Return `changed` with some probability, else `image`."""
    return jnp.where(jax.random.bernoulli(key, probability), changed, image)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    *,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> jax.Array:
    """Cut a part of random area, shape and place out of each image and resize it, bilinear, to the whole.

    Args:
        key: Of the batch.
        images: `[B, C, H, W]`.
        scale: Least and greatest part of the area.
        ratio: Least and greatest width by height, drawn evenly in its logarithm; a side is the image's at most.

    Returns:
        `[B, C, H, W]`.

    >>> x = jnp.ones((2, 3, 8, 8))
    >>> bool(jnp.allclose(random_resized_crop(jax.random.key(0), x), x))
    True
    """
    height, width = images.shape[-2:]

    def crop(key: jax.Array, image: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 3)
        area = jax.random.uniform(keys[0], minval=scale[0], maxval=scale[1])
        shape = jnp.exp(jax.random.uniform(keys[1], minval=np.log(ratio[0]), maxval=np.log(ratio[1])))
        shape = shape * height / width  # of the parts that are cut, in parts of the sides
        sides = jnp.minimum(jnp.sqrt(jnp.stack([area / shape, area * shape])), 1)
        start = jax.random.uniform(keys[2], (2,)) * (1 - sides)
        whole = jnp.array([height, width], jnp.float32)
        cut = jax.image.scale_and_translate(
            image, image.shape, (1, 2), 1 / sides, -start * whole / sides, "linear", antialias=True
        )
        return cut.astype(image.dtype)

    return each(crop)(key, images)


def horizontal_flip(key: jax.Array, images: jax.Array, *, probability: float = 0.5) -> jax.Array:
    """Mirror each image, left for right, with some probability.

    >>> horizontal_flip(jax.random.key(0), jnp.arange(3.0).reshape(1, 1, 1, 3), probability=1.0)[0, 0, 0].tolist()
    [2.0, 1.0, 0.0]
    """
    return each(lambda k, image: sometimes(k, probability, image[..., ::-1], image))(key, images)


def colour_jitter(
    key: jax.Array,
    images: jax.Array,
    *,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    probability: float = 0.8,
) -> jax.Array:
    """Change brightness, contrast, then saturation, each by a factor from `1 - strength` to `1 + strength`.

    Brightness scales from black, contrast from the image's mean luma, saturation from each pixel's luma; values stay
    from 0 to 1.

    Args:
        key: Of the batch.
        images: `[B, C, H, W]`; saturation does nothing with one channel.
        brightness: Strength.
        contrast: Strength.
        saturation: Strength.
        probability: Of changing an image at all.

    Returns:
        `[B, C, H, W]`.

    >>> x = jnp.full((1, 3, 2, 2), 0.5)
    >>> bool((colour_jitter(jax.random.key(1), x, brightness=0.0, probability=1.0) == x).all())
    True
    """

    def jitter(key: jax.Array, image: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4)
        b, c, s = (
            jax.random.uniform(k, minval=1 - strength, maxval=1 + strength)
            for k, strength in zip(keys, (brightness, contrast, saturation), strict=False)
        )
        out = jnp.clip(image * b, 0, 1)
        mean = luma(out).mean()
        out = jnp.clip(mean + c * (out - mean), 0, 1)
        grey = luma(out)[None]
        out = jnp.clip(grey + s * (out - grey), 0, 1)
        return sometimes(keys[3], probability, out, image)

    return each(jitter)(key, images)


def luma(image: jax.Array) -> jax.Array:
    """Return the luma `[H, W]` of an image `[C, H, W]`."""
    return image[0] if len(image) == 1 else jnp.tensordot(LUMA, image, 1)


def to_grey(key: jax.Array, images: jax.Array, *, probability: float = 0.2) -> jax.Array:
    """Put each image's luma in all of its channels with some probability.

    >>> x = jax.random.uniform(jax.random.key(0), (1, 3, 2, 2))
    >>> bool((to_grey(jax.random.key(0), x, probability=1.0)[0, 0] == luma(x[0])).all())
    True
    """
    return each(lambda k, x: sometimes(k, probability, jnp.broadcast_to(luma(x)[None], x.shape), x))(key, images)


def gaussian_noise(key: jax.Array, images: jax.Array, *, std: float = 0.05, probability: float = 0.5) -> jax.Array:
    """Add noise of N(0, std^2) to each image with some probability; values stay from 0 to 1.

    >>> x = jnp.full((1, 1, 2, 2), 0.5)
    >>> bool((gaussian_noise(jax.random.key(0), x, std=0.0, probability=1.0) == x).all())
    True
    """

    def add(key: jax.Array, image: jax.Array) -> jax.Array:
        chosen, drawn = jax.random.split(key)
        noisy = image + std * jax.random.normal(drawn, image.shape, image.dtype)
        return sometimes(chosen, probability, jnp.clip(noisy, 0, 1), image)

    return each(add)(key, images)


def gaussian_blur(
    key: jax.Array, images: jax.Array, *, sigma: tuple[float, float] = (0.1, 2.0), probability: float = 0.5
) -> jax.Array:
    """Blur each image with some probability by a Gaussian of random width; at the border only what is there counts.

    Args:
        key: Of the batch.
        images: `[B, C, H, W]`.
        sigma: Least and greatest standard deviation, in pixels.
        probability: Of blurring an image.

    Returns:
        `[B, C, H, W]`.

    >>> x = jnp.ones((1, 1, 4, 4))
    >>> bool(jnp.allclose(gaussian_blur(jax.random.key(0), x, probability=1.0), x))
    True
    """

    def blur(key: jax.Array, image: jax.Array) -> jax.Array:
        chosen, drawn = jax.random.split(key)
        width = jax.random.uniform(drawn, minval=sigma[0], maxval=sigma[1])
        rows, columns = (jax.nn.softmax(_closeness(n, width), -1).astype(image.dtype) for n in image.shape[1:])
        return sometimes(chosen, probability, jnp.einsum("ij,cjk,lk->cil", rows, image, columns), image)

    return each(blur)(key, images)


def _closeness(size: int, sigma: jax.Array) -> jax.Array:
    """Return the logarithm `[size, size]` of a Gaussian of the distance between two places."""
    distance = jnp.arange(size, dtype=jnp.float32)[:, None] - jnp.arange(size, dtype=jnp.float32)[None]
    return -(distance**2) / (2 * sigma**2)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The strengths of what `augment` does, in its order; the defaults are SimCLR's at half its colours.

    Attributes:
        crop: Least part of the area that a crop keeps; 1: no crop.
        flip: Probability of mirroring.
        jitter: Probability of changing colours.
        brightness: Strength, as contrast and saturation.
        contrast: Strength.
        saturation: Strength.
        grey: Probability of taking the colours away.
        blur: Probability of blurring.
        noise: Probability of noise.
        noise_std: Its standard deviation, of values from 0 to 1.
    """

    crop: float = 0.2
    flip: float = 0.5
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    grey: float = 0.2
    blur: float = 0.0
    noise: float = 0.0
    noise_std: float = 0.05


def augment(key: jax.Array, images: jax.Array, options: Augmentation = Augmentation()) -> jax.Array:
    """Crop, flip, jitter, take colours away, blur and add noise, each image by itself.

    Args:
        key: Of the batch: the same key gives the same images.
        images: `[B, C, H, W]`, values from 0 to 1.
        options: Strengths; what stands at zero is not computed.

    Returns:
        `[B, C, H, W]`.

    >>> x = jax.random.uniform(jax.random.key(0), (2, 3, 8, 8))
    >>> augment(jax.random.key(1), x).shape
    (2, 3, 8, 8)
    """
    o = options
    colours = {"brightness": o.brightness, "contrast": o.contrast, "saturation": o.saturation}
    steps: list[tuple[float, Callable[..., jax.Array], dict[str, Any]]] = [
        (1 - o.crop, random_resized_crop, {"scale": (o.crop, 1.0)}),
        (o.flip, horizontal_flip, {"probability": o.flip}),
        (o.jitter, colour_jitter, {"probability": o.jitter, **colours}),
        (o.grey, to_grey, {"probability": o.grey}),
        (o.blur, gaussian_blur, {"probability": o.blur}),
        (o.noise, gaussian_noise, {"probability": o.noise, "std": o.noise_std}),
    ]
    for number, (strength, step, strengths) in enumerate(steps):
        if strength > 0:
            images = step(jax.random.fold_in(key, number), images, **strengths)
    return images


def two_views(
    key: jax.Array,
    images: jax.Array,
    options: Augmentation = Augmentation(),
) -> tuple[jax.Array, jax.Array]:
    """Return two augmented views of each image (Chen et al. 2020, SimCLR).

    Args:
        key: Of the batch; fold the step in.
        images: `[B, C, H, W]`, values from 0 to 1.
        options: Strengths.

    Returns:
        Two arrays `[B, C, H, W]`.

    >>> one, two = two_views(jax.random.key(0), jax.random.uniform(jax.random.key(1), (2, 3, 8, 8)))
    >>> one.shape == two.shape == (2, 3, 8, 8), bool((one == two).all())
    (True, False)
    """
    first, second = jax.random.split(key)
    return augment(first, images, options), augment(second, images, options)

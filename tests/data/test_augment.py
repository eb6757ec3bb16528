"""Augmentations: the same for a key, of each image by itself, and what each one says it does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data import Augmentation, augment, two_views
from jaxft.data.augment import (
    colour_jitter,
    gaussian_blur,
    gaussian_noise,
    horizontal_flip,
    luma,
    random_resized_crop,
    to_grey,
)

KEY = jax.random.key(3)
IMAGES = jax.random.uniform(jax.random.key(1), (6, 3, 12, 8))
ALL = Augmentation(blur=0.5, noise=0.5)


def at(change, images, **strengths):
    """Apply with some strengths, compiled as one."""
    return jax.jit(lambda key, x: change(key, x, **strengths))(KEY, images)


EVERY = {
    "crop": random_resized_crop,
    "flip": horizontal_flip,
    "jitter": colour_jitter,
    "grey": to_grey,
    "noise": gaussian_noise,
    "blur": gaussian_blur,
    "all": lambda key, images: augment(key, images, ALL),
}


@pytest.mark.parametrize("name", EVERY)
def test_each_is_a_pure_function_of_the_key_image_by_image(name):
    change = jax.jit(EVERY[name])
    images = jnp.concatenate([IMAGES, jnp.repeat(IMAGES[:1], 10, 0)])
    out = change(KEY, images)
    assert out.shape == images.shape and out.dtype == jnp.float32
    assert (out >= -1e-5).all() and (out <= 1 + 1e-5).all()
    np.testing.assert_array_equal(out, change(KEY, images))
    np.testing.assert_array_equal(out[:2], change(KEY, images.at[2:].set(0.5))[:2])  # the others change nothing
    assert len({bytes(np.asarray(image)) for image in out[6:]}) > 1  # but each draws by itself
    assert jnp.abs(change(jax.random.key(4), images) - out).max() > 1e-3


def test_two_views_differ_and_follow_the_key():
    views = jax.jit(lambda key: two_views(key, IMAGES, ALL))
    one, two = views(KEY)
    assert (jnp.abs(one - two).max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_array_equal(views(KEY)[1], two)
    np.testing.assert_array_equal(jax.jit(EVERY["all"])(jax.random.split(KEY)[0], IMAGES), one)


def test_strengths_at_zero_change_nothing():
    off = Augmentation(crop=1.0, flip=0, jitter=0, grey=0, blur=0, noise=0)
    np.testing.assert_array_equal(augment(KEY, IMAGES, off), IMAGES)
    for name, off in (
        ("crop", {"scale": (1.0, 1.0), "ratio": (2 / 3, 2 / 3)}),
        *((name, {"probability": 0.0}) for name in ("flip", "jitter", "grey", "noise", "blur")),
        ("jitter", {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}),
    ):
        np.testing.assert_allclose(at(EVERY[name], IMAGES, **off), IMAGES, atol=1e-6, err_msg=name)


def test_a_crop_is_a_part_of_the_picture():
    """Of a ramp each crop is a ramp, less steep by what part of the side it keeps, and within the picture's values."""
    ramp = jnp.broadcast_to((jnp.arange(32) + 0.5) / 32, (200, 1, 32, 32))
    out = at(random_resized_crop, ramp, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    rows = np.asarray(out[:, 0, 5])
    inside = rows[:, 2:-2]  # at its own border the filter has less to average
    np.testing.assert_allclose(np.diff(inside, axis=1), 1 / 64, atol=1e-5)  # half of the side
    starts = rows[:, 16] - 0.25 - 1 / 128
    assert starts.min() > -1e-3 and starts.max() < 0.5 + 1e-3 and np.ptp(starts) > 0.4  # anywhere within
    areas = at(random_resized_crop, ramp, scale=(0.2, 0.9), ratio=(1.0, 1.0))[:, 0, 5]
    sides = np.diff(areas[:, 10:12], axis=1)[:, 0] * 32
    assert 0.2 < (sides**2).min() < 0.3 and 0.8 < (sides**2).max() < 0.9


def test_a_ratio_is_width_by_height():
    across = jnp.broadcast_to((jnp.arange(32) + 0.5) / 32, (8, 1, 32, 32))
    options = {"scale": (0.25, 0.25), "ratio": (2.0, 2.0)}  # sides 0.707 and 0.354
    wide = at(random_resized_crop, across, **options)[:, 0, 5]
    np.testing.assert_allclose(np.diff(wide[:, 10:20], axis=1) * 32, 0.5**0.5, atol=1e-4)
    high = at(random_resized_crop, across.swapaxes(2, 3), **options)[:, 0, :, 5]
    np.testing.assert_allclose(np.diff(high[:, 10:20], axis=1) * 32, 0.125**0.5, atol=1e-4)


def test_a_flip_mirrors_half_of_them():
    many = jnp.broadcast_to(IMAGES[:1], (400, *IMAGES.shape[1:]))
    out = at(horizontal_flip, many)
    flipped = (out == many[..., ::-1]).all((1, 2, 3))
    assert (flipped | (out == many).all((1, 2, 3))).all() and 150 < flipped.sum() < 250


def test_colours():
    always = {"probability": 1.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    dim = IMAGES * 0.4
    factor = at(colour_jitter, dim, **{**always, "brightness": 0.5}) / dim
    np.testing.assert_allclose(factor.std((1, 2, 3)), 0, atol=1e-5)
    assert ((factor > 0.5) & (factor < 1.5)).all() and factor.std() > 0.05
    middle = 0.3 + IMAGES * 0.4
    bent = at(colour_jitter, middle, **{**always, "contrast": 0.5})
    for before, after in zip(middle, bent, strict=True):
        np.testing.assert_allclose(luma(after).mean(), luma(before).mean(), atol=1e-5)
    spread = bent.std((1, 2, 3)) / middle.std((1, 2, 3))
    assert np.ptp(spread) > 0.1
    toned = at(colour_jitter, middle, **{**always, "saturation": 0.5})
    for before, after in zip(middle, toned, strict=True):
        np.testing.assert_allclose(luma(after), luma(before), atol=1e-5)
    assert jnp.abs(toned - middle).max() > 0.01
    grey = at(to_grey, IMAGES, probability=1.0)
    np.testing.assert_allclose(
        grey[2, 1], 0.299 * IMAGES[2, 0] + 0.587 * IMAGES[2, 1] + 0.114 * IMAGES[2, 2], atol=1e-6
    )


def test_noise_and_blur():
    flat = jnp.full((4, 3, 32, 32), 0.5)
    noise = at(gaussian_noise, flat, std=0.1, probability=1.0) - flat
    np.testing.assert_allclose(noise.std((1, 2, 3)), 0.1, rtol=0.05)
    assert jnp.abs(jnp.corrcoef(noise.reshape(4, -1)) - jnp.eye(4)).max() < 0.1
    point = jnp.zeros((1, 1, 15, 15)).at[0, 0, 7, 7].set(1.0)
    out = at(gaussian_blur, point, sigma=(1.0, 1.0), probability=1.0)[0, 0]
    distance = np.add.outer((np.arange(15) - 7) ** 2, (np.arange(15) - 7) ** 2)
    want = np.exp(-distance / 2)
    np.testing.assert_allclose(out, want / want.sum(), atol=1e-5)

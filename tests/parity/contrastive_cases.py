"""The losses over embeddings that are compared with sentence-transformers and CLIP; no torch is needed here."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import losses

ROWS, WIDTH = 7, 12
RNG = np.random.default_rng(0)
NOISE = RNG.standard_normal((4, ROWS, WIDTH))
COLUMNS = {
    "anchor": NOISE[0],
    "positive": NOISE[0] + NOISE[1],
    "negative": NOISE[2],
    "negative_2": NOISE[3],
    "score": np.array([0.1, 0.8, 0.1, 1.0, 0.5, 0.5, 0.3]),
    "label": np.array([1, 0, 0, 1, 0, 1, 1]),
}
COLUMNS = {name: x.astype(np.int32 if name == "label" else np.float32) for name, x in COLUMNS.items()}
PAIR, TRIPLET = ("anchor", "positive"), ("anchor", "positive", "negative")
HARD = (*TRIPLET, "negative_2")


def in_batch(anchor, *documents, **options):
    return losses.info_nce(anchor, jnp.concatenate(documents), **options)


OURS = {
    "mnrl": (PAIR, partial(in_batch, temperature=0.05)),
    "mnrl-hard": (HARD, partial(in_batch, temperature=0.05)),
    "mnrl-scale": (HARD, partial(in_batch, temperature=0.2)),
    "mnrl-symmetric": (HARD, partial(in_batch, temperature=0.05, symmetric=True)),
    "cached": (HARD, partial(in_batch, temperature=0.05, symmetric=True, chunk=3)),
    "clip": (PAIR, partial(in_batch, temperature=0.07, symmetric=True)),
    "cosent": (PAIR, lambda x, y: losses.cosent(x, y, COLUMNS["score"])),
    "contrastive": (PAIR, lambda x, y: losses.pairwise_contrastive(x, y, jnp.asarray(COLUMNS["label"]))),
    "contrastive-margin": (
        PAIR,
        lambda x, y: losses.pairwise_contrastive(x, y, jnp.asarray(COLUMNS["label"]), margin=1.1),
    ),
    "triplet": (TRIPLET, losses.triplet),
    "triplet-margin": (TRIPLET, partial(losses.triplet, margin=0.5)),
    "triplet-cosine": (TRIPLET, partial(losses.triplet, margin=0.5, distance="cosine")),
    "cosine": (PAIR, lambda x, y: losses.cosine_regression(x, y, COLUMNS["score"])),
}


def ours(case):
    """The loss of a case, and its gradient with respect to each column."""
    columns, loss = OURS[case]
    given = [jnp.asarray(COLUMNS[name]) for name in columns]
    value, grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(given)))))(*given)
    return {"loss": value, **dict(zip(columns, grads, strict=True))}


def check(case, want):
    """Compare a case with what the peer made of it: `{"loss": ..., column: gradient}`."""
    got = ours(case)
    assert got.keys() == want.keys()
    assert abs(float(want["loss"])) > 1e-3
    for name, value in want.items():
        size = np.abs(value).max()
        assert size > 1e-3, name
        np.testing.assert_allclose(got[name], value, atol=1e-5 * max(size, 1e-2), rtol=1e-5, err_msg=f"{case} {name}")

"""Cross-entropy of logits. Shapes: V tokens of the vocabulary."""

import jax
import jax.numpy as jnp

IGNORED = -100  # the label of a token that is not trained, as in transformers


def cross_entropy(logits: jax.Array, labels: jax.Array, *, reduction: str = "mean") -> jax.Array:
    """Return `-log softmax(logits)[label]`, over the labels that are not -100.

    Args:
        logits: `[..., V]`, any float dtype; computed in float32. What stands at ignored labels, NaN included,
            changes neither value nor gradient.
        labels: `[...]` int; -100 is not trained. Not shifted: label t belongs to logits t.
        reduction: `"mean"` over the trained labels (0 where there are none), `"sum"`, or `"none"`: `[...]`, zeros at
            ignored labels.

    Returns:
        A float32 scalar, or `[...]` with `reduction="none"`; in nats.

    >>> f"{cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -100])):.4f}"  # log 4
    '1.3863'
    """
    trained = labels != IGNORED
    logits = jnp.where(trained[..., None], logits, 0).astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.where(trained, labels, 0)[..., None], -1)[..., 0]
    loss = jnp.where(trained, jax.nn.logsumexp(logits, -1) - picked, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / jnp.maximum(trained.sum(), 1)

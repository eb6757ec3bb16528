"""Which leaves an optimiser's decay may touch."""

from collections.abc import Mapping
from typing import Any

DECAYED = ("kernel", "embedding", "a", "b")


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Tell by kind of leaf what weight decay acts on: matrices, not biases, norm scales or other vectors.

    By the leaf's name and not by its number of dimensions, since a stacked bias has two.

    Args:
        params: `{path: array}`, as the optimiser of a `TrainState` sees the trained leaves.

    Returns:
        `{path: bool}`, as `optax.adamw(..., mask=decay_mask)` takes it.

    >>> decay_mask({"model.layers.mlp.up_proj.kernel": 0, "transformer.h.ln_1.bias": 0, "lm_head.delta.default.a": 0})
    {'model.layers.mlp.up_proj.kernel': True, 'transformer.h.ln_1.bias': False, 'lm_head.delta.default.a': True}
    """
    return {path: path.rsplit(".", 1)[-1] in DECAYED for path in params}

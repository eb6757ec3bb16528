"""What models say of answers that were drawn: log-probabilities under policy and reference, values of the critic.

Without dropout: what is compared is compared of the same model. Shapes: B rows, R places of answers.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..generation.rollout import Rollout
from ..losses.log_probs import token_log_probs
from ..methods.partition import combine, leaves
from .policy import critic_of
from .state import with_leaves


@jax.jit
def log_probs_of_both(
    trainable: Any, reference: Any, frozen: Any, rollout: Rollout, temperature: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the log-probabilities of the answers' tokens under policy and reference, in one pass over both.

    The frozen part is there once: the pass is mapped over the two trainable parts, whatever the method trains. Equal
    parts give equal numbers.

    Args:
        trainable: The policy's.
        reference: The reference's, of the same structure.
        frozen: What they share.
        rollout: The answers.
        temperature: That they were drawn at. (`top_k` and `top_p` are left out of account, as in trl.)

    Returns:
        Log-probabilities under the policy, under the reference, and the policy's entropy, each `[B, R]` float32, 0
        past an answer's end.
    """

    def one(params: dict[str, jax.Array]) -> Any:
        model = combine(with_leaves(trainable, params), frozen)
        return token_log_probs(model, rollout.inputs, temperature=temperature, entropy=True, last=rollout.room)

    both = jax.tree.map(lambda *x: jnp.stack(x), leaves(trainable), leaves(reference))
    log_probs, entropy = jax.vmap(one)(both)
    return log_probs[0], log_probs[1], entropy[0]


@jax.jit
def log_probs_of(model: Any, rollout: Rollout, temperature: jax.Array) -> jax.Array:
    """Return the log-probabilities `[B, R]` of the answers' tokens under one model; arguments as for both."""
    found: jax.Array = token_log_probs(model, rollout.inputs, temperature=temperature, last=rollout.room)
    return found


@jax.jit
def values_of(trainable: Any, frozen: Any, lender: Any, rollout: Rollout) -> jax.Array:
    """Return the critic's values `[B, R]` float32, each of the state before a token of the answer.

    Args:
        trainable: The critic's.
        frozen: What is its own of the rest.
        lender: The policy's frozen part.
        rollout: The answers.
    """
    return values(critic_of(trainable, frozen, lender), rollout.inputs, rollout.room)


def values(critic: Any, inputs: dict[str, jax.Array], room: int) -> jax.Array:
    """Return what a critic says before each of the last `room` tokens of rows: `[B, R]` float32."""
    found: jax.Array = critic.scores(inputs)[:, -room - 1 : -1, 0]
    return found

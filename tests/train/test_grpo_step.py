"""A step of GRPO: what it learns from rewards, in parts and in one, and what it leaves as it was."""

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.generation.rollout import Rollout
from jaxft.losses.log_probs import token_log_probs
from jaxft.methods.partition import combine, leaves
from jaxft.train.experience import dealt
from jaxft.train.grpo import Drawn, GrpoOptions, GrpoUpdate, prepared
from jaxft.train.optimizer import by_step
from jaxft.train.scoring import log_probs_of, log_probs_of_both
from jaxft.train.state import with_leaves

P, R = 3, 4
LENGTHS = [4, 2, 1, 3]  # of the answers: the first does not end
IDS = np.array([[0, 5, 6, 9, 8, 7, 3], [0, 5, 6, 4, 1, 0, 0], [9, 2, 2, 1, 0, 0, 0], [9, 2, 2, 7, 7, 1, 0]], np.int32)
REWARDS = jnp.array([1.0, 3.0, 0.0, 5.0])
HEAT = 0.7  # the temperature of the draw
OPTIONS = GrpoOptions(group_size=2, temperature=HEAT, max_length=R)


def rollout(junk=0):
    answer = jnp.arange(R)[None] < jnp.array(LENGTHS)[:, None]
    prompt = jnp.array([[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]], bool)
    mask = jnp.concatenate([prompt, answer], 1)
    ids = jnp.where(mask, IDS, junk)
    return Rollout(ids, mask.astype(jnp.int32), answer, jnp.array([False, True, True, True]))


@pytest.fixture(scope="module")
def model():
    return jaxft.testing.tiny_llama()


SGD = by_step(optax.sgd, lambda step: 0.1)
ADAM = by_step(optax.adam, lambda step: 0.1)


def begin(model, tx=SGD):
    """A state after some steps, so that the adapter does something."""
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), tx, seed=1)
    return state.replace(trainable=jax.tree.map(lambda x: x + 0.02, state.trainable))


update = lru_cache(GrpoUpdate)  # each is compiled once


def after(state, drawn, options):
    """Return the trained leaves after a step, and its metrics; the state stays."""
    held = state.replace(trainable=jax.tree.map(jnp.copy, state.trainable))
    state, metrics = update(options)(held, drawn)
    return leaves(state.trainable), {name: float(x) for name, x in metrics.items()}


def distance(a, b):
    return max(float(jnp.abs(a[path] - b[path]).max()) for path in a)


def test_one_update_is_the_gradient_of_the_advantages(model):
    """On the policy that drew, GRPO is REINFORCE: sum of advantage times log-probability, over the tokens."""
    state, drawn = begin(model), Drawn(rollout(), REWARDS)
    advantages = np.array([-1, 1, -1, 1]) / np.sqrt(2) / (1 + 1e-4 / np.array([2, 2, 12.5, 12.5]) ** 0.5)

    def reinforce(params):
        whole = combine(with_leaves(state.trainable, params), state.frozen)
        said = token_log_probs(whole, drawn.rollout.inputs, temperature=HEAT, last=R)
        return -(said * advantages[:, None].astype(np.float32)).sum() / sum(LENGTHS)

    params = leaves(state.trainable)
    grads = jax.jit(jax.grad(reinforce))(params)
    expected = {path: params[path] - 0.1 * g for path, g in grads.items()}
    found, metrics = after(state, drawn, OPTIONS)
    assert distance(expected, params) > 1e-3 and distance(expected, found) < 1e-6
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(grads)), rel=1e-4)
    assert metrics["clip_fraction"] == 0 and metrics["skipped"] == 0


def test_figures_of_the_answers(model):
    drawn = Drawn(rollout(), jnp.array([1.0, 1.0, 0.0, 5.0]))
    _, metrics = after(begin(model), drawn, OPTIONS)
    wanted = {"reward": 1.75, "equal_groups": 0.5, "response_length": 2.5, "ended": 0.75, "trained_tokens": 10}
    assert {name: metrics[name] for name in wanted} == wanted
    assert metrics["reward_std"] == pytest.approx(np.std([1, 1, 0, 5]))
    assert 0 < metrics["entropy"] <= np.log(64) and "kl" not in metrics
    _, entropy = token_log_probs(begin(model).model, drawn.rollout.inputs, temperature=HEAT, entropy=True, last=R)
    assert metrics["entropy"] == pytest.approx(float(entropy.sum()) / 10, rel=1e-5)


def test_a_missing_end_costs(model):
    """By hand: the first answer's 1 becomes -1, so its group's rewards are -1 and 3: 2 away from the mean 1."""
    options = replace(OPTIONS, missing_end_penalty=2.0, scale="none")
    batch, figures = prepared(options, Drawn(rollout(), REWARDS))
    assert batch["advantages"].tolist() == [-2.0, 2.0, -2.5, 2.5]
    assert float(figures["reward"]) == 2.25  # the reward itself is told as it is


@pytest.mark.parametrize("reduction", ["bnpo", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dapo", "grpo"))])
def test_micro_batches_add_up(model, reduction):
    """However unequal the answers of a micro-batch are, the update is that of the whole."""
    options = replace(OPTIONS, reduction=reduction)
    whole, said = after(begin(model), Drawn(rollout(), REWARDS), options)
    parts, also = after(begin(model), Drawn(rollout(), REWARDS), replace(options, accumulate=2))
    assert distance(whole, leaves(begin(model).trainable)) > 1e-4
    assert distance(whole, parts) < 1e-6
    assert also["entropy"] == pytest.approx(said["entropy"], rel=1e-5)


def test_so_many_rows_are_in_memory_at_once(model):
    """Those of a micro-batch of a minibatch."""
    taken, seen = GrpoUpdate(replace(OPTIONS, minibatches=2, accumulate=2)), []
    loss = taken.loss
    taken.loss = lambda model, batch, *, key: seen.append(len(batch["mask"])) or loss(model, batch, key=key)
    taken.trace(begin(model), Drawn(rollout(), REWARDS, jnp.zeros((4, R))))
    assert set(seen) == {1}


def test_reductions_divide_by_what_they_say(model):
    """One SGD step is linear in the loss: by tokens 10 (mean 2.5 an answer), or by 4 answers of 4 places."""
    start = leaves(begin(model).trainable)
    moved = {
        r: after(begin(model), Drawn(rollout(), REWARDS), replace(OPTIONS, reduction=r))[0]
        for r in ("dapo", "bnpo", "dr_grpo")
    }
    by = {r: {path: x - start[path] for path, x in found.items()} for r, found in moved.items()}
    assert distance(by["dapo"], by["bnpo"]) < 1e-7
    assert distance(by["dapo"], {path: x * 16 / 10 for path, x in by["dr_grpo"].items()}) < 1e-6


def test_dapo_goes_by_the_tokens_of_the_step(model):
    """In minibatches too: where the steps are tiny, two updates add up to one of the whole, times two."""
    state, options = begin(model), replace(OPTIONS, scale="none")
    old = log_probs_of(state.model, rollout(), jnp.float32(HEAT))
    start, drawn = leaves(state.trainable), Drawn(rollout(), REWARDS * 1e-3, old)
    once, twice = (after(state, drawn, replace(options, minibatches=n))[0] for n in (1, 2))
    doubled = {path: 2 * (x - start[path]) for path, x in once.items()}
    largest = max(float(jnp.abs(x).max()) for x in doubled.values())
    assert largest > 1e-5
    assert distance(doubled, {path: x - start[path] for path, x in twice.items()}) < 0.01 * largest


def test_equal_rewards_teach_nothing(model):
    """Not even with Adam, whose step is as large however small the gradient: it is exactly 0."""
    state = begin(model, ADAM)
    found, metrics = after(state, Drawn(rollout(), jnp.full(4, 0.3)), OPTIONS)
    assert distance(found, leaves(state.trainable)) == 0
    assert metrics["equal_groups"] == 1 and metrics["grad_norm"] == 0 and metrics["skipped"] == 0
    assert all(np.isfinite(x) for x in metrics.values())


def test_kl_to_the_reference(model):
    """0 where the policy is the reference; the penalty pulls back towards it once it is not."""
    state = begin(model)
    old, ref, _ = log_probs_of_both(state.trainable, state.trainable, state.frozen, rollout(), jnp.float32(HEAT))
    options = replace(OPTIONS, kl_coefficient=1.0)
    found, metrics = after(state, Drawn(rollout(), REWARDS, old, ref), options)
    assert metrics["kl"] == 0
    free, _ = after(state, Drawn(rollout(), REWARDS), OPTIONS)
    assert distance(found, free) < 1e-6  # at the reference the gradient of the KL is 0
    moved = state.replace(trainable=with_leaves(state.trainable, found))
    equal = jnp.full(4, 1.0)
    pulls = []
    for _ in range(2):
        old, ref, _ = log_probs_of_both(moved.trainable, state.trainable, state.frozen, rollout(), jnp.float32(HEAT))
        found, metrics = after(moved, Drawn(rollout(), equal, old, ref), options)
        moved = moved.replace(trainable=with_leaves(state.trainable, found))
        pulls.append(metrics["kl"])
    assert pulls[0] > pulls[1] > 0


def test_clipping(model):
    """With a clip that one update reaches, later epochs have tokens without a gradient."""
    state = begin(model)
    drawn = Drawn(rollout(), REWARDS, log_probs_of(state.model, rollout(), jnp.float32(HEAT)))
    shares = [after(state, drawn, replace(OPTIONS, clip=1e-4, epochs=n))[1]["clip_fraction"] for n in (1, 3)]
    assert shares[0] == 0 < shares[1]


def test_padding_and_what_is_not_finite(model):
    """Ids past an answer's end change nothing; a step whose loss is not finite is not taken."""
    found, _ = after(begin(model), Drawn(rollout(), REWARDS), OPTIONS)
    other, _ = after(begin(model), Drawn(rollout(junk=63), REWARDS), OPTIONS)
    assert distance(found, other) == 0
    state = begin(model)
    kept, metrics = after(state, Drawn(rollout(), REWARDS.at[0].set(jnp.nan)), OPTIONS)
    assert metrics["skipped"] == 1 and distance(kept, leaves(state.trainable)) == 0


def test_every_row_is_dealt_once_an_epoch():
    rows = dealt(jax.random.key(3), 6, 2, 3)
    assert rows.shape == (6, 2)
    assert [sorted(rows[i : i + 3].ravel().tolist()) for i in (0, 3)] == [list(range(6))] * 2
    assert rows[:3].tolist() != rows[3:].tolist()


def test_the_learning_rate_goes_by_the_step(model):
    """Three updates of a step all have its rate, the next step's the next."""
    options = replace(OPTIONS, clip=1e-4, epochs=3)
    tx = by_step(optax.sgd, lambda step: jnp.where(step == 0, 0.0, 0.1))
    state = jaxft.TrainState.create(model, jaxft.LoRA(r=2), tx)
    start = jax.tree.map(jnp.copy, leaves(state.trainable))
    drawn = Drawn(rollout(), REWARDS, log_probs_of(state.model, rollout(), jnp.float32(HEAT)))
    state, _ = update(options)(state, drawn)
    assert distance(leaves(state.trainable), start) == 0 and int(state.step) == 1
    state, _ = update(options)(state, drawn)
    assert distance(leaves(state.trainable), start) > 0

"""A step of PPO: what is known of the first one by hand, what stays as it is, and what compiles once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.generation.rollout import Rollout
from jaxft.models.hub import fresh_model
from jaxft.train.checkpoint import Checkpoints
from jaxft.train.experience import Experience, PpoOptions, adapted, dealt, prepared
from jaxft.train.optimizer import by_step
from jaxft.train.policy import PpoState
from jaxft.train.ppo import PpoUpdate
from jaxft.train.scoring import log_probs_of_both, values_of

ROWS, ROOM, TEMPERATURE = 8, 6, jnp.float32(0.7)
LENGTHS = np.array([6, 1, 4, 6, 2, 3, 6, 5])
ENDED = LENGTHS < 6
LORA = jaxft.LoRA(r=2, target_modules="all-linear")
REWARDS = np.array([1.0, -1.0, 0.5, 2.0, 0.0, 1.5, -0.5, 3.0])
OPTIONS = PpoOptions(temperature=0.7, epochs=1, gamma=1.0, lam=1.0)
MANY = dataclasses.replace(
    OPTIONS, epochs=2, minibatches=2, lam=0.95, entropy_coefficient=0.1, max_kl=1e9, kl_target=0.5, kl_horizon=50.0
)
UPDATES = {options: PpoUpdate(options) for options in (OPTIONS, MANY)}  # each is compiled once for the whole file
TX = by_step(lambda rate: optax.sgd(rate, momentum=0.9), lambda step: jnp.where(step == 7, 0.0, 0.1))


def begin(method=LORA, model=None, *, critic=None, kl=0.0):
    model = jaxft.testing.tiny_llama() if model is None else model
    policy = jaxft.TrainState.create(model, method, TX)
    return PpoState.begin(policy, critic or method, TX, seed=0, kl=kl, fresh=True)


def experience(state, rewards=REWARDS, seed=0, lengths=LENGTHS):
    """What a state says of answers that fell from the sky."""
    ids = jnp.asarray(np.random.default_rng(seed).integers(1, 64, (ROWS, 4 + ROOM)))
    real = jnp.asarray(np.arange(ROOM)[None] < lengths[:, None])
    mask = jnp.concatenate([jnp.ones((ROWS, 4), bool), real], 1).astype(jnp.int32)
    rollout = Rollout(ids * mask, mask, real, jnp.asarray(lengths < ROOM))
    log_probs, ref, entropy = log_probs_of_both(state.trainable, state.reference, state.frozen, rollout, TEMPERATURE)
    values = values_of(state.critic.trainable, state.critic.frozen, state.frozen, rollout)
    return Experience(rollout, log_probs, ref, entropy, values, jnp.asarray(rewards, jnp.float32))


def held(part):
    return jax.device_get(jaxft.leaves(part))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def moved(a, b):
    return sum(not np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def first():
    """A state, answers, and the state after one update on all of them; and what was there before it."""
    state = begin()
    seen = experience(state)
    before = held(state.trainable), held(state.critic.trainable)
    after, metrics = UPDATES[OPTIONS](state, seen)
    return seen, before, after, jax.device_get(metrics)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (LORA, jaxft.testing.tiny_llama),
        (jaxft.Full(), jaxft.testing.tiny_llama),
        (jaxft.BitFit(), jaxft.testing.tiny_gpt2),
        (jaxft.PrefixTuning(num_virtual_tokens=3), jaxft.testing.tiny_llama),
        (jaxft.PromptTuning(num_virtual_tokens=3), jaxft.testing.tiny_llama),
    ],
    ids=["lora", "full", "bitfit", "prefix", "prompt"],
)
def test_the_first_kl_is_zero_and_first_values_are(method, model):
    state = begin(method, model())
    seen = experience(state)
    assert bool((seen.log_probs == seen.ref_log_probs).all())
    assert bool((seen.log_probs < 0)[seen.rollout.answer_mask].all())
    assert bool((seen.values == 0).all())
    changed = jax.tree.map(lambda x: x + 0.1, state.trainable)
    other, ref, _ = log_probs_of_both(changed, state.reference, state.frozen, seen.rollout, TEMPERATURE)
    assert bool((ref == seen.ref_log_probs).all())
    assert float(jnp.abs(other - ref).max()) > 1e-3
    whole = jaxft.combine(changed, state.frozen)
    logits = whole(seen.rollout.input_ids, seen.rollout.attention_mask)[:, 3:-1].astype(jnp.float32) / 0.7
    plain = jnp.take_along_axis(jax.nn.log_softmax(logits), seen.rollout.input_ids[:, 4:, None], -1)[..., 0]
    np.testing.assert_allclose(other, jnp.where(seen.rollout.answer_mask, plain, 0), atol=2e-5)


def test_values_are_of_the_state_before_a_token(first):
    """A later token changes no value at or before its place; the one before it changes the value."""
    seen, _, state, _ = first
    parts = state.critic.trainable, state.critic.frozen, state.frozen
    values = values_of(*parts, seen.rollout)
    assert float(jnp.abs(values).max()) > 1e-3
    ids = seen.rollout.input_ids.at[:, 4 + 2].set(17)  # token 2 of the answers
    other = values_of(*parts, dataclasses.replace(seen.rollout, input_ids=ids))
    assert bool((other[:, :3] == values[:, :3]).all())
    there = seen.rollout.answer_mask[:, 3]
    assert bool((other[:, 3] != values[:, 3])[there].any())


def test_the_figures_of_the_first_update_by_hand(first):
    """Ratio 1, whitened advantages and values of 0: the losses are what a hand works out."""
    seen, _, _, metrics = first
    lengths = LENGTHS
    assert seen.rollout.lengths.tolist() == lengths.tolist()
    assert metrics["policy_loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["value_loss"] == pytest.approx((lengths * REWARDS**2).sum() / lengths.sum() / 2, rel=1e-5)
    assert metrics["loss"] == pytest.approx(0.1 * metrics["value_loss"], abs=1e-6)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["clip_fraction"] == metrics["kl"] == metrics["skipped"] == metrics["stopped"] == 0
    assert metrics["reward"] == metrics["objective"] == pytest.approx(REWARDS.mean())
    assert metrics["reward_std"] == pytest.approx(REWARDS.std(), rel=1e-6)
    assert metrics["response_length"] == pytest.approx(lengths.mean())
    assert metrics["trained_tokens"] == lengths.sum()
    assert metrics["ended"] == ENDED.mean()
    assert metrics["updates"] == 1
    assert metrics["value_explained_variance"] == pytest.approx(0, abs=1e-6)
    assert all(np.isfinite(x) for x in metrics.values())


def test_a_step_moves_both_and_nothing_else(first):
    _, (actor, critic), state, _ = first
    fresh = begin()
    assert moved(actor, held(state.trainable)) > 0
    assert moved(critic, held(state.critic.trainable)) > 0
    for part in ("frozen", "reference"):
        assert same(held(getattr(state, part)), held(getattr(fresh, part)))
    assert same(held(state.critic.frozen), held(fresh.critic.frozen))
    assert int(state.step) == int(state.critic.step) == 1


def test_a_reward_that_is_always_the_same_teaches_the_policy_nothing(first):
    del first  # the same programs
    state = begin()
    before, values = held(state.trainable), held(state.critic.trainable)
    state, metrics = UPDATES[OPTIONS](state, experience(state, np.full(ROWS, 1.0)))
    after = held(state.trainable)
    for path, x in before.items():
        np.testing.assert_allclose(after[path], x, atol=1e-6)
    assert moved(values, held(state.critic.trainable)) > 0
    assert float(metrics["reward_std"]) == 0


@pytest.mark.parametrize("lam", [0.5, 0.95, 1.0])
@pytest.mark.parametrize("rewards", [np.full(ROWS, 1.7), REWARDS], ids=["equal", "unequal"])
def test_what_the_critic_is_wrong_by_is_no_advantage(first, rewards, lam):
    """The first critic says 0 everywhere; one that is wrong at each place otherwise would be whitened into lessons."""
    seen = first[0]
    wrong = jnp.asarray(np.random.default_rng(0).normal(1.7, 0.1, seen.values.shape))
    seen = dataclasses.replace(seen, values=wrong, rewards=jnp.asarray(rewards, jnp.float32))
    batch, _ = prepared(dataclasses.replace(OPTIONS, lam=lam), seen, jnp.float32(0))
    assert bool(batch["advantages"].any()) == (rewards is REWARDS)
    assert bool((batch["returns"] != 0).any())


@pytest.mark.parametrize("rewards", [np.full(ROWS, 2.0), np.zeros(ROWS), REWARDS], ids=["equal", "zero", "unequal"])
def test_answers_that_are_empty_are_answers_of_an_end(first, rewards):
    """One token each: figures are finite, and equal rewards teach nothing."""
    del first
    state = begin()
    before = held(state.trainable)
    state, metrics = UPDATES[OPTIONS](state, experience(state, rewards, lengths=np.ones(ROWS, int)))
    assert all(np.isfinite(x) for x in jax.device_get(metrics).values())
    assert (int(metrics["updates"]), float(metrics["response_length"]), float(metrics["ended"])) == (1, 1, 1)
    far = max(np.abs(held(state.trainable)[path] - x).max() for path, x in before.items())
    assert (far > 1e-4) == (rewards is REWARDS)


def test_what_stands_past_an_answer_changes_nothing(first):
    seen, _, state, metrics = first
    outside = ~seen.rollout.answer_mask
    junk = {name: jnp.where(outside, jnp.nan, getattr(seen, name)) for name in ("log_probs", "ref_log_probs", "values")}
    past = ~jnp.concatenate([jnp.ones((ROWS, 4), bool), seen.rollout.answer_mask], 1)
    ids = jnp.where(past, 63, seen.rollout.input_ids)
    other = dataclasses.replace(seen, rollout=dataclasses.replace(seen.rollout, input_ids=ids), **junk)
    assert bool(outside.any())
    again, figures = UPDATES[OPTIONS](begin(), other)
    assert same(held(again.trainable), held(state.trainable))
    assert same(held(again.critic.trainable), held(state.critic.trainable))
    assert float(figures["loss"]) == metrics["loss"]


def test_what_is_not_finite_is_not_learnt_from(first):
    del first
    state = begin()
    seen = experience(state, np.array([np.nan, *REWARDS[1:]]))
    before = held(state.trainable), held(state.critic.trainable)
    state, metrics = UPDATES[OPTIONS](state, seen)
    assert int(metrics["skipped"]) == 1
    assert int(metrics["updates"]) == 0
    assert same(held(state.trainable), before[0])
    assert same(held(state.critic.trainable), before[1])
    assert int(state.step) == 1


def test_steps_compile_once_and_see_every_answer_each_epoch():
    state = begin()
    update = UPDATES[MANY]
    for step in range(3):
        state, metrics = update(state, experience(state, seed=step))
    assert update.program(state)._cache_size() == 1
    assert metrics["updates"] == 4
    order = dealt(jax.random.key(0), ROWS, 2, 2)
    assert order.shape == (4, 4)
    halves = [sorted(order[i : i + 2].reshape(-1).tolist()) for i in (0, 2)]
    assert halves == [list(range(ROWS))] * 2
    assert order[:2].tolist() != order[2:].tolist()


@pytest.mark.slow
def test_micro_batches_add_up_to_their_minibatch():
    parts, seen = PpoUpdate(dataclasses.replace(MANY, accumulate=2)), experience(begin())
    (one, figures), (other, theirs) = (update(begin(), seen) for update in (UPDATES[MANY], parts))
    for name in figures:
        assert float(figures[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-6), name
    for mine, yours in ((one.trainable, other.trainable), (one.critic.trainable, other.critic.trainable)):
        a, b = held(mine), held(yours)
        for path in a:
            np.testing.assert_allclose(a[path], b[path], atol=1e-6)


def test_a_policy_that_has_gone_too_far_stops_the_step():
    """The first update is of ratio 1; the second finds the policy elsewhere, and neither it nor a later one is made."""
    tight = PpoUpdate(dataclasses.replace(MANY, max_kl=1e-9))
    seen = experience(begin())
    state, metrics = tight(begin(), seen)
    assert (int(metrics["updates"]), int(metrics["stopped"]), int(metrics["skipped"])) == (1, 1, 0)
    assert float(metrics["approx_kl"]) > 0
    loose, metrics = UPDATES[MANY](begin(), seen)
    assert (int(metrics["updates"]), int(metrics["stopped"])) == (4, 0)
    assert moved(held(state.trainable), held(loose.trainable)) > 0


def test_the_coefficient_follows_its_target():
    """Ziegler et al. 2019: an error beyond 0.2 counts as 0.2, in proportion to answers over the horizon."""
    options = PpoOptions(kl_target=2.0, kl_horizon=40.0)
    for kl, factor in ((9.0, 1.04), (2.0, 1.0), (0.0, 0.96), (2.2, 1.02), (np.nan, 1.0)):
        assert float(adapted(options, jnp.float32(0.5), jnp.float32(kl), 8)) == pytest.approx(0.5 * factor, rel=1e-6)
    assert float(adapted(PpoOptions(), jnp.float32(0.5), jnp.float32(9.0), 8)) == 0.5


def test_the_learning_rate_is_that_of_the_step_in_all_its_updates():
    """At step 7 it is 0, however many updates were made before."""
    for step, still in ((6, False), (7, True), (8, False)):
        state = begin().replace(step=jnp.int32(step))
        start = held(state.trainable)
        state, metrics = UPDATES[MANY](state, experience(state))
        assert same(held(state.trainable), start) is still
        assert metrics["updates"] == 4


def test_a_checkpoint_holds_all_that_steps_change(tmp_path):
    state, update = begin(kl=0.1), UPDATES[MANY]
    state, _ = update(state, experience(state))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        back = checkpoints.restore(begin(kl=0.1))
    assert float(back.kl_coefficient) == float(state.kl_coefficient) != pytest.approx(0.1)
    (one, figures), (other, theirs) = (update(s, experience(s, seed=1)) for s in (state, back))
    assert jax.device_get(figures) == jax.device_get(theirs)
    assert same(held(one.trainable), held(other.trainable))
    assert same(held(one.critic.trainable), held(other.critic.trainable))


def test_no_array_is_in_a_state_twice():
    model = jaxft.testing.tiny_llama()
    state = begin(model=model)
    base = sum(x.nbytes for x in jax.tree.leaves(model))
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(dataclasses.replace(state, key=None))]
    assert len(places) == len(set(places))
    small = sum(x.nbytes for x in jax.tree.leaves((state.trainable, state.critic.trainable)))
    assert sum(x.nbytes for x in jax.tree.leaves(state)) < base + 4 * small


def test_a_critic_of_its_own_method_over_a_policy_that_trains_the_base():
    """It stands on the reference, which the policy's steps do not consume."""
    state = begin(jaxft.Full(), critic=LORA)
    before = held(state.critic.frozen)
    for step in range(2):
        state, metrics = UPDATES[OPTIONS](state, experience(state, seed=step))
    assert int(metrics["skipped"]) == 0
    assert same(held(state.critic.frozen), before)


def test_a_critic_that_cannot_be_is_told():
    with pytest.raises(
        jaxft.MethodError, match="the critic, which ppo.critic gives a method of its own: target_modules='lm_head'"
    ):
        begin(jaxft.LoRA(r=2, target_modules=("q_proj", "lm_head")))


@pytest.mark.slow
def test_eight_devices_learn_as_one():
    sizes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    config, seen, found = jaxft.testing.tiny_llama(**sizes).config, None, []
    for mesh in (None, jaxft.make_mesh(data=2, fsdp=4)):
        state = begin(model=fresh_model(config.replace(mesh=mesh), 0))
        seen = seen or experience(state)
        for _ in range(2):
            state, metrics = UPDATES[MANY](state, seen)
        found.append((jax.device_get(metrics), held(state.trainable), held(state.critic.trainable)))
    assert UPDATES[MANY].program(state)._cache_size() == 1
    (figures, actor, critic), (theirs, their_actor, their_critic) = found
    for name in figures:
        assert float(figures[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-5), name
    for a, b in ((actor, their_actor), (critic, their_critic)):
        for path in a:
            np.testing.assert_allclose(a[path], b[path], atol=1e-5)

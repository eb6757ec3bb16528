"""PPO against what trl 1.12's trainer did with the same models and draws: no torch is needed here."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ppo_runs import END, LENGTH, PENALTY, RUNS, TEMPERATURE
from safetensors.numpy import load_file

import jaxft
from jaxft import losses
from jaxft.generation.rollout import Rollout
from jaxft.models.sharing import with_head
from jaxft.train.experience import Experience, PpoOptions, prepared

FOLDER = Path(__file__).parent / "golden"
GOLDEN = load_file(FOLDER / "ppo.safetensors")
close = partial(np.testing.assert_allclose, atol=1e-5)


@pytest.fixture(scope="module")
def models():
    """One base under all four: policy, reference, reward model and critic."""
    base, _ = jaxft.load(FOLDER / "llama" / "base")
    made = {"reference": base, "policy": jaxft.load_adapter(base, FOLDER / "llama" / "all")}
    for name in ("reward", "value"):
        made[name] = with_head(base, (name,))
        made[name].score.kernel.set_value(jnp.asarray(GOLDEN[f"heads {name}"]).T)
    return made


@pytest.fixture(scope="module")
def drawn(models):
    """What our models make of the peer's draws, by run; only the peer's optimiser is left out."""
    log_probs = jax.jit(partial(losses.token_log_probs, temperature=TEMPERATURE, last=LENGTH))
    scores, everywhere = jax.jit(lambda m, x: m(**x)[:, 0]), jax.jit(lambda m, x: m.scores(x)[..., 0])
    found = {}
    for run in RUNS:
        ids = jnp.asarray(GOLDEN[f"{run} input_ids"])
        ends = ids[:, -LENGTH:] == END
        mask = jnp.cumsum(ends, 1) - ends == 0  # up to the end token, and with it
        prompt = ids[:, :-LENGTH] != 0
        cut = {"input_ids": ids, "attention_mask": jnp.concatenate([prompt, mask], 1)}
        whole = {"input_ids": ids, "attention_mask": jnp.concatenate([prompt, jnp.ones_like(mask)], 1)}
        found[run] = {
            "mask": mask,
            "log_probs": log_probs(models["policy"], whole),
            "ref": log_probs(models["reference"], whole),
            "values": everywhere(models["value"], whole)[:, -LENGTH - 1 : -1],
            "scores": scores(models["reward"], cut),
            "penalty": jnp.where(ends.any(1), 0, PENALTY),
        }
    return found


def rewarded(run, drawn):
    """Rewards, and the mask of the critic's places: trl's score stands one place after the end."""
    d, options = drawn[run], RUNS[run]
    kl = losses.kl_penalty(d["log_probs"], d["ref"], kind=options["kl"], mask=d["mask"])
    scores = d["scores"] - d["penalty"]
    rewards = losses.place_rewards(scores, kl, d["mask"], beta=options["beta"], position="after_end")
    places = losses.with_place_after(d["mask"])
    if options["whiten"]:
        rewards = losses.whiten(rewards, places, shift_mean=False)
    return kl, scores, rewards, places


@pytest.mark.parametrize("run", RUNS)
def test_what_the_models_say(run, drawn):
    d, mask = drawn[run], drawn[run]["mask"]
    close(d["scores"], GOLDEN[f"{run} scores"])
    for name, places in (("log_probs", mask), ("ref", mask), ("values", losses.with_place_after(mask))):
        close(np.where(places, d[name], 0), np.where(places, GOLDEN[f"{run} {name}"], 0))


@pytest.mark.parametrize("run", RUNS)
def test_rewards_and_advantages(run, drawn):
    d, options = drawn[run], RUNS[run]
    kl, scores, rewards, places = rewarded(run, drawn)
    close(kl.sum(1).mean(), GOLDEN[f"{run} kl"])
    close(-options["beta"] * kl.sum(1).mean(), GOLDEN[f"{run} non_score_reward"])
    close(scores.mean() - options["beta"] * kl.sum(1).mean(), GOLDEN[f"{run} rlhf_reward"])
    advantages, _ = losses.generalized_advantage_estimation(
        rewards, d["values"], places, gamma=options["gamma"], lam=options["lam"]
    )
    np.testing.assert_allclose(advantages, GOLDEN[f"{run} advantages"], atol=2e-5, rtol=1e-5)  # up to 10 in size
    mask = np.asarray(d["mask"])
    whitened = losses.whiten(advantages, d["mask"])
    close(whitened, np.where(mask, GOLDEN[f"{run} whitened"], 0))


@pytest.mark.parametrize("run", RUNS)
def test_a_step_prepares_what_the_peer_learns_from(run, drawn):
    d, o = drawn[run], RUNS[run]
    rollout = Rollout(jnp.asarray(GOLDEN[f"{run} input_ids"]), None, d["mask"], d["penalty"] == 0)
    seen = Experience(rollout, d["log_probs"], d["ref"], jnp.zeros(d["mask"].shape), d["values"], d["scores"])
    options = PpoOptions(
        missing_end_penalty=PENALTY,
        kl_kind=o["kl"],
        gamma=o["gamma"],
        lam=o["lam"],
        whiten_rewards=o["whiten"],
        score_position="after_end",
    )
    batch, figures = prepared(options, seen, jnp.float32(o["beta"]))
    close(batch["advantages"], np.where(d["mask"], GOLDEN[f"{run} whitened"], 0))
    close(figures["kl"], GOLDEN[f"{run} kl"])
    close(figures["objective"], GOLDEN[f"{run} rlhf_reward"])


@pytest.mark.parametrize("run", RUNS)
def test_losses_and_gradients_of_each_epoch(run, drawn):
    """The policy as it moves away from the one that drew, until clipping binds in it and in the critic."""
    d, options, clip = drawn[run], RUNS[run], RUNS[run]["clip"]
    *_, rewards, places = rewarded(run, drawn)
    advantages, returns = losses.generalized_advantage_estimation(
        rewards, d["values"], places, gamma=options["gamma"], lam=options["lam"]
    )
    advantages = losses.whiten(advantages, d["mask"])
    of_policy = jax.jit(jax.value_and_grad(partial(losses.ppo_policy_loss, clip=clip)))
    of_values = jax.jit(jax.value_and_grad(partial(losses.ppo_value_loss, clip=clip)))
    for epoch in range(options["epochs"]):
        want = {
            key.split(" ")[1]: x[epoch] for key, x in GOLDEN.items() if key.startswith(run) and x.ndim and "_" in key
        }
        new = jnp.asarray(want["new_log_probs"])
        loss, grad = of_policy(new, d["log_probs"], advantages, d["mask"])
        close(loss, want["policy_loss"])
        close(grad, want["policy_gradient"])
        fraction = losses.clip_fraction(new, d["log_probs"], advantages, d["mask"], clip=clip)
        close(fraction, want["clip_fraction"])
        loss, grad = of_values(jnp.asarray(want["new_values"]), d["values"], returns, places)
        close(loss, want["value_loss"], rtol=1e-5)
        close(grad, want["value_gradient"])


def test_the_runs_see_what_they_should(drawn):
    """Answers of one token, of all, with an end and without one; clipping that binds; gradients that are cut by it."""
    lengths = np.concatenate([np.asarray(d["mask"]).sum(1) for d in drawn.values()])
    assert {1, 2, 3, 6} <= set(lengths.tolist())
    assert all(0 < (np.asarray(d["penalty"]) == 0).sum() < 8 for d in drawn.values())
    assert (GOLDEN["k3 clip_fraction"][1:] > 0.1).all() and len(GOLDEN) == 2 * 17 + 2
    cut = GOLDEN["k3 value_gradient"][2] == 0
    assert cut.sum() > (~np.asarray(losses.with_place_after(drawn["k3"]["mask"]))).sum()

"""The losses of preferences and of GRPO that are compared with trl; no torch is needed here."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxft
from jaxft import losses
from jaxft.models.sharing import with_head

GOLDEN = Path(__file__).parent / "golden"
PAIRS, ANSWERS, LENGTH, GROUP = 5, 6, 7, 3
RNG = np.random.default_rng(0)
WORDS = RNG.integers(2, LENGTH, (2, PAIRS))  # tokens of the chosen and the rejected answers
SUMS = -8 + 2 * RNG.standard_normal((4, PAIRS))
DRAWN = -2 + RNG.standard_normal((ANSWERS, LENGTH))
COLUMNS = {
    **dict(zip(("chosen", "rejected", "margin"), RNG.standard_normal((3, PAIRS)), strict=True)),
    **dict(zip(("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"), SUMS, strict=True)),
    "kl": 0.5 + RNG.standard_normal(PAIRS),
    "log_probs": DRAWN,
    "old": DRAWN + 0.3 * RNG.standard_normal((ANSWERS, LENGTH)),
    "ref": DRAWN + 0.5 * RNG.standard_normal((ANSWERS, LENGTH)),
    "advantages": RNG.standard_normal(ANSWERS),
    "rewards": np.array([0.1, 0.5, 1.0, 2.0, -1.0, 2.0]),
}
COLUMNS = {name: x.astype(np.float32) for name, x in COLUMNS.items()}
GOOD = np.array([1, 0, 0, 1, 1], bool)
MASK = (np.arange(LENGTH) < np.array([7, 3, 5, 1, 4, 6])[:, None]).astype(np.int32)

# (reduction, ratio, weight of the KL, whether it is corrected)
GRPO = {
    f"grpo-{reduction}-{ratio}{suffix}": (reduction, ratio, kl, corrected)
    for reduction in ("grpo", "bnpo", "dr_grpo", "dapo")
    for ratio in ("token", "sequence")
    for kl, corrected, suffix in ((0.0, False, ""), (0.04, False, "-kl"), (0.04, True, "-corrected"))
}
CLIP, CLIP_HIGH, WINDOW = 0.2, 0.28, 40  # of two batches, all the tokens that an optimiser step sees
BETA, SMOOTHING = 0.3, 0.1


def dpo(*sums, by=None, **options):
    """Sums over the tokens; the peer's ipo takes means over them."""
    sums = [x / n for x, n in zip(sums, by, strict=True)] if by is not None else sums
    return losses.dpo_loss(*sums, beta=BETA, **options)


def grpo(case):
    reduction, ratio, kl, corrected = GRPO[case]
    options = {"reduction": reduction, "ratio": ratio, "kl_coefficient": kl, "correct_kl": corrected}
    rest = {"ref_log_probs": COLUMNS["ref"], "max_length": LENGTH, "tokens": WINDOW}
    given = COLUMNS["old"], COLUMNS["advantages"], jnp.asarray(MASK)
    return lambda log_probs: losses.grpo_loss(log_probs, *given, clip=CLIP, clip_high=CLIP_HIGH, **options, **rest)


def kto(policy, **weights):
    return losses.kto_loss(policy, COLUMNS["ref_chosen"], jnp.asarray(GOOD), kl=COLUMNS["kl"], beta=BETA, **weights)


TWO = ("chosen", "rejected")
SUMMED = ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")
OURS = {
    "reward": (TWO, losses.reward_loss),
    "reward-centred": (TWO, partial(losses.reward_loss, centering=0.05)),
    "reward-margin": (TWO, lambda x, y: losses.reward_loss(x, y, margin=COLUMNS["margin"])),
    "dpo-sigmoid": (SUMMED, dpo),
    "dpo-hinge": (SUMMED, partial(dpo, kind="hinge")),
    "dpo-ipo": (SUMMED, partial(dpo, kind="ipo", by=[*WORDS, *WORDS])),
    "dpo-robust": (SUMMED, partial(dpo, kind="robust", label_smoothing=SMOOTHING)),
    "dpo-conservative": (SUMMED, partial(dpo, label_smoothing=SMOOTHING)),
    "kto": (("policy_chosen",), kto),
    "kto-weights": (("policy_chosen",), partial(kto, desirable_weight=1.5, undesirable_weight=0.7)),
    **{case: (("log_probs",), grpo(case)) for case in GRPO},
}
ADVANTAGES = ("group", "batch", "none")


def ours(case):
    """The loss of a case, and its gradient with respect to each column."""
    columns, loss = OURS[case]
    given = [jnp.asarray(COLUMNS[name]) for name in columns]
    value, grads = jax.jit(jax.value_and_grad(loss, tuple(range(len(given)))))(*given)
    return {"loss": value, **dict(zip(columns, grads, strict=True))}


def check(case, want):
    """Compare a case with what the peer made of it: `{"loss": ..., column: gradient}`; none for the reference."""
    got = ours(case)
    assert want.keys() == {"loss", *(name for name in got if not name.startswith("ref"))}
    for name, value in want.items():
        size = np.abs(value).max()
        assert size > 1e-3, name
        np.testing.assert_allclose(got[name], value, atol=1e-5 * max(size, 1e-2), rtol=1e-5, err_msg=f"{case} {name}")


def check_advantages(scale, want):
    got = losses.group_advantages(COLUMNS["rewards"], group_size=GROUP, scale=scale)
    np.testing.assert_allclose(got, want, atol=1e-5)


def models():
    """The base, and the policy: the base and a LoRA."""
    base, _ = jaxft.load(GOLDEN / "llama" / "base")
    return base, jaxft.load_adapter(base, GOLDEN / "llama" / "all")


def close(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5)


def check_dpo_of_models(want):
    """The policy beside the base, from its own start, and the base beside the policy that it was."""
    base, policy = models()
    batch = {name: jnp.asarray(want[name]) for name in ("input_ids", "attention_mask")}
    answers = jnp.asarray(want["completion_mask"])[:, 1:]
    assert answers.any() and (batch["attention_mask"] == 0).any()
    log_probs = jax.jit(losses.token_log_probs)
    sums = {
        name: jnp.split((log_probs(model, batch) * answers).sum(1), 2)
        for name, model in (("base", base), ("policy", policy))
    }
    for loss, (trained, ref) in {
        "separate": ("policy", "base"),
        "disabled": ("policy", "base"),
        "start": ("policy", "policy"),
        "continued": ("base", "policy"),
    }.items():
        close(losses.dpo_loss(*sums[trained], *sums[ref], beta=BETA), want[loss])
    close(want["start"], np.log(2))
    assert abs(want["separate"] - np.log(2)) > 1e-2


def check_log_probs(want):
    """The last tokens of rows padded left and right, at a temperature."""
    batch = {name: jnp.asarray(want[name]) for name in ("input_ids", "attention_mask")}
    number = want["log_probs"].shape[1]
    got = jax.jit(partial(losses.token_log_probs, temperature=0.7, entropy=True, last=number))(models()[1], batch)
    real = want["attention_mask"][:, -number:] == 1
    assert real.sum() < real.size
    for x, name in zip(got, ("log_probs", "entropies"), strict=True):
        close(np.where(real, x, 0), np.where(real, want[name], 0))


def check_scores(want):
    """Scores are read at the last token of the mask; trl's at the last that is no pad id, maybe the end's."""
    model = with_head(models()[0], ("score",))
    model.score.kernel.set_value(jnp.asarray(want["kernel"]).T)
    for padding in ("own", "eos"):
        ids, mask = (jnp.asarray(want[f"{name} {padding}"]) for name in ("input_ids", "attention_mask"))
        everywhere, last = model.scores({"input_ids": ids, "attention_mask": mask})[..., 0], mask.sum(1) - 1
        scores = model(ids, mask)[:, 0]
        close(scores, everywhere[jnp.arange(len(ids)), last])
        theirs = scores if padding == "own" else everywhere[jnp.arange(len(ids)), last - 1]
        close(theirs, want[f"scores {padding}"])
        chosen, rejected = jnp.split(theirs, 2)
        loss = losses.reward_loss(chosen, rejected, margin=jnp.asarray(want[f"margin {padding}"]), centering=0.05)
        close(loss, want[f"loss {padding}"])
    assert np.abs(scores - want["scores eos"]).min() > 1e-3


OF_MODELS = {"dpo": check_dpo_of_models, "log_probs": check_log_probs, "scores": check_scores}

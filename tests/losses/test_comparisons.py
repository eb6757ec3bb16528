"""Model losses over compared answers: by hand, whatever the padding holds, and what a batch lacks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.errors import BatchError, MethodError
from jaxft.losses import make_dpo_loss, make_reward_loss, reference_log_probs
from jaxft.losses.comparisons import answer_log_probs, answer_scores
from jaxft.models.sharing import with_head
from jaxft.testing import tiny_llama

POLICY, REFERENCE = tiny_llama(seed=0), tiny_llama(seed=1)
SCORER = with_head(POLICY, ("score",))
ROWS = {"chosen": [[5, 6, 7, 8], [9, 3, 4]], "rejected": [[5, 6, 9], [9, 3, 1, 2, 6]]}  # two tokens of prompt each


def batch(width=6, left=False, junk=0, rows=ROWS):
    """Return the rows padded to a width, right or left, with some id in the padding."""
    made = {}
    for name, answers in rows.items():
        shape = (len(answers), width)
        ids, labels, mask = np.full(shape, junk), np.full(shape, -100), np.zeros(shape, int)
        for i, answer in enumerate(answers):
            at = slice(width - len(answer), None) if left else slice(0, len(answer))
            ids[i, at], mask[i, at] = answer, 1
            labels[i, at] = [-100, -100, *answer[2:]][: len(answer)]
        made |= {f"{name}_input_ids": ids, f"{name}_labels": labels, f"{name}_attention_mask": mask}
    return {name: jnp.asarray(x, jnp.int32) for name, x in made.items()}


class Sums:
    """The score of a row is the sum of its tokens."""

    inputs = ("input_ids", "attention_mask")

    def __call__(self, input_ids, attention_mask, key=None):
        return (input_ids * attention_mask).sum(1, keepdims=True) / 10


SAID = {"chosen": [2.6, 1.6], "rejected": [2.0, 2.1]}  # what it says of the rows above


def test_the_reward_loss_by_hand():
    log1p = lambda x: np.log1p(np.exp(x))
    margins = np.subtract(SAID["chosen"], SAID["rejected"])
    total, rows, figures = make_reward_loss()(Sums(), batch(), key=None)
    np.testing.assert_allclose(total, log1p(-margins).sum(), rtol=1e-6)
    assert rows == 2
    assert {name: float(a / b) for name, (a, b) in figures.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": margins.mean(), "chosen_score": 2.1, "rejected_score": 2.05}, rel=1e-5
    )
    total, _, _ = make_reward_loss(margin=0.5, centering=0.1)(Sums(), batch(), key=None)
    squares = 0.1 * np.add(SAID["chosen"], SAID["rejected"]) ** 2
    np.testing.assert_allclose(total, (log1p(0.5 - margins) + squares).sum(), rtol=1e-6)
    own = {**batch(), "margin": jnp.array([jnp.nan, 2.0])}  # a row's own margin is taken instead
    total, _, _ = make_reward_loss(margin=0.5)(Sums(), own, key=None)
    np.testing.assert_allclose(total, log1p(0.5 - margins[0]) + log1p(2.0 - margins[1]), rtol=1e-6)


def test_ranked_lists_by_hand():
    """Of three answers the mean over three pairs; a list of two has one; one answer alone counts nothing."""
    lists = {"answer_1": [[30], [10], [5]], "answer_2": [[10], [20], []], "answer_3": [[20], [], []]}
    total, rows, figures = make_reward_loss()(Sums(), batch(rows=lists), key=None)
    log1p = lambda x: np.log1p(np.exp(x))
    np.testing.assert_allclose(total, (log1p(-2) + log1p(-1) + log1p(1)) / 3 + log1p(1), rtol=1e-6)
    assert rows == 2
    assert [float(x) for x in figures["accuracy"]] == [2, 4]
    assert [float(x) for x in figures["margin"]] == pytest.approx([2 + 1 - 1 - 1, 4])


def test_a_row_of_two_has_its_margin_beside_longer_lists():
    """And one of three has none."""
    lists = {"answer_1": [[30], [10], [30]], "answer_2": [[10], [20], [10]], "answer_3": [[20], [], []]}
    log1p = lambda x: np.log1p(np.exp(x))
    own = {**batch(rows=lists), "margin": jnp.array([5.0, 2.0, jnp.nan])}
    total, rows, _ = make_reward_loss(margin=0.5)(Sums(), own, key=None)
    np.testing.assert_allclose(total, (log1p(-2) + log1p(-1) + log1p(1)) / 3 + log1p(3) + log1p(-1.5), rtol=1e-6)
    assert rows == 3


def test_equal_scores_are_half_a_hit():
    """So DPO, whose policy is the reference at first, begins at one half."""
    rows = {"chosen": [[10, 20], [9]], "rejected": [[20, 10], [3]]}
    _, _, figures = make_reward_loss()(Sums(), batch(rows=rows), key=None)
    assert [float(x) for x in figures["accuracy"]] == [1.5, 2]
    begun = {**batch(), **reference_log_probs(POLICY, batch())}
    _, _, figures = jax.jit(lambda b: make_dpo_loss()(POLICY, b, key=None))(begun)
    assert [float(x) for x in figures["accuracy"]] == [1, 2]


def test_the_answers_of_a_long_list_keep_their_order():
    """Of a dict that went through jit, where answer_10 comes before answer_2."""
    lists = {f"answer_{k}": [[100 - k]] for k in range(1, 12)}
    scores, there = jax.jit(lambda b: answer_scores(Sums(), b))(batch(rows=lists))
    np.testing.assert_allclose(scores[0] * 10, range(99, 88, -1), rtol=1e-6)
    assert there.all()


def whole(model, rows, name):
    """Return the log-probability of each answer of one column by the whole logits, row by row, and its length."""
    found = []
    for row in rows[name]:
        logs = jax.nn.log_softmax(model(jnp.array([row]))[0])
        found.append((float(sum(logs[t - 1, row[t]] for t in range(2, len(row)))), len(row) - 2))
    return np.array(found).T


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_dpo_loss_by_hand(kind):
    """Log-probabilities are summed over the answer, and for IPO are means over its tokens."""
    ratios, lengths = {}, {}
    for name in ROWS:
        (policy, lengths[name]), (reference, _) = (whole(m, ROWS, name) for m in (POLICY, REFERENCE))
        ratios[name] = policy - reference
    if kind == "ipo":
        h = ratios["chosen"] / lengths["chosen"] - ratios["rejected"] / lengths["rejected"]
        want = (h - 1 / (2 * 0.3)) ** 2
    else:
        want = np.log1p(np.exp(-0.3 * (ratios["chosen"] - ratios["rejected"])))
    given = {**batch(), **reference_log_probs(REFERENCE, batch())}
    total, rows, figures = make_dpo_loss(beta=0.3, kind=kind)(POLICY, given, key=None)
    np.testing.assert_allclose(total, want.sum(), rtol=1e-5)
    said = {name: float(a / b) for name, (a, b) in figures.items()}
    margins = 0.3 * (ratios["chosen"] - ratios["rejected"])
    assert rows == 2
    assert said == pytest.approx(
        {
            "chosen_reward": 0.3 * ratios["chosen"].mean(),
            "rejected_reward": 0.3 * ratios["rejected"].mean(),
            "margin": margins.mean(),
            "accuracy": (margins > 0).mean(),
            "log_ratio": sum(r.sum() for r in ratios.values()) / sum(n.sum() for n in lengths.values()),
        },
        rel=1e-4,
        abs=1e-6,
    )


def test_a_policy_that_is_its_reference():
    given = {**batch(), **reference_log_probs(POLICY, batch())}
    total, rows, figures = make_dpo_loss()(POLICY, given, key=None)
    np.testing.assert_allclose(total / rows, np.log(2), atol=1e-6)
    assert all(abs(float(a)) < 1e-5 for name, (a, _) in figures.items() if name != "accuracy")


@partial(jax.jit, static_argnums=0)
def value_and_gradient(loss, model, given):
    def total(model):
        total, rows, _ = loss(model, given, key=None)
        return total, rows

    return jax.value_and_grad(total, has_aux=True)(model)


def same(a, b, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("loss", ["reward", "dpo"])
def test_padding_changes_nothing(loss):
    """Right, left, wider, other ids in it, rows that are padding altogether: value and every gradient."""
    model, make = (SCORER, make_reward_loss(centering=0.1)) if loss == "reward" else (POLICY, make_dpo_loss())
    more = {name: [*answers, []] for name, answers in ROWS.items()}
    found = []
    for options in ({}, {"left": True, "junk": 63}, {"width": 9, "junk": 7, "rows": more}):
        given = batch(**options)
        if loss == "dpo":
            given |= reference_log_probs(REFERENCE, given)
            if "rows" in options:
                given["chosen_reference"] = given["chosen_reference"].at[-1].set(jnp.nan)
        elif "rows" in options:
            given["margin"] = jnp.full(3, jnp.nan)
        found.append(value_and_gradient(make, model, given))
        assert found[-1][0][1] == 2
    assert len(found) == 3
    for other in found[1:]:
        same(found[0], other, atol=1e-5)
    assert max(float(abs(x).max()) for x in jax.tree.leaves(found[0][1])) > 1e-3


def test_a_row_with_one_answer_left_counts_nothing():
    given = batch(rows={"chosen": [[5, 6, 7], [5, 6, 7]], "rejected": [[5, 6, 8], [5, 6]]})  # no token of an answer
    given |= reference_log_probs(REFERENCE, given)
    assert make_dpo_loss()(POLICY, given, key=None)[1] == 1
    sums, tokens = answer_log_probs(POLICY, given)
    assert sums.shape == (2, 2) and tokens.tolist() == [[1, 1], [1, 0]]


LACKS = [
    (make_reward_loss(), SCORER, {"input_ids": [[1]]}, r"has chosen_input_ids and rejected_input_ids \[B, T\]"),
    (make_reward_loss(), POLICY, batch(), r'gives \[4, 6, 64\] where one score for each row is expected.*"score"'),
    (make_reward_loss(), SCORER, {**batch(), "chosen_input_ids": jnp.ones((2, 4))}, "padded to one width"),
    (make_dpo_loss(), POLICY, batch(), "lacks chosen_reference and rejected_reference"),
]


@pytest.mark.parametrize(("loss", "model", "given", "message"), LACKS)
def test_what_a_batch_lacks(loss, model, given, message):
    with pytest.raises(BatchError, match=message):
        loss(model, given, key=None)
    assert len(LACKS) == 4


def test_options_are_looked_at_when_a_loss_is_made():
    with pytest.raises(MethodError, match="kind='sigmoidal'"):
        make_dpo_loss(kind="sigmoidal")
    with pytest.raises(MethodError, match="beta=0"):
        make_dpo_loss(beta=0)
    labels = {name: x for name, x in batch().items() if "labels" not in name}
    with pytest.raises(BatchError, match="lacks chosen_labels"):
        reference_log_probs(POLICY, labels)


def test_a_script_trains_by_these():
    """The reference is made before the steps, which consume the trained arrays; a step moves the margin up."""
    import optax

    state = jaxft.TrainState.create(POLICY, jaxft.LoRA(r=2), optax.adamw(1e-2))
    given = {**batch(), **reference_log_probs(jaxft.attach(POLICY, jaxft.LoRA(r=2)), batch())}
    step, seen = jaxft.make_train_step(make_dpo_loss()), []
    for _ in range(3):
        state, metrics = step(state, given)
        seen.append(float(metrics["loss"]))
    assert abs(seen[0] - np.log(2)) < 1e-6
    assert seen[2] < seen[1] < seen[0]

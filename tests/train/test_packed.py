"""Packed rows are the rows alone: the same loss, the same gradients, and nothing of a neighbour."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxft
from jaxft.data import collate
from jaxft.data.packing import collate_packs, pack
from jaxft.data.tokens import example
from jaxft.losses import next_token_loss
from jaxft.train.step import with_leaves

FAMILIES = {"llama": jaxft.testing.tiny_llama, "gpt2": jaxft.testing.tiny_gpt2}
METHODS = {"lora": jaxft.LoRA(r=2, target_modules="all-linear"), "full": jaxft.Full()}
family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)


def rows():
    """Twelve rows; what of each is trained begins somewhere, in some at its first token."""
    rng = np.random.default_rng(0)
    made = []
    for n in rng.integers(2, 20, 12):
        made.append(example(rng.integers(1, 64, n), [int(t) >= n % 4 for t in range(n)]))
    return made


def packed():
    data = rows()
    packs = [[data[i] for i in numbers] for numbers in pack([len(row) for row in data], 32)]
    assert max(map(len, packs)) > 1
    return collate_packs(packs, 32, rows=len(packs) + 1)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@family
def test_loss_and_gradients_are_those_of_the_rows(make, method):
    trainable, frozen = jaxft.partition(jaxft.attach(make(), method), method)
    shaken = {
        path: x + 0.05 * jax.random.normal(jax.random.key(i), x.shape)  # B of LoRA is zero, and A without a gradient
        for i, (path, x) in enumerate(jaxft.leaves(trainable).items())
    }

    @jax.jit
    def both(params, batch):
        def total(params):
            return next_token_loss(jaxft.combine(with_leaves(trainable, params), frozen), batch)[:2]

        return jax.value_and_grad(total, has_aux=True)(params)

    (together, weight), ours = both(shaken, packed())
    alone = [both(shaken, collate([row], rows=1)) for row in rows()]
    assert weight == sum(w for (_, w), _ in alone) == sum(row.trained for row in rows())
    np.testing.assert_allclose(together, sum(np.float64(total) for (total, _), _ in alone), rtol=1e-6)
    for path, got in ours.items():
        want = sum(np.asarray(grads[path], np.float64) for _, grads in alone)
        assert np.linalg.norm(want) > 0, path
        assert np.linalg.norm(got - want) < 1e-6 * np.linalg.norm(want), path
    assert len(ours) == len(shaken) > 5


@pytest.mark.parametrize("beside", ["segments", "mask", "holes"])
@family
def test_no_token_sees_another_row(make, beside):
    """One row is changed; of all the others every bit stays, with a mask beside the segments too."""
    model, batch = make(), packed()
    inputs = {name: batch[name] for name in ("input_ids", "segment_ids", "position_ids")}
    if beside != "segments":
        inputs["attention_mask"] = batch["attention_mask"].copy()
    if beside == "holes":
        inputs["attention_mask"][:, 3] = 0  # a mask narrows what a token sees within its segment
    real = (inputs.get("attention_mask", 1) * inputs["segment_ids"]) != 0
    assert 30 < real.sum() < real.size
    both = jax.jit(lambda inputs: ((h := model.hidden(**inputs)), model.head(h)))
    before, seen = both(inputs), 0
    for segment in (1, 2):
        mine = batch["segment_ids"][0] == segment
        assert mine.sum() > 1
        others = inputs["input_ids"].copy()
        others[0, mine] = (others[0, mine] + 7) % 63 + 1
        for a, b in zip(before, both({**inputs, "input_ids": others}), strict=True):
            changed = np.asarray((a != b).any(-1))
            assert changed[0, mine & real[0]].all()
            assert changed[real].sum() == (mine & real[0]).sum()
            seen += 1
    assert seen == 4


@family
def test_where_a_row_stands_in_its_pack_means_nothing(make):
    """Positions restart: the same rows in another order in the pack have the same loss each."""
    model, data = make(), rows()[:3]
    totals = [
        float(next_token_loss(model, collate_packs([[data[i] for i in order]], 64))[0])
        for order in ((0, 1, 2), (2, 0, 1))
    ]
    np.testing.assert_allclose(totals[0], totals[1], rtol=1e-6)
    batch = collate_packs([data], 64)
    given = model.hidden(**{k: jnp.asarray(batch[k]) for k in ("input_ids", "segment_ids", "position_ids")})
    derived = model.hidden(**{k: jnp.asarray(batch[k]) for k in ("input_ids", "segment_ids")})
    real = batch["segment_ids"] > 0
    np.testing.assert_array_equal(given[real], derived[real])

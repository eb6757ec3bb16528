"""The laws that every method keeps, each a function that raises AssertionError; `check_method` runs them all.

A method of your own, in your own pytest:

    def test_mine():
        jaxft.testing.check_method(Mine(), jaxft.testing.tiny_llama())
"""

import tempfile
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..interop.folder import load_adapter, save_adapter
from ..losses.entropy import IGNORED
from ..losses.language import next_token_loss
from ..methods import ADDED, METHODS, Full
from ..methods.method import Method, adapters, attach, owner, parts_of
from ..methods.partition import combine, leaves, partition, trainable_mask
from ..methods.report import parameter_report
from ..methods.switch import set_adapter
from ..models.names import variables
from ..train.state import TrainState, with_leaves
from ..train.step import make_train_step

Batch = Mapping[str, Any]


def token_batch(vocabulary: int = 64, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, jax.Array]:
    """Return a batch of random tokens, padded right in one row and left in another, the prompt part not trained."""
    ids = np.random.default_rng(seed).integers(1, vocabulary, (rows, length))
    mask = np.ones_like(ids)
    mask[1, length - 4 :], mask[2, :3] = 0, 0
    labels = np.where(mask == 1, ids, IGNORED)
    labels[:, :2] = IGNORED
    return {k: jnp.asarray(v, jnp.int32) for k, v in (("input_ids", ids), ("labels", labels), ("attention_mask", mask))}


def values(tree: Any) -> dict[str, np.ndarray[Any, Any]]:
    """Return a copy on the host of every array of a tree, by path."""
    return {f"{path}.{n}": np.array(x) for path, v in leaves(tree).items() for n, x in enumerate(jax.tree.leaves(v))}


@partial(jax.jit, static_argnums=0)
def summed_loss(loss: Any, model: Any, batch: Batch) -> jax.Array:
    """Return the loss of a model without dropout, summed over what is trained."""
    return loss(model, batch, key=None)[0]


def gradients(state: TrainState, batch: Batch, loss: Any) -> dict[str, jax.Array]:
    """Return the gradient of the summed loss in every trained leaf, by path."""
    return _gradients(loss, leaves(state.trainable), state.trainable, state.frozen, batch)


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=1)
def _gradients(loss: Any, params: dict[str, jax.Array], trainable: Any, frozen: Any, batch: Batch) -> jax.Array:
    return loss(combine(with_leaves(trainable, params), frozen), batch, key=None)[0]


step_of = cache(make_train_step)
TX = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))  # made once: a step is compiled for each


def law_partition(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """The two parts are disjoint and complete, `combine` is their inverse, and the mask says the same."""
    del batch, loss
    attached = attach(model, method)
    trainable, frozen = partition(attached, method)
    mask = variables(trainable_mask(attached, method))
    a, b, whole = leaves(trainable), leaves(frozen), leaves(combine(trainable, frozen))
    assert a, "nothing is trained"
    assert not set(a) & set(b), f"in both parts: {sorted(set(a) & set(b))}"
    assert set(a) | set(b) == set(whole) == set(leaves(attached)), "a leaf is in neither part"
    assert {path for path, v in mask.items() if all(jax.tree.leaves(v.get_value()))} == set(a), "the mask differs"
    for path, value in leaves(attached).items():
        pairs = zip(jax.tree.leaves(whole[path]), jax.tree.leaves(value), strict=True)
        assert all(one is other for one, other in pairs), f"{path} is not the model's own array"


def law_step_0(method: Method, model: Any, batch: Batch, loss: Any, identity: bool = True, **_: Any) -> None:
    """Before training the method is the base exactly, if it says so, and else it is not."""
    state = TrainState.create(model, method, TX)
    plain, adapted = (float(summed_loss(loss, m, batch)) for m in (model, state.model))
    assert (plain == adapted) is identity, f"loss {plain} of the base, {adapted} with the method at step 0"


def law_frozen(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """Training changes neither the frozen part nor the model that the caller holds, in a single bit."""
    before = values(model)
    state = TrainState.create(model, method, TX)
    frozen, start = values(state.frozen), values(state.trainable)
    step = step_of(loss)
    for _step in range(2):
        state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 0, "the steps were skipped"
    assert any((start[path] != v).any() for path, v in values(state.trainable).items()), "nothing was trained"
    for name, was, now in (
        ("the caller's", before, values(model)),
        ("the frozen part's", frozen, values(state.frozen)),
    ):
        assert was.keys() == now.keys()
        for path in was:
            assert np.array_equal(was[path], now[path]), f"{name} {path} changed"


def law_gradients(method: Method, model: Any, batch: Batch, loss: Any, null: tuple[str, ...] = (), **_: Any) -> None:
    """Every trained leaf, in every layer, has a gradient by step 2, but for the null directions that are declared."""
    state = TrainState.create(model, method, TX)
    first = gradients(state, batch, loss)
    state, _ = step_of(loss)(state, batch)
    second = gradients(state, batch, loss)
    dead = []
    for path in first:
        moved = (first[path] != 0) | (second[path] != 0)
        axes = variables(state.trainable)[path].get_metadata().get("axes") or ()
        per_layer = moved.reshape(moved.shape[0], -1).any(1) if axes[:1] == ("layers",) else moved.any()
        if not bool(per_layer.all()) and not any(fnmatchcase(path, pattern) for pattern in null):
            dead.append(path)
    assert not dead, f"no gradient by step 2 in {dead}"


def law_differentiated(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """No frozen leaf is differentiated: the jaxpr of the gradient has no product of the shape of a frozen kernel."""
    state = TrainState.create(model, method, TX)

    def total(params: dict[str, jax.Array]) -> jax.Array:
        return loss(combine(with_leaves(state.trainable, params), state.frozen), batch, key=None)[0]

    params = leaves(state.trainable)
    jaxpr = jax.make_jaxpr(jax.grad(total))(params)
    assert len(jaxpr.out_avals) == len(params), "more or fewer gradients than trained leaves"
    trained = {v.shape[-2:] for v in params.values()}
    frozen = {v.shape[-2:] for path, v in leaves(state.frozen).items() if path.endswith(".kernel")}
    suspicious = {shape for s in frozen for shape in (s, s[::-1])} - {shape for s in trained for shape in (s, s[::-1])}
    found = [shape for shape in _products(jaxpr.jaxpr) if shape in suspicious]
    assert not found, f"products of the shapes of frozen kernels: {found}"


def _products(jaxpr: Any) -> list[tuple[int, ...]]:
    shapes = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shapes.append(tuple(eqn.outvars[0].aval.shape))
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                shapes += _products(inner)
    return shapes


def law_count(method: Method, model: Any, batch: Batch, loss: Any, count: int | None = None, **_: Any) -> None:
    """The number of trained parameters is the closed formula's; without one, what the trained part holds."""
    del batch, loss
    report = parameter_report(model, method)
    held = sum(v.size for v in leaves(partition(model, method)[0]).values())
    assert 0 < report.trainable <= held, f"{report.trainable} reported, the part holds {held}"
    assert count is None or report.trainable == count, f"{report.trainable} trained, the formula says {count}"
    assert sum(report.modules.values()) == report.trainable, "the modules do not add up"


def law_saved(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """Saved and loaded again, the adapter is the same, bit for bit."""
    if not all(type(part) in {**METHODS, **ADDED}.values() and not isinstance(part, Full) for part in parts_of(method)):
        return  # a whole model is written by save_model, and a folder can only name what METHODS does
    state = TrainState.create(model, method, TX)
    state, _ = step_of(loss)(state, batch)
    with tempfile.TemporaryDirectory() as folder:
        again = load_adapter(model, save_adapter(state, folder))
        twice = tempfile.mkdtemp(dir=folder)
        if adapters(again):
            first, second = save_adapter(state, folder), save_adapter(again, twice)
            [weights] = [file.name for file in first.glob("*.safetensors")]
            assert (first / weights).read_bytes() == (second / weights).read_bytes(), "the files differ"
    assert float(summed_loss(loss, again, batch)) == float(summed_loss(loss, state.model, batch)), "the loss differs"


def law_off(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """With its weight at 0 a trained adapter is not there: the base's loss, exactly."""
    state = TrainState.create(model, method, TX)
    if not adapters(state.frozen) or any(owner(path) is None for path in leaves(state.trainable)):
        return  # it trains the base itself
    state, _ = step_of(loss)(state, batch)
    off = set_adapter(state.model, None)
    assert float(summed_loss(loss, off, batch)) == float(summed_loss(loss, model, batch))


def law_padding(method: Method, model: Any, batch: Batch, loss: Any, **_: Any) -> None:
    """What stands in padding changes nothing, neither loss nor gradient."""
    if "attention_mask" not in batch:
        return
    junk = {**batch, "input_ids": jnp.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    state = TrainState.create(model, method, TX)
    assert float(summed_loss(loss, state.model, batch)) == float(summed_loss(loss, state.model, junk))
    clean, dirty = gradients(state, batch, loss), gradients(state, junk, loss)
    for path in clean:
        np.testing.assert_allclose(clean[path], dirty[path], atol=1e-6, rtol=1e-5, err_msg=path)


LAWS: dict[str, Callable[..., None]] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}


def check_method(
    method: Method,
    model: Any,
    batch: Batch | None = None,
    *,
    loss: Any = next_token_loss,
    identity: bool = True,
    count: int | None = None,
    null: tuple[str, ...] = (),
) -> None:
    """Hold a method to the laws.

    Args:
        method: The method.
        model: A small model to try it on; it is not changed.
        batch: A batch for the loss; by default random tokens with padding. The number of its tokens, rows x length, is
            to be no width of a frozen kernel, or products with that kernel look like its gradient.
        loss: A model loss.
        identity: Whether the method, at step 0, is the base exactly.
        count: Trained parameters by the method's closed formula.
        null: Globs of trained leaves that may have no gradient.

    Raises:
        AssertionError: A law does not hold; the message names it.

    >>> import jaxft
    >>> jaxft.testing.check_method(jaxft.LoRA(r=2), jaxft.testing.tiny_llama(), count=448)
    """
    batch = token_batch(model.config.vocab_size) if batch is None else batch
    for name, law in LAWS.items():
        try:
            law(method, model, batch, loss, identity=identity, count=count, null=null)
        except AssertionError as broken:
            raise AssertionError(f"law `{name}` ({law.__doc__}) is broken by {method}: {broken}") from broken

"""A checkpoint that was damaged is noticed, named and passed over; one that does not fit is refused, leaf by leaf."""

import functools
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft.data import collate
from jaxft.data.tokens import example
from jaxft.errors import CheckpointError, RunError
from jaxft.losses import next_token_loss
from jaxft.methods.partition import leaves
from jaxft.train.checkpoint import Checkpoints
from jaxft.train.loop import fit
from jaxft.train.state import with_leaves

# What orbax leaves behind in its threads when it reads a damaged file.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True, scope="module")
def _collected_here():
    """Collect it while the mark above holds: in a later module it would be an error."""
    yield
    gc.collect()


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def delete(file):
    file.unlink()


def make_state(tx=None, r=2, **raw):
    return jaxft.TrainState.create(jaxft.testing.tiny_llama(**raw), jaxft.LoRA(r=r), tx or optax.adamw(0.1), seed=3)


def saved(state):
    return [state.step, leaves(state.trainable), state.opt_state, jax.random.key_data(state.key)]


def same(a, b):
    pairs = zip(jax.tree.leaves(saved(a)), jax.tree.leaves(saved(b)), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


fresh = functools.cache(make_state)


@functools.cache
def at(step):
    """Return a state that no other step has."""
    state = fresh()
    moved = jax.tree.map(lambda x: x + step, state.trainable)
    return state.replace(step=jnp.int32(step), trainable=moved)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Two checkpoints."""
    folder = tmp_path_factory.mktemp("good")
    with Checkpoints(folder) as checkpoints:
        for step in (1, 2):
            checkpoints.save(at(step))
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A copy of them."""
    shutil.copytree(good, tmp_path / "c")
    return tmp_path / "c"


def restored(folder):
    said = []
    with Checkpoints(folder, say=said.append) as checkpoints:
        return checkpoints.restore(fresh()), said


@pytest.mark.parametrize("how", [flip, truncate, empty, delete])
def test_every_file_damaged(good, tmp_path, how):
    """Either it does no harm to the bits, or the step is named and the one before it used."""
    files = sorted(p.relative_to(good) for p in (good / "2").rglob("*") if p.is_file())
    cases, noticed = 0, set()
    for n, file in enumerate(files):
        shutil.copytree(good, tmp_path / str(n))
        how(tmp_path / str(n) / file)
        state, said = restored(tmp_path / str(n))
        assert same(state, at(1 if said else 2)), file
        cases += 1
        if said:
            assert len(said) == 1
            assert f"{n}/2 is damaged (" in said[0] and said[0].endswith(": passed over, now damaged-2")
            noticed.add(str(file.relative_to("2").parent))
    assert cases == len(files) > 10  # more than forty in all
    assert {"record", "state", "state/d"} <= noticed  # files whose loss does no harm are among the others


def test_values_that_orbax_reads_without_a_word(folder):
    """Another step's arrays in the place of this one's: only the digests tell."""
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    state, said = restored(folder)
    assert same(state, at(1))
    assert "leaves are not what was saved, step the first" in said[0]


def test_one_bit_of_one_leaf(folder):
    """As above, and all but one leaf are what they should be."""
    state = at(2)
    path = next(iter(leaves(state.trainable)))
    bits = np.asarray(leaves(state.trainable)[path]).copy()
    bits.view(np.uint32).flat[5] ^= 1
    shutil.rmtree(folder / "2")
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state.replace(trainable=with_leaves(state.trainable, {path: jnp.array(bits)})))
        other = folder.parent / "other"
    with Checkpoints(other) as checkpoints:
        checkpoints.save(at(2))
    shutil.rmtree(folder / "2" / "record")
    shutil.copytree(other / "2" / "record", folder / "2" / "record")
    _, said = restored(folder)
    assert f"(1 of 15 leaves are not what was saved, trainable.{path} the first)" in said[0]


def test_a_list_of_leaves_that_was_altered(folder):
    """It reads well and names another leaf: no other model's checkpoint, but a damaged one."""
    file = folder / "2" / "record" / "metadata"
    text = file.read_text()
    assert "q_proj" in text
    file.write_text(text.replace("q_proj", "q_prjo"))
    state, said = restored(folder)
    assert same(state, at(1))
    assert "its list of leaves was altered" in said[0]


def test_stray_folders_are_passed_over(folder):
    (folder / "9").mkdir()
    shutil.copytree(folder / "1", folder / "7")  # another step under this name
    (folder / "notes").mkdir()
    state, said = restored(folder)
    assert same(state, at(2))
    assert [line.split(" is damaged")[0].rsplit("/", 1)[1] for line in said] == ["9", "7"]
    assert "(it holds step 1)" in said[1]
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "damaged-7", "damaged-9", "notes"]
    assert restored(folder)[1] == []


def test_none_is_whole(folder):
    for step in ("1", "2"):
        (folder / step / "record" / "metadata").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint is damaged, so the run cannot go on") as told:
        restored(folder)
    assert "\n  - 2: " in str(told.value) and "\n  - 1: " in str(told.value)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


def test_the_last_good_one_is_kept(folder):
    """Of two that are kept the newest is damaged: it does not count as one."""
    flip(folder / "2" / "record" / "metadata")
    with Checkpoints(folder, keep=2, say=lambda _: None) as checkpoints:
        state = checkpoints.restore(fresh())
        assert int(state.step) == 1
        checkpoints.save(at(2))
        assert checkpoints.steps == [1, 2]
        checkpoints.save(at(3))
        assert checkpoints.steps == [2, 3]
    assert same(restored(folder)[0], at(3))


def test_what_is_not_written_as_it_should_be_ends_the_run(folder, monkeypatch):
    """It is read back before an older one makes room."""
    import orbax.checkpoint as ocp

    save = ocp.Checkpointer.save

    def spoiled(self, where, **options):
        save(self, where, **options)
        next((where / "state" / "d").iterdir()).write_bytes(b"")

    monkeypatch.setattr(ocp.Checkpointer, "save", spoiled)
    with Checkpoints(folder, keep=1) as checkpoints:
        checkpoints.restore(fresh())
        with pytest.raises(RunError, match=r"checkpoint of step 3 cannot be written (.|\n)* good one is of step 2"):
            checkpoints.save(at(3))
        assert checkpoints.steps == [1, 2, 3]
    assert same(restored(folder)[0], at(2))


def test_an_interrupted_write_leaves_nothing(folder, monkeypatch):
    import orbax.checkpoint as ocp

    def interrupted(self, where, **options):
        where.with_name(f"{where.name}.orbax-checkpoint-tmp").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    with Checkpoints(folder) as checkpoints, pytest.raises(KeyboardInterrupt):
        checkpoints.save(at(3))
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize(
    ("other", "lines"),
    [
        (lambda: make_state(r=3), ["trainable.{q}.a is (2, 32, 2) there, (2, 32, 3) here"]),
        (lambda: make_state(num_hidden_layers=3), ["trainable.{q}.a is (2, 32, 2) there, (3, 32, 2) here"]),
        (lambda: make_state(optax.sgd(0.1)), ["opt_state.0.mu.{q}.a is in it, and is not wanted here"]),
        (
            lambda: make_state(optax.adamw(0.1, mu_dtype="bfloat16")),
            ["opt_state.0.mu.{q}.a is float32 there, bfloat16"],
        ),
        (lambda: make_state(optax.adamw(optax.constant_schedule(0.1))), ["opt_state.2.count is not in it"]),
    ],
)
def test_a_checkpoint_that_does_not_fit(folder, other, lines):
    """Every leaf is named, and no older checkpoint is tried."""
    wanted = other()
    with Checkpoints(folder) as checkpoints, pytest.raises(CheckpointError, match="/c/2: it is not of this") as told:
        checkpoints.restore(wanted)
    q = "model.layers.self_attn.q_proj.delta.default"
    assert all(line.format(q=q) in str(told.value) for line in lines)
    there, here = ({p: (x.shape, str(x.dtype)) for p, x in _named(s).items()} for s in (at(2), wanted))
    differ = {name for name in {*there, *here} if there.get(name) != here.get(name)}
    assert len(differ) == len(str(told.value).splitlines()) - 1
    assert all(f"- {name} " in str(told.value) for name in differ)


def _named(state):
    tree = {"step": state.step, "trainable": leaves(state.trainable), "opt_state": state.opt_state}
    tree["key"] = jax.random.key_data(state.key)
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def test_what_is_not_finite_is_never_on_the_disk(tmp_path):
    """The gradient of the second and the last step is not a number: those saved then are of the step before."""
    rows = [collate([example([i + 1, 7, 7], [False, True, True])] * 2) for i in range(4)]
    poison = [1.0, np.nan, 1.0, np.inf]

    def loss(model, batch, *, key):
        total, weight, extra = next_token_loss(model, {k: v for k, v in batch.items() if k != "poison"}, key=key)
        return total * batch["poison"][0], weight, extra

    batches = [{**row, "poison": np.full(2, p, np.float32)} for row, p in zip(rows, poison, strict=True)]
    with Checkpoints(tmp_path, keep=4) as checkpoints:
        fit(make_state(), jaxft.make_train_step(loss), iter(batches), steps=4, hooks={checkpoints.save: 1})
    found = {}
    for step in (4, 3, 2, 1):
        found[step] = restored(tmp_path)[0]
        shutil.rmtree(tmp_path / str(step))
        assert int(found[step].step) == step
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(found[step])))
    trained = {
        step: np.concatenate([x.ravel() for x in jax.tree.leaves(state.trainable)]) for step, state in found.items()
    }
    assert np.array_equal(trained[1], trained[2]) and np.array_equal(trained[3], trained[4])
    assert not np.array_equal(trained[2], trained[3])

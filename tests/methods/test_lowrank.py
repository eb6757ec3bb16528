"""IA3, DoRA, PiSSA, LoRA on embeddings and trainable token rows: laws, formulas, merging, what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxft
from jaxft.models.hub import fresh_model
from jaxft.models.layers import dropout
from jaxft.models.names import variables
from jaxft.models.placement import place
from jaxft.models.seams import Context
from jaxft.testing import check_method, tiny_gpt2, tiny_llama, tiny_model, token_batch

IDS = token_batch()["input_ids"]
EMBEDDING_AND_ROWS = jaxft.LoRA(r=2, target_modules=("wte",), trainable_tokens={"wpe": (3, 1)})
LAWS = {  # method, model, trained parameters by the closed formula
    "ia3-llama": (jaxft.IA3(), tiny_llama, 2 * (16 + 16 + 48)),
    "ia3-gpt2": (jaxft.IA3(r".*h\.1\.(attn\.c_attn|mlp\.c_proj)"), tiny_gpt2, 3 * 32 + 4 * 32),
    "dora-llama": (jaxft.LoRA(r=2, use_dora=True), tiny_llama, 448 + 2 * (32 + 16)),
    "dora-gpt2": (jaxft.LoRA(r=2, use_dora=True), tiny_gpt2, 2 * (2 * (32 + 96) + 96)),
    "pissa-llama": (jaxft.LoRA(r=2, init="pissa"), tiny_llama, 448),
    "pissa-gpt2": (jaxft.LoRA(r=2, init="pissa", rank_pattern={"h.1.attn.c_attn": 1}), tiny_gpt2, 3 * (32 + 96)),
    "rows-llama": (
        jaxft.LoRA(r=2, trainable_tokens=(7, 3, 20)),
        lambda: tiny_llama(tie_word_embeddings=True),
        448 + 3 * 32,
    ),
    "embedding-and-rows-gpt2": (EMBEDDING_AND_ROWS, tiny_gpt2, 2 * (64 + 32) + 2 * 32),
}


@pytest.mark.parametrize("case", LAWS)
def test_laws(case):
    method, make, count = LAWS[case]
    check_method(method, make(), count=count)


def moved(model, method, name="default", by=0.1):
    """The model with the adapter attached, its trained leaves moved away from where they begin."""
    attached = jaxft.attach(model, method, name=name)
    trained = set(jaxft.leaves(jaxft.partition(attached, method, name=name)[0]))
    for i, (path, variable) in enumerate(sorted(variables(attached).items())):
        if path in trained:
            value = variable.get_value()
            variable.set_value(value + by * jax.random.normal(jax.random.key(i), value.shape))
    return attached


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)


EVERY = {  # on a Llama with a tied head: a method, and leaves that weight decay leaves alone
    "ia3": (jaxft.IA3(), {"scale"}),
    "dora": (jaxft.LoRA(r=2, use_dora=True, target_modules=("lm_head", "q_proj")), {"magnitude"}),
    "pissa": (jaxft.LoRA(r=2, init="pissa", target_modules=("lm_head", "down_proj")), set()),
    "embedding": (jaxft.LoRA(r=2, target_modules=("embed_tokens", "lm_head")), set()),
    "rows": (jaxft.LoRA(r=2, trainable_tokens=(5, 3)), {"rows"}),
}


@pytest.mark.parametrize("case", EVERY)
def test_each(case):
    """Half of an adapter, a row each, merged, abstract, and what decay leaves alone."""
    method, spared = EVERY[case]
    base = tiny_llama(tie_word_embeddings=True)
    model = moved(base, method)
    paths = jaxft.leaves(jaxft.partition(model, method)[0])
    mask = jaxft.decay_mask(paths)
    assert {path.rsplit(".", 1)[-1] for path in paths if not mask[path]} == spared
    shapes = jax.eval_shape(lambda m: m, base)
    assert jaxft.parameter_report(shapes, method).trainable == jaxft.parameter_report(base, method).trainable
    whole, none = model(IDS), base(IDS)
    assert float(jnp.abs(whole - none).max()) > 1e-2
    rows = jaxft.set_adapter(model, [[1.0], [0.0], [0.5]])(IDS)
    close(rows[0], whole[0])
    assert jnp.array_equal(rows[1], none[1])
    half = jaxft.set_adapter(model, {"default": 0.5})
    close(half(IDS)[2], rows[2])
    merged = jaxft.merge(half)
    close(merged(IDS), half(IDS))
    untied = case in ("dora", "pissa", "embedding")
    assert (merged.lm_head.kernel is None) is not untied
    assert merged.config.tie_word_embeddings is not untied
    table = merged.model.embed_tokens.embedding.get_value()
    same = bool((table == base.model.embed_tokens.embedding.get_value()).all())
    assert same is (case not in ("embedding", "rows"))


def test_a_head_is_untied_when_its_table_alone_is_adapted():
    """The head goes on calling the base's table, as before the merge; token rows are the head's too."""
    base = tiny_llama(tie_word_embeddings=True)
    model = moved(base, jaxft.LoRA(r=2, target_modules=("embed_tokens",)), "a")
    both = moved(model, jaxft.LoRA(r=2, target_modules=("q_proj",), trainable_tokens=(9,)), "b")
    merged, own = jaxft.merge(both), jaxft.merge(model).lm_head.kernel
    assert jnp.array_equal(own.get_value(), base.tied_kernel())
    close(merged(IDS), both(IDS))
    head = merged.lm_head.kernel.get_value() - base.tied_kernel()
    assert bool((head[:, 9] != 0).all()) and not bool(head.at[:, 9].set(0).any())


def test_taken_out_again():
    """IA3 beside LoRA, biases too; where the base's values are gone it is refused by name."""
    base = tiny_gpt2()
    base.transformer.h.attn.c_attn.bias.set_value(jnp.ones((2, 96)))
    method = jaxft.IA3() | jaxft.LoRA(r=2, target_modules=("c_fc",))
    model = moved(base, method)
    merged = jaxft.merge(model)
    close(merged(IDS), model(IDS))
    carrying = moved(merged, method)  # the same values: what was drawn goes by the leaves' names
    again = jaxft.unmerge(carrying)
    for path, value in jaxft.leaves(base).items():
        close(jaxft.leaves(again)[path], value, 1e-6)
    zero = jaxft.attach(base, jaxft.IA3())
    scale = zero.transformer.h.attn.c_attn.delta.default.scale
    scale.set_value(scale.get_value().at[0, 3].set(0))
    with pytest.raises(jaxft.MethodError, match="c_attn was scaled by 0"):
        jaxft.unmerge(zero)
    for kind, options in {
        "DoRA": {"use_dora": True},
        "PiSSA": {"init": "pissa"},
        "TokenRows": {"trainable_tokens": (1,)},
    }.items():
        with pytest.raises(jaxft.MethodError, match=f"what a {kind} was merged into cannot be had back"):
            jaxft.unmerge(jaxft.attach(base, jaxft.LoRA(r=2, **options)))


def test_the_norm_of_dora():
    """Found from narrow products, it is the norm of W + s A B; with dropout W reads what A reads."""
    base = tiny_llama()
    options = {"r": 4, "alpha": 8, "rank_pattern": {"layers.1.*": 2}, "target_modules": ("up_proj",)}
    method = jaxft.LoRA(use_dora=True, dropout=0.5, **options)
    delta = moved(base, method).model.layers.mlp.up_proj.delta.default
    kernel = base.model.layers.mlp.up_proj.kernel.get_value()
    a, b, gate = delta.factors()
    v = kernel + jnp.matmul(a * gate[:, None], b, precision="highest")
    close(delta.full_norm(kernel), jnp.linalg.norm(v, axis=1), 1e-6)
    one, w = jax.tree.map(lambda x: x[1], delta), kernel[1]
    x, key = jax.random.normal(jax.random.key(1), (2, 3, 32)), jax.random.key(2)
    ctx = Context(key=key, weights=jnp.ones(1), names=("default",))
    linear = jax.tree.map(lambda x: x[1], base.model.layers.mlp.up_proj)
    got = one(linear, x, x @ w, ctx, jnp.float32(1))
    dropped = dropout(x, 0.5, jax.random.fold_in(key, delta.number))
    m, n = delta.magnitude.get_value()[1], jnp.linalg.norm(v[1], axis=0)
    close(got, dropped @ v[1] * (m / n)[None, None] - dropped @ w, 1e-5)


def test_pissa_begins_as_the_principal_part():
    """s A0 B0 is the best approximation of the kernel, of each layer's own rank and scale."""
    base = tiny_gpt2()
    method = jaxft.LoRA(
        r=3, alpha=6, init="pissa", use_rslora=True, rank_pattern={"h.1.*": 2}, target_modules=("c_fc",)
    )
    delta = jaxft.attach(base, method).transformer.h.mlp.c_fc.delta.default
    kernel = base.transformer.h.mlp.c_fc.kernel.get_value()
    for layer, r in enumerate((3, 2)):
        u, s, v = np.linalg.svd(np.asarray(kernel[layer], np.float64), full_matrices=False)
        a, b = delta.a0.get_value()[layer], delta.b0.get_value()[layer]
        assert not a[:, r:].any() and not b[r:].any()
        close(6 / r**0.5 * a @ b, (u[:, :r] * s[:r]) @ v[:r])
        close(jnp.linalg.norm(a[:, 0]), jnp.linalg.norm(b[0]))


@pytest.mark.slow
def test_eight_devices_are_one():
    """Everything at once on a mesh: loss and gradients of one device."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True}
    method = jaxft.LoRA(r=2, use_dora=True, target_modules=("q_proj", "lm_head"))
    method = (
        method | jaxft.LoRA(r=2, target_modules=("embed_tokens",)) | jaxft.IA3(target_modules=("v_proj", "down_proj"))
    )
    method = method | jaxft.LoRA(r=2, init="pissa", target_modules=("up_proj",))
    mesh = jaxft.make_mesh(data=2, fsdp=2, tensor=2)
    batch = token_batch(rows=4)
    found = []
    for where in (None, mesh):
        model = fresh_model(tiny_llama(**sizes).config.replace(mesh=where))
        model = moved(model, method)
        model = moved(model, jaxft.LoRA(r=2, target_modules=("k_proj",), trainable_tokens=(5, 60)), "rows")
        model = place(model)
        state = jaxft.TrainState.create(model, None, optax.sgd(1.0))
        before = {path: np.asarray(v) for path, v in jaxft.leaves(state.trainable).items()}
        state, metrics = jaxft.make_train_step(jaxft.losses.next_token_loss)(state, batch)
        after = jaxft.leaves(state.trainable)
        found.append((float(metrics["loss"]), {path: before[path] - np.asarray(after[path]) for path in before}))
    (loss, gradients), (meshed, others) = found
    assert abs(loss - meshed) < 1e-5 and len(gradients) == 3 + 3 + 2 + 1 + 1 + 2
    for path in gradients:
        np.testing.assert_allclose(others[path], gradients[path], atol=1e-5, rtol=1e-4, err_msg=path)


@pytest.mark.parametrize(
    ("method", "model", "error", "match"),
    [
        (lambda: jaxft.LoRA(use_dora=True, init="pissa"), None, jaxft.MethodError, "choose one of the two"),
        (
            lambda: jaxft.LoRA(init="pissa", alpha=0),
            None,
            jaxft.MethodError,
            "alpha=0: init='pissa' needs a scale above 0",
        ),
        (lambda: jaxft.LoRA(trainable_tokens=(1, 1)), None, jaxft.MethodError, r"\[1\] stand there more than once"),
        (lambda: jaxft.LoRA(trainable_tokens=(-1,)), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens={"wte": ()}), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens=5), None, jaxft.MethodError, "trainable_tokens=5: give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens=0), None, jaxft.MethodError, "trainable_tokens=0: give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens={"wte": 5}), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens=((1, 2), 3)), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens=(("wte", (1,)), 3)), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.LoRA(trainable_tokens=np.array([0.5])), None, jaxft.MethodError, "give ids of tokens"),
        (lambda: jaxft.IA3(target_modules=()), None, jaxft.MethodError, "name at least one module"),
        (lambda: jaxft.LoRA(trainable_tokens=(64,)), tiny_llama, jaxft.MethodError, "the table has 64 rows"),
        (lambda: jaxft.LoRA(trainable_tokens={"wte": (1,)}), tiny_llama, jaxft.SelectionError, "matches no embedding"),
        (
            lambda: jaxft.LoRA(use_dora=True, target_modules=("embed_tokens",)),
            tiny_llama,
            jaxft.MethodError,
            "use_dora=True is for linear layers; model.embed_tokens is an embedding",
        ),
        (
            lambda: jaxft.LoRA(trainable_tokens=(1,), target_modules=("wte",)),
            tiny_gpt2,
            jaxft.MethodError,
            "claim `delta` of the same module",
        ),
        (
            lambda: jaxft.LoRA(trainable_tokens=(1,), modules_to_save=("lm_head",)),
            tiny_gpt2,
            jaxft.MethodError,
            "leave one of the two out",
        ),
        (lambda: jaxft.LoRA(r=33, target_modules=("embed_tokens",)), tiny_llama, jaxft.MethodError, "at most 32"),
        (lambda: jaxft.IA3(target_modules=("k_prj",)), tiny_llama, jaxft.SelectionError, "nearest: 'k_proj'"),
        (
            lambda: jaxft.IA3(target_modules=("k_proj",), feedforward_modules=("up_proj",)),
            tiny_llama,
            jaxft.SelectionError,
            r"feedforward_modules=\('up_proj',\) is none of the target modules",
        ),
        (
            lambda: jaxft.IA3(feedforward_modules=r".*0\.mlp\.down_proj"),
            tiny_llama,
            jaxft.MethodError,
            "scaled at the input in some layers",
        ),
        (lambda: jaxft.IA3(exclude_modules=".*"), tiny_llama, jaxft.SelectionError, "leaves no module to scale"),
    ],
)
def test_what_cannot_be(method, model, error, match):
    with pytest.raises(error, match=match):  # of some the options alone are wrong
        (lambda method: jaxft.attach(model(), method))(method())


def test_ids_of_any_kind():
    for given in ([1, 2], np.array([1, 2]), [np.int64(1), np.int32(2)], jnp.array([1, 2])):
        assert jaxft.LoRA(trainable_tokens=given) == jaxft.LoRA(trainable_tokens=(1, 2))
        kept = jaxft.PromptTuning(init="text", init_ids=given).init_ids
        assert kept == (1, 2) and {type(i) for i in kept} == {int}
    named = jaxft.LoRA(trainable_tokens={"wpe": np.array([3, 1])})
    assert named.trainable_tokens == (("wpe", (3, 1)),) and hash(named) == hash(named)


def test_a_kernel_under_a_dora_is_not_trained():
    """Its norm, which DoRA divides by, is that of the kernel as it was."""
    dora = jaxft.LoRA(r=2, use_dora=True)
    with pytest.raises(jaxft.MethodError, match=r"a DoRA has the norm: model\.layers\.self_attn\.q_proj\.kernel"):
        jaxft.partition(tiny_llama(), jaxft.Full() | dora)
    with pytest.raises(jaxft.MethodError, match="a DoRA has the norm"):
        jaxft.TrainState.create(jaxft.attach(tiny_llama(), dora), jaxft.Full(), optax.sgd(1.0), name="second")
    jaxft.partition(tiny_llama(), dora | jaxft.BitFit(create=True))


def test_what_an_adapter_is_for_is_told_apart():
    """Leaves of one shape do not make two adapters the same."""
    square = jaxft.attach(tiny_llama(), jaxft.IA3(target_modules=("q_proj",), feedforward_modules=()))
    with pytest.raises(jaxft.MethodError, match="the class Scale, the method's InputScale"):
        jaxft.partition(square, jaxft.IA3(target_modules=("q_proj",), feedforward_modules=("q_proj",)))
    rows = jaxft.attach(tiny_llama(), jaxft.LoRA(r=2, trainable_tokens=(1, 2)))
    with pytest.raises(jaxft.MethodError, match=r"tokens \(1, 2\), the method's \(2, 1\)"):
        jaxft.partition(rows, jaxft.LoRA(r=2, trainable_tokens=(2, 1)))


def test_folders_of_another_base_and_damaged_ones(tmp_path):
    """The first tensor that does not fit is named with both shapes; what is missing or left over too."""
    saved = {}
    for name, method in (("ia3", jaxft.IA3()), ("rows", jaxft.LoRA(r=2, trainable_tokens=(5, 3)))):
        saved[name] = jaxft.save_adapter(jaxft.attach(tiny_llama(), method), tmp_path / name)
    other = tiny_llama(hidden_size=16, intermediate_size=20)
    with pytest.raises(
        jaxft.CheckpointError, match=r"down_proj.ia3_l is \(1, 48\) in the file, \(1, 20\) in this model"
    ):
        jaxft.load_adapter(other, saved["ia3"])
    with pytest.raises(jaxft.CheckpointError, match=r"trainable_tokens_delta is \(2, 32\) in the file, \(2, 16\) in"):
        jaxft.load_adapter(other, saved["rows"])
    file = saved["ia3"] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.mlp.down_proj.ia3_l"
    for damage, match in (
        ({key + "x": tensors[key]}, f"(?s){key} is missing.*{key}x belongs to no module"),
        ({key: np.full_like(tensors[key], np.nan)}, f"{key} has 48 values that are NaN"),
        ({key: tensors[key].T.copy()}, rf"{key} is \(48, 1\) in the file, \(1, 48\) in this model"),
    ):
        save_file({**{k: v for k, v in tensors.items() if k != key}, **damage}, file)
        with pytest.raises(jaxft.CheckpointError, match=match):
            jaxft.load_adapter(tiny_llama(), saved["ia3"])


def test_a_table_that_peft_repeats_must_be_the_base_s(tmp_path):
    base = tiny_llama()
    model = moved(base, jaxft.LoRA(r=2, target_modules=("embed_tokens",)))
    folder = jaxft.save_adapter(model, tmp_path)
    file = folder / "adapter_model.safetensors"
    table = np.asarray(base.model.embed_tokens.embedding.get_value())
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**load_file(file), key: table}, file)
    assert jnp.array_equal(jaxft.load_adapter(base, folder)(IDS), model(IDS))
    save_file({**load_file(file), key: table + 1}, file)
    with pytest.raises(jaxft.CheckpointError, match=f"{key} differs from the base model's tensor"):
        jaxft.load_adapter(base, folder)


def test_defaults_of_the_families():
    """What peft scales: keys and values of Llama and Mistral, queries and values of Qwen and Gemma."""
    for family, names in {"mistral": "kv", "qwen2": "qv", "qwen3": "qv", "gemma2": "qv", "gemma3_text": "qv"}.items():
        model = jax.eval_shape(lambda family=family: tiny_model(family))
        targets = {t.named.path.rsplit(".", 1)[-1]: at_input for t, at_input in jaxft.IA3().targets(model)}
        assert targets == {**{f"{n}_proj": False for n in names}, "down_proj": True}, family


def test_a_union_is_saved_and_comes_back(tmp_path):
    """Compositions are named by jaxft alone, with the same tensors."""
    method = jaxft.LoRA(r=2, trainable_tokens={"embed_tokens": (1, 5)}) | jaxft.IA3(target_modules=("up_proj",))
    base = tiny_llama()
    model = moved(base, method)
    folder = jaxft.save_adapter(model, tmp_path)
    again = jaxft.load_adapter(base, folder)
    assert jaxft.adapters(again) == {"default": method}
    assert jnp.array_equal(again(IDS), model(IDS))
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "JAXFT"


class Own(nnx.Module):
    """A person's own model."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


def test_a_model_of_ones_own():
    """The formulas hold at nnx.Linear too, rows with weights of their own included; IA3 has no default there."""
    base = jax.jit(lambda: Own(nnx.Rngs(0)))()
    x = jax.random.normal(jax.random.key(0), (5, 6))
    with pytest.raises(jaxft.MethodError, match="no default target_modules is known for a Own: name them"):
        jaxft.attach(base, jaxft.IA3())
    scaled = moved(base, jaxft.IA3(target_modules=("first", "last"), feedforward_modules=("last",)))
    out, into = (getattr(scaled, at).delta.default.scale.get_value()[None] for at in ("first", "last"))
    close(scaled(x), base.last(jnp.tanh(base.first(x) * out) * into), 1e-6)
    for method in (jaxft.LoRA(r=2, use_dora=True), jaxft.LoRA(r=2, init="pissa")):
        model = moved(base, method)
        close(jaxft.merge(model)(x), model(x))
        rows = jaxft.set_adapter(model, [[1.0], [0.0], [1.0], [0.0], [1.0]])(x)
        close(rows, jnp.where((jnp.arange(5) % 2 == 0)[:, None], model(x), base(x)))


def test_a_scaled_input_costs_no_product():
    """IA3 multiplies by no kernel twice, forwards or backwards."""
    base = tiny_llama()
    counts = [str(jax.make_jaxpr(lambda m: m(IDS))(m)).count("dot_general") for m in (base, moved(base, jaxft.IA3()))]
    assert counts[0] == counts[1] > 7

"""ViT: what its config and pictures may be, its seams, and the methods on it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jaxft
from jaxft.data import ImageProcessor
from jaxft.models.names import variables
from jaxft.models.vit import ViTConfig
from jaxft.testing import check_method, tiny_vit
from jaxft.testing.tiny import VIT

PIXELS = jax.random.normal(jax.random.key(0), (3, 3, 8, 8))
BATCH = {"pixel_values": PIXELS, "target": jax.random.normal(jax.random.key(1), (3, 32))}


def to_target(model, batch, *, key):
    """The squared distance of the pooled vector, of patches too, from a target."""
    hidden = model.hidden(batch["pixel_values"], key=key).astype(jnp.float32)
    apart = hidden[:, 0] + hidden.mean(1) - batch["target"]
    return jnp.square(apart).sum(), jnp.float32(len(apart)), {}


def test_a_patch_is_a_window_of_the_picture():
    """The projection is the product of each window with the kernel, row by row, as a convolution makes it."""
    projection = tiny_vit(image_size=[8, 12], patch_size=[4, 2], num_channels=1).embeddings.patch_embeddings.projection
    pixels = jax.random.normal(jax.random.key(1), (2, 1, 8, 12))
    kernel = projection.kernel.get_value().transpose(3, 2, 1, 0)  # as on disk: out, channels, height, width
    want = jax.lax.conv_general_dilated(pixels, kernel, (4, 2), "VALID")
    got = projection(pixels, jaxft.models.seams.Context())
    np.testing.assert_allclose(got, want.reshape(2, 32, 12).swapaxes(1, 2), atol=1e-5)


def test_pooling_and_dtypes():
    model = tiny_vit(dtype="bfloat16")
    hidden = model(PIXELS)
    assert hidden.shape == (3, 5, 32) and hidden.dtype == jnp.bfloat16
    pooled = model.pooled(pixel_values=PIXELS)
    assert pooled.dtype == jnp.float32
    np.testing.assert_allclose(pooled, hidden[:, 0].astype(jnp.float32), atol=1e-6)
    model.config = model.config.replace(pooling="mean")
    want = hidden.astype(jnp.float32).mean(1)
    np.testing.assert_allclose(model.pooled(pixel_values=PIXELS), want, atol=1e-6)


def test_dropout_remat_and_layers_one_by_one():
    rates = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.2}
    model, remat = tiny_vit(**rates), tiny_vit(**rates, remat="full")
    one, two = (m(PIXELS, key=jax.random.key(1)) for m in (model, remat))
    np.testing.assert_allclose(one, two, atol=1e-5)
    assert jnp.abs(one - model(PIXELS)).max() > 0.1 and not jnp.array_equal(one, model(PIXELS, key=jax.random.key(2)))
    ctx = model.context(3, mask=jnp.ones((1, 1, 1, 5), bool))
    x = model.embed(PIXELS, ctx)
    for i in range(2):
        x, _ = jax.tree.map(lambda a, i=i: a[i], model.layers)(x, ctx.at_layer(jnp.int32(i)), None)
    np.testing.assert_allclose(model.layernorm(x, ctx), model(PIXELS), atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 3, 8, 12), (3, 1, 8, 8), (3, 8, 8), (3, 8, 8, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(jaxft.BatchError, match=r"this model reads \[B, C, H, W\] = \[B, 3, 8, 8\]; positions are not"):
        tiny_vit()(jnp.zeros(shape))


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ({"image_size": 9}, r"image_size \(9, 9\) does not divide into patches of \(4, 4\)"),
        ({"num_attention_heads": 5}, "hidden_size 32 is no multiple of num_attention_heads 5; give a head_dim"),
        ({"hidden_act": "snake"}, "hidden_act 'snake' is not supported"),
        ({"num_channels": 0}, "num_channels is 0"),
        ({"patch_size": "x"}, "has a value of a wrong kind"),
    ],
)
def test_configs_that_are_refused(raw, match):
    with pytest.raises(jaxft.CheckpointError, match=match):
        ViTConfig.from_raw({**VIT, **raw})


def test_a_folder_and_its_processor(tmp_path):
    model = tiny_vit(head_dim=6, qkv_bias=False)
    processor = ImageProcessor((8, 8), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    again, read = jaxft.load(jaxft.save_model(model, tmp_path, processor))
    assert read == processor
    ours, theirs = jaxft.leaves(model), jaxft.leaves(again)
    assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)
    (tmp_path / "preprocessor_config.json").unlink()
    assert jaxft.load(tmp_path)[1] == ImageProcessor((8, 8))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["ViTModel"]


def test_visual_prompts_are_seen_see_and_are_dropped():
    """As further tokens of the sequence without a position; a row without the adapter is the base's."""
    model = tiny_vit()
    prompted = jaxft.attach(model, jaxft.PromptTuning(num_virtual_tokens=2), seed=3)
    vectors = next(v.get_value() for path, v in variables(prompted).items() if "prompt" in path)
    ctx = model.context(3, mask=jnp.ones((1, 1, 1, 7), bool))
    x = jnp.concatenate([model.embed(PIXELS, ctx), jnp.broadcast_to(vectors, (3, 2, 32))], 1)
    np.testing.assert_allclose(prompted(PIXELS), model.encode(x, ctx)[:, :5], atol=1e-5)
    rows = jaxft.set_adapter(prompted, jnp.array([[1.0], [0.0], [1.0]]))(PIXELS)
    np.testing.assert_allclose(rows, prompted(PIXELS).at[1].set(model(PIXELS)[1]), atol=1e-5)
    with pytest.raises(jaxft.MethodError, match="takes tokens, and this model reads none"):
        jaxft.attach(model, jaxft.PromptTuning(init="text", init_text="a"))


WIDTHS = 2 * 2 * (32 + 32)  # layers, modules of 32 in and out
METHODS = {
    "lora": (jaxft.LoRA(r=3), {"count": 3 * WIDTHS}),
    "ia3": (jaxft.IA3(), {"count": 2 * (32 + 32 + 48)}),
    "adapter": (jaxft.Adapter(kind="houlsby", reduction_factor=8), {}),
    "prefix": (jaxft.PrefixTuning(num_virtual_tokens=2), {"identity": False, "count": 2 * 2 * 2 * 32}),
    "prompt": (jaxft.PromptTuning(num_virtual_tokens=2), {"identity": False, "count": 2 * 32}),
    "bitfit": (jaxft.BitFit(), {"null": ("*.k_proj.bias",)}),
}


slow = {"ia3", "bitfit", "prefix"}  # the same code as on the other encoders


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] if m in slow else []) for m in METHODS])
def test_laws(name):
    method, options = METHODS[name]
    model = tiny_vit()
    model.pooler = None
    check_method(method, model, BATCH, loss=to_target, **options)


def test_names_that_lora_means():
    model = tiny_vit()
    for names, want in (
        (None, {"q_proj", "v_proj"}),
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"}),
    ):
        report = jaxft.parameter_report(model, jaxft.LoRA(r=2, target_modules=names))
        assert {name.rsplit(".", 1)[-1] for name in report.modules} == want
    saved = jaxft.LoRA(r=2, modules_to_save=("projection",))
    state = jaxft.TrainState.create(model, saved, optax.sgd(0.1))
    trained, _ = jaxft.make_train_step(to_target)(state, BATCH)
    assert (
        jnp.abs(trained.model.embed(PIXELS, trained.model.context(3)) - model.embed(PIXELS, model.context(3))).max() > 0
    )
    for off in (None, jnp.zeros((3, 1))):
        assert jnp.array_equal(jaxft.set_adapter(trained.model, off)(PIXELS), model(PIXELS))


def test_a_classifier(tmp_path):
    """Its head reads the class token, is new for other classes, and is then trained whatever the method."""
    jaxft.save_model(tiny_vit(), tmp_path / "plain")
    model, _ = jaxft.load(tmp_path / "plain", labels=("coat", "hat", "shoe"))
    want = model.hidden(PIXELS)[:, 0] @ model.classifier.kernel.get_value()
    np.testing.assert_allclose(model(PIXELS), want, atol=1e-5)
    assert {p.rsplit(".", 1)[0] for p in jaxft.leaves(model) if "pooler" in p} == set()
    report = jaxft.parameter_report(model, jaxft.PromptTuning(num_virtual_tokens=2))
    assert report.trainable == 2 * 32 + 33 * 3
    again, _ = jaxft.load(jaxft.save_model(model, tmp_path / "classifier"))
    assert again.config.labels == ("coat", "hat", "shoe")
    np.testing.assert_array_equal(again(PIXELS), model(PIXELS))
    assert jaxft.load(tmp_path / "classifier", labels=("a", "b"))[0](PIXELS).shape == (3, 2)


def test_on_a_mesh(tmp_path):
    model, pixels = tiny_vit(), jnp.tile(PIXELS, (3, 1, 1, 1))[:8]
    jaxft.save_model(model, tmp_path)
    split, _ = jaxft.load(tmp_path, mesh=jaxft.make_mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(split(pixels), model(pixels), atol=1e-5)
    kernel = split.layers.attention.q_proj.kernel.get_value()
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 16)


def test_a_copy_of_the_patches_is_a_convolution_in_a_file(tmp_path):
    """`(out, channels, height, width)`, as peft writes it."""
    model = jaxft.attach(tiny_vit(), jaxft.LoRA(r=2, modules_to_save=("projection",)))
    copy = model.embeddings.patch_embeddings.projection.saved["default"].kernel
    copy.set_value(jax.random.normal(jax.random.key(0), copy.get_value().shape))
    folder = jaxft.save_adapter(model, tmp_path)
    key = "base_model.model.embeddings.patch_embeddings.projection.weight"
    written = load_file(folder / "adapter_model.safetensors")[key]
    np.testing.assert_array_equal(written, copy.get_value().transpose(3, 2, 1, 0))
    np.testing.assert_array_equal(jaxft.load_adapter(tiny_vit(), folder)(PIXELS), model(PIXELS))

"""jaxft and the PyTorch peers side by side: what one writes the other reads, with the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jaxft

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
peers = pytest.importorskip("peers", reason="needs the [parity] extra")
torch = pytest.importorskip("torch")
peft, transformers = peers.peft, peers.transformers

METHODS = {
    "llama": {
        "all": jaxft.LoRA(r=4, alpha=16, target_modules="all-linear"),
        "rslora": jaxft.LoRA(r=4, alpha=16, target_modules="all-linear", use_rslora=True),
        "patterns": jaxft.LoRA(
            r=4, target_modules=("q_proj", "v_proj"), rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"q_proj": 3}
        ),
        "layers": jaxft.LoRA(r=4, target_modules=("q_proj", "down_proj"), layers=(0,)),
        "regex": jaxft.LoRA(r=4, target_modules=r".*layers\.[01]\.(self_attn\.k_proj|mlp\.up_proj)"),
        "exclude": jaxft.LoRA(r=4, target_modules=("q_proj", "up_proj"), exclude_modules=("layers.0.mlp.up_proj",)),
        "saved": jaxft.LoRA(r=4, modules_to_save=("lm_head", "embed_tokens", "norm")),
        "head": jaxft.LoRA(r=4, target_modules=("lm_head", "v_proj")),
    },
    "llama3-tied": {
        "head": jaxft.LoRA(r=4, target_modules=("lm_head", "v_proj")),
        "saved": jaxft.LoRA(r=4, modules_to_save=("embed_tokens",)),
    },
    "llama-biased": {
        "all": jaxft.LoRA(r=4, bias="all"),
        "only": jaxft.LoRA(r=4, bias="lora_only", layers=1, target_modules=("q_proj",)),
    },
    "gpt2": {
        "default": jaxft.LoRA(),
        "all": jaxft.LoRA(r=4, target_modules="all-linear", bias="all"),
        "only": jaxft.LoRA(r=4, bias="lora_only", modules_to_save=("ln_f",)),
    },
}
CASES = [(base, name) for base, named in METHODS.items() for name in named]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for base in METHODS:
        made[base] = tmp_path_factory.mktemp(base)
        peers.base_model(base).save_pretrained(made[base])
    return made


def inputs():
    return {k: jnp.asarray(v) for k, v in peers.batch().items()}


def compare(ours, theirs, tolerance=1e-5):
    real = peers.batch()["attention_mask"][..., None]
    assert np.abs((np.asarray(ours) - theirs) * real).max() < tolerance


def trained(model, method, steps=2):
    state = jaxft.TrainState.create(model, method, optax.adamw(3e-2), seed=1)
    step = jaxft.make_train_step(jaxft.losses.next_token_loss)
    for _ in range(steps):
        state, _ = step(state, {**inputs(), "labels": inputs()["input_ids"]})
    return state


@pytest.mark.parametrize("base", peers.BASES)
def test_base_both_ways(base, tmp_path):
    """A folder of transformers loads here, and the one written here loads there, with the same logits and tensors."""
    model = peers.base_model(base)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    ours, _ = jaxft.load(tmp_path / "theirs")
    compare(ours(**inputs()), peers.logits(model))
    jaxft.save_model(ours, tmp_path / "ours", shard_bytes=30_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert again.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize(("base", "name"), CASES)
def test_adapter_to_peft(base, name, folders, tmp_path):
    """What jaxft trained and wrote, peft loads: no key missing, none left over, the same logits."""
    model, _ = jaxft.load(folders[base])
    state = trained(model, METHODS[base][name])
    jaxft.save_adapter(state, tmp_path)
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folders[base]), tmp_path)
    written = set(load_file(tmp_path / "adapter_model.safetensors"))
    known = {k for k in peft.get_peft_model_state_dict(theirs) if not k.endswith("base_layer.weight")}
    assert written == known
    compare(state.model(**inputs()), peers.logits(theirs.eval()))
    assert np.abs(np.asarray(state.model(**inputs()) - model(**inputs()))).max() > 1e-2
    theirs.save_pretrained(tmp_path / "back", selected_adapters=["default"])
    back = jaxft.load_adapter(model, tmp_path / "back")
    assert jnp.array_equal(back(**inputs()), jaxft.load_adapter(model, tmp_path)(**inputs()))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_gradients(base, options, folders, tmp_path):
    """The gradients of A and B are the peer's."""
    theirs = peers.adapted(base, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", **options})
    theirs.save_pretrained(tmp_path)
    model = jaxft.load_adapter(jaxft.load(folders[base])[0], tmp_path)
    batch = {k: torch.tensor(v) for k, v in peers.batch().items()}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[2, 4] = -100
    theirs(**batch, labels=labels).loss.backward()
    state = jaxft.TrainState.create(model, None, optax.sgd(1.0))
    before = jaxft.leaves(jax.tree.map(jnp.copy, state.trainable))
    state, _ = jaxft.make_train_step(jaxft.losses.next_token_loss)(
        state, {**inputs(), "labels": jnp.asarray(labels.numpy())}
    )
    after, seen = jaxft.leaves(state.trainable), 0
    stack = "transformer.h" if base == "gpt2" else "model.layers"
    for name, p in theirs.named_parameters():
        if p.grad is None:
            continue
        layer, _, rest = name.removeprefix(f"base_model.model.{stack}.").partition(".")
        module, _, which = rest.partition(".lora_")
        path = f"{stack}.{module}.delta.default.{which[0].lower()}"
        ours = (before[path] - after[path])[int(layer)].T
        np.testing.assert_allclose(ours, p.grad.numpy(), atol=1e-6, rtol=1e-4, err_msg=name)
        seen += 1
    assert seen == 2 * 2 * (7 if base == "llama" else 4)


def test_initial_values_are_drawn_as_the_reference_draws_them():
    """A uniform in +-1/sqrt(in), or N(0, 1/r^2); B zero."""
    wide = {"hidden_size": 256, "intermediate_size": 300, "num_hidden_layers": 2}
    for init, key in (("default", True), ("gaussian", "gaussian")):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(peers.llama(**wide))
        config = peft.LoraConfig(r=8, init_lora_weights=key, target_modules=["q_proj"])
        theirs = torch.stack(
            [m.lora_A["default"].weight for m in peft.get_peft_model(model, config).modules() if hasattr(m, "lora_A")]
        )
        ours = jaxft.attach(jaxft.testing.tiny_llama(**wide), jaxft.LoRA(r=8, init=init, target_modules=("q_proj",)))
        a, b = jaxft.leaves(jaxft.partition(ours, jaxft.LoRA(r=8, init=init, target_modules=("q_proj",)))[0]).values()
        assert not b.any() and a.size == theirs.numel()
        assert abs(float(a.std()) / float(theirs.std()) - 1) < 0.05
        assert abs(float(jnp.abs(a).max()) / float(theirs.abs().max()) - 1) < (0.01 if init == "default" else 0.3)


def test_merge_is_merge_and_unload(folders, tmp_path):
    theirs = peers.adapted("gpt2", {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"})
    theirs.save_pretrained(tmp_path)
    ours = jaxft.merge(jaxft.load_adapter(jaxft.load(folders["gpt2"])[0], tmp_path))
    jaxft.save_model(ours, tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    merged = theirs.merge_and_unload().state_dict()
    assert again.keys() == merged.keys()
    for name, tensor in merged.items():
        np.testing.assert_allclose(again[name], tensor, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("limit", peers.LENGTHS)
def test_packs(limit):
    """Pack by pack and row by row what trl puts together."""
    assert jaxft.data.pack(peers.LENGTHS[limit], limit) == peers.packs(peers.LENGTHS[limit], limit)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_greedy_text(base, folders):
    """Unequal prompts, continued as transformers continues each of them alone."""
    theirs = peers.base_model(base)
    model, _ = jaxft.load(folders[base])
    prompts = [[5, 6, 7, 8, 9], [11], [12, 13, 14]]
    ours = jaxft.generate_ids(model, prompts, max_new_tokens=20, stop_ids=[])
    for prompt, row in zip(prompts, ours, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert row == want[0, len(prompt) :].tolist()

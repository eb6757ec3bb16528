"""The PyTorch side of the comparison: tiny random models, peft adapters on them, and what they compute."""

import json

import numpy as np
import peft
import tokenizers
import torch
import transformers

SHAPE = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 5e5,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def llama(**more):
    base = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.LlamaConfig(
        **{**base, **SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 128, **more}
    )


def gpt2(**more):
    return transformers.GPT2Config(
        **{**SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **NO_DROPOUT, **more}
    )


BASES = {
    "llama": llama,
    "llama3-tied": lambda: llama(rope_parameters=LLAMA3, tie_word_embeddings=True, head_dim=12),
    "llama-biased": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=1),
    "gpt2": gpt2,
    "gpt2-untied": lambda: gpt2(tie_word_embeddings=False, n_inner=48, activation_function="relu"),
}

ADAPTERS = {
    "llama": {
        "all": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True, "target_modules": "all-linear"},
        "default": {"r": 3},
        "patterns": {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 3, "layers.1.self_attn.q_proj": 8, "q_proj": 2},
            "alpha_pattern": {"v_proj": 32},
        },
        "layers": {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "regex": {"r": 4, "target_modules": r".*layers\.[01]\.(self_attn\.k_proj|mlp\.up_proj)"},
        "exclude": {"r": 4, "target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.0\.mlp\..*"},
        "saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
        "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
    },
    "llama3-tied": {
        "all": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        "head": {"r": 4, "target_modules": ["lm_head", "v_proj"]},
        "saved": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "saved-head": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    },
    "llama-biased": {
        "bias-all": {"r": 4, "bias": "all", "target_modules": ["q_proj", "up_proj"]},
        "bias-only": {"r": 4, "bias": "lora_only", "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0]},
    },
    "gpt2": {
        "all": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        "default": {"r": 4},
        "bias-all": {"r": 4, "bias": "all", "target_modules": ["c_attn"]},
        "bias-only": {"r": 4, "bias": "lora_only", "target_modules": ["c_attn", "c_fc"]},
        "saved": {"r": 4, "target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wte"]},
    },
    "gpt2-untied": {"all": {"r": 4, "target_modules": "all-linear"}},
}
CASES = [(base, name) for base, named in ADAPTERS.items() for name in named]


def base_model(name):
    """A tiny model of which every parameter is roughened, biases and norms too."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(BASES[name]())
    roughen(model.parameters(), 0.05)
    return model.float().eval()


def roughen(parameters, by, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.data += by * torch.randn(p.shape, generator=generator)


def adapted(base, options, adapter_name="default", model=None):
    """A peft model whose trained parameters are all moved away from their initial values."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=base.startswith("gpt2"), **options)
    if model is None:
        model = peft.get_peft_model(base_model(base), config, adapter_name=adapter_name)
    else:
        model.add_adapter(adapter_name, config)
    mine = [
        p for n, p in sorted(model.named_parameters()) if f".{adapter_name}." in n or (p.requires_grad and "bias" in n)
    ]
    roughen(mine, 0.1, seed=len(adapter_name))
    return model.eval()


def batch():
    """Three rows: whole, padded right, padded left; the positions count real tokens."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def logits(model, **more):
    with torch.no_grad():
        return model(**{k: torch.tensor(v) for k, v in batch().items()}, **more).logits.numpy()


def ranks_and_scales(model):
    """{module: (rank, scale)} of every adapted module."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.r
    }


def bias_step(model, rate=0.1):
    """BitFit by hand: the names that hold "bias", and one SGD step on them alone."""
    names = [n for n, _ in model.named_parameters() if "bias" in n]
    for n, p in model.named_parameters():
        p.requires_grad_(n in names)
    inputs = {k: torch.tensor(v) for k, v in batch().items()}
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[2, 4] = -100  # transformers would predict this first token from padding
    model(**inputs, labels=labels).loss.backward()
    with torch.no_grad():
        return {n: (p - rate * p.grad).numpy() for n, p in model.named_parameters() if n in names}


LENGTHS = {
    limit: np.random.default_rng(limit).lognormal(np.log(limit / 5), 0.8, 120).astype(int).clip(1, limit).tolist()
    for limit in (16, 60, 257)
}


def packs(lengths, limit):
    """The packs that trl makes: rows whose tokens are their numbers."""
    import datasets
    import trl

    rows = datasets.Dataset.from_dict({"input_ids": [[row] * n for row, n in enumerate(lengths)]})
    packed = trl.pack_dataset(rows, limit, strategy="bfd")
    return [list(dict.fromkeys(ids)) for ids in packed["input_ids"]]


def words(pad="<pad>"):
    """A tokenizer whose tokens are words, w7 token 7; its end token is token 2, and without a pad token pads too."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 64)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": pad, "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def as_json(value):
    return json.dumps(value, indent=1, sort_keys=True)

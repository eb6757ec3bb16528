"""The families as transformers computes them: tiny random models, tied and untied, each longer run than its window."""

import numpy as np
import peers
import torch
import transformers

SHAPE = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
ALTERNATING = ["sliding_attention", "full_attention"]
TWO_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}
CONFIGS = {
    "mistral": lambda raw: transformers.MistralConfig(**raw),
    "qwen2": lambda raw: transformers.Qwen2Config(**raw),
    "qwen3": lambda raw: transformers.Qwen3Config(**raw, head_dim=8),
    "gemma2": lambda raw: transformers.Gemma2Config(**raw, head_dim=6, query_pre_attn_scalar=5),
    "gemma3_text": lambda raw: transformers.Gemma3TextConfig(**raw, head_dim=8, query_pre_attn_scalar=5),
}
CAPS = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0}
CASES = {
    "mistral": {"sliding_window": 5},
    "mistral-full-tied": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2-full-tied": {"use_sliding_window": False, "tie_word_embeddings": True},
    "qwen3": {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "layer_types": ALTERNATING},
    "qwen3-full-tied": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": 5, **CAPS},
    "gemma2-uncapped-untied": {
        **{"sliding_window": 5, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        **{"attention_bias": True, "tie_word_embeddings": False},
    },
    "gemma3_text": {"sliding_window": 5, "layer_types": ALTERNATING, "rope_parameters": TWO_BASES},
    "gemma3_text-untied": {"sliding_window": 5, "final_logit_softcapping": 2.0, "tie_word_embeddings": False},
}


def model(name, **more):
    """A random model, rough enough for scores and logits to reach their caps."""
    torch.manual_seed(0)
    config = CONFIGS[name.partition("-")[0]]({**SHAPE, **CASES[name], **more})
    made = transformers.AutoModelForCausalLM.from_config(config)
    peers.roughen(made.parameters(), 0.3)
    return made.float().eval()


def padded():
    """Three rows: whole, padded right, padded left; the positions count real tokens."""
    ids = np.random.default_rng(0).integers(3, 40, (3, 16))
    mask = np.ones_like(ids)
    mask[1, 11:], mask[2, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def parts():
    """Three rows to be packed into one."""
    return [np.random.default_rng(1).integers(3, 40, n) for n in (9, 3, 12)]


def expected(model):
    """The logits of the padded rows, and of the packed ones, each computed alone."""
    with torch.no_grad():
        rows = model(**{k: torch.tensor(v) for k, v in padded().items()}).logits.numpy()
        alone = [model(input_ids=torch.tensor(part[None])).logits.numpy()[0] for part in parts()]
    return {"padded": rows, "packed": np.concatenate(alone)}

"""IA3, DoRA, PiSSA, LoRA on embeddings and token rows as peft has them: folders, logits, gradients, merged weights."""

import warnings

import peers
import peft
import torch

IA3, LORA = peft.IA3Config, peft.LoraConfig
TOKENS = [60, 3, 5]
DORA = {"r": 4, "lora_alpha": 16, "use_dora": True}
PATTERNS = {
    "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 3, "layers.1.self_attn.q_proj": 8},
    "alpha_pattern": {"v_proj": 32},
}
ADAPTERS = {
    "llama": {
        "ia3": (IA3, {}),
        "ia3-named": (IA3, {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
        "dora": (LORA, {**DORA, "target_modules": "all-linear"}),
        "dora-patterns": (LORA, {**DORA, **PATTERNS, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}),
        "dora-layers": (LORA, {**DORA, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
        "pissa": (
            LORA,
            {"r": 4, "lora_alpha": 16, "init_lora_weights": "pissa", "target_modules": ["q_proj", "down_proj"]},
        ),
        "embedding": (LORA, {"r": 4, "lora_alpha": 16, "target_modules": ["embed_tokens", "q_proj"]}),
        "tokens": (LORA, {"r": 4, "trainable_token_indices": TOKENS}),
    },
    "llama3-tied": {
        "dora-head": (LORA, {**DORA, "target_modules": ["lm_head", "v_proj"]}),
        "embedding": (LORA, {"r": 4, "target_modules": ["embed_tokens"]}),
        "tokens": (LORA, {"r": 4, "trainable_token_indices": TOKENS}),
    },
    "llama-biased": {
        "ia3": (IA3, {"target_modules": ["k_proj", "down_proj", "o_proj"], "feedforward_modules": ["down_proj"]}),
        "dora": (LORA, {**DORA, "target_modules": ["q_proj", "down_proj"]}),
    },
    "gpt2": {
        "ia3": (IA3, {}),
        "dora": (LORA, {**DORA, "target_modules": ["c_attn", "c_fc"]}),
        "pissa": (LORA, {"r": 4, "use_rslora": True, "init_lora_weights": "pissa", "target_modules": ["c_attn"]}),
        "embedding": (LORA, {"r": 4, "target_modules": ["wte", "c_fc"]}),
        "tokens": (LORA, {"r": 4, "trainable_token_indices": {"wte": TOKENS}}),
    },
}
CASES = [(base, name) for base, named in ADAPTERS.items() for name in named]
LIVE_ALONE = {"ia3-named", "dora-layers", ("llama", "dora"), ("llama-biased", "dora"), ("llama", "embedding")}
LIVE_ALONE |= {("llama", "tokens"), ("llama3-tied", "tokens"), ("llama", "pissa"), ("llama-biased", "ia3")}
LIVE_ALONE |= {("gpt2", "embedding")}
KEPT = [case for case in CASES if case not in LIVE_ALONE and case[1] not in LIVE_ALONE]  # as golden files


def adapted(base, name):
    """A peft model whose trained parameters are all moved away from their initial values."""
    kind, options = ADAPTERS[base][name]
    config = kind(task_type="CAUSAL_LM", fan_in_fan_out=base.startswith("gpt2"), **options)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(peers.base_model(base), config)
    peers.roughen([p for _, p in sorted(trained(model).items())], 0.1)
    return model.eval()


def trained(model):
    """{tensor's name in a file: parameter} of what is trained."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {
        n.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector"): p for n, p in named.items()
    }


def labelled():
    batch = {k: torch.tensor(v) for k, v in peers.batch().items()}
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    labels[2, 4] = -100  # transformers would predict this first token from padding
    return {**batch, "labels": labels}


def gradients(model):
    """{tensor's name in a file: its gradient}."""
    model(**labelled()).loss.backward()
    return {n: p.grad.numpy() for n, p in trained(model).items()}


def merged(base, name, model):
    """What peft merges into the last layer, and into the table that is adapted, by name.

    Of a tied table and head it changes both, whichever has the adapter: here, the one that has it.
    """
    last, targets = LAST.get(base, "layers.1."), ADAPTERS[base][name][1].get("target_modules") or ()
    table = "lm_head" if "lm_head" in targets else "wte" if base == "gpt2" else "embed_tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = model.merge_and_unload().state_dict()
    return {n: t.numpy() for n, t in state.items() if last in n or table in n}


LAST = {"gpt2": "h.1."}


def everything(base, name):
    """{what: array} of one case: logits, gradients, merged weights."""
    model = adapted(base, name)
    out = {"logits": peers.logits(model)}
    out |= {f"gradient {n}": g for n, g in gradients(model).items()}
    return out | {f"merged {n}": w for n, w in merged(base, name, model).items()}

"""The PyTorch side of the encoders: tiny random BERTs and RoBERTas, peft's adapters on them, and what they compute."""

import numpy as np
import peers
import peft
import torch
import transformers

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = {0: "bad", 1: "so so", 2: "good"}
KINDS = {
    "bert": (transformers.BertConfig, {"max_position_embeddings": 32}),
    "roberta": (transformers.RobertaConfig, {"max_position_embeddings": 34, "pad_token_id": 1}),
}
CLASSIFIED = {
    "lora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8),
    "dora": lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=8, use_dora=True, target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(task_type="SEQ_CLS"),
    "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    "p_tuning": lambda: peft.PromptEncoderConfig(task_type="SEQ_CLS", num_virtual_tokens=3, encoder_hidden_size=8),
}
PLAIN = {  # on the model without a head; peft's prefixes do not run on the one with a head under transformers 5
    "lora-plain": lambda: peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules="all-linear"),
    "prefix-plain": lambda: peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    "prompt-plain": lambda: peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
}


def config(kind, **more):
    make, own = KINDS[kind]
    return make(**{**SHAPE, **DROPS, **own, "id2label": LABELS, "label2id": {v: k for k, v in LABELS.items()}, **more})


def model(kind, head=True, **more):
    """A random model, rough everywhere."""
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    made = auto.from_config(config(kind, **more))
    peers.roughen([p for _, p in sorted(made.named_parameters())], 0.2)
    return made.float().eval()


def batch(pad=0, left=False):
    """Three rows, one of them padded right, with token types; left: one is padded left, its positions by hand."""
    ids = np.random.default_rng(0).integers(3, 40, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    if left:
        mask[2, :4] = 0
    types = np.zeros_like(ids)
    types[:, 6:] = 1
    return {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": types}


def inputs(kind, **more):
    """The batch as a peer's model takes it: RoBERTa has one type of tokens and an id for padding."""
    found = batch(pad=KINDS[kind][1].get("pad_token_id", 0), **more)
    if kind == "roberta":
        found["token_type_ids"] = np.zeros_like(found["token_type_ids"])
    return {k: torch.tensor(v) for k, v in found.items()}


def computed(made, kind):
    """Logits, or the hidden states of the true tokens."""
    with torch.no_grad():
        out = made(**inputs(kind))
    if hasattr(out, "logits"):
        return out.logits.numpy()
    return out.last_hidden_state[:, -inputs(kind)["input_ids"].shape[1] :].numpy()


def adapted(base, make):
    """A peft model of which everything that is trained has moved."""
    made = peft.get_peft_model(base, make())
    peers.roughen([p for n, p in sorted(made.named_parameters()) if p.requires_grad], 0.2)
    return made.eval()

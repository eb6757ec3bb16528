"""The sentence-transformers side of the comparison: tiny random models in its folders, and the vectors it makes."""

import json
import os

import numpy as np
import peft
import torch
import transformers
from sentence_transformers import SentenceTransformer
from texts import make_tokenizer
from transformers.integrations import peft as integration

integration.check_peft_version = lambda **_: None  # transformers asks for a newer peft than trl allows; this one does
TEXTS = ["the cat sat", "on the mat and there it is", "it", "the end of the cat on the mat, and it is there: the end"]
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {**SHAPE, "vocab_size": 300, "max_position_embeddings": 32}
LLAMA = {**BERT, "num_key_value_heads": 1}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
ROBERTA = {**BERT, "max_position_embeddings": 34, "pad_token_id": 1}
CONFIGS = {"bert": BERT, "roberta": ROBERTA, "llama": LLAMA, "gpt2": GPT2}
LORA = {"bert": ["query", "value"], "roberta": ["query", "value"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def base(kind, folder):
    """Write a random model with a tokenizer, as transformers does."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(kind, **CONFIGS[kind])
    model = transformers.AutoModel.from_config(config)
    for name, p in model.named_parameters():
        if "norm" not in name.lower() and "ln_" not in name:
            p.data = torch.randn_like(p) * 0.2
    model.save_pretrained(folder)
    make_tokenizer(pad_token="</s>", model_max_length=32).save_pretrained(folder)


def folder_of(kind, root, *, mode="mean", normalize=True, length=12, adapter=False):
    """Write the folder of a model as the installed version does; it names an adapter's base as `root/base`."""
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    base(kind, root / "base")
    transformer = Transformer(str(root / "base"), max_seq_length=length)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    model = SentenceTransformer(modules=[transformer, pooling, *([Normalize()] if normalize else [])], device="cpu")
    if adapter:
        model.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=LORA[kind]))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data = torch.randn_like(p) * 0.3
    model.save(str(root / "folder"), create_model_card=False)
    return model


def vectors(folder):
    """Return what sentence-transformers makes of the texts, from a folder."""
    return SentenceTransformer(str(folder), device="cpu").encode(TEXTS).astype(np.float32)


def named(folder):
    """Return the base that an adapter's folder names."""
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""NF4 checkpoints as bitsandbytes and transformers write them, and what they compute: tiny random models on a CPU."""

import numpy as np
import peers
import torch
import transformers

# Kernels of 40.5 and 112.5 blocks are among them; and none whose rows are of a multiple of 16 weights that is none of
# 64: of these bitsandbytes 0.50 computes other values on a CPU than its codes stand for (96 x 32, say: off by 1.6).
LLAMA = {"hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "llama": lambda: transformers.LlamaConfig(**LLAMA, **peers.SHAPE, num_key_value_heads=2),
    "gpt2": lambda: peers.gpt2(n_embd=68, n_inner=100),
}
SHOWN = ("k_proj", "down_proj", "attn.c_proj")
CASES = {
    "double": ("llama", {"bnb_4bit_use_double_quant": True}),
    "single": ("llama", {"bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["lm_head", "o_proj"]}),
    "gpt2": ("gpt2", {"bnb_4bit_use_double_quant": True}),
}


def plain(shape):
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(SHAPES[shape]())
    peers.roughen(made.parameters(), 0.1)
    return made.float().eval()


def quantized(name, folder, **more):
    """Write the plain model to a folder, and read it quantised."""
    shape, options = CASES[name]
    plain(shape).save_pretrained(folder)
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **options, **more}
    config = transformers.BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **options)
    return read(folder, quantization_config=config)


def read(folder, **options):
    kind = transformers.AutoModelForCausalLM
    made = kind.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options).eval()
    for module in made.modules():
        module.support_avx512bf16_for_cpu = (
            False  # else the first call packs the codes otherwise, and needs N % 32 == 0
        )
    return made


def expected(model):
    """The logits, and the values that some of the kernels stand for."""
    import bitsandbytes

    found = {"logits": peers.logits(model)}
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit) and name.endswith(SHOWN):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            found[f"{name}.weight"] = values.float().numpy().astype(np.float32)
    return found

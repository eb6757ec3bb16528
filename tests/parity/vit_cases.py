"""ViTs as transformers computes them: tiny random ones, and its processor of pictures."""

import numpy as np
import peers
import torch
import transformers

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 4}
WIDE = {"head_dim": 6, "qkv_bias": False, "hidden_act": "relu", "num_channels": 1, "layer_norm_eps": 1e-5}
CASES = {
    "plain": (transformers.ViTModel, {"image_size": 8}),  # with its pooler
    "wide": (transformers.ViTModel, {"image_size": [8, 12], **WIDE}),
    "classifier": (transformers.ViTForImageClassification, {"image_size": 12, "num_labels": 3}),
}
PROCESSOR = {"size": {"height": 12, "width": 12}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}


def model(name):
    torch.manual_seed(0)
    kind, raw = CASES[name]
    made = kind(transformers.ViTConfig(**SHAPE, **raw))
    peers.roughen(made.parameters(), 0.2)
    return made.float().eval()


def pixels(config):
    height, width = config.image_size if isinstance(config.image_size, (list, tuple)) else (config.image_size,) * 2
    shape = (3, config.num_channels, height, width)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def expected(made):
    """The hidden states, and what a head makes of them."""
    given = torch.tensor(pixels(made.config))
    with torch.no_grad():
        backbone = made.vit if hasattr(made, "vit") else made
        found = {"pixels": given.numpy(), "hidden": backbone(given).last_hidden_state.numpy()}
        if hasattr(made, "classifier"):
            found["logits"] = made(given).logits.numpy()
    return found


def pictures():
    """Larger, smaller and longer than what they are resized to."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((30, 20), (7, 9), (12, 12), (5, 40))]


def processed(resample=2):
    processor = transformers.ViTImageProcessorPil(**PROCESSOR, resample=resample)
    return processor, processor(pictures(), return_tensors="np").pixel_values

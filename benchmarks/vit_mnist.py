"""A ViT of another layout as a folder, scored on MNIST: vit_mnist.py WEIGHTS.npz t10k-images-idx3-ubyte.gz FOLDER.

The npz names its arrays as `vit-pytorch` names the modules of its `ViT` (one product for queries, keys and values;
patches as rows of pixels). FOLDER then is one like any other: `jaxft.load` reads it, and so does transformers from 5.0,
which takes `head_dim` from a config (its heads are wider than hidden_size / num_attention_heads).
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import jaxft
from jaxft.data import load_images

LAYER = {
    "0.norm": "layernorm_before",
    "0.fn.to_out.0": "attention.output.dense",
    "1.norm": "layernorm_after",
    "1.fn.net.0": "intermediate.dense",
    "1.fn.net.3": "output.dense",
}
PARTS = ("weight", "bias")
WHOLE = {"mlp_head.0": "vit.layernorm", "mlp_head.1": "classifier"}
PROCESSOR = jaxft.data.ImageProcessor((28, 28), 1, (0.1307,), (0.3081,))


def convert(arrays, folder, *, patch, heads, channels, act):
    """Write the arrays as a folder: `config.json`, `model.safetensors`, `preprocessor_config.json`.

    What the shapes do not tell is given: sides of a patch, number of heads, channels, activation.
    """
    width = arrays["cls_token"].shape[-1]
    depth = 1 + max(int(name.split(".")[2]) for name in arrays if name.startswith("transformer.layers."))
    side = round((arrays["pos_embedding"].shape[1] - 1) ** 0.5) * patch
    kernel = arrays["to_patch_embedding.1.weight"].reshape(width, patch, patch, channels)
    tensors = {
        "vit.embeddings.cls_token": arrays["cls_token"],
        "vit.embeddings.position_embeddings": arrays["pos_embedding"],
        "vit.embeddings.patch_embeddings.projection.weight": kernel.transpose(0, 3, 1, 2),
        "vit.embeddings.patch_embeddings.projection.bias": arrays["to_patch_embedding.1.bias"],
    }
    for i in range(depth):
        theirs, ours = f"transformer.layers.{i}.", f"vit.encoder.layer.{i}."
        tensors |= {f"{ours}{new}.{x}": arrays[f"{theirs}{old}.{x}"] for old, new in LAYER.items() for x in PARTS}
        parts = np.split(arrays[f"{theirs}0.fn.to_qkv.weight"], 3)
        names = ("query", "key", "value")
        tensors |= {f"{ours}attention.attention.{n}.weight": part for n, part in zip(names, parts, strict=True)}
    tensors |= {f"{new}.{x}": arrays[f"{old}.{x}"] for old, new in WHOLE.items() for x in PARTS}
    classes = len(arrays["mlp_head.1.bias"])
    config = {
        "architectures": ["ViTForImageClassification"],
        "model_type": "vit",
        "hidden_size": width,
        "intermediate_size": len(arrays["transformer.layers.0.1.fn.net.0.bias"]),
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "head_dim": len(arrays["transformer.layers.0.0.fn.to_qkv.weight"]) // 3 // heads,
        "image_size": side,
        "patch_size": patch,
        "num_channels": channels,
        "qkv_bias": False,
        "layer_norm_eps": 1e-5,
        "hidden_act": act,
        "id2label": {str(i): str(i) for i in range(classes)},
        "label2id": {str(i): i for i in range(classes)},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    PROCESSOR.save_pretrained(folder)


if __name__ == "__main__":
    weights, images, folder = sys.argv[1:]
    with np.load(weights) as file:
        convert({k: file[k] for k in file.files}, Path(folder), patch=4, heads=4, channels=1, act="relu")
    model, processor = jaxft.load(folder)
    data = load_images(images, processor)
    found = np.concatenate(
        [np.argmax(model(data.batch(slice(i, i + 500))["pixel_values"]), -1) for i in range(0, len(data), 500)]
    )
    print(f"{(found == data.labels).mean():.2%} of {len(data)} right")

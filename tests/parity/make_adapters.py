"""Write the golden files of the bottleneck adapters: folders as the adapters library saves them, and what it computes.

It needs an environment of its own (adapters 1.3.0 with transformers 4.57, which cannot stand beside transformers 5),
and the bases that make_golden.py and make_encoders.py have written:

    PYTHON_WITH_ADAPTERS tests/parity/make_adapters.py
"""

import shutil
from pathlib import Path

import adapters
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent / "golden"
OUT = GOLDEN / "adapters"
KINDS = {
    "seq_bn": {"reduction_factor": 4},
    "double_seq_bn": {"reduction_factor": 8},
    "par_bn": {},
    "scaled_par_bn": {"reduction_factor": 4.5, "leave_out": [0]},
}


def roughen(model, name, by=0.2):
    """Move every leaf of an adapter away from its initial value, in the order of the names."""
    generator = torch.Generator().manual_seed(7)
    for key, p in sorted(model.named_parameters()):
        if f".adapters.{name}." in key:
            p.data += by * torch.randn(p.shape, generator=generator)


def batch():
    """The rows of the other golden files: whole, padded right, padded left."""
    ids = np.random.default_rng(0).integers(3, 64, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:], mask[2, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def cotangent(shape):
    """A fixed direction, so that every leaf's gradient is compared and no loss stands between."""
    return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


def run(model):
    """The logits, and the gradient of their product with the direction at real tokens, in every adapter leaf."""
    inputs = {k: torch.tensor(v) for k, v in batch().items()}
    logits = model(**inputs).logits
    real = inputs["attention_mask"][..., None] * torch.tensor(cotangent(logits.shape))
    model.zero_grad()
    (logits * real).sum().backward()
    grads = {f"grad {k}": p.grad.numpy() for k, p in model.named_parameters() if ".adapters." in k}
    return {"logits": logits.detach().numpy(), **grads}


def causal(base):
    for kind, options in KINDS.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(GOLDEN / base / "base").float()
        adapters.init(model)
        model.config.name_or_path = f"tiny-{base}"  # and not where it lies here
        with torch.no_grad():
            plain = model(**{k: torch.tensor(v) for k, v in batch().items()}).logits.numpy()
        real = batch()["attention_mask"][..., None]
        assert np.abs((plain - load_file(GOLDEN / base / "expected.safetensors")["base"]) * real).max() < 1e-5
        name = f"my_{kind}"
        model.add_adapter(name, config=adapters.AdapterConfig.load(kind, **options))
        model.train_adapter(name)
        roughen(model, name)
        folder = OUT / f"{base}-{kind}"
        expected = run(model.eval())
        assert len(expected) == 1 + len([k for k in model.state_dict() if f".adapters.{name}." in k])
        model.save_adapter(str(folder), name, use_safetensors=True, with_head=False)
        save_file(expected, folder / "expected.safetensors")
    if base == "llama":
        model.save_adapter(str(OUT / "with-head"), name, use_safetensors=True)


def bert():
    """One post-norm layer: its input, its weights, and its output under each kind."""
    config = transformers.BertConfig(
        vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    ids, seen, out = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 0, 1, 2]]), {}, {}

    def see(module, inputs, outputs):
        seen["x"], seen["out"] = inputs[0].numpy(), outputs[0].numpy()

    for kind in KINDS:
        torch.manual_seed(0)
        model = transformers.BertModel(config, add_pooling_layer=False).eval()
        generator = torch.Generator().manual_seed(1)
        for p in model.parameters():
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
        adapters.init(model)
        model.add_adapter(kind, config=adapters.AdapterConfig.load(kind, reduction_factor=4))
        model.set_active_adapters(kind)
        roughen(model, kind)
        layer = model.encoder.layer[0]
        layer.register_forward_hook(see)
        with torch.no_grad():
            model(ids)
        out |= {"x": seen["x"], f"{kind} out": seen["out"]}
        for key, p in layer.named_parameters():
            out[f"{kind} {key}" if ".adapters." in key else key] = p.detach().numpy()
    save_file(out, OUT / "bert.safetensors")


def classifier(kind):
    """Every kind of adapter on a classifier of make_encoders.py, its head trained and saved with it."""
    root = GOLDEN / "encoders"
    ids = np.random.default_rng(0).integers(3, 40, (3, 12))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    types = np.zeros_like(ids)
    types[:, 6 if kind == "bert" else 12 :] = 1
    pad = 0 if kind == "bert" else 1
    inputs = {"input_ids": np.where(mask == 1, ids, pad), "attention_mask": mask, "token_type_ids": types}
    for case in ("seq_bn", "double_seq_bn", "par_bn"):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(root / kind / "base").float()
        adapters.init(model)
        model.config.name_or_path = f"tiny-{kind}"
        name, folder = f"my_{case}", root / f"{kind}-{case}"
        shutil.rmtree(folder, ignore_errors=True)
        model.add_adapter(name, config=adapters.AdapterConfig.load(case, reduction_factor=4))
        model.train_adapter(name)
        roughen(model, name)
        for key, p in sorted(model.named_parameters()):
            if key.startswith("classifier."):
                p.data += 0.1
        with torch.no_grad():
            out = model.eval()(**{k: torch.tensor(v) for k, v in inputs.items()}).logits.numpy()
        model.save_adapter(str(folder), name, use_safetensors=True)
        save_file({"out": out}, folder / "expected.safetensors")


if __name__ == "__main__":
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for base in ("llama", "gpt2"):
        causal(base)
    bert()
    for kind in ("bert", "roberta"):
        classifier(kind)

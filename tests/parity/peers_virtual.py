"""peft's prefixes and prompts on tiny random models, and what they compute."""

import numpy as np
import peers
import torch
import virtual
from peers import peft


def adapted(model, case):
    kind, options, _ = virtual.CASES[case]
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)
    model = peft.get_peft_model(model, config).eval()
    peers.roughen(model.prompt_encoder.parameters(), 0.1)
    return model


def logits(model, batch):
    """The logits of real tokens, their positions counted over real tokens whatever the padding.

    peft itself drops the positions that a prompt is given, so it is put together by hand there.
    """
    inputs = {k: torch.tensor(v) for k, v in batch.items()}
    with torch.no_grad():
        if "Prefix" in type(model.active_peft_config).__name__:
            return model(**inputs).logits.numpy()
        rows, n = len(inputs["input_ids"]), model.active_peft_config.num_virtual_tokens
        words = model.word_embeddings(inputs["input_ids"])
        mask = torch.cat([torch.ones(rows, n, dtype=torch.long), inputs["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        both = torch.cat([model.get_prompt(batch_size=rows), words], 1)
        out = model.base_model(inputs_embeds=both, attention_mask=mask, position_ids=positions).logits[:, n:].numpy()
        plain = {k: v[:2] for k, v in inputs.items() if k != "position_ids"}  # not padded left: peft's own way
        np.testing.assert_allclose(
            model(**plain).logits[:, n:].numpy() * mask[:2, n:, None].numpy(),
            out[:2] * mask[:2, n:, None].numpy(),
            atol=1e-6,
        )
        return out


def computed(base, case):
    """Return the peer's model, and by name: logits, loss, gradients, parameters and continuations."""
    batch = virtual.rows()
    with torch.no_grad():
        found = {"base": base(**{k: torch.tensor(v) for k, v in batch.items()}).logits.numpy()}
    model = adapted(base, case)
    found["logits"] = logits(model, batch)
    inputs = {k: torch.tensor(v[:2]) for k, v in batch.items() if k != "position_ids"}
    loss = model(**inputs, labels=torch.tensor(virtual.labels())).loss
    loss.backward()
    found["loss"] = np.float32(loss.item())
    for name, p in model.prompt_encoder["default"].named_parameters():
        found[f"value {name}"], found[f"grad {name}"] = p.detach().numpy(), p.grad.numpy()
    return model, {**found, "new": np.array([greedy(model, prompt) for prompt in virtual.PROMPTS])}


def greedy(model, prompt):
    """Continue one row, each token from a whole forward pass.

    `generate` of peft 0.21.2 looks for `past_key_values` among its arguments, which transformers 5.24 calls `cache`:
    it begins each step without what it has read, and differs from its own forward pass.
    """
    row = list(prompt)
    for _ in range(virtual.NEW):
        ids = torch.tensor([row])
        with torch.no_grad():
            row.append(int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].argmax()))
    return row[len(prompt) :]

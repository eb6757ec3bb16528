"""Every method from a config to a finished run, its folder read again, and what it can be exported as."""

import json

import numpy as np
import pytest
from texts import make_tokenizer

import jaxft

CONFIG = """task: sft
model: {path: base}
method: {name: ia3}
data: {train: rows.jsonl, eval: rows.jsonl, format: prompt_completion, max_length: 32}
optimizer: {learning_rate: 1e-2}
train: {steps: 2, batch_size: 2, log_every: 1}
output: run
"""
METHODS = {  # the method, and the forms that a run of it can be exported as
    "[{name: prefix_tuning, num_virtual_tokens: 3}, {name: adapter, kind: parallel}]": set(),
    "{name: adapter, kind: houlsby, reduction_factor: 4}": {"adapters"},
    "{name: p_tuning_v2, num_virtual_tokens: 3, encoder: mlp}": {"peft"},
    "{name: ia3}": {"peft", "merged"},
    "{name: lora, r: 2, init: pissa, use_rslora: true}": {"peft", "serving", "merged"},
}
QUICK = ("{name: ia3}", "{name: adapter, kind: houlsby, reduction_factor: 4}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    rows = [{"prompt": "the cat", "completion": " sat"}, {"prompt": "on the", "completion": " mat"}]
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (where / "c.yaml").write_text(CONFIG)
    return where


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_a_run_of_each(method, run, place):
    name = f"run{list(METHODS).index(method)}"
    code, _, err = run("train", "c.yaml", "--set", f"method={method}", "--output", name)
    assert code == 0, err
    after = json.loads((place / name / "summary.json").read_text())["after"]
    code, out, _ = run("evaluate", name)
    assert float(out.split("eval_loss ")[1].split()[0]) == pytest.approx(after["eval_loss"], abs=2e-6)
    model, _ = jaxft.load(place / name)
    ids, alone = np.array([[5, 6, 7, 8]]), jaxft.load(place / "base")[0]
    logits = model(ids)
    assert float(np.abs(logits - alone(ids)).max()) > 1e-6
    forms = METHODS[method]
    for form in ("peft", "adapters", "serving", "merged"):
        out = f"out/{name}-{form}"
        code, _, err = run("export", name, "--format", form, "--output", out)
        assert code == (0 if form in forms else 2), (form, err)
        if code == 0:
            again = jaxft.load(out)[0] if form == "merged" else jaxft.load_adapter(alone, out)
            np.testing.assert_allclose(again(ids), logits, atol=1e-5)
    assert len(METHODS) == 5

"""A recipe of several runs: what says which one is missing, and which form a later one is asked in."""

import json

import pytest
from texts import make_tokenizer

import jaxft
from jaxft.config import load_config
from jaxft.errors import RunError
from jaxft.tasks.stages import check_stages

METHOD = "method: {name: lora, r: 2}\n"
SFT = f"""task: sft
model: {{path: base}}
{METHOD}data: {{train: rows.jsonl, format: instruction, template: {{prompt_input: "{{instruction}} {{input}}:",
       prompt_no_input: "{{instruction}}:"}}}}
train: {{steps: 1, batch_size: 2}}
output: runs/sft
"""
REWARD = f"""task: reward
model: {{path: runs/sft/}}
{METHOD}data: {{train: pairs.jsonl, format: preference}}
output: ./runs/reward
"""
PPO = f"""task: ppo
model: {{path: runs/sft}}
{METHOD}data: {{train: prompts.jsonl, format: prompt}}
ppo: {{reward: [{{reward: runs/reward}}, {{reward: length}}]}}
output: runs/ppo
"""
DPO = f"""task: dpo
model: {{path: runs/sft}}
{METHOD}data: {{train: pairs.jsonl, format: preference}}
train: {{steps: 1, batch_size: 2}}
output: runs/dpo
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1), where / "base", make_tokenizer())
    jsonl = lambda name, row: (where / name).write_text((json.dumps(row) + "\n") * 2)
    jsonl("rows.jsonl", {"instruction": "the cat", "output": "sat"})
    jsonl("pairs.jsonl", {"prompt": "the cat:", "chosen": "sat", "rejected": "end"})
    (where / "recipe").mkdir()
    for name, text in {"sft": SFT, "reward": REWARD, "ppo": PPO, "dpo": DPO}.items():
        (where / f"recipe/{name}.yaml").write_text(text)
    (where / "recipe/broken.yaml").write_text("output: [")
    return where


def test_each_missing_run_and_what_makes_it(run, place):
    """All at once; one that was stopped is to go on; the path may be written otherwise than there."""
    config = load_config(place / "recipe/ppo.yaml")
    with pytest.raises(RunError) as raised:
        check_stages(config, "recipe/ppo.yaml")
    assert str(raised.value).splitlines()[1:] == [
        "  - model.path: the run runs/sft has not been made yet: jaxft train recipe/sft.yaml",
        "  - ppo.reward: the run runs/reward has not been made yet: jaxft train recipe/reward.yaml",
    ]
    for command in ("train", "validate", "evaluate", "plan"):
        code, _, err = run(command, "recipe/reward.yaml")
        assert code == 2
        assert "the run runs/sft/ has not been made yet: jaxft train recipe/sft.yaml" in err
    (place / "runs/sft").mkdir(parents=True)
    (place / "runs/sft/config.yaml").write_text(SFT)
    code, _, err = run("train", "recipe/reward.yaml")
    assert (code, "has not ended: jaxft train recipe/sft.yaml --resume" in err) == (2, True)
    (place / "runs/sft/config.yaml").unlink()
    (place / "runs/sft").rmdir()


def test_what_no_config_beside_makes_is_looked_for_elsewhere(run, place):
    code, _, err = run("train", "recipe/reward.yaml", "--set", "model.path=runs/other/one")
    assert (code, "runs/other/one: no such folder here" in err) == (2, True)


def test_a_run_of_preferences_is_asked_in_the_form_of_the_supervised_one(run, place):
    assert run("train", "recipe/sft.yaml")[0] == 0
    assert run("train", "recipe/dpo.yaml")[0] == 0
    model, tokenizer = jaxft.load("runs/dpo")
    code, out, err = run("generate", "runs/dpo", "--prompt", "the cat", "--max-new-tokens", 5)
    assert code == 0, err
    assert out == jaxft.generate(model, tokenizer, ["the cat:"], max_new_tokens=5)[0] + "\n"
    assert out != run("generate", "runs/dpo", "--prompt", "the cat", "--max-new-tokens", 5, "--raw")[1]

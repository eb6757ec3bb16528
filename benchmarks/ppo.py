"""Seconds per iteration of PPO (answers, scores, updates), jaxft beside trl 1.12's PPOTrainer, on one device.

    JAX_PLATFORMS=cpu python benchmarks/ppo.py MODEL PROMPTS.jsonl OUT [--rows 64] [--new 48] [--iterations 6]

Needs `pip install torch trl==1.12` beside jaxft (later releases of trl have no PPO). MODEL is the folder of a small
causal language model, PROMPTS.jsonl rows with a `prompt`. The same on both sides: 64 prompts an iteration cut to 24
tokens, answers of 48 tokens at temperature 1 that nothing ends, four rounds of one minibatch, every parameter of policy
and critic trained with AdamW, one reward model of the same shape, float32. Ours also with LoRA on both. trl's loop
calls us after each of its iterations, so the two alternate. Printed: medians, and the ratio of seconds (trl over jaxft)
with its range.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import torch
import transformers
from datasets import Dataset
from trl.experimental.ppo import PPOConfig, PPOTrainer

from jaxft.config import load_config
from jaxft.tasks.train import Job

WIDTH = 24  # tokens of a prompt


def prepare(model, prompts, out):
    """Write the prompts cut to one length, and a reward model of the policy's shape with a head drawn at random."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["prompt"] for line in prompts.read_text(encoding="utf-8").splitlines()]
    ids = [ids[:WIDTH] for ids in (tokenizer(text)["input_ids"] for text in rows) if len(ids) >= WIDTH]
    assert ids, f"no prompt has {WIDTH} tokens"
    torch.manual_seed(0)
    reward = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, pad_token_id=0)
    reward.save_pretrained(out / "reward")
    tokenizer.save_pretrained(out / "reward")
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    (out / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return tokenizer, ids


class Ours:
    """Iterations of a run, one at a time."""

    def __init__(self, name, method, model, out, rows, new):
        config = f"""task: ppo
model: {{path: {json.dumps(str(model))}, dtype: float32}}
method: {method}
data: {{train: {out}/prompts.jsonl, format: prompt, max_length: {WIDTH + 8}}}
optimizer: {{learning_rate: 3e-6}}
train: {{steps: 1000, batch_size: {rows}}}
ppo: {{reward: {out}/reward, max_new_tokens: {new}}}
output: {out}/{name}
"""
        (out / f"{name}.yaml").write_text(config)
        self.job = Job(load_config(out / f"{name}.yaml"))
        self.state, self.batches = self.job.state, self.job.batches.iterate(0)

    def __call__(self):
        began = time.perf_counter()
        self.state, metrics = self.job.step(self.state, next(self.batches))
        jax.block_until_ready((self.state.trainable, metrics))
        return time.perf_counter() - began, float(metrics["response_length"])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    for name, default in {"rows": 64, "new": 48, "iterations": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    tokenizer, ids = prepare(args.model, args.prompts, args.out)
    methods = {"full": "{name: full}", "lora": "{name: lora, r: 16, alpha: 32, target_modules: all-linear}"}
    ours = {name: Ours(name, m, args.model, args.out, args.rows, args.new) for name, m in methods.items()}
    for one in ours.values():
        one()
        one()  # warm

    tokenizer.padding_side = "left"
    tokenizer.pad_token = "<unk>"
    load = transformers.AutoModelForCausalLM.from_pretrained
    policy, reference = (load(args.model, dtype=torch.float32) for _ in range(2))
    read = transformers.AutoModelForSequenceClassification.from_pretrained
    reward, value = (read(args.out / "reward", dtype=torch.float32) for _ in range(2))
    on_cpu = jax.default_backend() == "cpu"
    options = PPOConfig(
        tempfile.mkdtemp(), report_to="none", use_cpu=on_cpu, bf16=False, gradient_checkpointing=False,
        disable_tqdm=True, num_mini_batches=1, num_ppo_epochs=4,
        per_device_train_batch_size=args.rows, gradient_accumulation_steps=1,
        total_episodes=args.rows * (args.iterations + 1), response_length=args.new, temperature=1.0, stop_token=None,
        num_sample_generations=0, save_strategy="no", logging_steps=1, learning_rate=3e-6,
        local_rollout_forward_batch_size=args.rows,
    )  # fmt: skip
    trainer = PPOTrainer(
        args=options, processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
    )  # fmt: skip
    rounds, began = [], time.perf_counter()

    def alternate(*_, **__):
        nonlocal began
        theirs = time.perf_counter() - began
        rounds.append({"trl": theirs, **{name: one()[0] for name, one in ours.items()}})
        print({name: round(x, 2) for name, x in rounds[-1].items()}, flush=True)
        began = time.perf_counter()

    trainer.log = alternate
    trainer.train()
    rounds = rounds[1:]  # the first of trl holds its warm-up
    print(f"answers of {ours['full']()[1]:.1f} tokens here, trl draws all {args.new}")
    for name in ours:
        ratios = [r["trl"] / r[name] for r in rounds]
        theirs, mine = (statistics.median(r[side] for r in rounds) for side in ("trl", name))
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name}: trl {theirs:.2f} s, jaxft {mine:.2f} s an iteration, ratio {ratio}")


if __name__ == "__main__":
    main()

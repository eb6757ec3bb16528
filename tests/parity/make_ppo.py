"""Write the golden file of PPO: what the last PPOTrainer that trl had, of its version 1.12, does in a few steps.

In an environment of its own, with torch==2.13.0, trl==1.12.0, peft and safetensors:

python tests/parity/make_ppo.py
"""

import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import peers
import torch
import transformers
from datasets import Dataset
from ppo_runs import END, LENGTH, PENALTY, PROMPTS, RUNS, TEMPERATURE
from safetensors.numpy import save_file
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

FILE = Path(__file__).parent / "golden" / "ppo.safetensors"
VALUE_WEIGHT = 0.1


def classifier(seed):
    """The base with a head of one number."""
    base = peers.base_model("llama")  # and with it the seed of the head
    model = transformers.LlamaForSequenceClassification(peers.llama(num_labels=1)).eval()
    model.model.load_state_dict(base.model.state_dict())
    peers.roughen([model.score.weight], 0.5, seed=seed)
    return model


def policy():
    return peers.adapted("llama", peers.ADAPTERS["llama"]["all"]).merge_and_unload().requires_grad_(True)


def spied(calls):
    """Patches that note what the parts of the trainer are given and return; minibatches keep their order."""

    def noting(name):
        real = getattr(ppo_trainer, name)

        def note(*args, **options):
            out = real(*args, **options)
            for x in out if isinstance(out, tuple) else (out,):
                if getattr(x, "grad_fn", None) is not None:
                    x.retain_grad()
            calls.setdefault(name, []).append((args, out))
            return out

        return patch.object(ppo_trainer, name, note)

    parts = ("batch_generation", "selective_log_softmax", "get_reward", "masked_whiten", "masked_mean", "forward")
    return [*map(noting, parts), patch.object(np.random, "permutation", np.arange)]


def run(seed, kl, beta, gamma, lam, whiten, epochs, rate, clip):
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    rows = {"per_device_train_batch_size": len(PROMPTS), "total_episodes": len(PROMPTS), "num_mini_batches": 1}
    rest = {"gradient_checkpointing": False, "num_sample_generations": 0, "logging_steps": 1}
    args = PPOConfig(
        tempfile.mkdtemp(),
        **{**plain, **rows, **rest},
        **{"response_length": LENGTH, "stop_token": "eos", "missing_eos_penalty": PENALTY, "temperature": TEMPERATURE},
        **{"kl_estimator": kl, "kl_coef": beta, "gamma": gamma, "lam": lam, "whiten_rewards": whiten},
        **{"num_ppo_epochs": epochs, "learning_rate": rate, "lr_scheduler_type": "constant", "vf_coef": VALUE_WEIGHT},
        **{"cliprange": clip, "cliprange_value": clip},
    )
    tokenizer = peers.words()
    tokenizer.padding_side, tokenizer.eos_token = "left", f"w{END}"
    models = {"model": policy(), "ref_model": peers.base_model("llama")}
    models |= {"reward_model": classifier(1), "value_model": classifier(2)}
    data = Dataset.from_list([{"input_ids": ids} for ids in PROMPTS])
    trainer, logs, calls = PPOTrainer(args=args, processing_class=tokenizer, train_dataset=data, **models), [], {}
    trainer.log = lambda figures, *_, **__: logs.append(figures)
    patches = spied(calls)
    torch.manual_seed(seed)
    for one in patches:
        one.start()
    trainer.train()
    for one in patches:
        one.stop()
    return made(calls, logs[0], epochs)


def made(calls, figures, epochs):
    """What is compared, `[B, T]` over the answers, and of each epoch behind an axis of its own."""
    ids = calls["batch_generation"][0][1][0]
    context = ids.shape[1] - LENGTH
    (_, (values, _, _)), (_, (_, scores, _)) = calls["get_reward"]
    log_probs, ref, *new = (out for _, out in calls["selective_log_softmax"])
    steps = [out for _, out in calls["forward"]][1:]
    assert len(new) == len(steps) == epochs
    whitened = calls["masked_whiten"]
    means = [out for _, out in calls["masked_mean"]][-4 * epochs :]  # whitening takes means too
    each = {
        name: torch.stack(means[i::4]) for i, name in enumerate(("value_loss", "_", "policy_loss", "clip_fraction"))
    }
    each["value_loss"] = each["value_loss"] / 2  # the factor is put before the mean
    places = slice(context - 1, -1)
    found = {
        **{"input_ids": ids, "log_probs": log_probs, "ref": ref, "scores": scores},
        **{"values": values[:, places, 0], "advantages": whitened[-1][0][0], "whitened": whitened[-1][1]},
        **{"new_log_probs": torch.stack(new), "new_values": torch.stack([v[:, places, 0] for _, v in steps])},
        "policy_gradient": torch.stack([x.grad for x in new]),
        "value_gradient": torch.stack([v.grad[:, places, 0] for _, v in steps]) / VALUE_WEIGHT,
        **{name: x for name, x in each.items() if name != "_"},
        **{name: torch.tensor(figures[f"objective/{name}"]) for name in ("kl", "non_score_reward", "rlhf_reward")},
    }
    return {name: np.array(x.detach()) for name, x in found.items()}


def main():
    found = {f"{name} {key}": x for name, options in RUNS.items() for key, x in run(**options).items()}
    heads = {"reward": classifier(1), "value": classifier(2)}
    found |= {f"heads {name}": np.array(model.score.weight.detach()) for name, model in heads.items()}
    for name in RUNS:
        answers = found[f"{name} input_ids"][:, -LENGTH:]
        begun = (answers == END).cumsum(1) > 0
        assert (answers != 0)[~begun].all(), "a pad token was drawn: the peer takes it for the end"
    save_file(found, FILE)


if __name__ == "__main__":
    main()

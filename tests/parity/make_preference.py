"""Write the golden file of the losses of preferences and of cases.GRPO: what trl's trainers make of them.

.venv-parity/bin/python tests/parity/make_preference.py
"""

import functools
import tempfile
from types import SimpleNamespace

import numpy as np
import peers
import preference_cases as cases
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.numpy import save_file
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

FILE = cases.GOLDEN / "preference.safetensors"
ROWS = [
    {"prompt": "w7 w8", "chosen": " w9 w10", "rejected": " w11", "margin": 0.5},
    {"prompt": "w7", "chosen": " w12", "rejected": " w13 w14 w15 w16", "margin": -0.2},
]


def trainer(kind, config, model, rows, tokenizer=None, **options):
    """A trainer that takes no step of its own."""
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "save_strategy": "no"}
    more = {name: options.pop(name) for name in ("peft_config", "ref_model", "reward_funcs") if name in options}
    args = config(tempfile.mkdtemp(), gradient_checkpointing=False, logging_steps=1, max_steps=1, **plain, **options)
    tokenizer = tokenizer or peers.words()
    return kind(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more)


def leaf(x):
    return torch.tensor(x, requires_grad=True)


def tensors(*names):
    return [leaf(cases.COLUMNS[name]) for name in names]


def found(loss, **leaves):
    loss.backward()
    return {"loss": loss.detach().numpy(), **{name: x.grad.numpy() for name, x in leaves.items()}}


def classifier():
    """The base with a head of one score."""
    base = peers.base_model("llama")  # and with it the seed of the head
    model = transformers.LlamaForSequenceClassification(peers.llama(num_labels=1)).eval()
    model.model.load_state_dict(base.model.state_dict())
    peers.roughen([model.score.weight], 0.5)
    return model


def reward(centering=None, margin=False):
    made = trainer(RewardTrainer, RewardConfig, classifier(), ROWS, center_rewards_coefficient=centering)
    chosen, rejected = tensors("chosen", "rejected")
    scores = lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])
    inputs = {"attention_mask": torch.ones(1)} | ({"margin": torch.tensor(cases.COLUMNS["margin"])} if margin else {})
    return found(made.compute_loss(scores, inputs), chosen=chosen, rejected=rejected)


def completed(rows):
    """Masks `[2 n, 1 + LENGTH]` of answers behind a prompt of one token: the chosen ones, then the rejected."""
    lengths = np.concatenate([cases.WORDS[0, rows], cases.WORDS[1, rows]])
    return torch.tensor((np.arange(1 + cases.LENGTH) <= lengths[:, None]) & (np.arange(1 + cases.LENGTH) > 0)).int()


def answers(sums):
    """What a model returns whose answers have these sums: all of it at the first token."""
    at_first = torch.nn.functional.pad(sums[:, None], (0, cases.LENGTH - 1))
    other = torch.zeros(at_first.shape)
    return lambda **_: SimpleNamespace(log_probs=at_first, entropy=other, mean_logits=other, is_top1=other.bool())


@functools.cache
def dpo_trainer():
    return trainer(DPOTrainer, DPOConfig, peers.base_model("llama"), ROWS, ref_model=peers.base_model("llama"))


def dpo(kind):
    """The peer has the conservative loss under the name of another that sorts the pairs of a batch: of one, nothing."""
    made = dpo_trainer()
    made.beta, made.label_smoothing, made.loss_weights = cases.BETA, cases.SMOOTHING, [1.0]
    made.loss_types = ["aot" if kind == "conservative" else kind]
    policy, ref = tensors("policy_chosen", "policy_rejected"), tensors("ref_chosen", "ref_rejected")
    parts = [[i] for i in range(cases.PAIRS)] if kind == "conservative" else [list(range(cases.PAIRS))]
    loss = 0
    for rows in parts:
        made.ref_model = answers(torch.cat([x[rows] for x in ref]))
        inputs = {"completion_mask": completed(rows), "attention_mask": completed(rows)}
        inputs["input_ids"] = completed(rows)
        loss = loss + made._compute_loss(answers(torch.cat([x[rows] for x in policy])), inputs, False) / len(parts)
    return found(loss, policy_chosen=policy[0], policy_rejected=policy[1])


def kto(**weights):
    rows = [{"prompt": "w7", "completion": " w8", "label": True}] * 2
    options = {"beta": cases.BETA, "per_device_train_batch_size": 2, "ref_model": peers.base_model("llama")}
    made = trainer(KTOTrainer, KTOConfig, peers.base_model("llama"), rows, **options, **weights)
    (policy,) = tensors("policy_chosen")
    made.ref_model = answers(torch.tensor(cases.COLUMNS["ref_chosen"]))
    drift = iter([torch.tensor(cases.COLUMNS["kl"]), torch.zeros(cases.PAIRS)])
    made._compute_kl_logps = lambda model, batch: next(drift)
    mask = completed(list(range(cases.PAIRS)))[: cases.PAIRS]
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": torch.tensor(cases.GOOD)}
    return found(made._compute_loss(answers(policy), inputs, False), policy_chosen=policy)


def grpo_trainer(model, reward=lambda completions, **_: [0.0] * len(completions), **options):
    options = {"max_completion_length": cases.LENGTH, "num_generations": cases.GROUP, **options}
    rows = [{"prompt": "w7 w8"}, {"prompt": "w9"}]
    batch = {"per_device_train_batch_size": 2 * cases.GROUP, "epsilon": cases.CLIP, "epsilon_high": cases.CLIP_HIGH}
    return trainer(GRPOTrainer, GRPOConfig, model, rows, reward_funcs=reward, **batch, **options)


@functools.cache
def grpo_of(reduction, ratio):
    """Its KL is set afterwards: for one from the start it asks for a folder of the reference."""
    return grpo_trainer(peers.base_model("llama"), loss_type=reduction, importance_sampling_level=ratio)


def grpo(case):
    reduction, ratio, kl, corrected = cases.GRPO[case]
    made = grpo_of(reduction, ratio)
    made.beta, made.args.use_bias_correction_kl = kl, corrected
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    (log_probs,) = tensors("log_probs")
    made._get_per_token_logps_and_entropies = lambda *_, **__: (log_probs, torch.zeros(log_probs.shape), None)
    mask, prompt = torch.tensor(cases.MASK), torch.ones(len(cases.MASK), 1).long()
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask.long(), "completion_mask": mask}
    names = {"advantages": "advantages", "old_per_token_logps": "old", "ref_per_token_logps": "ref"}
    inputs |= {name: torch.tensor(cases.COLUMNS[ours]) for name, ours in names.items()}
    inputs["num_items_in_batch"] = torch.tensor(cases.WINDOW)
    return found(made._compute_loss(made.model, inputs), log_probs=log_probs)


THEIRS = {
    "reward": reward,
    "reward-centred": lambda: reward(0.05),
    "reward-margin": lambda: reward(margin=True),
    **{f"dpo-{kind}": functools.partial(dpo, kind) for kind in ("sigmoid", "hinge", "ipo", "robust", "conservative")},
    "kto": kto,
    "kto-weights": lambda: kto(desirable_weight=1.5, undesirable_weight=0.7),
    **{case: functools.partial(grpo, case) for case in cases.GRPO},
}


def advantages(scale):
    """Those of two groups, drawn and scored by the trainer."""
    rewards = cases.COLUMNS["rewards"].tolist()
    options = {"scale_rewards": scale, "max_completion_length": 2}
    made = grpo_trainer(peers.base_model("llama"), lambda completions, **_: rewards, **options)
    drawn = made._generate_and_score_completions([{"prompt": "w7 w8"}] * cases.GROUP + [{"prompt": "w9"}] * cases.GROUP)
    return drawn["advantages"].numpy()


def dpo_of_models():
    """Beside a separate reference; a new adapter switched off; an adapter that is trained on, and its own start."""
    base, options = peers.base_model, peers.ADAPTERS["llama"]["all"]
    trained = peers.adapted("llama", options)

    def loss(model, move=None, **more):
        made = trainer(DPOTrainer, DPOConfig, model, ROWS, beta=cases.BETA, per_device_train_batch_size=2, **more)
        if move is not None:
            move(made.model)
        made.model.eval()
        batch = next(iter(made.get_train_dataloader()))
        with torch.no_grad():
            return made.compute_loss(made.model, dict(batch)).numpy(), batch

    def to_trained(model):
        set_peft_model_state_dict(model, get_peft_model_state_dict(trained))

    def to_base(model):
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.data.zero_()

    new = LoraConfig(task_type="CAUSAL_LM", **options)
    separate, batch = loss(peers.adapted("llama", options).merge_and_unload(), ref_model=base("llama"))
    made = {name: x.numpy() for name, x in batch.items()}
    made["separate"] = separate
    made["disabled"], _ = loss(base("llama"), to_trained, peft_config=new)
    made["start"], _ = loss(peers.adapted("llama", options))
    made["continued"], _ = loss(peers.adapted("llama", options), to_base)
    return made


def log_probs():
    made = grpo_trainer(peers.adapted("llama", peers.ADAPTERS["llama"]["all"]), temperature=0.7)
    ids, mask = (torch.tensor(peers.batch()[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        found, entropies, _ = made._get_per_token_logps_and_entropies(made.model, ids, mask, 7, compute_entropy=True)
    whole = {"input_ids": ids, "attention_mask": mask, "log_probs": found, "entropies": entropies}
    return {name: x.numpy() for name, x in whole.items()}


def scores():
    """Pairs that end in the end token; the second time it pads them too."""
    model, made = classifier(), {}
    made["kernel"] = model.score.weight.detach().numpy()
    for padding, tokenizer in (("own", peers.words()), ("eos", peers.words(pad=None))):
        options = {"center_rewards_coefficient": 0.05, "per_device_train_batch_size": 2}
        t = trainer(RewardTrainer, RewardConfig, classifier(), ROWS, tokenizer, **options)
        batch = next(iter(t.get_train_dataloader()))
        t.model.eval()
        with torch.no_grad():
            loss, out = t.compute_loss(t.model, dict(batch), return_outputs=True)
        batch = {"scores": out.logits[:, 0], "loss": loss, **batch}
        made |= {f"{name} {padding}": x.numpy() for name, x in batch.items()}
    return made


OF_MODELS = {"dpo": dpo_of_models, "log_probs": log_probs, "scores": scores}


def main():
    made = {f"{case} {name}": x for case in cases.OURS for name, x in THEIRS[case]().items()}
    made |= {f"advantages-{scale} {scale}": advantages(scale) for scale in cases.ADVANTAGES}
    made |= {f"models-{part} {name}": x for part, make in OF_MODELS.items() for name, x in make().items()}
    save_file({name: np.array(x) for name, x in made.items()}, FILE)


if __name__ == "__main__":
    main()

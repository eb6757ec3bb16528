"""Rows to losses beside trl, and a reward model's folder in transformers: equal scores however rows are padded."""

import json

import numpy as np
import pytest
from texts import make_tokenizer

import jaxft
from jaxft.losses import make_dpo_loss, make_reward_loss, reference_log_probs
from jaxft.models.sharing import with_head

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
torch = pytest.importorskip("torch", reason="needs the [parity] extra")
transformers = pytest.importorskip("transformers")
TOLERANCE = 1e-5
TEXTS = ["the cat sat</s>", "on</s>", "there it is: the end</s>"]
ROWS = [  # whose border no token crosses, so that trl, which tokenises jointly, sees the same tokens
    {"prompt": "the cat", "chosen": ": on the mat", "rejected": ": the end", "margin": 0.5},
    {"prompt": "there it is", "chosen": ": the", "rejected": ": it sat on the mat", "margin": 1.5},
]


def model(kind, tokenizer):
    """A reward model, and the tokenizer that is saved with it."""
    raw = {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        return with_head(jaxft.testing.tiny_gpt2(**raw), ("score",))
    return with_head(jaxft.testing.tiny_model(kind, **raw), ("score",))


PADS = {  # what the tokenizer has for padding, and what the folder's padding is
    "none": ({}, 0),
    "the end token": ({"pad_token": "</s>"}, 0),
    "one of its own": ({"pad_token": "<|im_end|>"}, 3),
}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("pad", PADS)
def test_the_folder_scores_alike_there(kind, pad, tmp_path):
    """In one batch, padded right and left, and alone; the score is read at the end token, not before it."""
    special, wanted = PADS[pad]
    tokenizer = make_tokenizer(**special)
    ours = model(kind, tokenizer)
    jaxft.save_model(ours, tmp_path, tokenizer)
    assert tokenizer.pad_token == special.get("pad_token")  # the one that was given is as it was
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert (theirs.config.num_labels, theirs.config.pad_token_id) == (1, wanted)
    alone = [np.asarray(ours(np.array([tokenizer(text)["input_ids"]])))[0, 0] for text in TEXTS]
    assert np.ptp(alone) > 1e-3
    for side in ("right", "left"):
        there = transformers.AutoTokenizer.from_pretrained(tmp_path, padding_side=side)
        batch = there(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = theirs(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].numpy()
        if not (kind == "gpt2" and side == "left"):  # there positions count from the padding on
            assert np.abs(found - alone).max() < TOLERANCE


def test_without_a_token_to_pad_with_it_reads_one_row_and_refuses_several(tmp_path):
    """As GPT-2 has it: one special token for everything."""
    tokenizer = make_tokenizer(begin=False, bos_token="</s>", pad_token="</s>", additional_special_tokens=[])
    ours = model("gpt2", tokenizer)
    jaxft.save_model(ours, tmp_path, tokenizer)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids = torch.tensor([tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        assert abs(float(theirs(input_ids=ids).logits) - float(ours(ids.numpy())[0, 0])) < TOLERANCE
    with pytest.raises(ValueError, match="no padding token"):
        theirs(input_ids=torch.cat([ids, ids]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Rows, a reward model, a policy and its reference, as folders."""
    where = tmp_path_factory.mktemp("place")
    tokenizer = make_tokenizer(pad_token="<|im_end|>")
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    jaxft.save_model(model("llama", tokenizer), where / "reward", tokenizer)
    for seed, name in enumerate(("policy", "reference")):
        base = jaxft.testing.tiny_llama(vocab_size=300, eos_token_id=1, seed=seed)
        jaxft.save_model(base, where / name, tokenizer)
    return where


def rows(place, drop=()):
    import datasets

    return datasets.Dataset.from_list([{k: v for k, v in row.items() if k not in drop} for row in ROWS])


def given(place, margins=False):
    tokenizer = jaxft.load(place / "policy")[1]
    data = jaxft.data.load_comparisons(place / "rows.jsonl", tokenizer, format="preference")
    return jaxft.data.collate_comparisons(data.examples, margins=margins)


@pytest.mark.parametrize("margins", [True, False])
def test_the_reward_loss_of_the_same_rows_in_trl(place, margins, tmp_path):
    trl = pytest.importorskip("trl")
    options = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False, "use_cpu": True}
    trainer = trl.RewardTrainer(
        str(place / "reward"),
        args=trl.RewardConfig(**options, center_rewards_coefficient=0.1, per_device_train_batch_size=2),
        train_dataset=rows(place, drop=() if margins else ("margin",)),
    )
    batch = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, 2, collate_fn=trainer.data_collator)))
    theirs = float(trainer.compute_loss(trainer.model, dict(batch)).detach())
    ours, _ = jaxft.load(place / "reward")
    total, weight, _ = make_reward_loss(centering=0.1)(ours, given(place, margins), key=None)
    assert abs(float(total / weight) - theirs) < TOLERANCE


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo", "robust"])
def test_the_dpo_loss_of_the_same_rows_in_trl(place, kind, tmp_path):
    """Tokens, masks, sums, and for IPO the means over an answer's tokens."""
    trl = pytest.importorskip("trl")
    smoothing = {"label_smoothing": 0.1} if kind == "robust" else {}  # of sigmoid trl has none
    options = {"output_dir": str(tmp_path), "report_to": "none", "bf16": False, "use_cpu": True}
    trainer = trl.DPOTrainer(
        str(place / "policy"),
        ref_model=transformers.AutoModelForCausalLM.from_pretrained(place / "reference"),
        args=trl.DPOConfig(**options, loss_type=[kind], beta=0.3, **smoothing, per_device_train_batch_size=2),
        train_dataset=rows(place, drop=("margin",)),
    )
    batch = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, 2, collate_fn=trainer.data_collator)))
    theirs = float(trainer.compute_loss(trainer.model, dict(batch)).detach())
    (policy, _), (reference, _) = jaxft.load(place / "policy"), jaxft.load(place / "reference")
    batch = {**given(place), **reference_log_probs(reference, given(place))}
    total, weight, _ = make_dpo_loss(beta=0.3, kind=kind, **smoothing)(policy, batch, key=None)
    assert abs(float(total / weight) - theirs) < TOLERANCE

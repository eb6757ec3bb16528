"""Write the golden file of the losses over embeddings: what sentence-transformers and transformers' CLIP make of them.

.venv-parity/bin/python tests/parity/make_contrastive.py
"""

from pathlib import Path

import numpy as np
import torch
from contrastive_cases import COLUMNS, OURS
from safetensors.numpy import save_file
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

FILE = Path(__file__).parent / "golden" / "contrastive.safetensors"
BOTH = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


class Rows(torch.nn.Module):
    """A model that gives the embeddings that it is given."""

    def forward(self, features):
        return {**features, "sentence_embedding": features["sentence_embedding"] * 1}


def of_embeddings(loss, column=None):
    labels = None if column is None else torch.tensor(COLUMNS[column])
    return lambda *embeddings: loss.compute_loss_from_embeddings(list(embeddings), labels)


def cached(*embeddings):
    """Gradient caching in mini-batches of three."""
    loss = losses.CachedMultipleNegativesRankingLoss(torch.nn.Sequential(Rows()), mini_batch_size=3, **BOTH)
    features = [{"input_ids": torch.zeros(len(e), 1), "sentence_embedding": e} for e in embeddings]
    return loss(features, None)


def clip(image, text):
    """As in CLIPModel: its scale is exp(2.6592), 1 / 0.07 to four digits; here it is 1 / 0.07."""
    return image_text_contrastive_loss(cos_sim(text, image) / 0.07)


COSINE = losses.TripletDistanceMetric.COSINE
THEIRS = {
    "mnrl": of_embeddings(losses.MultipleNegativesRankingLoss(None)),
    "mnrl-hard": of_embeddings(losses.MultipleNegativesRankingLoss(None)),
    "mnrl-scale": of_embeddings(losses.MultipleNegativesRankingLoss(None, scale=5.0)),
    "mnrl-symmetric": of_embeddings(losses.MultipleNegativesRankingLoss(None, **BOTH)),
    "cached": cached,
    "clip": clip,
    "cosent": of_embeddings(losses.CoSENTLoss(None), "score"),
    "contrastive": of_embeddings(losses.ContrastiveLoss(None), "label"),
    "contrastive-margin": of_embeddings(losses.ContrastiveLoss(None, margin=1.1), "label"),
    "triplet": of_embeddings(losses.TripletLoss(None)),
    "triplet-margin": of_embeddings(losses.TripletLoss(None, triplet_margin=0.5)),
    "triplet-cosine": of_embeddings(losses.TripletLoss(None, distance_metric=COSINE, triplet_margin=0.5)),
    "cosine": of_embeddings(losses.CosineSimilarityLoss(None), "score"),
}


def theirs(case):
    """What the peer makes of a case: the loss, and its gradient with respect to each column."""
    columns = OURS[case][0]
    given = [torch.tensor(COLUMNS[name], requires_grad=True) for name in columns]
    value = THEIRS[case](*given)
    value.backward()
    return {"loss": value.detach().numpy(), **{n: x.grad.numpy() for n, x in zip(columns, given, strict=True)}}


def main():
    made = {f"{case} {name}": np.array(x) for case in OURS for name, x in theirs(case).items()}
    save_file(made, FILE)


if __name__ == "__main__":
    main()

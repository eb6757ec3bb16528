"""A ViT from scratch on two views of each picture (SimCLR): images.py FILE.npz STEPS SEED DEPTH DIM BATCH PATCH CROP.

FILE.npz holds train, validation and test splits. Prints the k-nearest-neighbour accuracy on the test split of raw
pixels, of the untrained network and of the trained one. No label is seen in training.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxft
from jaxft.data import Augmentation, ImageProcessor, load_images, two_views
from jaxft.models.hub import fresh_model
from jaxft.models.vit import ViTConfig

file, crop = sys.argv[1], float(sys.argv[8])  # the least part of a picture that a view keeps
steps, seed, depth, dim, rows, patch = map(int, sys.argv[2:8])
TEMPERATURE = 0.2
processor = ImageProcessor((32, 32))
train, held_out, test = (load_images(file, processor, split=s) for s in ("train", "validation", "test"))
shape = {
    "image_size": 32,
    "patch_size": patch,
    "hidden_size": dim,
    "intermediate_size": 4 * dim,
    "layer_norm_eps": 1e-6,
}
config = ViTConfig.from_raw(
    {**shape, "num_hidden_layers": depth, "num_attention_heads": dim // 32, "model_type": "vit"}
)
model = fresh_model(config.replace(pooling="mean"), seed)


def contrast(model, batch, *, key):
    """NT-Xent of the pooled vectors of two views."""
    both = jnp.concatenate([batch["view1_pixel_values"], batch["view2_pixel_values"]])
    one, two = jnp.split(model.pooled(pixel_values=both, key=key), 2)
    losses = jaxft.losses.nt_xent(one, two, temperature=TEMPERATURE, reduction="none")
    return losses.sum(), jnp.float32(len(losses)), {}


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def embed(model, data):
    batches = [data.batch(slice(i, i + 256))["pixel_values"] for i in range(0, len(data), 256)]
    return np.concatenate([model.pooled(pixel_values=batch) for batch in batches])


def accuracy(known, asked, labels, want, k):
    """The share of rows whose k nearest, weighted by the cosine, vote for their class."""
    scores = asked @ known.T
    nearest = np.argsort(-scores, axis=1)[:, :k]
    votes = np.zeros((len(asked), labels.max() + 1))
    for i, row in enumerate(nearest):
        np.add.at(votes[i], labels[row], np.exp(scores[i, row] / 0.1))
    return float((votes.argmax(1) == want).mean())


def report(name, vectors):
    """Choose k, and whether the training set's mean is taken away, on the validation split; print both accuracies."""
    found = {}
    for mean in (0, vectors[0].mean(0)):
        known, tried, asked = (unit(x - mean) for x in vectors)
        for k in (1, 3, 5, 10, 20, 50):
            scores = (
                accuracy(known, x, train.labels, data.labels, k) for x, data in ((tried, held_out), (asked, test))
            )
            found[np.ndim(mean) > 0, k] = tuple(scores)
    (centred, k), (validation, got) = max(found.items(), key=lambda item: item[1][0])
    print(f"{name}: test {got:.1%}, validation {validation:.1%} (k {k}{', centred' * centred})", flush=True)


report("raw pixels", [data.images.reshape(len(data), -1) / 255 for data in (train, held_out, test)])
report("untrained", [embed(model, data) for data in (train, held_out, test)])

schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, max(steps // 10, 1), steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
state = jaxft.TrainState.create(model, jaxft.Full(), tx, seed=seed)
step = jaxft.make_train_step(contrast)
options = Augmentation(crop=crop)
views = jax.jit(lambda key, x: [processor.prepare(view) for view in two_views(key, processor.unit(x), options)])
order = np.concatenate(
    [np.random.default_rng([seed, n]).permutation(len(train)) for n in range(steps * rows // len(train) + 1)]
)
began, key = time.time(), jax.random.key(seed)
for n in range(steps):
    one, two = views(jax.random.fold_in(key, n), train.batch(order[n * rows : (n + 1) * rows])["pixel_values"])
    state, metrics = step(state, {"view1_pixel_values": one, "view2_pixel_values": two})
    if n % 50 == 0 or n == steps - 1:
        print(f"step {n}: loss {float(metrics['loss']):.3f}, {time.time() - began:.0f} s", flush=True)
report("trained", [embed(state.model, data) for data in (train, held_out, test)])

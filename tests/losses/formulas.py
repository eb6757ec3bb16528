"""The formulas of the losses over embeddings as float64 loops, and gradients of them by central differences."""

import numpy as np


def unit(x):
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    return np.where(size > 0, x / np.where(size > 0, size, 1), 0)


def cross_entropy(scores, i, counted):
    return np.log(sum(np.exp(s) for n, s in enumerate(scores) if counted[n] or n == i)) - scores[i]


def info_nce(q, d, t=0.2, symmetric=False, mask=None):
    s = unit(q) @ unit(d).T / t
    mask = np.ones(s.shape, bool) if mask is None else mask
    one = [cross_entropy(s[i], i, mask[i]) for i in range(len(q))]
    if not symmetric:
        return np.array(one)
    other = [cross_entropy(s[:, i], i, mask[:, i]) for i in range(len(q))]
    return (np.array(one) + np.array(other)) / 2


def supervised_contrastive(z, labels, t=0.2):
    s = unit(z) @ unit(z).T / t
    out = np.zeros(len(z))
    for i in range(len(z)):
        others = [k for k in range(len(z)) if k != i and labels[k] != -100]
        positives = [k for k in others if labels[k] == labels[i]]
        if positives:
            out[i] = np.mean([np.log(sum(np.exp(s[i, k]) for k in others)) - s[i, p] for p in positives])
    return out


def nt_xent(x, y, t=0.2):
    s, out = unit(np.concatenate([x, y])) @ unit(np.concatenate([x, y])).T / t, []
    for i in range(2 * len(x)):
        other = (i + len(x)) % (2 * len(x))
        out.append(np.log(sum(np.exp(s[i, k]) for k in range(2 * len(x)) if k != i)) - s[i, other])
    return np.array(out)


def cosines(x, y):
    return (unit(x) * unit(y)).sum(-1)


def triplet(a, p, n, margin, distance):
    d = (lambda x, y: np.linalg.norm(x - y, axis=-1)) if distance == "euclidean" else (lambda x, y: 1 - cosines(x, y))
    return np.maximum(d(a, p) - d(a, n) + margin, 0)


def pairwise_contrastive(x, y, labels, margin=0.5):
    d = 1 - cosines(x, y)
    return (labels * d**2 + (1 - labels) * np.maximum(margin - d, 0) ** 2) / 2


def cosine_regression(x, y, scores):
    return (cosines(x, y) - scores) ** 2


def cosent(x, y, scores, t=0.05):
    c, rows = cosines(x, y) / t, range(len(x))
    return np.log(1 + sum(np.exp(c[k] - c[i]) for i in rows for k in rows if scores[i] > scores[k]))


def differences(f, x, step=1e-6):
    """The gradient of a scalar function by central differences."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        e = np.zeros_like(x)
        e[i] = step
        out[i] = (f(x + e) - f(x - e)) / (2 * step)
    return out

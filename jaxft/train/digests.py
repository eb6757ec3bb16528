"""What a checkpoint should hold, leaf by leaf: dtype, shape and sha256, under a seal of its own."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

Record = dict[str, dict[str, Any]]


def by_name(tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by dotted path.

    >>> by_name({"opt": [{"mu": 1}], "step": 2})
    {'opt.0.mu': 1, 'step': 2}
    """
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in pairs}


def form(leaf: Any) -> dict[str, Any]:
    """Return what a leaf is, without what it holds.

    >>> form(np.zeros((2, 3), np.float32))
    {'dtype': 'float32', 'shape': [2, 3]}
    """
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def digest(leaf: Any) -> str:
    """Return the sha256 of an array's bytes, wherever it lies."""
    array = np.ascontiguousarray(jax.device_get(leaf))
    return hashlib.sha256(array.reshape(-1).view(np.uint8).data).hexdigest()


def record(tree: Any) -> Record:
    """Return form and digest of every leaf of a pytree of arrays, by name.

    >>> record({"a": np.zeros(2, np.float32)})["a"]["sha256"][:8]
    'af5570f5'
    """
    named = by_name(tree)
    with ThreadPoolExecutor(4) as pool:  # hashlib lets go of the interpreter: leaves are hashed side by side
        return {
            name: {**form(leaf), "sha256": sha256}
            for (name, leaf), sha256 in zip(named.items(), pool.map(digest, named.values()), strict=True)
        }


def seal(found: Mapping[str, Any]) -> str:
    """Return a digest of a record: one that was altered cannot pass for another model's."""
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def misfits(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say which leaves are missing, extra, or of another form; nothing about what they hold.

    >>> misfits({"a": {"dtype": "float32", "shape": [2]}}, {"b": {"dtype": "float32", "shape": [2]}})
    ['b is not in it', 'a is in it, and is not wanted here']
    """
    both = [name for name in wanted if name in saved]
    shapes = [(name, tuple(saved[name]["shape"]), tuple(wanted[name]["shape"])) for name in both]
    dtypes = [(name, saved[name]["dtype"], wanted[name]["dtype"]) for name in both]
    return (
        [f"{name} is not in it" for name in wanted if name not in saved]
        + [f"{name} is in it, and is not wanted here" for name in saved if name not in wanted]
        + [f"{name} is {there} there, {here} here" for name, there, here in (*shapes, *dtypes) if there != here]
    )

"""Strict JAX for the whole suite: eight devices, no silent rank promotion, warnings are errors."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

# Tiny programs: compiling them is the suite's whole cost, and without the emitters it is a third (an older XLA's flag).
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

CACHE = Path(__file__).parents[1] / ".jax_cache"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_disable_most_optimizations", True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The laws of each method are held by Llama in the default run; by the other families among the slow ones."""
    for item in items:
        others = any(family in item.name for family in ("gpt2", "qwen2", "tied"))
        if others and getattr(item, "originalname", "") in ("test_laws", "test_remat_jit_and_loop_agree"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled():
    """Free what a module compiled: the suite makes hundreds of programs."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def tokenizer():
    """A real tokenizer, with a begin token that it adds and an end token."""
    from texts import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Return a function that runs a command in the `place` of a test: exit code, stdout, stderr."""
    from jaxft import cli

    monkeypatch.chdir(place)

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["jaxft", *map(str, args)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return command

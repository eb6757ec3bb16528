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


DEAR = {  # the cases of these tests with such names are slow ones ("": all are): the default holds the law elsewhere
    "test_laws": ("gpt2", "qwen2", "tied", "gemma3", "lstm", "patterns", "transformer"),
    "test_remat_jit_and_loop_agree": ("gpt2", "qwen2", "tied", "gemma3", "patterns", "layer"),
    "test_eight_devices_are_one": ("gpt2", "tensor", "bitfit", "biases", "lora-mixed", "full-fsdp", "layers and ranks"),
    "test_its_bytes_are_those_of_live_arrays": ("tensor: 2", "full}-]", "all-linear}-]"),
    "test_a_slice_of_four_tpus": ("",),
    "test_loss_and_gradients_are_those_of_the_rows": ("full", "gpt2-lora"),
    "test_accumulation_is_the_big_batch": ("lora",),
    "test_the_first_kl_is_zero_and_first_values_are": ("bitfit", "prompt"),
    "test_fsdp_gathers_kernels_and_never_sends_activations": ("full",),
    "test_the_dropout_of_an_earlier_run_is_off": ("asked",),
    "test_a_run_of_each_method_and_the_next_over_it": ("",),
    "test_a_run_of_each": ("",),
    "test_a_run_of_preferences_is_asked_in_the_form_of_the_supervised_one": ("",),
    "test_a_plan_counts_the_base_once": ("",),
    "test_ranked_lists_and_pairs_go_together": ("",),
    "test_during_an_evaluation": ("",),
    "test_the_loss_of_any_bucket_is_the_loss_row_by_row": ("tiny_llama",),
    "test_no_dequantised_kernel_is_kept_for_the_backward_pass": ("full", "int8", "dora"),
    "test_eight_devices_are_one_with_quantised_kernels": ("",),
    "test_merging_into_what_it_was_trained_beside": ("pissa", "ia3", "dora"),
    "test_laws_beside_quantised_kernels": ("int8",),
    "test_step_0_is_the_dequantised_base": ("gpt2", "flat"),
    "test_a_plan_counts_the_bytes_of_the_leaves": ("int8",),
    "test_a_plan_of_a_folder_that_is_quantised_already": ("",),
    "test_random_weights": ("",),
    "test_any_optimiser_of_optax": ("noisy", "schedule-free", "lookahead"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the dear cases as slow, which the default run leaves out."""
    for item in items:
        if any(part in item.name for part in DEAR.get(getattr(item, "originalname", ""), ())):
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


@pytest.fixture(scope="module")
def done(place, request):
    """A finished run, of the config in the `place` of a module that its `FILE` names."""
    from jaxft import cli

    before = Path.cwd()
    os.chdir(place)
    try:
        cli.train(getattr(request.module, "FILE", "c.yaml"), output="done")
    finally:
        os.chdir(before)
    return place / "done"


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

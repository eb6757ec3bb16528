"""The README's code runs as it stands, and its table of families is the table of families."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import jaxft
from jaxft.models import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model and a real tokenizer, under the name that the README uses."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(["<end>", "<unk>", "the", "cat", "sat", "on", "mat"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    where = tmp_path_factory.mktemp("readme")
    jaxft.save_model(jaxft.testing.tiny_llama(), where / "my-model", fast)
    return where


def test_the_code_runs(folder, monkeypatch, capsys):
    assert len(BLOCKS) == 4
    monkeypatch.chdir(folder)
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "trainable params: 1,792 || all params:" in printed
    assert "['transformer.h.attn.c_attn.bias', 'transformer.h.attn.c_attn.kernel']" in printed
    merged, tokenizer = jaxft.load("out/merged")
    assert tokenizer.decode([2, 3]) == "the cat"
    assert merged(jnp.array([[2, 3]])).shape == (1, 2, 64)


def test_the_table_of_families():
    rows = re.findall(r"^\| `(\w+)` \| \w", README, re.MULTILINE)
    assert rows == ["model_type", *FAMILIES]


def test_the_table_of_methods():
    rows = re.findall(r"^\| `(\w+)\(.*?\)` \|", README, re.MULTILINE)
    assert rows == [cls.__name__ for cls in jaxft.methods.METHODS.values()]


def test_the_commands():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = set(re.findall(r"`?make ([a-z ]+?)[`\s]{2}", README + (ROOT / "CONTRIBUTING.md").read_text() + "  "))
    assert commands
    for command in commands:
        assert set(command.split()) <= set(targets), command

"""`jaxft.load`: a folder or hub id in, a model and its tokenizer out."""

from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .models.causal import CausalLM
from .models.hub import load_model, resolve

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load(
    path_or_hub_id: str | Path, *, dtype: Any = None, remat: str = "none", abstract: bool = False
) -> tuple[CausalLM, Any]:
    """Load a model and its tokenizer.

    Args:
        path_or_hub_id: A folder in Hugging Face layout with safetensors, one file or a sharded index, or a hub id.
        dtype: Dtype of parameters and computation, `jnp.bfloat16` or `"bfloat16"` say; None: the checkpoint's own.
        remat: `"none"`, or `"full"`: recompute each layer in the backward pass, for memory.
        abstract: Shapes for arrays: no weights are read (nor needed), for reports and plans.

    Returns:
        The model, and the tokenizer: None where the folder has none.

    Raises:
        CheckpointError: The folder or its files are missing, damaged, of an unknown family, or do not fit each other;
            every tensor concerned is named.

    >>> import jaxft, tempfile
    >>> folder = jaxft.save_model(jaxft.testing.tiny_llama(), tempfile.mkdtemp())
    >>> model, tokenizer = load(folder, dtype="bfloat16")
    >>> model.dtype.name, tokenizer is None
    ('bfloat16', True)
    """
    folder = resolve(path_or_hub_id)
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=dtype, remat=remat, abstract=abstract, source=str(path_or_hub_id))
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a folder, None where it has none."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes of it
        raise CheckpointError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error

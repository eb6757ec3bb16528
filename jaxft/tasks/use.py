"""What is done with a finished run or a plain model: evaluate, write text, export."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..data import Template
from ..data.chat import chat_prompt
from ..data.tokens import opening
from ..errors import CheckpointError, RunError
from ..generation.generate import generate_ids, stops_of
from ..interop.export import save_model
from ..interop.folder import form_of, load_adapter, save_adapter
from ..interop.sentence_transformers import save_sentence_transformer
from ..interop.serving import save_serving
from ..loading import load
from ..methods.merge import merge
from ..methods.method import adapters
from ..methods.switch import set_adapter
from ..models.sentence_folder import read_sentence_folder
from ..run import RunFolder
from ..train.evaluate import prefixed
from .registry import task_of
from .start import base_folder, base_of, choose_mesh


def evaluate(config: Config, *, run: RunFolder | None = None) -> dict[str, float]:
    """Return the figures on the held-out rows: of a finished run, or of the model that a config begins with.

    Raises:
        RunError: The config names no held-out rows.
        ConfigError: Options that do not go together, or a base of the wrong kind.
    """
    if not config.data.eval:
        raise RunError("there are no held-out rows to evaluate on: set data.eval (--set data.eval=FILE)")
    begun = config if run is not None else None
    if run is not None:  # the run is where one would begin
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(run.path)})})
    task = task_of(config, begun)
    if run is None:
        task.check_config()
    data = task.load_data(train=False)
    task.check_evaluation(data)
    model = task.load_model(choose_mesh(config), data)
    task.check_fit(data, model)
    batch_size = config.evaluation.batch_size or config.train.batch_size
    return prefixed(task.evaluate(model, data, batch_size)[0])


def generate(
    path: str, prompts: list[str], *, adapter: str | None = None, raw: bool = False, **options: Any
) -> list[str]:
    """Answer prompts by a run's model, or continue them by a plain one.

    Args:
        path: A run, a model folder or a hub id.
        prompts: Texts. A run that was trained on instructions or messages gets them in the form it was trained on; one
            of preferences or rewards in that of the supervised run it began with.
        adapter: A folder with an adapter to load, peft's or ours.
        raw: Give the prompts as they are, whatever the run was trained on.
        options: Of `jaxft.generate_ids`.

    Returns:
        The new text for each.
    """
    model, tokenizer = load(path)
    if tokenizer is None:
        raise CheckpointError(f"{path}: it holds no tokenizer (tokenizer.json), which turns text into tokens")
    if adapter is not None:
        model = load_adapter(model, adapter, name="given")
        if adapters(model):  # over the run's own, which stays active
            model = set_adapter(model, dict.fromkeys(adapters(model), 1.0))
    run = RunFolder(path)
    config = run.config() if run.started and not raw else None
    while config is not None and config.task != "sft" and base_of(config) is not None:
        config = RunFolder(config.model.source).config()
    form = config.data.train[0].format if config else "text"
    if form == "instruction":
        assert config is not None
        template = Template(**config.data.template.model_dump()) if config.data.template else Template()
        ids = [opening(tokenizer, template.render({"instruction": text, "input": ""})) for text in prompts]
    elif form == "messages":
        ids = [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    else:
        ids = [opening(tokenizer, text) for text in prompts]
    new = generate_ids(model, ids, stop_ids=stops_of(model, tokenizer), **options)
    return [tokenizer.decode(row, skip_special_tokens=True) for row in new]


def export(run: RunFolder, form: str, output: str | Path) -> Path:
    """Write what a finished run has made, for others to load.

    Args:
        run: The run.
        form: `"peft"` or `"adapters"`: its adapter, as the folder of that library; `"serving"`: its adapter as the
            plain LoRA that engines read; `"merged"`: a whole model in Hugging Face layout, tokenizer included, of a
            quantised base with what its kernels stand for, in the dtype of computation;
            `"sentence-transformers"`: such a model as a folder of that library, `"sentence-transformers-adapter"`: the
            adapter as that library saves one, beside the name of its base.
        output: A new or empty folder.

    Returns:
        The folder.

    Raises:
        RunError: The folder is not empty, or the form cannot express what the run has made.
        MethodError: A plain LoRA cannot, or there is no merging it.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"{output}: it is there already; give a new or an empty folder as --output")
    model, tokenizer = load(run.path)
    if form in ("merged", "sentence-transformers"):
        whole = merge(model) if adapters(model) else model
        if form == "merged":
            return save_model(whole, output, tokenizer)
        return save_sentence_transformer(whole, output, tokenizer, prompts=prompts_of(run))
    carried = adapters(model)
    if run.model.is_dir():
        raise RunError(
            f"{run.path}: it trained the whole model, so there is no adapter: export it with --format merged"
        )
    if len(carried) == 1:
        ((name, method),) = carried.items()
        if form == "sentence-transformers-adapter":
            return save_sentence_transformer(model, output, tokenizer, prompts=prompts_of(run))
        if form == "serving":
            return save_serving(model, output, name=name)
        if form == form_of(method, model, name):
            return save_adapter(model, output, name=name)
    what = " over ".join(type(m).__name__ for m in reversed(carried.values())) or "what it trained"
    raise RunError(
        f"{run.path}: a folder of --format {form} cannot express {what}. {run.adapter} is what jaxft itself reads; "
        "--format merged folds what can be folded into the model"
    )


def prompts_of(run: RunFolder) -> Mapping[str, str]:
    """Return the prompts of the sentence-transformers folder that a run began with, if it did."""
    return read_sentence_folder(base_folder(run.config())).prompts

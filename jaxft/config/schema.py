"""What a config may hold: every key with its type, bounds and default."""

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from ..errors import ConfigError
from ..methods import METHODS, Method
from .preferences import Dpo, Grpo, Ppo, RewardModel
from .section import Count, Finite, Positive, Section, Share, Text, wrong

SftFormat = Literal["instruction", "prompt_completion", "messages", "text"]
EncoderFormat = Literal["pairs", "triplets", "labelled", "scored_pairs", "images", "regions"]
AnswerFormat = Literal["preference", "ranking", "prompt"]
Format = Literal[SftFormat, EncoderFormat, AnswerFormat]
ContrastiveKind = Literal[
    "info_nce", "nt_xent", "supervised_contrastive", "triplet", "cosent", "cosine_regression", "pairwise_contrastive"
]
FORMATS: dict[str, tuple[str, ...]] = {  # what each task reads
    "sft": get_args(SftFormat),
    "classify": ("labelled", "images"),
    "contrastive": ("pairs", "triplets", "labelled", "scored_pairs", "images", "regions"),
    "reward": ("preference", "ranking"),
    "dpo": ("preference",),
    "ppo": ("prompt",),
    "grpo": ("prompt",),
}


class Model(Section):
    """Where training begins: a folder, a hub id, or a run; `init: random` reads its `config.json` alone.

    `config` is a `config.json` by itself, a shape without weights: what `jaxft plan` looks at. `quantize`: the kernels
    of the base in 4 or 8 bits, with adapters trained over them (QLoRA); None: as the checkpoint has them. `pooling`:
    how a text or image becomes one vector, where that should not be as the family or the sentence-transformers folder
    has it.
    """

    path: Text | None = None
    config: Text | None = None
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    quantize: Literal["nf4", "int8"] | None = None
    remat: Literal["none", "full", "auto"] = "auto"
    pooling: Literal["cls", "mean", "max", "last"] | None = None

    @property
    def source(self) -> str:
        """Where the weights are.

        Raises:
            ConfigError: There is a shape alone.
        """
        if self.path is None:
            raise ConfigError("model.config is a shape without weights, for jaxft plan: set model.path to train")
        return self.path


class Source(Section):
    """One source of rows; `columns` maps the format's names to the file's."""

    path: Text
    format: Format
    name: Text
    weight: Positive = 1.0
    columns: dict[str, str] = Field(default_factory=dict)
    split: str = "train"


class TemplateText(Section):
    """The text around an instruction, with an input and without."""

    prompt_input: str
    prompt_no_input: str

    @field_validator("prompt_input", "prompt_no_input")
    @classmethod
    def _has_its_places(cls, text: str, info: ValidationInfo) -> str:
        places = ("instruction", "input") if info.field_name == "prompt_input" else ("instruction",)
        if set(re.findall(r"{(\w*)}", text)) != set(places):
            wanted = " and ".join(f"{{{place}}}" for place in places)
            raise wrong(f"it must hold {wanted} and no other {{...}}, this is {text!r}")
        return text


class Data(Section):
    """Rows for training, and held-out rows; packed, a row of `batch_size` is a pack of `max_length` tokens.

    `score_range`: lowest and highest score of `scored_pairs`.
    """

    train: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)]
    eval: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)] | None = None
    format: Format | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = False
    score_range: Annotated[tuple[Finite, Finite], Field(strict=False)] = (0.0, 1.0)
    template: TemplateText | None = None
    skip_bad_rows: bool = False

    @field_validator("score_range")
    @classmethod
    def _rises(cls, span: tuple[float, float]) -> tuple[float, float]:
        if not span[0] < span[1]:
            raise wrong(f"the lowest score and then the highest are expected, these are {span[0]} and {span[1]}")
        return span

    @field_validator("train", "eval")
    @classmethod
    def _names_differ(cls, sources: tuple[Source, ...] | None) -> tuple[Source, ...] | None:
        names = [source.name for source in sources or ()]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise wrong(f"two sources have the name {name!r}: give one another", f"{i}.name")
        return sources


class Optimizer(Section):
    """How the trained leaves are moved."""

    name: Literal["adamw", "adam", "sgd", "lion", "adafactor"] = "adamw"
    learning_rate: Positive = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    clip_norm: Positive | None = None
    b1: Share | None = None
    b2: Share | None = None
    eps: Positive | None = None


class Train(Section):
    """How long, in which batches, and what is written when."""

    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Count = 10
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2

    @field_validator("epochs")
    @classmethod
    def _one_length(cls, epochs: float | None, info: ValidationInfo) -> float | None:
        if epochs is not None and info.data.get("steps") is not None:
            raise wrong("steps and epochs both say how long to train: leave one out")
        return epochs

    @field_validator("accumulate")
    @classmethod
    def _divides(cls, accumulate: int, info: ValidationInfo) -> int:
        rows = info.data.get("batch_size", 0)  # 0 where it is wrong itself
        if rows % accumulate:
            raise wrong(f"batch_size {rows} does not divide by {accumulate}")
        return accumulate


class Mesh(Section):
    """Devices along each axis; -1: what is left."""

    data: Annotated[int, Field(ge=-1)] = -1
    fsdp: Annotated[int, Field(ge=-1)] = 1
    tensor: Annotated[int, Field(ge=-1)] = 1


class Evaluation(Section):
    """What is measured on the held-out rows besides the loss."""

    exact_match: bool = False
    scores: Annotated[tuple[Literal["bleu", "rouge"], ...], Field(strict=False)] = ()
    max_new_tokens: Count = 64
    samples: Annotated[int, Field(ge=0)] = 4
    rows: Count | None = None
    batch_size: Count | None = None


class Classify(Section):
    """What a classification needs besides: names of the classes (None: those that occur), or numbers to be met.

    `contrastive_steps`: so many steps first pull the vectors of a class together (at `temperature`); the head follows.
    """

    labels: Annotated[tuple[Text, ...], Field(min_length=2, strict=False)] | None = None
    problem: Literal["single_label", "regression"] = "single_label"
    contrastive_steps: Annotated[int, Field(ge=0)] = 0
    temperature: Positive = 0.1


class Augmentation(Section):
    """How two views of one image are made: as `jaxft.data.Augmentation`, 0 leaves a change out."""

    crop: Annotated[float, Field(gt=0, le=1)] = 0.2
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    jitter: Annotated[float, Field(ge=0, le=1)] = 0.8
    brightness: Share = 0.4
    contrast: Share = 0.4
    saturation: Share = 0.4
    grey: Annotated[float, Field(ge=0, le=1)] = 0.2
    blur: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    noise_std: Annotated[float, Field(ge=0)] = 0.05


class Contrastive(Section):
    """What pulls positives together and pushes negatives apart; `loss` None: the one that goes with the format.

    What is left out has the default of the loss. `chunk`: rows that are in memory at once, of a batch that would not
    fit (gradient caching).
    """

    loss: ContrastiveKind | None = None
    temperature: Positive | None = None
    learn_temperature: bool = False
    symmetric: bool | None = None
    margin: Positive | None = None
    chunk: Count | None = None
    augmentation: Augmentation | None = None


class Contestant(Section):
    """What `jaxft compare` trains under one name: a method, and the learning rate that suits it."""

    method: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, strict=False)] | None = None
    learning_rate: Positive | None = None


class Config(Section):
    """A run. Paths are relative to the working directory.

    What must fit across its sections, `load_config` checks.
    """

    task: Literal["sft", "classify", "contrastive", "reward", "dpo", "ppo", "grpo"]
    model: Model
    method: Annotated[tuple[dict[str, Any], ...], Field(min_length=1, strict=False)] | None = None
    data: Data
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    mesh: Mesh | None = None
    evaluation: Evaluation = Evaluation()
    classify: Classify | None = None
    contrastive: Contrastive | None = None
    reward: RewardModel | None = None
    dpo: Dpo | None = None
    ppo: Ppo | None = None
    grpo: Grpo | None = None
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    compare: dict[Annotated[str, Field(pattern=r"^\w[\w.+-]*$")], Contestant] = Field(default_factory=dict)
    output: Text

    def make_method(self) -> Method | None:
        """Return the method, a union where there are several; None where it is left out."""
        if self.method is None:
            return None
        made = [make_one(part) for part in self.method]
        whole = made[0]
        for part in made[1:]:
            whole = whole | part
        return whole


def make_one(options: dict[str, Any]) -> Method:
    """Return the method that a mapping of its name and options describes.

    >>> make_one({"name": "bitfit", "create": True})
    BitFit(create=True)
    """
    return METHODS[options["name"]](**{key: frozen(value) for key, value in options.items() if key != "name"})


def frozen(value: Any) -> Any:
    """Return a list as the tuple that a method holds."""
    return tuple(value) if isinstance(value, list) else value


def keys_at(path: tuple[str | int, ...]) -> list[str]:
    """Return the keys that the section at a path may hold.

    >>> keys_at(("data", "template"))
    ['prompt_input', 'prompt_no_input']
    """
    section: Any = Config
    for step in path:
        known = section.model_fields if isinstance(section, type) and issubclass(section, BaseModel) else {}
        if step in known:  # an index of a list, or a name that the user gives, leads to the section as it is
            section = _section(known[step].annotation)
    return list(section.model_fields) if isinstance(section, type) and issubclass(section, BaseModel) else []


def _section(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _section(arg)) is not None), None)

"""What a config may hold: every key with its type, bounds and default."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ..methods import METHODS, Method

Format = Literal["instruction", "prompt_completion", "messages", "text"]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


def wrong(key: str, message: str) -> PydanticCustomError:
    """Return the error of a key that does not go with the others of its section."""
    return PydanticCustomError("jaxft", "{message}", {"key": key, "message": message})


class Section(BaseModel):
    """A part of a config: strict types, no unknown key, not to be changed."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Model(Section):
    """Where training begins: a folder, a hub id, or a run; `init: random` reads its `config.json` alone."""

    path: str
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    remat: Literal["none", "full", "auto"] = "auto"


class Source(Section):
    """One source of rows; `columns` maps the format's names to the file's."""

    path: str
    format: Format
    name: str
    weight: Positive = 1.0
    columns: dict[str, str] = {}
    split: str = "train"


class TemplateText(Section):
    """The text around an instruction, with an input and without."""

    prompt_input: str
    prompt_no_input: str


class Data(Section):
    """Rows for training, and held-out rows."""

    train: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)]
    eval: Annotated[tuple[Source, ...], Field(min_length=1, strict=False)] | None = None
    format: Format | None = None
    max_length: Annotated[int, Field(ge=2)] = 1024
    packing: bool = False
    template: TemplateText | None = None
    skip_bad_rows: bool = False

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.packing:
            raise wrong("packing", "packed rows are not supported yet: leave it out")
        return self


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

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise wrong("epochs", "steps and epochs both say how long to train: leave one out")
        if self.batch_size % self.accumulate:
            raise wrong("accumulate", f"batch_size {self.batch_size} does not divide by {self.accumulate}")
        return self


class Evaluation(Section):
    """What is measured on the held-out rows besides the loss."""

    exact_match: bool = False
    scores: Annotated[tuple[Literal["bleu", "rouge"], ...], Field(strict=False)] = ()
    max_new_tokens: Count = 64
    samples: Annotated[int, Field(ge=0)] = 4
    rows: Count | None = None
    batch_size: Count | None = None


class Config(Section):
    """A run. Paths are relative to the working directory."""

    task: Literal["sft"]
    model: Model
    method: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] | None = None
    data: Data
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluation: Evaluation = Evaluation()
    trackers: Annotated[tuple[Literal["tensorboard", "wandb"], ...], Field(strict=False)] = ()
    output: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        steps = self.train.steps
        if steps is not None and self.optimizer.warmup_steps >= steps:
            raise wrong("optimizer.warmup_steps", f"{self.optimizer.warmup_steps} of {steps} steps: none would be left")
        if self.data.eval is None and (self.evaluation.exact_match or self.evaluation.scores):
            raise wrong("evaluation", "answers are compared on held-out rows: set data.eval")
        return self

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
    """Return the method that a mapping of its name and options describes."""
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items() if k != "name"}
    return METHODS[options["name"]](**given)

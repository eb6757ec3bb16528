"""The tasks, by the name that a config gives and the rows that it reads."""

from ..config import Config
from ..errors import ConfigError
from .classify import ImageClassification, TextClassification
from .contrastive import TextContrast
from .grpo import GroupOptimization
from .images import ImageContrast, RegionContrast
from .ppo import PolicyOptimization
from .sft import SupervisedTuning
from .task import Task

TASKS: dict[str, tuple[type[Task], ...]] = {
    "sft": (SupervisedTuning,),
    "classify": (TextClassification, ImageClassification),
    "contrastive": (TextContrast, ImageContrast, RegionContrast),
    "ppo": (PolicyOptimization,),
    "grpo": (GroupOptimization,),
}


def task_of(config: Config) -> Task:
    """Return the task of a config.

    Raises:
        ConfigError: Its sources hold rows that no one model reads.
    """
    forms = {source.format for source in (*config.data.train, *(config.data.eval or ()))}
    for task in TASKS[config.task]:
        if forms <= set(task.formats):
            return task(config)
    raise ConfigError(f"data: rows of formats {', '.join(sorted(forms))} do not go together in one run")

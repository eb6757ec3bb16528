"""The tasks, by the name that a config gives and the rows that it reads."""

from ..config import Config
from ..errors import ConfigError
from .classify import ImageClassification, TextClassification
from .contrastive import TextContrast
from .dpo import PreferenceOptimisation
from .grpo import GroupOptimization
from .images import ImageContrast, RegionContrast
from .ppo import PolicyOptimization
from .reward import RewardModelling
from .sft import SupervisedTuning
from .task import Task

TASKS: dict[str, tuple[type[Task], ...]] = {
    "sft": (SupervisedTuning,),
    "classify": (TextClassification, ImageClassification),
    "contrastive": (TextContrast, ImageContrast, RegionContrast),
    "reward": (RewardModelling,),
    "dpo": (PreferenceOptimisation,),
    "ppo": (PolicyOptimization,),
    "grpo": (GroupOptimization,),
}


def task_of(config: Config, begun: Config | None = None) -> Task:
    """Return the task of a config, and of what a finished run was begun with that it looks at.

    Raises:
        ConfigError: Its sources hold rows that no one model reads.
    """
    forms = {source.format for source in (*config.data.train, *(config.data.eval or ()))}
    for task in TASKS[config.task]:
        if forms <= set(task.formats):
            return task(config, begun)
    raise ConfigError(f"data: rows of formats {', '.join(sorted(forms))} do not go together in one run")

"""The tasks, by the name that a config gives."""

from ..config import Config
from .sft import SupervisedTuning
from .task import Task

TASKS: dict[str, type[Task]] = {"sft": SupervisedTuning}


def task_of(config: Config) -> Task:
    """Return the task of a config."""
    return TASKS[config.task](config)

"""The one family of errors a user may see: each says what, where, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class JaxftError(ValueError):
    """Base of every error that a user's input can cause; catch this one to catch them all."""


class CheckpointError(JaxftError):
    """A model or adapter folder that is missing, damaged, or does not fit."""


class MethodError(JaxftError):
    """A method whose options are wrong, or that cannot be attached to this model."""


class SelectionError(JaxftError):
    """A name, pattern or type that selects nothing."""


class PartitionError(JaxftError):
    """Two parts of a model that overlap, or leave a leaf out."""


class BatchError(JaxftError):
    """A batch that cannot be trained on."""


class MeshError(JaxftError):
    """A mesh that the devices cannot form, or a parameter that does not divide over it."""


class OptimizerError(JaxftError):
    """Something given as an optimiser that is none."""


class ConfigError(JaxftError):
    """A config file, or a value given on the command line, that is not what it should be."""


class DataError(JaxftError):
    """Rows that cannot be read, or cannot be turned into examples."""


class RunError(JaxftError):
    """A run folder that is in the way or is not one, or a package that a run needs and that is not installed."""


class GenerationError(JaxftError):
    """A request for text that the model cannot serve."""


class RewardError(JaxftError):
    """A reward that cannot be had, or that is not one finite number for each answer."""


def refuse(kind: type[JaxftError], headline: str, problems: Iterable[str], limit: int = 20) -> None:
    """Raise `kind` with every problem on a line of its own; do nothing where there are none.

    Args:
        kind: Class of the error.
        headline: First line: what was being done, and on what.
        problems: One sentence each.
        limit: Problems written out; the rest is counted.
    """
    found = list(problems)
    if not found:
        return
    more = [f"... and {len(found) - limit} more"] if len(found) > limit else []
    raise kind("\n  - ".join([headline, *found[:limit], *more]))


def nearest(name: str, known: Iterable[str], n: int = 5) -> str:
    """Say which of the known names are close to `name`, or what there is.

    >>> nearest("q_prj", ["q_proj", "v_proj", "lm_head"])
    "nearest: 'q_proj', 'v_proj'"
    """
    known = sorted(set(known))
    close = get_close_matches(name, known, n=n, cutoff=0.5)
    listed = ", ".join(repr(k) for k in (close or known[: 2 * n]))
    return f"nearest: {listed}" if close else f"there are: {listed}"

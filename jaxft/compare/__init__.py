"""Methods side by side: the same data, seed and budget for each, a table and a picture."""

from .contestants import Contestant, contestants
from .picture import draw_methods, draw_sweep
from .runs import run_all
from .table import as_markdown, measure

__all__ = ["Contestant", "as_markdown", "contestants", "draw_methods", "draw_sweep", "measure", "run_all"]

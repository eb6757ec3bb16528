"""Configs: typed, strict YAML; every error at once, with file, line, key and the nearest right key."""

from .load import dump_config, load_config
from .schema import Config, Source

__all__ = ["Config", "Source", "dump_config", "load_config"]

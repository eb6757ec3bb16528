"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import jaxft

MODULES = [m.name for m in pkgutil.walk_packages(jaxft.__path__, "jaxft.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    found = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(found) >= 30

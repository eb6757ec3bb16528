"""The errors render: all problems at once, the nearest name, one family."""

import pytest

import jaxft
from jaxft.errors import nearest, refuse


def test_all_problems_at_once_and_the_rest_counted():
    with pytest.raises(jaxft.BatchError) as caught:
        refuse(jaxft.BatchError, "a batch", (f"problem {i}" for i in range(30)), limit=3)
    assert str(caught.value) == "a batch\n  - problem 0\n  - problem 1\n  - problem 2\n  - ... and 27 more"


def test_nothing_to_refuse():
    refuse(jaxft.BatchError, "a batch", [])


def test_nearest_names():
    assert nearest("qproj", ["q_proj", "down_proj", "lm_head"]).startswith("nearest: 'q_proj'")
    assert nearest("xyz", ["a", "b"]) == "there are: 'a', 'b'"


def test_one_family():
    kinds = [getattr(jaxft, name) for name in jaxft.__all__ if name.endswith("Error")]
    assert len(kinds) == 13
    assert all(issubclass(kind, jaxft.JaxftError) and issubclass(kind, ValueError) for kind in kinds)

"""One process writes to a run; a second one leaves before it touches anything."""

import pytest

from jaxft.errors import RunError
from jaxft.run import RunFolder


def times(folder):
    return {p: p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def test_the_second_leaves_everything_as_it_is(place, job, run):
    begun = job("held")
    with RunFolder(place / "held").claim():
        before = times(place / "held")
        for more in ((), ("--resume",)):
            code, said = run("train", "c.yaml", "--output", "held", *more)
            assert code == 2
            assert "is at this run; wait for its end, or give another `output`" in said
        with pytest.raises(RunError, match=r"held: process \d+ on \S+ is at this run"):
            begun.train()
        assert times(place / "held") == before


def test_a_lock_of_a_dead_process_is_taken_over(place, run):
    folder = RunFolder(place / "stale")
    with folder.claim():
        pass
    folder.lock.write_text("process 1 on elsewhere\n")
    assert run("train", "c.yaml", "--output", "stale", "--set", "train.steps=2", "--set", "data.eval=null")[0] == 0
    assert "elsewhere" not in folder.lock.read_text()

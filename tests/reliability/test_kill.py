"""Processes are really killed, and the run ends with the bits of the unbroken one."""

import random
import re
import signal

import pytest
from conftest import adapter, half_written, logged

from jaxft.data import TrainBatches
from jaxft.train.checkpoint import Checkpoints

KILLS = 3
pytestmark = pytest.mark.slow


def test_killed_at_random_steps_and_inside_a_save(whole, place, child):
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown where the test fails
    dice = random.Random(seed)
    folder, inside, began = place / "killed", 0, []
    for n in range(KILLS + 1):
        one = child("train", "c.yaml", "--output", "killed", *["--resume"] * (n > 0))
        if n < KILLS:
            goal = len(logged(folder)) + dice.randint(2, 4)
            one.wait_until(lambda goal=goal: len(logged(folder)) >= goal and half_written(folder))
            one.process.send_signal(signal.SIGKILL)
        code, said = one.end()
        assert code == (-signal.SIGKILL if n < KILLS else 0), said
        inside += bool(half_written(folder))
        began += map(int, re.findall(r"going on after step (\d+)", said))
    assert len(began) == KILLS
    assert 0 < began[0] < began[1] < began[2] < 16
    assert inside >= 1
    assert not half_written(folder)
    assert adapter(folder) == adapter(whole)
    assert logged(folder) == logged(whole)
    assert [step for step, *_ in logged(whole)] == list(range(1, 17))


def dropped_position(monkeypatch):
    iterate = TrainBatches.iterate
    monkeypatch.setattr(TrainBatches, "iterate", lambda self, start=0: iterate(self, 0))


def another_key(monkeypatch):
    restore = Checkpoints.restore
    monkeypatch.setattr(Checkpoints, "restore", lambda self, state: _new_key(restore(self, state)))


def _new_key(state):
    import jax

    return state.replace(key=jax.random.fold_in(state.key, 1))


@pytest.mark.parametrize("wrong", [dropped_position, another_key])
def test_the_comparison_can_fail(whole, place, job, monkeypatch, wrong):
    """The same with the position in the data dropped, or with other randomness: the bits are others."""
    output = wrong.__name__
    save = Checkpoints.save

    def stop(self, state):
        save(self, state)
        if int(state.step) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        job(output).train()
    monkeypatch.setattr(Checkpoints, "save", save)
    wrong(monkeypatch)
    job(output, True).train()
    assert logged(place / output)[:7] == logged(whole)[:7]
    assert logged(place / output)[7] != logged(whole)[7]
    assert adapter(place / output) != adapter(whole)

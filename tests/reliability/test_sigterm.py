"""SIGTERM: the step is finished and saved, the exit code is 75, and the run goes on from there."""

import json
import re
import signal
import socket

import pytest
from conftest import adapter, half_written, logged

from jaxft.tasks.sft import SupervisedTuning
from jaxft.train.stop import Stop, Stopped

NEVER = ("--set", "train.save_every=null")  # what is saved is saved because of the signal


@pytest.mark.slow
def test_two_signals_and_another_writer(whole, place, child, run):
    """A process is asked to stop, and once more while it saves; before, another one wants to write there."""
    folder = place / "term"
    one = child("train", "c.yaml", "--output", "term", *NEVER)
    one.wait_until(lambda: len(logged(folder)) >= 3)
    one.process.send_signal(signal.SIGSTOP)  # it may not end while the other one begins
    code, said = run("train", "c.yaml", "--output", "term", "--resume", *NEVER)
    assert code == 2
    assert f"term: process {one.process.pid} on {socket.gethostname()} is at this run" in said
    one.process.send_signal(signal.SIGTERM)
    one.process.send_signal(signal.SIGCONT)
    one.wait_until(lambda: half_written(folder))
    one.process.send_signal(signal.SIGTERM)
    code, said = one.end()
    assert code == 75, said
    step = int(re.search(r"stopped after step (\d+), which is saved; --resume goes on", said)[1])
    assert 3 <= step < 16
    assert step == len(logged(folder))
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name[0].isdecimal()] == [str(step)]
    code, said = run("train", "c.yaml", "--output", "term", "--resume", *NEVER)
    assert (code, f"going on after step {step}" in said) == (0, True)
    assert adapter(folder) == adapter(whole)
    assert logged(folder) == logged(whole)


@pytest.mark.parametrize("at", [8, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 16))])
def test_during_an_evaluation(whole, place, job, monkeypatch, at):
    """It is left at once, and made when the run goes on."""
    evaluate, calls = SupervisedTuning.evaluate, []

    def slow(*given):
        calls.append(0)
        if len(calls) == 1 + at // 8:
            signal.raise_signal(signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return evaluate(*given)

    monkeypatch.setattr(SupervisedTuning, "evaluate", slow)
    output = f"look{at}"
    with pytest.raises(Stopped, match=f"stopped after step {at}, which is saved"), Stop() as stop:
        job(output, stop=stop).train()
    monkeypatch.setattr(SupervisedTuning, "evaluate", evaluate)
    job(output, True).train()
    assert adapter(place / output) == adapter(whole)
    assert looks(place / output) == looks(whole)
    assert [step for step, _ in looks(whole)] == [0, 8, 16]


def looks(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]


def test_while_it_is_loading(place, run, monkeypatch):
    monkeypatch.setattr(SupervisedTuning, "load_data", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    code, said = run("train", "c.yaml", "--output", "unborn")
    assert (code, said) == (75, "stopped before anything was trained\n")
    assert not (place / "unborn").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.slow
def test_seconds_are_of_all_starts(place, job):
    class After(Stop):
        def __call__(self):
            self.asked = len(logged(place / "twice")) >= 5
            return self.asked

    with pytest.raises(Stopped):
        job("twice", stop=After()).train()
    file = place / "twice" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[-1]["seconds"] += 1000
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert 1000 < job("twice", True).train()["seconds"] < 1100
    seconds = [json.loads(line).get("seconds") for line in file.read_text().splitlines()]
    assert [s for s in seconds if s] == sorted(s for s in seconds if s)

"""Plain lines where there is no terminal, a bar where there is one."""

import io

import jaxft.train.progress as module
from jaxft.train.progress import Progress


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


def test_lines_and_the_time_that_is_left(monkeypatch):
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(module, "time", clock)
    with Progress(100, start=10, out=out) as progress:
        for step, now in ((20, 160.0), (30, 170.0), (40, 180.0)):  # the first ten steps were compiled too
            clock.now = now
            progress.update(step, loss=1.5, tokens_per_second=12345.6)
        progress.say("a word")
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 20/100 | loss 1.5000 | 12,346 tokens/s | ETA 0:08:00"
    assert lines[1] == "step 30/100 | loss 1.5000 | 12,346 tokens/s | ETA 0:01:10"
    assert lines[2:] == ["step 40/100 | loss 1.5000 | 12,346 tokens/s | ETA 0:01:00", "a word"]


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = io.StringIO()
    out.isatty = lambda: True
    with Progress(100, out=out) as progress:
        progress.update(50, loss=1.25, tokens_per_second=100.0)
        progress.say("a word [red]")
    text = out.getvalue()
    assert " 50/100" in text
    assert "loss 1.2500 | 100 tokens/s | ETA" in text
    assert "a word [red]" in text
    assert "\x1b[" in text

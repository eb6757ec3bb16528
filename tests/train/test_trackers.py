"""Figures reach the file, the event file and an offline run."""

import json
import struct

import pytest

from jaxft.errors import RunError
from jaxft.train.trackers import TRACKERS, JsonLines, make_trackers


def test_each_line_is_on_the_disk_at_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    tracker = JsonLines(file)
    tracker.log(1, {"loss": 0.1 + 0.2})
    assert json.loads(file.read_text()) == {"step": 1, "loss": 0.1 + 0.2}
    tracker.log(2, {"loss": float("inf")})
    tracker.finish()
    JsonLines(file).finish()  # opened again, what is there stays
    assert [json.loads(line)["loss"] for line in file.read_text().splitlines()] == [0.1 + 0.2, None]


def events(file):
    """Read the records of an event file: length, its checksum, the record, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    raw, at = file.read_bytes(), 0
    while at < len(raw):
        (size,) = struct.unpack_from("<Q", raw, at)
        yield Event.FromString(raw[at + 12 : at + 12 + size])
        at += 16 + size


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    file, board = make_trackers(["tensorboard"], tmp_path, {})
    board.log(7, {"loss": 0.5, "eval_loss/a": 0.25})
    file.finish()
    board.finish()
    (written,) = (tmp_path / "tensorboard").iterdir()
    found = {(v.tag, e.step, v.simple_value) for e in events(written) for v in e.summary.value}
    assert found == {("loss", 7, 0.5), ("eval_loss/a", 7, 0.25)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::pytest.PytestWarning")
def test_wandb_offline(tmp_path, monkeypatch):
    """Its own packages warn; what is looked at is the run that it leaves."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_PROJECT", "a-project")
    file, tracker = make_trackers(["wandb"], tmp_path, {"train": {"steps": 3}})
    tracker.log(7, {"loss": 0.5})
    file.finish()
    tracker.finish()
    wandb.teardown()  # its writer is a process of its own, and is waited for when ours ends: here and now
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    (stored,) = run.glob("*.wandb")
    raw = stored.read_bytes()
    assert b"loss" in raw
    assert b"steps" in raw
    assert b"a-project" in raw


def test_wandb_asks_for_its_project_and_its_error_is_ours(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    asked = {}

    def init(**options):
        asked.update(options)
        raise wandb.Error("no API key")

    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(RunError, match=r"wandb will not begin \(no API key\): log in with `wandb login`"):
        make_trackers(["wandb"], tmp_path, {"a": 1})
    assert asked == {"project": "jaxft", "dir": str(tmp_path), "name": tmp_path.name, "config": {"a": 1}}
    assert not list(tmp_path.iterdir())  # no file was opened before it


def test_what_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(RunError, match="trackers: 'tensorbord' is unknown; nearest: 'tensorboard'"):
        make_trackers(["tensorbord"], tmp_path, {})
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(RunError, match=rf"{name} needs a package: pip install 'jaxft\[{name}\]'"):
            TRACKERS[name](tmp_path, {})

"""A run on a mesh: the figures of one device, its own bits when it goes on after a stop, and who uses what is said."""

import contextlib
import json

import pytest
from conftest import adapter, logged

import jaxft
from jaxft.config import load_config
from jaxft.tasks.train import Job
from jaxft.train.stop import Stopped

MESH = [
    "mesh={data: 2, fsdp: 2, tensor: 2}",
    "train.batch_size=8",
    "data.packing=true",
    "data.max_length=20",
    "train.steps=6",
]
EVERY = ["train.save_every=2", "train.eval_every=3"]


class StopAt:
    """Asks to stop when it has been asked so many times, once a step and when the loop has ended."""

    def __init__(self, times):
        self.left = times

    def __call__(self):
        self.left -= 1
        return self.left < 0

    def at_once(self):
        from contextlib import nullcontext

        return nullcontext()


@pytest.fixture(scope="module")
def mesh(place):
    """An unbroken run on a mesh."""
    with contextlib.chdir(place):
        Job(load_config("c.yaml", [*MESH, *EVERY, "output=mesh"]), say=lambda _: None).train()


@pytest.mark.slow
def test_a_mesh_gives_the_figures_of_one_device(mesh, job, place):
    job("alone", False, *MESH[1:], *EVERY).train()
    split, alone = logged(place / "mesh"), logged(place / "alone")
    assert len(split) == len(alone) == 6
    for (step, loss, norm, tokens), (_, loss_alone, norm_alone, tokens_alone) in zip(split, alone, strict=True):
        assert loss == pytest.approx(loss_alone, abs=1e-4), step  # Adam's parameters drift by rounding
        assert norm == pytest.approx(norm_alone, rel=1e-3)
        assert tokens == tokens_alone
    summary = json.loads((place / "mesh/summary.json").read_text())
    assert summary["after"]["eval_loss"] == pytest.approx(
        json.loads((place / "alone/summary.json").read_text())["after"]["eval_loss"], abs=1e-3
    )


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits(mesh, job, place):
    with pytest.raises(Stopped, match="after step [2-5],") as stopped:
        job("stopped", False, *MESH, *EVERY, stop=StopAt(4)).train()
    said = []
    job("stopped", True, *MESH, *EVERY, say=said.append).train()
    assert f"going on {str(stopped.value).removeprefix('stopped ').partition(',')[0]}" in said
    assert adapter(place / "stopped") == adapter(place / "mesh")
    assert logged(place / "stopped") == logged(place / "mesh")


@pytest.mark.slow
def test_another_mesh_is_another_config(mesh, job):
    with pytest.raises(jaxft.RunError, match="mesh.fsdp: 2 then, 4 now"):
        job("mesh", True, "mesh={data: 1, fsdp: 4, tensor: 2}", *MESH[1:], *EVERY).train()


def test_rows_that_do_not_divide_are_told_before_rows_are_read(job):
    with pytest.raises(jaxft.MeshError, match="take a multiple of 8"):
        job("other", False, MESH[0], "train.batch_size=6", "data.train=nowhere.jsonl")

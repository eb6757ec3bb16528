"""Classification and contrastive tuning of images and of regions of images, from the command line."""

import json

import numpy as np
import pytest

import jaxft

CONFIG = """task: {task}
model: {{path: base}}
method: {{name: {method}}}
data: {{train: {data}, eval: {data}, format: {form}}}
optimizer: {{learning_rate: 1e-3}}
train: {{steps: 2, batch_size: 4, log_every: 1}}
{section}
output: {name}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a ViT, images of two classes, some without labels, and one with boxes."""
    from PIL import Image

    where = tmp_path_factory.mktemp("place")
    jaxft.save_model(jaxft.testing.tiny_vit(), where / "base")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 120, (10, 8, 8, 3)).astype(np.uint8)
    images[::2, :4] += 100
    np.savez(where / "pictures.npz", x=images, y=np.array(["top", "plain"] * 5))
    np.savez(where / "bare.npz", x=images)
    for i, image in enumerate(images):
        Image.fromarray(image).save(where / f"{i}.png")
    rows = [
        {
            "image": f"{i}.png",
            "boxes": [[0, 0, 8, 4], [0, 4, 8, 8]],
            "labels": ["bright" if i % 2 == 0 else "dark", "dark"],
        }
        for i in range(10)
    ]
    (where / "boxes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return where


@pytest.fixture
def train(place, run):
    """Return a function that trains a config: exit code, stdout, stderr."""

    def go(name, task, data, form="images", method="lora", section=""):
        given = {"name": name, "task": task, "data": data, "form": form, "method": method, "section": section}
        (place / f"{name}.yaml").write_text(CONFIG.format(**given))
        return run("train", f"{name}.yaml")

    return go


def after(folder):
    return json.loads((folder / "summary.json").read_text())["after"]


def test_classes(place, train, run):
    code, _, err = train("classes", "classify", "pictures.npz")
    assert code == 0, err
    assert {"eval_loss", "eval_accuracy", "eval_f1"} <= set(after(place / "classes"))
    model, _ = jaxft.load(place / "classes")
    assert model.config.labels == ("plain", "top")
    code, _, err = run("export", "classes", "--format", "merged", "--output", "classes-merged")
    assert code == 0, err
    assert jaxft.load(place / "classes-merged")[0].config.labels == ("plain", "top")


@pytest.mark.slow
def test_two_views(place, train):
    code, _, err = train("views", "contrastive", "pictures.npz", method="full")
    assert code == 0, err
    assert {"eval_loss", "eval_knn_accuracy", "eval_probe_accuracy"} <= set(after(place / "views"))
    assert (place / "views" / "report" / "embedding.png").is_file()
    code, _, err = train("bare", "contrastive", "bare.npz")
    assert code == 0, err
    assert set(after(place / "bare")) == {"eval_loss", "eval_in_batch_accuracy", "eval_temperature"}


@pytest.mark.slow
def test_views_of_a_class(place, train):
    section = "contrastive: {loss: supervised_contrastive}"
    code, _, err = train("same", "contrastive", "pictures.npz", section=section)
    assert code == 0, err
    code, _, err = train("unknown", "contrastive", "bare.npz", section=section)
    assert (code, "supervised_contrastive needs labels" in err) == (2, True)
    code, _, err = train("unknown", "classify", "bare.npz")
    assert (code, "bare: images without labels" in err) == (2, True)


def test_regions(place, train):
    code, _, err = train("regions", "contrastive", "boxes.jsonl", "regions")
    assert code == 0, err
    assert {"eval_loss", "eval_knn_accuracy", "eval_probe_accuracy"} <= set(after(place / "regions"))


def test_a_model_of_texts_reads_no_images(place, train, run):
    jaxft.save_model(jaxft.testing.tiny_bert(), place / "words")
    train("words-run", "classify", "pictures.npz")
    code, _, err = run("validate", "words-run.yaml", "--set", "model.path=words")
    assert (code, "it reads texts, and these rows are images" in err) == (2, True)

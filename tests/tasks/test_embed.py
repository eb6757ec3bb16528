"""The commands `embed` and `export --format sentence-transformers`."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from texts import make_tokenizer

import jaxft
from jaxft.data import ImageProcessor
from jaxft.embedding import embed_images
from jaxft.loading import with_config
from jaxft.models.sentence_folder import read_sentence_folder

TEXTS = ["the cat", "it", "the end of the cat on the mat", "on the mat"]
CONFIG = """task: contrastive
model: {path: st}
method: {name: METHOD}
data: {train: pairs.jsonl, format: pairs}
train: {steps: 2, batch_size: 4}
output: run-METHOD
"""


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A sentence-transformers folder, a plain model, one of images, and rows for them."""
    where = tmp_path_factory.mktemp("place")
    model, tokenizer = jaxft.testing.tiny_bert(vocab_size=300), make_tokenizer()
    jaxft.save_model(model, where / "plain", tokenizer)
    said = with_config(model, pooling="cls", normalize=True, max_seq_length=9)
    jaxft.save_sentence_transformer(said, where / "st", tokenizer, prompts={"query": "q: "})
    jaxft.save_model(jaxft.testing.tiny_vit(), where / "vit")
    jsonl(where / "texts.jsonl", [{"text": text, "n": i} for i, text in enumerate(TEXTS)])
    jsonl(where / "said.jsonl", [{"said": text} for text in TEXTS])
    jsonl(where / "pairs.jsonl", [{"anchor": text, "positive": f"{text} it"} for text in TEXTS * 2])
    np.savez(where / "pictures.npz", x=np.arange(3 * 8 * 8 * 3, dtype=np.uint8).reshape(3, 8, 8, 3))
    (where / "folder").mkdir()
    for i in range(3):
        Image.fromarray(np.full((5 + i, 7), 60 * i, np.uint8)).save(where / "folder" / f"{i}.png")
    return where


def left(place):
    return sorted(path.name for path in place.iterdir() if path.name.startswith((".", "out")))


def test_texts_to_npy(run, place):
    code, out, err = run("embed", "st", "texts.jsonl", "--output", "out.npy")
    assert code == 0, err
    assert out == "4 vectors of 32 in out.npy\n"
    found = np.load(place / "out.npy")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, jaxft.embed(*jaxft.load(place / "st"), TEXTS), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert run("embed", "st", "said.jsonl", "--column", "said", "--batch-size", 1, "--output", "out.npy")[0] == 0
    np.testing.assert_allclose(np.load(place / "out.npy"), found, atol=1e-5)
    assert run("embed", "st", "texts.jsonl", "--no-normalize", "--max-length", 4, "--output", "out.npy")[0] == 0
    want = jaxft.embed(*jaxft.load(place / "st"), TEXTS, max_length=4, normalize=False)
    np.testing.assert_allclose(np.load(place / "out.npy"), want, atol=1e-6)


def test_texts_to_parquet_with_an_adapter(run, place):
    model, tokenizer = jaxft.load(place / "plain")
    adapted = jaxft.attach(model, jaxft.LoRA(r=2))
    for path, variable in jaxft.models.names.variables(adapted).items():
        if path.endswith(".b"):
            variable.set_value(variable.get_value() + 0.1)
    jaxft.save_adapter(adapted, place / "adapter")
    code, _, err = run("embed", "plain", "texts.jsonl", "--adapter", "adapter", "--output", "out.parquet")
    assert code == 0, err
    table = pq.read_table(place / "out.parquet")
    assert table["text"].to_pylist() == TEXTS
    assert table["place"].to_pylist() == [f"texts.jsonl:{i}" for i in range(1, 5)]
    found = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, jaxft.embed(adapted, tokenizer, TEXTS), atol=1e-6)
    assert np.abs(found - jaxft.embed(model, tokenizer, TEXTS)).max() > 1e-3


def test_images(run, place):
    model, processor = jaxft.load(place / "vit")
    for source, count in (("pictures.npz", 3), ("folder", 3)):
        assert run("embed", "vit", source, "--batch-size", 2, "--output", "out.npy")[0] == 0
        images = jaxft.data.load_images(place / source, processor)
        want = model.pooled(**images.batch(slice(None)))
        np.testing.assert_allclose(np.load(place / "out.npy"), want, atol=1e-5)
        assert len(want) == count


def test_labels_of_images_count_nothing(run, place):
    rows = [{"file": "folder/0.png", "label": -1}, {"file": "folder/1.png"}, {"file": "folder/2.png", "label": 2.5}]
    jsonl(place / "images.jsonl", rows)
    code, _, err = run("embed", "vit", "images.jsonl", "--column", "file", "--output", "out.npy")
    assert code == 0, err
    want = embed_images(jaxft.load(place / "vit")[0], jaxft.data.load_images(place / "folder", ImageProcessor((8, 8))))
    np.testing.assert_allclose(np.load(place / "out.npy"), want, atol=1e-6)


WRONG = {
    "ending": (("st", "texts.jsonl", "--output", "out.csv"), r"out.csv: give a file that ends in .npy or .parquet"),
    "folder": (("st", "texts.jsonl", "--output", "none/out.npy"), "there is no folder none"),
    "no column": (("st", "said.jsonl", "--output", "out2.npy"), r"said.jsonl:1: text: .*no such column"),
    "column": (("st", "texts.jsonl", "--column", "x", "--output", "out2.npy"), "x: the row has no such column"),
    "empty": (
        ("st", "bad.jsonl", "--output", "out2.npy"),
        r"(?s)bad.jsonl:2: text: it is empty.*bad.jsonl:3: not valid",
    ),
    "length": (("st", "texts.jsonl", "--max-length", 99, "--output", "out2.npy"), "the model reads 9 tokens at most"),
    "no room": (
        ("st", "texts.jsonl", "--max-length", 1, "--output", "out2.npy"),
        "max_length 1: 1 special tok",
    ),
    "tokens": (("vit", "folder", "--max-length", 9, "--output", "out2.npy"), "--max-length 9: the model reads images"),
    "no table": (
        ("vit", "folder", "--column", "x", "--output", "out2.npy"),
        r"folder: it is no table, so it has no column to name \(--column x",
    ),
    "image": (("vit", "broken", "--output", "out2.npy"), r"broken.1\.png"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_and_nothing_written(case, run, place):
    jsonl(place / "bad.jsonl", [{"text": "a"}, {"text": ""}])
    with (place / "bad.jsonl").open("a") as file:
        file.write("{\n")
    (place / "broken").mkdir(exist_ok=True)
    Image.new("RGB", (4, 4)).save(place / "broken" / "0.png")
    (place / "broken" / "1.png").write_bytes(b"no picture")
    before = left(place)
    args, says = WRONG[case]
    code, out, err = run("embed", *args)
    assert (code, out) == (2, "")
    assert re.search(says, err), err
    assert left(place) == before


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_is_embedded_with_and_exported(method, run, place):
    """Pooling, normalisation, length and prompts of the folder that it began with are the run's, and the export's."""
    (place / f"{method}.yaml").write_text(CONFIG.replace("METHOD", method))
    code, _, err = run("train", f"{method}.yaml")
    assert code == 0, err
    assert run("embed", f"run-{method}", "texts.jsonl", "--output", "out.npy")[0] == 0
    want = np.load(place / "out.npy")
    np.testing.assert_allclose(np.linalg.norm(want, axis=1), 1, atol=1e-6)
    forms = ["sentence-transformers"] + (["sentence-transformers-adapter"] if method == "lora" else [])
    for form in forms:
        code, _, err = run("export", f"run-{method}", "--format", form, "--output", f"{form}-{method}")
        assert code == 0, err
        model, tokenizer = jaxft.load(place / f"{form}-{method}")
        assert bool(jaxft.adapters(model)) == form.endswith("adapter")
        np.testing.assert_allclose(jaxft.embed(model, tokenizer, TEXTS), want, atol=1e-6)
        assert read_sentence_folder(place / f"{form}-{method}").prompts == {"query": "q: "}
    if method == "full":
        code, _, err = run("export", "run-full", "--format", "sentence-transformers-adapter", "--output", "no")
        assert code == 2
        assert "there is no adapter" in err

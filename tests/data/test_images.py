"""Pictures of every source give the same numbers; every fault has its file or row."""

import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft.data import ImageProcessor, load_images, read_processor
from jaxft.data.pixels import grey_levels

PICTURES = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
LABELS = ["hat", "shoe", "hat", "coat"]
SIX = ImageProcessor((6, 6))


def in_folder(place):
    for i, (picture, label) in enumerate(zip(PICTURES, LABELS, strict=True)):
        (place / label).mkdir(exist_ok=True)
        Image.fromarray(picture).save(place / label / f"{i}.png")
    (place / ".hidden").write_text("no picture")
    return place


def in_npz(place):
    np.savez(place / "a.npz", train_x=PICTURES, train_y=LABELS, test_x=PICTURES[:1], test_y=LABELS[:1])
    return place / "a.npz"


def in_table(place, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = in_folder(place)
    rows = [{"image": f"{label}/{i}.png", "label": label} for i, label in enumerate(LABELS)]
    if kind == "csv":
        (folder / "rows.csv").write_text("image,label\n" + "".join(f"{r['image']},{r['label']}\n" for r in rows))
    elif kind == "jsonl":
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        rows = [
            {"image": {"bytes": (folder / r["image"]).read_bytes(), "path": None}, "label": r["label"]} for r in rows
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / f"rows.{kind}"


SOURCES = {
    "folder": in_folder,
    "npz": in_npz,
    **{k: lambda p, k=k: in_table(p, k) for k in ("csv", "jsonl", "parquet")},
}


@pytest.mark.parametrize("kind", SOURCES)
def test_each_source_gives_the_same_pictures(tmp_path, kind):
    data = load_images(SOURCES[kind](tmp_path), SIX)
    assert data.classes == ("coat", "hat", "shoe") and len(data) == 4
    order = [3, 0, 2, 1] if kind == "folder" else [0, 1, 2, 3]
    np.testing.assert_array_equal(data.images, PICTURES[order])
    assert [data.classes[i] for i in data.labels] == [LABELS[i] for i in order]
    batch = data.batch([1, 2])
    assert batch["pixel_values"].shape == (2, 3, 6, 6) and batch["pixel_values"].dtype == np.float32
    want = (PICTURES[order[1]] / 255 - 0.5) / 0.5
    np.testing.assert_allclose(batch["pixel_values"][0], want.transpose(2, 0, 1), atol=1e-6)


def test_a_flat_folder_has_no_labels(tmp_path):
    for i in (1, 0):
        Image.fromarray(PICTURES[i]).save(tmp_path / f"{i}.bmp")
    data = load_images(tmp_path, SIX)
    assert data.labels is None and data.classes == () and list(data.batch(slice(0, 1))) == ["pixel_values"]
    np.testing.assert_array_equal(data.images, PICTURES[:2])


def test_idx_files_with_their_labels(tmp_path):
    pictures = bytes([0, 0, 8, 3, *(0, 0, 0, 2), *(0, 0, 0, 1), *(0, 0, 0, 2), 1, 2, 3, 4])
    labels = bytes([0, 0, 8, 1, 0, 0, 0, 2, 9, 0])
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(pictures))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    (tmp_path / "alone.idx3-ubyte").write_bytes(pictures)
    grey = ImageProcessor((1, 2), 1, (0.0,), (1.0,))
    data = load_images(tmp_path / "t10k-images-idx3-ubyte.gz", grey)
    assert data.images[..., 0].tolist() == [[[1, 2]], [[3, 4]]] and data.labels.tolist() == [9, 0]
    assert data.classes == tuple("0123456789")
    assert load_images(tmp_path / "alone.idx3-ubyte", grey).labels is None
    for cut in (pictures[:-1], pictures[:6], b"no idx"):
        (tmp_path / "alone.idx3-ubyte").write_bytes(cut)
        with pytest.raises(jaxft.DataError, match=r"idx3-ubyte: (it says|not an idx file)"):
            load_images(tmp_path / "alone.idx3-ubyte", grey)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels[:7] + b"\1\5"))
    with pytest.raises(jaxft.DataError, match=r"labels-idx1-ubyte.gz: \(1,\) labels for the 2 images"):
        load_images(tmp_path / "t10k-images-idx3-ubyte.gz", grey)


def test_keys_and_splits_of_npz_files(tmp_path):
    file = in_npz(tmp_path)
    assert len(load_images(file, SIX, split="test")) == 1
    with pytest.raises(jaxft.DataError, match="of the split 'val' in it .* it has train_x, train_y, test_x, test_y"):
        load_images(file, SIX, split="val")
    for keys in ({"images": 0, "labels": 1}, {"X_train": 0, "y_train": 1}, {"x": 0, "y": 1}):
        np.savez(file, **{key: (PICTURES, [[0], [2], [1], [2]])[which] for key, which in keys.items()})
        data = load_images(file, SIX)
        assert data.labels.tolist() == [0, 2, 1, 2] and data.classes == ("0", "1", "2")
    np.savez(file, x=PICTURES, y=[0, 1, 0, 2], classes=["a", "b"])
    with pytest.raises(jaxft.DataError, match="x row 4: label: 2 is none of the 2 classes"):
        load_images(file, SIX)
    for odd, match in (
        ({"x": np.array([None, 1])}, "an npz file that cannot be read"),
        ({"x": np.zeros((2, 3))}, r"x has the shape \(2, 3\)"),
        ({"x": PICTURES, "images": PICTURES}, "several arrays could be meant: images, x"),
        ({"x": PICTURES, "y": [1]}, r"y has the shape \(1,\) for 4 images"),
        ({"x": PICTURES, "classes": "a"}, r"its names of classes have the shape \(\)"),
        ({"x": PICTURES / 255}, "x row 1: its numbers are float64: give grey levels"),
        ({"x": PICTURES.transpose(0, 3, 1, 2)}, r"x row 1: its shape is \(3, 6, 6\): .* channels last"),
    ):
        np.savez(file, **odd)
        with pytest.raises(jaxft.DataError, match=match):
            load_images(file, SIX)


def test_one_array_under_the_name_of_an_npz_file(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, PICTURES)
    with pytest.raises(jaxft.DataError, match="a.npz: one array, as of np.save; write it with np.savez"):
        load_images(tmp_path / "a.npz", SIX)


def test_classes_of_the_training_set_rule(tmp_path):
    file = in_npz(tmp_path)
    assert load_images(file, SIX, classes=("shoe", "hat", "coat")).labels.tolist() == [1, 0, 1, 2]
    with pytest.raises(jaxft.DataError, match="row 4: label: 'coat' is none of the 2 classes"):
        load_images(file, SIX, classes=("shoe", "hat"))


def save(name, image, **options):
    def write(place):
        image.save(place / name, **options)
        return place / name

    return write


LEVELS = np.array([[0, 128], [255, 64]], np.uint8)
TURNED = Image.Exif()
TURNED[274] = 6  # the camera was held upright
PALETTE = Image.fromarray(LEVELS).convert("RGB").quantize(4)
HALF = np.stack([np.full((2, 2), v, np.uint8) for v in (255, 0, 0, 128)], -1)
ODD = {
    "grey": (save("a.png", Image.fromarray(LEVELS)), LEVELS),
    "one bit": (save("a.png", Image.fromarray(LEVELS > 99)), np.where(LEVELS > 99, 255, 0)),
    "16 bits": (save("a.png", Image.fromarray(LEVELS.astype(np.uint16) * 257)), LEVELS),
    "palette": (save("a.gif", PALETTE), LEVELS),
    "grey alpha": (save("a.png", Image.merge("LA", [Image.fromarray(LEVELS)] * 2)), None),
    "alpha": (save("a.png", Image.fromarray(HALF)), np.broadcast_to([255, 127, 127], (2, 2, 3))),
    "turned": (save("a.png", Image.fromarray(LEVELS), exif=TURNED), LEVELS[::-1].T),
}


@pytest.mark.parametrize("kind", ODD)
def test_kinds_of_pictures(tmp_path, kind):
    write, want = ODD[kind]
    got = grey_levels(write(tmp_path), ImageProcessor((2, 2)))
    if want is None:  # alpha equals the grey level: what is darker is more transparent
        want = np.round(LEVELS * (LEVELS / 255) + (255 - LEVELS))
    want = want if want.ndim == 3 else np.repeat(want[..., None], 3, -1)
    np.testing.assert_allclose(got.astype(int), want, atol=1)


@pytest.mark.parametrize("factor", [1 / 255, 1 / 127.5, 1.0])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_pixel_values_to_what_augmentations_take_and_back(factor, array):
    """Whatever the processor scales by; in JAX under jit, as in a step."""
    processor = ImageProcessor((6, 6), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), rescale_factor=factor)
    unit, prepare = (f if array is np.asarray else jax.jit(f) for f in (processor.unit, processor.prepare))
    want = processor(PICTURES)
    images = unit(array(want))
    np.testing.assert_allclose(images, PICTURES.transpose(0, 3, 1, 2) / 255, atol=1e-6)
    np.testing.assert_allclose(prepare(images), want, rtol=1e-5, atol=1e-6)
    assert images.dtype == prepare(images).dtype == np.float32


def test_arrays_and_channels():
    colour = np.array([[[255, 0, 0]]], np.uint8)
    assert grey_levels(colour, ImageProcessor((1, 1), 1, (0.0,), (1.0,))).tolist() == [[[76]]]
    assert grey_levels(np.full((1, 1, 1), 65535, np.uint16), ImageProcessor((1, 1))).tolist() == [[[255] * 3]]
    assert grey_levels(np.zeros((3, 9), np.uint8), ImageProcessor((4, 2))).shape == (4, 2, 3)


def test_every_bad_picture_is_named_at_once_or_left_out(tmp_path):
    good = in_folder(tmp_path)
    (good / "hat" / "a.txt").write_text("hello")
    (good / "hat" / "b.png").write_text("no picture")
    whole = (good / "hat" / "0.png").read_bytes()
    (good / "hat" / "c.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(LEVELS).save(good / "hat" / "d.gif", save_all=True, append_images=[Image.fromarray(255 - LEVELS)])
    (good / "hat" / "e").mkdir()
    with pytest.raises(jaxft.DataError) as caught:
        load_images(good, SIX)
    message = str(caught.value)
    assert message.startswith(f"{good}: 5 of 9 pictures cannot be used")
    for name, reason in (
        ("a.txt", "not a picture by its name"),
        ("b.png", "not an image of a kind that is read"),
        ("c.png", "a damaged image ("),
        ("d.gif", "it holds 2 pictures"),
        ("e", "a folder within the folder of a class"),
    ):
        assert f"{good / 'hat' / name}: {reason}" in message
    data = load_images(good, SIX, skip_bad_rows=True)
    assert len(data) == 4 and len(data.skipped) == 5


def test_bad_rows_of_a_table(tmp_path):
    file = in_table(tmp_path, "jsonl")
    rows = [{"image": "none.png", "label": "hat"}, {"label": "hat"}, {"image": 3, "label": 1}, {"image": "hat/0.png"}]
    rows += [{"image": "hat/0.png", "label": label} for label in (-1, 1.5, "", True)]
    file.write_text(file.read_text() + "\n" + "\n".join(map(json.dumps, rows)))
    with pytest.raises(jaxft.DataError) as caught:
        load_images(file, SIX)
    for line, reason in (
        (5, f"{tmp_path}/none.png: no such file"),
        (6, "image: a path is expected; the row has 'label'"),
        (7, "image: a path is expected, this is int: 3"),
        (8, f"{tmp_path}/hat/0.png: label: it has none, and other rows have one"),
        (9, f"{tmp_path}/hat/0.png: label: -1 is below 0"),
        (10, f"{tmp_path}/hat/0.png: label: a class number or name is expected, this is float: 1.5"),
        (11, f"{tmp_path}/hat/0.png: label: it is empty"),
        (12, f"{tmp_path}/hat/0.png: label: a class number or name is expected, this is bool: True"),
    ):
        assert f"{file}:{line}: {reason}" in str(caught.value)
    with pytest.raises(jaxft.DataError, match="columns\n  - picture: there are image and label"):
        load_images(file, SIX, columns={"picture": "image"})
    with pytest.raises(jaxft.DataError, match="file: the row has no such column; it has 'image', 'label'"):
        load_images(file, SIX, columns={"image": "file"})


def test_sources_that_are_none(tmp_path):
    (tmp_path / "a").mkdir()
    for path, match in (
        (tmp_path / "a", "no picture is left"),
        (tmp_path, "folders of classes are empty"),
        (tmp_path / "none.npz", "no such file"),
        (tmp_path / "x-idx3-ubyte", "no such file"),
        (tmp_path / "a.png", "this is one picture"),
    ):
        with pytest.raises(jaxft.DataError, match=match):
            load_images(path, SIX)
    Image.fromarray(LEVELS).save(tmp_path / "loose.png")
    with pytest.raises(jaxft.DataError, match="loose.png stands beside the folders of the classes"):
        load_images(tmp_path, SIX)


def test_a_processor_is_read_from_its_file(tmp_path):
    processor = ImageProcessor((4, 6), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), rescale_factor=0.01, resample=3)

    def read(**changes):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor.to_json(), **changes}))
        return read_processor(tmp_path, size=(4, 6))

    assert read() == processor
    assert read(do_normalize=False).std == (1.0,) * 3 and read(do_rescale=False).rescale_factor == 1
    assert read(size={"height": 9, "width": 9}, do_resize=False) == processor
    for changes, match in (
        ({"size": 6}, r"size is \(6, 6\), the model's image_size \(4, 6\)"),
        ({"size": {"shortest_edge": 4}, "do_center_crop": True}, "do_center_crop is not.*\n.*only height and width"),
        ({"image_mean": [0.5]}, "image_mean has 1 numbers for 3 channels"),
        ({"image_std": [1, 0, 1]}, r"image_std \[1.0, 0.0, 1.0\]: numbers above 0"),
        ({"resample": "x"}, "not an image processor's config"),
    ):
        with pytest.raises(jaxft.DataError, match=match):
            read(**changes)

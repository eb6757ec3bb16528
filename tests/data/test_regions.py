"""Boxes: worked by hand, and refused with row and box."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import jaxft
from jaxft.data import ImageProcessor, load_regions, region_features

FOUR = ImageProcessor((4, 4))


def table(place, rows):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(place / "a.png")  # 40 wide, 20 high
    (place / "rows.jsonl").write_text("\n".join(json.dumps({"image": "a.png", **row}) for row in rows))
    return place / "rows.jsonl"


def test_boxes_are_padded_and_kept_in_parts_of_the_sides(tmp_path):
    file = table(
        tmp_path,
        [
            {"boxes": [[0, 0, 40, 20], [10, 5, 20, 15]], "labels": ["dog", "cat"]},
            {"boxes": [[20, 10, 40, 20]], "labels": ["cat"]},
        ],
    )
    data = load_regions(file, FOUR)
    assert data.classes == ("cat", "dog")
    np.testing.assert_allclose(data.boxes, [[[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.75]], [[0.5, 0.5, 1, 1], [0] * 4]])
    assert data.mask.tolist() == [[True, True], [True, False]] and data.labels.tolist() == [[1, 0], [0, 0]]


def test_a_csv_holds_its_lists_as_json(tmp_path):
    table(tmp_path, [])
    (tmp_path / "rows.csv").write_text('image,boxes,labels\na.png,"[[0, 0, 20, 20]]","[3]"\n')
    data = load_regions(tmp_path / "rows.csv", FOUR)
    assert data.boxes.tolist() == [[[0, 0, 0.5, 1]]] and data.labels.tolist() == [[3]]


BAD = {
    "outside": ([0, 0, 41, 20], r"box 2 \[0, 0, 41, 20\]: it is not within the picture, which is 40 wide and 20 high"),
    "negative": ([-1, 0, 4, 20], r"box 2 \[-1, 0, 4, 20\]: it is not within"),
    "empty": ([5, 5, 5, 9], r"box 2 \[5, 5, 5, 9\]: it is empty"),
    "swapped": ([9, 5, 2, 9], r"box 2 \[9, 5, 2, 9\]: its corners are swapped"),
    "three": ([9, 5, 2], r"box 2: \[left, top, right, bottom\] is expected, this is \[9, 5, 2\]"),
    "nan": ([float("nan"), 0, 4, 4], r"box 2 \[nan, 0, 4, 4\]: its numbers are not all finite"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_box_is_named(tmp_path, kind):
    box, match = BAD[kind]
    file = table(tmp_path, [{"boxes": [[0, 0, 1, 1], box], "labels": [0, 1]}, {"boxes": [[0, 0, 1, 1]], "labels": [0]}])
    with pytest.raises(jaxft.DataError, match=rf"1 of 2 pictures cannot be used .*\n.*rows.jsonl:1: .*a.png: {match}"):
        load_regions(file, FOUR)
    assert len(load_regions(file, FOUR, skip_bad_rows=True)) == 1


def test_rows_without_their_lists(tmp_path):
    whole = {"boxes": [[0, 0, 1, 1]], "labels": ["a"]}
    rows = [{"labels": [1]}, {"boxes": [], "labels": []}, {**whole, "labels": ["a", "b"]}, {**whole, "labels": ["c"]}]
    with pytest.raises(jaxft.DataError) as caught:
        load_regions(table(tmp_path, rows), FOUR, classes=("a", "b"))
    for reason in (
        "boxes: a list is expected, the row has no such column",
        "boxes: it is empty",
        "labels: 2 for 1 boxes",
        "'c' is none of the 2 classes",
    ):
        assert reason in str(caught.value)


def test_features_are_means_weighted_by_area():
    patches = jnp.arange(6.0).reshape(1, 6, 1) * jnp.array([[[1.0, 10.0]]])  # two rows of three patches: 0 1 2, 3 4 5
    boxes = [
        [0, 0, 1, 1],  # all of them: 2.5
        [1 / 3, 0, 2 / 3, 0.5],  # the second alone
        [0, 0, 0.5, 1],  # 0 and 3 whole, 1 and 4 by half: (0 + 3 + 0.5 + 2) / 3
        [0.5, 0.25, 1, 0.75],  # 1 and 4 by a quarter, 2 and 5 by a half: (0.25 + 1 + 1 + 2.5) / 1.5
        [0, 0, 0, 0],  # padding
    ]
    got = region_features(patches, jnp.array([boxes]), (2, 3))
    np.testing.assert_allclose(got[0, :, 0], [2.5, 1, 5.5 / 3, 4.75 / 1.5, 0], atol=1e-6)
    np.testing.assert_allclose(got[..., 1], got[..., 0] * 10, rtol=1e-6)
    assert (
        got.dtype == jnp.float32
        and region_features(patches.astype(jnp.bfloat16), got[..., :1], (2, 3)).dtype == got.dtype
    )

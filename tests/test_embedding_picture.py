"""The picture shows the embeddings that it was given, on their principal axes."""

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from jaxft.embedding_picture import draw_embeddings, draw_pairs, principal_axes
from jaxft.errors import RunError


def made(n, seed=0, d=6):
    return np.random.default_rng(seed).normal(size=(n, d))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_axes_by_hand():
    """Four points of a cross: 3 and -3 along (0.6, 0.8), 1 and -1 at right angles: 18 and 2 of the variance 20."""
    cross = np.array([[1.8, 2.4], [-1.8, -2.4], [0.8, -0.6], [-0.8, 0.6]]) + 5
    points, share = principal_axes(cross)
    np.testing.assert_allclose(points, [[3, 0], [-3, 0], [0, 1], [0, -1]], atol=1e-12)
    np.testing.assert_allclose(share, [0.9, 0.1])


def test_axes_are_those_of_the_covariance():
    x = made(50)
    points, share = principal_axes(x)
    values = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    np.testing.assert_allclose(np.cov(points.T), np.diag(values[:2]), atol=1e-12)
    np.testing.assert_allclose(share, values[:2] / values.sum())
    flipped, _ = principal_axes(x[::-1])
    np.testing.assert_allclose(flipped[::-1], points, atol=1e-12)  # the sign is no accident of the order


@pytest.mark.parametrize("x", [np.ones((4, 3)), np.ones((1, 3)), np.arange(4.0)[:, None]])
def test_axes_of_what_has_fewer(x):
    points, share = principal_axes(x)
    assert points.shape == (len(x), 2) and np.isfinite(points).all() and np.isfinite(share).all()
    assert share[1] == 0 and np.all(points[:, 1] == 0)


def shown(axes):
    return np.concatenate([c.get_offsets() for c in axes.collections if len(c.get_offsets()) > 1])


def test_each_row_has_the_colour_of_its_class():
    before, after = made(30, 0), 5 * made(30, 1)
    labels = np.arange(30) % 3 + 4
    figure = draw_embeddings(before, after, labels, ["no"] * 5 + ["five"], "a title")
    for axes, x, name in zip(figure.axes, (before, after), ("Before", "After"), strict=True):
        points, share = principal_axes(unit(x))
        assert axes.get_title() == name
        assert f"({share[0]:.0%} of the variance)" in axes.get_xlabel() and f"{share[1]:.0%}" in axes.get_ylabel()
        (dots,) = axes.collections
        colors = {
            tuple(np.round(p, 9)): tuple(c[:3]) for p, c in zip(dots.get_offsets(), dots.get_facecolor(), strict=True)
        }
        assert len(colors) == 30
        for point, label in zip(np.round(points, 9), labels, strict=True):
            assert colors[tuple(point)] == pytest.approx(to_rgb(("tab:blue", "tab:orange", "tab:green")[label - 4]))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["no", "five", "6"]
    assert [to_rgb(line.get_color()) for line in legend.get_lines()] == [to_rgb(f"C{i}") for i in range(3)]


@pytest.mark.parametrize(("classes", "legends"), [(12, 1), (13, 0), (77, 0)])
def test_a_legend_where_colours_can_be_told(classes, legends):
    x = made(4000)
    figure = draw_embeddings(x, x, np.arange(4000) % classes)
    assert len(figure.legends) == legends
    assert legends or figure.get_supxlabel() == f"colours: {classes} classes"
    (dots,) = figure.axes[0].collections
    assert len(dots.get_offsets()) == 3000
    assert len(np.unique(dots.get_facecolor(), axis=0)) == classes


def test_pairs_are_joined():
    before, after = (made(200, 0), made(200, 1)), (made(200, 2), made(200, 3))
    scores = np.linspace(0, 5, 200)
    figure = draw_pairs(before, after, scores)
    left, right, bar = figure.axes
    assert bar.get_ylabel() == "score"
    for axes, pair in ((left, before), (right, after)):
        points, _ = principal_axes(unit(np.concatenate(pair)))
        lines, first, second = axes.collections
        assert len(lines.get_segments()) == 150
        which = np.searchsorted(scores, lines.get_array() - 1e-9)
        assert np.all(np.diff(which) > 0)  # the highest on top
        for segment, i in zip(lines.get_segments(), which, strict=True):
            np.testing.assert_allclose(segment, [points[i], points[200 + i]])
        for dots, offset in ((first, 0), (second, 200)):
            np.testing.assert_allclose(dots.get_offsets(), points[which + offset])
            np.testing.assert_allclose(dots.get_array(), scores[which])
    plain = draw_pairs(before, after)
    assert len(plain.axes) == 2
    assert [tuple(c.get_facecolor()[0][:3]) for c in plain.axes[0].collections[1:]] == [to_rgb("C0"), to_rgb("C1")]


def test_nothing_overlaps():
    names = [f"a rather long name of class {i}" for i in range(12)]
    figure = draw_embeddings(made(60), made(60, 1), np.arange(60) % 12, names, "a/very/long/name/" * 12)
    figure.draw_without_rendering()
    left, right = (axes.get_tightbbox() for axes in figure.axes)
    legend, title = figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()
    assert left.x1 < right.x0 and right.x1 <= legend.x0 < legend.x1 <= figure.bbox.x1
    assert max(left.y1, right.y1) <= title.y0
    assert 0 <= title.x0 < title.x1 <= figure.bbox.x1


def test_rows_that_do_not_fit():
    x = made(3)
    with pytest.raises(RunError, match="after: 2 embeddings for 3 rows"):
        draw_embeddings(x, x[:2], [0, 1, 1])
    with pytest.raises(RunError, match="before: 1 of 3 rows are not finite, row 0"):
        draw_embeddings([[np.inf, 1]] + [[1, 1]] * 2, x, [0, 1, 1])
    with pytest.raises(RunError, match=r"pairs: \[3, 3, 3, 2\] rows"):
        draw_pairs((x, x), (x, x[:2]))
    with pytest.raises(RunError, match=r"pairs: \[3, 3, 3, 3, 1\] rows"):
        draw_pairs((x, x), (x, x), [1.0])

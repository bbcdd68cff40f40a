"""Every picture has a title, labelled axes and a legend or a scale, and can be drawn."""

import io

import pytest
import torch

pytest.importorskip("matplotlib")

from sparse_attn import plot  # noqa: E402


def check(figure, panels):
    """Draws a figure; the axes with a picture or lines are labelled."""
    figure.savefig(io.BytesIO(), format="png", dpi=50)
    axes = [a for a in figure.axes if a.axison]
    titled = [a for a in axes if a.get_title()]
    assert len(titled) == panels and all(figure._suptitle or a.get_title() for a in titled)
    assert any(a.get_xlabel() for a in titled) and any(a.get_ylabel() for a in titled)
    assert figure.legends or len(axes) > panels  # a legend, or a scale of colours
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert box.x0 > -0.05 and box.x1 < width + 0.05 and box.y1 < height + 0.05, "cut off"
    return figure


LONG = "flex_prefill:gamma=0.95,min_budget=128,block_size=64"


def test_density():
    figure = check(plot.plot_density({"one": [0.1, None, 0.5], LONG: [1.0, 0.5, 0.2]}, 4096), 1)
    lines = figure.axes[0].lines
    assert lines[0].get_xydata().tolist() == [[0, 10], [2, 50]]
    assert [t.get_text() for t in figure.legends[0].texts] == ["one", LONG]


def test_time():
    seconds = {"sdpa": {1024: 0.5, 4096: 8.0}, "one": {4096: 1.0}}
    figure = check(plot.plot_time(seconds, "a prefill", "sdpa"), 1)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["1k", "4k"]


def test_pareto_marks_what_nothing_beats():
    points = {"one": [(2.0, 0.1, "a"), (4.0, 0.5, "b")], "other": [(3.0, 0.6, "")]}
    figure = check(plot.plot_pareto(points, "Trade", "bits lost", "sdpa", 0.2), 1)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines["best trade-offs"] == [[1, 0], [2, 0.1], [4, 0.5]]
    assert lines["one"] == [[2, 0.1], [4, 0.5]]
    assert {t.get_text() for t in figure.axes[0].texts} == {"a", "b"}


@pytest.mark.parametrize("n", [1, 6])
def test_mass(n):
    mass = torch.rand(n, 8, 8).tril()
    mass /= mass.sum(-1, keepdim=True)
    kept = mass.clone()
    kept[:, :, 0] = 0
    names = [f"head {i}" for i in range(n)]
    figure = check(plot.plot_mass(mass, kept, names, 100, 100, f"{LONG}: heads"), n)
    image = figure.axes[0].images[0].get_array()
    assert (image[0, 7] == 1).all()  # nothing to see above the diagonal
    red, _, blue = image[7, 0]
    assert red > blue  # left out
    red, _, blue = image[7, 7]
    assert blue > red  # computed


def test_heads():
    recall = [[0.5, 1.0], [float("nan"), 0.99]]
    figure = check(plot.plot_heads(recall, "kept"), 1)
    assert [t.get_text() for t in figure.axes[0].texts] == ["50.0", "100.0", "–", "99.0"]


def test_needles():
    grids = [[[1.0, 0.5], [0.0, float("nan")]]] * 5
    names = ["sdpa", LONG, "a", "b", "c"]
    figure = check(plot.plot_needles(grids, names, [1024, 2048], [0.0, 1.0]), 5)
    assert [t.get_text() for t in figure.axes[0].texts] == ["100", "50", "0", "–"]

"""Which settings lose next to nothing, and the table of the fastest of them."""

from sparse_attn.evaluate.points import (
    behind,
    complete,
    gain,
    markdown,
    operating_points,
    within_limits,
)
from sparse_attn.evaluate.report import series, summary


def cell(bits, needles, attention, density=None):
    layers = None if density is None else [{"density": density, "recall": None}, None]
    return {"bits": bits, "needles": {"0.000": needles}, "attention": attention,
            "prefill": attention + 1, "layers": layers, "decode": attention / 2,
            "decode_bits": None}  # fmt: skip


BASE = cell(2.0, 0.56, 1.0) | {"decode_bits": 3.0}
CELLS = {
    "sdpa": BASE,
    "one:a=1": cell(2.009, 0.56, 0.5, 0.4),
    "one:a=2": cell(2.002, 0.5501, 0.25, 0.3),
    "one:a=3": cell(2.011, 0.56, 0.1, 0.2),
    "other": cell(2.0, 0.55, 0.1, 0.1),  # a whole point
    "waiting": {"bits": 2.0},
}
METHODS = {
    label: {"family": label.partition(":")[0], "setting": label.partition(":")[2] or "defaults"}
    for label in CELLS
}
RESULTS = {"cells": {"4096": CELLS}, "methods": METHODS}


def test_limits():
    found = [label for label in list(CELLS)[1:5] if within_limits(CELLS[label], BASE)]
    assert found == ["one:a=1", "one:a=2"]


def test_the_fastest_within_the_limits():
    rows = operating_points(RESULTS, 4096)
    assert rows == [
        ["one:a=2", "30.0%", "4.00×", "1.60×", "4.00×, dense", "0.0020", "1.0"],
        ["other: no setting within the limits", *["–"] * 6],
    ]
    assert markdown(rows).splitlines()[1:3] == [
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| one:a=2 | 30.0% | 4.00× | 1.60× | 4.00×, dense | 0.0020 | 1.0 |",
    ]


def test_a_method_with_a_baseline_of_its_own():
    """Behind a prepared context the tail is timed, which is faster than any whole prefill."""
    sizes = {"context": 3, "tail": 6}
    tail = cell(2.0, 0.56, 0.1, 0.5) | {"baseline": {"attention": 0.2, "prefill": 2.2}} | sizes
    cells = {"sdpa": BASE, "one:a=1": tail | {"decode_bits": 3.0125}, "one:a=2": CELLS["one:a=2"]}
    assert operating_points({"cells": {"9": cells}, "methods": METHODS}, 9)[0][0] == "one:a=2"
    del cells["one:a=2"]
    assert operating_points({"cells": {"9": cells}, "methods": METHODS}, 9) == [
        ["one:a=1", "50.0%", "2.00×", "2.00×", "10.00×, +0.0125", "0.0000", "0.0"]
    ]
    assert "of the last 6 tokens behind a prepared context of 3" in behind(
        {"cells": {"9": cells}, "methods": METHODS}, 9
    )
    assert behind(RESULTS, 4096) == ""


def test_speed_ups_are_of_one_run():
    """A later run times the baseline anew, on a machine that may be slower then."""
    old = CELLS["one:a=1"] | {"same_run": {"attention": 3.0, "prefill": 6.0, "decode": 1.0}}
    assert [gain(old, BASE, x) for x in ("attention", "prefill", "decode")] == [6, 4, 4]
    tail = old | {"baseline": {"attention": 0.5, "prefill": 3.0}}
    assert [gain(tail, BASE, x) for x in ("attention", "prefill", "decode")] == [1, 2, 4]


def test_lengths_of_a_stopped_run_are_left_out():
    cells = {"4096": CELLS, "8192": {"sdpa": {"bits": 2.0}}, "512": CELLS, "100": {"sdpa": {}}}
    assert complete({"cells": cells}) == [512, 4096]


def test_a_baseline_that_finds_no_needle():
    """Nothing can be lost then: what is said to be within the limits is so by its bits alone."""
    blind = {k: v | {"needles": {"0.000": 0.0}} for k, v in CELLS.items()}
    assert [row[-1] for row in operating_points({**RESULTS, "cells": {"4096": blind}}, 4096)] == [
        "–", "–",
    ]  # fmt: skip
    assert within_limits(blind["other"], blind["sdpa"])
    assert not within_limits(blind["one:a=3"], blind["sdpa"])
    for cells, marked in ((CELLS, False), (blind, True)):
        page = summary({**RESULTS, "cells": {"4096": cells}}, 4096)
        assert ("<td>bits only</td>" in page) == marked == ("judged by the bits" in page)
        assert ("<td>yes</td>" in page) != marked and "<td>no</td>" in page


def test_a_line_has_the_same_options():
    settings = ("defaults", "a=1,b=2", "a=1,b=3", "b=3")
    methods = {s: {"family": "one", "setting": s} for s in settings}
    for c in (1, 2):
        setting = f"b=(1,2),c={c}"
        methods[setting] = {"family": "three", "setting": setting}
    methods["two:c=1"] = {"family": "two", "setting": "c=1"}
    assert series(methods) == {
        "defaults": ("defaults", ""),
        "a=1,b=2": ("one, a=1", "b=2"),
        "a=1,b=3": ("one, a=1", "b=3"),
        "b=3": ("b=3", ""),
        "b=(1,2),c=1": ("three, b=(1,2)", "c=1"),
        "b=(1,2),c=2": ("three, b=(1,2)", "c=2"),
        "two:c=1": ("two:c=1", ""),
    }

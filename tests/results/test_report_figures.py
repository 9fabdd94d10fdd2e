from __future__ import annotations

import math
import re
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest

from lightning_robust.results.figures import (
    BACKGROUND,
    BASELINE,
    DARK,
    LIGHT,
    Cell,
    Line,
    Point,
    changes,
    curves,
    heat_map,
    heat_name,
    on_white,
    plane,
    slot_style,
    to_png,
    to_svg,
    to_svg_file,
)

EVIL = '<img src=x> $x_{$ 名前 #1b2330 onerror="1"'


def texts(svg: str) -> list[str]:
    root = ElementTree.fromstring(svg[svg.index("<svg") :])
    return ["".join(one.itertext()).strip() for one in root.iter("{http://www.w3.org/2000/svg}text")]


def test_names_are_text_never_markup_or_formula() -> None:
    cells = [("group " + EVIL, [(EVIL, [Cell(0.1, True), Cell(math.nan, False)])])]
    lines = [Line([0, 1], [0.5, 0.6], slot_style(0), "$x_{$")]
    point = Point(0.1, 0.1, (0, 0.2), (0, 0.2), slot_style(0), "$x_{$")
    figures = [
        curves(EVIL[:30], "epoch", lines, wide=True),
        heat_map(cells, [EVIL, "b"], 0.1),
        changes([point]),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # letters that the font lacks are not for the user to worry about
        for figure in figures:
            assert any("$x_{$" in one for one in texts(to_svg_file(figure, "f")))
            assert to_png(figure).startswith(b"\x89PNG")


def test_a_page_colours_shapes_but_not_names() -> None:
    figure = curves("", "epoch", [Line([0, 1], [0.5, 0.6], BASELINE, "#1b2330")], wide=True)
    svg = to_svg(to_svg_file(figure, "f"), 'a "label" <b>')
    assert 'aria-label="a &quot;label&quot; &lt;b&gt;"' in svg
    assert "var(--ink)" in svg
    assert re.findall(r"#[0-9a-f]{6}\b", svg) == re.findall(r"#1b2330\b", svg)
    assert "#1b2330" in svg.replace('"', "")


def test_files_are_whole_and_deterministic() -> None:
    def draw() -> str:
        return on_white(to_svg_file(plane([Line([0.1, 0.2], [0.5, 0.6], slot_style(1))]), "plane"))

    assert draw() == draw()
    assert re.search(r"<svg[^>]*>\s*<rect[^>]*#ffffff", draw())
    assert "var(" not in draw()


def test_palettes_can_stand_for_each_other() -> None:
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


@pytest.mark.parametrize(
    ("value", "name"),
    [(0.0, "heat-0"), (0.001, "heat-0"), (0.05, "heat-p4"), (-9.0, "heat-n4"), (-0.02, "heat-n2")],
)
def test_heat_is_centred_at_zero(value: float, name: str) -> None:
    assert heat_name(value, 0.04) == name


def test_heat_map_shows_numbers_marks_and_gaps() -> None:
    rows = [
        ("fgm", [Cell(0.021, True), Cell(-0.0001, False)]),
        ("vrex", [Cell(-0.03, True), Cell(math.nan, False)]),
    ]
    shown = texts(to_svg_file(heat_map([("Aim", rows)], ["clean", "yelp"], 0.03), "m"))
    assert {"+2.1▲", "0.0", "-3.0▼", "fgm", "vrex", "clean", "yelp", "Aim"} <= set(shown)


@pytest.mark.parametrize("number", [1, 3, 30])
def test_labels_of_points_do_not_cover_each_other(number: int) -> None:
    rng = np.random.default_rng(number)
    points = [
        Point(x, y, (x - 0.01, x + 0.01), (y - 0.01, y + 0.01), slot_style(0), f"point {index}")
        for index, (x, y) in enumerate(rng.normal(0, 0.02, (number, 2)))
    ]
    figure = changes(points)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == number if number < 3 else boxes
    assert not any(a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[index + 1 :])


def test_gaps_and_single_points_are_drawn() -> None:
    nan = math.nan
    for lines in (
        [Line([0, 1, 2], [0.5, nan, 0.6], BACKGROUND, "", [0.4, nan, 0.5], [0.6, nan, 0.7])],
        [Line([0], [0.5], slot_style(0), "", [0.4], [0.6])],
        [Line([], [], slot_style(0))],
        [Line([0, 1], [nan, nan], slot_style(0))],
        [Line([0, 1], [0.5, 0.6], slot_style(k), "", [0.4, 0.5], [0.6, 0.7]) for k in range(6)],
    ):
        assert len(to_svg_file(curves("Clean", "epoch", lines, baseline=0.5), "c")) > 1000
        assert len(to_svg_file(plane(lines), "p")) > 1000

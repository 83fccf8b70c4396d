"""Charts and colours: where things lie, and that they can be told apart."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from compare.charts import NARROW, WIDE, Curve, line_chart, number, spread, ticks, value_range
from compare.charts_rows import Row, dot_chart, heat_map, range_of, shade_of, signed
from compare.figure import arm_colours
from compare.palette import (
    BEHAVIOURS,
    LINE_CONTRAST,
    THEMES,
    contrast,
    luminance,
    readable,
    shade_ink,
    shades,
)

MIN_TEXT = 4.5
"""WCAG 2.2, 1.4.3: contrast of text."""


def draw(curves, **more):
    settings = {"title": "t", "description": "d", "x_label": "steps", "y_range": (0.0, 1.0)}
    return line_chart(curves, **{**settings, **more})


def test_ticks_are_round_and_inside():
    assert ticks(0, 60) == [0, 20, 40, 60]
    assert ticks(0, 0.47) == [0, 0.1, 0.2, 0.3, 0.4]
    assert ticks(-0.3, 0.3, 4) == [-0.2, 0, 0.2]
    assert ticks(2, 2) == [2]
    # steps of .5 would leave one
    assert ticks(0, 0.47, 2) == [0, 0.2, 0.4]
    assert [number(v) for v in (0.25, 12000, 3_400_000, -0.5)] == ["0.25", "12k", "3.4M", "−0.5"]


def test_a_curve_lies_where_its_numbers_say():
    svg = draw([Curve(0, "a", [0, 10], [0.0, 1.0])])
    left, right = NARROW.left, NARROW.x1
    mean = re.search(r'class="mean a0" d="([^"]+)"', svg)[1]
    assert mean == f"M{left} {NARROW.y1}L{right} {NARROW.top}"


def test_a_band_runs_up_along_the_upper_limit_and_back_along_the_lower():
    svg = draw([Curve(0, "a", [0, 1], [0.5, 0.5], [0.25, 0.25], [1.0, 1.0])])
    # plot from 14 to 258: a quarter stands at 258 - 61 = 197
    assert f'd="M{NARROW.left} 14L{NARROW.x1} 14L{NARROW.x1} 197L{NARROW.left} 197Z"' in svg


def test_points_without_a_value_are_left_out():
    svg = draw([Curve(0, "a", [0, 5, 10], [0.0, None, 1.0])])
    assert re.search(r'class="mean a0" d="M\S+ \S+L\S+ \S+"', svg)


def test_names_are_data():
    name = '"><script>alert(1)</script>'
    svg = draw([Curve(0, name, [0, 1], [0.1, 0.2])], frame=WIDE, title=name)
    assert "<script" not in svg
    ElementTree.fromstring(svg)
    rows = [Row(0, name, [{"mean": 0.5, "low": 0.4, "high": 0.6, "per_seed": []}])]
    dots = dot_chart(rows, [name], title=name, description=name, x_range=(0, 1), panels_a_line=1,
                     width=460)  # fmt: skip
    heat = heat_map([[1.0]], [name], [name], title=name, description=name, unit=name, limits=(0, 1))
    for chart in (dots, heat):
        assert "<script" not in chart
        ElementTree.fromstring(chart)


def test_labels_at_the_ends_never_overlap():
    assert spread([10, 11, 12], 15, 0, 100) == [10, 25, 40]
    # no room below: all move up
    assert spread([98, 99], 15, 0, 100) == [85, 100]
    many = spread([50] * 20, 15, 0, 190)  # 19 gaps of 10
    assert many == pytest.approx([10 * i for i in range(20)])


def test_ranges_hold_everything_and_zero():
    assert value_range([0.2, None, float("nan"), 0.4]) == (0.0, pytest.approx(0.42))
    assert value_range([]) == (0.0, 1.0)
    row = Row(0, "a", [{"mean": 0.1, "low": -0.3, "high": 0.5, "per_seed": [0.7]}])
    low, high = range_of([row])
    assert low < -0.3
    assert 0.7 < high < 0.8


def test_signs_of_differences():
    assert [signed(v) for v in (0.256, -0.3, 0.001, -0.001)] == [
        "+0.26",
        "−0.30",
        "±0.00",
        "±0.00",
    ]


def test_shades_cover_the_limits():
    assert [shade_of(v, (0, 1)) for v in (-1, 0, 0.05, 0.55, 1, 2)] == [0, 0, 0, 5, 9, 9]
    assert shade_of(3.0, (3.0, 3.0)) == 0


# ---- colours


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    # 0x77 is 0.1845 linear: 1.05 / 0.2345
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert luminance("#ff0000") == pytest.approx(0.2126)


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_graphics_stand_out_in_both_themes(theme):
    roles = THEMES[theme]
    for role in ("ink", "muted", "accent", "good", "bad", "open"):
        for ground in ("page", "surface", "raised"):
            assert contrast(roles[role], roles[ground]) >= MIN_TEXT, (role, ground)
    # more arms than colours, so every colour is among them
    arms = [
        "obm",
        "vlm",
        "task_arithmetic",
        "ties",
        "dare",
        "agent",
        *(f"arm{i}" for i in range(8)),
    ]
    for colour in (*arm_colours(arms).values(), *BEHAVIOURS.values()):
        for ground in ("page", "surface"):
            assert contrast(readable(colour, theme), roles[ground]) >= LINE_CONTRAST[theme] - 1e-9
    for colour, ink in zip(shades(theme), shade_ink(theme), strict=True):
        assert contrast(colour, ink) >= MIN_TEXT


# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab_of(colour, deficiency):
    """CIE L*a*b* of a colour as someone with this deficiency sees it."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(DEFICIENCIES[deficiency]) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_the_main_arms_differ_for_every_colour_vision(theme, deficiency):
    arms = ["obm", "vlm", "task_arithmetic", "ties", "dare", "agent"]
    seen = {a: lab_of(readable(c, theme), deficiency) for a, c in arm_colours(arms).items()}
    for one, other in itertools.combinations(arms, 2):
        # 10 is far above what can just be told apart (2.3); shapes and names differ, too
        assert np.linalg.norm(seen[one] - seen[other]) > 10, (one, other)

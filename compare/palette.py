"""Colours of the page: two themes, one colour an arm in both, scales of shares, and their contrast.

An arm has the hue that it has in the picture (`compare.figure`), darkened on the light theme or
lightened on the dark one until it stands out from its background. Shapes and names say the same
once more, so no reading rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Sequence

THEMES = {
    "light": {
        "page": "#f6f5f1", "surface": "#ffffff", "raised": "#efeee9", "ink": "#1a1f26",
        "muted": "#545e6a", "line": "#dcdad3", "accent": "#0b5cad", "good": "#00684c",
        "bad": "#a8350a", "open": "#725200",
    },
    "dark": {
        "page": "#0e1217", "surface": "#161b22", "raised": "#212831", "ink": "#e7eaee",
        "muted": "#9ca7b4", "line": "#313a45", "accent": "#7cbcff", "good": "#4fcea5",
        "bad": "#ff9468", "open": "#e9bd52",
    },
}  # fmt: skip
"""Theme -> role -> colour. `good`, `bad` and `open` stand for ahead, behind and not separated."""
BEHAVIOURS = {"none": "#8a8f98", "text_only": "#0072B2", "image_only": "#CC79A7", "both": "#E69F00"}
"""Kinds of episodes by their searches."""
SCALE_ENDS = {"light": ("#eef3f8", "#053061"), "dark": ("#1d2733", "#b9dcff")}
"""Lowest and highest colour of a heat map."""
N_SHADES = 10
MIN_GRAPHIC = 3.0
"""WCAG 2.2, 1.4.11: contrast of what a picture is read from."""
LINE_CONTRAST = {"light": MIN_GRAPHIC, "dark": 4.5}
"""What lines get: thin bright lines on a dark ground look darker than they are."""
OWN_SHADES = {"light": {"#D55E00": "#b34700"}, "dark": {}}
"""Vermilion is darkened further than it must: orange at a contrast of 3 has the same lightness, and
without red and green the two would be one colour."""


def luminance(colour: str) -> float:
    """Relative luminance of `#rrggbb`, 0 for black and 1 for white (WCAG 2.2)."""
    channels = [value / 255 for value in _channels(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, from 1 to 21 (WCAG 2.2)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def mix(one: str, other: str, share: float) -> str:
    """The colour that lies `share` of the way from one to the other."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in pairs)


def readable(colour: str, theme: str) -> str:
    """The colour, moved towards the theme's ink until thin lines in it stand out from page and
    surface.

    Args:
        colour: as in the picture; black is the ink of either theme.
        theme: light or dark.
    """
    roles = THEMES[theme]
    if luminance(colour) == 0:
        return roles["ink"]
    ratio = LINE_CONTRAST[theme]
    colour = OWN_SHADES[theme].get(colour, colour)
    end = "#000000" if theme == "light" else "#ffffff"
    for step in range(101):
        shade = mix(colour, end, step / 100)
        if all(contrast(shade, roles[ground]) >= ratio for ground in ("page", "surface")):
            return shade
    return end


def shades(theme: str) -> list[str]:
    """Colours of a heat map, lowest first."""
    low, high = SCALE_ENDS[theme]
    return [mix(low, high, index / (N_SHADES - 1)) for index in range(N_SHADES)]


def shade_ink(theme: str) -> list[str]:
    """Colour of text on each of the `shades`: black or white, whichever stands out more."""
    return [
        max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, colour))
        for colour in shades(theme)
    ]


def variables(theme: str, arm_colours: Sequence[str]) -> str:
    """The theme as CSS declarations: `--ink`, `--arm-0`, `--way-none`, `--heat-0`, ..."""
    named = dict(THEMES[theme])
    named |= {f"arm-{i}": readable(colour, theme) for i, colour in enumerate(arm_colours)}
    named |= {f"way-{way}": readable(colour, theme) for way, colour in BEHAVIOURS.items()}
    named |= {f"heat-{i}": colour for i, colour in enumerate(shades(theme))}
    named |= {f"heat-ink-{i}": colour for i, colour in enumerate(shade_ink(theme))}
    return f"color-scheme:{theme};" + "".join(f"--{name}:{value};" for name, value in named.items())


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)

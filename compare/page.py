"""One self-contained HTML page: sections with figures and tables, no request to anywhere.

    write_page("report/compare.html", Page(title=..., lead=..., arms=[...], sections=[...]))

What a page is made of is data here (`Page`, `Section`, `Cell`); what it says about a comparison or
a study is put together in `page_comparison`, `page_studies` and `merges`. Style and script are
inline and named by their hashes in a Content-Security-Policy that allows nothing else. All text is
escaped where it becomes HTML.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from compare.charts import swatch
from compare.charts_rows import signed as with_sign
from compare.errors import CompareError
from compare.figure import arm_colours
from compare.palette import BEHAVIOURS, N_SHADES, variables
from compare.verdict import ABOVE, BELOW, Verdict, side_of_difference

MAX_BYTES = 5_000_000
"""No page is larger."""
MANY_ARMS = 9
LABELS = {
    "obm": "OBM", "obm_inverse": "OBM inverse", "vlm": "plain VLM", "task_arithmetic":
    "task arithmetic", "ties": "TIES", "dare": "DARE", "dare_ties": "DARE-TIES", "della": "DELLA",
    "breadcrumbs": "Breadcrumbs", "sce": "SCE", "ram": "RAM", "ram_plus": "RAM+", "wudi": "WUDI",
    "linear": "linear average", "fisher": "Fisher average", "regmean": "RegMean",
    "regmean_diagonal": "RegMean diagonal", "layer_swap": "layer swap", "sar": "SAR",
}  # fmt: skip
"""How known arms are written; every other arm's name stands as it is."""


class Arms:
    """The arms of a page: their number, by which colour and shape go, and how they are written."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(names))
        written = [LABELS.get(name, name) for name in self.names]
        self._labels = {
            name: label if written.count(label) == 1 else name
            for name, label in zip(self.names, written, strict=True)
        }

    def number(self, name: str) -> int:
        """The arm's number on the page."""
        return self.names.index(name)

    def label(self, name: str) -> str:
        """The arm as it is written, not escaped."""
        return self._labels.get(name, name)


@dataclass(frozen=True)
class Detail:
    """How much of the data a page holds: less of it where it would grow too large."""

    seeds: bool = True
    max_points: int = 10_000
    note: str = ""


DETAILS = (
    Detail(),
    Detail(max_points=60, note="Curves are thinned to 60 points an arm"),
    Detail(False, 60, "Curves are thinned to 60 points an arm, and single seeds left out"),
    Detail(False, 20, "Curves are thinned to 20 points an arm, and single seeds left out"),
)


@dataclass(frozen=True)
class Section:
    """A part of the page with its own heading; `body` is HTML, the rest plain text."""

    ident: str
    title: str
    body: str


@dataclass(frozen=True)
class Page:
    """A page before it is text.

    Attributes:
        title: heading.
        eyebrow: a few words above it.
        lead: a sentence or two below it, plain text.
        arms: of all sections.
        verdict: what stands at the top.
        sections: in order.
        foot: last line, plain text.
    """

    title: str
    eyebrow: str
    lead: str
    arms: Arms
    verdict: Verdict | None
    sections: Sequence[Section]
    foot: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: text, a smaller addition, and what it is sorted by."""

    text: str
    value: float | str | None = None
    small: str = ""
    css_class: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row; with an arm it is hidden together with the arm."""

    head: str
    cells: Sequence[Cell]
    arm: int | None = None
    value: float | str | None = field(default=None)


def write_page(path: str | Path, page: Page) -> int:
    """Write a page; returns its length in bytes.

    Raises:
        CompareError: it is larger than 5 MB.
    """
    path = Path(path)
    text = render(page)
    n_bytes = len(text.encode())
    if n_bytes > MAX_BYTES:
        raise CompareError(
            f"{path}: the page has {n_bytes / 1e6:.1f} MB, more than 5; name fewer files"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return n_bytes


def render(page: Page) -> str:
    """The page as HTML."""
    style = _style(page.arms)
    script = _asset("page.js")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<li><a href="#{s.ident}">{escape(s.title)}</a></li>' for s in page.sections)
    sections = "".join(
        f'<section id="{s.ident}" aria-labelledby="{s.ident}-h">'
        f'<h2 id="{s.ident}-h">{escape(s.title)}</h2>{s.body}</section>'
        for s in page.sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">'
        f"<title>{escape(page.title)}</title><style>{style}</style></head><body>"
        '<a class="skip" href="#content">to the content</a><div class="frame">'
        f'<header class="top"><div><p class="eyebrow">{escape(page.eyebrow)}</p>'
        f"<h1>{escape(page.title)}</h1><p>{escape(page.lead)}</p></div>"
        '<button id="theme" class="control" type="button">theme: auto</button></header>'
        f'<div class="columns"><nav class="contents" aria-label="contents"><details open>'
        f"<summary>Contents</summary><ol>{links}</ol></details></nav>"
        f'<main id="content">{_verdict(page.verdict)}{_legend(page.arms)}{sections}'
        f"<footer>{escape(page.foot)}</footer></main></div></div>"
        '<div id="tip" role="status" hidden></div>'
        f"{data_block(page.arms.names, ident='arms')}<script>{script}</script></body></html>\n"
    )


def figure(
    name: str,
    title: str,
    charts: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    note: str = "",
    css_class: str = "",
) -> str:
    """A figure with its caption, its data, and buttons that save both.

    Args:
        name: of the files that are saved, and unique on the page.
        title: heading.
        charts: SVG text, or HTML with several.
        columns: of the data.
        rows: of the data; numbers are kept to six digits.
        note: how to read it.
        css_class: of the element; `curves` where the script may change the x axis.
    """
    data = {"columns": list(columns), "rows": [[_plain(value) for value in row] for row in rows]}
    paragraph = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure id="fig-{escape(name)}" data-name="{escape(name)}" class="{css_class}">'
        f"<figcaption><h3>{escape(title)}</h3>{paragraph}</figcaption>{charts}"
        '<div class="tools control">'
        f'<button type="button" data-get="svg" aria-label="{escape(title)}: save as SVG">'
        "↓ SVG</button>"
        f'<button type="button" data-get="csv" aria-label="{escape(title)}: save data as CSV">'
        f"↓ CSV</button></div>{data_block(data)}</figure>"
    )


def both_widths(wide: str, narrow: str) -> str:
    """A chart in two layouts, of which the window's width chooses."""
    return f'<div class="wide-only">{wide}</div><div class="narrow-only">{narrow}</div>'


def table(caption: str, heads: Sequence[str], rows: Sequence[TableRow]) -> str:
    """A table that can be sorted by any column, in a box that scrolls on its own.

    Args:
        caption: what it shows, plain text.
        heads: of all columns, the first that of the rows' own heads.
        rows: with one cell for each further column.
    """
    kinds = ["text"] + [
        "text" if any(isinstance(row.cells[i].value, str) for row in rows) else "number"
        for i in range(len(heads) - 1)
    ]
    words = [
        i > 0 and any(row.cells[i - 1].css_class == "words" for row in rows)
        for i in range(len(heads))
    ]
    head = "".join(
        f'<th scope="col" aria-sort="none" data-kind="{kind}"'
        f"{' class=words' if is_words else ''}>"
        f'<button type="button">{escape(name)}</button></th>'
        for name, kind, is_words in zip(heads, kinds, words, strict=True)
    )
    body = "".join(_table_row(row) for row in rows)
    return (
        f'<div class="table-box" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def estimate_cell(
    mean: float | None,
    limits: Sequence[float | None] | None = None,
    *,
    digits: int = 2,
    signed: bool = False,
) -> Cell:
    """A mean with its interval; signed numbers whose interval leaves out 0 are coloured."""
    if mean is None:
        return Cell("–")
    text = with_sign(mean, digits) if signed else minus(format(mean, f",.{digits}f"))
    low, high = limits if limits else (None, None)
    if low is None or high is None or low == high:
        return Cell(text, mean)
    ends = (with_sign(v, digits) if signed else minus(f"{v:,.{digits}f}") for v in (low, high))
    small = f"[{', '.join(ends)}]"
    side = side_of_difference({"low": low, "high": high}) if signed else ""
    return Cell(text, mean, small, {ABOVE: "up", BELOW: "down"}.get(side, ""))


def panels_a_line(n_panels: int) -> int:
    """How many panels stand side by side on a wide page, so that no line has one alone."""
    return n_panels if n_panels <= 4 else min((4, 3), key=lambda n: -n_panels % n)


def minus(text: str) -> str:
    """Hyphens before digits as minus signs."""
    return text.replace("-", "−")


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """A list of terms, plain text, and what they are, HTML."""
    items = "".join(f"<dt>{escape(term)}</dt><dd>{text}</dd>" for term, text in pairs)
    return f'<dl class="facts">{items}</dl>'


def paragraph(text: str, css_class: str = "") -> str:
    """Plain text as a paragraph."""
    return f'<p class="{css_class}">{escape(text)}</p>' if css_class else f"<p>{escape(text)}</p>"


def data_block(data: Any, ident: str = "") -> str:
    """Data as JSON in an element that no browser runs; it cannot close the element either."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    which = f' id="{ident}"' if ident else ' class="data"'
    return f'<script type="application/json"{which}>{text}</script>'


def _plain(value: Any) -> Any:
    """A number to six digits, None for one that is not finite; anything else as it is."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        value = float(f"{value:.6g}")
        return int(value) if value.is_integer() and abs(value) < 1e15 else value
    return value


def _table_row(row: TableRow) -> str:
    arm = f' data-arm="{row.arm}"' if row.arm is not None else ""
    picture = swatch(row.arm) if row.arm is not None else ""
    head_value = escape(str(row.value if row.value is not None else row.head))
    cells = "".join(
        f'<td data-v="{"" if cell.value is None else escape(str(cell.value))}"'
        f"{f' class={chr(34)}{cell.css_class}{chr(34)}' if cell.css_class else ''}>"
        f"<b>{escape(cell.text)}</b>"
        f"{f' <small>{escape(cell.small)}</small>' if cell.small else ''}</td>"
        for cell in row.cells
    )
    return (
        f'<tr{arm}><th scope="row" data-v="{head_value}">{picture}{escape(row.head)}</th>'
        f"{cells}</tr>"
    )


def _verdict(verdict: Verdict | None) -> str:
    if verdict is None:
        return ""
    sign = {"good": "▲", "bad": "▼", "open": "≈"}[verdict.tone]
    sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.sentences)
    tiles = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'
        for value, words in verdict.tiles
    )
    return (
        f'<section class="verdict {verdict.tone}" aria-label="verdict"><p class="headline">'
        f'<span class="sign" aria-hidden="true">{sign}</span>{escape(verdict.headline)}</p>'
        f"<ul>{sentences}</ul>{f'<div class=tiles>{tiles}</div>' if tiles else ''}</section>"
    )


def _legend(arms: Arms) -> str:
    if not arms.names:
        return ""
    items = "".join(
        f'<li><button type="button" data-toggle="{i}" aria-pressed="true" '
        f'data-label="{escape(arms.label(name))}" title="{escape(name)}">'
        f"{swatch(i)}{escape(arms.label(name))}</button></li>"
        for i, name in enumerate(arms.names)
    )
    many = " many" if len(arms.names) > MANY_ARMS else ""
    return (
        f'<div class="legend{many}" role="group" aria-label="arms: click to hide or show"><ul>'
        f'{items}<li class="control"><button type="button" data-all>show all</button></li>'
        "</ul></div>"
    )


def _style(arms: Arms) -> str:
    colours = arm_colours(arms.names)
    in_order = [colours[name] for name in arms.names]
    light, dark = variables("light", in_order), variables("dark", in_order)
    classes = "".join(f".a{i}{{--c:var(--arm-{i})}}" for i in range(len(arms.names)))
    classes += "".join(f".key .way-{way}{{background:var(--way-{way})}}"
                       f".chart .way-{way}{{fill:var(--way-{way})}}"
                       for way in BEHAVIOURS)  # fmt: skip
    classes += "".join(
        f".h{i}{{background:var(--heat-{i})}}.chart .h{i}{{fill:var(--heat-{i})}}"
        f".chart .t{i}{{fill:var(--heat-ink-{i})}}"
        for i in range(N_SHADES)
    )
    return (
        f":root{{{light}}}@media screen and (prefers-color-scheme:dark){{"
        f":root:not([data-theme=light]){{{dark}}}}}"
        f"@media screen{{:root[data-theme=dark]{{{dark}}}}}{_asset('page.css')}{classes}"
    )


@cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def thinned(indices: int, max_points: int) -> list[int]:
    """Which of so many points to keep: the first, the last, and evenly between."""
    if indices <= max_points:
        return list(range(indices))
    return sorted({round(i * (indices - 1) / (max_points - 1)) for i in range(max_points)})

"""The status of a run as one panel: `render(status)` is a pure function to a rich renderable.

Everything that comes from a run (names, messages) is put in as text, never as markup, and what is
not printable is left out: a run's name cannot steer a terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.status import Status, is_number
from train.watchdog import WHOLE_STEP

FOUR_PARTS = ("searched", "entity", "passage", "accuracy")
LEVELS = "▁▂▃▄▅▆▇█"
PLAIN_LEVELS = "_.-=+*#@"
STOPS = {
    "answer": "green", "invalid": "red", "turn_limit": "yellow", "budget": "magenta",
    "length": "blue",
}  # fmt: skip
STAGE_WORDS = {"optimizer": "update", "generate": "rollout"}
SILENT_S = 60.0
"""Seconds without a sign of life that are worth saying."""
JOINT = "\ue000"
"""Keeps a name and its number on one line; `fit` writes it as a space. rich breaks lines at every
real one, the no-break space included, so it is a character of the private use area."""


def render(
    status: Status, *, since_line_s: float = 0.0, rows: int | None = None, plain: bool = False
) -> RenderableType:
    """The panel of a run.

    Args:
        status: the run as it stands.
        since_line_s: seconds since its last line, for the clocks.
        rows: terminal rows at most (each content row counted as one; narrow ones fold further);
            the least important rows go first. None = all.
        plain: ASCII alone, for terminals that know nothing else.
    """
    content = _rows(status, since_line_s, plain)
    if rows is not None:
        content = _most_important(content, max(1, rows - 2))
    table = Table.grid(padding=(0, 1), expand=True)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(ratio=1, overflow="fold")
    for name, value in content:
        table.add_row(name, value)
    return Panel(
        table,
        title=Text(f" {clean(status.name)} ", style="bold"),
        title_align="left",
        subtitle=Text(f" {_subtitle(status)} "),
        subtitle_align="right",
        box=box.ASCII if plain else box.ROUNDED,
        border_style="yellow" if status.warnings else "dim",
        padding=(0, 1),
    )


def fit(
    status: Status, console: Console, rows: int | None = None, since_line_s: float = 0.0
) -> list[str]:
    """The panel as lines of text, with the console's colours and of its width.

    Args:
        status: the run as it stands.
        console: says what the terminal can do.
        rows: lines at most. Rows fold on a narrow console, so that fewer are tried until it fits.
        since_line_s: seconds since the last line.
    """
    plain = not (console.encoding or "").lower().startswith("utf")
    lines: list[str] = []
    for n_rows in range(rows, 2, -1) if rows else (None,):
        with console.capture() as capture:
            console.print(render(status, since_line_s=since_line_s, rows=n_rows, plain=plain))
        lines = capture.get().replace(JOINT, " ").rstrip("\n").split("\n")
        if rows is None or len(lines) <= rows:
            break
    return lines[:rows]


# ---------------------------------------------------------------- rows

Row = tuple[str, RenderableType]

IMPORTANCE = ("", "reward", "health", "held out", "time", "search", "step", "ends")
"""Names of rows, the one that goes last first."""


def _rows(status: Status, since_line_s: float, plain: bool) -> list[Row]:
    """All rows that have something to say, from top to bottom."""
    newest = status.newest
    bar = ProgressBar(total=max(1, status.max_steps), completed=status.step)
    rows: list[Row] = [("", Text(_plain_bar(status)) if plain else bar)]
    rows.append(("time", _time(status, since_line_s)))
    reward = Text()
    _number(reward, "", newest.get("reward"), "{:.3f}", style="bold")
    reward.append(sparkline(status.series("reward"), 24, plain), style="cyan")
    _number(reward, "  right", newest.get("rewards/accuracy/mean"), "{:.2f}")
    search = Text()
    _number(search, "image", newest.get("search/rate_image"), "{:.2f}")
    _number(search, " text", newest.get("search/rate_text"), "{:.2f}")
    _number(search, " calls", newest.get("search/calls_per_episode"), "{:.1f}")
    rows += [("reward", reward), ("search", search), ("step", _step(status))]
    rows.append(("ends", _ends(status, plain)))
    rows.append(("held out", _evaluation(status)))
    for warning in status.warnings:
        text = Text()
        text.append("! ", style="bold yellow")
        text.append(f"{clean(warning.message)}: ", style="yellow").append(clean(warning.fix))
        rows.append(("health", text))
    return [(name, value) for name, value in rows if not isinstance(value, Text) or value.plain]


def _most_important(rows: list[Row], n: int) -> list[Row]:
    """n rows, in their order; of several warnings the first stays longest."""
    ranked = sorted(range(len(rows)), key=lambda i: (IMPORTANCE.index(rows[i][0]), i))
    kept = set(ranked[:n])
    return [row for i, row in enumerate(rows) if i in kept]


def _subtitle(status: Status) -> str:
    steps = f"step {status.step}" + (f"/{status.max_steps}" if status.max_steps else "")
    if status.is_over:
        return f"{steps}, finished"
    if status.silent_s is not None and status.silent_s > SILENT_S:
        return f"{steps}, no sign of life for {duration(status.silent_s)}"
    stage = STAGE_WORDS.get(status.stage, status.stage)
    return f"{steps}, {clean(stage)}" if stage else steps


def _time(status: Status, since_line_s: float) -> Text:
    text = Text(f"{duration(status.time_s + since_line_s)}{JOINT}gone")
    left = status.left_s(since_line_s)
    if left is not None and not status.is_over:
        text.append(f", {duration(left)}{JOINT}left")
    _number(text, "  tokens/s", status.newest.get("speed/tokens_per_s"), "{:,.0f}")
    if status.memory_gb is not None:
        _number(text, " memory", status.memory_gb, f"{{:.1f}}{JOINT}GB")
    return text


def _step(status: Status) -> Text:
    """Seconds of the last step by part; `else` is what no timer covers, such as saving."""
    newest, text = status.newest, Text()
    parts = {part: newest.get(f"time/{part}_s") for part in WHOLE_STEP}
    whole = sum(seconds or 0.0 for seconds in parts.values())
    if whole:
        text.append(f"{_seconds(whole)}{JOINT}s")
    if is_number(newest.get("time/rollout_s")):
        _number(text, " rollout", newest["time/rollout_s"], "{:.2f}")
    _number(text, " loss", parts["loss"], "{:.2f}")
    _number(text, " update", parts["optimizer"], "{:.2f}")
    for stage in ("reward", "tools", "sync"):
        seconds = newest.get(f"time/{stage}_s")
        if whole and is_number(seconds) and seconds / whole > 0.02:  # type: ignore[operator]
            _number(text, f" {stage}", seconds, "{:.2f}")
    return text


def _ends(status: Status, plain: bool) -> Text:
    """Why the episodes of the last step ended: a bar of 20 cells, and the shares."""
    shares = {
        name: status.newest[f"stop/{name}"]
        for name in STOPS
        if is_number(status.newest.get(f"stop/{name}")) and status.newest[f"stop/{name}"] > 0
    }
    text = Text()
    for (name, _), cells in zip(shares.items(), _cells(list(shares.values()), 20), strict=True):
        text.append((name[0] if plain else "█") * cells, style=STOPS[name])
    for name, share in shares.items():
        text.append(" ")
        text.append(f"{name}{JOINT}{share:.0%}", style=STOPS[name])
    return text


def _evaluation(status: Status) -> Text:
    """The four parts of the last evaluation, each with its change since the floor."""
    line, floor, text = status.evaluation, status.floor, Text()
    if line is None:
        return text
    text.append(f"step{JOINT}{line['step']}:")
    for part in FOUR_PARTS:
        value = line.get(f"eval/{part}")
        _number(text, " right" if part == "accuracy" else f" {part}", value, "{:.2f}")
        before = floor.get(f"eval/{part}") if floor is not None else None
        if line is not floor and is_number(value) and is_number(before):
            change = value - before  # type: ignore[operator]
            style = "dim" if abs(change) < 0.005 else "green" if change > 0 else "red"
            text.append(f"{JOINT}{change:+.2f}", style=style)
    return text


# ---------------------------------------------------------------- pieces


def sparkline(values: Sequence[float], width: int, plain: bool = False) -> str:
    """The last `width` values as a row of small bars, the lowest empty and the highest full.

    Example: 0, 1, 2 is "▁▄█"-like; equal values are all lowest, since nothing moves.
    """
    shown = list(values)[-width:]
    if not shown:
        return ""
    levels = PLAIN_LEVELS if plain else LEVELS
    low, high = min(shown), max(shown)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return " " + "".join(levels[round((value - low) * scale)] for value in shown)


def duration(seconds: float) -> str:
    """Minutes and seconds, from an hour on hours and minutes: 0:07, 12:34, 3 h 05 min."""
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}{JOINT}h{JOINT}{whole % 3600 // 60:02d}{JOINT}min"


def clean(text: str) -> str:
    """Only what prints, in one line: escape codes of a name or message are data."""
    return "".join(char if char.isprintable() else " " for char in text)


def _number(text: Text, name: str, value: object, form: str, style: str = "") -> None:
    """Appends `name value`; nothing where there is no number."""
    if not is_number(value):
        return
    words = name.strip()
    text.append(name[: len(name) - len(name.lstrip())])
    if words:
        text.append(words + JOINT, style="dim")
    text.append(form.format(value), style=style)


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds < 100 else f"{seconds:.0f}"


def _cells(shares: Sequence[float], width: int) -> list[int]:
    """Whole cells for each share, `width` in all; what rounding leaves goes to the largest rests.

    Example: 0.5, 0.3, 0.2 of 4 cells: 2, 1.2, 0.8 -> 2, 1, 1.
    """
    total = sum(shares)
    if not total:
        return [0 for _ in shares]
    exact = [share / total * width for share in shares]
    cells = [int(part) for part in exact]
    by_rest = sorted(range(len(exact)), key=lambda i: cells[i] - exact[i])
    for i in by_rest[: width - sum(cells)]:
        cells[i] += 1
    return cells


def _plain_bar(status: Status) -> str:
    width = 30
    done = min(width, status.step * width // max(1, status.max_steps))
    return "#" * done + "." * (width - done)

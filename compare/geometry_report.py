"""What `obm diagnose` leaves: a compact table, a page, and one line a tensor and model as csv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compare.rows import csv_text, markdown_table

MODEL_COLUMNS = (
    ("norm", "norm"),
    ("unchanged", "unchanged"),
    ("below_bf16", "below bf16"),
    ("support", "support"),
    ("effective", "90 % of energy in"),
    ("principal", "principal"),
    ("principal_chance", "by chance"),
    ("left_by_average", "left by average"),
)
PAIR_COLUMNS = (
    ("cosine", "cosine"),
    ("norm_ratio", "norm ratio"),
    ("overlap", "overlap"),
    ("jaccard", "Jaccard"),
    ("jaccard_chance", "by chance"),
    ("effective_jaccard", "Jaccard of 90 %"),
    ("effective_jaccard_chance", "by chance"),
    ("conflict", "sign conflicts"),
)
AVERAGE_KEY = "average_norm"
SPECTRUM_COLUMNS = ("stable_rank", "leading_energy")


def text_table(record: Mapping[str, Any]) -> list[str]:
    """Lines for a terminal: every update, every pair, by group of tensors; advice last."""
    lines = []
    for name, group in _overview(record):
        lines.append(f"{name}: {group['entries']:,} entries")
        lines += _aligned(_model_cells(group))
        if group["pairs"]:
            lines += _aligned(_pair_cells(group))
        lines.append("")
    return [*lines, *_advice_lines(record)]


def markdown(record: Mapping[str, Any]) -> str:
    """The page: overview, advice, layers, modules, spectra, and how it was made.

    Args:
        record: What `merge.diagnosis.diagnose` returned, with command, commit and hardware.
    """
    models = ", ".join(f"{name} (`{source}`)" for name, source in record["models"].items())
    lines = [
        "# Geometry of updates",
        "",
        f"Updates of {models} from `{record['base']}`. An entry is in the support where it moved "
        f"by more than {record['threshold']:g}; principal is the share of the squared norm between "
        f"the leading {record['rank']} singular directions of the base's weight. docs/sar.md has "
        "every figure's formula.",
        "",
        "## Advice",
        "",
        *(f"* {line}" for line in _advice_lines(record)),
        "",
    ]
    for name, group in _overview(record):
        lines += [f"## {name.capitalize()}", "", f"{group['entries']:,} entries.", ""]
        lines += [*markdown_table(_model_cells(group)), ""]
        lines += [*markdown_table(_pair_cells(group)), ""] if group["pairs"] else []
    for title, key in (("Layers", "layers"), ("Modules", "modules")):
        cells = _grouped_cells(title[:-1].lower(), record[key])
        lines += [f"## {title}", "", *markdown_table(cells), ""]
    spectra = _spectrum_cells(record)
    if len(spectra) > 1:
        lines += ["## Spectra", "", *markdown_table(spectra), ""]
    made = f"Made by `{record['command']}` at commit {record['commit']} on {record['hardware']}."
    return "\n".join([*lines, made, ""])


def tensor_csv(record: Mapping[str, Any]) -> str:
    """One line a tensor and model, and one a tensor and pair of models."""
    keys = dict.fromkeys(["tensor", "group", "layer", "module", "entries", "model", "other"])
    keys |= dict.fromkeys([*dict(MODEL_COLUMNS), *SPECTRUM_COLUMNS, *dict(PAIR_COLUMNS)])
    lines: list[dict[str, Any]] = []
    for row in record["tensors"]:
        where = {key: row[key] for key in ("tensor", "group", "layer", "module", "entries")}
        for name, figures in row["models"].items():
            own = {key: figures[key] for key, _ in MODEL_COLUMNS if key in figures}
            spectrum = row["spectra"].get(name, {})
            own |= {key: spectrum[key] for key in SPECTRUM_COLUMNS if key in spectrum}
            lines.append({**where, "model": name, **_rounded(own)})
        for pair, figures in row["pairs"].items():
            name, other = pair.split("/")
            own = {key: figures[key] for key, _ in PAIR_COLUMNS if key in figures}
            lines.append({**where, "model": name, "other": other, **_rounded(own)})
    return csv_text(list(keys), lines)


def _overview(record: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    groups = record["groups"]
    named = [(name.replace("_", " and "), groups[name]) for name in ("linear", "norm_bias",
             "embedding") if name in groups]  # fmt: skip
    return [*named, ("all", record["total"])] if len(named) > 1 else named


def _advice_lines(record: Mapping[str, Any]) -> list[str]:
    return [f"{item['about']}: {item['method']}. {item['reason']}" for item in record["advice"]]


def _model_cells(group: Mapping[str, Any]) -> list[list[str]]:
    shown = [(key, head) for key, head in MODEL_COLUMNS if _is_known(key, group["models"])]
    rows = [[name, *_cells(own, shown)] for name, own in group["models"].items()]
    return [["model", *(head for _, head in shown)], *rows]


def _pair_cells(group: Mapping[str, Any]) -> list[list[str]]:
    rows = [[name, *_cells(own, PAIR_COLUMNS)] for name, own in group["pairs"].items()]
    return [["pair", *(head for _, head in PAIR_COLUMNS)], *rows]


def _grouped_cells(title: str, groups: Mapping[str, Any]) -> list[list[str]]:
    """One row a group: the effective support of every model, then how each pair meets."""
    first = next(iter(groups.values()))
    heads = [title, *(f"{name}: 90 % in" for name in first["models"])]
    heads += [f"{name}: principal / chance" for name in first["models"]]
    for pair in first["pairs"]:
        heads += [f"{pair}: cosine", f"{pair}: conflicts"]
    heads.append("norm of average")
    rows = []
    for name, group in groups.items():
        models = group["models"].values()
        cells = [name, *(_number(own["effective"]) for own in models)]
        for own in models:
            chance = own.get("principal_chance")
            cells.append(_number(own["principal"] / chance if chance else None))
        for pair in group["pairs"].values():
            cells += [_number(pair.get("cosine")), _number(pair.get("conflict"))]
        rows.append([*cells, _number(group.get(AVERAGE_KEY))])
    return [heads, *rows]


def _spectrum_cells(record: Mapping[str, Any]) -> list[list[str]]:
    rows = [["tensor", "model", "largest singular values", "stable rank", "energy of these"]]
    for row in record["tensors"]:
        for name, own in row["spectra"].items():
            values = " ".join(f"{value:.3g}" for value in own["values"][:4])
            cells = [values, f"{own['stable_rank']:.1f}", _number(own["leading_energy"])]
            rows.append([row["tensor"], name, *cells])
    return rows


def _is_known(key: str, models: Mapping[str, Mapping[str, float]]) -> bool:
    return any(key in own for own in models.values())


def _cells(figures: Mapping[str, float], columns: Sequence[tuple[str, str]]) -> list[str]:
    return [_number(figures.get(key)) for key, _ in columns]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"


def _rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.6g}") for key, value in figures.items()}


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]  # fmt: skip

"""Pictures by matplotlib: no display needed, equal files from equal data, whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def start_drawing(font_size: float) -> Any:
    """Returns `matplotlib.pyplot`, set up to draw into files.

    Args:
        font_size: in points, of all text that says nothing else.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # without a salt the identifiers in an SVG are random, and equal data would give another file
    matplotlib.rcParams.update({"svg.hashsalt": "obm-warmstart", "font.size": font_size})
    return plt


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Writes a figure to every path and closes it.

    Args:
        figure: matplotlib's.
        paths: for example `compare.png` and `compare.svg`; the suffix says the format.
    """
    import matplotlib.pyplot as plt

    for path in paths:
        metadata = {"Date": None} if path.suffix == ".svg" else None
        temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
        figure.savefig(temporary, dpi=150, metadata=metadata, format=path.suffix[1:])
        os.replace(temporary, path)
    plt.close(figure)

"""Draws the map of every place from Natural Earth's borders; the results are committed.

    npm pack world-atlas@2.0.2 i18n-iso-countries@7.14.0      (and unpack both)
    python -m environments.atlas.draw_maps WORLD/countries-10m.json CODES/codes.json OUTPUT

A map shows the place among its neighbours, north up, in an equirectangular projection around its
middle: 128x96 pixels of three classes (sea, other land, the place), written as a PNG of two bits a
pixel. Colours are chosen when a map is loaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from environments.atlas.entities import MAP_COLOURS, load_entities

WIDTH, HEIGHT = 128, 96
MARGIN = 0.2  # of the place's extent, on each side
# Parts that lie apart (French Guiana, Hawaii) are drawn where they fall into the frame, and widen
# it only when they are this large a share of the largest part.
LARGE_PART = 0.25
LEAST_EXTENT = 0.01  # degrees; what is smaller would show quantised borders


@dataclass(frozen=True)
class Part:
    """One polygon: its outer ring and its holes, each [points, 2] of longitude and latitude."""

    code: str
    ring: np.ndarray
    holes: tuple[np.ndarray, ...]


def read_parts(topology: dict[str, Any], codes: dict[str, str]) -> list[Part]:
    """Every polygon of a TopoJSON topology, named by the alpha-2 code of its place.

    Args:
        topology: with the object `countries`; geometries have an ISO 3166-1 numeric `id`.
        codes: numeric code or English name -> alpha-2 code in lower case.
    """
    scale, translate = (np.array(topology["transform"][key]) for key in ("scale", "translate"))
    arcs = [np.cumsum(arc, axis=0) * scale + translate for arc in topology["arcs"]]
    parts = []
    for geometry in topology["objects"]["countries"]["geometries"]:
        names = (geometry.get("id"), geometry["properties"]["name"])
        code = next((codes[name] for name in names if name in codes), "")
        polygons = geometry.get("arcs", [])
        for rings in [polygons] if geometry["type"] == "Polygon" else polygons:
            outer, *holes = (_join(arcs, ring) for ring in rings)
            parts.append(Part(code, outer, tuple(holes)))
    return parts


def draw_map(parts: list[Part], code: str) -> Image.Image | None:
    """The map of one place, a picture of class numbers (0 sea, 1 other land, 2 the place).

    Returns:
        Mode P, 128x96; None if no part has this code.
    """
    own = [part for part in parts if part.code == code]
    if not own:
        return None
    largest = max(own, key=lambda part: _area(part.ring))
    centre = (largest.ring.min(0) + largest.ring.max(0)) / 2
    frame = _frame(own, centre)
    classes = Image.new("P", (WIDTH, HEIGHT), 0)
    brush = ImageDraw.Draw(classes)
    for part in [*(p for p in parts if p.code != code), *own]:
        ring = _place(part.ring, centre, frame)
        if ring is None:
            continue
        # an edge of its own colour keeps an island of less than a pixel on the map
        brush.polygon(ring, fill=2 if part.code == code else 1)
        if part.code == code:
            brush.line(ring, fill=2, width=1)
        for hole in part.holes:
            inner = _place(hole, centre, frame)
            if inner is not None:  # an enclave is drawn again by whom it belongs to
                brush.polygon(inner, fill=0)
    for part in parts:  # enclaves (Lesotho, the Vatican) lie in the holes of others
        ring = _place(part.ring, centre, frame) if part.code != code else None
        if ring is not None and any(_encloses(other, part) for other in own):
            brush.polygon(ring, fill=1)
    classes.putpalette([channel for colour in MAP_COLOURS for channel in colour])
    return classes


def main(borders: str, codes: str, output: str) -> None:
    """Writes OUTPUT/<iso>.png for every place of the atlas that the borders hold."""
    topology = json.loads(Path(borders).read_text(encoding="utf-8"))
    names = {name: e.iso for e in load_entities().values() for name in e.names}
    numeric = {row[2]: row[0].lower() for row in json.loads(Path(codes).read_text())}
    parts = read_parts(topology, {**names, **numeric})
    for iso in load_entities():
        picture = draw_map(parts, iso)
        if picture is None:
            print(f"{iso}: no borders")
        else:
            picture.save(Path(output) / f"{iso}.png", bits=2, optimize=True)


def _join(arcs: list[np.ndarray], indexes: list[int]) -> np.ndarray:
    """One ring of its arcs; ~i stands for arc i backwards, the shared end points come once."""
    pieces = [arcs[i] if i >= 0 else arcs[~i][::-1] for i in indexes]
    ring = np.concatenate([piece[:-1] for piece in pieces] + [pieces[-1][-1:]])
    ring[:, 0] = np.unwrap(ring[:, 0], period=360)  # rings go on across the date line
    return ring


def _area(ring: np.ndarray) -> float:
    x, y = ring[:, 0] * np.cos(np.deg2rad(ring[:, 1].mean())), ring[:, 1]
    return abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2


def _project(ring: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Degrees east and north of the centre, the ring turned to the centre's side of the globe."""
    east = ring[:, 0] - centre[0]
    east = east - 360 * np.round((east.min() + east.max()) / 720)
    return np.stack([east * np.cos(np.deg2rad(centre[1])), ring[:, 1] - centre[1]], axis=1)


def _frame(own: list[Part], centre: np.ndarray) -> tuple[float, float, float]:
    """Left edge, upper edge and degrees a pixel of the frame around the place's large parts."""
    least = LARGE_PART * max(_area(part.ring) for part in own)
    points = np.concatenate([_project(p.ring, centre) for p in own if _area(p.ring) >= least])
    low, high = points.min(0), points.max(0)
    extent = np.maximum(high - low, LEAST_EXTENT) * (1 + 2 * MARGIN)
    degrees = float(max(extent[0] / WIDTH, extent[1] / HEIGHT))
    middle = (low + high) / 2
    return middle[0] - degrees * WIDTH / 2, middle[1] + degrees * HEIGHT / 2, degrees


def _place(
    ring: np.ndarray, centre: np.ndarray, frame: tuple[float, float, float]
) -> list[tuple[float, float]] | None:
    """A ring in pixels, or None if it lies outside the frame or goes round the globe."""
    if np.ptp(ring[:, 0]) > 300:  # Antarctica
        return None
    points = _project(ring, centre)
    left, top, degrees = frame
    x, y = (points[:, 0] - left) / degrees, (top - points[:, 1]) / degrees
    if x.max() < 0 or x.min() > WIDTH or y.max() < 0 or y.min() > HEIGHT:
        return None
    return list(zip(x.tolist(), y.tolist(), strict=True))


def _encloses(outer: Part, inner: Part) -> bool:
    """Whether a hole of `outer` holds the first point of `inner` (by its bounding box)."""
    point = inner.ring[0]
    return any((h.min(0) <= point).all() and (point <= h.max(0)).all() for h in outer.holes)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])

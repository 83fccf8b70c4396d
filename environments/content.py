"""Contents and their names: canonical text, hashes of pictures, files written whole."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


def canonical(value: Any) -> str:
    """JSON with sorted keys, without spaces, in ASCII: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def normalised(query: str) -> str:
    """A query in Unicode's composed form with single spaces; case stays, some encoders need it."""
    return " ".join(unicodedata.normalize("NFC", str(query)).split())


def picture_hash(image: Image) -> str:
    """Hash of a picture's size and pixels, whatever file it came from.

    A region of a picture is a picture of its own, so the region is in the hash.
    """
    pixels = image if image.mode == "RGB" else image.convert("RGBA")
    return sha256(canonical([pixels.mode, *pixels.size]).encode() + pixels.tobytes())


def image_names(value: str) -> list[str]:
    """Names of the pictures that a stored value shows."""
    return [row["image"] for row in json.loads(value).get("hits", []) if row["image"] is not None]


def encode_png(image: Image) -> bytes:
    """PNG of a picture as L, RGB or RGBA, without metadata."""
    if image.mode not in ("L", "RGB", "RGBA"):
        has_alpha = image.mode in ("LA", "PA", "La", "RGBa") or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    image = image.copy()
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that others see whole or not at all; one that is there is only touched."""
    try:
        os.utime(path)  # young files are safe from `prune`
        return
    except OSError:
        path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

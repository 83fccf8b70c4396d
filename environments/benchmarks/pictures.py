"""Decodes a picture as data sets hold it: PIL, bytes, {"bytes", "path"}, file name.

Base64 text and addresses are refused unless they are asked for: a benchmark that fetches while it
is read changes with the web, and its address learns who evaluates.
"""

from __future__ import annotations

import base64
import binascii
import io
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from environments.pixels import to_rgb, upright

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded, by the names of Pillow's decoders (JPEG's takes MPO, too): no other one sees the
bytes of a data set, least of all the one that hands EPS to Ghostscript."""
MAX_FETCHED_BYTES = 32 * 2**20
FETCH_TIMEOUT_S = 20.0
_ADDRESS = re.compile(r"https?://", re.IGNORECASE)
_DATA_ADDRESS = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]{200,}={0,2}\s*")


class PictureError(ValueError):
    """A picture that cannot be decoded."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason
        self.fix = fix


def decode_picture(value: Any, folder: Path, fetch: bool = False) -> Image.Image:
    """The picture, upright (EXIF) and RGB.

    Args:
        value: PIL image, bytes, a mapping with `bytes` or `path` (as `datasets` stores pictures),
            or text: a file name; with `fetch` also base64 or an address.
        folder: file names are relative to it.
        fetch: take base64 text and addresses.

    Raises:
        PictureError: nothing there, not a picture, or a form that is refused.
    """
    if isinstance(value, Image.Image):
        return to_rgb(upright(value))
    if isinstance(value, Mapping):
        inner = value.get("bytes")
        if not inner:
            inner = value.get("path")
        if not inner:
            raise PictureError("neither bytes nor path", "fill it in or drop the row")
        return decode_picture(inner, folder, fetch)
    if isinstance(value, bytes | bytearray | memoryview):
        return _open(bytes(value))
    if not isinstance(value, str) or not value.strip():
        kind = type(value).__name__
        raise PictureError(f"no picture (got {kind})", "fill it in or drop the row")
    return _from_text(value.strip(), folder, fetch)


def check_picture_file(name: str, folder: Path, fetch: bool = False) -> None:
    """Looks whether a row's picture can be there, without decoding it.

    Args:
        name: file name, as `decode_picture` takes it; with `fetch` also base64 or an address.
        folder: file names are relative to it.
        fetch: let base64 text and addresses pass unseen.

    Raises:
        PictureError: no such file, no picture, or a form that is refused.
    """
    if fetch and (_ADDRESS.match(name) or _DATA_ADDRESS.match(name) or _BASE64.fullmatch(name)):
        return
    path = _file_of(name, folder)
    try:
        with Image.open(path, formats=FORMATS):
            pass
    except UnidentifiedImageError as error:
        raise PictureError(f"{path} is no picture", "store it as jpg, png or webp") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"{path}: a broken picture ({error})", "store it again") from error


def find_picture(folder: Path, name: str) -> Path | None:
    """The file `name`, with or without one of SUFFIXES, in the folder or below it; None if none is.

    Below it, the file whose path ends most like the name is meant: a copy may have more folders
    around it than the data set says, or fewer. What lies below is listed once a folder.

    Raises:
        PictureError: several fit as well.
    """
    for candidate in (folder / name, *(folder / f"{name}{suffix}" for suffix in SUFFIXES)):
        with suppress(OSError):  # a name too long for any file
            if candidate.is_file():
                return candidate
    files, wanted = _files_below(folder), Path(name)
    # a copy may be of another format; what follows the dot of `Q1.5` is no format but part of it
    stem = wanted.stem if wanted.suffix.lower() in (*SUFFIXES, ".tif", ".tiff") else wanted.name
    fitting: dict[int, list[Path]] = {}
    for path in files.get(wanted.name) or files.get(stem) or ():
        own, asked = path.relative_to(folder).parent.parts, wanted.parent.parts
        n_common = [*map(operator.eq, reversed(own), reversed(asked)), False].index(False)
        if n_common or not own or not asked:  # in a folder of another name it is another picture
            fitting.setdefault(n_common, []).append(path)
    best = fitting[max(fitting)] if fitting else []
    if len(best) > 1:
        shown = " and ".join(str(path.relative_to(folder)) for path in best[:2])
        raise PictureError(
            f"{len(best)} pictures in {folder} may be '{name[:80]}', such as {shown}",
            "name it with its folder",
        )
    return best[0] if best else None


_listed: dict[Path, dict[str, list[Path]]] = {}


def _files_below(folder: Path) -> dict[str, list[Path]]:
    """Pictures in the folder and below it, by their names and by their names without suffix."""
    if folder not in _listed:
        files: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if path.suffix.lower() in SUFFIXES:
                files.setdefault(path.name, []).append(path)
                files.setdefault(path.stem, []).append(path)
        _listed[folder] = files
    return _listed[folder]


def _from_text(text: str, folder: Path, fetch: bool) -> Image.Image:
    encoded = _DATA_ADDRESS.match(text)
    if fetch and (encoded or _BASE64.fullmatch(text)):
        try:
            return _open(base64.b64decode(text[encoded.end() :] if encoded else text))
        except binascii.Error as error:
            raise PictureError(f"broken base64 ({error})", "mend the row") from error
    if fetch and _ADDRESS.match(text):
        return _open(_download(text))
    return _open(_file_of(text, folder).read_bytes())


def _file_of(text: str, folder: Path) -> Path:
    """The picture's file; base64 text and addresses are refused."""
    if _DATA_ADDRESS.match(text) or _BASE64.fullmatch(text):
        raise PictureError("the picture is base64 text", "allow it with `fetch: true`")
    if _ADDRESS.match(text):
        raise PictureError(
            f"the picture is an address ({text[:60]})",
            "download the pictures and name their folder in `images`, or set `fetch: true`",
        )
    path = find_picture(folder, text)
    if path is None:
        raise PictureError(
            f"no picture '{text[:80]}' in {folder}", "name the folder of the pictures in `images`"
        )
    return path


def _download(address: str) -> bytes:
    from environments.fetch import SafeFetcher  # what is local needs no network
    from environments.web import WebError

    # as buckets say; what is no picture is found when it is opened
    types = ("image/*", "application/octet-stream", "binary/octet-stream", "")
    try:
        fetcher = SafeFetcher(timeout_s=FETCH_TIMEOUT_S, max_bytes=MAX_FETCHED_BYTES)
        return fetcher.fetch(address, types).body
    except WebError as error:
        reason = f"{address[:80]} cannot be fetched ({error})"
        raise PictureError(reason, "try again later, or download the pictures") from error


def _open(content: bytes) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        picture.load()  # a file that breaks off must be found here
    except UnidentifiedImageError as error:
        reason = f"{len(content)} bytes that are no picture"
        raise PictureError(reason, "store the file's own bytes (jpg, png, webp)") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PictureError(f"a broken picture ({error})", "store it again") from error
    return to_rgb(upright(picture))

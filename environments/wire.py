"""What travels between a search server and its clients: hits as JSON, pictures as bytes.

The layout is that of Search-R1's server: a document's `contents` is its title, a line break, its
text. Beside it stand `id`, and for picture hits on request `image`, a PNG in base64.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
from collections.abc import Iterator
from typing import Any

from PIL import Image, UnidentifiedImageError

from environments.pixels import to_rgb, upright
from environments.tools import Hit

TOKEN_VARIABLE = "OBM_SEARCH_TOKEN"
"""Environment variable with the bearer token, for the server and for its clients."""
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""What a picture may be: PIL's decoders for other formats are never reached."""


class BadPictureError(ValueError):
    """Bytes that are no acceptable picture; `status` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


def document_of(hit: Hit, with_image: bool = False) -> dict[str, Any]:
    """A hit as the server sends it."""
    title = " ".join(hit.title.splitlines())  # the first line of `contents` is the title
    document = {"id": hit.id, "contents": f"{title}\n{hit.text}" if hit.text else title}
    if with_image and hit.image is not None:
        document["image"] = encode_image(hit.image)
    return document


def hit_of(item: dict[str, Any], max_pixels: int) -> Hit:
    """A hit as a client reads it, from `{"document": ..., "score": ...}`.

    Raises:
        KeyError, TypeError, ValueError: the answer is not of this layout.
    """
    document = item["document"]
    title, _, text = str(document["contents"]).partition("\n")
    picture = document.get("image")
    return Hit(
        id=str(document.get("id", title)),
        title=title,
        text=text,
        score=float(item["score"]),
        image=None if picture is None else decode_image(from_base64(picture), max_pixels),
    )


def encode_image(image: Image.Image) -> str:
    """A picture as PNG in base64: no pixel changes, so remote results equal local ones."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_base64(text: Any) -> bytes:
    """The bytes behind base64 text; a `data:` prefix is allowed.

    Raises:
        BadPictureError: it is no base64.
    """
    if not isinstance(text, str):
        raise BadPictureError(f"a picture is base64 text, not {type(text).__name__}")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadPictureError("a picture is no valid base64") from error


def count_pixels(data: bytes, max_pixels: int) -> int:
    """Pixels of a picture that a stranger sent, by its header: a small file may unpack to
    gigabytes.

    Raises:
        BadPictureError: another format, broken, or more than `max_pixels` pixels.
    """
    with _opened(data, max_pixels) as image:
        return image.width * image.height


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decodes a picture that a stranger sent, upright (EXIF) and RGB; not one that is too large by
    its header.

    Raises:
        BadPictureError: another format, broken, or more than `max_pixels` pixels.
    """
    with _opened(data, max_pixels) as image:
        return to_rgb(upright(image))


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """The picture before a pixel of it is decoded; errors of decoding in the block are ours."""
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadPictureError(
                    f"a picture has {width} x {height} pixels; at most {max_pixels} are taken", 413
                )
            yield image
    except BadPictureError:
        raise
    except Image.DecompressionBombError as error:
        raise BadPictureError("a picture has too many pixels", 413) from error
    except UnidentifiedImageError as error:
        formats = ", ".join(PICTURE_FORMATS)
        raise BadPictureError(f"a picture is none of {formats}", 415) from error
    except Exception as error:  # decoders raise whatever broken data leads them to
        raise BadPictureError(f"a picture is broken ({type(error).__name__})") from error

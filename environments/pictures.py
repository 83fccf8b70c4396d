"""Pictures of the open web: fetched safely, decoded within limits, scaled down."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from environments.fetch import PICTURE_TYPES, SafeFetcher
from environments.web import WebError

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


class PictureError(WebError):
    """Bytes that are no picture, or one that is too large."""


def fetch_picture(fetcher: SafeFetcher, url: str, max_side: int = 512) -> Image:
    """A picture of the web, RGB, its longer side at most `max_side` pixels.

    Raises:
        WebError: refused, failed, or no picture.
    """
    return decode_picture(fetcher.fetch(url, PICTURE_TYPES).body, max_side)


def decode_picture(content: bytes, max_side: int = 512, max_pixels: int = 40_000_000) -> Image:
    """The first frame of an encoded picture, RGB and scaled down.

    Raises:
        PictureError: no picture, broken, or larger than `max_pixels` (which a few kilobytes can
            claim to be).
    """
    from PIL import Image

    from environments.pixels import to_rgb, upright

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes above Pillow's own mark: ours is below
            picture = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
        if picture.width * picture.height > max_pixels:
            raise PictureError(f"the picture has more than {max_pixels} pixels")
        picture.draft("RGB", (max_side, max_side))  # JPEG: decodes at a fraction of the size
        picture = to_rgb(upright(picture))
    except PictureError:
        raise
    except Exception as error:  # decoders of hostile bytes raise all sorts
        raise PictureError(f"no readable picture ({type(error).__name__})") from None
    picture.thumbnail((max_side, max_side))
    return picture

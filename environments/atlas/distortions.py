"""The same picture otherwise: turned, cut, compressed, drawn in another style.

Each maps a picture to a picture; `DISTORTIONS` names them for the recall table.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Distortion = Callable[[Image.Image], Image.Image]
GROUND = (128, 128, 128)
"""Colour that a turned picture leaves bare."""


def turn(degrees: float) -> Distortion:
    """Turned to the left; what was outside is grey."""
    return lambda image: image.rotate(
        degrees, Image.Resampling.BICUBIC, expand=degrees % 90 == 0, fillcolor=GROUND
    )


def cut(share: float, x: float = 0.5, y: float = 0.5) -> Distortion:
    """A part of `share` of width and height, from the middle or from a corner (x, y of 0 or 1)."""

    def apply(image: Image.Image) -> Image.Image:
        width, height = (max(round(side * share), 1) for side in image.size)
        left, top = round((image.width - width) * x), round((image.height - height) * y)
        return image.crop((left, top, left + width, top + height))

    return apply


def compress(quality: int, longest_px: int | None = None) -> Distortion:
    """Made smaller, if asked for, and saved as JPEG of that quality."""

    def apply(image: Image.Image) -> Image.Image:
        image = image.copy()
        if longest_px is not None:
            image.thumbnail((longest_px, longest_px))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("RGB")

    return apply


def as_poster(image: Image.Image) -> Image.Image:
    """Four levels a channel."""
    return ImageOps.posterize(image, 2)


def as_pastel(image: Image.Image) -> Image.Image:
    """Pale and soft, as with chalk."""
    pale = ImageEnhance.Color(image).enhance(0.5)
    return Image.blend(pale, Image.new("RGB", image.size, "white"), 0.35).filter(
        ImageFilter.GaussianBlur(1)
    )


def as_chalk(image: Image.Image) -> Image.Image:
    """Paler than the picture, stronger than `as_pastel`: the view that the robust index keeps."""
    pale = ImageEnhance.Color(image).enhance(0.6)
    return Image.blend(pale, Image.new("RGB", image.size, "white"), 0.25)


def as_comic(image: Image.Image) -> Image.Image:
    """Strong flat colours with black outlines."""
    flat = ImageOps.posterize(ImageEnhance.Color(image).enhance(1.5), 3)
    lines = np.asarray(image.convert("L").filter(ImageFilter.FIND_EDGES)) > 60
    pixels = np.asarray(flat).copy()
    pixels[lines] = 0
    return Image.fromarray(pixels)


def as_painting(image: Image.Image) -> Image.Image:
    """Strokes: each place takes the commonest tone around it."""
    return image.filter(ImageFilter.ModeFilter(7)).filter(ImageFilter.SMOOTH)


def as_grey(image: Image.Image) -> Image.Image:
    """Without colour."""
    return image.convert("L").convert("RGB")


def as_sketch(image: Image.Image) -> Image.Image:
    """Dark lines on white."""
    edges = ImageOps.autocontrast(image.convert("L").filter(ImageFilter.FIND_EDGES))
    return ImageOps.invert(edges).convert("RGB")


def unchanged(image: Image.Image) -> Image.Image:
    """The picture itself."""
    return image


DISTORTIONS: dict[str, Distortion] = {
    "as it is": unchanged,
    "turned by 10 degrees": turn(10),
    "turned by 25 degrees": turn(25),
    "turned by 90 degrees": turn(90),
    "upside down": turn(180),
    "mirrored": ImageOps.mirror,
    "middle 80 %": cut(0.8),
    "middle 60 %": cut(0.6),
    "upper left 80 %": cut(0.8, 0, 0),
    "upper left 60 %": cut(0.6, 0, 0),
    "JPEG of quality 10": compress(10),
    "24 pixels, JPEG of quality 30": compress(30, 24),
    "poster": as_poster,
    "pastel": as_pastel,
    "comic": as_comic,
    "painting": as_painting,
    "grey": as_grey,
    "sketch": as_sketch,
}

"""Pixels of a decoded picture as everything here wants them: upright, RGB, eight bits."""

from __future__ import annotations

from PIL import Image, ImageOps

_EXIF = ("exif", "Raw profile type exif", "Raw profile type APP1", "xmp", "XML:com.adobe.xmp")
"""Where Pillow looks for the orientation."""


def upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say; as it is, without them, where they are broken."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # SyntaxError, struct.error, AttributeError: which one differs by the format
        kept = image.copy()  # raises again if it was not the EXIF data
        for name in _EXIF:
            kept.info.pop(name, None)
        return kept


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent, as most viewers show it; of 16-bit grey
    the upper eight bits, where Pillow would clip to white."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
        image.info.pop("transparency", None)  # a number of 16 bits
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA")
    if has_alpha or (image.mode == "P" and "transparency" in image.info):
        # what lies under it is often black, and the drawing too
        drawn = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(drawn, mask=drawn.getchannel("A"))
    return image.convert("RGB")

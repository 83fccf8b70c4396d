"""Photos of flags, deterministic by seed.

A photo has its own crop, rotation, perspective, waving cloth, light, blur, noise and JPEG loss.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageFilter

PHOTO_SIZE = 56


def render_photo(
    flag: np.ndarray, seed: int, strength: float = 0.5, size: int = PHOTO_SIZE
) -> Image.Image:
    """A photo of a flag on a procedural background.

    Args:
        flag: flat flag [height, width, 3] of uint8.
        seed: decides every choice; the same seed and strength give the same pixels.
        strength: 0 is the flat flag, 0.5 the default, 1 hard.
        size: edge of the square photo in pixels.

    Returns:
        RGB picture of size x size.
    """
    random = np.random.default_rng(seed)
    resized = Image.fromarray(flag).resize((size + 8, size + 8), Image.Resampling.BOX)
    cloth = np.asarray(resized, dtype=np.float32)
    u, v, shade = _cloth_coordinates(random, strength, size)
    inside = (u >= 0) & (u <= 1) & (v >= 0) & (v <= 1)
    lit_cloth = _sample_bilinear(cloth, u, v) * shade[..., None]
    picture = np.where(inside[..., None], lit_cloth, _background(random, size))
    brightness = strength * random.uniform(-0.35, 0.35)
    tint = strength * random.uniform(-0.12, 0.12, size=3)
    picture *= 1 + brightness + tint
    photo = _to_image(picture)
    photo = photo.filter(ImageFilter.GaussianBlur(strength * random.uniform(0, 1.0)))
    noise = random.normal(0, 12 * strength, size=(size, size, 3))
    photo = _to_image(np.asarray(photo, dtype=np.float32) + noise)
    return _recompress(photo, quality=int(95 - 45 * strength * random.random()))


def render_two_flags(
    left: np.ndarray, right: np.ndarray, seed: int, strength: float = 0.5, size: int = PHOTO_SIZE
) -> Image.Image:
    """Two flags side by side, [size, 2 * size]: the scene in which a region argument pays."""
    scene = Image.new("RGB", (2 * size, size))
    scene.paste(render_photo(left, 2 * seed, strength, size), (0, 0))
    scene.paste(render_photo(right, 2 * seed + 1, strength, size), (size, 0))
    return scene


def render_unfamiliar_flag(seed: int) -> np.ndarray:
    """A made-up flag that nobody knows, [96, 128, 3] of uint8.

    Bands in random colours, and on most a disc, a cross or a triangle.
    """
    random = np.random.default_rng(seed)
    colours = random.integers(0, 256, size=(4, 3))
    flag = np.empty((96, 128, 3), dtype=np.uint8)
    n_bands = int(random.integers(1, 5))
    row, column = np.mgrid[0:96, 0:128]
    along = row / 96 if random.random() < 0.5 else column / 128
    flag[:] = colours[np.minimum((along * n_bands).astype(int), n_bands - 1) % 3]
    shape = random.integers(0, 4)
    if shape == 0:
        centre_row, centre_column = random.uniform(30, 66), random.uniform(30, 98)
        distance_2 = (row - centre_row) ** 2 + (column - centre_column) ** 2
        flag[distance_2 < random.uniform(10, 30) ** 2] = colours[3]
    elif shape == 1:
        width = random.integers(6, 16)
        flag[(abs(row - 48) < width) | (abs(column - random.integers(36, 72)) < width)] = colours[3]
    elif shape == 2:
        flag[column < (48 - abs(row - 48)) * random.uniform(0.6, 1.3)] = colours[3]
    return flag


def _cloth_coordinates(
    random: np.random.Generator, strength: float, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each pixel's place on the cloth, u and v in 0..1, and its shading; all [size, size]."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1) - 0.5
    angle = np.deg2rad(18 * strength * random.uniform(-1, 1))
    x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
    depth = 1 + strength * (random.uniform(-0.3, 0.3) * x + random.uniform(-0.3, 0.3) * y)
    scale = 1 + strength * random.uniform(-0.22, 0.22)
    u = x / depth * scale + 0.5 + strength * random.uniform(-0.12, 0.12)
    v = y / depth * scale + 0.5 + strength * random.uniform(-0.12, 0.12)
    waves, phase = random.uniform(1, 3), random.uniform(0, 2 * np.pi)
    bend = 2 * np.pi * waves * (u + 0.3 * v) + phase
    return u, v + 0.06 * strength * np.sin(bend), 1 + 0.35 * strength * np.cos(bend)


def _sample_bilinear(picture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    x = np.clip(u, 0, 1) * (width - 1)
    y = np.clip(v, 0, 1) * (height - 1)
    x0, y0 = np.minimum(x.astype(int), width - 2), np.minimum(y.astype(int), height - 2)
    fx, fy = (x - x0)[..., None], (y - y0)[..., None]
    top = picture[y0, x0] * (1 - fx) + picture[y0, x0 + 1] * fx
    bottom = picture[y0 + 1, x0] * (1 - fx) + picture[y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _background(random: np.random.Generator, size: int) -> np.ndarray:
    """A smooth patchwork: a random 3x3 grid of muted colours, enlarged."""
    grid = random.integers(60, 200, size=(3, 3, 3)).astype(np.uint8)
    smooth = Image.fromarray(grid).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float32)


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _recompress(photo: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")

"""Pictures as the policy reads them: pixels, placeholder tokens and M-RoPE positions.

Both the rollout and the loss use these, so that a token has the same position in the two of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from train.trajectories import image_hash

VISION_TOKENS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture after the image processor."""

    key: str
    """hash of the pixels: equal pictures are encoded once"""
    pixel_values: torch.Tensor
    """float [n_patches, channels * temporal * patch * patch]"""
    grid: tuple[int, int, int]
    """patches in time, height, width"""
    n_tokens: int
    """placeholder tokens in the text, n_patches / merge_size^2"""


class ImageStore:
    """Runs the image processor once for every distinct picture it is shown."""

    def __init__(self, image_processor: Any) -> None:
        self._processor = image_processor
        self._encoded: dict[str, EncodedImage] = {}
        self._sources: dict[str, Any] = {}
        self.merge_size = int(getattr(image_processor, "merge_size", 2))

    def encode(self, image: Any) -> EncodedImage:
        """Pixels and grid of one PIL image."""
        key = image_hash(image)
        if key not in self._encoded:
            features = self._processor(images=[image.convert("RGB")], return_tensors="pt")
            grid = [int(n) for n in np.asarray(features["image_grid_thw"])[0]]
            pixels = torch.as_tensor(np.asarray(features["pixel_values"]))
            n_tokens = grid[0] * grid[1] * grid[2] // self.merge_size**2
            self._encoded[key] = EncodedImage(key, pixels, (grid[0], grid[1], grid[2]), n_tokens)
            self._sources[key] = image
        return self._encoded[key]

    def pixels(self, picture: EncodedImage) -> Image.Image:
        """The picture as it was after resizing and before normalising, 8 bits a channel.

        Another image processor makes the same pixel values of it, whereas two ways of *resizing*
        differ by a few grey levels. A picture whose final size the processor would change again
        comes back as it is.
        """
        processor = self._processor
        size, merge = int(processor.patch_size), self.merge_size
        _, height, width = picture.grid  # one frame, repeated over the temporal patch
        limits = processor.size["shortest_edge"], processor.size["longest_edge"]
        final = height * size, width * size
        if smart_resize(*final, size * merge, *limits) != final:
            return self._sources[picture.key].convert("RGB")
        patches = picture.pixel_values.float().numpy()
        shape = (height // merge, width // merge, merge, merge, 3, -1, size, size)
        block = patches.reshape(shape)[:, :, :, :, :, 0]  # rows, columns, row, column, RGB, y, x
        image = block.transpose(0, 2, 5, 1, 3, 6, 4).reshape(*final, 3)
        levels = (image * processor.image_std + processor.image_mean) / processor.rescale_factor
        return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))

    def clear(self) -> None:
        """Forgets all pictures."""
        self._encoded.clear()
        self._sources.clear()


def mrope_positions(
    token_ids: list[int],
    grids: list[tuple[int, int, int]],
    image_token_id: int | None,
    merge_size: int = 2,
    start: int = 0,
) -> tuple[np.ndarray, int]:
    """M-RoPE positions of one row, continuing from `start`.

    A text token takes one step in all three axes. A picture's tokens share one temporal position
    and count rows and columns of the merged grid; the text after it goes on behind the larger
    side. Same rule as `Qwen2_5_VLModel.get_rope_index`, which needs the whole sequence at once.

    Args:
        token_ids: T tokens with expanded placeholders.
        grids: (time, height, width) of each picture, in order.
        image_token_id: the placeholder; None if there are no pictures.
        merge_size: patches merged per side into one token.
        start: position of the first token.

    Returns:
        int64 [3, T] (time, height, width) and the position of the next token.

    Raises:
        ValueError: placeholders and pictures do not match.
    """
    n = len(token_ids)
    if not grids:
        if image_token_id is not None and image_token_id in token_ids:
            raise ValueError("the tokens hold an image placeholder but there is no image for it")
        return np.broadcast_to(np.arange(start, start + n), (3, n)), start + n
    positions = np.empty((3, n), dtype=np.int64)
    ids = np.asarray(token_ids)
    filled, nxt = 0, start
    placeholders = np.flatnonzero(ids == image_token_id)
    sizes = [t * h * w // merge_size**2 for t, h, w in grids]
    if len(placeholders) != sum(sizes):
        raise ValueError(
            f"{len(placeholders)} image placeholders for {len(grids)} images of {sum(sizes)} tokens"
        )
    first = 0
    for (t, h, w), size in zip(grids, sizes, strict=True):
        begin = int(placeholders[first])
        first += size
        positions[:, filled:begin] = np.arange(nxt, nxt + begin - filled)
        nxt += begin - filled
        rows, columns = h // merge_size, w // merge_size
        block = np.indices((t, rows, columns)).reshape(3, -1)
        positions[:, begin : begin + size] = block + nxt
        nxt += max(h, w) // merge_size
        filled = begin + size
    positions[:, filled:] = np.arange(nxt, nxt + n - filled)
    return positions, nxt + n - filled


def encode_pictures(backbone: Any, pictures: list[EncodedImage]) -> dict[str, torch.Tensor]:
    """Runs the vision tower once per distinct picture.

    Args:
        backbone: the VLM without its head (`model.model`).
        pictures: any number, repeats allowed.

    Returns:
        key -> float [n_tokens, hidden]; differentiable.
    """
    distinct = {picture.key: picture for picture in pictures}
    if not distinct:
        return {}
    device = backbone.visual.device
    pixels = torch.cat([picture.pixel_values for picture in distinct.values()]).to(device)
    grids = torch.tensor([picture.grid for picture in distinct.values()], device=device)
    features = backbone.get_image_features(pixels, grids, return_dict=True).pooler_output
    return dict(zip(distinct, features, strict=True))


def suppressed_token_ids(tokenizer: Any) -> list[int]:
    """Vision tokens the policy must never sample: a placeholder without a picture breaks M-RoPE."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]

"""Load and save policies of the Qwen2 / Qwen2.5-VL family, with or without torchvision.

A policy is a model and its processor. transformers builds `Qwen2_5_VLProcessor` from an image
processor, a tokenizer and a *video* processor, and the last needs torchvision. Search agents see
photos only, so `ImageOnlyProcessor` leaves the video part out. What it saves is still a stock
Qwen2.5-VL folder: on a machine with torchvision plain `AutoProcessor.from_pretrained` reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from merge.checkpoint import HUB_FILES, HUB_SKIPS
from train.gpu import computes_in_bf16
from train.libraries import run_as_usual

VISION_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")

# What the stock Qwen2.5-VL folder says about videos; written so that AutoProcessor finds a complete
# folder.
_STOCK_VIDEO_PROCESSOR = {
    "video_processor_type": "Qwen2VLVideoProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


class PolicyLoadError(ValueError):
    """A folder that cannot become a policy; the message names it, the reason and the fix."""

    exit_code = 2


class ImageOnlyProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video part, so that it needs no torchvision.

    Differs from the parent in two ways: pictures come back as torch tensors (the PIL back end
    returns numpy, on which TRL's image splitting fails), and the tokenizer pads on the left (the
    side that generation needs; a right-padded prompt silently shifts `mm_token_type_ids`).
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        **kwargs: Any,
    ):
        self.video_processor = None
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)
        self.tokenizer.padding_side = "left"

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are loaded and saved: no video processor."""
        return ["image_processor", "tokenizer"]

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As the parent does; a part that is not there fits."""
        if argument is None:
            return None
        return super().check_argument_for_proper_class(argument_name, argument)

    def _process_images(self, images: Any, **kwargs: Any) -> Any:
        features, replacements = super()._process_images(images, **kwargs)
        for key in ("pixel_values", "image_grid_thw"):
            if key in features:
                features[key] = torch.as_tensor(features[key])
        return features, replacements

    def save_pretrained(
        self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """Saves a stock Qwen2.5-VL processor: its class names, the video part as published."""
        saved = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        folder = Path(save_directory)
        processor_config = json.loads((folder / "processor_config.json").read_text())
        processor_config["processor_class"] = "Qwen2_5_VLProcessor"
        processor_config.setdefault("video_processor", _STOCK_VIDEO_PROCESSOR)
        image_config = processor_config.get("image_processor", {})
        image_config["image_processor_type"] = "Qwen2VLImageProcessor"
        (folder / "processor_config.json").write_text(json.dumps(processor_config, indent=2) + "\n")
        tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer_config["processor_class"] = "Qwen2_5_VLProcessor"
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
        return saved


def is_vision_model(folder: str | Path) -> bool:
    """True if the checkpoint's config names a vision-language architecture.

    Raises:
        PolicyLoadError: one that `merge` knows and the rollout does not; names those that it does.
    """
    config = load_config(folder)
    if config.model_type in VISION_MODEL_TYPES:
        return True
    if any(hasattr(config, name) for name in ("vision_config", "vision_tower")):
        raise PolicyLoadError(
            f"{folder}: {config.model_type} can be merged, but not evaluated or trained here; "
            f"policies that see pictures are {', '.join(VISION_MODEL_TYPES)}"
        )
    return False


def load_config(folder: str | Path) -> Any:
    """transformers' config of a checkpoint folder, a hub id or `owner/name@revision`.

    Code that comes with a checkpoint is not run, and nobody is asked whether it should.

    Raises:
        PolicyLoadError: it cannot be read, or asks for code of its own.
    """
    with _loading(folder, "the settings"):
        return AutoConfig.from_pretrained(**_reference(folder), trust_remote_code=False)


def _reference(folder: str | Path) -> dict[str, str]:
    """Arguments of `from_pretrained` for a folder, a hub id or `owner/name@revision`."""
    name, _, revision = str(folder).partition("@")
    if not revision or Path(folder).exists():
        return {"pretrained_model_name_or_path": str(folder)}
    return {"pretrained_model_name_or_path": name, "revision": revision}


@contextmanager
def _loading(folder: str | Path, what: str) -> Iterator[None]:
    """Whatever the libraries say of a file that they cannot use becomes one error."""
    try:
        yield
    except MemoryError:
        raise
    # safetensors, tokenizers and transformers have no error in common
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PolicyLoadError(
            f"{folder}: {what} cannot be read ({reason}); copy the checkpoint again"
        ) from error


def load_processor(folder: str | Path, max_pixels: int | None = None) -> Any:
    """The processor of a VLM folder, or the tokenizer of a text model's.

    Args:
        folder: local checkpoint folder, hub id or `owner/name@revision`.
        max_pixels: of a picture, where the checkpoint's own limit is higher; it is saved with the
            processor.

    Raises:
        PolicyLoadError: the folder has no tokenizer files, or is of a vision-language
            architecture that can be merged only; or its smallest pictures have more pixels than
            `max_pixels`.
    """
    _require_checkpoint(folder)
    is_vision = is_vision_model(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **_reference(folder), padding_side="left", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise PolicyLoadError(
            f"{folder}: no tokenizer can be read ({error}); save it beside the weights"
        ) from error
    if not is_vision:
        return tokenizer
    with _loading(folder, "the image processor"):
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(**_reference(folder))
    if max_pixels is not None:
        size = image_processor.size
        if max_pixels < size["shortest_edge"]:
            raise PolicyLoadError(
                f"models.max_pixels: {max_pixels} is less than the {size['shortest_edge']} pixels "
                f"that {folder} scales small pictures up to; choose at least as many"
            )
        size["longest_edge"] = min(max_pixels, size["longest_edge"])
    return ImageOnlyProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)


def load_policy(
    folder: str | Path, dtype: torch.dtype = torch.float32, max_pixels: int | None = None
) -> tuple[Any, Any]:
    """Model and processor of a checkpoint folder (or hub id), on the CPU, in `dtype`.

    Args:
        folder: see `load_processor`.
        dtype: of the weights.
        max_pixels: see `load_processor`.

    Returns:
        (Qwen2_5_VLForConditionalGeneration, ImageOnlyProcessor) for a VLM, (Qwen2ForCausalLM,
        tokenizer) for a text model.

    Raises:
        PolicyLoadError: the folder is missing or holds no readable weights; see also
            `load_processor`.
    """
    processor = load_processor(folder, max_pixels)
    auto_class = AutoModelForImageTextToText if is_vision_model(folder) else AutoModelForCausalLM
    with _loading(folder, "the weights"):
        model, found = auto_class.from_pretrained(
            **_reference(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
    check_complete(folder, found["missing_keys"])
    run_as_usual()
    return model, processor


def load_for_inference(
    folder: str | Path,
    device: str | None = None,
    *,
    bf16: bool = False,
    max_pixels: int | None = None,
) -> tuple[Any, Any]:
    """As `load_policy`, in evaluation mode, where it shall run.

    Args:
        folder: see there.
        device: None = `device_of_process`.
        bf16: on a GPU that can, load in bfloat16; the processor computes in fp32.
        max_pixels: see `load_processor`.

    Raises:
        PolicyLoadError: see there.
    """
    device = device or device_of_process()
    is_bf16 = bf16 and device.startswith("cuda") and computes_in_bf16()
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    model, processor = load_policy(folder, dtype, max_pixels)
    return model.to(device).eval(), processor


def device_of_process() -> str:
    """The GPU of this process, by its local rank; the processor where there is none."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"


def check_complete(folder: str | Path, missing: Iterable[str]) -> None:
    """Refuses a checkpoint that lacks weights; transformers would draw them at random and warn.

    Args:
        folder: for the message.
        missing: names that the model has and the files have not, tied weights left out.

    Raises:
        PolicyLoadError: names the first few.
    """
    names = sorted(missing)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise PolicyLoadError(
            f"{folder}: has no weights {', '.join(names[:3])}{more}; copy the checkpoint again"
        )


def causal_model(model: Any) -> Any:
    """The model itself, or the one inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _require_checkpoint(folder: str | Path) -> None:
    path = Path(folder)
    looks_local = path.is_absolute() or path.exists() or str(folder).startswith((".", "runs/"))
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise PolicyLoadError(
            f"{folder}: is a LoRA adapter, not a policy; write one with "
            f"`obm merge adapter {folder} --output DIR`"
        )
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        raise PolicyLoadError(
            f"{folder}: is a run folder; name one of its {path / 'checkpoints'}/checkpoint-STEP"
        )
    if looks_local and not (path / "config.json").is_file():
        raise PolicyLoadError(
            f"{folder}: no config.json there; give a checkpoint folder saved with save_pretrained, "
            "or a hub id"
        )


def snapshot_folder(folder: str) -> str:
    """Folder that holds the files of `owner/name@revision`; any other checkpoint as it is named.

    For TRL, which loads the reference by a name alone: the repository's newest commit.

    Raises:
        PolicyLoadError: the hub does not give it.
    """
    where = _reference(folder)
    if "revision" not in where:
        return folder
    from huggingface_hub import snapshot_download

    with _loading(folder, "the revision"):
        return snapshot_download(
            where["pretrained_model_name_or_path"],
            revision=where["revision"],
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_SKIPS,
        )


@contextmanager
def reference_from(model: Any, folder: str | None) -> Iterator[None]:
    """Makes TRL load the reference policy of `beta` from this folder instead of the start."""
    own = model.config._name_or_path
    model.config._name_or_path = folder or own
    try:
        yield
    finally:
        model.config._name_or_path = own

"""A model without its decoder layers, and those layers one at a time.

`load_shell` builds the model with transformers' own code and loads everything but the decoder
layers: embeddings, vision tower, projector. In the place of each layer stands a `Stub` that records
what it is called with. `LayerLoader` fills one real layer at a time from the checkpoint's files.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import Family, canonical_name

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class LastLayerReached(Exception):
    """Ends a forward pass of the shell: after the last layer nothing is of use."""


class Stub(nn.Module):
    """Stands for a decoder layer: records its call and returns zeros.

    What reaches the next stub is then what the model adds between two layers, such as Qwen3-VL's
    deepstack features, to the last bit: 0 + x = x.
    """

    def __init__(self, layer: nn.Module, is_last: bool) -> None:
        super().__init__()
        self._replaced = [layer]  # in a list, so that it is no part of the model
        self._is_last = is_last
        self.hidden = torch.empty(0)
        self.output: Tensor | None = None
        """What the last stub returns, where the model is to go on behind the layers."""
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # such as `attention_type`, which some models ask their layers for
            return getattr(self._replaced[0], name)

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Keeps what the layer was called with; returns what was put there as its output.

        Raises:
            LastLayerReached: nothing was put there, and no layer comes after this one.
        """
        self.hidden, self.arguments = hidden_states, arguments
        if self.output is not None:
            return self.output
        if self._is_last:
            raise LastLayerReached
        return torch.zeros_like(hidden_states)


class Shell:
    """A model whose decoder layers are stubs.

    Attributes:
        model: Everything else, with its weights.
        layers: The real decoder layers, without memory (on the meta device).
        stubs: What stands in their places.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model = model
        self.layers = list(layers)
        self.stubs = [module for module in model.modules() if isinstance(module, Stub)]

    @property
    def dtype(self) -> torch.dtype:
        """In which the model runs."""
        return next(self.model.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return next(self.model.parameters()).device

    def calls(self, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Runs a batch up to the last stub, without gradients.

        Returns:
            What the first layer gets, and `layers`, what each is called with beside that; `added`,
            what the model adds between each and the next, None where that is nothing.

        Raises:
            MergeError: the model has none of the layers.
        """
        try:
            with torch.no_grad():
                self.model(**inputs)
        except LastLayerReached:
            # what is added after layer i reaches layer i + 1 beside the stub's zeros
            first, *added = (stub.hidden for stub in self.stubs)
            return first, {
                "layers": [stub.arguments for stub in self.stubs],
                "added": [item if bool(item.any()) else None for item in added],
            }
        raise MergeError("calibration: the model has no decoder layers that could be streamed")


def load_shell(
    checkpoint: Checkpoint,
    family: Family,
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    has_head: bool = False,
) -> Shell:
    """Loads a checkpoint's model without its decoder layers.

    Args:
        checkpoint: A checkpoint of `family`.
        family: Says where the layers are.
        dtype: Of the weights; the checkpoint's own when None.
        device: Where the model runs.
        has_head: Load the output head too, where it is not tied to the embeddings.

    Raises:
        MergeError: transformers has no such model, or weights are missing.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
    )

    config = AutoConfig.from_pretrained(str(checkpoint.folder))
    mapping = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if family.has_vision else MODEL_FOR_CAUSAL_LM_MAPPING
    )
    if type(config) not in mapping:
        raise MergeError(f"{checkpoint.folder}: transformers has no model for {config.model_type}")
    layers: list[nn.Module] = []
    model_class = _without_layers(mapping[type(config)], family, layers, has_head)
    with _quiet():
        model, report = model_class.from_pretrained(
            str(checkpoint.folder), dtype=dtype or "auto", output_loading_info=True
        )
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:3])
        raise MergeError(
            f"{checkpoint.folder}: has no weights for {names}; copy the checkpoint again"
        )
    return Shell(model.to(device).eval(), layers)


def _without_layers(
    model_class: Any, family: Family, layers: list[nn.Module], has_head: bool
) -> Any:
    """Makes a subclass that puts its decoder layers aside before any weight is loaded."""

    def __init__(self: Any, config: Any, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, config, *arguments, **keywords)
        language = self.get_submodule(family.language_module)
        layers.extend(language.layers)
        last = len(layers) - 1
        language.layers = nn.ModuleList(
            Stub(layer, index == last) for index, layer in enumerate(layers)
        )
        if not has_head and not self.config.tie_word_embeddings:  # as large as the embeddings
            self.lm_head = nn.Identity()

    members = {
        "__init__": __init__,
        # transformers finds the renames of old checkpoints by the name and module of the class
        "__module__": model_class.__module__,
        "_keys_to_ignore_on_load_unexpected": [r"layers\.\d+\.", r"lm_head\."],
    }
    return type(model_class.__name__, (model_class,), members)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar for each file."""
    from transformers.utils import logging

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()


class LayerLoader:
    """Fills decoder layers from a checkpoint's files.

    Args:
        checkpoint: Holds the weights.
        family: Maps stored names.
        dtype: What the weights are cast to.
        device: Where they go.
    """

    def __init__(
        self, checkpoint: Checkpoint, family: Family, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._checkpoint = checkpoint
        self._dtype, self._device = dtype, device
        self._stored: dict[str, str] = {}
        for name in checkpoint.tensors:
            canonical = canonical_name(family, name)
            if canonical is not None:
                self._stored[canonical] = name

    @contextmanager
    def loaded(self, layer: nn.Module, index: int) -> Iterator[nn.Module]:
        """Gives a layer its weights for the length of a block.

        Raises:
            MergeError: A tensor is missing, or has another shape or an unknown dtype.
        """
        expected = dict(layer.state_dict())
        weights = {name: self._read(f"model.layers.{index}.{name}") for name in expected}
        for name, weight in weights.items():
            if weight.shape != expected[name].shape:
                raise MergeError(
                    f"{self._checkpoint.folder}: layer {index}'s {name} has shape "
                    f"{list(weight.shape)}, config.json says {list(expected[name].shape)}"
                )
        layer.load_state_dict(weights, assign=True)
        if any(item.is_meta for item in (*layer.parameters(), *layer.buffers())):
            raise MergeError(
                f"{self._checkpoint.folder}: layer {index} computes values that no file holds; "
                "pass calibration.streaming=false"
            )
        try:
            yield layer.eval()
        finally:
            layer.to(device="meta")

    def _read(self, canonical: str) -> Tensor:
        if canonical not in self._stored:
            raise MergeError(
                f"{self._checkpoint.folder}: has no tensor {canonical}; copy the checkpoint again"
            )
        name = self._stored[canonical]
        file = self._checkpoint.file_of(name)
        info = file.tensors[name]
        if info.dtype not in TORCH_DTYPES:
            raise MergeError(
                f"{file.path}: tensor {name} is {info.dtype}; "
                f"needed is one of {', '.join(TORCH_DTYPES)}"
            )
        weight = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        if info.n_bytes:
            file.read_into(name, 0, weight.reshape(-1).view(torch.uint8).numpy())
        return weight.to(device=self._device, dtype=self._dtype)

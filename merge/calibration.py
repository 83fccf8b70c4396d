"""Second moments of linear inputs: what OBM needs to know about the data.

For every linear of the language module, and every input channel j,

    h[j] = mean over calibration tokens of x_j^2

is the diagonal of E[x x^T], that is half the diagonal of the layer-wise Hessian (SparseGPT, OBM).
Only tokens count, not padding: a mask captured with each batch selects the rows before they are
summed. Squares are summed in fp32 within a batch and in fp64 across batches; the result is fp32.
Four places a layer are watched, since q, k and v share their input, and so do gate and up.

A vision-language model sees its images: they pass through the vision tower, and their tokens count
as any other. Statistics are made once and kept (`stats.safetensors`): a name, a vector, and in the
metadata what they were made with.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from merge.errors import MergeError
from merge.families import Family, get_family
from merge.shards import SafetensorsFile, write_tensors

FORMAT = "obm-warmstart second moments 1"
ATTENTION_RULE = "attention_mask"
CALIBRATION_RULE = "attention_mask and calibration_mask"


class SecondMoments(dict[str, Tensor]):
    """Canonical linear name (`model.layers.0.self_attn.q_proj`) -> fp32 vector [in features].

    `metadata` holds text: `tokens` (number of tokens in the mean), `batches`, `data_sha256` (hash
    of every batch), `mask_rule`, and in a file also `model_sha256`.
    """

    def __init__(self, vectors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        super().__init__(vectors)
        self.metadata = dict(metadata)


def collect_second_moments(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    language_module: nn.Module | None = None,
) -> SecondMoments:
    """Runs calibration batches through a model and averages squared linear inputs over tokens.

    Args:
        model: A `Qwen2ForCausalLM` or `Qwen2_5_VLForConditionalGeneration`, on any device.
        batches: Keyword arguments for `model(**batch)`: input_ids [B, T], attention_mask [B, T]
            (1 = token), image inputs of the VLM, and optionally `calibration_mask` [B, T] that
            leaves out further tokens (1 = counts). Without attention_mask all tokens count.
        language_module: The module that holds `layers`; found by the model's family when None.

    Returns:
        fp32 vectors under every linear's canonical name, with metadata.

    Raises:
        MergeError: An unsupported model, no tokens, a mask of the wrong shape, a linear that was
            never called, or activations that are not finite.
    """
    family = get_family(getattr(model.config, "model_type", None), type(model).__name__)
    language = language_module or model.get_submodule(family.language_module)
    collector = _Collector(family, language)
    device = next(model.parameters()).device
    data = hashlib.sha256()
    rules = set()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None):
                inputs = {
                    key: value.to(device) if isinstance(value, Tensor) else value
                    for key, value in batch.items()
                }
                _hash_batch(data, batch)
                rules.add(CALIBRATION_RULE if "calibration_mask" in inputs else ATTENTION_RULE)
                collector.start_batch(_token_mask(inputs))
                inputs.pop("calibration_mask", None)
                # logits_to_keep=1: the vocabulary's logits are of no use here, and large
                model(**{**inputs, "use_cache": False, "logits_to_keep": 1})
    finally:
        collector.remove_hooks()
        model.train(was_training)
    if not rules:
        raise MergeError("calibration: no batches; raise calibration.samples")
    if len(rules) > 1:
        raise MergeError("calibration: give calibration_mask with every batch, or with none")
    metadata = {
        "tokens": str(collector.n_tokens),
        "batches": str(collector.n_batches),
        "data_sha256": data.hexdigest(),
        "mask_rule": rules.pop(),
    }
    return SecondMoments(collector.result(), metadata)


class _Collector:
    """Sums of squared inputs at the watched linears, and the hooks that feed them."""

    def __init__(self, family: Family, language: nn.Module) -> None:
        self.n_tokens = 0
        self.n_batches = 0
        self._mask: Tensor | None = None
        self._sums: dict[str, Tensor] = {}
        self._aliases: dict[str, tuple[str, ...]] = {}
        self._handles = []
        modules = dict(language.named_modules())
        for index in range(len(language.get_submodule("layers"))):
            for site, sharing in family.input_sites.items():
                layer = f"layers.{index}"
                name = f"model.{layer}.{site}"
                self._aliases[name] = tuple(f"model.{layer}.{linear}" for linear in sharing)
                self._handles.append(
                    modules[f"{layer}.{site}"].register_forward_pre_hook(self._make_hook(name))
                )

    def start_batch(self, mask: Tensor) -> None:
        self._mask = mask
        self.n_tokens += int(mask.sum())
        self.n_batches += 1

    def _make_hook(self, name: str) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            hidden = inputs[0]  # [B, T, in]
            assert self._mask is not None
            if hidden.shape[:2] != self._mask.shape:
                raise MergeError(
                    f"calibration: {name} sees {list(hidden.shape[:2])} tokens, the mask has "
                    f"{list(self._mask.shape)}; give an attention_mask as long as input_ids"
                )
            # Rows are selected, not multiplied by the mask: padding may hold NaN, which 0 keeps.
            square = hidden[self._mask].float().square().sum(0).double()
            self._sums[name] = self._sums[name] + square if name in self._sums else square

        return add

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    def result(self) -> dict[str, Tensor]:
        if self.n_tokens == 0:
            raise MergeError("calibration: the masks leave no tokens; check calibration_mask")
        vectors = {}
        for name, linears in self._aliases.items():
            if name not in self._sums:
                raise MergeError(f"calibration: {name} was never called; give the language module")
            mean = (self._sums[name] / self.n_tokens).float().cpu()
            if not bool(torch.isfinite(mean).all()):
                raise MergeError(
                    f"calibration: inputs of {name} are not finite; load the model in bfloat16 or "
                    "float32"
                )
            vectors.update(dict.fromkeys(linears, mean))
        return vectors


def _token_mask(inputs: Mapping[str, Any]) -> Tensor:
    """Returns a bool mask [B, T] of the tokens that count."""
    attention = inputs.get("attention_mask")
    mask = torch.ones_like(inputs["input_ids"]) if attention is None else attention
    mask = mask.bool()
    extra = inputs.get("calibration_mask")
    if extra is None:
        return mask
    if extra.shape != mask.shape:
        raise MergeError(
            f"calibration: calibration_mask has shape {list(extra.shape)}, attention_mask "
            f"{list(mask.shape)}; they must agree"
        )
    return mask & extra.bool()


def _hash_batch(digest: Any, batch: Mapping[str, Any]) -> None:
    for key, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            digest.update(f"{key} {value.dtype} {list(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().tobytes())


def save_stats(stats: SecondMoments, path: str | Path, *, model_sha256: str = "") -> None:
    """Writes `stats.safetensors`; equal statistics give equal bytes.

    Args:
        stats: What `collect_second_moments` returned.
        path: File to write, replaced when it exists.
        model_sha256: `checkpoint.hash_checkpoint` of the model; a merge refuses statistics that
            were made with other weights. Empty when unknown.

    Raises:
        MergeError: The file cannot be written.
    """
    path = Path(path)
    metadata = {"format": FORMAT, **stats.metadata, "model_sha256": model_sha256}
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(part, stats, metadata)
        part.replace(path)
    except OSError as error:
        raise MergeError(f"{path}: cannot be written ({error}); choose another output") from error
    finally:
        part.unlink(missing_ok=True)


def load_stats(path: str | Path) -> SecondMoments:
    """Reads `stats.safetensors`.

    Raises:
        MergeError: The file is missing, truncated, not made by `save_stats`, or holds values that
            are negative or not finite.
    """
    file = SafetensorsFile(Path(path))
    if file.metadata.get("format") != FORMAT:
        raise MergeError(f"{path}: holds no second moments; make it with `obm calibrate`")
    vectors = {name: file.read(name) for name in file.tensors}
    for name, vector in vectors.items():
        if vector.dtype != torch.float32 or not bool(
            (torch.isfinite(vector) & (vector >= 0)).all()
        ):
            raise MergeError(f"{path}: {name} is not a vector of squares; calibrate again")
    metadata = {key: value for key, value in file.metadata.items() if key != "format"}
    return SecondMoments(vectors, metadata)

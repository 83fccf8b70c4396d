"""Encoders of text and pictures as vectors, and a cross-encoder that reorders hits.

Any checkpoint that transformers reads will do, by folder or hub id. What sentence-transformers
stores beside one (pooling, longest text, prompts) is used, without that library.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from PIL.Image import Image

from environments.errors import EnvironmentSetupError
from environments.retrieval import colour_features

Pooling = Literal["mean", "cls"]
BATCH = 64


class TextEncoder(Protocol):
    """Text to vectors; queries and passages may be treated differently."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension]."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension]."""
        ...


class ImageEncoder(Protocol):
    """Pictures to vectors."""

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """float32 [images, dimension]."""
        ...


class Reranker(Protocol):
    """How well each text answers a query; higher is better."""

    def score(self, query: str, texts: Sequence[str]) -> Sequence[float]:
        """One number a text."""
        ...


class TransformerTextEncoder:
    """A bi-encoder: last hidden state, pooled and scaled to length 1.

    Args:
        model: folder or hub id.
        pooling: mean over tokens, or the first token; None = as sentence-transformers stored it,
            else mean.
        query_prefix, passage_prefix: put before every text (`query: ` and `passage: ` for E5);
            None = the stored prompts, else none.
        max_tokens: longer texts are cut; None = as stored, else 256.
        device: cpu or cuda.
    """

    def __init__(
        self,
        model: str,
        *,
        pooling: Pooling | None = None,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        max_tokens: int | None = None,
        device: str = "cpu",
    ):
        stored = stored_settings(model)
        prompts = stored["prompts"]
        self.pooling = pooling or stored["pooling"]
        self.query_prefix = prompts.get("query", "") if query_prefix is None else query_prefix
        named = prompts.get("document", prompts.get("passage", ""))
        self.passage_prefix = named if passage_prefix is None else passage_prefix
        self._tokenizer, self._model = _load(model, "AutoTokenizer", "AutoModel", device)
        wanted = max_tokens or stored["max_tokens"]
        self.max_tokens = _possible_tokens(wanted, self._tokenizer, self._model)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], each of length 1."""
        return self._encode([self.query_prefix + text for text in texts])

    def encode_passages(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], each of length 1."""
        return self._encode([self.passage_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        # texts of like length together: less padding, the same vectors
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        parts = []
        with torch.inference_mode():
            for start in range(0, len(order), BATCH):
                batch = self._tokenizer(
                    [texts[i] for i in order[start : start + BATCH]],
                    padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt",
                ).to(self._model.device)  # fmt: skip
                hidden = self._model(**batch).last_hidden_state
                parts.append(pool(hidden, batch["attention_mask"], self.pooling).cpu().numpy())
        vectors = np.concatenate(parts)
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        return vectors[back]


class TransformerImageEncoder:
    """The image side of a CLIP or SigLIP checkpoint, scaled to length 1.

    Args:
        model: folder or hub id.
        device: cpu or cuda.
    """

    def __init__(self, model: str, *, device: str = "cpu"):
        self._processor, self._model = _load(model, "AutoImageProcessor", "AutoModel", device)
        if not hasattr(self._model, "get_image_features"):
            raise EnvironmentSetupError(
                f"{model}: {type(self._model).__name__} gives no image features; "
                "name a CLIP or SigLIP checkpoint"
            )

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """float32 [images, dimension], each of length 1."""
        import torch

        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                batch = [image.convert("RGB") for image in images[start : start + BATCH]]
                pixels = self._processor(images=batch, return_tensors="pt").to(self._model.device)
                features = self._model.get_image_features(**pixels)
                features = getattr(features, "pooler_output", features)
                parts.append(torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)


class ColourEncoder:
    """The 380 plain numbers of `environments.retrieval.colour_features`; no model is needed."""

    def encode_images(self, images: Sequence[Image]) -> np.ndarray:
        """float32 [images, 380]."""
        return np.stack([colour_features(image) for image in images])


class CrossEncoder:
    """A reranker that reads query and text together.

    Args:
        model: folder or hub id of a sequence classifier; the last of its outputs is the score.
        max_tokens: longer pairs are cut, in the text, and in what of the query is beyond half.
        device: cpu or cuda.
    """

    def __init__(self, model: str, *, max_tokens: int = 512, device: str = "cpu"):
        self._tokenizer, self._model = _load(
            model, "AutoTokenizer", "AutoModelForSequenceClassification", device
        )
        self.max_tokens = _possible_tokens(max_tokens, self._tokenizer, self._model)

    def score(self, query: str, texts: Sequence[str]) -> list[float]:
        """One number a text, higher is better."""
        import torch

        scores: list[float] = []
        with torch.inference_mode():
            for start in range(0, len(texts), BATCH):
                batch = list(texts[start : start + BATCH])
                pairs = self._tokenizer(
                    [query] * len(batch), batch,
                    padding=True, truncation="longest_first", max_length=self.max_tokens,
                    return_tensors="pt",
                ).to(self._model.device)  # fmt: skip
                scores += self._model(**pairs).logits[:, -1].float().tolist()
        return scores


def pool(hidden: Any, mask: Any, pooling: Pooling) -> Any:
    """One vector of length 1 a text.

    Args:
        hidden: [batch, tokens, dimension], any float.
        mask: [batch, tokens], 1 for tokens and 0 for padding.
        pooling: mean of the tokens, or the first one.

    Returns:
        float32 [batch, dimension].
    """
    import torch

    hidden = hidden.float()
    if pooling == "cls":
        pooled = hidden[:, 0]
    else:
        weight = mask.unsqueeze(-1).float()
        pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def stored_settings(model: str) -> dict[str, Any]:
    """What sentence-transformers stored beside a checkpoint: pooling, max_tokens, prompts.

    Raises:
        EnvironmentSetupError: it stored a step that is not made here (a dense layer, or another
            pooling).
    """
    modules = _stored(model, "modules.json") or []
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    unknown = sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"})
    pooling = _stored(model, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    modes = [key for key, on in (pooling or {}).items() if key.startswith("pooling_mode_") and on]
    known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if unknown or len(modes) > 1 or not set(modes) <= set(known):
        raise EnvironmentSetupError(
            f"{model}: its {', '.join(unknown or modes)} is not supported; "
            "use an encoder with mean or cls pooling alone"
        )
    limits = _stored(model, "sentence_bert_config.json") or {}
    prompts = (_stored(model, "config_sentence_transformers.json") or {}).get("prompts") or {}
    return {
        "pooling": known[modes[0]] if modes else "mean",
        "max_tokens": limits.get("max_seq_length") or 256,
        "prompts": prompts,
    }


def _stored(model: str, name: str) -> Any:
    """A JSON file beside a checkpoint, or None."""
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model, name, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip
    except (OSError, ValueError):  # no such checkpoint: loading it says so
        return None
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None


def _possible_tokens(wanted: int, tokenizer: Any, model: Any) -> int:
    """As many as are wanted and as the model has positions for."""
    positions = getattr(model.config, "max_position_embeddings", None) or wanted
    return int(min(wanted, tokenizer.model_max_length, positions))


def _load(model: str, processor_class: str, model_class: str, device: str) -> tuple[Any, Any]:
    import transformers

    try:
        processor = getattr(transformers, processor_class).from_pretrained(model)
        loaded = getattr(transformers, model_class).from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise EnvironmentSetupError(
            f"{model}: this encoder cannot be loaded ({reason}); name a folder or a hub id"
        ) from error
    return processor, loaded.eval().to(device)

"""Tensor names of each supported architecture, as data.

One tensor has up to two names. `save_pretrained` writes the layout that hub checkpoints have
(`model.layers.*`, `visual.*`); inside a loaded model, and so in raw state-dict dumps of other
trainers, a Qwen2.5-VL says `model.language_model.layers.*` and `model.visual.*`. Both map onto one
canonical name, which is the name on the hub. A text model and the language module of a
vision-language model of the same family then share their canonical names.

A new architecture is a new entry in `FAMILIES`, not new code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from merge.errors import MergeError

LINEAR = "linear"
NORM_BIAS = "norm_bias"
EMBEDDING = "embedding"
VISION = "vision"

EMBED_TOKENS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Family:
    """Names of one architecture."""

    model_type: str
    """`model_type` in config.json."""
    has_vision: bool
    """Whether a checkpoint of this family holds a vision tower and a projector."""
    language_module: str
    """Where the language module lies in a loaded model, as an attribute path."""
    renames: tuple[tuple[str, str], ...]
    """(prefix as stored, canonical prefix), tried in order; no match leaves a name as it is."""
    groups: tuple[tuple[str, str], ...]
    """(group, regular expression over the whole canonical name)."""
    input_sites: Mapping[str, tuple[str, ...]]
    """Linear at which to watch the input, and all linears of a layer that share this input."""


_LANGUAGE_GROUPS = (
    (LINEAR, r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight"),
    (LINEAR, r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight"),
    (NORM_BIAS, r"model\.layers\.\d+\.self_attn\.[qkv]_proj\.bias"),
    (NORM_BIAS, r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight"),
    (NORM_BIAS, r"model\.norm\.weight"),
    (EMBEDDING, re.escape(EMBED_TOKENS)),
    (EMBEDDING, re.escape(LM_HEAD)),
)

# q, k and v read the same normalised hidden state, gate and up another one: four sites a layer
# instead of seven.
_INPUT_SITES = {
    "self_attn.q_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="qwen2",
            has_vision=False,
            language_module="model",
            renames=(),
            groups=_LANGUAGE_GROUPS,
            input_sites=_INPUT_SITES,
        ),
        Family(
            model_type="qwen2_5_vl",
            has_vision=True,
            language_module="model.language_model",
            renames=(("model.language_model.", "model."), ("model.visual.", "visual.")),
            groups=(*_LANGUAGE_GROUPS, (VISION, r"visual\..+")),
            input_sites=_INPUT_SITES,
        ),
    )
}

# Settings that must agree for the entries of two tensors to mean the same thing, although no shape
# shows them.
SHARED_CONFIG_KEYS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rope_theta",
)


def get_family(model_type: object, where: str) -> Family:
    """Finds the family of a checkpoint.

    Args:
        model_type: `model_type` of its config.json.
        where: Name of the checkpoint, for the message.

    Raises:
        MergeError: The architecture is not in `FAMILIES`.
    """
    if model_type not in FAMILIES:
        raise MergeError(
            f"{where}: model_type {model_type!r} is not supported; "
            f"use a checkpoint of {', '.join(FAMILIES)}"
        )
    return FAMILIES[str(model_type)]


def canonical_name(family: Family, name: str) -> str:
    """Returns the name that a tensor has in hub checkpoints, whatever layout it is stored in."""
    for stored, canonical in family.renames:
        if name.startswith(stored):
            return canonical + name[len(stored) :]
    return name


def group_of(family: Family, canonical: str) -> str | None:
    """Returns linear, norm_bias, embedding or vision; None for a name the family does not know."""
    for group, pattern in family.groups:
        if re.fullmatch(pattern, canonical):
            return group
    return None

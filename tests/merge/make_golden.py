"""Makes tests/merge/golden: what mergekit makes of a pico trio. Runs in mergekit's environment.

    .cache/mergekit-venv/bin/python tests/merge/make_golden.py [--trio] [--output DIR]

(`obm bench merge` makes that environment, or: python -m venv DIR; DIR/bin/pip install torch==2.13.0
mergekit==0.1.5.) mergekit is not pinned beside transformers here, so its results are kept as files,
each with the version and the settings in its header. `--trio` also draws the trio anew.

The trio is a text model of 2.5 thousand fp32 weights. Its values lie on a grid of 2^-20 and stay
below 4 in size, so that a difference of two of them, half of it, and a sum of two such halves are
exact in fp32. Each donor leaves entries of its own unchanged, never the same ones.
"""

import argparse
import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROLES = ("base", "vlm", "agent")
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}
GRID = 2.0**-20
HERE = Path(__file__).parent

# name -> (method, settings of each donor, settings of all, donors, dtype of files and result)
TWO = ("vlm", "agent")
GOLDENS = {
    "linear": ("linear", {"weight": 0.5}, {}, TWO, "float32"),
    "task_arithmetic": ("task_arithmetic", {"weight": [0.3, 0.7]}, {}, TWO, "float32"),
    "task_arithmetic_bf16": ("task_arithmetic", {"weight": [0.3, 0.7]}, {}, TWO, "bfloat16"),
    "ties": ("ties", {"weight": 1.0, "density": 0.25}, {}, TWO, "float32"),
    "ties_bf16": ("ties", {"weight": 1.0, "density": 0.25}, {}, TWO, "bfloat16"),
    "breadcrumbs": (
        "breadcrumbs", {"weight": 0.5, "density": 0.25, "gamma": 0.125}, {}, TWO, "float32"
    ),
    "sce": ("sce", {}, {"select_topk": 0.25}, TWO, "float32"),
    "ram": ("ram", {}, {"epsilon": 1e-5}, TWO, "float32"),
    "ram_plus": ("ramplus_tl", {}, {"epsilon": 1e-5, "r": 0.1, "alpha": 4.0}, TWO, "float32"),
    "dare": ("dare_linear", {"weight": 0.5, "density": 0.5}, {"rescale": False}, TWO, "float32"),
    "dare_ties": (
        "dare_ties", {"weight": 0.5, "density": 0.5}, {"rescale": False}, TWO, "float32"
    ),
    "della": (
        "della", {"weight": 1.0, "density": 0.5, "epsilon": 0.375}, {"rescale": False},
        ("agent",), "float32",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "golden")
    parser.add_argument("--trio", action="store_true", help="draw the trio anew, too")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.trio:
        for role, tensors in draw_trio().items():
            save_file(tensors, HERE / "golden" / f"{role}.safetensors", {"format": "pt"})
    trio = {role: load_file(HERE / "golden" / f"{role}.safetensors") for role in ROLES}
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "bfloat16"):
            write_checkpoints(Path(scratch) / dtype, trio, getattr(torch, dtype))
        for name in GOLDENS:
            merged, settings = merge_with_mergekit(name, Path(scratch))
            metadata = {
                "mergekit": importlib.metadata.version("mergekit"),
                "torch": torch.__version__,
                "settings": json.dumps(settings, sort_keys=True),
            }
            save_file(merged, options.output / f"{name}.safetensors", metadata)


def draw_trio() -> dict[str, dict[str, torch.Tensor]]:
    """Role -> tensors on the grid."""
    hidden, wide, keys = CONFIG["hidden_size"], CONFIG["intermediate_size"], 8
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        f"{layer}self_attn.q_proj.weight": (hidden, hidden),
        f"{layer}self_attn.q_proj.bias": (hidden,),
        f"{layer}self_attn.k_proj.weight": (keys, hidden),
        f"{layer}self_attn.k_proj.bias": (keys,),
        f"{layer}self_attn.v_proj.weight": (keys, hidden),
        f"{layer}self_attn.v_proj.bias": (keys,),
        f"{layer}self_attn.o_proj.weight": (hidden, hidden),
        f"{layer}mlp.gate_proj.weight": (wide, hidden),
        f"{layer}mlp.up_proj.weight": (wide, hidden),
        f"{layer}mlp.down_proj.weight": (hidden, wide),
        f"{layer}input_layernorm.weight": (hidden,),
        f"{layer}post_attention_layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }
    generator = torch.Generator().manual_seed(0)

    def noise(shape: tuple[int, ...], std: float) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * std
        return (values / GRID).round() * GRID

    trio: dict[str, dict[str, torch.Tensor]] = {role: {} for role in ROLES}
    for name, shape in shapes.items():
        base = noise(shape, 0.2) + (1.0 if name.endswith("norm.weight") else 0.0)
        lot = torch.rand(shape, generator=generator)
        trio["base"][name] = base.float()
        trio["vlm"][name] = (base + noise(shape, 0.05) * (lot >= 0.2)).float()
        trio["agent"][name] = (base + noise(shape, 0.1) * (lot < 0.7)).float()
    return trio


def write_checkpoints(
    folder: Path, trio: dict[str, dict[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    for role, tensors in trio.items():
        (folder / role).mkdir(parents=True)
        config = CONFIG | {"torch_dtype": str(dtype).removeprefix("torch.")}
        (folder / role / "config.json").write_text(json.dumps(config))
        stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        save_file(stored, folder / role / "model.safetensors", {"format": "pt"})


def merge_with_mergekit(
    name: str, scratch: Path
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Merges real checkpoint folders in fp32; returns the tensors and the settings."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    method, each, shared, donors, dtype = GOLDENS[name]
    models = []
    for place, role in enumerate(donors):
        chosen = {
            key: value[place] if isinstance(value, list) else value for key, value in each.items()
        }
        models.append({"model": str(scratch / dtype / role), "parameters": chosen})
    config = {
        "merge_method": method,
        "models": models,
        "parameters": shared,
        "dtype": "float32",
        "out_dtype": dtype,
    }
    if method != "linear":
        config["base_model"] = str(scratch / dtype / "base")
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=7)
    run_merge(MergeConfiguration.model_validate(config), str(scratch / name), options)
    settings = {"method": method, "each": each, "all": shared, "donors": donors, "dtype": dtype}
    return load_file(scratch / name / "model.safetensors"), settings


if __name__ == "__main__":
    main()

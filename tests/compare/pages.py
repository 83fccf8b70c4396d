"""Scripted records for tests of pages: comparisons, floors, ablations, transfers, merges."""

from typing import Any

STEPS = [0, 5, 10, 15, 20]


def estimate(mean: float, half: float | None = 0.05) -> dict[str, Any]:
    """An estimate with a symmetric interval; one seed has none."""
    if half is None:
        return {"mean": mean, "low": None, "high": None, "per_seed": [mean]}
    seeds = [mean - half / 2, mean, mean + half / 2]
    return {"mean": mean, "low": mean - half, "high": mean + half, "per_seed": seeds}


def comparison(
    ceilings: dict[str, float],
    *,
    half: float | None = 0.05,
    floors: dict[str, float] | None = None,
    target: str = "vlm",
    n_points: int = 5,
    n_seeds: int = 3,
    **more: Any,
) -> dict[str, Any]:
    """A summary as `obm compare` writes it; all arms end at their ceiling.

    Args:
        ceilings: arm -> ceiling.
        half: half of every interval; None for one seed, which has none.
        floors: arm -> accuracy at the start; half of the ceiling where absent.
        target: arm of the target.
        n_points: evaluations of each curve.
        n_seeds: seeds of each arm.
        more: further keys of the summary.
    """
    n_seeds = 1 if half is None else n_seeds
    arms, curves = {}, {}
    for arm, ceiling in ceilings.items():
        floor = (floors or {}).get(arm, ceiling / 2)
        spread = [0.01 * (i - (n_seeds - 1) / 2) for i in range(n_seeds)]
        limits = {}
        if half is not None:
            limits = {"floor.accuracy": [floor - half, floor + half]}
            ends = ("ceiling", "seen.ceiling", "unseen.ceiling")
            limits |= {name: [ceiling - half, ceiling + half] for name in ends}
        arms[arm] = {
            "floor": {"searched": 0.9, "entity": 0.5, "passage": 0.4, "accuracy": floor},
            "ceiling": ceiling, "auc": (floor + ceiling) / 2,
            "steps_to_target": 5.0, "search_rate_text": 0.9, "search_rate_image": 0.1,
            "seeds": list(range(n_seeds)), "is_trained": True, "last_step": 20,
            "by_group": {
                "seen": {"floor": floor, "ceiling": ceiling},
                "unseen": {"floor": floor / 2, "ceiling": ceiling / 2},
            },
            "intervals": limits,
            "per_seed": {"ceiling": [ceiling + s for s in spread],
                         "steps_to_target": [5] * n_seeds},
            "reward_parts": None,
        }  # fmt: skip
        mean = [floor + (ceiling - floor) * i / (n_points - 1) for i in range(n_points)]
        x = {
            "steps": [5 * i for i in range(n_points)],
            "tokens": [1000.0 * i for i in range(n_points)],
            # a start that costs ten seconds to merge, and then four a step
            "device_s": [10.0 + 20 * i for i in range(n_points)],
        }
        curve = {
            **x, "mean": mean, "low": [v - (half or 0) for v in mean],
            "high": [v + (half or 0) for v in mean],
            "per_seed": [[v + s for v in mean] for s in spread],
        }  # fmt: skip
        flat = {**x, "low": [0.25] * n_points, "high": [0.25] * n_points, "mean": [0.25] * n_points,
                "per_seed": [[0.25] * n_points] * n_seeds}  # fmt: skip
        ways = {f"behaviour/{way}": flat for way in ("image_only", "text_only", "both", "none")}
        curves[arm] = {"accuracy": curve, "reward": curve, "search_rate_text": curve,
                       "stop/answer": curve, **ways}  # fmt: skip
    return {
        "target": {"arm": target, "value": ceilings.get(target)},
        "arms": arms, "curves": curves,
        "command": "obm compare runs/*", "commit": "abc123", "run_commits": ["abc123"],
        "hardware": "a machine", "smoothing": 3, "interval": "95 %",
        "evaluation": {"name": "atlas", "eval_split": "test", "eval_size": 128,
                       "eval_kinds": ["two"]},
        **more,
    }  # fmt: skip


def pair(arm: str, other: str, mean: float, half: float, metric: str = "ceiling") -> dict[str, Any]:
    """A paired difference."""
    return {
        "arm": arm, "other": other, "metric": metric, "mean": mean, "low": mean - half,
        "high": mean + half, "probability": 0.9, "p_value": 0.04, "n_pairs": 3, "paired": True,
    }  # fmt: skip


def floor(accuracy: dict[str, float], *, half: float | None = 0.05) -> dict[str, Any]:
    """A floor study's record with `obm` as the reference."""
    columns = ("searched", "entity", "passage", "accuracy")
    return {
        "command": "obm study floor", "commit": "abc123", "hardware": "a machine",
        "environment": {"eval_size": 128, "eval_split": "test", "eval_kinds": ["two"]},
        "reference": "obm", "seeds": [0] if half is None else [0, 1, 2],
        "arms": {
            arm: {"recipe": f"recipe of {arm}",
                  "parts": {column: estimate(value, half) for column in columns}}
            for arm, value in accuracy.items()
        },
        "differences": {
            arm: {column: estimate(accuracy["obm"] - value, half) for column in columns}
            for arm, value in accuracy.items() if arm != "obm"
        },
    }  # fmt: skip


def ablation() -> dict[str, Any]:
    """An ablation's record: one axis with three points."""
    record = floor({"obm": 0.4, "density-0.1": 0.2, "density-0.9": 0.3})
    points = [
        {"value": value, "arm": arm, "is_reference": arm == "obm",
         "parts": record["arms"][arm]["parts"]}
        for value, arm in ((0.1, "density-0.1"), (0.25, "obm"), (0.9, "density-0.9"))
    ]  # fmt: skip
    axis = {"name": "density", "setting": "merge.density", "points": points}
    return {**record, "recipe": "obm at density 0.25", "axes": [axis]}


def transfer() -> dict[str, Any]:
    """A transfer study's record: two arms in two worlds."""

    def world(value: float) -> dict[str, Any]:
        stages = {"before": value, "after": value + 0.2, "gain": 0.2}
        return {
            stage: {"accuracy": estimate(mean), "passage": estimate(mean)}
            for stage, mean in stages.items()
        }

    return {
        "command": "obm study transfer", "commit": "abc123", "hardware": "a machine",
        "training": "60 steps of GRPO", "seeds": [0, 1, 2], "references": ["obm"],
        "worlds": {"flags": {"settings": ""}, "maps": {"settings": "environment.domain=maps"}},
        "arms": {arm: {"flags": world(v), "maps": world(v / 2)}
                 for arm, v in (("obm", 0.4), ("ties", 0.3))},
    }  # fmt: skip


def merge(*, saliency: bool = True, n_layers: int = 2) -> dict[str, Any]:
    """A merge.json of two modules a layer; of layer 1's q the agent wins a quarter."""
    tensors: dict[str, Any] = {"model.embed_tokens.weight": {"group": "embedding", "action": "vlm"}}
    for layer in range(n_layers):
        for module in ("self_attn.q_proj", "mlp.down_proj"):
            tensors[f"model.layers.{layer}.{module}.weight"] = {
                "group": "linear",
                "action": "obm",
                **figures(saliency, 0.25 * layer),
            }
    return {
        "schema_version": 3, "method": "obm" if saliency else "ties",
        "settings": {"weights": {"vlm": 1.0, "agent": 1.0}, "density": 0.25,
                     "scope": {"linear": "obm"}},
        "parents": {role: {"source": f"/somewhere/{role}"} for role in ("base", "vlm", "agent")},
        "stats": {"vlm/diagonal": {"tokens": "200"}},
        "totals": {"tensors_merged": 2 * n_layers, "tensors_copied": 1, **figures(saliency, 0.1)},
        "groups": {"linear": figures(saliency, 0.1)}, "tensors": tensors,
    }  # fmt: skip


def figures(saliency: bool, agent_wins: float) -> dict[str, Any]:
    """Figures of 1,000 entries of which 40 conflict."""
    known = {
        "entries": 1000, "density": {"vlm": 0.25, "agent": 0.2}, "conflicts": 40,
        "conflicts_won": {"vlm": 1 - agent_wins, "agent": agent_wins},
        "delta_norm": {"vlm": 2.0, "agent": 1.0}, "update_norm": 1.5,
    }  # fmt: skip
    if saliency:
        known |= {"saliency": {"vlm": 10.0, "agent": 1.0},
                  "saliency_kept": {"vlm": 0.8, "agent": 0.7}}  # fmt: skip
    return known

"""The modes of the atlas, one by one: what scripted agents reach in them, what the policies do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.tasks import make_statistics, make_task, needed_kinds

MODES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("as it is", "two", {}),
    ("as it is", "three", {}),
    ("two flags", "pair", {}),
    ("maps", "two", {"domain": "maps"}),
    ("counterfactual", "two", {"counterfactual": 0}),
    ("counterfactual", "three", {"counterfactual": 0}),
    ("news: older", "two", {"news": "older"}),
    ("news: newer", "two", {"news": "newer"}),
    ("news: both", "two", {"news": "both"}),
    ("as it is", "text", {}),
    ("counterfactual", "text", {"counterfactual": 0}),
    ("news: older", "text", {"news": "older"}),
    ("news: newer", "text", {"news": "newer"}),
    ("news: both", "text", {"news": "both"}),
)
"""Name, question kind and settings of `environment:`."""
SCRATCH = Path("runs/worlds")
"""The merge's statistics and finished measurements, which are reused."""


def measure_worlds(
    output: Path,
    *,
    command: str,
    n: int = 128,
    starts: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Measure every mode and write OUTPUT.json and OUTPUT.md.

    Args:
        output: file name without suffix.
        command: kept in the record.
        n: test questions a mode.
        starts: further checkpoints that take pictures, name -> folder.

    Returns:
        One row a mode: `mode`, `kind`, `n`, `shares` (see compare.worlds.measure_mode) and
        `policies` (name -> metrics).
    """
    from compare.provenance import origin
    from compare.worlds import measure_mode, write_worlds
    from compare.zero_shot import Results, measure_all
    from configs.schema import load_config, resolve_model, shipped_config
    from environments.atlas.editions import Edition
    from launch.commands.merge import merge_checkpoints
    from train.worlds import load_environment, load_eval_questions

    SCRATCH.mkdir(parents=True, exist_ok=True)
    demo = load_config(shipped_config("demo"), [f"calibration.output={SCRATCH / 'calibration'}"])
    make_statistics(demo, needed_kinds(demo.merge))
    # None is merged anew as the settings say
    pictured: dict[str, str | None] = {"vlm": resolve_model("atlas://vlm"), "obm": None}
    pictured |= dict(starts or {})
    textual = {name: resolve_model(f"atlas://{name}") for name in ("base", "agent")}
    results = Results(SCRATCH / "measured.jsonl")
    rows = []
    for mode, kind, settings in MODES:
        asked = {"eval_split": "test", "eval_kinds": [kind], "eval_size": n, **settings}
        config = replace(demo, environment=replace(demo.environment, **asked))
        questions = load_eval_questions(config)
        edition = Edition(settings.get("counterfactual"), settings.get("news"))
        shares = measure_mode(load_environment(config), questions, edition)
        policies = textual if kind == "text" else pictured
        tasks = [
            make_task(f"{mode}, {kind}, {name}", config, checkpoint=folder)
            for name, folder in policies.items()
        ]
        measured = measure_all(tasks, results, merge_checkpoints, scratch=SCRATCH)
        metrics = {
            name: {key: round(value, 4) for key, value in result["metrics"].items()}
            for name, result in zip(policies, measured, strict=True)
        }
        row = {
            "mode": mode,
            "kind": kind,
            "n": len(questions),
            "shares": {name: round(share, 4) for name, share in shares.items()},
            "policies": metrics,
        }
        rows.append(row)
        accuracies = ", ".join(f"{name} {m['accuracy']:.2f}" for name, m in metrics.items())
        print(f"{mode}, {kind}: ceiling {shares['ceiling']:.2f}; {accuracies}", flush=True)
    record = {
        **origin(command),
        "n": n,
        "strength": demo.environment.strength,
        "changed": _share_changed(),
        "rows": rows,
    }
    write_worlds(record, output)
    return rows


def _share_changed() -> float:
    """Share of the test split's headline facts that the newer sheet states otherwise."""
    from environments.atlas.editions import Edition, load_sheets
    from environments.atlas.entities import HEADLINE_RELATIONS

    older, newer = (sheet.entities for sheet in load_sheets(Edition(news="both")))
    changed = [
        newer[iso].relations[relation] != entity.relations[relation]
        for iso, entity in older.items()
        for relation in HEADLINE_RELATIONS
        if entity.split == "test" and relation in entity.relations
    ]
    return sum(changed) / len(changed)

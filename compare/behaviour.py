"""How episodes searched, of runs that did not record it: counted in their trajectories.jsonl.

An evaluation reports `behaviour/image_only`, `text_only`, `both` and `none`: shares of episodes
that add up to 1. Older runs have only `search_rate_image` and `search_rate_text`, which overlap;
but they kept every episode of every evaluation.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from compare.runs import Run
from compare.trajectory_files import calls
from train.evaluation import BEHAVIOURS, behaviour


def add_behaviour(run: Run) -> None:
    """Put the shares into the run's evaluations where they are missing and can be counted.

    Evaluations whose episodes are not all in the file stay as they are.
    """
    path = Path(run.folder) / "trajectories.jsonl"
    missing = [line for line in run.evaluations if f"behaviour/{BEHAVIOURS[0]}" not in line]
    if not missing or not run.is_trained or not path.is_file():
        return
    counts = count_behaviours(path)
    for line in missing:
        found = counts.get(int(line["step"]), Counter())
        n = sum(found.values())
        if n and n == line.get("n"):
            line |= {f"behaviour/{name}": found[name] / n for name in BEHAVIOURS}


def count_behaviours(path: Path) -> dict[int, Counter[str]]:
    """Step -> how many evaluation episodes searched in which way.

    A line that is torn or no episode is left out.
    """
    counts: dict[int, Counter[str]] = {}
    with path.open("rb") as file:
        for line in file:
            try:
                episode = json.loads(line)
                if episode["phase"] == "eval":
                    step, kinds = int(episode["step"]), _searches(episode)
                    name = behaviour(kinds["image_search"], kinds["search"])
                    counts.setdefault(step, Counter())[name] += 1
            # no text, no JSON, nested too deep, or of another shape
            except (
                ValueError,
                TypeError,
                LookupError,
                ArithmeticError,
                AttributeError,
                RecursionError,
            ):
                continue
    return counts


def _searches(episode: dict[str, Any]) -> Counter[str]:
    kinds: Counter[str] = Counter()
    for turn in episode.get("turns") or []:
        kinds.update(str(call.get("type")) for call in calls(turn))
    return kinds

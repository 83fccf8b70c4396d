"""Run folders with scripted metrics, written as a training writes them."""

import json
from pathlib import Path

import pytest
import yaml

from tests.compare.browser import chromium

BASE_CONFIG = {
    "seed": 0,
    "models": {"init": "atlas://vlm"},
    "environment": {
        "name": "atlas", "kinds": ["two"], "strength": 0.5, "train_size": 64, "timeout_s": 10.0,
        "eval_split": "dev", "eval_size": 20, "eval_kinds": ["two"],
    },
    "rewards": {"accuracy": 1.0, "format": 0.1},
    "grpo": {"max_steps": 20, "num_generations": 4, "learning_rate": 1e-4, "seed": 0},
    "tracking": {"arm": None},
    "compare": {"eval_every": 5},
}  # fmt: skip


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder and returns its path: `make_run("obm", 0, [0.1, 0.5])`."""

    def write(arm, seed, curve, *, changes=None, done=True, eval_every=5, folder=None):
        config = json.loads(json.dumps(BASE_CONFIG))
        config["seed"] = config["grpo"]["seed"] = seed
        config["tracking"]["arm"] = arm
        for key, value in (changes or {}).items():
            section, name = key.split(".")
            config[section][name] = value
        run = Path(folder or tmp_path / f"{arm}-s{seed}")
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "environment.json").write_text(
            json.dumps({"commit": "abc123", "hardware": "test machine, 2 cores"})
        )
        lines = []
        for index, accuracy in enumerate(curve):
            step = index * eval_every
            parts = {
                "searched": accuracy, "entity": accuracy / 2, "passage": accuracy / 4,
                "accuracy": accuracy, "search_rate_text": accuracy, "search_rate_image": 0.25,
                "n": 20, "kind/two/accuracy": accuracy, "seen/accuracy": accuracy,
                "unseen/accuracy": accuracy / 2,
            }  # fmt: skip
            record = {"step": step, "phase": "eval", "time_s": float(step), "tokens": 100 * step}
            lines.append({**record, **{f"eval/{key}": value for key, value in parts.items()}})
            lines.append({"step": step + 1, "phase": "train", "time_s": step + 0.5, "reward": 0.2})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if done:
            (run / "done.json").write_text("{}")
        return run

    return write


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium for all tests of pages; see tests/compare/browser.py."""
    with chromium() as running:
        yield running

"""Helpers for tests of the door: verbs run in this process, trainings are scripted."""

import json

import pytest
import yaml

from launch.cli import main


@pytest.fixture
def obm(capsys, monkeypatch):
    """Runs `obm ...` in this process: `obm("init")` gives (exit code, stdout, stderr)."""

    def call(*arguments):
        words = [str(argument) for argument in arguments]
        monkeypatch.setattr("sys.argv", ["/somewhere/bin/obm", *words])  # what a record quotes
        code = main(words)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def write_scripted_run():
    """Writes what a training leaves in its run folder; the warm arm starts higher."""

    def write(config_file):
        from pathlib import Path

        config = yaml.safe_load(Path(config_file).read_text())
        run = Path(config["output"])
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        (run / "environment.json").write_text(json.dumps({"commit": "abc", "hardware": "test"}))
        start = 0.0 if config["tracking"]["arm"] == "vlm" else 0.2
        lines = []
        for index in range(4):
            accuracy = start + 0.1 * index + 0.01 * config["seed"]
            parts = ("searched", "entity", "passage", "accuracy", "search_rate_text",
                     "search_rate_image", "kind/two/accuracy")  # fmt: skip
            line = {"step": 5 * index, "phase": "eval", "time_s": 1.0, "tokens": 10}
            lines.append({**line, **{f"eval/{part}": accuracy for part in parts}})
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (run / "done.json").write_text("{}")

    return write

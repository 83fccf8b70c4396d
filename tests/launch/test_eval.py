"""`obm eval` on tiny, untrained checkpoints: benchmarks, modes, a kill in the middle, shards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.commands.eval import read_shard
from launch.errors import LaunchError

ROOT = Path(__file__).parents[2]
COPIES = ROOT / "tests" / "compare" / "benchmarks"
SETTINGS = {
    "environment": {"eval_size": 8, "eval_kinds": ["two", "text"], "max_turns": 2},
    "grpo": {"max_completion_length": 64, "generation_kwargs": {"max_new_tokens": 8}},
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A settings file of the tiny VLM."""
    from train.tiny import make_tiny_checkpoints

    folder = tmp_path_factory.mktemp("eval")
    trio = make_tiny_checkpoints(folder / "trio", seed=0)
    models = {"init": trio["vlm"]}
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "run"), "models": models, **SETTINGS}))
    return path


@pytest.fixture
def evaluate(settings, obm):
    """Runs `obm eval` on the tiny VLM."""
    vlm = yaml.safe_load(settings.read_text())["models"]["init"]

    def call(*arguments):
        return obm("eval", vlm, "--config", settings, "--arm", "vlm", *arguments)

    return call


def result_of(folder):
    """Metrics and episodes, without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "trajectories.jsonl").open()]
    for line in lines:
        for turn in line["turns"]:
            turn["seconds"] = 0.0
    record = json.loads((folder / "eval.json").read_text())
    return record["metrics"], record["intervals"], lines


def test_a_benchmark_is_evaluated_in_each_mode(evaluate, tmp_path):
    source = f"environment.eval_benchmark.source={COPIES / 'fvqa_test.parquet'}"
    for mode, calls in (("agent", None), ("direct", 0.0), ("prompted", None), ("rag", 2.0)):
        output = tmp_path / mode
        code, out, err = evaluate(
            "--benchmark", "fvqa_test", "--mode", mode, "--output", output, source
        )
        assert code == 0, err
        assert "kind/search_free" in out
        assert "official/em" in out
        record = json.loads((output / "eval.json").read_text())
        assert record["mode"] == mode
        assert record["benchmark"] == {"name": "fvqa_test", "metrics": ["em", "mmsearch_r1"]}
        assert record["metrics"]["n"] == 3
        assert record["metrics"]["split/test/n"] == 3
        assert {"official/em", "strict/em", "official/mmsearch_r1"} <= set(record["metrics"])
        if calls is not None:
            assert record["metrics"]["calls"] == calls


def test_a_dry_run_reads_every_row_and_loads_no_model(evaluate, tmp_path, monkeypatch):
    def never(folder):
        raise AssertionError("no model is needed")

    monkeypatch.setattr("launch.models.load_for_inference", never)
    source = "environment.eval_benchmark.source"
    code, out, _ = evaluate(
        "--benchmark", "livevqa", "--dry-run", f"{source}={COPIES / 'livevqa.json'}"
    )
    assert code == 0
    assert "benchmark livevqa, scored by livevqa" in out
    assert "kind/level2: 1" in out
    rows = json.loads((COPIES / "livevqa.json").read_text())
    del rows[0]["level2_qa"]["question"]
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    code, _, err = evaluate(
        "--benchmark", "livevqa", "--dry-run", f"{source}={tmp_path / 'bad.json'}"
    )
    assert code == 2
    assert "bad.json, row 1, column 'level2_qa.question': missing" in err
    assert err.count("\n") == 1


def test_a_kind_prints_without_its_control_characters(evaluate, tmp_path):
    row = {"question": "Where?", "answers": ["here"], "kind": "far\x1b[2J\naway"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    source = f"environment.eval_benchmark.source={tmp_path / 'questions.jsonl'}"
    for how in (["--dry-run"], ["--mode", "direct", "--output", tmp_path / "out"]):
        code, out, _ = evaluate("--benchmark", "table", *how, source)
        assert code == 0
        assert "kind/far [2J away" in out
        assert "\x1b" not in out


def test_an_unknown_benchmark_is_one_clear_error(evaluate):
    code, _, err = evaluate("--benchmark", "fvqa", "--dry-run")
    assert code == 2
    assert "environment.eval_benchmark.name" in err
    assert "fvqa_test" in err or "fvqa_train" in err


@pytest.fixture
def refused(evaluate, tmp_path, monkeypatch):
    """Runs `obm eval` on a table; gives the one line that it is refused with."""
    monkeypatch.setattr("launch.models.load_for_inference", lambda folder: pytest.fail("loaded"))

    def call(name, text, *arguments):
        (tmp_path / name).write_text(text)
        output = tmp_path / "out"
        code, out, err = evaluate(
            "--benchmark", "table", "--output", output, *arguments,
            f"environment.eval_benchmark.source={tmp_path / name}",
        )  # fmt: skip
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert not output.exists(), "something half written"
        return err

    return call


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("name", "text"),
    [("e.jsonl", ""), ("e.csv", "question,answers\n"), ("e.json", "[]")],
)
def test_a_file_without_questions_is_refused(refused, name, text, how):
    assert f"{name}; widen it" in refused(name, text, *how)


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("split", "words"),
    [("[:0]", "no question fits the selection"), ("[:" + "9" * 5000 + "]", "not a part of a")],
)
def test_a_split_without_questions_is_refused(refused, split, words, how):
    row = '{"question": "a", "answers": "b"}'
    assert words in refused("q.jsonl", row, f"environment.eval_benchmark.split='{split}'", *how)


def test_several_processes_do_not_share_a_vllm_server(refused):
    row = '{"question": "a", "answers": "b"}'
    assert "by one, or set rollout.backend=in_process" in refused(
        "q.jsonl", row, "--shard", "0/2", "rollout.backend=vllm"
    )


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_shard_beyond_counting_is_refused(refused, how):
    assert "write I/N" in refused("e.json", "[]", "--shard", "1/" + "9" * 5000, *how)


@pytest.mark.parametrize("how", [(), ("--dry-run",)])
def test_a_checkpoint_without_a_name_is_refused(obm, how):
    code, out, err = obm("eval", "", *how)
    assert (code, out) == (2, "")
    assert err.startswith("error: the checkpoint has no name; give a folder")


def test_a_mistake_keeps_the_evaluation_that_is_there(evaluate, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "eval.json").write_text("{}")
    (tmp_path / "e.json").write_text("[]")
    source = f"environment.eval_benchmark.source={tmp_path / 'e.json'}"
    arguments = ("--benchmark", "table", "--output", tmp_path / "out", "--overwrite", source)
    assert evaluate(*arguments)[0] == 2
    assert (tmp_path / "out" / "eval.json").read_text() == "{}"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_shards_add_up_to_the_same(settings, evaluate, tmp_path):
    whole, killed, shared = (tmp_path / name for name in ("whole", "killed", "shared"))
    assert evaluate("--batch", "2", "--output", whole)[0] == 0
    vlm = yaml.safe_load(settings.read_text())["models"]["init"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "eval", vlm, "--config", str(settings), "--arm", "vlm",
         "--batch", "2", "--output", str(killed)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while process.poll() is None and not list((killed / "episodes").glob("*.jsonl")):
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    if not (killed / "eval.json").exists():
        kept = {path.name: path.stat().st_mtime_ns for path in killed.glob("episodes/*.jsonl")}
        assert kept
        # another batch size would not give the same numbers
        assert "another batch" in evaluate("--batch", "3", "--output", killed)[2]
        assert evaluate("--batch", "2", "--output", killed)[0] == 0
    assert result_of(killed) == result_of(whole)

    code, out, _ = evaluate("--batch", "2", "--shard", "1/2", "--output", shared)
    assert code == 0
    assert "waits for the others" in out
    assert evaluate("--batch", "2", "--shard", "0/2", "--output", shared)[0] == 0
    assert result_of(shared) == result_of(whole)
    assert evaluate("--batch", "2", "--output", shared)[0] == 2
    assert evaluate("--batch", "2", "--output", shared, "--overwrite")[0] == 0
    assert result_of(shared) == result_of(whole)


def test_every_process_has_some_of_few_questions(evaluate, tmp_path):
    # three questions: two for the first of two processes, as a batch of its own
    source = f"environment.eval_benchmark.source={COPIES / 'fvqa_test.parquet'}"
    output = tmp_path / "out"
    chosen = ("--benchmark", "fvqa_test", "--output", output, source)
    for part in ("1/2", "0/2"):
        code, _, err = evaluate(*chosen, "--shard", part)
        assert code == 0, err
        if part == "1/2":
            [kept] = (output / "episodes").glob("*.jsonl")
            assert (kept.name, len(kept.read_text().splitlines())) == ("000001.jsonl", 1)
    assert json.loads((output / "eval.json").read_text())["plan"]["batch"] == 2


def test_a_part_is_named_or_is_the_launchers_rank(monkeypatch):
    assert read_shard("2/8") == (2, 8)
    assert read_shard(None) == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert read_shard(None) == (3, 4)
    for wrong in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(LaunchError, match="write I/N"):
            read_shard(wrong)


def test_processes_that_share_must_not_overwrite(evaluate, tmp_path):
    code, _, err = evaluate("--shard", "0/2", "--overwrite", "--output", tmp_path)
    assert code == 2
    assert "--overwrite" in err


def test_a_second_evaluation_into_the_same_folder_is_told_who_is_there(evaluate, tmp_path):
    from train.lock import locked

    output = tmp_path / "eval"
    with locked(output, ".lock-0-of-1"):
        code, _, err = evaluate("--output", output)
        assert code == 2
        assert "eval is in use by process" in err
        assert [path.name for path in output.iterdir()] == [".lock-0-of-1"]

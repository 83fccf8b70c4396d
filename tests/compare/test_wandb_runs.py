"""Runs read back from W&B: offline files of a real training, and a server behind a fake api."""

import json
import math
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import wandb
from wandb.errors import WandbCoreNotAvailableError

from compare import wandb_runs
from compare.errors import CompareError
from compare.report import write_report
from compare.runs import read_run, read_runs
from compare.wandb_runs import lines_of, read_online
from configs.schema import load_config
from train.callbacks import Recorder
from train.run import run_training
from train.tiny import make_tiny_checkpoints

SETTINGS = """
output: {output}
seed: 1
models: {{init: {init}}}
environment: {{train_size: 16, eval_size: 6, kinds: [two, text], eval_kinds: [two, text]}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 4
  save_steps: 2
  save_total_limit: null
compare: {{eval_every: 2}}
tracking: {{wandb: offline, arm: tiny}}
"""


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """A training of four steps of a tiny policy, W&B offline."""
    folder = tmp_path_factory.mktemp("wandb")
    checkpoints = make_tiny_checkpoints(folder / "tiny", seed=0)
    path = folder / "settings.yaml"
    path.write_text(SETTINGS.format(output=folder / "run", init=checkpoints["vlm"]))
    run = run_training(load_config(path))
    wandb.teardown()  # W&B's own process may still be writing when a run has been closed
    return run


@pytest.mark.timeout(300)
def test_a_real_run_is_read_back_equal_to_its_metrics(real_run):
    [offline] = (real_run / "wandb").glob("offline-run-*")
    from_folder = read_run(real_run)
    for source in (offline, next(offline.glob("*.wandb"))):
        found = read_run(source)
        assert found.evaluations == from_folder.evaluations
        assert found.training == from_folder.training
        assert found.config == from_folder.config
        assert found.provenance == from_folder.provenance
        assert (found.arm, found.seed) == ("tiny", 1)
        assert found.start["merged"] is False
    assert [line["step"] for line in found.evaluations] == [0, 2, 4]
    # every line, with its clocks, in the file's order
    lines = [{"phase": line["phase"], "step": line["step"]} for line in metrics_of(real_run)]
    assert [line["phase"] for line in lines] == [
        "eval", "train", "train", "eval", "train", "train", "eval"
    ]  # fmt: skip


@pytest.mark.timeout(300)
def test_a_resumed_run_is_read_back_from_both_of_its_folders(real_run, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(real_run, part, symlinks=True)
    (part / "done.json").unlink()
    shutil.rmtree(part / "checkpoints" / "checkpoint-4")
    config = load_config(part / "config.yaml", [f"output={part}"])
    run_training(config, resume=True)
    wandb.teardown()
    first, second = sorted((part / "wandb").glob("offline-run-*"))
    before, after = metrics_of(real_run), metrics_of(part)
    assert before[-1]["time_s"] != after[-1]["time_s"]  # steps 3 and 4 were done again
    [both] = read_runs([first, second])  # as obm compare runs/*/wandb/offline-run-* gives them
    assert both.evaluations == read_run(part).evaluations
    for source in (first, second):
        found = read_run(source)
        expected = read_run(part)
        assert found.evaluations == expected.evaluations
        assert found.training == expected.training


@pytest.mark.timeout(300)
def test_folder_and_wandb_give_the_same_report(real_run, tmp_path):
    [offline] = (real_run / "wandb").glob("offline-run-*")
    summaries = [
        write_report([read_run(source)], tmp_path / name, command="c", target_arm="tiny")
        for name, source in (("folder", real_run), ("wandb", offline))
    ]
    for summary in summaries:
        del summary["arms"]["tiny"]["runs"]
    assert summaries[0] == summaries[1]
    assert summaries[0]["curves"]["tiny"]["accuracy"]["tokens"] is not None


@pytest.fixture
def recorded(tmp_path):
    """A folder with metrics written by a Recorder, as lines and in W&B: `recorded(lines)`."""

    def write(lines):
        path = tmp_path / "settings.yaml"
        path.write_text("output: x\nmodels: {init: atlas://vlm}\ntracking: {wandb: offline}\n")
        recorder = Recorder(tmp_path, load_config(path), is_main=True)
        for step, phase, values in lines:
            recorder.metrics(step, phase, 10 * step, values)
        recorder.close()
        wandb.teardown()  # W&B's own process may still be writing when a run has been closed
        return tmp_path

    return write


def test_a_null_a_tiny_number_and_a_line_of_each_phase_survive(recorded):
    folder = recorded([
        (0, "eval", {"accuracy": 1 / 3, "time_s": 1.5, "kind/two/accuracy": 1e-30}),
        (1, "train", {"loss": math.nan, "reward": math.inf, "time/loss_s": 0.25, "n": 2**53}),
        (1, "eval", {"accuracy": 0.1 + 0.2, "time_s": 2.5}),
    ])  # fmt: skip
    [offline] = (folder / "wandb").glob("offline-run-*")
    found = read_run(offline)
    assert found.training == [line for line in metrics_of(folder) if line["phase"] == "train"]
    assert found.training[0]["loss"] is None
    assert found.training[0]["n"] == 2**53
    assert found.curve("accuracy") == [1 / 3, 0.1 + 0.2]
    assert [line["evaluation_s"] for line in found.evaluations] == [1.5, 2.5]


def test_a_killed_run_is_unfinished_and_can_be_taken_as_it_is(recorded, tmp_path):
    n_lines = 40
    folder = recorded([(step, "eval", {"accuracy": step / 64}) for step in range(n_lines)])
    [file] = (folder / "wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    copy = tmp_path / "copy" / "wandb" / file.parent.name
    copy.mkdir(parents=True)
    # the exit and the last rows are gone, and one record is torn
    (copy / file.name).write_bytes(content[: int(len(content) * 0.8)])
    with pytest.raises(CompareError, match=r"not finished.*--partial"):
        read_run(copy)
    curve = read_run(copy, partial=True).curve("accuracy")
    assert 0 < len(curve) < n_lines
    assert curve == [step / 64 for step in range(len(curve))]


def test_a_file_that_is_none_of_wandbs_is_an_error(tmp_path):
    file = tmp_path / "offline-run-1-x" / "run-x.wandb"
    file.parent.mkdir()
    file.write_bytes(b"no such thing" * 100)
    with pytest.raises(CompareError, match=r"run-x\.wandb: "):
        read_run(file)
    with pytest.raises(CompareError, match="no such file"):
        read_run(tmp_path / "gone.wandb")


def read_by(monkeypatch, tmp_path, answer):
    """Reads a file whose reader gives an answer: text, or an exception that it ends in."""

    def run_reader(arguments):
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(arguments, 0, answer, "")

    monkeypatch.setattr(wandb_runs, "_run_reader", run_reader)
    file = tmp_path / "offline-run-1-x" / "run-x.wandb"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    return read_run(file)


def test_a_reader_that_does_not_answer_is_an_error(monkeypatch, tmp_path):
    for answer, words in (
        (subprocess.TimeoutExpired("wandb-core", 300), "not done after 300 s"),
        (WandbCoreNotAvailableError("File not found"), r"is missing \(File not found\)"),
    ):
        with pytest.raises(CompareError, match=rf"run-x\.wandb: .*{words}; name the run's own"):
            read_by(monkeypatch, tmp_path, answer)


def test_only_the_last_record_may_be_torn(monkeypatch, tmp_path):
    records = [
        {"type": "config", "config": {"update": {**CONFIG, "notes": "a\u0085b"}}},
        *({"type": "history", "history": {"item": row}} for row in ROWS[1:]),
        {"type": "exit", "exit": {"exit_code": 0}},
    ]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    run = read_by(monkeypatch, tmp_path, "\n".join([*lines, '{"type": "st']))
    assert run.config["notes"] == "a\u0085b"
    with pytest.raises(CompareError, match=r"run-x\.wandb: record 2 is damaged .*restore it"):
        read_by(monkeypatch, tmp_path, "\n".join([lines[0], lines[1][:-3], lines[2]]) + "\n")


def test_someone_elses_run_is_an_error(tmp_path):
    run = wandb.init(
        project="p", mode="offline", dir=str(tmp_path), config={"lr": 1.0},
        settings=wandb.Settings(silent=True, console="off"),
    )  # fmt: skip
    run.log({"loss": 1.0})
    run.finish()
    wandb.teardown()
    [offline] = (tmp_path / "wandb").glob("offline-run-*")
    with pytest.raises(CompareError, match="not that of a training by `obm train`"):
        read_run(offline)


# ---------------------------------------------------------------- a server


class FakeRun:
    """What `wandb.Api().run` gives, as far as it is used: the whole history, a row a step.

    It stands for the public api's object; no server was asked.
    """

    def __init__(self, config, rows, state="finished"):
        self.config, self.state, self._rows = config, state, rows

    def scan_history(self):
        return iter(self._rows)

    def history(self):
        raise AssertionError("this one samples")


CONFIG = {
    "seed": 2, "arm": "obm", "tracking": {"arm": "obm"},
    "environment": {"eval_size": 4}, "grpo": {"max_steps": 2},
    "record": {"environment": {"world_size": 2}, "merged": True, "start_cost": {"merge": None}},
}  # fmt: skip
ROWS = [
    {"_step": 2, "_timestamp": 3.0, "train/loss": math.nan, "train/global_step": 2,
     "train_clock/time_s": 4.0, "train_clock/tokens": 20, "eval/accuracy": 0.75,
     "eval/time_s": 1.0, "eval_clock/time_s": 5.0, "eval_clock/tokens": 20, "time_s": 5.0,
     "health/active": 0, "trajectories": {"_type": "table-file"}},
    {"_step": 0, "eval/accuracy": 0.25, "eval_clock/time_s": 1.0, "eval_clock/tokens": 0},
]  # fmt: skip


def test_a_run_on_a_server_is_read_whole_and_in_order():
    asked = []
    api = SimpleNamespace(run=lambda name: asked.append(name) or FakeRun(CONFIG, ROWS))
    run = read_online("wandb://me/search/a0e1", api=api)
    assert asked == ["me/search/a0e1"]
    assert (run.arm, run.seed, run.steps) == ("obm", 2, [0, 2])
    assert run.curve("accuracy") == [0.25, 0.75]
    assert run.training == [
        {"step": 2, "phase": "train", "time_s": 4.0, "tokens": 20, "loss": None}
    ]
    assert run.evaluations[1]["time_s"] == 5.0
    assert run.evaluations[1]["evaluation_s"] == 1.0
    assert run.provenance == {"world_size": 2}
    assert run.start == {"merged": True, "stats": [], "cost": {"merge": None}}
    assert "record" not in run.config


def test_a_run_that_still_goes_on_the_server_is_unfinished():
    api = SimpleNamespace(run=lambda name: FakeRun(CONFIG, ROWS, state="running"))
    with pytest.raises(CompareError, match="not finished"):
        read_online("wandb://me/search/a0e1", api=api)
    assert read_online("wandb://me/search/a0e1", api=api, partial=True).steps == [0, 2]


def test_a_name_or_a_run_that_is_not_there_is_an_error():
    def refuse(name):
        raise wandb.errors.CommError("Could not find run")

    with pytest.raises(CompareError, match="write wandb://entity/project/run_id"):
        read_run("wandb://search/a0e1")
    with pytest.raises(CompareError, match=r"cannot be read from W&B .*wandb login"):
        read_online("wandb://me/search/gone", api=SimpleNamespace(run=refuse))


def test_a_history_that_breaks_off_is_an_error():
    class Broken(FakeRun):
        def scan_history(self):
            yield from self._rows
            raise ConnectionResetError("reset by peer")

    with pytest.raises(CompareError, match=r"a0e1: cannot be read from W&B \(reset by peer\)"):
        read_online(
            "wandb://me/search/a0e1", api=SimpleNamespace(run=lambda name: Broken(CONFIG, ROWS))
        )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("x", "record is 'x'"),
        ({"environment": []}, r"record\.environment is \[\]"),
        ({"environment": {"world_size": "two"}}, "world_size is 'two'"),
        ({"start_cost": {"merge": {"device_s": "x"}}}, r"merge\.device_s is 'x'"),
        ({"resumed_at": "x"}, r"record\.resumed_at is 'x'"),
    ],
)
def test_what_a_server_holds_of_a_run_is_checked_as_its_folder_is(record, words):
    run = FakeRun({**CONFIG, "record": record}, ROWS)
    with pytest.raises(CompareError, match=f"a0e1: {words}, and must be"):
        read_online("wandb://me/search/a0e1", api=SimpleNamespace(run=lambda name: run))


def test_rows_of_older_runs_have_the_clocks_of_the_row():
    rows = [{"_step": 5, "train/loss": 0.5, "eval/accuracy": 0.5, "time_s": 9.0, "tokens": 3}]
    train, evaluation = lines_of(rows)
    assert train == {"step": 5, "phase": "train", "time_s": 9.0, "tokens": 3, "loss": 0.5}
    assert evaluation["time_s"] == 9.0

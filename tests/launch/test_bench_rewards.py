"""The bench of the rewards: every prediction is new, targets are judged, the page says it all."""

import itertools
import json

from environments.atlas.questions import list_questions
from launch.bench_rewards import bench_rewards, render_page, spellings
from launch.cli import main
from rewards.answer import exact_match


def test_predictions_are_right_and_wrong_and_hardly_repeat():
    questions = list(list_questions("dev", "text"))
    pairs = list(itertools.islice(spellings(questions), 4000))
    assert len({prediction for prediction, _ in pairs}) > 3800
    n_right = sum(exact_match(p, question["answers"]) for p, question in pairs)
    assert n_right == 3 / 8 * len(pairs)


def test_the_bench_judges_and_writes(tmp_path, capsys):
    code = main(["bench", "rewards", "--answers", "2000", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "bench-rewards.json").read_text())
    assert code == 0
    assert all(target["met"] for target in record["targets"])
    assert {row["n"] for row in record["speeds"]} == {2000, 200}
    page = (tmp_path / "bench-rewards.md").read_text()
    assert page == render_page(record)
    assert "| exact match | 2,000 |" in page
    assert "exact match" in capsys.readouterr().out


def test_too_few_answers_are_refused(tmp_path, capsys):
    assert main(["bench", "rewards", "--answers", "3", "--output", str(tmp_path)]) == 2
    assert "--answers has to be 10 or more" in capsys.readouterr().err


def test_a_missed_target_stays_missed(monkeypatch):
    monkeypatch.setattr("launch.bench_rewards.EXACT_TARGET_S", -1.0)
    monkeypatch.setattr("launch.bench_rewards._slowest", lambda: 0.0)
    targets = bench_rewards(1000)["targets"]
    assert [target["met"] for target in targets] == [False, True, True, True]

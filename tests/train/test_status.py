"""What a run's status says: time left, changes since the floor, its rows on any width."""

import json
from io import BytesIO, StringIO, TextIOWrapper

import pytest
from rich.console import Console
from rich.text import Text

from launch.cli import main
from train.health import HealthWarning, Settings, find_warnings
from train.panel import JOINT, _cells, duration, fit, sparkline
from train.status import Status, evaluations_left, is_line, is_number

TRAIN = {
    "phase": "train", "reward": 0.4, "rewards/accuracy/mean": 0.25, "search/rate_image": 0.125,
    "search/rate_text": 0.96, "search/calls_per_episode": 1.87, "speed/tokens_per_s": 1234.4,
    "time/generate_s": 3.0, "time/rollout_s": 2.8, "time/loss_s": 1.5, "time/optimizer_s": 0.5,
    "time/tools_s": 0.01, "time/sync_s": 0.4, "stop/answer": 0.75, "stop/length": 0.25,
    "stop/invalid": 0.0,
}  # fmt: skip


def evaluation(step, time_s, took_s, accuracy):
    parts = {"eval/searched": 0.9, "eval/entity": 0.5, "eval/passage": 0.5}
    line = {"step": step, "phase": "eval", "time_s": time_s, "eval/time_s": took_s}
    return line | parts | {"eval/accuracy": accuracy}


def a_status(n_steps=4, **values):
    """Steps of 10 s each, an evaluation of 6 s before the first and after every second."""
    status = Status("obm-s0", max_steps=9, eval_every=2, **values)
    status.take(evaluation(0, 26.0, 6.0, 0.3))
    now = 26.0
    for step in range(1, n_steps + 1):
        now += 10.0
        status.take({**TRAIN, "step": step, "time_s": now, "reward": 0.1 * step})
        if step % 2 == 0:
            now += 6.0
            status.take(evaluation(step, now, 6.0, 0.3 + 0.04 * step))
    return status


def drawn(status, width=100, **settings):
    console = Console(file=StringIO(), width=width, force_terminal=True, **settings)
    return "\n".join(fit(status, console))


def plain(text):
    return Text.from_ansi(text).plain


# ---------------------------------------------------------------- numbers


def test_the_time_left_counts_steps_and_evaluations():
    # after step 4 and its evaluation: 5 steps of 10 s, evaluations of 6 s after 6, 8 and 9
    assert a_status(4).left_s() == pytest.approx(5 * 10 + 3 * 6)
    assert a_status(4).left_s(since_line_s=3.0) == pytest.approx(65.0)
    # after step 3: 6 steps, evaluations after 4, 6, 8 and 9
    assert a_status(3).left_s() == pytest.approx(6 * 10 + 4 * 6)


def test_the_evaluation_of_the_step_itself_still_comes():
    status = a_status(4)
    status.take({**TRAIN, "step": 5, "time_s": status.time_s + 10})
    status.take({**TRAIN, "step": 6, "time_s": status.time_s + 10})
    # 3 steps, evaluations of steps 6 (not yet done), 8 and 9
    assert status.left_s() == pytest.approx(3 * 10 + 3 * 6)


@pytest.mark.parametrize(
    ("step", "n_steps", "every", "n"), [(5, 12, 5, 2), (0, 12, 5, 3), (10, 10, 5, 0), (0, 10, 5, 2)]
)
def test_evaluations_left(step, n_steps, every, n):
    assert evaluations_left(step, n_steps, every) == n


def test_nothing_is_promised_before_the_first_step_or_without_an_end():
    assert a_status(0).left_s() is None
    endless = a_status(4)
    endless.max_steps = 0
    assert endless.left_s() is None
    assert "left" not in drawn(endless)


def test_loading_after_a_stop_is_no_step():
    status = a_status(4)
    status.is_fresh = True
    status.take({**TRAIN, "step": 5, "time_s": status.time_s + 500})
    assert max(status.step_seconds) == pytest.approx(10.0)


def test_a_line_with_a_mean_over_nothing_is_left_out_and_breaks_nothing():
    status = a_status(2)
    status.take({"step": 3, "phase": "train", "time_s": status.time_s + 1, "reward": None})
    assert status.series("reward") == pytest.approx([0.1, 0.2])
    assert "reward" in drawn(status)
    status.take({"step": 4})
    assert status.step == 3


HOSTILE = ["x", [1], {}, 10**400, -(10**400), 1e308, -1e308, float("nan"), True, None]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:8])
@pytest.mark.parametrize("phase", ["train", "eval"])
def test_a_value_of_any_kind_is_drawn_or_left_out(phase, value):
    good = evaluation(5, 90.0, 6.0, 0.4) if phase == "eval" else TRAIN | {"step": 5, "time_s": 90.0}
    for name in [*good, "eval/time_s", "reward", "grad_norm"]:
        status = a_status(4)
        line = good | {"phase": phase, name: value}
        status.take(line)
        is_taken = is_line(line) and is_number(line["step"]) and is_number(line["time_s"])
        assert ("step 5/9" in plain(drawn(status))) == (is_taken and line["step"] == 5)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: str(value)[:8])
def test_rules_take_a_metric_of_any_kind(value):
    settings = Settings(max_completion_tokens=320, max_new_tokens=40, beta=0.001)
    names = [*TRAIN, "loss", "grad_norm", "kl", "entropy", "frac_reward_zero_std"]
    for name in names:
        lines = [{**TRAIN, "grad_norm": 1.0, "loss": 0.1, name: value} for _ in range(12)]
        found = [warning.code for warning in find_warnings(lines, settings)]
        is_odd = name in ("loss", "grad_norm") and value is not True
        assert ("gradient" in found) == is_odd


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[1]", b'{"step": "x"}', b'{"phase": "train"}'])
def test_watch_passes_a_bad_line_over(tmp_path, capsys, line):
    (tmp_path / "config.yaml").write_text("output: x\n")
    good = [json.dumps({**TRAIN, "step": n, "time_s": 9.0 * n}).encode() for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    (tmp_path / "heartbeat").mkdir()
    beat = {"rank": 0, "stage": 3, "step": 1, "since": 0.0, "seen": "x", "host": "h", "pid": 1}
    (tmp_path / "heartbeat" / "rank_0.json").write_text(json.dumps(beat))
    assert main(["watch", str(tmp_path), "--once"]) == 0
    assert "step 2/" in capsys.readouterr().out


def test_watch_takes_a_name_that_is_too_long_for_no_run(capsys):
    assert main(["watch", "x" * 300, "--once"]) == 2
    assert "holds no config.yaml; name the folder" in capsys.readouterr().err


# ---------------------------------------------------------------- the panel


@pytest.mark.parametrize("width", [60, 100, 160])
def test_every_number_is_there_on_wide_and_narrow_lines(width):
    status = a_status(4, stage="decode", memory_gb=3.25)
    text = plain(drawn(status, width))
    for words in (
        # 26 s until the first step, 4 steps of 10 s, 2 evaluations of 6 s: 78 s
        "obm-s0", "step 4/9, decode", "1:18 gone", "1:08 left", "tokens/s 1,234", "memory 3.2 GB",
        "0.400", "right 0.25", "image 0.12", "text 0.96", "calls 1.9",
        # the step is 3.0 + 1.5 + 0.5 s; tools take less than 2 % of it and are not worth a word
        "5.0 s", "rollout 2.80", "loss 1.50", "update 0.50", "sync 0.40",
        "answer 75%", "length 25%", "step 4:", "searched 0.90 +0.00", "right 0.46 +0.16",
    ):  # fmt: skip
        assert words in " ".join(text.replace("│", " ").split()), words
    assert "tools" not in text
    lines = text.rstrip("\n").split("\n")
    assert {len(line) for line in lines} == {width}


@pytest.mark.parametrize("width", range(40, 120, 7))
def test_no_line_ends_between_a_name_and_its_number(width):
    lines = [line.strip("│ ") for line in plain(drawn(a_status(4), width)).split("\n")]
    names = ("gone", "right", "image", "text", "calls", "rollout", "loss", "update", "searched")
    assert not any(line.endswith(names[1:]) for line in lines)
    assert not any(line.split()[0:1] and line.split()[0][0] in "+-" for line in lines)


def test_the_floor_itself_has_no_change():
    text = plain(drawn(a_status(0)))
    assert "right 0.30" in text
    assert "+" not in text


def test_warnings_come_with_their_fix():
    warning = HealthWarning("no_search", "hardly an episode searches", "merge a search agent")
    text = plain(drawn(a_status(4, warnings=[warning])))
    assert "! hardly an episode searches: merge a search agent" in text


def test_no_color_has_no_colours(monkeypatch):
    assert "\x1b[36m" in drawn(a_status(4), color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    text = drawn(a_status(4), color_system="standard")
    assert not any(f"\x1b[3{colour}m" in text for colour in range(8))


def test_a_name_cannot_steer_the_terminal_or_the_markup():
    status = Status("\x1b[2J[red]x\r\n", 5, 2)
    text = drawn(status)
    assert "\x1b[2J" not in text
    assert "[red]x" in plain(text)


def test_a_terminal_without_unicode_gets_ascii():
    stream = TextIOWrapper(BytesIO(), encoding="ascii")
    text = "\n".join(fit(a_status(4), Console(file=stream, width=70)))
    text.encode("ascii")
    assert "####" in text


@pytest.mark.parametrize("rows", [3, 5, 8, 12, 40])
@pytest.mark.parametrize("width", [40, 60, 120])
def test_a_low_terminal_gets_fewer_rows_and_the_bar_stays(rows, width):
    warning = HealthWarning("no_search", "hardly an episode searches " * 3, "merge " * 10)
    status = a_status(4, warnings=[warning, warning])
    lines = fit(status, Console(file=StringIO(), width=width), rows)
    assert len(lines) <= rows
    assert "step 4/9" in lines[-1]
    assert lines[1].count("━") > 3


def test_an_end_and_a_silence_are_said():
    status = a_status(4, silent_s=70.0)
    assert "no sign of life for 1:10" in drawn(status)
    status.is_over = True
    assert "finished" in drawn(status)
    assert "left" not in drawn(status)


# ---------------------------------------------------------------- pieces


def test_a_sparkline_goes_from_lowest_to_highest():
    # 0, 1, 2 of 8 levels: 0, 3.5 -> 4 (round half to even), 7
    assert sparkline([0, 1, 2], 10) == " ▁▅█"
    assert sparkline([0, 1, 2], 2) == " ▁█"
    assert sparkline([3, 3], 10) == " ▁▁"
    assert sparkline([], 10) == ""


def test_cells_fill_the_bar():
    assert _cells([0.5, 0.3, 0.2], 4) == [2, 1, 1]  # 2, 1.2, 0.8: the largest rest gets the last
    assert sum(_cells([1 / 3] * 3, 20)) == 20
    assert _cells([], 20) == []


def test_durations():
    assert [duration(s).replace(JOINT, " ") for s in (7.4, 754, 11100)] == [
        "0:07", "12:34", "3 h 05 min"
    ]  # fmt: skip

"""The live view on a real pseudo-terminal: what scrolls above stays whole, the rows come back."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from configs.schema import load_config
from tests.train.screen import Screen, Terminal
from train.live import LiveView, live_descriptor
from train.status import Status

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")

PROGRAM = """
import subprocess, sys, time
from train.live import LiveView
from train.status import Status

def line(step, **values):
    return {{"step": step, "phase": "train", "time_s": 2.0 * step, "reward": 0.1 * step, **values}}

view = LiveView(Status("obm-s0", 10, 5), 2)
print("before")
with view:
{body}
print("after")
"""


@pytest.fixture
def on_terminal(tmp_path):
    started = []

    def start(body, **settings):
        path = tmp_path / f"program{len(started)}.py"
        path.write_text(PROGRAM.format(body=textwrap.indent(textwrap.dedent(body), "    ")))
        started.append(Terminal([sys.executable, str(path)], PYTHONPATH=ROOT, **settings))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


ROOT = os.pathsep.join(sys.path[:1] + [str(p) for p in sys.path if p])


def shows(text):
    return lambda screen: any(text in line for line in screen.text())


def everything(screen: Screen) -> list[str]:
    return [line for line in screen.scrolled + screen.text() if line]


def test_what_is_printed_stays_whole_above_and_the_status_at_the_bottom(on_terminal):
    """By print, by a child, by raw writes: nothing of it goes through us."""
    terminal = on_terminal(
        """
        for step in range(1, 41):
            view.take(line(step))
            view.draw()
            print("print", step, flush=True)
            subprocess.run(["sh", "-c", f"echo child {step} >&2"])
        print("now", flush=True)
        time.sleep(60)
        """,
        rows=24,
    )
    screen = terminal.read_until(shows("now"))
    written = [w for step in range(1, 41) for w in (f"print {step}", f"child {step}")]
    above = [line for line in everything(screen) if line.startswith(("print", "child"))]
    assert above == written
    text = screen.text()
    assert "obm-s0" in text[screen.bottom + 1]
    assert "step 40/10" in text[-1]
    assert not any("─" in line for line in text[: screen.bottom + 1])


def test_a_growing_and_a_shrinking_status_leave_nothing_behind(on_terminal):
    terminal = on_terminal(
        """
        from train.health import HealthWarning
        warnings = [HealthWarning("a", "something is wrong", "mend it")] * 4
        for step in range(1, 7):
            print("line", step, flush=True)
            view.take(line(step))
            view.warn(warnings if step % 2 else [])
            view.draw()
        print("now", flush=True)
        time.sleep(60)
        """,
        rows=24,
    )
    screen = terminal.read_until(shows("now"))
    assert [line for line in everything(screen) if line.startswith("line")] == [
        f"line {step}" for step in range(1, 7)
    ]
    text = screen.text()
    assert sum("obm-s0" in line for line in text) == 1
    assert not any("something is wrong" in line for line in text)


def test_the_end_gives_the_rows_back_and_keeps_the_last_status(on_terminal):
    terminal = on_terminal("view.take(line(1))\nview.draw()\nprint('within', flush=True)")
    screen = terminal.read_to_end()
    assert terminal.process.returncode == 0
    assert screen.region == (0, screen.rows - 1)
    text = [line for line in screen.text() if line]
    assert text[:2] == ["before", "within"]
    assert "step 1/10, finished" in text[-2]
    assert text[-1] == "after"


@pytest.mark.parametrize("how", ["exception", "ctrl-c", "kill", "exit"])
def test_however_it_ends_the_terminal_is_clean(on_terminal, how):
    """SIGKILL and os._exit run no code of ours: the guard gives the rows back."""
    body = {
        "exception": "print('within', flush=True); input(); raise ValueError('broken')",
        "exit": "print('within', flush=True); input(); import os; os._exit(3)",
    }.get(how, "print('within', flush=True)\ntime.sleep(60)")
    terminal = on_terminal(body)
    terminal.read_until(lambda screen: shows("within")(screen) and shows("obm-s0")(screen))
    if how == "kill":
        terminal.kill(signal.SIGKILL)
    else:
        terminal.press("\x03" if how == "ctrl-c" else "\n")
    screen = terminal.read_to_end()
    assert terminal.process.returncode != 0
    assert screen.region == (0, screen.rows - 1)
    assert not shows("obm-s0")(screen)
    expected = {"exception": "ValueError: broken", "ctrl-c": "KeyboardInterrupt"}.get(how, "within")
    assert expected in [line for line in screen.text() if line][-1]


def test_a_terminal_that_is_closed_ends_no_training():
    controller, terminal = os.openpty()
    view = LiveView(Status("obm-s0", 10, 5), terminal)
    with view:
        os.close(controller)
    os.close(terminal)
    assert view._console.file.closed


def test_a_low_terminal_is_left_alone(on_terminal):
    terminal = on_terminal("view.take(line(1)); view.draw(); print('within')", rows=8)
    screen = terminal.read_until(shows("within"))
    assert screen.region == (0, 7)


def test_no_color_is_respected(on_terminal):
    body = "view.take(line(1)); view.draw(); print('now', flush=True); time.sleep(60)"
    with_colours = on_terminal(body).read_until(shows("now")).colours
    without = on_terminal(body, NO_COLOR="1").read_until(shows("now")).colours
    assert "36" in with_colours  # the sparkline
    assert without <= {"0", "1", "2", "1;2"}  # bold and dim are no colours


@pytest.mark.parametrize(
    ("variables", "has_view"),
    [({}, True), ({"TERM": "dumb"}, False), ({"TERM": ""}, False)],
)
def test_only_a_terminal_that_can_gets_a_view(variables, has_view):
    program = "from train.terminal import is_terminal; print(is_terminal(2))"
    terminal = Terminal([sys.executable, "-c", program], PYTHONPATH=ROOT, **variables)
    try:
        assert terminal.read_to_end().text()[0] == str(has_view)
    finally:
        terminal.close()


def test_other_ranks_a_pipe_and_the_setting_switch_it_off(tmp_path, monkeypatch):
    path = tmp_path / "c.yaml"
    path.write_text("output: x\n")
    monkeypatch.setattr("train.live.is_terminal", lambda descriptor: True)
    monkeypatch.setattr("sys.stderr", open(os.devnull, "w"))  # noqa: SIM115
    config = load_config(path)
    assert live_descriptor(config, is_main=True) is not None
    assert live_descriptor(config, is_main=False) is None
    assert live_descriptor(load_config(path, ["tracking.live=off"]), is_main=True) is None
    monkeypatch.undo()
    assert live_descriptor(config, is_main=True) is None  # pytest's own capture is no terminal


# ---------------------------------------------------------------- a real training

SETTINGS = """
output: {output}
models: {{init: {init}}}
environment: {{train_size: 16, eval_size: 6, kinds: [text], eval_kinds: [text]}}
grpo:
  per_device_train_batch_size: 8
  num_generations: 4
  max_completion_length: 60
  generation_kwargs: {{max_new_tokens: 12}}
  max_steps: 4
  save_strategy: "no"
compare: {{eval_every: 2}}
tracking: {{wandb: disabled}}
"""
TRAIN = "import sys; from train.run import train; sys.exit(train(sys.argv[1:]))"


@pytest.fixture
def training(tiny_checkpoints, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(SETTINGS.format(output=tmp_path / "run", init=tiny_checkpoints["vlm"]))
    return [sys.executable, "-c", TRAIN, "--config", str(path)]


@pytest.mark.slow
def test_a_training_on_a_terminal_and_what_watch_says_of_it(training, tmp_path):
    terminal = Terminal(training, PYTHONPATH=ROOT)
    try:
        screen = terminal.read_to_end(240)
    finally:
        terminal.close()
    lines = everything(screen)
    assert terminal.process.returncode == 0, lines
    for step in (0, 2, 4):
        assert sum(line.startswith(f"evaluation at step {step}") for line in lines) == 1
    assert any(line.startswith("health at step 3: no group has signal") for line in lines)
    assert not any(line.startswith("step ") for line in lines)
    assert "step 4/4, finished" in screen.text()[max(i for i, t in enumerate(screen.text()) if t)]
    assert screen.region == (0, screen.rows - 1)
    watch = [sys.executable, "-m", "launch.cli", "watch", str(tmp_path / "run"), "--once"]
    shown = subprocess.run(
        watch, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ROOT}, check=True
    ).stdout
    assert "step 4/4, finished" in shown
    assert "no group has signal" in " ".join(shown.split())  # as the training itself said
    assert "\x1b" not in shown


def test_watch_follows_a_run_that_goes_on_and_ends_with_q(tmp_path):
    """Read as it is written: a line cut short, a resumed run that begins anew at step 1."""
    metrics = tmp_path / "metrics.jsonl"
    (tmp_path / "config.yaml").write_text("output: x\nmodels: {init: runs/a/obm}\nseed: 3\n")
    line = '{"step": %d, "phase": "train", "time_s": %d, "reward": 0.5}\n'
    metrics.write_text(line % (1, 5) + line % (2, 10))
    command = [sys.executable, "-m", "launch.cli", "watch", str(tmp_path)]
    terminal = Terminal(command, PYTHONPATH=ROOT, columns=70)
    try:
        screen = terminal.read_until(shows("step 2/40"))
        assert "obm-s3" in screen.text()[0]
        with metrics.open("a") as file:
            file.write(line % (3, 15) + line[:9])
        terminal.read_until(shows("step 3/40"))
        metrics.write_text(line % (1, 5))
        terminal.read_until(shows("step 1/40"))
        terminal.press("q")
        terminal.read_to_end()
        assert terminal.process.returncode == 0
    finally:
        terminal.close()


def test_watch_refuses_what_is_no_run(tmp_path):
    command = [sys.executable, "-m", "launch.cli", "watch", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": ROOT}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert "holds no config.yaml; name the folder of a training run" in ended.stderr

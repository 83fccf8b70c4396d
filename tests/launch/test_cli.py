"""The console script: quick help, true examples, one clear line for a mistake."""

import importlib
import os
import resource
import shlex
import subprocess
import sys
from importlib import metadata

import pytest

from launch.cli import VERBS, build_parser, main

HELP_BUDGET_S = 0.5


def run_obm(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "launch.cli"]), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_answers_at_once(verb):
    arguments = [verb, "--help"] if verb else ["--help"]

    def measure():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        answer = run_obm(*arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return answer, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The faster of two: processor time, too, grows while other work shares the caches.
    (answer, seconds), (_, again) = measure(), measure()
    assert answer.returncode == 0
    assert "examples:" in answer.stdout
    assert min(seconds, again) < HELP_BUDGET_S


def test_no_help_imports_torch():
    code = (
        "import contextlib, io, sys\n"
        "from launch.cli import VERBS, main\n"
        "for verb in VERBS:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "        main([verb, '--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets', 'deepspeed', 'wandb'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert run_obm(code=code).stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_two_examples_that_its_parser_takes(verb):
    module = importlib.import_module(f"launch.commands.{verb}")
    parser = build_parser(verb, module)
    assert len(module.EXAMPLES) >= 2
    for example in module.EXAMPLES:
        program, example_verb, *arguments = shlex.split(example)
        assert (program, example_verb) == ("obm", verb)
        options = parser.parse_intermixed_args(arguments)
        assert options.debug is False
        words = getattr(options, "overrides", [])
        assert words[:1] in (["verify"], ["adapter"]) or all("=" in word for word in words)


def test_overrides_may_stand_anywhere(obm):
    code, out, _ = obm("train", "seed=1", "--dry-run", "grpo.max_steps=7", "output=runs/x")
    assert code == 0
    assert "max_steps: 7" in out
    assert "seed: 1" in out


def test_no_verb_prints_the_verbs_and_fails(obm):
    code, out, _ = obm()
    assert code == 2
    assert all(verb in out for verb in VERBS)


def test_version_is_that_of_the_distribution(obm):
    assert obm("--version") == (0, f"obm-warmstart {metadata.version('obm-warmstart')}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mergee"], "did you mean 'merge'?"),
        (["train", "--dry-run", "seed"], "neither an option nor key=value"),
        (["train", "--dry-run", "environment.strenth=1"], "environment.strenth: unknown key"),
        (["train", "--dry-run", "environment.strength=9"], "environment.strength"),
        (["train", "--dry-run", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--dry-run", "--config", "demoo"], "did you mean 'demo'?"),
        (["train", "--dry-run", "grpo.num_generations=7"], "groups of 7"),
        (["train", "--dry-run", "grpo.max_steps=-1"], "grpo.max_steps: -1 is out of range"),
        (["train", "--dry-run", "environment.retrieval=no"], "environment.retrieval: 'no' is no"),
        (["train", "--dry-run", "deepspeed=no.json"], "deepspeed: no file 'no.json'"),
        (["train", "--dry-run", "--num-processes", "0"], "--num-processes: 0 is out of range"),
        (["train", "--dry-run", "--num-processes=-3"], "--num-processes: -3 is out of range"),
        (["train", "--num-processes", "0", "output=x"], "use a number from 1 to 65536"),
        (["train", "--dry-run", "--num-processes", "65537"], "--num-processes: 65537 is out of"),
        (["train", "--dry-run", "--prompt-tokens=-5"], "--prompt-tokens: -5 is out of range"),
        (["train", "--dry-run", "--prompt-tokens", "0"], "--prompt-tokens: 0 is out of range"),
        (["train", "--dry-run", "--server-gpus=-1"], "--server-gpus: -1 is out of range"),
        (["train", "--dry-run", "--machine", f"h100x{10**19}"], "too many accelerators"),
        (["merge", "models.base=runs/not_there"], "runs/not_there"),
        (["merge", "models.base=null"], "models.base is not set"),
        (["eval", "runs/not_there"], "runs/not_there"),
        (["init", "nothing"], "no shipped configuration 'nothing'"),
        (["study", "nothing"], "no shipped study 'nothing'"),
        (["compare", "runs/not_there"], "runs/not_there"),
        (["atlas", "build", "--only", "vlm,dog"], "choose among base, agent, vlm"),
        (["atlas", "build", "--only", "vlm", "--output", "runs/not_there"], "base is missing"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(obm, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = obm(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not list(tmp_path.rglob("*.safetensors")), "something half written"


def test_a_strangers_name_in_an_error_cannot_steer_the_terminal(obm, tmp_path):
    (tmp_path / "bad.yaml").write_text('"gr\\e]0;x\\ap\\u200Bo": 1\n')
    code, _, err = obm("train", "--dry-run", "--config", tmp_path / "bad.yaml")
    assert code == 2
    assert r"gr\x1b]0;x\x07p\u200bo: unknown" in err
    assert err.rstrip("\n").isprintable()


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="unknown key"):
        main(["train", "--dry-run", "--debug", "environment.strenth=1"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    module = importlib.import_module("launch.commands.doctor")
    monkeypatch.setattr(module, "run", lambda options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_init_lists_the_shipped_configurations(obm):
    code, out, _ = obm("init")
    assert code == 0
    assert out.startswith("demo ")


def test_init_copies_a_configuration_that_loads(obm, tmp_path):
    from configs.schema import load_config, shipped_config

    target = tmp_path / "mine.yaml"
    assert obm("init", "demo", "--output", target)[0] == 0
    assert load_config(target) == load_config(shipped_config("demo"))
    code, _, err = obm("init", "demo", "--output", target)
    assert code == 2
    assert "--overwrite" in err
    assert obm("init", "demo", "--output", target, "--overwrite")[0] == 0


def test_an_option_with_an_equals_sign_knows_the_home_folder(obm, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert obm("init", "demo", "--output=~/mine.yaml")[:2] == (0, f"wrote {tmp_path}/mine.yaml\n")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_copied_configuration_brings_what_it_inherits_from(tmp_path):
    from launch.commands.init import _files

    (tmp_path / "below.yaml").write_text("seed: 3\n")
    (tmp_path / "above.yaml").write_text("# A pair.\ninherits: below.yaml\nseed: 4\n")
    files = _files(tmp_path / "above.yaml", tmp_path / "copy" / "mine.yaml")
    assert {path.name: text for path, text in files.items()} == {
        "mine.yaml": "# A pair.\ninherits: below.yaml\nseed: 4\n",
        "below.yaml": "seed: 3\n",
    }


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file/x.yaml", "cannot be written"),
        ("/proc/x", "cannot be written"),
        ("/proc/x/y.yaml", "cannot be written"),
        ("folder", "is a folder; name a file in it as --output"),
        ("x" * 300, "File name too long"),
        ("x" * 252, "File name too long"),  # the temporary name has five more
    ],
)
def test_init_writes_nothing_where_no_file_can_be(obm, tmp_path, monkeypatch, output, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    code, out, err = obm("init", "maps", "--output", output, "--overwrite")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert reason in err
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "folder"]


def test_init_writes_all_files_or_none(obm, tmp_path):
    (tmp_path / "demo.yaml").write_text("seed: 3\n")
    code, out, err = obm("init", "maps", "--output", tmp_path / "mine.yaml")
    assert (code, out) == (2, "")
    assert f"{tmp_path / 'demo.yaml'} exists; pass --overwrite" in err
    assert not (tmp_path / "mine.yaml").exists()


def test_init_does_not_write_what_is_inherited_over_what_was_asked_for(obm, tmp_path):
    code, out, err = obm("init", "maps", "--output", tmp_path / "demo.yaml")
    assert (code, out) == (2, "")
    assert "maps inherits from demo.yaml" in err
    assert "give --output another name" in err
    assert not list(tmp_path.iterdir())


def test_train_becomes_the_launcher(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    main(["train", "seed=1", "--resume", "--num-processes", "2"])
    ((program, command, environment),) = started
    assert program.endswith("deepspeed")
    assert command[1:3] == ["--num_gpus", "2"]
    config = command[command.index("--config") + 1]
    assert config.endswith("demo.yaml")
    assert command[-2:] == ["seed=1", "--resume"]
    assert environment["PYTHONSAFEPATH"] == "1"


def test_compare_prints_the_table_and_keeps_the_command(obm, tmp_path, write_scripted_run):
    import json

    import yaml

    from configs.schema import dump_config, load_config, shipped_config

    folders = []
    for arm in ("vlm", "obm"):
        config = load_config(shipped_config("demo"), [f"output={tmp_path / arm}"])
        config.tracking.arm = arm
        (tmp_path / f"{arm}.yaml").write_text(dump_config(config))
        assert yaml.safe_load((tmp_path / f"{arm}.yaml").read_text())
        write_scripted_run(tmp_path / f"{arm}.yaml")
        folders.append(tmp_path / arm)
    code, out, _ = obm("compare", *folders, "--output", tmp_path / "report", "--smoothing", "1")
    assert code == 0
    assert out.splitlines()[0].startswith("arm")
    report = json.loads((tmp_path / "report" / "compare.json").read_text())
    # obm starts at .2 and gains .1 an evaluation; the plain VLM's ceiling is .3: step 5
    assert report["arms"]["obm"]["steps_to_target"] == 5
    assert report["command"].startswith("obm compare ")


def test_doctor_names_versions_and_what_is_missing(obm, tmp_path):
    code, out, _ = obm("doctor", "--output", tmp_path)
    for word in ("torch", "transformers", "cores", "memory", "disk", "devices", "W&B", "missing:"):
        assert word in out
    assert code == (0 if out.rstrip().endswith("missing: nothing") else 1)


def test_doctor_misses_a_c_compiler_only_where_there_is_a_gpu(monkeypatch):
    from launch.commands import doctor

    monkeypatch.setattr("train.libraries.c_compiler", lambda: None)
    missing = []
    for has_gpu in (False, True):
        monkeypatch.setattr("torch.cuda.is_available", lambda has_gpu=has_gpu: has_gpu)
        assert doctor._compiler(missing) == "not found; needed on a GPU alone"
        assert len(missing) == has_gpu


@pytest.mark.parametrize(
    ("output", "reason"), [("x" * 300, "File name too long"), ("file/runs", "is a file")]
)
def test_doctor_refuses_a_folder_that_cannot_be(obm, tmp_path, output, reason):
    (tmp_path / "file").touch()
    code, out, err = obm("doctor", "--output", tmp_path / output)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: --output {tmp_path / output}: ")
    assert reason in err

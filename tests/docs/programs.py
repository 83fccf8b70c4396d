"""Checks of one command without running it: the program's own parser, and the settings in it."""

from __future__ import annotations

import argparse
import importlib
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from configs.schema import Config, load_config
from launch.arguments import config_path
from launch.cli import VERBS, build_parser
from tests.docs.blocks import ROOT, Command

STANDS_FOR = {"my.yaml": "demo", "my_first.yaml": "demo", "FILE": "demo"}
"""Names of settings files that a reader makes -> the shipped file that is taken in their place."""


class UncheckedError(AssertionError):
    """Nobody knows how to check this command."""


def check(command: Command) -> None:
    """Raises where the command could not be started as it stands."""
    program, *arguments = command.words
    program = program.removeprefix(".venv/bin/")
    if program not in PROGRAMS:
        raise UncheckedError(
            f"{command}: no check for '{program}'; add one to tests/docs/programs.py, or the "
            "command to a table of tests/docs/test_commands.py"
        )
    PROGRAMS[program](arguments)


# ---------------------------------------------------------------- obm


def parse_obm(arguments: Sequence[str]) -> argparse.Namespace:
    verb, *rest = arguments
    assert verb in VERBS, f"there is no verb {verb}"
    parser = build_parser(verb, importlib.import_module(f"launch.commands.{verb}"))

    def complain(message: str) -> None:
        raise AssertionError(f"obm {verb}: {message}")

    parser.error = complain  # type: ignore[assignment,method-assign]
    return parser.parse_intermixed_args(rest)


def check_obm(arguments: Sequence[str]) -> None:
    options = parse_obm(arguments)
    overrides = list(getattr(options, "overrides", []))
    if overrides[:1] in (["verify"], ["adapter"]):
        return
    module = importlib.import_module(f"launch.commands.{arguments[0]}")
    if overrides and overrides[0] in getattr(module, "SUB_VERBS", ()):
        overrides = overrides[1:]
    if hasattr(options, "config"):
        config = settings(options.config, overrides)
        if arguments[0] == "train":
            check_step(config, options.num_processes)
    elif arguments[0] in ("study", "demo"):
        from launch.studies.file import Options, load_study
        from launch.studies.run import describe_study

        name = getattr(options, "study", "demo")
        if name != "my_study.yaml":  # the reader's own
            study = load_study(name)
            if study.trained is None:  # else it wants trainings that are not here
                describe_study(study, Options("obm study", overrides))
    if arguments[0] == "tune":
        assert Path(ROOT, options.grid).is_file(), options.grid


def settings(name: str | None, overrides: Sequence[str]) -> Config:
    name = STANDS_FOR.get(name or "demo", name or "demo")
    path = Path(ROOT, name) if name.startswith("configs/") else config_path(name)
    return load_config(path, overrides)


def check_step(config: Config, n_processes: int) -> None:
    from train.settings import describe_step

    describe_step(config, n_processes)


# ---------------------------------------------------------------- launchers


def check_training(arguments: Sequence[str], n_processes: int = 1) -> None:
    """Arguments of launch/train.sh; the settings have to make whole groups."""
    from train import run

    options = run._parse(list(arguments))
    config = settings(options.config, options.overrides)
    if n_processes > 0 and not options.resume:
        check_step(config, n_processes)


def check_deepspeed(arguments: Sequence[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    options = parse_args(list(arguments))
    assert options.user_script == "launch/train.sh"
    if options.hostfile.startswith("launch/"):
        assert Path(ROOT, options.hostfile).is_file()
    check_training(options.user_args, options.num_gpus)


def check_torchrun(arguments: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args(list(arguments))
    assert (options.module, options.training_script) == (True, "launch.cli")
    check_obm(options.training_script_args)


def check_script(arguments: Sequence[str]) -> None:
    """`bash FILE ...`, `sbatch [options] FILE ...`."""
    place = next(i for i, word in enumerate(arguments) if word.endswith(".sh"))
    script, rest = arguments[place], arguments[place + 1 :]
    assert Path(ROOT, script).is_file(), script
    if Path(script).name in ("train.sh", "slurm.sh"):
        check_training(rest, 0)


# ---------------------------------------------------------------- the rest


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in arguments:
        if "=" in target:
            assert re.search(rf"^{target.partition('=')[0]} \?=", makefile, re.M), target
        else:
            assert re.search(rf"^{target}:", makefile, re.M), f"there is no make {target}"


def check_python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-c":
        compile(arguments[1], "docs", "exec")
    elif arguments[0] == "-m":
        importlib.import_module(arguments[1])
        for word in arguments[2:]:
            if word.startswith(("tests/", "docs/")):
                assert Path(ROOT, word).exists(), word
    else:
        raise AssertionError(f"python {arguments[0]}: name the file in a block of the page")


def check_pip(arguments: Sequence[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name in arguments[1:]:
        match = re.fullmatch(r"obm-warmstart\[(\w+)\]", name)
        assert match, f"pip install {name}: not of this project"
        assert match[1] in extras, f"there is no extra {match[1]}"


def check_ruff(arguments: Sequence[str]) -> None:
    assert arguments[0] in ("check", "format")


def check_timeout(arguments: Sequence[str]) -> None:
    """`timeout --signal=KILL SECONDS COMMAND ...`"""
    assert arguments[0] == "--signal=KILL"
    assert float(arguments[1]) > 0
    check(Command("timeout", 0, " ".join(arguments[2:]), tuple(arguments[2:])))


def check_docker(arguments: Sequence[str]) -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    for argument in re.findall(r"--build-arg (\w+)=", " ".join(arguments)):
        assert re.search(rf"^ARG {argument}\b", recipe, re.M), f"no build argument {argument}"
    assert arguments[0] in ("build", "run")


def check_cd(arguments: Sequence[str]) -> None:
    assert arguments == ["obm-warmstart"], "the checkout has this name in all documents"


def check_source(arguments: Sequence[str]) -> None:
    assert arguments == [".venv/bin/activate"]


def check_export(arguments: Sequence[str]) -> None:
    """Variables that something in the code reads."""
    for argument in arguments:
        name = argument.partition("=")[0]
        places = [ROOT / "environments", ROOT / "launch", ROOT / "rewards"]
        texts = (path.read_text() for folder in places for path in folder.rglob("*.py"))
        assert any(f'"{name}"' in text for text in texts), f"nothing reads {name}"


def check_clone(arguments: Sequence[str]) -> None:
    assert arguments[0] == "clone"
    assert arguments[-1] == "obm-warmstart"


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "obm": check_obm,
    "deepspeed": check_deepspeed,
    "torchrun": check_torchrun,
    "bash": check_script,
    "sh": check_script,
    "sbatch": check_script,
    "make": check_make,
    "python": check_python,
    "pip": check_pip,
    "ruff": check_ruff,
    "docker": check_docker,
    "timeout": check_timeout,
    "cd": check_cd,
    "source": check_source,
    "export": check_export,
    "git": check_clone,
}

"""Every command of the documents: run in a scratch folder, or held against its own parser.

A command that no check knows fails, and so does an entry of the tables below that no page has.
"""

import pytest

from tests.docs.blocks import Command, all_commands, blocks, inline_code, pages, prose, reports
from tests.docs.programs import VERBS, check, parse_obm
from tests.docs.walker import Walker

WALKED = {
    "docs/quickstart.md": [
        # checked only: what takes minutes
        "obm study ceiling #", "obm study ablation", "obm study transfer",
        # an untrained policy has no right episode to prefer; tests/train has those of these stages
        "obm sport --config my.yaml models.init=runs/merged/obm output=runs/sport #", "obm sft",
        "deepspeed launch/train.sh --config my.yaml models.init=runs/sport/policy",
    ],
    "docs/recipes.md": [
        "make install", "source .venv", "obm calibrate --config qwen2.5-vl-7b",
        "obm merge --config qwen2.5-vl-7b", "obm merge verify runs/qwen2.5-vl-7b",
        "torchrun", "deepspeed --num_gpus 8", "obm compare runs/qwen2.5-vl-7b",
        # run by test_stranger.py
        "obm calibrate --config all.yaml", "obm merge --config all.yaml",
        "obm merge verify runs/all-merged", "obm eval runs/all-merged",
        "obm train --config all.yaml", "obm compare runs/all ", "obm view runs/all ",
    ],
}  # fmt: skip
"""Pages that are run from top to bottom -> beginnings of commands that are checked only."""

LAUNCHED = ["deepspeed --num_gpus 2 launch/train.sh --config my.yaml deepspeed=zero3"]
"""Trainings of those pages that go through the launcher, two processes; others run in process."""

ELSEWHERE = {
    "python3 -m venv vllm-venv": "vLLM's own environment; tests/train/test_vllm.py makes one",
    "VLLM_SERVER_DEV_MODE=1": "a vLLM server; tests/train/vllm_server starts it with these options",
}
"""Commands of programs that are not installed here -> who tests them."""

DRY = ["obm train --config qwen2.5-vl-7b --dry-run"]
"""Dry runs outside of those pages that are run as they are."""


def elsewhere(command):
    return any(command.text.startswith(prefix) for prefix in ELSEWHERE)


@pytest.mark.parametrize("page", [page for page in pages() if page not in WALKED])
def test_every_command_could_be_started(page):
    for command in all_commands([page]):
        if not elsewhere(command):
            check(command)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", WALKED)
def test_a_page_is_walked_from_top_to_bottom(page, trio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    walker = Walker(tmp_path, trio, LAUNCHED)
    try:
        met = walker.walk(page, WALKED[page])
    finally:
        walker.close()
    assert met == set(WALKED[page]), "the table has commands that the page has not"


def test_a_command_that_crashes_fails_its_page(tmp_path, monkeypatch):
    def crash(words):
        raise FileNotFoundError(words[-1])

    monkeypatch.setattr("tests.docs.walker.main", crash)
    text = "obm merge verify runs/merged/obm"
    with pytest.raises(FileNotFoundError, match="runs/merged/obm"):
        Walker(tmp_path, {}).run(Command("page.md", 1, text, tuple(text.split())))


def test_dry_runs_print_their_plan(obm):
    met = set()
    for command in all_commands(pages()):
        if command.page not in WALKED and any(command.text.startswith(p) for p in DRY):
            met.update(p for p in DRY if command.text.startswith(p))
            code, out, _ = obm(*command.words[1:])
            assert code == 0
            assert "expected on" in out
    assert met == set(DRY)


def test_the_tables_hold_no_stale_entry():
    commands = all_commands(pages())
    for prefix in (*ELSEWHERE, *LAUNCHED):
        assert any(command.text.startswith(prefix) for command in commands), prefix
    assert all(page in pages() for page in WALKED)


def test_what_stands_in_a_plain_block_is_no_command():
    """Otherwise a command could escape by leaving out the language."""
    for page in pages():
        for block in blocks(page):
            if block.language in ("", "text"):
                for line in block.text.splitlines():
                    words = line.split()
                    assert words[:1] not in (["obm"], ["deepspeed"], ["make"], ["torchrun"]), (
                        f"{block}: mark the block as bash: {line}"
                    )


@pytest.mark.parametrize("page", pages())
def test_commands_within_a_sentence_name_verbs_and_options_that_exist(page):
    for text in inline_code(page):
        if text.startswith("obm ") and text.split()[1] not in ("VERB", "--help", "--version"):
            check_words(page, text)


@pytest.mark.parametrize("page", reports())
def test_how_a_report_was_made_can_be_done_again(page):
    """Verbs, studies and options still exist; a report of a past study says so."""
    if "history: " in prose(page):
        return
    found = [
        line
        for block in blocks(page)
        for line in block.text.splitlines()
        if line.startswith(("obm ", "make ", "deepspeed "))
    ]
    found += [text for text in inline_code(page) if text.startswith(("obm ", "make "))]
    assert found, f"{page} does not say how it was made"
    for text in found:
        check_words(page, text)


def check_words(page, text):
    """The verb and every option exist, and what a study names does, too."""
    program, verb, *rest = text.split()
    if program == "make":
        from tests.docs.programs import check_make

        check_make([verb])
        return
    assert verb in VERBS, f"{page}: `{text}`: there is no verb {verb}"
    words = [word for word in rest if word not in ("...", "[...]")]
    if verb == "study" and words and words[0].islower():
        from launch.studies.file import load_study

        load_study(words[0])
    options = [word for word in words if word.startswith("--")]
    known = " ".join(help_of(verb).split())
    for option in options:
        name = option.partition("=")[0]
        assert f"{name} " in known or f"{name}," in known or f"{name}]" in known, (
            f"{page}: `{text}`: obm {verb} has no {name}"
        )


def help_of(verb):
    import importlib

    from launch.cli import build_parser

    parser = build_parser(verb, importlib.import_module(f"launch.commands.{verb}"))
    actions = list(parser._actions)
    for action in parser._actions:  # verbs of a verb
        if isinstance(getattr(action, "choices", None), dict):
            actions += [inner for sub in action.choices.values() for inner in sub._actions]
    return " ".join(f"{name} " for action in actions for name in action.option_strings)


def test_a_wrong_option_is_found():
    """The checks above can fail."""
    with pytest.raises(AssertionError, match="unrecognized arguments"):
        parse_obm(["merge", "--densty", "0.3"])
    with pytest.raises(AssertionError, match="obm merge has no --densty"):
        check_words("page", "obm merge --densty 0.3")
    with pytest.raises(AssertionError, match="there is no verb"):
        check_words("page", "obm mergee")

"""Damaged and hostile files: each is refused by one line with file, reason and fix.

Nothing may be written for it, no traceback shown, no pickle opened. Cases whose file is sound but
hostile in its words must be taken as data: questions are asked, and their episodes put on a page.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.drill_cases import CASES, HOSTILE_WORDS, Case
from launch.drill_damage import Place, train_from
from launch.drill_process import Ended, Row, Running, listing, obm, run_sound

CASE_LIMIT_S = 300.0
"""A server that takes a spoiled index would serve for ever."""


def prepare_files(base: Path, *, with_training: bool = True) -> None:
    """A training and a search index that cases copy; made once."""
    if with_training and not (base / "run").exists():
        command = train_from(base / "start", base / "run", "grpo.max_steps=1")
        run_sound(command, base / "logs" / "run.log")
    if not (base / "index").exists():
        corpus = base / "corpus.jsonl"
        rows = [{"id": str(n), "title": f"Place {n}", "text": f"Its river is the river {n}."}
                for n in range(200)]  # fmt: skip
        corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        command = obm("index", "bm25", corpus, "--output", base / "index")
        run_sound(command, base / "logs" / "index.log")


def drill_files(base: Path, folder: Path, seed: str, cases: Sequence[Case] = CASES) -> list[Row]:
    """Every case, two at a time."""
    with ThreadPoolExecutor(2) as executor:
        return list(executor.map(lambda case: run_case(case, base, folder, seed), cases))


def run_case(case: Case, base: Path, folder: Path, seed: str) -> Row:
    """Runs one case as often as it says, each time on fresh copies."""
    started, problems, shown = time.monotonic(), [], ""
    for number in range(case.times):
        name = "".join(letter if letter.isalnum() else "-" for letter in case.name)
        place = Place(folder / f"{name}-{number}", base, random.Random(f"{seed} {name} {number}"))
        place.folder.mkdir(parents=True)
        command = case.make(place)
        before = listing(place.output)
        ended = Running(command, place.folder / "log").wait(CASE_LIMIT_S)
        if case.is_seen_later and ended.code == 0:
            shutil.rmtree(place.folder / "merged", ignore_errors=True)
            place.output.rename(place.folder / "merged")
            ended = Running(place.evaluate("merged"), place.folder / "log").wait(CASE_LIMIT_S)
        problems += check_case(case, place, ended)
        if case.is_data and ended.code == 0:
            view = obm("view", place.output)
            ended = Running(view, place.folder / "log").wait(CASE_LIMIT_S)
            problems += check_case(case, place, ended) or check_shown(place)
        elif [entry[:2] for entry in listing(place.output)] != [entry[:2] for entry in before]:
            problems.append("something was written")
        shown = shown or " ".join(ended.errors).removeprefix("error: ")
    shown = shown.replace(str(folder.absolute()), "").replace(str(base.absolute()), "")
    happened = "taken as data" if case.is_data else f"refused: {_short(shown)}"
    return Row("files", case.name, "damage" if not case.is_data else "words", case.times,
               happened, time.monotonic() - started, problems)  # fmt: skip


def check_case(case: Case, place: Place, ended: Ended) -> list[str]:
    """What is wrong with how a command took its file."""
    found = [] if not place.canary.exists() else ["code from the file was run"]
    if ended.was_killed:
        return [*found, f"it hangs, {ended.seconds:.0f} s"]
    if not case.is_data:
        return [*found, *ended.complaints(*case.words)]
    if ended.code:
        found.append(f"refused with {ended.code}: {' '.join(ended.errors)[:200]}")
    if "\x1b" in ended.output:
        found.append("its control characters reach the terminal")
    return found


def check_shown(place: Place) -> list[str]:
    """What is wrong with the record of questions with hostile words, and with its page."""
    words = HOSTILE_WORDS.replace("CANARY", str(place.canary))
    lines = (place.output / "trajectories.jsonl").read_text(encoding="utf-8").splitlines()
    episodes = [json.loads(line) for line in lines]
    found = []
    if [episode["gold"]["answers"] for episode in episodes] != [[words]] * 2:
        found.append("the record does not have its words")
    if any("<answer> owned" in e["prompt"] or "\x1b" in e["prompt"] for e in episodes):
        found.append("its tags reach the prompt")
    page = (place.output / "view.html").read_text(encoding="utf-8")
    if "<script>alert" in page or "\x1b" in page:
        found.append("its words are code on the page")
    return found


def _short(text: str, n: int = 150) -> str:
    return text if len(text) <= n else f"{text[:n].rsplit(' ', 1)[0]} ..."

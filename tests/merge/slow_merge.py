"""Merges as a process of its own, slowly, so that a test can end it at any moment.

    python tests/merge/slow_merge.py '{"merge": {...}, "pause_s": 0.01}'
    python tests/merge/slow_merge.py '{"merge": {...}, "pause_s": 0.01, "kills": 10, "seed": 0}'

The second form starts the merge again and again, each time in a process of its own, and ends each
by SIGKILL at a random moment, every other one while it writes, until it has killed as often as
told; then it lets the merge finish, and prints for each kill how many tensors were finished then.
"""

import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from merge import engine, journal, output, shards


def slow_down(pause_s: float) -> None:
    """Puts a pause before everything that a merge does to its output."""
    for place, name in (
        (shards.ShardWriter, "write"),
        (journal.Journal, "add"),
        (output, "write_index"),
        (engine, "copy_companions"),
        (engine, "render_card"),
        (engine, "move_into_place"),
    ):
        plain = getattr(place, name)

        def slow(*arguments, _plain=plain):
            time.sleep(pause_s)
            return _plain(*arguments)

        setattr(place, name, slow)


def count_finished(part: Path) -> int:
    """Whole lines of the journal, less the first."""
    path = part / journal.JOURNAL_NAME
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def start(settings: dict) -> int:
    child = os.fork()
    if child == 0:
        engine.merge(**settings["merge"])
        os._exit(0)
    return child


def kill_repeatedly(settings: dict) -> list[int]:
    """Returns for each kill how many tensors the journal had then."""
    generator = random.Random(settings["seed"])
    place = Path(settings["merge"]["output"])
    part = place.with_name(f".{place.name}.part")
    begin = time.monotonic()
    child = start(settings)
    while not (part / journal.JOURNAL_NAME).exists() and not place.exists():
        time.sleep(0.001)
    starting_s = time.monotonic() - begin
    os.waitpid(child, 0)
    writing_s = time.monotonic() - begin - starting_s
    finished: list[int] = []
    while len(finished) < settings["kills"]:
        if place.exists():
            shutil.rmtree(place)  # from the beginning again
        child = start(settings)
        is_writing = len(finished) % 2 == 1
        after, longest_s = (starting_s, 0.4 * writing_s) if is_writing else (0.0, starting_s)
        time.sleep(after + generator.uniform(0, longest_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            finished.append(count_finished(part))
    return finished


if __name__ == "__main__":
    # a shell that starts tests in the background has their processes ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = json.loads(sys.argv[1])
    slow_down(settings["pause_s"])
    finished = kill_repeatedly(settings) if "kills" in settings else []
    if not Path(settings["merge"]["output"]).exists():
        engine.merge(**settings["merge"])
    print(json.dumps(finished))

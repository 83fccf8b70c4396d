"""The search server: killed under a client's hands, and behind a network with bad days."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from launch.drill_process import LIMIT_S, Ended, Row, Running, obm
from launch.drill_proxy import Proxy, wait_for_port
from launch.drill_tasks import TRAINING
from train.settings import free_port

QUERIES = (
    "capital of France", "which river flows through Vienna", "flag with a cedar",
    "highest mountain", "currency of Japan", "which island lies in the Indian Ocean",
    "official language of Brazil",
)  # fmt: skip
TOP_K = 3
ASK_S = 1.0
N_BAD = 12
STALL_S = 4.0
BEHIND_PROXY = (
    "environment.timeout_s=3.0", "environment.retries=0", "tracking.log_trajectories=16",
)  # fmt: skip


@contextmanager
def serving(port: int, log: Path) -> Iterator[Running]:
    """`obm serve` of the atlas's passages.

    Raises:
        RuntimeError: it does not come up.
    """
    running = Running(obm("serve", "--images", "none", "--port", str(port)), log)
    try:
        if not wait_for_port(port, LIMIT_S):
            raise RuntimeError(f"obm serve does not come up: {running.wait(1.0).output[-500:]}")
        yield running
    finally:
        running.kill()


class Client:
    """Asks all the time, and holds every answer against the known ones.

    Args:
        url: of the server.
        known: query -> (id, score) of its hits.
    """

    def __init__(self, url: str, known: dict[str, Any]) -> None:
        self._url, self._known = url, known
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_over.set()
        self._thread.join(5 * ASK_S)
        if self._thread.is_alive():
            self.problems.append("the client hangs")

    def _ask(self) -> None:
        from environments.remote import RemoteTextIndex, SearchServer, SearchServerError

        index = RemoteTextIndex(SearchServer(self._url, timeout_s=ASK_S, retries=0))
        while not self._is_over.is_set():
            for query, right in self._known.items():
                started = time.monotonic()
                try:
                    found = hits_of(index, query)
                except SearchServerError as error:
                    self.counts["clear error"] += 1
                    if len(str(error).splitlines()) != 1:
                        self.problems.append(f"an error of several lines: {error}")
                    time.sleep(0.02)
                    continue
                # anything else is what a policy must never see
                except Exception as error:
                    self.problems.append(f"{type(error).__name__}: {error}")
                    return
                self.counts["right" if found == right else "wrong"] += 1
                if time.monotonic() - started > 3 * ASK_S:
                    self.problems.append(f"an answer took {time.monotonic() - started:.1f} s")


def hits_of(index: Any, query: str) -> list[tuple[str, float]]:
    """Ids and scores of a query's hits."""
    [hits] = index.search([query], TOP_K)
    return [(hit.id, round(hit.score, 6)) for hit in hits]


def drill_serve(folder: Path, dice: random.Random, n_kills: int) -> Row:
    """Kills the server while a client asks; started again it answers as before."""
    from environments.remote import RemoteTextIndex, SearchServer

    started, port, problems = time.monotonic(), free_port(), []
    url = f"http://127.0.0.1:{port}"
    index = RemoteTextIndex(SearchServer(url, timeout_s=10 * ASK_S, retries=3))
    with serving(port, folder / "whole.log"):
        known = {query: hits_of(index, query) for query in QUERIES}
    problems += [f"no hit for {query!r}" for query, hits in known.items() if not hits]
    with Client(url, known) as client:
        for number in range(n_kills):
            with serving(port, folder / f"killed-{number}.log"):
                n_right = client.counts["right"]
                end = time.monotonic() + LIMIT_S
                while client.counts["right"] == n_right and not client.problems:
                    time.sleep(0.01)  # until it has come back to the client
                    if time.monotonic() > end:
                        client.problems.append("no right answer after a restart")
                time.sleep(dice.uniform(0.0, 0.5))
    with serving(port, folder / "after.log"):
        time.sleep(2.5)  # as long as a connection leaves a server alone that was down
        after = {query: hits_of(index, query) for query in QUERIES}
    if after != known:
        problems.append("after the restarts it answers otherwise")
    if client.counts["wrong"]:
        problems.append(f"{client.counts['wrong']} wrong answers")
    problems += client.problems
    happened = (
        f"{client.counts['right']} answers right, {client.counts['wrong']} wrong, "
        f"{client.counts['clear error']} times one clear error; after each restart equal answers"
    )
    return Row("kills", "obm serve, a client asking", "SIGKILL of the process group", n_kills,
               happened, time.monotonic() - started, problems)  # fmt: skip


# ---------------------------------------------------------------- a bad network


def drill_network(start: Path, folder: Path, dice: random.Random, quick: bool) -> list[Row]:
    """A training and an evaluation whose searches go through the proxy, and one that cannot begin.

    Args:
        start: merged folder.
        folder: to work in.
        dice: choose what happens to which request.
        quick: the evaluation alone.
    """
    port = free_port()
    with serving(port, folder / "serve.log"):
        rows = [] if quick else [_drill_training(start, folder / "train", port, dice)]
        rows.append(_drill_evaluation(start, folder / "eval", port, dice))
        return [*rows, _drill_dead(start, folder / "dead", port, dice)]


def _drill_training(start: Path, folder: Path, port: int, dice: random.Random) -> Row:
    with Proxy(port, dice, n_sound=24, n_bad=N_BAD, stall_s=STALL_S) as proxy:
        settings = (f"environment.retrieval={proxy.url}", *BEHIND_PROXY, f"output={folder / 'run'}")
        rows = ("grpo.per_device_train_batch_size=16", "grpo.max_steps=16", f"models.init={start}")
        ended = Running(obm("train", *TRAINING, *rows, *settings), folder / "log").wait()
    problems = _end(ended)
    happened = ""
    if not problems:
        happened, problems = judge_training(folder / "run")
    return _row("obm train, search behind the proxy", proxy, happened, ended, problems)


def judge_training(run: Path) -> tuple[str, list[str]]:
    """What the records of a training behind the proxy say: faults counted, none of them rewarded.

    Args:
        run: the run folder; all its episodes are recorded.

    Returns:
        Words for the table, and what is wrong.
    """
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open(encoding="utf-8")]
    rates = [line["search/service_failure_rate"] for line in steps if line["phase"] == "train"]
    episodes = [json.loads(line) for line in (run / "trajectories.jsonl").open(encoding="utf-8")]
    trained = [episode for episode in episodes if episode["phase"] == "train"]
    failed = [episode for episode in trained if has_fault(episode)]
    rewarded = [episode for episode in failed if episode["rewards"].get("total") is not None]
    scored = [episode for episode in trained if episode["rewards"].get("total") is not None]
    problems = []
    if rewarded:
        problems.append(f"{len(rewarded)} episodes with a failed search were rewarded")
    if not failed or not any(rates):
        problems.append("no failed search was counted")
    if rates and rates[-1]:
        problems.append("searches fail after the network was healed")
    if not scored:
        problems.append("no episode was rewarded at all")
    return (
        f"{len(rates)} steps to the end; {len(failed)} of {len(trained)} episodes had a failed "
        f"search, {len(rewarded)} of them a reward; failures by step "
        f"{', '.join(f'{rate:.2f}' for rate in rates)}"
    ), problems


def has_fault(episode: dict[str, Any]) -> bool:
    """Whether a search of an episode failed by its service."""
    return any(turn["fault"] == "infrastructure" for turn in episode["turns"])


def _drill_evaluation(start: Path, folder: Path, port: int, dice: random.Random) -> Row:
    with Proxy(port, dice, n_sound=6, n_bad=N_BAD, stall_s=STALL_S) as proxy:
        settings = (f"environment.retrieval={proxy.url}", *BEHIND_PROXY, "environment.eval_size=32")
        command = obm("eval", start, *settings, "--batch", "4", "--output", folder / "eval")
        ended = Running(command, folder / "log").wait()
    problems, happened = _end(ended), ""
    if not problems:
        lines = (folder / "eval" / "trajectories.jsonl").read_text(encoding="utf-8").splitlines()
        episodes = [json.loads(line) for line in lines]
        failed = [episode for episode in episodes if has_fault(episode)]
        right = [e for e in failed if not _found_anything(e) and e["measured"]["passage"]]
        happened = f"{len(episodes)} questions asked; {len(failed)} had a failed search"
        if not failed:
            problems.append("no failed search was recorded")
        if right:
            problems.append(f"{len(right)} failed searches count as having found the passage")
    return _row("obm eval, search behind the proxy", proxy, happened, ended, problems)


def _found_anything(episode: dict[str, Any]) -> bool:
    return any(turn["fault"] is None and turn["observation"] for turn in episode["turns"])


def _drill_dead(start: Path, folder: Path, port: int, dice: random.Random) -> Row:
    """A network that is bad from the first request on: nothing begins, and nothing is written."""
    with Proxy(port, dice, n_bad=10**6, share=1.0, stall_s=STALL_S) as proxy:
        settings = (f"environment.retrieval={proxy.url}", *BEHIND_PROXY)
        command = obm("eval", start, *settings, "--output", folder / "eval")
        ended = Running(command, folder / "log").wait()
    problems = ended.complaints("environment.retrieval", proxy.url)
    if (folder / "eval" / "eval.json").exists():
        problems.append("an evaluation was written")
    happened = f"refused: {' '.join(ended.errors).removeprefix('error: ')[:150]}"
    return _row("obm eval, no sound request at all", proxy, happened, ended, problems)


def _end(ended: Ended) -> list[str]:
    if ended.was_killed:
        return [f"hangs: {ended.seconds:.0f} s"]
    return [f"ends with {ended.code}: {ended.output[-300:]}"] if ended.code else []


def _row(what: str, proxy: Proxy, happened: str, ended: Ended, problems: list[str]) -> Row:
    doomed = [f"{n} {fate}" for fate, n in sorted(proxy.counts.items()) if fate != "pass"]
    how = f"connections: {', '.join(doomed)}; {proxy.counts['pass']} passed"
    return Row("network", what, how, proxy.n_doomed, happened, ended.seconds, problems)

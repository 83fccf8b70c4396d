"""The search server under load, beside the BM25 path of Search-R1's, on two corpora.

    make bench-serve ARGS="--passages 1000000 --peer lucene"

The atlas's 1315 passages, and synthetic ones: words drawn from a Zipf law, so that query words have
long and short lists of passages, as in a real corpus. Every server is the real command in a process
of its own; the load (`bench_load`) is another. Ours is measured mapped and, for its memory, read
into memory. `bench_serve_peer` is the other server, `bench_serve_report` the page.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.errors import JobFailedError, LaunchError
from train.settings import free_port

CLIENTS = (1, 8, 64)
WARM_UP_S = 30.0
"""Of load before the first measurement: Java compiles what runs often, after thousands of calls."""
START_S = 300.0
N_QUERIES = 2000
N_WORDS = 300_000
PASSAGE_WORDS = 60
SEED = 5
PEER_ENVIRONMENT = Path(".cache/pyserini-venv")
# pyserini 0.25 is the last that runs on Java 11 to 20; of what it asks for this is what importing
# its searcher needs, torch and transformers come from our own environment
PYSERINI = "pyserini==0.25.0"
PEER_PACKAGES = (
    "fastapi", "uvicorn", "httptools", "pyjnius", "bm25s", "numba", "numpy", "pandas", "pyyaml",
    "tqdm", "scipy", "scikit-learn", "onnxruntime", "openai", "tiktoken", "pillow",
)  # fmt: skip
LOAD = Path(__file__).with_name("bench_load.py")
PEER = Path(__file__).with_name("bench_serve_peer.py")


@dataclass(frozen=True)
class Corpus:
    """Passages and the queries that are asked of them."""

    name: str
    passages: Path
    """.jsonl of id and contents"""
    queries: Path
    """.json, a list"""

    def index_of(self, server: str) -> Path:
        """Where a server's index over these passages lies."""
        folder = self.passages.parent
        return folder.with_name(f"{folder.name}-{server}")


@dataclass
class Bench:
    """Where the bench works, and what it has measured."""

    folder: Path
    seconds: float
    runs: list[dict[str, Any]]
    builds: list[dict[str, Any]]
    memory: list[dict[str, Any]]

    def load(self, corpus: Corpus, server: str, command: Sequence[str]) -> None:
        """Measures one server at every number of clients, once it is warm."""
        with serving(command, self.folder / f"{corpus.name}-{server}.log") as (port, process):
            ask(port, 8, WARM_UP_S, corpus.queries)
            for n_clients in CLIENTS:
                before = cpu_seconds(process.pid)
                found = ask(port, n_clients, self.seconds, corpus.queries)
                cpu_s = cpu_seconds(process.pid) - before
                row = {
                    "corpus": corpus.name, "server": server, "clients": n_clients,
                    "qps": round(found["queries"] / found["wall_s"], 1), **found,
                    "cpu_ms": round(1e3 * cpu_s / max(found["queries"], 1), 3),
                    "load": round(os.getloadavg()[0], 1),
                }  # fmt: skip
                self.runs.append(row)
                print(
                    f"{corpus.name.ljust(9)} {server.ljust(7)} {n_clients:3} clients "
                    f"{row['qps']:8.1f} queries/s  p50 {row['p50_ms']:8.2f} ms  "
                    f"p99 {row['p99_ms']:8.2f} ms  {row['cpu_ms']:.2f} CPU ms  "
                    f"{found['failed']} failed",
                    flush=True,
                )
            self.memory.append(
                {"corpus": corpus.name, "server": server, **memory_gb(process.pid)}
            )  # fmt: skip

    def build(self, name: str, corpus: Corpus, command: Sequence[str]) -> None:
        """Builds an index and adds its time.

        Raises:
            JobFailedError: names its log.
        """
        print(f"{corpus.name}: building {name}'s index", flush=True)
        log = self.folder / f"{corpus.name}-{name}-index.log"
        start = time.perf_counter()
        with log.open("wb") as output:
            code = subprocess.run(
                command, stdout=output, stderr=output, env=environment()
            ).returncode
        if code:
            raise JobFailedError(f"{name}'s index cannot be built; {log} says why")
        self.builds.append(
            {"corpus": corpus.name, "server": name, "wall_s": round(time.perf_counter() - start, 1)}
        )


def bench_serve(
    folder: Path, *, n_passages: int, seconds: float, peer: str, keep: bool
) -> dict[str, Any]:
    """Every measurement.

    Args:
        folder: gets corpora, indexes and logs.
        n_passages: of the synthetic corpus.
        seconds: of load for each number of clients.
        peer: lucene, bm25s or none.
        keep: leave corpora and indexes for another run.

    Returns:
        peer, passages, warm_up_s, runs, builds, memory.

    Raises:
        LaunchError: the peer's environment cannot be made.
        JobFailedError: a command failed.
    """
    if peer != "none":
        make_peer_environment(PEER_ENVIRONMENT, lucene=peer == "lucene")
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder.absolute(), seconds, [], [], [])
    corpora = [write_atlas(bench.folder), write_synthetic(bench.folder, n_passages)]
    try:
        for corpus in corpora:
            index = corpus.index_of("ours")
            if not index.exists():
                command = ["index", "bm25", str(corpus.passages), "--output", str(index)]
                bench.build("ours", corpus, obm(*command))
            bench.load(corpus, "ours", serve_command(index))
            if peer != "none":
                peer_index = make_peer_index(bench, corpus, peer)
                command = [str(peer_python()), str(PEER), peer, str(peer_index)]
                bench.load(corpus, peer, command)
        bench.load(corpora[1], "ours in memory", [*serve_command(index), "--in-memory"])
    finally:
        if not keep:
            for path in bench.folder.iterdir():
                if path.suffix != ".log":
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return {
        "peer": peer, "passages": n_passages, "warm_up_s": WARM_UP_S, "runs": bench.runs,
        "builds": bench.builds, "memory": bench.memory,
    }  # fmt: skip


# ---------------------------------------------------------------- corpora


def write_atlas(folder: Path) -> Corpus:
    """The atlas's passages, asked for every headline fact."""
    from environments.atlas.entities import HEADLINE_RELATIONS, load_entities
    from environments.atlas.passages import load_passages

    corpus = Corpus("atlas", folder / "atlas" / "corpus.jsonl", folder / "atlas-queries.json")
    corpus.passages.parent.mkdir(exist_ok=True)
    with corpus.passages.open("w", encoding="utf-8") as file:
        for passage in load_passages():
            row = {"id": passage.id, "contents": f"{passage.title}\n{passage.text}"}
            file.write(json.dumps(row) + "\n")
    queries = [f"{r} of {e.name}" for e in load_entities().values() for r in HEADLINE_RELATIONS]
    np.random.default_rng(SEED).shuffle(queries)
    corpus.queries.write_text(json.dumps(queries), encoding="utf-8")
    return corpus


def write_synthetic(folder: Path, n_passages: int) -> Corpus:
    """Passages of sixty words by a Zipf law, asked with words that stand in one of them."""
    name = f"synthetic-{n_passages}"
    corpus = Corpus("synthetic", folder / name / "corpus.jsonl", folder / f"{name}-queries.json")
    corpus.passages.parent.mkdir(exist_ok=True)
    done = folder / f"{name}.done"
    if done.exists():
        return corpus
    print(f"writing {n_passages} synthetic passages", flush=True)
    rng = np.random.default_rng(SEED)
    words, cumulative = _vocabulary()
    asked = set(rng.choice(n_passages, min(N_QUERIES, n_passages), replace=False).tolist())
    queries = []
    with corpus.passages.open("w", encoding="utf-8") as file:
        for first in range(0, n_passages, 10_000):
            n = min(10_000, n_passages - first)
            drawn = np.searchsorted(cumulative, rng.random((n, PASSAGE_WORDS)))
            drawn = np.minimum(drawn, N_WORDS - 1)
            for i, row in enumerate(drawn):
                title, text = " ".join(words[row[:2]]), " ".join(words[row[2:]])
                line = {"id": str(first + i), "contents": f"{title}\n{text}"}
                file.write(json.dumps(line) + "\n")
                if first + i in asked:
                    queries.append(" ".join([title, *words[row[10:13]]]))
    corpus.queries.write_text(json.dumps(queries), encoding="utf-8")
    done.touch()
    return corpus


@functools.cache
def _vocabulary() -> tuple[np.ndarray, np.ndarray]:
    """The words, and the share of all words up to each, by the law of Zipf and Mandelbrot."""
    words = np.array([_word(number) for number in range(N_WORDS)])
    share = 1 / (np.arange(1, N_WORDS + 1) + 2.7)
    return words, np.cumsum(share / share.sum())


def _word(number: int) -> str:
    """A pronounceable word of its own for every number: frequent ones are short."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    word = syllables[number % len(syllables)]
    while number := number // len(syllables):
        word += syllables[number % len(syllables)]
    return word + "n"


# ---------------------------------------------------------------- servers


def obm(*arguments: str) -> list[str]:
    """The console script of this environment."""
    return [sys.executable, "-m", "launch.cli", *arguments]


def serve_command(index: Path) -> list[str]:
    """Our server; the port is added."""
    return obm("serve", "--images", "none", "--text", str(index), "--port")


def environment() -> dict[str, str]:
    """Variables of every process: no key is needed, though pyserini imports a client that asks."""
    return {**os.environ, "OPENAI_API_KEY": "unused", "TOKENIZERS_PARALLELISM": "false"}


@contextlib.contextmanager
def serving(command: Sequence[str], log: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Starts a server on a free port, waits until it answers, and ends it.

    Raises:
        JobFailedError: it ends, or does not answer in time; names its log.
    """
    port = free_port()
    at = command.index("--port") + 1 if "--port" in command else len(command)
    command = [*command[:at], str(port), *command[at:]]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        try:
            until = time.monotonic() + START_S
            while not _answers(port):
                if process.poll() is not None or time.monotonic() > until:
                    raise JobFailedError(f"a server did not start; {log} says why")
                time.sleep(0.2)
            yield port, process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _answers(port: int) -> bool:
    body = json.dumps({"queries": ["a"], "topk": 1, "return_scores": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/retrieve", body, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def ask(port: int, n_clients: int, seconds: float, queries: Path) -> dict[str, Any]:
    """One measurement by `bench_load`."""
    command = [sys.executable, "-I", "-S", str(LOAD)]
    arguments = [str(port), str(n_clients), str(seconds), str(queries)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise JobFailedError(f"the load failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def memory_gb(pid: int) -> dict[str, float]:
    """Resident memory of a process: all of it, and what no file backs."""
    import psutil

    from launch.bench_process import anonymous_bytes

    rss = psutil.Process(pid).memory_info().rss
    return {"rss_gb": round(rss / 1e9, 3), "anonymous_gb": round(anonymous_bytes(pid) / 1e9, 3)}


# ---------------------------------------------------------------- the peer


def peer_python() -> Path:
    """The interpreter of the peer's environment."""
    return PEER_ENVIRONMENT.absolute() / "bin" / "python"


def make_peer_environment(folder: Path, *, lucene: bool) -> None:
    """Makes the peer's environment unless it is there.

    Raises:
        LaunchError: there is no Java, or a package cannot be installed.
    """
    if lucene and shutil.which("java") is None:
        raise LaunchError("pyserini needs Java 11 to 20; pass --search-peer bm25s or none")
    done = folder / ("lucene" if lucene else "bm25s")
    if done.exists():
        return
    print(f"making the peer's environment in {folder}", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([*pip, *PEER_PACKAGES], check=True)
        if lucene:
            subprocess.run([*pip, "--no-deps", PYSERINI], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LaunchError(
            f"the peer cannot be installed in {folder} ({error}); pass --search-peer none"
        ) from error
    # importing pyserini's searcher imports torch and transformers, which it does not use here
    site = next((folder / "lib").glob("python*/site-packages"))
    ours = Path(np.__file__).parents[1]
    (site / "zz-ours.pth").write_text(f"{ours}\n", encoding="utf-8")
    done.touch()


def make_peer_index(bench: Bench, corpus: Corpus, peer: str) -> Path:
    """Lucene's index, made as Search-R1's build_index.sh makes it, or that of bm25s."""
    index = corpus.index_of(peer)
    if index.exists():
        return index
    if peer == "bm25s":
        command = [str(peer_python()), str(PEER), "index", str(corpus.passages), str(index)]
    else:
        command = [
            str(peer_python()), "-m", "pyserini.index.lucene", "--collection", "JsonCollection",
            "--input", str(corpus.passages.parent), "--index", str(index),
            "--generator", "DefaultLuceneDocumentGenerator", "--threads", "1", "--storeRaw",
        ]  # fmt: skip
    bench.build(peer, corpus, command)
    return index

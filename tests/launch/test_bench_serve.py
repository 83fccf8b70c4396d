"""The bench of the search server: its corpora, its load against a real server, its targets."""

import asyncio
import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import bench_serve
from launch.bench_load import measure, quantile
from launch.bench_serve import Corpus, _word, ask, serve_command, serving, write_synthetic
from launch.bench_serve_report import judge, render_page
from tests.coroutines import run_coroutine
from train.settings import free_port


def test_every_word_is_one_of_its_own():
    words = [_word(number) for number in range(20_000)]
    assert len(set(words)) == 20_000
    assert len(words[0]) < len(words[-1])


def test_the_synthetic_corpus_is_the_same_each_time_and_its_queries_have_an_answer(tmp_path):
    first = write_synthetic(tmp_path, 3000)
    (tmp_path / "again").mkdir()
    again = write_synthetic(tmp_path / "again", 3000)
    assert first.passages.read_bytes() == again.passages.read_bytes()
    rows = [json.loads(line) for line in first.passages.read_text().splitlines()]
    assert len(rows) == 3000
    assert {len(row["contents"].split()) for row in rows} == {60}
    queries = json.loads(first.queries.read_text())
    titles = {row["contents"].split("\n")[0] for row in rows}
    assert all(" ".join(query.split()[:2]) in titles for query in queries)
    assert first.index_of("ours") != write_synthetic(tmp_path, 1000).index_of("ours")


def test_quantiles_are_those_of_the_ordered_values():
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.99) == 4.0
    assert math.isnan(quantile([], 0.5))


@pytest.mark.slow
def test_the_load_is_answered_by_the_real_command(tmp_path):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    corpus = write_synthetic(tmp_path, 1000)
    index = corpus.index_of("ours")
    command = [sys.executable, "-m", "launch.cli", "index", "bm25", str(corpus.passages)]
    root = Path(__file__).parents[2]
    subprocess.run([*command, "--output", str(index)], check=True, cwd=root)
    with serving(serve_command(index), tmp_path / "log") as (port, process):
        found = ask(port, 4, 0.5, corpus.queries)
        assert process.poll() is None
    assert found["queries"] >= 4
    assert found["failed"] == 0
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert process.returncode == 0


OK, GONE = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}", b""


@pytest.mark.parametrize(
    ("answers", "failed"),
    [
        ([OK, OK], 0.0),
        ([OK, GONE], 0.5),
        ([OK, OK[:-1]], 0.5),
        ([OK, OK.replace(b"200", b"503")], 0.5),
    ],
)
def test_a_request_whose_connection_is_lost_has_failed(answers, failed):
    turns = itertools.cycle(answers)

    async def answer(reader, writer):
        while not reader.at_eof():
            with contextlib.suppress(asyncio.IncompleteReadError):
                await reader.readuntil(b"}")
                reply = next(turns)
                writer.write(reply)
                if len(reply) < len(OK):
                    break
        writer.close()

    async def load():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            return await measure(server.sockets[0].getsockname()[1], 1, 1.0, ["a"])

    found = run_coroutine(load())
    n = found["queries"] + found["failed"]
    assert n >= 4
    assert found["failed"] == pytest.approx(failed * n, abs=1)


def test_a_server_that_is_gone_fails_every_request():
    port = free_port()
    found = run_coroutine(measure(port, 2, 0.12, ["a", "b"]))
    assert found["queries"] == 0
    # two clients, a pause of 0.05 s after each refusal
    assert 2 <= found["failed"] <= 6


@pytest.mark.parametrize("server", ["ours", "lucene"])
def test_every_server_is_warm_before_it_is_measured(tmp_path, monkeypatch, server):
    asked = []

    def ask(port, n_clients, seconds, queries):
        asked.append((n_clients, seconds))
        return {"queries": 9, "failed": 0, "wall_s": 1.0, "p50_ms": 1.0, "p99_ms": 1.0}

    process = SimpleNamespace(pid=os.getpid())
    monkeypatch.setattr(bench_serve, "serving", lambda *_: contextlib.nullcontext((1, process)))
    monkeypatch.setattr(bench_serve, "ask", ask)
    bench = bench_serve.Bench(tmp_path, 8.0, [], [], [])
    bench.load(Corpus("atlas", tmp_path, tmp_path), server, ["command"])
    assert asked == [(8, 30.0), (1, 8.0), (8, 8.0), (64, 8.0)]
    assert len(bench.runs) == 3


def test_targets_are_judged_on_both_corpora_and_shown():
    def row(corpus, server, clients, qps, cpu_ms):
        return {
            "corpus": corpus, "server": server, "clients": clients, "qps": qps, "p50_ms": 1.0,
            "p99_ms": 300.0 if corpus == "atlas" else 100.0, "cpu_ms": cpu_ms, "failed": 0,
            "load": 1.0,
        }  # fmt: skip

    runs = [
        row(corpus, server, clients, qps, cpu_ms)
        for corpus in ("atlas", "synthetic")
        for server, qps, cpu_ms in (("ours", 100.0, 0.5), ("lucene", 80.0, 1.5))
        for clients in (1, 8, 64)
    ]
    memory = [{"corpus": "synthetic", "server": "ours", "rss_gb": 0.8, "anonymous_gb": 0.2}]
    record = {
        "peer": "lucene", "passages": 1000, "warm_up_s": 30.0, "runs": runs, "memory": memory,
        "builds": [], "versions": {}, "command": "c", "commit": "d", "hardware": "h",
    }  # fmt: skip
    targets = {target["name"]: target for target in judge(record)}
    assert not targets["atlas: p99 at 64 clients, ms (at most)"]["met"]
    assert targets["synthetic: p99 at 64 clients, ms (at most)"]["met"]
    ratio = targets["atlas: queries a second at 8 clients, times the peer's (at least)"]
    assert (ratio["value"], ratio["met"]) == (1.25, True)
    cpu = targets["atlas: the peer's CPU time a query at 64 clients, times ours (at least)"]
    assert cpu["value"] == 3.0
    page = render_page({**record, "targets": list(targets.values())})
    assert "| synthetic | lucene | 64 | 80 |" in page
    assert "under load for 30 s before it is measured" in page
    assert "Index and searcher are pyserini's" in page
    assert "missed" in page
    assert len(judge({**record, "peer": "none"})) == 4


def test_an_index_lies_beside_its_corpus():
    corpus = Corpus("atlas", Path("work/atlas/corpus.jsonl"), Path("q.json"))
    assert corpus.index_of("ours") == Path("work/atlas-ours")

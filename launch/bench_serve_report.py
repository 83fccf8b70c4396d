"""What `obm bench serve` found: targets, and the page in docs/results."""

from __future__ import annotations

from typing import Any

from launch.bench_report import ending

Row = dict[str, Any]

PEER_NAMES = {
    "lucene": "Search-R1's BM25 path with pyserini (Lucene)",
    "bm25s": "Search-R1's BM25 path with bm25s in the place of pyserini",
}
LEAST_TIMES_PEER = 1.0
LEAST_TIMES_CPU = 2.0
MOST_ANONYMOUS_GB = 0.5
MOST_P99_MS = 250.0


def judge(record: Row) -> list[Row]:
    """The targets: name, value, target, met."""
    targets = []
    peer = record["peer"]
    for corpus in ("atlas", "synthetic"):
        ours = find(record["runs"], corpus, "ours", 64)
        targets.append(
            _target(f"{corpus}: p99 at 64 clients, ms (at most)", ours["p99_ms"], MOST_P99_MS, "<=")
        )
        if peer != "none":
            for n_clients in (1, 8, 64):
                other = find(record["runs"], corpus, peer, n_clients)
                ours = find(record["runs"], corpus, "ours", n_clients)
                name = f"{corpus}: queries a second at {n_clients} clients, times the peer's"
                ratio = round(ours["qps"] / max(other["qps"], 1e-9), 2)
                targets.append(_target(f"{name} (at least)", ratio, LEAST_TIMES_PEER, ">="))
            other = find(record["runs"], corpus, peer, 64)
            name = f"{corpus}: the peer's CPU time a query at 64 clients, times ours (at least)"
            ratio = round(other["cpu_ms"] / max(ours["cpu_ms"], 1e-9), 2)
            targets.append(_target(name, ratio, LEAST_TIMES_CPU, ">="))
    failed = sum(row["failed"] for row in record["runs"] if row["server"] == "ours")
    targets.append(_target("requests of ours that failed (at most)", failed, 0, "<="))
    memory = next(
        row for row in record["memory"]
        if row["corpus"] == "synthetic" and row["server"] == "ours"
    )  # fmt: skip
    name = "synthetic: memory of the mapped index that no file backs, GB (at most)"
    targets.append(_target(name, memory["anonymous_gb"], MOST_ANONYMOUS_GB, "<="))
    return targets


def find(rows: list[Row], corpus: str, server: str, n_clients: int) -> Row:
    """The measurement of a server at a number of clients."""
    wanted = {"corpus": corpus, "server": server, "clients": n_clients}
    return next(row for row in rows if wanted.items() <= row.items())


def _target(name: str, value: float, target: float, sign: str) -> Row:
    met = value <= target if sign == "<=" else value >= target
    return {"name": name, "value": value, "target": target, "met": met}


def render_page(record: Row) -> str:
    """docs/results/bench-serve.md from the content of bench-serve.json."""
    peer = PEER_NAMES.get(record["peer"], "")
    lines = [
        "# The search server under load",
        "",
        f"`obm serve` over BM25{f' beside {peer}' if peer else ''}: every client asks one query "
        "after another over one connection, three hits, with scores. The atlas has 1315 passages "
        f"and is asked 1338 queries of the form REL of NAME; the synthetic corpus has "
        f"{record['passages']:,} "
        "passages of 60 words drawn from a Zipf law, asked with five words of one passage each. "
        f"Every server is under load for {record['warm_up_s']:g} s before it is measured. Server, "
        "clients and bench share the machine.",
        "",
        "| corpus | server | clients | queries/s | p50 ms | p99 ms | CPU ms a query | failed "
        "| load |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['corpus']} | {row['server']} | {row['clients']} | {row['qps']:.0f} "
            f"| {row['p50_ms']:.1f} | {row['p99_ms']:.1f} | {row['cpu_ms']:.2f} "
            f"| {row['failed']} | {row['load']:.1f} |"
            for row in record["runs"]
        ),
        "",
        "* CPU ms is the server's own processor time, all its threads; load is the system's load "
        "average: other work on the machine shows there.",
        *(
            [
                "* The peer has the same endpoint, framework (FastAPI, a blocking function in a "
                "pool of threads) and work per query as search_r1/search/retrieval_server.py: "
                "queries one after another, each hit's stored JSON parsed. "
                + (
                    "Index and searcher are pyserini's, as there."
                    if record["peer"] == "lucene"
                    else "Its searcher is bm25s, memory-mapped, since pyserini needs Java."
                )
            ]
            if peer
            else []
        ),
        "* The hits of two BM25s differ in stemming, stop words and k1, b; this page compares time "
        "and memory only. retrieval.md has the recall of ours.",
        "",
        "Memory of the server after the load:",
        "",
        "| corpus | server | resident GB | of it backed by no file |",
        "| --- | --- | ---: | ---: |",
        *(
            f"| {row['corpus']} | {row['server']} | {row['rss_gb']:.3f} "
            f"| {row['anonymous_gb']:.3f} |"
            for row in record["memory"]
        ),
        "",
        "Building the index:",
        "",
        "| corpus | server | seconds |",
        "| --- | --- | ---: |",
        *(
            f"| {row['corpus']} | {row['server']} | {row['wall_s']:.1f} |"
            for row in record["builds"]
        ),
        "",
        *ending(record),
    ]
    return "\n".join(lines) + "\n"

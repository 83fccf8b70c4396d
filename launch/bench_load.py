"""The load of `obm bench serve`: clients that ask one query after another, for some seconds.

    python -I -S launch/bench_load.py PORT CLIENTS SECONDS QUERIES.json

A script of the standard library alone, in a process of its own, with as little work between two
requests as possible: on a small machine the clients take their time from the server. Every client
keeps one connection. Prints JSON on one line.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from pathlib import Path

TOPK = 3
PAUSE_S = 0.05
"""after a lost connection: a server that is gone is not asked as fast as the loop runs"""


async def measure(
    port: int, n_clients: int, seconds: float, queries: list[str]
) -> dict[str, float]:
    """Requests answered and their latencies.

    Returns:
        queries (answered with 200), failed (anything else, lost connections included), wall_s,
        p50_ms, p99_ms.
    """
    requests = [_request(query) for query in queries]
    latencies: list[float] = []
    failures = [0]
    start = time.perf_counter()
    until = start + seconds
    clients = [
        _client(port, requests[i::n_clients] or requests, until, latencies, failures)
        for i in range(n_clients)
    ]
    await asyncio.gather(*clients)
    wall_s = time.perf_counter() - start
    latencies.sort()
    return {
        "queries": len(latencies),
        "failed": failures[0],
        "wall_s": round(wall_s, 3),
        "p50_ms": round(1e3 * quantile(latencies, 0.50), 2),
        "p99_ms": round(1e3 * quantile(latencies, 0.99), 2),
    }


def quantile(ordered: list[float], share: float) -> float:
    """The value that this share does not exceed; nan of nothing."""
    if not ordered:
        return float("nan")
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


async def _client(
    port: int, requests: list[bytes], until: float, latencies: list[float], failures: list[int]
) -> None:
    streams = None
    for request in itertools.cycle(requests):
        if (start := time.perf_counter()) >= until:
            break
        try:
            if streams is None:
                streams = await asyncio.open_connection("127.0.0.1", port)
                start = time.perf_counter()
            is_answered = await _ask(*streams, request)
        except (OSError, EOFError):  # an answer that breaks off is an EOFError
            is_answered = False
            if streams is not None:
                streams[1].close()
            streams = None
            await asyncio.sleep(PAUSE_S)
        if is_answered:
            latencies.append(time.perf_counter() - start)
        else:
            failures[0] += 1
    if streams is not None:
        streams[1].close()


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> bool:
    """Sends a request and reads the answer; whether it is a 200."""
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(_length(head))
    return head.split(b" ", 2)[1] == b"200"


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    raise ValueError(f"an answer without its length: {head!r}")


def _request(query: str) -> bytes:
    """What Search-R1's client sends."""
    body = json.dumps({"queries": [query], "topk": TOPK, "return_scores": True}).encode()
    head = (
        "POST /retrieve HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def main(arguments: list[str]) -> int:
    """Measures once."""
    port, n_clients, seconds, path = arguments
    queries = json.loads(Path(path).read_text(encoding="utf-8"))
    print(json.dumps(asyncio.run(measure(int(port), int(n_clients), float(seconds), queries))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

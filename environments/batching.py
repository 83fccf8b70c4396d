"""Questions that arrive at the same time are answered together; more than can wait are refused.

    batcher = Batcher(index.search, max_batch=64, max_waiting=1024)
    hits = await batcher.ask(["capital of France"], k=3)

A batch is whatever waits when the one before is done: a lone question never waits for company, and
under load the batches grow by themselves. The index is asked in one thread of its own, so the event
loop goes on reading requests and refusing them.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from environments.tools import Hit

Search = Callable[[list[Any], int], list[list[Hit]]]


class OverloadedError(RuntimeError):
    """So many questions wait already that these would not be answered in time."""


@dataclass
class _Request:
    queries: Sequence[Any]
    k: int
    answer: asyncio.Future[list[list[Hit]]]


class Batcher:
    """A bounded queue in front of an index.

    Args:
        search: `search(queries, k) -> list[list[Hit]]` of an index.
        max_batch: queries given to the index at a time; a larger request goes alone.
        max_waiting: queries that may wait; a request beyond is refused at once.
        on_batch: is told the size of every batch.
    """

    def __init__(
        self,
        search: Search,
        *,
        max_batch: int = 64,
        max_waiting: int = 1024,
        on_batch: Callable[[int], None] = lambda n: None,
    ):
        self.search = search
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.on_batch = on_batch
        self.n_waiting = 0
        """queries that wait for the index"""
        self._waiting: deque[_Request] = deque()
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="index")
        self._worker: asyncio.Task[None] | None = None

    def check_room(self, n_queries: int) -> None:
        """Looks whether so many queries may wait now: before what makes them costs anything.

        Raises:
            OverloadedError: the queue is full.
        """
        if self.n_waiting + n_queries > self.max_waiting and self.n_waiting:
            raise OverloadedError(f"{self.n_waiting} queries wait already")

    async def ask(self, queries: Sequence[Any], k: int) -> list[list[Hit]]:
        """The index's answer. A caller that is cancelled while it waits costs no search.

        Raises:
            OverloadedError: the queue is full.
            Exception: whatever the index raised.
        """
        self.check_room(len(queries))
        if self._worker is None:
            self._worker = asyncio.create_task(self._work())
        request = _Request(queries, k, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        self.n_waiting += len(queries)
        self._wake.set()
        return await request.answer

    async def close(self) -> None:
        """Ends the worker; what still waits is cancelled."""
        if self._worker is not None:
            self._worker.cancel()
        for request in self._waiting:
            request.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            batch = self._take()
            if not batch:
                self._wake.clear()
                continue
            self.on_batch(sum(len(request.queries) for request in batch))
            await self._answer(batch)

    def _take(self) -> list[_Request]:
        """The requests of the next batch: those that wait longest, without those given up."""
        batch: list[_Request] = []
        n_queries = 0
        while self._waiting:
            request = self._waiting[0]
            if batch and n_queries + len(request.queries) > self.max_batch:
                break
            self._waiting.popleft()
            self.n_waiting -= len(request.queries)
            if not request.answer.done():
                batch.append(request)
                n_queries += len(request.queries)
        return batch

    async def _answer(self, batch: list[_Request]) -> None:
        """Asks the index; where a batch fails, each request alone, so that the error is its own."""
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._thread, self._search, batch)
        except Exception as error:
            for request in batch:
                if request.answer.done():
                    continue
                if len(batch) > 1:
                    await self._answer([request])
                else:
                    request.answer.set_exception(error)
            return
        for request, answer in zip(batch, answers, strict=True):
            if not request.answer.done():
                request.answer.set_result(answer)

    def _search(self, batch: list[_Request]) -> list[list[list[Hit]]]:
        """Asks once for every k that occurs: an index may answer the first 3 of 5 otherwise than 3.

        A question that stands several times in a batch, as in a group of episodes, is asked once.
        """
        found: dict[tuple[int, Hashable], list[Hit]] = {}
        for k in dict.fromkeys(request.k for request in batch):
            asked = [query for request in batch if request.k == k for query in request.queries]
            queries = list({_key(query): query for query in asked}.values())
            for query, hits in zip(queries, self.search(queries, k), strict=True):
                found[k, _key(query)] = hits
        return [[found[request.k, _key(query)] for query in request.queries] for request in batch]


def _key(query: Any) -> Hashable:
    """Text by what it says; pictures by identity, their index knows equal ones itself."""
    return query if isinstance(query, str) else id(query)

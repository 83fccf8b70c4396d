"""Every tool result, kept under a key of its content, so that a run replays bit for bit.

    cache = ResultCache("runs/cache", mode="read")
    index = CachedIndex(index, cache, "text_search", identity)

A folder holds `results.sqlite` (write-ahead log: many processes at once, on one machine, so no
network file system) and `images/`, PNG files named by their SHA-256. What is stored is what the
policy gets to see: hits, "nothing found", a page, or the refusal of a page. Errors of
infrastructure are never stored, nor is what lacks a part through one (`Unkept`). An answer is given
as it reads from the cache, also the first time, and of two processes that ask the same at once both
give the answer that came to be stored.

Modes:
    read     answer from the cache; ask the service what is missing, and keep it.
    write    ask the service every time; keep what is new, leave what is there. `counts["changed"]`
             says how many answers differ from the kept ones by now.
    refresh  ask again once per process, replace what is there; then as `read`.
    offline  answer from the cache alone; what is missing is a CacheMissError.
"""

from __future__ import annotations

import io
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from environments.content import canonical, encode_png, image_names, sha256, write_whole
from environments.errors import EnvironmentSetupError

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Mode = Literal["read", "write", "refresh", "offline"]
MODES = ("read", "write", "refresh", "offline")
VERSION = 1
"""Of the keys and the table; a change of either makes it another cache."""
BUSY_TIMEOUT_S = 30.0
TWIN_TIMEOUT_S = 60.0
"""So long a call waits for a running one that asks the same, before it asks itself."""
_TABLE = """
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY,
    tool TEXT NOT NULL,
    provider TEXT NOT NULL,
    query TEXT NOT NULL,
    k INTEGER NOT NULL,
    value TEXT NOT NULL,
    created REAL NOT NULL
) WITHOUT ROWID
"""


class CacheMissError(RuntimeError):
    """Offline, and the result is not there; the message names the key."""

    is_permanent = True


class CacheError(EnvironmentSetupError):
    """A cache folder that cannot be used; the message names it, the reason and the fix."""


class Unkept(str):
    """A value that answers all that wait for it and is not stored: the next call asks again."""

    __slots__ = ()


@dataclass(frozen=True)
class Question:
    """What a result is stored under.

    Attributes:
        tool: `text_search`, `image_search` or `visit`.
        provider: canonical JSON of the back end's identity.
        query: normalised text, or the hash of a picture's pixels.
        k: number of hits asked for; 0 for pages.
    """

    tool: str
    provider: str
    query: str
    k: int

    @property
    def key(self) -> str:
        """SHA-256 of all fields and of VERSION."""
        return sha256(canonical([VERSION, self.tool, self.provider, self.query, self.k]).encode())


@dataclass(frozen=True)
class Record:
    """A stored result.

    Attributes:
        question: what was asked.
        value: canonical JSON of the result.
        created: Unix time.
    """

    question: Question
    value: str
    created: float


class ResultCache:
    """The store.

    Args:
        folder: made when missing.
        mode: see the module.

    Attributes:
        counts: `hits`, `misses`, `stored`, `changed` and, of infrastructure, `errors`.

    Raises:
        CacheError: offline without a cache, a file in the way, or a cache of another version.
    """

    def __init__(self, folder: str | Path, mode: Mode = "read") -> None:
        if mode not in MODES:
            raise CacheError(f"cache mode '{mode}' is not known; choose among {', '.join(MODES)}")
        self.folder, self.mode = Path(folder), mode
        self.counts: Counter[str] = Counter()
        self._running: dict[str, Future[str]] = {}
        self._refreshed: set[str] = set()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._pid = -1
        if mode == "offline" and not self.database.is_file():
            raise CacheError(
                f"{self.database}: there is no cache to replay; make one with cache_mode read, or "
                "bring one with obm cache import"
            )
        try:
            (self.folder / "images").mkdir(parents=True, exist_ok=True)
            self._execute("SELECT 1")
        except (OSError, sqlite3.Error) as error:
            raise CacheError(
                f"{self.folder}: no usable cache folder ({error}); name another one"
            ) from error

    @property
    def database(self) -> Path:
        """The SQLite file."""
        return self.folder / "results.sqlite"

    # ---------------------------------------------------------------- answers

    def answer(
        self, questions: Sequence[Question], ask: Callable[[list[int]], list[str]]
    ) -> list[str]:
        """The value of every question, from the cache or from `ask`, as the mode says.

        Args:
            questions: of one back end.
            ask: numbers of the questions to carry out -> their values, `Unkept` ones among them;
                what it raises passes through, and nothing is stored.

        Raises:
            CacheMissError: offline, and one is missing.
        """
        values: dict[str, str] = {}
        mine: dict[str, int] = {}
        others: dict[str, tuple[int, Future[str]]] = {}
        for i, question in enumerate(questions):
            key = question.key
            if key in values or key in mine or key in others:
                continue
            known = self.look_up(question)
            if known is not None:
                values[key] = known
                with self._lock:
                    self.counts["hits"] += 1
                continue
            with self._lock:
                running = self._running.get(key)
                if running is None:
                    self._running[key] = Future()
                    mine[key] = i
                else:
                    others[key] = (i, running)
        values |= self._ask_own(questions, mine, ask)
        for key, (i, running) in others.items():
            try:
                values[key] = running.result(TWIN_TIMEOUT_S)
            except FutureTimeoutError:  # its thread hangs: do not hang with it
                values[key] = self.keep(questions[i], ask([i])[0])
        return [values[question.key] for question in questions]

    def look_up(self, question: Question) -> str | None:
        """The stored value, or None if the mode wants the service to be asked.

        Raises:
            CacheMissError: offline, and it is missing.
        """
        key = question.key
        is_due = self.mode == "refresh" and key not in self._refreshed
        value = None if self.mode == "write" or is_due else self.get(key)
        if value is not None and self._lacks_images(value):
            logger.warning("the cache lacks a picture of %s; it counts as missing", key)
            value = None
        if value is None and self.mode == "offline":
            with self._lock:
                self.counts["misses"] += 1
            raise CacheMissError(
                f"{question.tool} of '{question.query[:80]}' (k = {question.k}) is not in the "
                f"cache {self.folder} under key {key}; offline nothing is asked, so run it once "
                "with cache_mode read"
            )
        return value

    def _ask_own(
        self,
        questions: Sequence[Question],
        mine: dict[str, int],
        ask: Callable[[list[int]], list[str]],
    ) -> dict[str, str]:
        """Carries out what no other thread is carrying out, and tells those that wait for it."""
        if not mine:
            return {}
        kept: dict[str, str] = {}
        try:
            for key, i in mine.items():  # one that ended between the look-up and now
                known = self.look_up(questions[i])
                if known is not None:
                    kept[key] = known
            missing = {key: i for key, i in mine.items() if key not in kept}
            with self._lock:
                self.counts["hits"] += len(kept)
                self.counts["misses"] += len(missing)
            asked = ask(list(missing.values())) if missing else []
            for (key, i), value in zip(missing.items(), asked, strict=True):
                kept[key] = self.keep(questions[i], value)
            for key in mine:
                self._running[key].set_result(kept[key])
        except BaseException as error:
            with self._lock:
                self.counts["errors"] += 1
            for key in mine:
                if not self._running[key].done():
                    self._running[key].set_exception(error)
            raise
        finally:
            with self._lock:
                for key in mine:
                    del self._running[key]
        return kept

    def keep(self, question: Question, value: str) -> str:
        """Stores a fresh value as the mode says; returns the one that this call answers with."""
        if isinstance(value, Unkept):
            return value
        key = question.key
        record = Record(question, value, time.time())
        if self.mode == "refresh":
            self.put(record, replace=True)
            with self._lock:
                self._refreshed.add(key)
                self.counts["stored"] += 1
            return value
        is_new = self.put(record, replace=False)
        stands = value if is_new else self.get(key)
        if stands is not None and self._lacks_images(stands):
            self.put(record, replace=True)
            stands = value
        with self._lock:
            self.counts["stored"] += is_new
            self.counts["changed"] += stands != value
        # another process may have been first; in write mode the fresh answer counts all the same
        return value if self.mode == "write" or stands is None else stands

    # ---------------------------------------------------------------- the table

    def get(self, key: str) -> str | None:
        """The stored value of a key."""
        rows, _ = self._execute("SELECT value FROM results WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    def put(self, record: Record, replace: bool) -> bool:
        """Stores a record; False if the key was there and stays."""
        _, n_changed = self._execute(_insert(replace), *_values(record))
        return n_changed > 0

    def put_all(self, records: Iterable[Record], replace: bool) -> int:
        """Stores all records or, if one cannot be, none; returns how many are new or replaced."""
        with self._lock:
            connection = self._open()
            connection.execute("BEGIN IMMEDIATE")
            try:
                n_changed = sum(
                    connection.execute(_insert(replace), _values(record)).rowcount
                    for record in records
                )
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk may have ended it already
                    connection.execute("ROLLBACK")
                raise
        return n_changed

    def records(self) -> Iterator[Record]:
        """Every record, by key."""
        last = ""
        # by pages: no long read may hold up the writers' checkpoint
        page = "SELECT * FROM results WHERE key > ? ORDER BY key LIMIT 500"
        while rows := self._execute(page, last)[0]:
            for key, tool, provider, query, k, value, created in rows:
                yield Record(Question(tool, provider, query, k), value, created)
                last = key

    def delete(self, keys: Sequence[str]) -> None:
        """Drops records; their pictures stay until `prune` finds them unused."""
        for key in keys:
            self._execute("DELETE FROM results WHERE key = ?", key)

    def close(self) -> None:
        """Closes the database; the next call opens it again."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def _execute(self, statement: str, *values: Any) -> tuple[list[Any], int]:
        """Rows and number of changed rows of one statement, which is its own transaction.

        SQLite waits for other processes; a lock lets the threads of this one take turns.
        """
        with self._lock:
            cursor = self._open().execute(statement, values)
            return cursor.fetchall(), cursor.rowcount

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():  # never share one over a fork
            self._connection, self._pid = self._connect(), os.getpid()
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.database, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        deadline = time.monotonic() + BUSY_TIMEOUT_S
        while True:
            try:  # switching to the log is the one step for which SQLite itself does not wait
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(_TABLE)
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, VERSION):
            raise CacheError(
                f"{self.database}: made by another version ({version}, this one is {VERSION}); "
                "name another folder"
            )
        connection.execute(f"PRAGMA user_version = {VERSION}")
        return connection

    # ---------------------------------------------------------------- pictures

    def image_path(self, name: str) -> Path:
        """File of a picture."""
        return image_file(self.folder, name)

    def save_image(self, image: Image) -> str:
        """Stores a picture without loss; returns its name."""
        content = encode_png(image)
        name = sha256(content)
        write_whole(self.image_path(name), content)
        return name

    def load_image(self, name: str) -> Image:
        """A stored picture, checked against its name.

        Raises:
            CacheMissError: missing or damaged.
        """
        from PIL import Image

        try:
            content = self.image_path(name).read_bytes()
        except OSError as error:
            raise CacheMissError(f"{self.image_path(name)}: {error.strerror}") from error
        if sha256(content) != name:
            raise CacheMissError(f"{self.image_path(name)}: the file is damaged; delete it")
        image = Image.open(io.BytesIO(content))
        image.load()
        image.info.clear()
        return image.copy()  # a plain Image, not one that remembers its file

    def _lacks_images(self, value: str) -> bool:
        return any(not self.image_path(name).is_file() for name in image_names(value))


def image_file(folder: Path, name: str) -> Path:
    """File of a picture in a cache's folder."""
    return folder / "images" / name[:2] / f"{name}.png"


def _insert(replace: bool) -> str:
    verb = "REPLACE" if replace else "IGNORE"
    return f"INSERT OR {verb} INTO results VALUES (?, ?, ?, ?, ?, ?, ?)"


def _values(record: Record) -> tuple[Any, ...]:
    """A record as a row of the table."""
    q = record.question
    return q.key, q.tool, q.provider, q.query, q.k, record.value, record.created

"""An index under construction: in shards, in bounded memory, resumed after a kill, published whole.

The work goes on in `.NAME.building` beside the folder it will become. After every shard
`progress.json` is replaced; what lies there beyond it was cut short and is made again. The last
step is a rename, so that a folder with an `index.json` is always a complete index.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from environments.corpus import OFFSETS_FILE, ROWS_FILE, JsonLines, Row
from environments.errors import EnvironmentSetupError

FORMAT = 1
INDEX_FILE = "index.json"
PROGRESS_FILE = "progress.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

MakeShard = Callable[[list[Row], Path], list[Row]]
"""(rows, path without suffix) -> the rows as they shall stand in the corpus; writes its files."""
Finish = Callable[["Building"], dict[str, Any]]
"""Makes the index out of the shards; returns what `index.json` shall say."""


class Building:
    """The folder of a build and how far it has come.

    Attributes:
        folder: where the work goes on.
        identity: source and settings; a build of another identity is not resumed.
        shards: of every finished shard its number of rows, and where source and corpus stood.
    """

    def __init__(self, output: Path, identity: dict[str, Any]):
        self.output = output
        self.folder = output.parent / f".{output.name}.building"
        self.identity = json.loads(json.dumps(identity))
        self.shards: list[dict[str, int]] = []

    @property
    def n_rows(self) -> int:
        """Rows in all finished shards."""
        return sum(shard["rows"] for shard in self.shards)

    def stem(self, number: int) -> Path:
        """Path of a shard's files, without suffix."""
        return self.folder / f"shard-{number:05d}"

    def load(self, suffix: str) -> Iterator[np.ndarray]:
        """One array of every shard, in their order, memory-mapped."""
        for number in range(len(self.shards)):
            yield np.load(self.stem(number).with_suffix(suffix), mmap_mode="r")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Makes the folder, and keeps a second builder out of it.

        Raises:
            EnvironmentSetupError: another process builds there.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise EnvironmentSetupError(
                    f"{self.output}: another process is building it; wait for that"
                ) from error
            yield

    def resume(self, restart: bool) -> None:
        """Reads how far an earlier build came; one without a complete shard has nothing to lose.

        Raises:
            EnvironmentSetupError: that was a build of something else, or its progress is damaged.
        """
        path = self.folder / PROGRESS_FILE
        if restart or not path.exists():
            self._save()
            return
        try:
            progress = json.loads(path.read_text(encoding="utf-8"))
            identity, shards = progress["identity"], list(progress["shards"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise EnvironmentSetupError(
                f"{path}: no progress of a build ({error!r}); pass --overwrite to start anew"
            ) from error
        if not shards:
            self._save()
            return
        if identity != self.identity:
            raise EnvironmentSetupError(
                f"{self.output}: an unfinished build of another source or with other settings "
                "lies there; pass --overwrite to start anew"
            )
        self.shards = shards

    def add(self, shard: dict[str, int]) -> None:
        """Records a shard whose files are complete."""
        self.shards.append(shard)
        self._save()

    def discard(self) -> None:
        """Removes the folder of a build that has nothing to go on from."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def publish(self, description: dict[str, Any]) -> None:
        """Writes index.json, removes the shards and renames the folder to its name."""
        for path in self.folder.glob("shard-*"):
            path.unlink()
        (self.folder / PROGRESS_FILE).unlink()
        (self.folder / "lock").unlink()
        files = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        write_json(self.folder / INDEX_FILE, {"format": FORMAT, **description, "files": files})
        old = self.output.with_name(f".{self.output.name}.old")
        if self.output.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.output.rename(old)
        self.folder.rename(self.output)
        shutil.rmtree(old, ignore_errors=True)

    def _save(self) -> None:
        write_json(
            self.folder / PROGRESS_FILE, {"identity": self.identity, "shards": self.shards}
        )  # fmt: skip


def build(
    source: JsonLines,
    output: Path,
    settings: dict[str, Any],
    make_shard: MakeShard,
    finish: Finish,
    *,
    shard_rows: int,
    overwrite: bool = False,
) -> Path:
    """Builds an index shard by shard; a broken-off build goes on.

    Args:
        source: the corpus.
        output: folder that the index becomes.
        settings: kind and settings; stand in index.json.
        make_shard, finish: what this kind of index does.
        shard_rows: rows in memory at a time.
        overwrite: replace an index, and start anew what is unfinished.

    Returns:
        `output`.

    Raises:
        EnvironmentSetupError: an index is there, or an unfinished one of something else; what is
            there is no index, or holds the source; a bad row; a disk that takes no more.
    """
    identity = {"source": source.identity(), "shard_rows": shard_rows, **settings}
    building = Building(output, identity)
    try:
        check_output(output, building.folder, source.path, overwrite)
        return _build(building, source, make_shard, finish, settings, shard_rows, overwrite)
    except OSError as error:
        fix = "choose another --output"
        if error.errno in NO_ROOM:
            fix = "free space, then run the same command again"
        raise EnvironmentSetupError(
            f"{error.filename or building.folder}: cannot be written ({error.strerror or error}); "
            f"{fix}"
        ) from error


def check_output(output: Path, part: Path, source: Path, overwrite: bool) -> None:
    """Checks that the output may be written, before anything is.

    Args:
        output: folder that the index becomes.
        part: folder where it is built.
        source: the corpus; must not lie in either.
        overwrite: whether an earlier index may be replaced.

    Raises:
        EnvironmentSetupError: it is a file, holds the source, or exists (unless `overwrite` and it
            is empty or an earlier index).
        OSError: its name is not one that the disk takes.
    """
    if not output.name:
        raise EnvironmentSetupError(f"--output '{output}' names no folder of its own; name one")
    corpus = Path(os.path.realpath(source))  # unlike resolve, it takes links in a ring
    for folder in (output, part):
        if Path(os.path.realpath(folder)) in corpus.parents:
            raise EnvironmentSetupError(f"{folder}: holds the source {source}; choose another one")
    if output.is_symlink() and not output.exists():
        raise EnvironmentSetupError(f"{output}: is a link to nowhere; choose another --output")
    if not output.exists():
        return
    if not output.is_dir():
        raise EnvironmentSetupError(f"{output}: is a file; choose another --output")
    if not overwrite:
        raise EnvironmentSetupError(f"{output} exists; pass --overwrite or another folder")
    if any(output.iterdir()) and not _is_index(output):
        raise EnvironmentSetupError(
            f"{output}: is no index (no readable {INDEX_FILE}), so it is not overwritten; choose "
            "another --output, or remove it yourself"
        )


def _is_index(folder: Path) -> bool:
    """Whether a build made the folder; its files may be damaged, that is why one builds again."""
    try:
        return "format" in dict(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _build(
    building: Building,
    source: JsonLines,
    make_shard: MakeShard,
    finish: Finish,
    settings: dict[str, Any],
    shard_rows: int,
    overwrite: bool,
) -> Path:
    with building.lock():
        building.resume(restart=overwrite)
        try:
            _make_shards(building, source, make_shard, shard_rows)
        except BaseException:
            # nothing to go on from, and the same command shall work once the source is mended
            if not building.shards:
                building.discard()
            raise
        if not building.n_rows:
            building.discard()
            raise EnvironmentSetupError(f"{source.path}: there is nothing to index in it")
        lines = np.concatenate([np.zeros(1, np.int64), *building.load(".lines.npy")])
        np.save(building.folder / OFFSETS_FILE, np.cumsum(lines))
        description = finish(building)
        building.publish({**settings, "rows": building.n_rows, **description})
    return building.output


def _make_shards(
    building: Building, source: JsonLines, make_shard: MakeShard, shard_rows: int
) -> None:
    last = building.shards[-1] if building.shards else {"position": 0, "corpus_bytes": 0}
    with (
        (building.folder / ROWS_FILE).open("ab") as corpus,
        tqdm(total=source.size, unit="B", unit_scale=True, desc="index", disable=None) as bar,
    ):
        corpus.truncate(last["corpus_bytes"])  # what a kill left beyond the last shard
        for rows, position in _chunks(source.read(last["position"]), shard_rows):
            first = building.n_rows
            named = [
                row if row.id else Row(str(first + i), row.title, row.text, row.image)
                for i, row in enumerate(rows)
            ]
            stem = building.stem(len(building.shards))
            lines = [row.line() for row in make_shard(named, stem)]
            np.save(stem.with_suffix(".lines.npy"), np.array([len(x) for x in lines], np.int64))
            corpus.writelines(lines)
            corpus.flush()
            os.fsync(corpus.fileno())
            building.add(
                {"rows": len(rows), "position": position, "corpus_bytes": corpus.tell()}
            )  # fmt: skip
            bar.update(source.bytes_read() - bar.n)


def _chunks(rows: Iterator[tuple[Row, int]], n: int) -> Iterator[tuple[list[Row], int]]:
    """Lists of `n` rows, each with the position after its last."""
    chunk: list[Row] = []
    position = 0
    for row, position in rows:
        chunk.append(row)
        if len(chunk) == n:
            yield chunk, position
            chunk = []
    if chunk:
        yield chunk, position


def read_index(folder: Path) -> dict[str, Any]:
    """The `index.json` of a published index.

    Raises:
        EnvironmentSetupError: there is none, one of a later version, or one whose files are not
            as long as they were when it was built.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        version, files = index["format"], dict(index.get("files", {}))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EnvironmentSetupError(
            f"{folder}: this is no index (no readable {INDEX_FILE}); build one with `obm index`"
        ) from error
    if version != FORMAT:
        raise EnvironmentSetupError(
            f"{folder}: an index of format {version}, this version reads {FORMAT}; build it again"
        )
    for name, n_bytes in files.items():
        path = folder / Path(name).name
        found = path.stat().st_size if path.is_file() else None
        if found != n_bytes:
            words = "is missing" if found is None else f"has {found} bytes, and was {n_bytes} long"
            raise EnvironmentSetupError(f"{path}: {words}; copy the index again, or build it again")
    return dict(index)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file as a whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)

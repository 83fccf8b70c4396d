"""Merge checkpoints that share a base into one: plan, validate, apply.

    python -c "from merge.engine import merge; merge('base', 'vlm', 'agent', 'merged', ...)"

or, from the command line, `obm merge --config configs/demo.yaml`.

Nothing is written before everything is checked: names, shapes, vocabularies, settings, statistics,
the output folder, free space. The output is then built in a hidden folder beside its place: the
headers first, so that every tensor has its offset and no shard is held in memory; then the tensors,
several at a time, each noted in a journal. The folder is renamed when it is complete, so it either
is complete or does not exist, and a merge that was killed goes on when it is run again. Nothing is
forced to the disk: what a power cut has taken, `obm merge verify` finds. Arithmetic is in fp32;
each tensor is rounded once, to nearest even, to the dtype it has in the VLM.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import xxhash

from merge.budget import budget_note, find_shared_cuts, group_budgets
from merge.card import render_card
from merge.checkpoint import Checkpoint
from merge.cost import estimate_cost, format_cost
from merge.dense import one_thread_a_product
from merge.errors import MergeError
from merge.journal import Journal
from merge.methods import METHODS
from merge.output import (
    RECORD_NAME,
    OutputFile,
    check_output,
    copy_companions,
    move_into_place,
    output_path,
    part_folder,
    plan_files,
    write_index,
)
from merge.plan import MergePlan, PlannedTensor, format_plan, make_plan, plan_bytes, resolve_scope
from merge.report import SCHEMA_VERSION, make_record, package_version
from merge.shards import ShardWriter
from merge.stats import Stats
from merge.validate import check_first_weights, check_methods, make_settings, open_statistics
from merge.writer import TensorWriter

logger = logging.getLogger(__name__)


def merge(
    base: str | Path,
    vlm: str | Path,
    agent: str | Path,
    output: str | Path,
    *,
    donors: Mapping[str, str | Path] | None = None,
    method: str = "obm",
    weights: Mapping[str, float] | None = None,
    scope: Mapping[str, str | None] | None = None,
    rules: Sequence[Mapping[str, Any]] = (),
    stats: Mapping[str, str | Path] | None = None,
    vocabulary: str = "equal",
    families: str | Path | None = None,
    threads: int | None = None,
    shard_size: str | int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Merges text models into a VLM and writes a checkpoint folder.

    Args:
        base: Folder or hub id (`owner/name@revision`) of the base language model, theta_B.
        vlm: The vision-language model, theta_V; or a text model, where all three are.
        agent: The text search agent, theta_S.
        output: Folder to write.
        donors: Further text models of the same base: name -> folder or hub id.
        method: A name in `methods.METHODS`, for the groups whose scope says `method`.
        weights: lambda_k by task (`vlm`, `agent`, names of donors); 1 where absent.
        scope: What happens to linear, norm_bias and embedding tensors; see `plan.resolve_scope`.
        rules: Other settings by tensor name; see `configs.sections.TensorRule`.
        stats: Task -> statistics file, or a folder of them; see `stats.open_stats`.
        vocabulary: equal, common or protect; see `plan.make_plan`.
        families: YAML file with further model families.
        threads: Tensors merged at a time; one a core when None. No bit depends on it.
        shard_size: Largest file of the output, such as `5GB`; the VLM's own files when None.
        overwrite: Replace an output folder that an earlier merge wrote.
        dry_run: Check everything, write nothing.
        options: Further fields of `methods.MethodSettings`: density, normalization, combine,
            saliency, budget, seed, ...

    Returns:
        The content of merge.json; for a dry run `{"dry_run": True, "table": ..., "tensors": ...,
        "cost": ...}` with the plan as text and as data.

    Raises:
        MergeError: Whatever cannot be merged or written; no output folder is left then.
    """
    settings = make_settings(weights, options)
    if threads is not None and threads < 1:
        raise MergeError(f"merge.threads: {threads} is less than 1; null means one a core")
    output = output_path(output)
    sources = {"base": base, "vlm": vlm, "agent": agent}
    for name in donors or {}:
        if name in sources:
            reason = f"'{name}' is a model of its own, not a donor"
            raise MergeError(f"models.donors.{name}: {reason}; rename the donor")
        if name in METHODS:  # an action is a method, or whose tensor is copied
            reason = f"'{name}' is the name of a merge method"
            raise MergeError(f"models.donors.{name}: {reason}; rename the donor")
    sources |= donors or {}
    parents = {role: Checkpoint(source, role) for role, source in sources.items()}
    actions = resolve_scope(scope, method)
    plan = make_plan(
        parents,
        method,
        settings,
        scope=scope,
        rules=rules,
        vocabulary=vocabulary,
        families=families,
    )
    files = plan_files(plan, parents["vlm"], shard_size)
    n_bytes = sum(tensor.n_bytes for file in files for tensor in file.tensors)
    folders = {role: parent.folder for role, parent in parents.items()}
    check_output(output, folders, n_bytes, overwrite)
    check_methods(plan)
    statistics = open_statistics(stats, plan, parents)
    check_first_weights(plan, parents, statistics)
    groups = group_budgets(plan.tensors)
    if dry_run:
        return _describe(plan, parents, files, [budget_note(groups)] if groups else [])

    run = _Run(plan, parents, statistics, files, output, threads or _n_cores())
    entries = run.apply(list(groups.values()))
    record = make_record(plan, parents, statistics, entries, method, settings, actions)
    record["settings"]["vocabulary"] = vocabulary
    record["rules"] = [dict(rule) for rule in rules]
    record["output"] = {"files": {file.name: file.n_bytes for file in files}}
    run.finish(record, overwrite)
    logger.info("merged %s by %s into %s", ", ".join(map(str, sources.values())), method, output)
    return record


def _describe(
    plan: MergePlan,
    parents: Mapping[str, Checkpoint],
    files: Sequence[OutputFile],
    notes: Sequence[str],
) -> dict[str, Any]:
    tensors = {
        t.name: {"group": t.group, "action": t.action, "reason": t.reason} for t in plan.tensors
    }
    cost = estimate_cost(plan, plan_bytes(plan, parents), len(files))
    table = "\n".join([format_plan(plan), *notes, format_cost(cost)])
    return {"dry_run": True, "table": table, "tensors": tensors, "cost": cost}


def _n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- apply


class _Run:
    """One merge being written: its unfinished folder, journal, output files and workers."""

    def __init__(
        self,
        plan: MergePlan,
        parents: Mapping[str, Checkpoint],
        statistics: Mapping[tuple[str, str], Stats],
        files: Sequence[OutputFile],
        output: Path,
        threads: int,
    ) -> None:
        self._plan = plan
        self._parents = parents
        self._files = files
        self._output = output
        self._threads = threads
        self._writer = TensorWriter(parents, statistics, threads)
        self.part = part_folder(output)
        self._journal = Journal(self.part, _digest(plan, parents, statistics, files))

    def apply(self, budgets: Sequence[Sequence[PlannedTensor]]) -> dict[str, dict[str, Any]]:
        """Writes every tensor; returns the journal's entries by name.

        An interruption leaves the unfinished folder, from which the next call goes on; an error
        removes it.
        """
        try:
            with _writers(self.part, self._files) as writers:
                self._drop_damaged(writers)
                missing = [t for t in self._plan.tensors if t.name not in self._journal.finished]
                if len(missing) < len(self._plan.tensors):
                    n_done = len(self._plan.tensors) - len(missing)
                    logger.info("goes on: %d of %d tensors", n_done, len(self._plan.tensors))
                with one_thread_a_product(), ThreadPoolExecutor(self._threads) as executor:
                    open_names = {tensor.name for tensor in missing}
                    for group in budgets:
                        if any(tensor.name in open_names for tensor in group):
                            shared = find_shared_cuts(
                                group,
                                self._writer.with_reader,
                                self._writer.kernels,
                                executor,
                                self._threads,
                            )
                            self._writer.cuts.update(shared)
                    self._write_all(missing, writers, executor)
            return self._journal.finished
        except Exception:
            self._journal.abandon()
            raise
        except BaseException:
            self._journal.close()
            raise

    def finish(self, record: dict[str, Any], overwrite: bool) -> None:
        """Adds what lies beside the weights, and moves the folder into its place.

        An error removes the folder, unless it is whole and only cannot be moved: it then keeps its
        journal, so that the same command only checks and moves it.
        """
        is_whole = False
        try:
            copy_companions(self._parents["vlm"].folder, self.part)
            write_index(self.part, self._files)
            card = render_card(record, self._output.name)
            (self.part / "README.md").write_text(card, encoding="utf-8")
            text = json.dumps(record, indent=2) + "\n"
            (self.part / RECORD_NAME).write_text(text, encoding="utf-8")
            is_whole = True
            move_into_place(self.part, self._output, overwrite)
            self._journal.remove(self._output)
        except Exception as error:
            if is_whole:
                raise MergeError(
                    f"{self._output}: the merge cannot be moved there ({error}); it is whole in "
                    f"{self.part}, move it yourself or run the same command again"
                ) from error
            self._journal.abandon()
            if not isinstance(error, OSError):
                raise
            raise MergeError(
                f"{self._output}: cannot be written ({error}); free space or choose another output"
            ) from error
        finally:
            self._journal.close()

    def _drop_damaged(self, writers: Mapping[str, ShardWriter]) -> None:
        """Forgets journal entries whose bytes are not in the file."""
        known = {tensor.name for tensor in self._plan.tensors}
        for name, entry in list(self._journal.finished.items()):
            if name not in known or writers[name].checksum(name) != entry["checksum"]:
                del self._journal.finished[name]

    def _write_all(
        self,
        tensors: Sequence[PlannedTensor],
        writers: Mapping[str, ShardWriter],
        executor: ThreadPoolExecutor,
    ) -> None:
        bar = _progress(len(self._plan.tensors))
        bar.update(len(self._plan.tensors) - len(tensors))
        waiting = list(reversed(tensors))
        running: dict[Future[dict[str, Any]], PlannedTensor] = {}
        with bar:
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * self._threads:
                        tensor = waiting.pop()
                        for role in tensor.read_roles:
                            name = tensor.sources[role]
                            self._parents[role].file_of(name).will_need(name)
                        writer = writers[tensor.name]
                        running[executor.submit(self._writer.write, tensor, writer)] = tensor
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        tensor = running.pop(future)
                        entry = future.result()
                        self._journal.add(tensor.name, entry)
                        self._journal.finished[tensor.name] = entry
                        bar.update()
            except BaseException:
                for future in running:
                    future.cancel()
                raise


class _NoProgress(nullcontext[None]):
    def update(self, n: int = 1) -> None:
        """Shows nothing."""


def _progress(n_tensors: int) -> Any:
    """A bar on a terminal, silence in a log, where the library is not even loaded."""
    if not sys.stderr.isatty():
        return _NoProgress()
    from tqdm import tqdm

    return tqdm(total=n_tensors, desc="merge", unit="tensor")


@contextmanager
def _writers(folder: Path, files: Sequence[OutputFile]) -> Iterator[dict[str, ShardWriter]]:
    """Opens the output's files, headers written: name of a tensor -> writer."""
    writers: list[ShardWriter] = []
    of_tensor: dict[str, ShardWriter] = {}
    try:
        for file in files:
            layout = [(t.name, t.dtype, t.shape) for t in file.tensors]
            writers.append(ShardWriter(folder / file.name, layout, file.metadata))
            of_tensor.update(dict.fromkeys((t.name for t in file.tensors), writers[-1]))
        yield of_tensor
    finally:
        for writer in writers:
            writer.close()


def _digest(
    plan: MergePlan,
    parents: Mapping[str, Checkpoint],
    statistics: Mapping[tuple[str, str], Stats],
    files: Sequence[OutputFile],
) -> str:
    """One hash of all that decides the output's bytes, without reading the weights."""

    def stamp(path: Path) -> list[Any]:
        status = path.stat()
        return [str(path.resolve()), status.st_size, status.st_mtime_ns]

    content = {
        "version": [SCHEMA_VERSION, package_version()],
        "tensors": [repr(tensor) for tensor in plan.tensors],
        "parents": {role: [stamp(f.path) for f in p.files] for role, p in parents.items()},
        "stats": {"/".join(key): stamp(stats.path) for key, stats in statistics.items()},
        "files": [[file.name, [t.name for t in file.tensors]] for file in files],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, default=list).encode())

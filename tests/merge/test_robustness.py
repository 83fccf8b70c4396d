"""Merges that are killed, interrupted, raced, or run out of disk: resumed, or refused cleanly."""

import errno
import fcntl
import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from merge import engine
from merge.errors import MergeError
from merge.journal import JOURNAL_NAME, Journal
from merge.reader import TensorReader
from merge.shards import ShardWriter, encode_header, from_float
from tests.merge.folders import flip_byte, hash_files, run, weights_of

SLOW_MERGE = Path(__file__).with_name("slow_merge.py")
PART = ".out.part"


def start_slowly(trio, output: Path, pause_s: float, **changes) -> subprocess.Popen:
    """Starts a merge in a process of its own; it has begun when this returns."""
    arguments = {**trio.paths, "output": str(output), "method": "ties", "threads": 2}
    settings = {"merge": arguments, "pause_s": pause_s, **changes}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.merge.slow_merge", json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_finished(part: Path, n_tensors: int) -> None:
    """Waits until the journal has some tensors."""
    path = part / JOURNAL_NAME
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") <= n_tensors:
        assert time.monotonic() < deadline, "the merge does not get ahead"
        time.sleep(0.005)


# ---- killed


def test_killed_at_ten_random_moments_a_merge_ends_with_the_same_bytes(make_trio, tmp_path):
    trio, inputs = make_trio(), hash_files(Path(make_trio().paths["base"]).parent)
    run(trio, tmp_path / "undisturbed" / "out", method="ties", threads=2)
    process = start_slowly(trio, tmp_path / "out", 0.008, kills=10, seed=0)
    printed, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    finished = json.loads(printed)
    assert len(finished) == 10
    assert any(0 < n < len(weights_of(tmp_path / "out")) for n in finished), "all kills were idle"
    assert hash_files(tmp_path / "out") == hash_files(tmp_path / "undisturbed" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]
    assert hash_files(Path(trio.paths["base"]).parent) == inputs


class Killed(BaseException):
    """Ends a merge as SIGKILL would: nothing is cleaned up behind it."""


@pytest.fixture
def break_off(make_trio, tmp_path, monkeypatch):
    """Begins a merge into tmp_path/out and breaks it off after some tensors, or at a later step."""

    def begin(after=3, step=None, **changes):
        calls = []

        def break_journal(journal, tensor, entry, _add=Journal.add):
            _add(journal, tensor, entry)
            calls.append(tensor)
            if step is None and len(calls) == after:
                raise Killed

        def break_step(*arguments):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", break_journal)
            if step is not None:
                patch.setattr(engine, step, break_step)
            with pytest.raises(Killed):
                run(make_trio(), tmp_path / "out", **({"method": "ties", "threads": 1} | changes))
        return tmp_path / PART

    return begin


@pytest.fixture
def count_written(monkeypatch):
    """Names of the tensors that were written since."""
    written = set()

    def write(writer, name, begin, data, _write=ShardWriter.write):
        written.add(name)
        _write(writer, name, begin, data)

    monkeypatch.setattr(ShardWriter, "write", write)
    return written


def undisturbed(trio, tmp_path, **changes) -> dict[str, str]:
    run(trio, tmp_path / "undisturbed" / "out", **({"method": "ties"} | changes))
    return hash_files(tmp_path / "undisturbed" / "out")


@pytest.mark.parametrize(
    "step", ["copy_companions", "write_index", "render_card", "move_into_place"]
)
def test_a_merge_that_ends_behind_its_last_tensor_goes_on(make_trio, tmp_path, break_off, step):
    break_off(step=step)
    assert not (tmp_path / "out").exists()
    run(make_trio(), tmp_path / "out", method="ties")
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


def test_what_is_finished_is_not_written_again(make_trio, tmp_path, break_off, count_written):
    break_off(after=5)
    count_written.clear()
    run(make_trio(), tmp_path / "out", method="ties")
    assert len(count_written) == len(weights_of(tmp_path / "out")) - 5
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


def test_a_torn_last_line_of_the_journal_is_one_tensor_less(
    make_trio, tmp_path, break_off, count_written
):
    path = break_off(after=5) / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-20])
    break_off(after=3)
    count_written.clear()
    run(make_trio(), tmp_path / "out", method="ties")
    assert len(count_written) == len(weights_of(tmp_path / "out")) - 4 - 3
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_finished_tensor_that_is_damaged_is_made_again(make_trio, tmp_path, break_off, damage):
    part = break_off(after=5)
    file = part / "model.safetensors"
    if damage == "flipped":
        entry = json.loads((part / JOURNAL_NAME).read_text().splitlines()[3])
        header = int.from_bytes(file.read_bytes()[:8], "little")
        offsets = json.loads(file.read_bytes()[8 : 8 + header])[entry["tensor"]]["data_offsets"]
        flip_byte(file, 8 + header + offsets[0] + 1)
    elif damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        file.unlink()
    run(make_trio(), tmp_path / "out", method="ties")
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"density": 0.2}, {"method": "dare"}, {"shard_size": "200KB"}, {"weights": {"agent": 0.5}}],
)
def test_other_settings_start_afresh(make_trio, tmp_path, break_off, count_written, changes):
    break_off(after=5)
    count_written.clear()
    run(make_trio(), tmp_path / "out", **({"method": "ties"} | changes))
    assert count_written == set(weights_of(tmp_path / "out"))
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path, **changes)


def test_other_inputs_start_afresh(make_trio, fresh_trio, tmp_path, break_off, count_written):
    break_off(after=5)
    count_written.clear()
    run(fresh_trio, tmp_path / "out", method="ties")
    assert count_written == set(weights_of(tmp_path / "out"))


def test_an_input_that_was_written_again_starts_afresh(
    fresh_trio, tmp_path, break_off, count_written
):
    break_off(after=5, **fresh_trio.paths)
    for path in Path(fresh_trio.paths["agent"]).glob("*.safetensors"):
        path.write_bytes(path.read_bytes())
    count_written.clear()
    run(fresh_trio, tmp_path / "out", method="ties")
    assert count_written == set(weights_of(tmp_path / "out"))


def test_other_statistics_start_afresh(make_trio, stats, tmp_path, break_off, count_written):
    break_off(after=5, method="obm", stats=stats)
    count_written.clear()
    swapped = {"vlm": stats["agent"], "agent": stats["vlm"]}
    run(make_trio(), tmp_path / "out", method="obm", stats=swapped)
    assert count_written == set(weights_of(tmp_path / "out"))


def test_a_shared_budget_is_found_again(make_trio, tmp_path, break_off):
    break_off(after=12, budget="global", density=0.2)
    run(make_trio(), tmp_path / "out", method="ties", budget="global", density=0.2)
    expected = undisturbed(make_trio(), tmp_path, budget="global", density=0.2)
    assert hash_files(tmp_path / "out") == expected


def test_an_overwrite_that_is_broken_off_keeps_the_old_merge(make_trio, tmp_path, break_off):
    run(make_trio(), tmp_path / "out", method="linear")
    before = hash_files(tmp_path / "out")
    break_off(after=5, overwrite=True)
    assert hash_files(tmp_path / "out") == before
    run(make_trio(), tmp_path / "out", method="ties", overwrite=True)
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_an_interrupted_merge_goes_on(make_trio, tmp_path):
    process = start_slowly(make_trio(), tmp_path / "out", 0.2)
    wait_until_finished(tmp_path / PART, 3)
    process.send_signal(signal.SIGINT)
    _, log = process.communicate(timeout=60)
    assert log.rstrip().endswith("KeyboardInterrupt")
    assert [path.name for path in tmp_path.iterdir()] == [PART]
    n_finished = (tmp_path / PART / JOURNAL_NAME).read_bytes().count(b"\n") - 1
    assert n_finished >= 3
    process = start_slowly(make_trio(), tmp_path / "out", 0)
    _, log = process.communicate(timeout=60)
    assert f"goes on: {n_finished} of" in log
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


# ---- two at once


def test_a_second_merge_into_the_same_output_is_refused(make_trio, tmp_path):
    process = start_slowly(make_trio(), tmp_path / "out", 0.1)
    wait_until_finished(tmp_path / PART, 3)
    with pytest.raises(MergeError, match="out: another merge is writing it; wait for it, or"):
        run(make_trio(), tmp_path / "out", method="linear")
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)


def test_where_the_file_system_has_no_locks_a_merge_warns(make_trio, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("merge.lock.fcntl.flock", refuse)
    run(make_trio(), tmp_path / "out", method="ties")
    assert f"{tmp_path}: no locks on this file system; start one merge" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_that_fails_is_not_taken_for_another_merge(make_trio, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("merge.lock.fcntl.flock", fail)
    with pytest.raises(MergeError, match=r"cannot be written \(Input/output error\)"):
        run(make_trio(), tmp_path / "out", method="ties")


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_held(tmp_path, monkeypatch):
    flock, seen = fcntl.flock, []

    def slow(descriptor, how):
        """The merge before removes its file between our opening and our locking it."""
        if not seen:
            (tmp_path / ".out.lock").unlink()
        seen.append(descriptor)
        return flock(descriptor, how)

    monkeypatch.setattr("merge.lock.fcntl.flock", slow)
    journal = Journal(tmp_path / PART, "digest")
    assert len(seen) == 2
    with pytest.raises(MergeError, match="out: another merge is writing it"):
        Journal(tmp_path / PART, "digest")
    journal.abandon()
    assert list(tmp_path.iterdir()) == []


def test_two_merges_that_finish_one_output_are_both_kept(make_trio, tmp_path, monkeypatch):
    """Both found no output when they began; the second comes to its end behind the first."""
    move = engine.move_into_place

    def move_behind_another(part, output, *arguments):
        output.mkdir()
        (output / "merge.json").write_text("of another merge")
        move(part, output, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "move_into_place", move_behind_another)
        whole = rf"out: exists; choose another output.*it is whole in .*{PART}, move it yourself"
        with pytest.raises(MergeError, match=whole):
            run(make_trio(), tmp_path / "out", method="ties")
    assert (tmp_path / "out" / "merge.json").read_text() == "of another merge"
    assert set(undisturbed(make_trio(), tmp_path)) <= set(hash_files(tmp_path / PART))


def test_a_merge_that_cannot_be_moved_is_kept_and_moved_by_the_same_command(
    make_trio, tmp_path, monkeypatch, count_written
):
    def refuse(*_):
        raise OSError(16, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "move_into_place", refuse)
        with pytest.raises(MergeError, match=rf"busy.*it is whole in .*{PART}, move it yourself"):
            run(make_trio(), tmp_path / "out", method="ties")
    count_written.clear()
    run(make_trio(), tmp_path / "out", method="ties")
    assert not count_written
    assert hash_files(tmp_path / "out") == undisturbed(make_trio(), tmp_path)
    assert not (tmp_path / PART).exists()


# ---- the disk


@contextmanager
def tiny_disk(folder: Path, n_bytes: int):
    """Mounts a file system of some size."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "tmpfs", str(folder)]
    try:
        answer = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if answer.returncode:
        pytest.skip(f"file systems may not be mounted here ({answer.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextmanager
def short_files(n_bytes: int):
    """Limits the size of the files that this process writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_too_small_is_found_before_anything_is_written(make_trio, tmp_path):
    with tiny_disk(tmp_path / "disk", 256 * 1024) as disk:
        with pytest.raises(
            MergeError,
            match=r"out: needs \d{3}\.\d kB, the disk has \d+\.\d kB free; free space or",
        ):
            run(make_trio(), disk / "out", method="ties")
        assert list(disk.iterdir()) == []


def test_an_unfinished_merge_does_not_count_against_the_free_space(make_trio, tmp_path, break_off):
    with tiny_disk(tmp_path / "disk", 768 * 1024) as disk:
        with pytest.raises(Killed):
            break_off_at_end(make_trio(), disk / "out")
        assert sum(path.stat().st_size for path in (disk / PART).iterdir()) > 500_000
        run(make_trio(), disk / "out", method="ties")
        assert weights_of(disk / "out")


def break_off_at_end(trio, output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:

        def kill(*_):
            raise Killed

        patch.setattr(engine, "copy_companions", kill)
        run(trio, output, method="ties")


@pytest.mark.parametrize("moment", ["begin", "tensor", "journal", "companions", "record"])
def test_a_disk_that_fills_up_leaves_nothing(make_trio, tmp_path, monkeypatch, moment):
    """Another program takes the space that was free when the merge began."""
    trio, inputs = make_trio(), hash_files(Path(make_trio().paths["base"]).parent)
    places = {
        "begin": (engine, "Journal"),
        "tensor": (ShardWriter, "write"),
        "journal": (Journal, "add"),
        "companions": (engine, "copy_companions"),
        "record": (engine, "render_card"),
    }
    with tiny_disk(tmp_path / "disk", 4 * 1024 * 1024) as disk:

        def fill():
            with (disk / "filler").open("ab", buffering=0) as file:
                for n_bytes in (1024 * 1024, 4096):
                    try:
                        while file.write(b"x" * n_bytes) == n_bytes:
                            pass
                    except OSError:
                        pass

        place, name = places[moment]
        plain = getattr(place, name)

        def fill_first(*arguments):
            fill()
            return plain(*arguments)

        monkeypatch.setattr(place, name, fill_first)
        with pytest.raises(MergeError, match=r"cannot be written .*No space left") as caught:
            run(trio, disk / "out", method="ties")
        assert str(caught.value).count("\n") == 0
        assert "choose another output" in str(caught.value)
        assert [path.name for path in disk.iterdir()] == ["filler"]
    assert hash_files(Path(trio.paths["base"]).parent) == inputs


@pytest.mark.parametrize("n_bytes", [0, 40_000, 400_000])
def test_files_that_may_not_grow_leave_nothing(make_trio, tmp_path, n_bytes):
    """The same with a limit on files, which needs no rights: header, weights, or journal."""
    with (
        short_files(n_bytes),
        pytest.raises(MergeError, match=r"cannot be written .*File too large"),
    ):
        run(make_trio(), tmp_path / "out", method="ties")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(make_trio, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MergeError, match=r"cannot be written .*Permission denied.*another output"):
        run(make_trio(), tmp_path / "out", method="ties")


# ---- memory


def test_a_large_embedding_is_merged_in_little_memory(tmp_path):
    # 61 million entries: 122 MB in bf16, 365 MB in three parents
    block_shape, n_blocks = (1024, 1024), 58
    layout = [("model.embed_tokens.weight", "BF16", (n_blocks * 1024, 1024))]
    header, _ = encode_header(layout, {})
    generator = np.random.default_rng(0)
    block = generator.normal(0, 0.02, block_shape).astype(np.float32)
    paths = {}
    for role, noise in (("base", 0.0), ("vlm", 0.001), ("agent", 0.001)):
        values = block + generator.normal(0, noise, block_shape).astype(np.float32)
        paths[role] = str(tmp_path / role)
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text('{"model_type": "qwen2"}')
        with (tmp_path / role / "model.safetensors").open("wb") as file:
            file.write(header)
            file.writelines([from_float(values, "BF16").tobytes()] * n_blocks)
    arguments = {**paths, "output": str(tmp_path / "out"), "method": "ties", "density": 0.2,
                 "scope": {"embedding": "ties"}, "threads": 2}  # fmt: skip
    code = (
        "import json, sys; from merge.engine import merge; "
        "record = merge(**json.loads(sys.argv[1])); "
        # not ru_maxrss, in which a process has its parent's memory until it was started
        "peak = next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]; "
        "print(peak, record['totals']['density']['agent'])"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    peak_kb, density = map(float, answer.stdout.split())
    assert peak_kb * 1024 < 0.5e9
    assert density == pytest.approx(0.2, abs=1e-7)


@pytest.mark.parametrize(("threads", "piece_mib"), [(1, 12), (2, 12), (16, 12), (50, 4), (400, 1)])
def test_many_workers_take_smaller_pieces(make_trio, tmp_path, monkeypatch, threads, piece_mib):
    # of 200 MiB that they share: 4 each for 50, half a one for 400, which is too little
    taken = set()

    class Reader(TensorReader):
        def __init__(self, *arguments):
            taken.add(arguments[-1])
            super().__init__(*arguments)

    monkeypatch.setattr("merge.writer.TensorReader", Reader)
    run(make_trio(), tmp_path / "out", method="ties", threads=threads)
    assert taken == {piece_mib * 1024 * 1024}

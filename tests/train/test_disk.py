"""A disk that takes no more is one error that names the file, whoever was writing."""

import errno

import pytest
import torch

from train.disk import DiskError, disk_reason, writing
from train.files import write_json
from train.trajectories import append_jsonl

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FULL, "No space left on device"),
        (OSError(errno.EFBIG, "File too large"), "File too large"),
        (FileNotFoundError(errno.ENOENT, "No such file"), None),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
         "No space left on device"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
         "the disk takes no more"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
         "the disk takes no more"),
        (ValueError("a wrong value"), None),
    ],
)  # fmt: skip
def test_the_disk_is_known_by_number_or_words(error, reason):
    assert disk_reason(error) == reason


def test_what_is_no_matter_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path):
        _ = 1 / 0
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    with pytest.raises(DiskError, match="inner: cannot be written"), writing(outer), writing(inner):
        raise FULL


@pytest.fixture
def small_files():
    """Files of this process may not grow beyond 4096 bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_record_that_does_not_fit_leaves_the_old_one(tmp_path, small_files):
    path = tmp_path / "record.json"
    write_json(path, {"old": True})
    with pytest.raises(DiskError, match=r"record\.json: cannot be written \(File too large\)"):
        write_json(path, {"new": "x" * 5000})
    assert path.read_text() == '{\n  "old": true\n}\n'
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("name", ["missing/record.json", "file/record.json", "folder", "x" * 300])
def test_a_name_that_no_file_can_have_is_named_and_leaves_nothing(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DiskError, match="; name a file in a folder") as caught:
        write_json(tmp_path / name, {})
    assert str(tmp_path / name) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_line_that_does_not_fit_is_named(tmp_path, small_files):
    with pytest.raises(DiskError, match=r"lines\.jsonl: cannot be written"):
        append_jsonl(tmp_path / "lines.jsonl", [{"text": "x" * 5000}])


def test_torch_and_safetensors_are_understood(tmp_path, small_files):
    from safetensors.torch import save_file

    tensors = {"w": torch.zeros(8000)}
    for write in (torch.save, save_file):
        path = tmp_path / write.__module__
        with pytest.raises(DiskError, match="cannot be written"), writing(path):
            write(tensors, path)

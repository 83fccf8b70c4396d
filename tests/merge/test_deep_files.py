"""JSON that is nested a hundred thousand deep, and settings that are no settings."""

import json
import shutil
import struct

import pytest

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.shards import SafetensorsFile
from merge.verify import check_folder
from merge.vocabulary import compare_tokens

DEEP = "[" * 100_000 + "]" * 100_000


def test_a_header_that_is_nested_too_deep_is_broken(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode())
    with pytest.raises(MergeError, match=r"model\.safetensors: has a broken safetensors header"):
        SafetensorsFile(path)


def test_a_config_that_is_nested_too_deep_is_not_valid(tmp_path):
    (tmp_path / "config.json").write_text(DEEP)
    with pytest.raises(MergeError, match=r"config\.json: is not valid JSON .*; copy it again"):
        Checkpoint(tmp_path, "vlm")


def test_a_tokenizer_that_is_nested_too_deep_is_none(make_trio, tmp_path):
    shutil.copytree(make_trio().paths["vlm"], tmp_path / "vlm")
    (tmp_path / "vlm" / "tokenizer.json").write_text(DEEP)
    with pytest.raises(MergeError, match=r"tokenizer\.json: is not a tokenizer file; copy it"):
        compare_tokens({"vlm": Checkpoint(tmp_path / "vlm", "vlm")})


@pytest.mark.parametrize("value", ["x", [1], 7])
def test_a_text_config_that_is_no_object_is_named(tmp_path, value):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": value}))
    with pytest.raises(MergeError, match=r"config\.json: text_config is not an object"):
        Checkpoint(tmp_path, "vlm")


def test_a_record_that_is_nested_too_deep_is_no_record(tmp_path):
    (tmp_path / "merge.json").write_text(DEEP)
    with pytest.raises(MergeError, match=r"merge\.json: is no record of a merge"):
        check_folder(tmp_path)

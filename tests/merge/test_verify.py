"""A merged folder is checked to the byte, and pushed only when it is sound."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from merge.errors import MergeError
from merge.hub import public_record, push_folder
from merge.shards import SafetensorsFile
from merge.verify import check_folder, verify_folder
from tests.merge.folders import flip_byte, run, weights_of

Q = "model.layers.0.self_attn.q_proj.weight"
VISION = "visual.patch_embed.proj.weight"


@pytest.fixture(scope="module")
def merged_once(make_trio, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merged")
    shutil.copytree(make_trio(torch.bfloat16).paths["vlm"], folder / "vlm")
    trio = make_trio(torch.bfloat16)
    run(trio, folder / "out", vlm=str(folder / "vlm"), method="ties", shard_size="100KB")
    return folder


@pytest.fixture
def merged(merged_once, tmp_path):
    """A merged folder in several files, to damage; its VLM lies in `vlm` beside it."""
    shutil.copytree(merged_once, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    record["parents"]["vlm"]["source"] = str(tmp_path / "vlm")
    (tmp_path / "out" / "merge.json").write_text(json.dumps(record))
    return tmp_path / "out"


def file_of(folder: Path, name: str) -> SafetensorsFile:
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        if name in file.tensors:
            return file
    raise KeyError(name)


def rewrite(path: Path, change) -> None:
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def edit_record(folder: Path, change) -> None:
    record = json.loads((folder / "merge.json").read_text())
    change(record)
    (folder / "merge.json").write_text(json.dumps(record))


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(MergeError, match=match) as caught:
        verify_folder(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_sound_folder(merged):
    names = weights_of(merged)
    n_vision = sum(name.startswith("visual.") for name in names)
    expected = {"tensors": len(names), "vision": n_vision, "vlm": str(merged.parent / "vlm")}
    assert verify_folder(merged) == expected
    assert n_vision > 5


def test_every_tensor_is_read_once(merged, monkeypatch):
    read = []

    def checksum(file, name, _checksum=SafetensorsFile.checksum):
        read.append((file.path, name))
        return _checksum(file, name)

    monkeypatch.setattr(SafetensorsFile, "checksum", checksum)
    found = verify_folder(merged)
    assert len(read) == len(set(read)) == found["tensors"] + found["vision"]


def test_where_the_vlm_is_gone_the_record_is_what_vision_is_compared_with(merged):
    shutil.rmtree(merged.parent / "vlm")
    assert verify_folder(merged)["vlm"] is None


def test_a_flipped_byte_in_any_tensor_is_found(merged):
    for path in merged.glob("*.safetensors"):
        for name, info in SafetensorsFile(path).tensors.items():
            offset = (info.begin + info.end) // 2
            flip_byte(path, offset)
            refuse(merged, f"tensor {name} in {path.name} has other bytes than were written")
            flip_byte(path, offset)
    verify_folder(merged)


def test_many_differences_are_counted(merged):
    for path in merged.glob("*.safetensors"):
        for info in SafetensorsFile(path).tensors.values():
            flip_byte(path, info.begin)
    n_tensors = len(weights_of(merged))
    n_vision = sum(name.startswith("visual.") for name in weights_of(merged))
    refuse(merged, rf"; {n_tensors + n_vision - 5} more; merge again")


def test_a_missing_and_an_added_tensor(merged):
    index = merged / "model.safetensors.index.json"
    index.unlink()
    path = file_of(merged, Q).path
    rewrite(path, lambda t: {name: value for name, value in t.items() if name != Q})
    refuse(merged, f"tensor {Q} is missing")
    rewrite(path, lambda t: t | {"model.extra.weight": torch.ones(2)})
    refuse(merged, "tensor model.extra.weight is not of the merge")


def test_a_tensor_that_the_index_promises_and_a_file_that_is_gone(merged):
    path = file_of(merged, Q).path
    rewrite(path, lambda t: {name: value for name, value in t.items() if name != Q})
    refuse(merged, f"promises tensor {Q}")
    path.unlink()
    refuse(merged, f"{path.name} is missing")


def test_a_tensor_of_another_shape_with_the_same_bytes(merged):
    path = file_of(merged, Q).path
    rewrite(path, lambda t: t | {Q: t[Q].reshape(-1).clone()})
    refuse(merged, rf"{Q} in {path.name} is BF16 \[4096\], written was BF16 \[64, 64\]")


def test_a_tensor_of_another_dtype_with_the_same_bytes(merged):
    path = file_of(merged, Q).path
    rewrite(path, lambda t: t | {Q: t[Q].view(torch.float16)})
    refuse(merged, rf"{Q} in {path.name} is F16 \[64, 64\], written was BF16")


def test_a_vision_tower_that_was_swapped(merged):
    """Even where merge.json was made to fit it."""
    path = file_of(merged, VISION).path
    rewrite(path, lambda t: t | {VISION: t[VISION] + 1})
    refuse(merged, f"tensor {VISION} in {path.name} has other bytes")
    checksum = SafetensorsFile(path).checksum(VISION)
    edit_record(merged, lambda record: record["tensors"][VISION].update(checksum=checksum))
    refuse(merged, f"tensor {VISION} is not recorded as the VLM's own")
    edit_record(merged, lambda r: r["tensors"][VISION].update(inputs={"vlm": checksum}))
    refuse(merged, rf"tensor {VISION} differs from the VLM's in .*/vlm; merge again")


def test_a_vlm_that_changed_since(merged):
    path = merged.parent / "vlm" / "model.safetensors"
    rewrite(path, lambda t: t | {VISION: t[VISION] * 2})
    refuse(merged, f"tensor {VISION} differs from the VLM's in")


def test_a_folder_that_no_merge_wrote(merged, make_trio):
    vlm = Path(make_trio(torch.bfloat16).paths["vlm"])
    refuse(vlm, "merge.json: is missing; give a folder that `obm merge` wrote")
    refuse(merged / "nowhere", "merge.json: is missing")
    refuse(Path("~nobody-of-this-name/x"), "merge.json: is missing")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"tensors": {"a": {}}}', '{"tensors": {}}', '{"tensors": 3}']
)
def test_a_record_that_is_none(merged, text):
    (merged / "merge.json").write_text(text)
    refuse(merged, "merge.json: is no record of a merge")


def test_a_merge_that_is_not_finished(merged):
    merged.rename(merged.parent / ".out.part")
    (merged.parent / ".out.part" / "merge.json").unlink()
    refuse(merged.parent / ".out.part", "merge.json: is missing")


# ---- the hub


class Api:
    """What huggingface_hub's client was asked for."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repository, **options):
        self.calls.append(("create", repository, options))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        files = {
            path.relative_to(folder_path).as_posix(): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }
        self.calls.append(("upload", repo_id, files))
        return SimpleNamespace(commit_url="https://hub/commit/1")


@pytest.fixture
def api(monkeypatch):
    api = Api()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    return api


def test_a_sound_folder_is_pushed(merged, api):
    assert push_folder(merged, "someone/warm", private=True) == "https://hub/commit/1"
    (create, upload) = api.calls
    assert create == ("create", "someone/warm", {"private": True, "exist_ok": True})
    assert upload[:2] == ("upload", "someone/warm")
    written = {path.name: path.read_bytes() for path in merged.iterdir()}
    record = json.loads(written.pop("merge.json"))
    public = json.loads(upload[2].pop("merge.json"))
    assert upload[2] == written
    assert public.pop("published") is True
    assert public["parents"]["vlm"]["source"] == "vlm" != record["parents"]["vlm"]["source"]
    for role, parent in record["parents"].items():
        parent["source"] = public["parents"][role]["source"]
    assert public == record
    assert 'from_pretrained("someone/warm")' in (merged / "README.md").read_text()


def test_nothing_that_is_pushed_names_a_place_of_this_machine(merged, api, tmp_path):
    """Also where a parent is not there any more, and for statistics and an adapter."""
    path = merged / "merge.json"
    record = json.loads(path.read_text())
    record["parents"]["base"]["source"] = "Qwen/Qwen2.5-0.5B@v1"
    record["parents"]["agent"]["source"] = "/home/someone/secret/agent"
    record["stats"]["vlm/diagonal"] = {"source": "/home/someone/secret/stats.safetensors"}
    path.write_text(json.dumps(record))
    push_folder(merged, "someone/warm", private=True)
    files = api.calls[-1][2]
    assert not [
        n for n, text in files.items() if b"secret" in text or str(tmp_path).encode() in text
    ]
    public = json.loads(files["merge.json"])
    assert public["parents"]["base"]["source"] == "Qwen/Qwen2.5-0.5B@v1"
    assert public["parents"]["agent"]["source"] == "agent"
    assert public["stats"]["vlm/diagonal"] == {"source": "stats.safetensors"}
    assert json.loads(path.read_text()) == record

    settings = {"base_model_name_or_path": "/home/someone/secret/vlm", "r": 4}
    adapter = {"source": "/home/someone/secret/run", "settings": settings, "tensors": 2}
    public = public_record({"parents": {}, "adapter": adapter})
    assert public["adapter"]["source"] == "run"
    assert public["adapter"]["settings"] == {"base_model_name_or_path": "vlm", "r": 4}
    assert settings["base_model_name_or_path"] == "/home/someone/secret/vlm"
    nameless = {"source": "run", "settings": {"r": 4}, "tensors": 2}
    assert public_record({"parents": {}, "adapter": nameless})["adapter"]["settings"] == {"r": 4}


def test_a_published_merge_is_not_compared_with_a_folder_that_has_the_vlms_name(
    merged, api, tmp_path, monkeypatch
):
    push_folder(merged, "someone/warm", private=True)
    (merged / "merge.json").write_bytes(api.calls[-1][2]["merge.json"])
    monkeypatch.chdir(tmp_path)
    flip_byte(tmp_path / "vlm" / "model.safetensors", -1)
    assert verify_folder("out")["vlm"] is None


def test_a_damaged_folder_is_not_pushed(merged, api):
    path = file_of(merged, Q).path
    flip_byte(path, -1)
    with pytest.raises(MergeError, match="other bytes than were written"):
        push_folder(merged, "someone/warm", private=False)
    assert api.calls == []


def test_a_hub_that_refuses_is_one_clear_error(merged, api):
    from huggingface_hub.errors import HFValidationError

    def refuse_name(repository, **_):
        raise HFValidationError("Repo id must be in the form 'name'\nor 'owner/name'")

    api.create_repo = refuse_name
    with pytest.raises(MergeError, match=r"--push-to-hub a/b/c: the hub refuses") as caught:
        push_folder(merged, "a/b/c", private=False)
    assert "\n" not in str(caught.value)
    assert "hf auth login" in str(caught.value)


def test_a_push_that_the_network_or_the_card_stops_is_one_clear_error(merged, api):
    class ConnectError(Exception):
        """As the client's transport has it: of no class that it shares with others."""

    for error in (ConnectError("no route"), ValueError("Invalid metadata in README.md.\n- bad")):

        def fail(error=error, **_):
            raise error

        api.upload_folder = fail
        words = rf"the hub refuses \({type(error).__name__}: .*hf upload someone/warm .*out`"
        with pytest.raises(MergeError, match=words) as caught:
            push_folder(merged, "someone/warm", private=False)
        assert "\n" not in str(caught.value)


def test_headers_alone_tell_another_dtype_but_not_a_flipped_byte(merged):
    check_folder(merged)
    file = file_of(merged, Q)
    flip_byte(file.path, file.tensors[Q].begin)
    check_folder(merged)
    rewrite(file.path, lambda tensors: {**tensors, Q: tensors[Q].float()})
    with pytest.raises(MergeError, match=f"tensor {Q} in .* is F32 .*, written was BF16"):
        check_folder(merged)

"""Checkpoints from folders and, through the real hub client, from a hub on the loopback."""

import hashlib
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import xxhash
from safetensors.numpy import save_file

from merge.checkpoint import Checkpoint
from merge.errors import MergeError

ROOT = Path(__file__).parents[2]
OLD, NEW = "1" * 40, "2" * 40
NORM = np.arange(4, dtype=np.float32)


def write_checkpoint(folder: Path, shards: int = 1, index: bool = True, **names) -> Path:
    """A folder with config.json and small tensors, one file each if there are several."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    tensors = {"model.norm.weight": NORM, "lm_head.weight": np.ones((2, 3), np.float32)}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = dict(zip(tensors, files, strict=True))
    for name, file in weight_map.items():
        save_file({name: tensors[name]}, folder / file)
    if index:
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)
    return folder


def refuse(source, match: str, role: str = "vlm") -> None:
    with pytest.raises(MergeError, match=match):
        Checkpoint(source, role)


# ---------------------------------------------------------------- folders


@pytest.mark.parametrize(("shards", "index"), [(1, False), (2, True), (2, False)])
def test_tensors_are_found_in_one_file_or_several(tmp_path, shards, index):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "x", shards, index), "base")
    assert set(checkpoint.tensors) == {"model.norm.weight", "lm_head.weight"}
    assert checkpoint.read("model.norm.weight").tolist() == [0, 1, 2, 3]
    assert checkpoint.read("lm_head.weight").shape == (2, 3)
    assert len(checkpoint.files) == shards
    assert checkpoint.file_of("lm_head.weight").path.parent == tmp_path / "x"
    assert checkpoint.revision is None


def test_a_checksum_is_over_the_stored_bytes(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path / "x", 2), "base")
    expected = xxhash.xxh3_128(NORM.tobytes()).hexdigest()
    assert checkpoint.checksum("model.norm.weight") == expected


def test_reading_a_checkpoint_does_not_import_torch(tmp_path):
    folder = write_checkpoint(tmp_path / "x")
    code = (
        "import sys; from merge.checkpoint import Checkpoint; import merge.plan;"
        f"Checkpoint({str(folder)!r}, 'vlm'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_tied_embeddings_are_stated_inside_or_outside_of_the_text_config(tmp_path):
    folder = write_checkpoint(tmp_path / "x")
    for config, tied in (
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ):
        (folder / "config.json").write_text(json.dumps(config))
        assert Checkpoint(folder, "vlm").ties_embeddings is tied


def test_a_missing_shard_is_named_with_and_without_an_index(tmp_path):
    for name, index in (("a", True), ("b", False)):
        folder = write_checkpoint(tmp_path / name, 2, index)
        (folder / "model-00002-of-00002.safetensors").unlink()
        refuse(folder, "model-00002-of-00002.safetensors is missing")


def test_an_index_that_the_files_do_not_keep_is_an_error(tmp_path):
    folder = write_checkpoint(tmp_path / "x", 2)
    save_file({"other": NORM}, folder / "model-00002-of-00002.safetensors")
    refuse(folder, r"promises tensor lm_head\.weight in model-00002-of-00002\.safetensors")


def test_an_index_that_is_left_of_earlier_shards_does_not_count(tmp_path):
    folder = write_checkpoint(tmp_path / "x", 2)
    stale = (folder / "model.safetensors.index.json").read_text()
    whole = write_checkpoint(tmp_path / "y")
    (whole / "model.safetensors.index.json").write_text(stale)
    checkpoint = Checkpoint(whole, "base")
    assert [file.path.name for file in checkpoint.files] == ["model.safetensors"]
    assert "model.norm.weight" in checkpoint.tensors


def test_an_index_cannot_name_files_elsewhere(tmp_path):
    folder = write_checkpoint(tmp_path / "x", 2)
    content = json.dumps({"weight_map": {"a": "../y/model.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(content)
    refuse(folder, "not a plain file name")


def test_a_tensor_in_two_files_is_an_error(tmp_path):
    folder = write_checkpoint(tmp_path / "x", 2, index=False)
    save_file({"model.norm.weight": NORM}, folder / "model-00002-of-00002.safetensors")
    refuse(folder, "is also in")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickles_are_refused(tmp_path, name):
    folder = write_checkpoint(tmp_path / "x")
    (folder / "model.safetensors").rename(folder / name)
    refuse(folder, "pickled weights only, and opening a pickle can run code")


def test_an_adapter_an_empty_folder_and_a_file_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "x")
    refuse(folder / "config.json", "is a file; give the checkpoint's folder")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    refuse(folder, "is a LoRA adapter")
    (folder / "adapter_model.safetensors").unlink()
    refuse(folder, r"has no model\.safetensors; check models\.donors\.reasoner", "reasoner")
    (folder / "config.json").unlink()
    refuse(folder, r"has no config\.json")


def test_a_mistyped_path_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    refuse("runs/vln", r"no such folder; check models\.vlm")
    refuse("/no/where", r"no such folder; check models\.donors\.coder", "coder")


# ---------------------------------------------------------------- the hub


class Hub:
    """The part of the hub's API that a download uses: repository -> commit -> folder."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.names = {"main": NEW, "v1": OLD, "refs/pr/1": OLD}
        self.served: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self)

            do_HEAD = do_GET

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path).strip("/")
        is_api = path.startswith("api/models/")
        repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.removeprefix("api/models/").removeprefix(repository).strip("/")
        commits = self.repositories.get(repository)
        if commits is None:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        kind, _, rest = rest.partition("/")
        if is_api:
            commit = self.names.get(rest, rest)
            if commit not in commits:
                return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if kind == "tree":
                entries = [self.entry(commits[commit], file) for file in files(commits[commit])]
                return self.send(request, 200, json.dumps(entries).encode(), {})
            siblings = [{"rfilename": name_in(commits[commit], f)} for f in files(commits[commit])]
            content = {"id": repository, "modelId": repository, "sha": commit, "private": False}
            body = json.dumps(content | {"tags": [], "downloads": 0, "siblings": siblings})
            return self.send(request, 200, body.encode(), {})
        commit, _, name = rest.partition("/")
        content = (commits[commit] / name).read_bytes()
        self.served.append(name)
        etag = hashlib.sha1(content).hexdigest()
        return self.send(request, 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    @staticmethod
    def entry(folder: Path, file: Path) -> dict:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        size = file.stat().st_size
        return {"type": "file", "oid": oid, "size": size, "path": name_in(folder, file)}

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict) -> None:
        request.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def name_in(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def repository(hub, tmp_path):
    """org/model: one file at the old commit, two with an index at the newest."""
    commits = {
        OLD: write_checkpoint(tmp_path / "hub" / "old"),
        NEW: write_checkpoint(tmp_path / "hub" / "new", 2),
    }
    hub.repositories["org/model"] = commits
    return commits


@pytest.mark.parametrize(
    ("source", "commit", "n_files"),
    [
        ("org/model", NEW, 2),
        ("org/model@main", NEW, 2),
        ("org/model@v1", OLD, 1),
        ("org/model@refs/pr/1", OLD, 1),
        (f"org/model@{OLD}", OLD, 1),
    ],
)
def test_a_hub_id_gives_the_files_of_its_revision(repository, source, commit, n_files):
    checkpoint = Checkpoint(source, "agent")
    assert checkpoint.revision == commit
    assert checkpoint.source == source
    assert len(checkpoint.files) == n_files
    assert checkpoint.read("model.norm.weight").tolist() == [0, 1, 2, 3]


def test_a_second_use_reads_the_cache(hub, repository):
    Checkpoint("org/model", "agent")
    n_served = len(hub.served)
    assert n_served
    Checkpoint("org/model", "agent")
    assert len(hub.served) == n_served


def test_neither_pickles_nor_second_copies_nor_programs_are_downloaded(hub, repository):
    folder = repository[NEW]
    (folder / "original").mkdir()
    (folder / "tokenizer.model").write_bytes(b"x")
    skipped = ["model.bin", "original/a.safetensors", "consolidated.safetensors", "modeling.py"]
    for name in skipped:
        (folder / name).write_bytes(b"x")
    checkpoint = Checkpoint("org/model", "agent")
    assert not set(skipped) & set(hub.served)
    assert {"config.json", "tokenizer.model"} <= {path.name for path in files(checkpoint.folder)}


def test_a_repository_of_pickles_is_refused(hub, repository):
    folder = repository[OLD]
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuse("org/model@v1", r"vlm org/model@v1: has no safetensors; pickled weights are not")
    assert "pytorch_model.bin" not in hub.served


def test_a_repository_or_revision_that_does_not_exist_is_named(repository):
    refuse("org/modle", r"vlm org/modle: .*no such repository.* check models\.vlm")
    refuse("org/model@v9", r"org/model@v9: the repository has no revision 'v9'.*models\.vlm")


def test_a_hub_that_cannot_be_reached_is_named(hub):
    hub.server.shutdown()
    hub.server.server_close()
    refuse("org/model", r"vlm org/model: no such folder, and the hub does not give it .*network")


def test_a_folder_comes_before_a_repository_of_its_name(hub, repository, tmp_path):
    write_checkpoint(tmp_path / "org" / "model")
    assert Checkpoint("org/model", "agent").revision is None
    assert hub.served == []

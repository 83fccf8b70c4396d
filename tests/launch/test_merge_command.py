"""`obm merge`: the plan, the merge, verify, the hub, and one clear line for each mistake."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.commands import merge as merge_module
from merge.methods import METHODS

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A trio of text models of one layer."""
    folder = tmp_path_factory.mktemp("trio")
    generator = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (8, 4), Q: (4, 4), "model.norm.weight": (4,),
              "model.layers.0.mlp.up_proj.weight": (6, 4)}  # fmt: skip
    base = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    for role, noise in (("base", 0.0), ("vlm", 0.1), ("agent", 0.1)):
        (folder / role).mkdir()
        config = {"model_type": "qwen2", "tie_word_embeddings": True}
        (folder / role / "config.json").write_text(json.dumps(config))
        tensors = {
            name: (value + generator.normal(size=value.shape) * noise).astype(np.float32)
            for name, value in base.items()
        }
        save_file(tensors, folder / role / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def obm_merge(obm, folders, tmp_path, monkeypatch):
    """`obm merge` of that trio by ties into tmp_path/out; further arguments come last."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, output="out"):
        models = [f"models.{role}={folders / role}" for role in ("base", "vlm", "agent")]
        return obm("merge", *models, "merge.method=ties", "--output", output, *arguments)

    return call


def assert_refused(answer, words: str) -> None:
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_dry_run_prints_what_happens_to_every_tensor_and_writes_nothing(obm_merge, tmp_path):
    code, out, _ = obm_merge("--dry-run", "merge.density=0.3")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == ["action", "count", "shape", "dtype", "tensor", "reason"]
    assert any(Q.replace(".0.", ".*.") in line and "scope linear: ties" in line for line in lines)
    assert "3 tensors merged, 1 copied" in lines
    assert re.match(r"reads \d+\.\d kB, writes \d+\.\d kB in 1 file; about ", lines[-1])
    assert re.search(r" \d{3}\.\d MB of memory and ", lines[-1])
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_home_of_nobody_is_refused(obm_merge):
    path = "~nobody-of-this-name/out"
    assert_refused(obm_merge(output=path), f"{path}: cannot be a folder (")


def test_an_output_below_home_gets_all_of_the_merge(obm_merge, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert obm_merge(output="~/out")[0] == 0
    assert (tmp_path / "home" / "out" / "cost.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_a_tensor_that_is_unaccounted_for_is_exit_code_2(obm_merge, folders, tmp_path):
    shutil.copytree(folders / "agent", tmp_path / "agent")
    path = tmp_path / "agent" / "model.safetensors"
    extra = {"model.layers.0.mlp.gate.weight": np.ones((2, 2), np.float32)}
    save_file(load_file(path) | extra, path)
    answer = obm_merge("--dry-run", f"models.agent={tmp_path / 'agent'}")
    assert_refused(answer, "model.layers.0.mlp.gate.weight is not part of qwen2")


def test_a_merge_is_written_and_verified(obm_merge, obm, tmp_path):
    code, out, _ = obm_merge("merge.density=0.3", "merge.weights.agent=0.5")
    assert (code, out) == (0, "ties: out\n")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["method"] == "ties"
    assert record["settings"]["density"] == 0.3
    assert record["settings"]["weights"] == {"vlm": 1.0, "agent": 0.5}
    code, out, _ = obm("merge", "verify", "out")
    assert code == 0
    assert out.startswith("out: 4 tensors sound, 0 vision tensors as in ")


def test_settings_of_the_file_reach_the_engine(obm_merge, folders, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"output: runs/x\nmodels:\n  base: {folders / 'base'}\n  vlm: {folders / 'vlm'}\n"
        f"  agent: {folders / 'agent'}\n  donors: {{second: {folders / 'agent'}}}\n"
        "merge:\n  method: ties\n  shard_size: '100'\n  budget: global\n  threads: 2\n"
        "  rules:\n  - {match: up_proj, density: 0.1}\n  - {match: q_proj, method: vlm}\n"
    )
    code, _, err = obm_merge("--config", "recipe.yaml", "--stats", "nowhere")
    assert code == 0, err
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert list(record["parents"]) == ["base", "vlm", "agent", "second"]
    assert record["settings"]["budget"] == "global"
    assert record["rules"][0]["density"] == 0.1
    assert record["tensors"][Q]["action"] == "vlm"
    assert len(record["output"]["files"]) > 1


def test_the_output_lies_beside_the_settings_output_by_its_method(
    obm_merge, obm, folders, tmp_path
):
    models = [f"models.{role}={folders / role}" for role in ("base", "vlm", "agent")]
    code, out, _ = obm("merge", *models, "merge.method=linear", "output=runs/first")
    assert (code, out) == (0, "linear: runs/merged/linear\n")
    assert (tmp_path / "runs" / "merged" / "linear" / "merge.json").exists()


def test_an_existing_output_needs_a_flag(obm_merge, tmp_path):
    assert obm_merge()[0] == 0
    assert_refused(obm_merge(), "exists; choose another output, or pass --overwrite")
    assert obm_merge("--overwrite", "merge.density=0.1")[0] == 0
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert record["settings"]["density"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge.method=tied"], "merge.method"),
        (["merge.density=2"], "merge.density"),
        (["merge.threads=0"], "merge.threads"),
        (["merge.shard_size=much"], "merge.shard_size"),
        (["merge.budget=layers"], "merge.budget"),
        (["merge.scope.vision=vlm"], "merge.scope.vision"),
        (["merge.rules=[{match: nothing_here, density: 0.1}]"], "merge.rules[0].match"),
        (["merge.weights.agnet=1"], "merge.weights.agnet"),
        (["merge.method=layer_swap"], "merge.layers"),
        (["merge.method=obm", "--stats", "nowhere"], "obm calibrate"),
        (["models.donors.second=nowhere"], "no checkpoint folder 'nowhere'"),
        (["--agreement"], "--sweep"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(obm_merge, tmp_path, arguments, words):
    for more in ([], ["--dry-run"]):
        assert_refused(obm_merge(*arguments, *more), words)
    assert list(tmp_path.iterdir()) == []


def test_verify_names_what_is_wrong(obm_merge, obm, tmp_path):
    assert_refused(obm("merge", "verify"), "which folder?")
    assert_refused(obm("merge", "verify", "out"), "merge.json: is missing")
    obm_merge()
    path = tmp_path / "out" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_refused(obm("merge", "verify", "out"), "has other bytes than were written")


def test_an_interrupted_merge_is_exit_code_130(obm_merge, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(merge_module, "merge_checkpoints", interrupt)
    code, _, err = obm_merge()
    assert (code, err) == (130, "interrupted\n")


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub's client; lists its calls."""
    calls = []

    class Api:
        def create_repo(self, repository, *, private, exist_ok):
            calls.append((repository, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls


@pytest.mark.parametrize("private", [False, True])
def test_a_merge_is_pushed_with_its_card(obm_merge, hub, private):
    code, out, _ = obm_merge("--push-to-hub", "someone/warm", *(["--private"] if private else []))
    assert code == 0
    assert out.splitlines()[-1] == "https://hub/someone/warm/commit/1"
    files = ["README.md", "config.json", "cost.json", "merge.json", "model.safetensors"]
    assert hub == [("someone/warm", private, True), ("someone/warm", files)]


def test_a_dry_run_pushes_nothing(obm_merge, hub):
    assert obm_merge("--push-to-hub", "someone/warm", "--dry-run")[0] == 0
    assert hub == []


def test_a_name_that_the_hub_refuses_keeps_the_merge(obm_merge, monkeypatch, tmp_path):
    """The real client refuses the name before it asks the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = obm_merge("--push-to-hub", "no good name")
    assert code == 2
    assert "--push-to-hub no good name: the hub refuses" in err
    assert err.count("\n") == 1
    assert (tmp_path / "out" / "merge.json").exists()


def test_the_settings_allow_every_method_and_no_other():
    from typing import get_args

    from configs.sections import Elementwise, Method

    assert set(get_args(Method)) == set(METHODS)
    elementwise = {name for name, method in METHODS.items() if not method.linear_only}
    assert set(get_args(Elementwise)) == elementwise | {"vlm", "agent", "base"}

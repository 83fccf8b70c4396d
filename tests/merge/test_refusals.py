"""Inputs and settings that cannot be merged: one clear error each, nothing written or changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.stats import open_stats, save_stats
from tests.merge.folders import (
    change_tensors,
    flip_byte,
    recast,
    refuse,
    run,
    weights_of,
    write_stats,
)

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def first_shard(trio, role: str) -> Path:
    return min(Path(trio.paths[role]).glob("*.safetensors"))


# ---- folders and files


@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_a_missing_checkpoint(make_trio, tmp_path, role):
    missing = str(tmp_path / "nowhere")
    match = f"{role} .*nowhere: no such folder.*models.{role}"
    refuse(tmp_path, match, make_trio(), **{role: missing})


def test_the_home_of_nobody(make_trio, tmp_path):
    trio, path = make_trio(), "~nobody-of-this-name/x"
    refuse(tmp_path, f"agent {path}: no such folder; check models.agent", trio, agent=path)
    with pytest.raises(MergeError, match=rf"{path}: cannot be a folder \(.*choose another output"):
        run(trio, path, method="ties")


def test_a_missing_donor(make_trio, tmp_path):
    donors = {"reasoner": str(tmp_path / "nowhere")}
    refuse(tmp_path, "reasoner .*models.donors.reasoner", make_trio(), donors=donors)


def test_a_hub_id_is_looked_up_unless_its_first_part_is_a_folder_here(
    make_trio, tmp_path, monkeypatch
):
    trio = make_trio()
    asked = []

    def download(source, **_):
        asked.append(source)
        if source == "someone/vlm":
            return trio.paths["vlm"]
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    record = run(trio, tmp_path / "out", vlm="someone/vlm", method="ties", dry_run=True)
    assert record["dry_run"]
    refuse(tmp_path, r"the hub does not give it \(OSError: offline", trio, agent="someone/else")
    (tmp_path / "runs").mkdir()
    refuse(tmp_path, r"agent runs/else: no such folder; check", trio, agent="runs/else")
    assert asked == ["someone/vlm", "someone/else"]


@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_a_truncated_shard_is_found_before_anything_is_written(fresh_trio, tmp_path, role):
    shard = max(Path(fresh_trio.paths[role]).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    refuse(tmp_path, f"{shard.name}: is truncated .*copy it again", fresh_trio)


@pytest.mark.parametrize("size", [0, 5, 12, 200])
def test_a_shard_that_ends_in_its_header(fresh_trio, tmp_path, size):
    shard = first_shard(fresh_trio, "vlm")
    shard.write_bytes(shard.read_bytes()[:size])
    refuse(tmp_path, f"{shard.name}: is truncated", fresh_trio)


@pytest.mark.parametrize("pieces", [False, True])
def test_a_shard_that_is_truncated_while_the_merge_runs(fresh_trio, tmp_path, monkeypatch, pieces):
    from merge import engine

    shard, check = first_shard(fresh_trio, "agent"), engine.check_output

    def check_and_truncate(*arguments):
        check(*arguments)
        shard.write_bytes(shard.read_bytes()[:-100])

    monkeypatch.setattr(engine, "check_output", check_and_truncate)
    if pieces:
        monkeypatch.setattr("merge.writer.RESIDENT_BYTES", 0)
        monkeypatch.setattr("merge.writer.PIECE_BYTES", 3000)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MergeError, match=f"{shard.name}: ends inside tensor .*copy it again"):
        run(fresh_trio, tmp_path / "out", method="ties")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_that_is_no_safetensors(fresh_trio, tmp_path):
    shard = first_shard(fresh_trio, "base")
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refuse(tmp_path, "not a safetensors file", fresh_trio)
    shard.write_bytes((4).to_bytes(8, "little") + b"[1 2")
    refuse(tmp_path, "broken safetensors header", fresh_trio)


@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_a_missing_shard(fresh_trio, tmp_path, role):
    shard = max(Path(fresh_trio.paths[role]).glob("*.safetensors"))
    shard.unlink()
    refuse(tmp_path, f"{role} .*{shard.name} is missing", fresh_trio)
    (Path(fresh_trio.paths[role]) / "model.safetensors.index.json").unlink()
    refuse(tmp_path, f"{role} .*{shard.name} is missing", fresh_trio)


def test_a_folder_of_pickles_or_of_nothing(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refuse(tmp_path, "has no model.safetensors", fresh_trio)
    torch.save({}, folder / "pytorch_model.bin")
    refuse(tmp_path, "agent .*pickle.*save_pretrained", fresh_trio)


def test_a_lora_adapter(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    refuse(tmp_path, "LoRA adapter.*obm merge adapter", fresh_trio)


def test_a_missing_or_broken_config(fresh_trio, tmp_path):
    config = Path(fresh_trio.paths["base"]) / "config.json"
    config.write_text("{")
    refuse(tmp_path, "config.json: is not valid JSON", fresh_trio)
    config.unlink()
    refuse(tmp_path, "has no config.json", fresh_trio)


def test_an_index_that_promises_too_much(fresh_trio, tmp_path):
    path = Path(fresh_trio.paths["vlm"]) / "model.safetensors.index.json"
    shard = first_shard(fresh_trio, "vlm").name
    edit_json(path, lambda index: index["weight_map"].update({"model.layers.9.x": shard}))
    refuse(tmp_path, "promises tensor model.layers.9", fresh_trio)
    edit_json(path, lambda index: index["weight_map"].update({"x": "../elsewhere.safetensors"}))
    refuse(tmp_path, "not a plain file name", fresh_trio)


# ---- models that do not belong together


def test_other_vocabularies_where_embeddings_are_merged(make_trio, tmp_path, builders):
    folder = str(tmp_path / "agent")
    builders["text_model"](vocab_size=80).save_pretrained(folder)
    scope = {"embedding": "task_arithmetic"}
    match = "embed_tokens.weight: agent has 80 rows, the VLM 64: the vocabularies differ"
    refuse(tmp_path, match, make_trio(), agent=folder, scope=scope)


def test_equal_sizes_do_not_hide_other_tokens(fresh_trio, tmp_path):
    for role, tokens in (("vlm", "ab"), ("base", "ab"), ("agent", "ba")):
        vocabulary = {token: index for index, token in enumerate(tokens)}
        content = {"model": {"vocab": vocabulary}, "added_tokens": [{"content": "<x>", "id": 2}]}
        (Path(fresh_trio.paths[role]) / "tokenizer.json").write_text(json.dumps(content))
    refuse(tmp_path, "token 'b' has id 0, in the VLM 1", fresh_trio)


def test_other_shapes_are_named_with_the_tensor(make_trio, tmp_path, builders):
    folder = str(tmp_path / "base")
    builders["text_model"](intermediate_size=128).save_pretrained(folder)
    match = r"mlp.\w+_proj.weight: base .*shape \[(128, 64|64, 128)\], the VLM \[(96, 64|64, 96)\]"
    refuse(tmp_path, match, make_trio(), base=folder)


@pytest.mark.parametrize("layers", [1, 3])
def test_another_depth(make_trio, tmp_path, builders, layers):
    folder = str(tmp_path / "agent")
    builders["text_model"](num_hidden_layers=layers).save_pretrained(folder)
    refuse(tmp_path, f"num_hidden_layers is {layers}", make_trio(), agent=folder)


def test_a_donor_whose_rotary_embedding_has_another_base(make_trio, tmp_path):
    folder = tmp_path / "donor"
    shutil.copytree(make_trio().paths["agent"], folder)
    edit_json(folder / "config.json", lambda c: c["rope_parameters"].update(rope_theta=5.0))
    match = "donor .*rope_theta is 5.0, the VLM's is 10000.0"
    refuse(tmp_path, match, make_trio(), donors={"donor": str(folder)})


def test_a_tensor_that_nobody_knows(fresh_trio, tmp_path):
    folder, name = Path(fresh_trio.paths["agent"]), "model.layers.0.gate.weight"
    save_file({name: torch.ones(2)}, folder / "extra.safetensors")
    index = folder / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].update({name: "extra.safetensors"}))
    refuse(tmp_path, f"tensor {name} is not part of qwen2", fresh_trio)


def test_an_unsupported_architecture(fresh_trio, tmp_path):
    config = Path(fresh_trio.paths["base"]) / "config.json"
    edit_json(config, lambda content: content.update(model_type="mamba", architectures=["Mamba"]))
    refuse(tmp_path, "'mamba'", fresh_trio)


# ---- damaged weights


def test_a_flipped_byte_in_a_header(fresh_trio, tmp_path):
    shard = first_shard(fresh_trio, "agent")
    content = shard.read_bytes()
    n_header = int.from_bytes(content[:8], "little")
    generator = np.random.default_rng(0)
    for offset in (*range(6), *(8 + generator.integers(0, n_header, 25))):
        flip_byte(shard, int(offset))
        if json_differs(content, shard.read_bytes(), n_header):
            refuse(tmp_path, ".", fresh_trio)
        shard.write_bytes(content)


def json_differs(one: bytes, other: bytes, n_header: int) -> bool:
    """Whether a damaged header still says the same: padding, or an entry of the metadata."""
    try:
        headers = [json.loads(content[8 : 8 + n_header]) for content in (one, other)]
    except ValueError:
        return True
    for header in headers:
        header.pop("__metadata__", None)
    return headers[0] != headers[1] or one[:8] != other[:8]


def test_a_dtype_that_the_format_does_not_have(fresh_trio, tmp_path):
    shard = first_shard(fresh_trio, "vlm")
    shard.write_bytes(shard.read_bytes().replace(b'"dtype":"F32"', b'"dtype":"G32"', 1))
    refuse(tmp_path, f"{shard.name}: tensor .* has dtype G32", fresh_trio)


@pytest.mark.parametrize("name", [Q, DOWN])
@pytest.mark.parametrize("kind", ["diagonal", "fisher", "gram"])
def test_a_flipped_byte_in_weights_that_statistics_were_made_with(fresh_trio, tmp_path, name, kind):
    shapes = {key: value.shape for key, value in weights_of(fresh_trio.paths["agent"]).items()}
    for seed, task in enumerate(("vlm", "agent")):
        parent = Checkpoint(fresh_trio.paths[task], task)
        weights = {key: parent.checksum(key) for key in shapes}
        write_stats(tmp_path / "stats" / task, seed, shapes, weights)
    stats = {task: str(tmp_path / "stats" / task) for task in ("vlm", "agent")}
    method = {"diagonal": "obm", "fisher": "fisher", "gram": "regmean"}[kind]
    run(fresh_trio, tmp_path / "sound", method=method, stats=stats)
    parent = Checkpoint(fresh_trio.paths["agent"], "agent")
    flip_byte(parent.file_of(name).path, parent.tensors[name].end - 3)
    match = rf"other weights than agent .*{name} differs\); calibrate again"
    refuse(tmp_path, match, fresh_trio, method=method, stats=stats)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("role", ["base", "vlm", "agent"])
def test_weights_that_are_not_finite(fresh_trio, tmp_path, role, value):
    tensor = weights_of(fresh_trio.paths[role])[Q].clone()
    tensor.view(-1)[3] = value
    path = change_tensors(fresh_trio.paths[role], **{Q: tensor})
    for method in ("ties", "wudi"):
        match = f"{role} {path}: tensor {Q} holds NaN or infinity; use a checkpoint that is sound"
        refuse(tmp_path, match, fresh_trio, method=method, steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copied_tensor_of_the_agent_that_is_not_finite(make_trio, tmp_path, dtype):
    agent = recast(make_trio().paths["agent"], tmp_path / "agent", dtype)
    tensor = weights_of(agent)[EMBEDDINGS[0]].clone()
    tensor.view(-1)[3] = float("nan")
    path = change_tensors(agent, **{EMBEDDINGS[0]: tensor})
    match = f"agent {path}: tensor {EMBEDDINGS[0]} holds NaN or infinity"
    refuse(tmp_path, match, make_trio(), agent=agent, scope={"embedding": "agent"})


def test_a_merged_value_that_does_not_fit_fp16(make_trio, tmp_path):
    weights = {"vlm": 1e8, "agent": 1.0}
    match = "model.*: a merged value does not fit F16; lower merge.weights"
    refuse(tmp_path, match, make_trio(torch.float16), weights=weights)


@pytest.mark.parametrize("agent_dtype", [torch.bfloat16, torch.float32])
def test_a_merged_value_that_only_fp32_holds_does_not_fit_bf16(tmp_path, make_trio, agent_dtype):
    # 2.005 * 1.6948e38 is below fp32's largest, 3.4028e38, but nearer to 2^128 than to bf16's
    # largest, 3.3895e38
    paths = {}
    for role, dtype in (("base", torch.bfloat16), ("vlm", torch.bfloat16), ("agent", agent_dtype)):
        paths[role] = recast(make_trio().paths[role], tmp_path / role, dtype)
        value = 0.0 if role == "base" else 2.0**127 - 2.0**119
        tensor = torch.full_like(weights_of(paths[role])[Q], value)
        change_tensors(paths[role], **{Q: tensor})
    trio = type("HugeTrio", (), {"paths": paths})
    weights = {"vlm": 1.0, "agent": 1.005}
    refuse(tmp_path, f"{Q}: a merged value does not fit BF16", trio, weights=weights)


# ---- settings and statistics


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "slerp"}, "merge.method: 'slerp'.*obm"),
        ({"density": 1.5}, "merge.density: 1.5"),
        ({"density": float("nan")}, "merge.density"),
        ({"window": -0.1}, "merge.window"),
        ({"method": "della", "density": 0.95, "window": 0.1}, "merge.window: della"),
        ({"weights": {"vlm": 1.0, "agnet": 1.0}}, "merge.weights.agnet: is no model of this merge"),
        ({"weights": {"vlm": 1.0, "agent": float("inf")}}, "merge.weights.agent"),
        ({"weights": {"vlm": "1"}}, "merge.weights.vlm"),
        ({"normalization": "max"}, "merge.normalization: 'max'.*none, mean, rank"),
        ({"combine": "product"}, "merge.combine: 'product'"),
        ({"saliency": "full"}, "merge.saliency: 'full'"),
        ({"budget": "model"}, "merge.budget: 'model'"),
        ({"method": "dare", "budget": "global"}, "merge.budget=global: dare"),
        ({"densty": 0.5}, "densty"),
        ({"threads": -1}, "merge.threads: -1"),
        ({"shard_size": "5 cows"}, "merge.shard_size: '5 cows'.*5GB"),
        ({"vocabulary": "other"}, "merge.vocabulary: 'other'"),
        ({"scope": {"vision": "vlm"}}, "merge.scope.vision"),
        ({"scope": {"norm_bias": "obm"}}, "merge.scope.norm_bias: obm"),
        ({"scope": {"linear": "nothing"}}, "merge.scope.linear: 'nothing'"),
        ({"method": "layer_swap", "layers": "1-2"}, "merge.layers: 1-2 is out of range"),
    ],
)
def test_unknown_settings(make_trio, tmp_path, changes, match):
    refuse(tmp_path, match, make_trio(), **changes)


def test_kernels_that_do_not_exist(make_trio, tmp_path, monkeypatch):
    monkeypatch.setenv("OBM_KERNELS", "cuda")
    refuse(tmp_path, "OBM_KERNELS: 'cuda' is unknown; choose numba", make_trio())


@pytest.mark.parametrize("dry_run", [False, True])
def test_statistics_of_other_weights_are_refused_in_a_dry_run_too(make_trio, tmp_path, dry_run):
    trio = make_trio()
    shapes = {key: value.shape for key, value in weights_of(trio.paths["agent"]).items()}
    for seed, task in enumerate(("vlm", "agent")):
        write_stats(tmp_path / "stats" / task, seed, shapes, dict.fromkeys(shapes, "0" * 32))
    stats = {task: str(tmp_path / "stats" / task) for task in ("vlm", "agent")}
    match = r"other weights than vlm .*calibrate again"
    refuse(tmp_path, match, trio, method="obm", stats=stats, dry_run=dry_run)


def test_embeddings_without_fisher_information_are_told_what_can_merge_them(make_trio, tmp_path):
    trio = make_trio()
    shapes = {
        key: value.shape
        for key, value in weights_of(trio.paths["agent"]).items()
        if key not in EMBEDDINGS
    }
    for seed, task in enumerate(("vlm", "agent")):
        write_stats(tmp_path / "stats" / task, seed, shapes)
    stats = {task: str(tmp_path / "stats" / task) for task in ("vlm", "agent")}
    match = r"embed_tokens.*: choose merge\.scope\.embedding=vlm or task_arithmetic"
    refuse(tmp_path, match, trio, method="fisher", stats=stats, scope={"embedding": "sar"})


def test_obm_without_fitting_statistics(make_trio, stats, tmp_path):
    trio = make_trio()
    refuse(tmp_path, "needs diagonal statistics of vlm; run `obm calibrate", trio, method="obm")
    incomplete = {"vlm": stats["vlm"]}
    refuse(tmp_path, "diagonal statistics of agent", trio, method="obm", stats=incomplete)
    vectors = open_stats(stats["agent"], "diagonal")
    short = {name.removesuffix(".weight"): vectors.vector(name)[:-1] for name in vectors.names}
    other = {**stats, "agent": str(tmp_path / "other.safetensors")}
    save_stats(other["agent"], "diagonal", short, {})
    refuse(tmp_path, r"has \[(63|95)\] for .*calibrate again", trio, method="obm", stats=other)
    save_stats(other["agent"], "diagonal", {}, {})
    refuse(tmp_path, "has nothing for", trio, method="obm", stats=other)
    refuse(
        tmp_path, "holds diagonal statistics, needed are inverse", trio,
        method="obm", stats=other, saliency="inverse",
    )  # fmt: skip


# ---- outputs


def test_an_output_that_exists_is_kept_unless_told_otherwise(make_trio, tmp_path):
    trio, out = make_trio(), tmp_path / "out"
    run(trio, out, method="task_arithmetic")
    refuse(tmp_path, "out: exists; .*--overwrite", trio)
    (out / "merge.json").unlink()
    refuse(tmp_path, "was not written by a merge", trio, overwrite=True)


@pytest.mark.parametrize("names", [["merge.json"], ["merge.json", "config.json", "config.yaml"]])
def test_a_run_folder_is_not_overwritten_for_its_starts_record(make_trio, tmp_path, names):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    for name in names:
        (tmp_path / "out" / name).write_text("{}")
    refuse(tmp_path, "was not written by a merge .* is a run folder", make_trio(), overwrite=True)


def test_an_overwrite_that_fails_keeps_the_old_merge(make_trio, tmp_path):
    run(make_trio(), tmp_path / "out", method="ties")
    weights = {"vlm": 1e8, "agent": 1.0}
    refuse(tmp_path, "fit F16", make_trio(torch.float16), weights=weights, overwrite=True)


def test_the_output_may_not_be_a_parent(fresh_trio, tmp_path):
    for out in (fresh_trio.paths["vlm"], tmp_path / "parents"):
        with pytest.raises(MergeError, match="choose another output"):
            run(fresh_trio, out, method="ties", overwrite=True)
    assert Checkpoint(fresh_trio.paths["vlm"], "vlm").tensors


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_no_folder_can_be(make_trio, tmp_path, dry_run):
    trio, file = make_trio(), tmp_path / "file"
    file.write_text("a file")
    too_long = r"cannot be written \(File name too long\); "
    for out, reason in (
        (file / "out", "lies below .*file, which is a file; "),
        (Path("."), "has no name of its own; "),
        (tmp_path / ("a" * 300), too_long),
        (tmp_path / ("a" * 252), too_long),  # of the hidden folder beside it
    ):
        with pytest.raises(MergeError, match=f"{reason}choose another output"):
            run(trio, out, method="ties", dry_run=dry_run)


@pytest.mark.parametrize("dry_run", [False, True])
def test_an_output_that_no_folder_can_be_renamed_to(make_trio, tmp_path, monkeypatch, dry_run):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    advice = f"name a folder inside {tmp_path / 'elsewhere'} as the output"
    refuse(tmp_path, f"is a symbolic link; {advice}", make_trio(), dry_run=dry_run)
    (tmp_path / "out").unlink()
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "out")
    refuse(tmp_path, "out: is a mount point; name a folder inside", make_trio(), dry_run=dry_run)


def test_an_output_that_is_a_file(make_trio, tmp_path):
    (tmp_path / "out").write_text("a file")
    refuse(tmp_path, "is a file", make_trio(), overwrite=True)

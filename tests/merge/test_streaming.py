"""A layer at a time gives what the whole model gives: the same bits, with a bounded memory."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from merge.calibration import collect_second_moments, save_stats
from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.families import get_family
from merge.spill import read_values, write_values
from merge.stats import open_stats
from merge.streaming import stream_statistics
from merge.sums import inverse_diagonal, merge_shards, weight_checksums
from tests.merge import pico_families as pico

SITES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


def image_batch(family, seed):
    """Two questions with a picture of four tokens each, one of them padded."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 59, (2, 7), generator=generator).tolist()
    image = [pico.IMAGE_TOKEN] * 4
    ids = torch.tensor([[*words[0][:3], *image, *words[0][3:]], [0, *image, *words[1][1:]]])
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if family.startswith("qwen"):
        batch["pixel_values"] = torch.randn(32, 3 * 2 * 14 * 14, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4], [1, 4, 4]])
        batch["mm_token_type_ids"] = (ids == pico.IMAGE_TOKEN).long()
    else:
        batch["pixel_values"] = torch.randn(2, 3, 28, 28, generator=generator)
        batch["token_type_ids"] = (ids == pico.IMAGE_TOKEN).long()
    return batch


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory):
    """Family -> (checkpoint, model as transformers loads it)."""
    made = {}

    def make(family, dtype=torch.float32, tied=False):
        if (family, dtype) not in made:
            folder = tmp_path_factory.mktemp(family)
            model = pico.make_vlm(family, tied=tied)
            if family == "gemma3":
                model.config.text_config.sliding_window = 4  # shorter than the questions
            pico.save_trio({"vlm": model}, folder, dtype)
            loaded = transformers.AutoModelForImageTextToText.from_pretrained(
                folder / "vlm", dtype="auto"
            )
            made[family, dtype] = Checkpoint(folder / "vlm", "vlm"), loaded.eval()
        return made[family, dtype]

    return make


@pytest.fixture(scope="module")
def make_text(make_trio):
    """The agent of the trio as a checkpoint, its model, and four small batches."""
    trio = make_trio()
    batches = [{"input_ids": torch.arange(2, 26).reshape(2, 12) + 7 * i} for i in range(4)]
    return Checkpoint(trio.paths["agent"], "agent"), trio.models["agent"], batches


def rows_of(model, batches, name):
    """All inputs of a linear, fp64 [tokens, in]."""
    rows = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda _, inputs: rows.append(inputs[0].flatten(0, 1).double())
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen2_5_vl", torch.float32),
        ("qwen2_5_vl", torch.bfloat16),
        ("qwen3_vl", torch.float32),  # deepstack: features added between layers
        ("gemma3", torch.bfloat16),  # masks and positions differ by layer; tied embeddings
    ],
)
def test_streamed_statistics_have_the_bytes_of_the_whole_model(
    make_checkpoint, tmp_path, family, dtype
):
    checkpoint, model = make_checkpoint(family, dtype, tied=family == "gemma3")
    batches = [image_batch(family, seed) for seed in range(3)]
    for batch in batches:
        batch["calibration_mask"] = (batch["input_ids"] % 3 > 0).long()
    weights = weight_checksums(checkpoint, get_family(family, "test"), "diagonal")
    moments = collect_second_moments(model, batches)
    whole = save_stats(moments, tmp_path / "whole.safetensors", weights=weights)
    streamed = stream_statistics(checkpoint, iter(batches), tmp_path / "streamed")
    assert streamed["diagonal"].read_bytes() == whole.read_bytes()
    assert [entry.name for entry in (tmp_path / "streamed").iterdir()] == ["stats.safetensors"]
    # pictures are not merely there
    changed = [{**batch, "pixel_values": batch["pixel_values"] * 2} for batch in batches]
    other = stream_statistics(checkpoint, changed, tmp_path / "other")
    assert other["diagonal"].read_bytes() != whole.read_bytes()


def test_features_that_a_model_adds_between_layers_are_carried(make_checkpoint, tmp_path):
    """Without Qwen3-VL's deepstack features the second layer would see something else."""
    checkpoint, model = make_checkpoint("qwen3_vl")
    batches = [image_batch("qwen3_vl", 0)]
    with_features = collect_second_moments(model, batches).vectors()
    model.model.language_model._deepstack_process = lambda hidden, *_: hidden
    without = collect_second_moments(model, batches).vectors()
    del model.model.language_model._deepstack_process
    streamed = open_stats(stream_statistics(checkpoint, batches, tmp_path)["diagonal"], "diagonal")
    name = "model.layers.1.self_attn.q_proj"
    assert torch.equal(with_features[name], torch.tensor(streamed.vector(name)))
    assert not torch.equal(without[name], with_features[name])


def test_gram_and_inverse_equal_numpy_on_the_inputs(make_text, tmp_path):
    checkpoint, model, batches = make_text
    paths = stream_statistics(
        checkpoint, batches, tmp_path, kinds=["inverse", "gram"], damping=0.02
    )
    gram, inverse = open_stats(paths["gram"], "gram"), open_stats(paths["inverse"], "inverse")
    for layer in range(2):
        for site in SITES:
            name = f"model.layers.{layer}.{site}"
            rows = rows_of(model, batches, name).numpy()
            expected = rows.T @ rows / len(rows)
            np.testing.assert_allclose(gram.gram(name), expected, rtol=1e-4, atol=1e-6)
            damped = expected + 0.02 * np.diag(expected).mean() * np.eye(len(expected))
            # products in fp32 carry rounding, which the inverse magnifies by 1 / damping
            np.testing.assert_allclose(
                inverse.vector(name), 1 / np.diag(np.linalg.inv(damped)), rtol=1e-3
            )
    k_proj = "model.layers.0.self_attn.k_proj.weight"
    np.testing.assert_array_equal(gram.gram(k_proj), gram.gram(k_proj.replace("k_p", "q_p")))
    assert inverse.metadata["damping"] == "0.02"
    assert inverse.weights == gram.weights
    assert inverse.weights[k_proj] == checkpoint.checksum(k_proj)


def test_the_inverse_of_a_small_matrix_by_hand():
    # M + 0.5 * mean(3, 1) * I = [[4, 1], [1, 2]], its inverse [[2, -1], [-1, 4]] / 7
    moments = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    found = inverse_diagonal(moments, damping=0.5)
    torch.testing.assert_close(found, torch.tensor([7 / 2, 7 / 4], dtype=torch.float64))


def test_the_inverse_goes_over_blocks_of_a_wide_input():
    rows = torch.randn(800, 700, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = rows.T @ rows / 800
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(700, dtype=torch.float64)
    expected = 1 / torch.linalg.inv(damped).diagonal()
    torch.testing.assert_close(inverse_diagonal(moments.clone()), expected)


def test_dead_inputs_get_zero_and_leave_the_others_alone():
    alive = torch.tensor([[3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    moments = torch.zeros(3, 3, dtype=torch.float64)
    moments[:2, :2] = alive
    found = inverse_diagonal(moments, damping=0.75)  # mean diagonal 4/3: the same 1 is added
    torch.testing.assert_close(found, torch.tensor([3.5, 1.75, 0.0], dtype=torch.float64))
    assert not inverse_diagonal(torch.zeros(2, 2, dtype=torch.float64)).any()


def test_damping_is_raised_until_there_is_a_factor():
    # eigenvalues 3 and -1: 0.3 is too little, 3 makes 6 and 2
    moments = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    found = inverse_diagonal(moments, damping=0.3)
    # [[4, 2], [2, 4]]: inverse diagonal 4 / 12
    torch.testing.assert_close(found, torch.tensor([3.0, 3.0], dtype=torch.float64))
    hopeless = torch.tensor([[1.0, 1e9], [1e9, 1.0]], dtype=torch.float64)
    with pytest.raises(MergeError, match="no Cholesky factor even with damping 100"):
        inverse_diagonal(hopeless)


def test_streamed_shards_add_up_to_one_run(make_text, tmp_path):
    checkpoint, _, batches = make_text
    kinds = ["diagonal", "inverse", "gram"]
    whole = stream_statistics(checkpoint, batches, tmp_path / "whole", kinds=kinds)
    for rank in range(2):
        stream_statistics(
            checkpoint, batches[rank::2], tmp_path / "parts", kinds=kinds, shard=(rank, 2)
        )
    for kind in kinds:
        merged = merge_shards(tmp_path / "parts", kind)
        assert merged.read_bytes() == whole[kind].read_bytes()


KILLED = """
import sys, os, signal, torch
import merge.streaming as streaming
from merge.checkpoint import Checkpoint
run_layer, n_calls = streaming._run_layer, 0
def dying(*arguments):
    global n_calls
    n_calls += 1
    if n_calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return run_layer(*arguments)
streaming._run_layer = dying
batches = [{"input_ids": torch.arange(2, 26).reshape(2, 12) + 7 * i} for i in range(4)]
checkpoint = Checkpoint(sys.argv[1], "agent")
streaming.stream_statistics(checkpoint, batches, sys.argv[2], kinds=["diagonal", "gram"])
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_with_its_layer(make_text, tmp_path, monkeypatch):
    checkpoint, _, batches = make_text
    kinds = ["diagonal", "gram"]
    whole = stream_statistics(checkpoint, batches, tmp_path / "whole", kinds=kinds)
    output = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(checkpoint.folder), str(output)],
        env=environment, capture_output=True, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    assert not (output / "stats.safetensors").exists()
    assert json.loads((output / ".streaming" / "run.json").read_text())["next_layer"] == 1

    import merge.streaming as streaming

    layers, run_layer = [], streaming._run_layer
    monkeypatch.setattr(
        streaming, "_run_layer", lambda *given: layers.append(given[4]) or run_layer(*given)
    )
    monkeypatch.setattr(streaming, "_capture", None)  # it must not be needed again
    resumed = stream_statistics(checkpoint, batches, output, kinds=kinds)
    assert layers == [1]
    for kind in kinds:
        assert resumed[kind].read_bytes() == whole[kind].read_bytes()
    assert not (output / ".streaming").exists()


@pytest.mark.parametrize("change", ["data", "kinds", "sums"])
def test_a_run_for_another_result_starts_anew(make_text, tmp_path, monkeypatch, change):
    import merge.streaming as streaming

    checkpoint, _, batches = make_text
    run_layer = streaming._run_layer

    def stop_in_the_second(*given):
        if given[4] == 1:
            raise KeyboardInterrupt
        return run_layer(*given)

    monkeypatch.setattr(streaming, "_run_layer", stop_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        stream_statistics(checkpoint, batches, tmp_path / "run")
    monkeypatch.setattr(streaming, "_run_layer", run_layer)
    kinds = ["gram"] if change == "kinds" else ["diagonal"]
    if change == "data":
        batches = batches[:3]
    if change == "sums":
        (tmp_path / "run" / ".stats.safetensors.part").unlink()
    expected = stream_statistics(checkpoint, batches, tmp_path / "expected", kinds=kinds)
    found = stream_statistics(checkpoint, batches, tmp_path / "run", kinds=kinds)
    assert found[kinds[0]].read_bytes() == expected[kinds[0]].read_bytes()


def test_a_damaged_activation_says_what_to_remove(tmp_path):
    path = tmp_path / ".streaming" / "hidden-0-0.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"cut short")
    with pytest.raises(MergeError, match=r"cannot be read .*; remove .*\.streaming to start anew"):
        read_values(path, torch.device("cpu"))


def test_only_one_layer_has_memory_at_a_time(make_text, tmp_path, monkeypatch):
    import merge.streaming as streaming

    checkpoint, _, batches = make_text
    run_layer, seen = streaming._run_layer, []

    def look(run, layer, *given):
        seen.append(layer)
        assert [not next(item.parameters()).is_meta for item in seen] == (
            [False] * (len(seen) - 1) + [True]
        )
        return run_layer(run, layer, *given)

    monkeypatch.setattr(streaming, "_run_layer", look)
    stream_statistics(checkpoint, batches, tmp_path)
    assert len(seen) == 2


def test_what_cannot_be_streamed_is_an_error(make_text, tmp_path):
    checkpoint, _, batches = make_text
    with pytest.raises(MergeError, match="fisher is not one of diagonal, gram, inverse"):
        stream_statistics(checkpoint, batches, tmp_path, kinds=["fisher"])
    with pytest.raises(MergeError, match="no batches"):
        stream_statistics(checkpoint, [], tmp_path)
    nothing = {**batches[0], "calibration_mask": torch.zeros_like(batches[0]["input_ids"])}
    with pytest.raises(MergeError, match="no tokens"):
        stream_statistics(checkpoint, [nothing], tmp_path)
    short = {**batches[0], "calibration_mask": torch.ones(2, 2)}
    with pytest.raises(MergeError, match="calibration_mask has shape"):
        stream_statistics(checkpoint, [short], tmp_path)
    assert not (tmp_path / "stats.safetensors").exists()


def test_a_checkpoint_without_a_tensor_of_a_layer_is_an_error(fresh_trio, tmp_path):
    folder = Path(fresh_trio.paths["agent"])
    (folder / "model.safetensors.index.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    state = fresh_trio.models["agent"].state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    from safetensors.torch import save_file

    save_file(state, folder / "model.safetensors", {"format": "pt"})
    batch = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    with pytest.raises(MergeError, match=r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        stream_statistics(Checkpoint(folder, "agent"), [batch], tmp_path / "out")


def test_activations_that_are_not_finite_leave_no_file(builders, tmp_path):
    model = builders["text_model"]()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e30)
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(1e30)
    model.save_pretrained(tmp_path / "agent")
    checkpoint = Checkpoint(tmp_path / "agent", "agent")
    batch = {"input_ids": torch.arange(2, 26).reshape(2, 12)}
    for kind in ("diagonal", "gram"):
        with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj are not finite"):
            stream_statistics(checkpoint, [batch], tmp_path / "out", kinds=[kind])
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_nested_values_come_back_from_disk_and_shared_tensors_lie_there_once(tmp_path):
    tensor = torch.arange(6.0).reshape(2, 3)
    value = {
        "a": (tensor, None, True),
        "b": [tensor.T, {"c": 2.5, "d": tensor[None].expand(9, 2, 3)}],
    }
    path = tmp_path / "values.safetensors"
    write_values(path, value)
    found = read_values(path, torch.device("cpu"))
    assert torch.equal(found["a"][0], tensor)
    assert found["a"][1:] == (None, True)
    assert torch.equal(found["b"][0], tensor.T)
    assert torch.equal(found["b"][1]["d"], value["b"][1]["d"])
    assert read_values(path, torch.device("cpu"), "b", 1, "c") == 2.5
    write_values(path, [tensor] * 1000)
    assert path.stat().st_size < 40_000
    with pytest.raises(MergeError, match="a object"):
        write_values(path, [object()])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MergeError, match="cannot be read"):
        read_values(path, torch.device("cpu"))

"""Second moments against a slow reference: one sample at a time, no padding, sums in fp64."""

import pytest
import torch

from merge.calibration import SecondMoments, collect_second_moments, load_stats, save_stats
from merge.errors import MergeError

LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)


def slow_moments(model, language_module, batches, masks=None):
    """Hooks on all seven linears, every row of every batch in fp64."""
    names = {
        f"layers.{layer}.{linear}": f"model.layers.{layer}.{linear}"
        for layer in range(2)
        for linear in LINEARS
    }
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    masks = masks or [torch.ones_like(batch["input_ids"]) for batch in batches]
    for batch, mask in zip(batches, masks, strict=True):
        handles = [
            language_module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, mask=mask: inputs[name].append(
                    args[0][mask.bool()].double()
                )
            )
            for name in names
        ]
        with torch.no_grad():
            model(**batch)
        for handle in handles:
            handle.remove()
    return {names[n]: torch.cat(rows).square().mean(0) for n, rows in inputs.items()}


def assert_close(moments, expected):
    assert set(moments) == set(expected)
    for name, vector in moments.items():
        assert vector.dtype == torch.float32
        # fp32 activations differ by rounding between batched and single runs
        torch.testing.assert_close(vector.double(), expected[name], rtol=2e-5, atol=1e-9)


def padded(sequences, side):
    """Pads with a token that would change every moment, were it counted."""
    length = max(len(sequence) for sequence in sequences)
    ids, mask = [], []
    for sequence in sequences:
        gap = length - len(sequence)
        left, right = (gap, 0) if side == "left" else (0, gap)
        ids.append([7] * left + sequence + [7] * right)
        mask.append([0] * left + [1] * len(sequence) + [0] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


SEQUENCES = [[3, 4, 5, 6, 8, 9, 10, 11, 12], [20, 21], [30, 31, 32, 33, 34]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("role", ["agent", "vlm"])
def test_moments_equal_a_slow_reference_and_exclude_padding(make_trio, role, side):
    model = make_trio().models[role]
    language_module = model.model if role == "agent" else model.model.language_model
    alone = [{"input_ids": torch.tensor([sequence])} for sequence in SEQUENCES]
    expected = slow_moments(model, language_module, alone)
    batches = [padded(SEQUENCES[:2], side), padded(SEQUENCES[2:], side)]
    moments = collect_second_moments(model, batches)
    assert_close(moments, expected)
    assert moments.metadata["tokens"] == "16"
    assert moments.metadata["batches"] == "2"
    assert moments.metadata["mask_rule"] == "attention_mask"


def test_images_pass_through_the_vision_tower_and_count(make_trio, builders):
    model = make_trio().models["vlm"]
    batches = [builders["image_batch"](seed) for seed in range(3)]
    moments = collect_second_moments(model, batches)
    assert_close(moments, slow_moments(model, model.model.language_model, batches))
    other = [{**batch, "pixel_values": batch["pixel_values"].flip(0) * 3} for batch in batches]
    changed = collect_second_moments(model, other)
    assert all(not torch.equal(moments[name], changed[name]) for name in moments)
    assert moments.metadata["data_sha256"] != changed.metadata["data_sha256"]


def test_a_calibration_mask_leaves_out_tokens_that_still_are_attended_to(make_trio):
    model = make_trio().models["agent"]
    ids = torch.tensor([SEQUENCES[0]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "calibration_mask": mask}
    moments = collect_second_moments(model, [batch])
    assert_close(moments, slow_moments(model, model.model, [{"input_ids": ids}], [mask]))
    assert moments.metadata["tokens"] == "4"
    assert moments.metadata["mask_rule"] == "attention_mask and calibration_mask"


def test_padding_that_holds_nan_does_no_harm(make_trio):
    model = make_trio().models["agent"]
    batch = padded(SEQUENCES[:2], "right")
    clean = collect_second_moments(model, [batch])
    # In the last layer, so that it reaches no other token through attention
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, args: (
            args[0].masked_fill(batch["attention_mask"][..., None] == 0, float("nan")),
        )
    )
    dirty = collect_second_moments(model, [batch])
    hook.remove()
    assert all(torch.equal(clean[name], dirty[name]) for name in clean)


def test_collecting_leaves_the_model_as_it_was(make_trio):
    model = make_trio().models["agent"]
    model.train()
    collect_second_moments(model, [padded(SEQUENCES, "left")])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_an_explicit_language_module_gives_the_same(make_trio):
    model = make_trio().models["vlm"]
    batch = padded(SEQUENCES, "left")
    found = collect_second_moments(model, [batch])
    given = collect_second_moments(model, [batch], language_module=model.model.language_model)
    assert all(torch.equal(found[name], given[name]) for name in found)


def test_what_cannot_be_calibrated_is_an_error(make_trio):
    model = make_trio().models["agent"]
    batch = padded(SEQUENCES, "left")
    with pytest.raises(MergeError, match="no batches"):
        collect_second_moments(model, [])
    with pytest.raises(MergeError, match="no tokens"):
        collect_second_moments(
            model, [{**batch, "calibration_mask": torch.zeros_like(batch["input_ids"])}]
        )
    with pytest.raises(MergeError, match="calibration_mask has shape"):
        collect_second_moments(model, [{**batch, "calibration_mask": torch.ones(3, 2)}])
    mask = torch.ones_like(batch["input_ids"])
    with pytest.raises(MergeError, match="every batch, or with none"):
        collect_second_moments(model, [batch, {**batch, "calibration_mask": mask}])
    model_without_family = torch.nn.Linear(2, 2)
    model_without_family.config = None
    with pytest.raises(MergeError, match="model_type"):
        collect_second_moments(model_without_family, [batch])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_stats_survive_the_file_bit_by_bit(make_trio, tmp_path):
    model = make_trio().models["agent"]
    moments = collect_second_moments(model, [padded(SEQUENCES, "left")])
    path = tmp_path / "deep" / "stats.safetensors"
    save_stats(moments, path, model_sha256="abc")
    loaded = load_stats(path)
    assert isinstance(loaded, SecondMoments)
    assert set(loaded) == set(moments)
    assert all(torch.equal(loaded[name], moments[name]) for name in moments)
    assert loaded.metadata == {**moments.metadata, "model_sha256": "abc"}
    written = path.read_bytes()
    save_stats(moments, path, model_sha256="abc")
    assert path.read_bytes() == written
    assert [entry.name for entry in path.parent.iterdir()] == ["stats.safetensors"]


def test_stats_that_are_no_stats_are_an_error(make_trio, tmp_path):
    with pytest.raises(MergeError, match="cannot be read"):
        load_stats(tmp_path / "none.safetensors")
    with pytest.raises(MergeError, match="no second moments"):
        load_stats(make_trio().paths["agent"] + "/model.safetensors")
    path = tmp_path / "stats.safetensors"
    save_stats(SecondMoments({"a": torch.tensor([-1.0])}, {}), path)
    with pytest.raises(MergeError, match="not a vector of squares"):
        load_stats(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MergeError, match="truncated"):
        load_stats(path)


def test_dropout_is_off_while_collecting(builders):
    model = builders["text_model"](attention_dropout=0.5).train()
    batch = padded(SEQUENCES, "left")
    first, second = (collect_second_moments(model, [batch]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)

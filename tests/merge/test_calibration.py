"""Second moments against a slow reference: one sample at a time, no padding, sums in fp64."""

import weakref

import pytest
import torch

from merge.calibration import collect_second_moments, save_stats
from merge.errors import MergeError, OtherDataError
from merge.inputs import InputSums
from merge.stats import open_stats
from merge.sums import merge_shards, read_f64, shard_name

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
    assert set(moments.vectors()) == set(expected)
    for name, vector in moments.vectors().items():
        assert vector.dtype == torch.float32
        # fp32 activations differ by rounding between batched and single runs
        torch.testing.assert_close(vector.double(), expected[name], rtol=2e-5, atol=1e-9)


def equal_vectors(first, second):
    theirs = second.vectors()
    return {name: torch.equal(vector, theirs[name]) for name, vector in first.vectors().items()}


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
    assert moments.record.tokens == 16
    assert moments.record.sequences == 3
    assert moments.record.mask_rule == "attention_mask"


def test_images_pass_through_the_vision_tower_and_count(make_trio, builders):
    model = make_trio().models["vlm"]
    batches = [builders["image_batch"](seed) for seed in range(3)]
    moments = collect_second_moments(model, batches)
    assert_close(moments, slow_moments(model, model.model.language_model, batches))
    other = [{**batch, "pixel_values": batch["pixel_values"].flip(0) * 3} for batch in batches]
    changed = collect_second_moments(model, other)
    assert not any(equal_vectors(moments, changed).values())
    assert moments.record.digests != changed.record.digests


def test_a_calibration_mask_leaves_out_tokens_that_still_are_attended_to(make_trio):
    model = make_trio().models["agent"]
    ids = torch.tensor([SEQUENCES[0]])
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 0, 0, 1]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "calibration_mask": mask}
    moments = collect_second_moments(model, [batch])
    assert_close(moments, slow_moments(model, model.model, [{"input_ids": ids}], [mask]))
    assert moments.record.tokens == 4
    assert moments.record.mask_rule == "attention_mask and calibration_mask"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_masked", [0, 3])
def test_moments_and_products_leave_the_inputs_as_they_were(dtype, n_masked):
    linear = torch.nn.Linear(6, 2, dtype=dtype)
    hidden = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, mask = hidden.clone(), torch.ones(2, 5, dtype=torch.bool)
    mask[0, :n_masked] = False
    with InputSums({"a": linear}, grams=True) as sums, torch.no_grad():
        sums.mask = mask
        linear(hidden)
        linear(hidden)
    assert torch.equal(hidden, before)
    rows = before[mask].double()
    torch.testing.assert_close(sums.squares["a"], 2 * rows.square().sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.grams["a"], 2 * rows.T @ rows, rtol=1e-5, atol=1e-6)


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
    assert all(equal_vectors(clean, dirty).values())


def test_activations_that_are_not_finite_are_an_error(builders):
    model = builders["text_model"]()
    model.model.layers[1].mlp.up_proj.weight.data.fill_(1e30)
    model.model.layers[1].mlp.gate_proj.weight.data.fill_(1e30)
    with pytest.raises(MergeError, match=r"layers\.1\.mlp\.down_proj are not finite; load the mod"):
        collect_second_moments(model, [padded(SEQUENCES, "left")])


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
    assert all(equal_vectors(found, given).values())


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


def test_the_file_holds_the_vectors_and_what_they_were_made_with(make_trio, tmp_path):
    moments = collect_second_moments(make_trio().models["agent"], [padded(SEQUENCES, "left")])
    path = save_stats(moments, tmp_path / "stats.safetensors", weights={"a.weight": "ab"})
    stats = open_stats(path, "diagonal")
    vectors = moments.vectors()
    assert stats.names == sorted(f"{name}.weight" for name in vectors)
    for name, vector in vectors.items():
        assert torch.equal(torch.from_numpy(stats.vector(f"{name}.weight")), vector)
    assert stats.weights == {"a.weight": "ab"}
    assert stats.metadata["tokens"] == "16"
    assert stats.metadata["batches"] == "1"
    assert stats.metadata["mask_rule"] == "attention_mask"
    assert len(stats.metadata["data_sha256"]) == 64


def test_linears_that_share_an_input_share_their_vector_in_the_file(make_trio, tmp_path):
    moments = collect_second_moments(make_trio().models["agent"], [padded(SEQUENCES, "left")])
    save_stats(moments, tmp_path / "stats.safetensors")
    # two layers, four places each: inputs of 64, 64, 64 and 96 channels
    assert (tmp_path / "stats.safetensors").stat().st_size < 2 * (3 * 64 + 96) * 4 + 4000


@pytest.mark.parametrize("world", [2, 3])
def test_shards_add_up_to_the_bytes_of_one_run(make_trio, tmp_path, world):
    model = make_trio().models["agent"]
    batches = [padded([sequence], "left") for sequence in [*SEQUENCES, [40, 41, 42]]]
    whole = save_stats(collect_second_moments(model, batches), tmp_path / "whole.safetensors")
    for rank in range(world):
        share = collect_second_moments(model, batches[rank::world], shard=(rank, world))
        save_stats(share, tmp_path / shard_name("diagonal", (rank, world)))
    assert merge_shards(tmp_path, "diagonal").read_bytes() == whole.read_bytes()


def test_shards_are_added_up_with_one_sum_in_memory(make_trio, tmp_path, monkeypatch):
    for rank, sequence in enumerate(SEQUENCES):
        batch = padded([sequence], "left")
        share = collect_second_moments(make_trio().models["agent"], [batch], shard=(rank, 3))
        save_stats(share, tmp_path / shard_name("diagonal", (rank, 3)))
    found = []

    def read_alone(file, name):
        assert sum(part() is not None for part in found) <= 1
        part = read_f64(file, name)
        found.append(weakref.ref(part))
        return part

    monkeypatch.setattr("merge.sums.read_f64", read_alone)
    merge_shards(tmp_path, "diagonal")
    assert len(found) == 3 * 8  # two layers, four places each


def test_shards_that_do_not_belong_together_are_refused(make_trio, tmp_path):
    model = make_trio().models["agent"]
    batches = [padded([sequence], "left") for sequence in SEQUENCES]

    def save(rank, world, own, **weights):
        share = collect_second_moments(model, own, shard=(rank, world))
        save_stats(share, tmp_path / shard_name("diagonal", (rank, world)), weights=weights)

    with pytest.raises(MergeError, match="holds no sums of diagonal"):
        merge_shards(tmp_path, "diagonal")
    save(0, 2, batches[0::2])
    with pytest.raises(MergeError, match=r"shard-1-of-2.*is missing; run .*--shard 1/2"):
        merge_shards(tmp_path, "diagonal")
    save(1, 2, batches[1::2], a="other")
    with pytest.raises(MergeError, match="another checkpoint"):
        merge_shards(tmp_path, "diagonal")
    masked = [
        {**batch, "calibration_mask": torch.ones_like(batch["input_ids"])}
        for batch in batches[1::2]
    ]
    save(1, 2, masked)
    with pytest.raises(MergeError, match="counts other tokens"):
        merge_shards(tmp_path, "diagonal")
    save(1, 2, batches)
    with pytest.raises(MergeError, match="do not make up one run"):
        merge_shards(tmp_path, "diagonal")
    save(1, 3, batches[1::3])
    with pytest.raises(MergeError, match=r"several runs \(of 2, 3\)"):
        merge_shards(tmp_path, "diagonal")


def test_a_killed_run_skips_the_batches_it_has(make_trio, tmp_path):
    model = make_trio().models["agent"]
    batches = [padded([sequence], "left") for sequence in SEQUENCES]
    expected = collect_second_moments(model, batches)
    unfinished = tmp_path / "unfinished.safetensors"

    def killed_after_two():
        yield from batches[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_second_moments(model, killed_after_two(), unfinished=unfinished)
    n_runs = 0

    def count(*_):
        nonlocal n_runs
        n_runs += 1

    hook = model.register_forward_pre_hook(count)
    resumed = collect_second_moments(model, batches, unfinished=unfinished)
    hook.remove()
    assert n_runs == 1
    assert all(equal_vectors(resumed, expected).values())
    assert resumed.record == expected.record
    with pytest.raises(OtherDataError, match=r"begun with other data.*; remove it to start"):
        collect_second_moments(model, batches[::-1], unfinished=unfinished)


def test_dropout_is_off_while_collecting(builders):
    model = builders["text_model"](attention_dropout=0.5).train()
    batch = padded(SEQUENCES, "left")
    first, second = (collect_second_moments(model, [batch]) for _ in range(2))
    assert all(equal_vectors(first, second).values())

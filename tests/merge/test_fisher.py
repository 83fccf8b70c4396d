"""Fisher information against plain autograd: one sequence at a time, no padding, a loop."""

import pytest
import torch

from merge.errors import MergeError
from merge.fisher import collect_fisher, save_fisher
from merge.stats import open_stats
from merge.sums import merge_shards, shard_name

# (sequence, the places whose tokens are the answer)
DATA = [([3, 4, 5, 6, 8, 9], [3, 4, 5]), ([20, 21, 22], [2]), ([30, 31, 32, 33], [1, 3])]


def slow_fisher(model, language, data):
    """Mean over sequences of squared gradients of the summed log-probabilities."""
    totals = {}
    for sequence, places in data:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([sequence])).logits[0]
        likelihood = sum(logits[place - 1].log_softmax(-1)[sequence[place]] for place in places)
        likelihood.backward()
        for name, parameter in language.named_parameters():
            if name != "embed_tokens.weight":
                square = parameter.grad.square() / len(data)
                totals[f"model.{name}"] = totals.get(f"model.{name}", 0) + square
    model.zero_grad()
    return totals


def padded(data, side):
    length = max(len(sequence) for sequence, _ in data)
    batch = {"input_ids": [], "attention_mask": [], "calibration_mask": []}
    for sequence, places in data:
        gap = [0] * (length - len(sequence))
        answer = [int(place in places) for place in range(len(sequence))]
        for key, row in zip(batch, (sequence, [1] * len(sequence), answer), strict=True):
            batch[key].append(gap + row if side == "left" else row + gap)
    return {key: torch.tensor(rows) for key, rows in batch.items()}


def assert_close(fisher, expected):
    assert set(fisher.sums) == set(expected)
    for name, total in fisher.sums.items():
        mean = total / fisher.record.sequences
        # fp32 gradients of batched and single runs differ by rounding
        torch.testing.assert_close(mean, expected[name], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("role", ["agent", "vlm"])
def test_fisher_equals_a_loop_over_sequences(make_trio, role, side):
    model = make_trio().models[role]
    language = model.model if role == "agent" else model.model.language_model
    fisher = collect_fisher(model, [padded(DATA[:2], side), padded(DATA[2:], side)])
    assert_close(fisher, slow_fisher(model, language, DATA))
    assert fisher.record.sequences == 3


def test_labels_choose_the_scored_tokens_and_the_first_token_never_is(make_trio):
    model = make_trio().models["agent"]
    batch = padded(DATA, "left")
    answer = batch.pop("calibration_mask").bool()
    labels = batch["input_ids"].masked_fill(~answer, -100)
    expected = slow_fisher(model, model.model, DATA)
    assert_close(collect_fisher(model, [{**batch, "labels": labels}]), expected)
    # without a mask: all but the first token of each row, which nothing comes before
    every = [(sequence, range(1, len(sequence))) for sequence, _ in DATA]
    assert_close(collect_fisher(model, [batch]), slow_fisher(model, model.model, every))


def test_pictures_reach_the_gradient(make_trio, builders):
    model = make_trio().models["vlm"]
    batch = builders["image_batch"](0)
    fisher = collect_fisher(model, [batch])
    other = collect_fisher(model, [{**batch, "pixel_values": batch["pixel_values"] * 3}])
    name = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(fisher.sums[name], other.sums[name])
    assert not any("visual" in name or "embed" in name for name in fisher.sums)


def test_a_sequence_without_an_answer_has_no_part_in_the_mean(make_trio):
    model = make_trio().models["agent"]
    fisher = collect_fisher(model, [padded([*DATA, ([7, 8], [])], "left")])
    assert_close(fisher, slow_fisher(model, model.model, DATA))


def test_the_model_is_left_as_it_was(make_trio):
    model = make_trio().models["agent"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.model.norm.weight.requires_grad_(False)
    collect_fisher(model, [padded(DATA, "left")])
    assert not model.model.norm.weight.requires_grad
    model.model.norm.weight.requires_grad_(True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_file_and_its_shards_hold_the_means(make_trio, tmp_path):
    model = make_trio().models["agent"]
    batches = [padded([item], "left") for item in DATA]
    path = save_fisher(collect_fisher(model, batches), tmp_path / "whole.safetensors")
    whole = open_stats(path, "fisher")
    expected = slow_fisher(model, model.model, DATA)
    for rank in range(2):
        share = collect_fisher(model, batches[rank::2], shard=(rank, 2))
        save_fisher(share, tmp_path / shard_name("fisher", (rank, 2)))
    merged = open_stats(merge_shards(tmp_path, "fisher"), "fisher")
    assert whole.names == merged.names == sorted(expected)
    assert whole.metadata == merged.metadata
    for name, mean in expected.items():
        for stats in (whole, merged):
            read = torch.tensor(stats.entries(name, 0, mean.numel())).reshape(mean.shape)
            torch.testing.assert_close(read, mean, rtol=1e-3, atol=1e-7)


def test_what_cannot_be_scored_is_an_error(make_trio, tmp_path):
    model = make_trio().models["agent"]
    batch = padded(DATA, "left")
    nothing = {**batch, "calibration_mask": torch.zeros_like(batch["input_ids"])}
    with pytest.raises(MergeError, match="no tokens"):
        collect_fisher(model, [nothing])
    with pytest.raises(MergeError, match="labels have shape"):
        collect_fisher(model, [{**batch, "labels": torch.ones(3, 2)}])
    first_tokens = torch.tensor([[1, 0, 0]])
    one = {"input_ids": torch.tensor([[3, 4, 5]]), "calibration_mask": first_tokens}
    with pytest.raises(MergeError, match="no tokens"):
        save_fisher(collect_fisher(model, [one]), tmp_path / "fisher.safetensors")

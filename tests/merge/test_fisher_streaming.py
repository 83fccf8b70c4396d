"""Fisher information a layer at a time against the whole model's, and against a slow loop."""

import pytest
import torch
import transformers

from merge.checkpoint import Checkpoint
from merge.errors import MergeError
from merge.fisher import collect_fisher
from merge.fisher_streaming import stream_fisher
from merge.stats import open_stats
from merge.sums import merge_shards
from tests.merge import pico_families as pico
from tests.merge.test_fisher import DATA, padded, slow_fisher


def image_sequence(family, seed):
    """A question with a picture of four tokens; the last four tokens are the answer."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(2, 59, (9,), generator=generator).tolist()
    ids = torch.tensor([[*words[:3], *[pico.IMAGE_TOKEN] * 4, *words[3:]]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["calibration_mask"] = torch.zeros_like(ids)
    batch["calibration_mask"][:, -4:] = 1
    if family.startswith("qwen"):
        batch["pixel_values"] = torch.randn(16, 3 * 2 * 14 * 14, generator=generator)
        batch["image_grid_thw"] = torch.tensor([[1, 4, 4]])
        batch["mm_token_type_ids"] = (ids == pico.IMAGE_TOKEN).long()
    else:
        batch["pixel_values"] = torch.randn(1, 3, 28, 28, generator=generator)
        batch["token_type_ids"] = (ids == pico.IMAGE_TOKEN).long()
    return batch


def read(path, name, shape):
    values = open_stats(path, "fisher").entries(name, 0, shape.numel())
    return torch.tensor(values).reshape(shape)


def test_streamed_fisher_equals_a_loop_over_sequences(make_trio, tmp_path):
    trio = make_trio(tied=False)
    model = trio.models["agent"]
    batches = [padded([item], "left") for item in [*DATA, ([7, 8], [])]]  # the last has no answer
    path = stream_fisher(Checkpoint(trio.paths["agent"], "agent"), batches, tmp_path)
    stats = open_stats(path, "fisher")
    expected = slow_fisher(model, model.model, DATA)
    assert stats.names == sorted(expected)
    for name, mean in expected.items():
        torch.testing.assert_close(read(path, name, mean.shape), mean, rtol=1e-3, atol=1e-7)
    assert stats.metadata["sequences"] == "3"
    assert [entry.name for entry in tmp_path.iterdir()] == ["fisher.safetensors"]


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("qwen2_5_vl", False),
        ("qwen3_vl", True),  # deepstack: features added between layers
        ("gemma3", True),  # masks and positions differ by layer; logits behind a tied head
    ],
)
def test_streamed_fisher_of_a_vlm_equals_the_whole_models(tmp_path, family, tied):
    pico.save_trio({"vlm": pico.make_vlm(family, tied=tied)}, tmp_path, torch.float32)
    model = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").eval()
    batches = [image_sequence(family, seed) for seed in range(3)]
    whole = collect_fisher(model, batches)
    path = stream_fisher(Checkpoint(tmp_path / "vlm", "vlm"), batches, tmp_path / "stats")
    assert set(open_stats(path, "fisher").names) == set(whole.sums)
    for name, total in whole.sums.items():
        # one graph or several: the same products, in fp32
        torch.testing.assert_close(read(path, name, total.shape), total / 3, rtol=1e-4, atol=1e-9)
    changed = [{**batch, "pixel_values": batch["pixel_values"] * 3} for batch in batches]
    other = stream_fisher(Checkpoint(tmp_path / "vlm", "vlm"), changed, tmp_path / "other")
    assert other.read_bytes() != path.read_bytes()


def test_shards_of_streamed_fisher_add_up(make_trio, tmp_path):
    checkpoint = Checkpoint(make_trio().paths["agent"], "agent")
    batches = [padded([item], "left") for item in DATA]
    whole = stream_fisher(checkpoint, batches, tmp_path / "whole")
    for rank in range(2):
        stream_fisher(checkpoint, batches[rank::2], tmp_path / "shards", shard=(rank, 2))
    merged = merge_shards(tmp_path / "shards", "fisher")
    for name in open_stats(whole, "fisher").names:
        shape = torch.Size(open_stats(whole, "fisher").shape_of(name))
        torch.testing.assert_close(
            read(whole, name, shape), read(merged, name, shape), rtol=1e-5, atol=1e-12
        )


def test_only_one_layer_has_weights_at_a_time(make_trio, tmp_path, monkeypatch):
    from merge.shell import LayerLoader

    loaded, most = set(), []
    original = LayerLoader.loaded

    def watched(self, layer, index):
        class Watch:
            def __enter__(inner):
                loaded.add(index)
                most.append(len(loaded))
                inner.context = original(self, layer, index)
                return inner.context.__enter__()

            def __exit__(inner, *error):
                loaded.discard(index)
                return inner.context.__exit__(*error)

        return Watch()

    monkeypatch.setattr(LayerLoader, "loaded", watched)
    batches = [padded([item], "left") for item in DATA]
    stream_fisher(Checkpoint(make_trio().paths["agent"], "agent"), batches, tmp_path)
    assert most == [1, 1, 1, 1]  # two layers, forward and backward


def test_what_cannot_be_streamed_is_an_error(make_trio, tmp_path):
    checkpoint = Checkpoint(make_trio().paths["agent"], "agent")
    with pytest.raises(MergeError, match="one sequence a batch, not 3"):
        stream_fisher(checkpoint, [padded(DATA, "left")], tmp_path)
    one = padded(DATA[:1], "left")
    nothing = {**one, "calibration_mask": torch.zeros_like(one["input_ids"])}
    with pytest.raises(MergeError, match="no tokens"):
        stream_fisher(checkpoint, [nothing], tmp_path)

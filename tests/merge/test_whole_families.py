"""A whole merge of every family: plan, bytes, and a round trip through transformers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from merge.engine import merge
from merge.families import VISION
from merge.verify import verify_folder
from tests.merge.pico_families import TEXT_MODELS, VLMS, make_models, save_trio


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        tensors.update(load_file(path))
    return tensors


@pytest.mark.parametrize("family", [*VLMS, *TEXT_MODELS])
def test_a_merge_of_every_family_loads_as_the_vlm_does(family, tmp_path):
    paths = save_trio(make_models(family), tmp_path / "parents", dtype=torch.bfloat16)
    record = merge(
        paths["base"], paths["vlm"], paths["agent"], tmp_path / "out", method="ties", density=0.3
    )
    auto = AutoModelForImageTextToText if family in VLMS else AutoModelForCausalLM
    _, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (Path(paths["vlm"]) / name).read_bytes()

    vlm, merged = weights_of(paths["vlm"]), weights_of(tmp_path / "out")
    assert set(merged) == set(vlm)
    for name, entry in record["tensors"].items():
        is_same = torch.equal(merged[name], vlm[name])
        assert is_same == (entry["action"] == "vlm"), name
    assert any(e["group"] == VISION for e in record["tensors"].values()) == (family in VLMS)
    assert verify_folder(tmp_path / "out")["tensors"] == len(vlm)


@pytest.mark.parametrize("family", VLMS)
def test_both_layouts_of_every_family_merge_to_the_same_values(family, tmp_path):
    models = make_models(family)
    paths = save_trio(models, tmp_path / "parents", dtype=torch.bfloat16)
    dump = tmp_path / "dump"
    dump.mkdir()
    state = {name: value.clone() for name, value in models["vlm"].state_dict().items()}
    tied = getattr(models["vlm"].config, "tie_word_embeddings", False)
    if tied:
        state.pop("lm_head.weight", None)
    save_file(state, dump / "model.safetensors", metadata={"format": "pt"})
    (dump / "config.json").write_bytes((Path(paths["vlm"]) / "config.json").read_bytes())
    records = [
        merge(paths["base"], vlm, paths["agent"], tmp_path / f"out-{i}", method="ties", density=0.3)
        for i, vlm in enumerate((paths["vlm"], str(dump)))
    ]
    checksums = [
        sorted(entry["checksum"] for entry in record["tensors"].values()) for record in records
    ]
    assert checksums[0] == checksums[1]

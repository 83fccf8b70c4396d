"""The picture of a merge: places read from names, numbers in the right cells."""

import json
import re

import pytest

from compare.merges import linears, merge_sections
from tests.compare import pages


def data_of(sections):
    """Rows of every figure by its name."""
    (section,) = sections
    names = re.findall(r'data-name="([^"]+)"', section.body)
    blocks = re.findall(
        r'<script type="application/json" class="data">(.*?)</script>', section.body
    )
    return {n: json.loads(block)["rows"] for n, block in zip(names, blocks, strict=True)}


def test_layers_and_modules_are_read_from_the_names():
    figures = {"group": "linear", "entries": 4}
    names = {
        "model.layers.3.self_attn.q_proj.weight": (3, "q"),
        "model.language_model.layers.11.mlp.down_proj.weight": (11, "down"),
        "model.layers.0.mlp.experts.up_proj.weight": (0, "up"),
        "model.layers.2.self_attn.dense.weight": (2, "dense"),
    }
    others = {
        "model.layers.1.input_layernorm.weight": {"group": "norm_bias", "entries": 4},
        "model.layers.1.self_attn.k_proj.weight": {"group": "linear", "action": "vlm"},
        "lm_head.weight": figures,
    }
    found = linears({**dict.fromkeys(names, figures), **others})
    assert set(found) == set(names.values())


def test_every_map_has_its_numbers():
    found = data_of(merge_sections(pages.merge(), "obm"))
    # 10 over 1,000 entries: log10 .01 = -2; of the agent 1e-3
    assert found["merge-saliency"][0] == ["vlm", 0, "q", -2]
    assert ["agent", 1, "down", -3] in found["merge-saliency"]
    assert ["agent", 0, "q", 0.7] in found["merge-saliency-kept"]
    assert ["agent", 0, "q", 0.2] in found["merge-density"]
    assert ["agent", 1, "q", 0.25] in found["merge-won"]
    assert ["vlm", 1, "q", 0.75] in found["merge-won"]
    assert found["merge-conflicts"][0] == ["all", 0, "q", 0.04]  # 40 of 1,000
    # 2 / sqrt(1000) = .0632456, log10 -1.19897
    assert found["merge-norms"][0][3] == pytest.approx(-1.19897)
    # 1.5 / sqrt(1000) = .0474342
    assert ["update", 1, "down", pytest.approx(-1.32391)] in found["merge-norms"]
    # two tasks, two layers, two modules
    assert len(found["merge-density"]) == 8


def test_a_method_without_saliency_says_so():
    (section,) = merge_sections(pages.merge(saliency=False), "ties")
    assert "No saliency is shown" in section.body
    assert "merge-saliency" not in section.body
    assert "merge-density" in section.body
    assert "No saliency" not in merge_sections(pages.merge(), "obm")[0].body


def test_a_saliency_of_zero_or_none_leaves_its_cell_empty():
    record = pages.merge()
    tensor = record["tensors"]["model.layers.0.self_attn.q_proj.weight"]
    tensor["saliency"] = {"vlm": 0.0, "agent": None}
    tensor["saliency_kept"] = {"vlm": 0.0, "agent": None}
    tensor["conflicts"] = 0
    found = data_of(merge_sections(record, "obm"))
    assert len(found["merge-saliency"]) == 6
    assert len(found["merge-won"]) == 6  # nothing to win
    assert ["agent", 0, "q", None] not in found["merge-saliency-kept"]


def test_a_merge_without_linears_says_so():
    record = pages.merge()
    record["tensors"] = {"model.embed_tokens.weight": {"group": "embedding", "action": "vlm"}}
    (section,) = merge_sections(record, "obm")
    assert "No linear layer was merged entry by entry." in section.body


def test_paths_of_parents_are_cut_to_their_last_part():
    record = pages.merge()
    record["parents"]["agent"]["source"] = "owner/name"
    (section,) = merge_sections(record, "obm")
    assert "/somewhere" not in section.body
    assert "base: base" in section.body
    assert "agent: owner/name" in section.body

"""What a start cost is handed on from stage to stage, and never taken for nothing."""

import json

from configs.sections import FreezeHeads
from train.cost import Cost
from train.frozen import FrozenHeads
from train.start_cost import cost_of_start, cost_with_stage

MERGE = {"merge": {"time_s": 8.7, "processor_s": 9.9}}


def start(folder, cost=None, *, is_merge=True):
    folder.mkdir()
    if is_merge:
        (folder / "merge.json").write_text("{}")
    if cost is not None:
        (folder / "cost.json").write_text(json.dumps(cost))
    return str(folder)


def frozen_by(path):
    section = FreezeHeads("cast")
    return FrozenHeads(
        section.source, section.top, section.seed, section.shared, str(path), "0", 8, ()
    )


def test_a_stage_adds_its_own_seconds_to_those_of_its_start(tmp_path):
    merged = start(tmp_path / "merged", MERGE)
    policy = tmp_path / "policy"
    policy.mkdir()
    Cost({"sampling": 40.25, "tuning": 10.5}).write_for_policy(policy, merged, "sport")
    # 40.25 + 10.5
    assert cost_of_start(str(policy)) == {**MERGE, "sport": {"device_s": 50.75}}


def test_a_merge_without_a_record_is_not_free(tmp_path):
    assert cost_with_stage(start(tmp_path / "old"), "sport", 3.0) == {
        "merge": None, "sport": {"device_s": 3.0}
    }  # fmt: skip
    plain = start(tmp_path / "vlm", is_merge=False)
    assert cost_with_stage(plain, "sft", 3.0) == {"sft": {"device_s": 3.0}}
    assert cost_of_start(plain) == {}
    # a hub id is no folder
    assert cost_of_start("owner/name") == {}


def test_the_conflict_map_counts_where_heads_are_frozen_by_it(tmp_path):
    merged = start(tmp_path / "merged", MERGE)
    diagnose = {"diagnose": {"time_s": 60.0, "processor_s": 61.0}}
    start(tmp_path / "conflict", diagnose, is_merge=False)
    frozen = frozen_by(tmp_path / "conflict/conflict.json")
    assert cost_of_start(merged, frozen) == {**MERGE, **diagnose}
    # a map that somebody else made has no record beside it
    assert cost_of_start(merged, frozen_by(tmp_path / "elsewhere/conflict.json")) == MERGE


def test_a_stages_own_cost_file_and_a_broken_one_are_no_starts(tmp_path):
    assert cost_of_start(start(tmp_path / "run", {"device_s": 1.0, "parts": {}})) == {}
    broken = start(tmp_path / "broken", is_merge=False)
    (tmp_path / "broken" / "cost.json").write_text('{"merge": ')
    assert cost_of_start(broken) == {}

"""Tuning: keys, grids, what wins, which settings agree, and what is written."""

import pytest
import yaml

from compare.errors import CompareError
from compare.tuning import (
    agreement,
    best_settings,
    expand_grid,
    find_neighbours,
    lay_over,
    merge_key,
    score,
    setting_text,
    table_parts,
)
from compare.tuning_report import recipes_text, settings_table, tuning_csv, tuning_markdown
from configs.errors import ConfigError
from configs.sections import Config, Merge, Models

CONFIG = Config("out", models=Models(donors={"coder": "x"}), merge=Merge(normalization="mean"))
ENVIRONMENT = {"eval_size": 8, "eval_split": "dev", "eval_kinds": ["two"]}


def row(name, score, setting=None, method=None):
    return {
        "name": name, "method": method or name, "setting": setting or {}, "score": score,
        "accuracy": score,
    }  # fmt: skip


def test_a_grid_expands_to_every_combination_in_order():
    assert expand_grid({"density": [0.1, 0.2], "agent": [1, 2]}) == [
        {"density": 0.1, "agent": 1},
        {"density": 0.1, "agent": 2},
        {"density": 0.2, "agent": 1},
        {"density": 0.2, "agent": 2},
    ]
    assert expand_grid({}) == [{}]


@pytest.mark.parametrize(
    ("key", "full"),
    [
        ("agent", "weights.agent"),
        ("weight.agent", "weights.agent"),
        ("weights.coder", "weights.coder"),
        ("merge.density", "density"),
        ("scope.norm_bias", "scope.norm_bias"),
    ],
)
def test_a_key_has_one_full_name(key, full):
    assert merge_key(key, CONFIG) == full


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("densty", "did you mean 'density'"),
        ("weights.agnt", "did you mean 'agent'"),
        ("density.vlm", "no key of merge"),
        ("coderr", "did you mean 'coder'"),
        ("scope.norm_bias.x", "did you mean 'scope.norm_bias'"),
        ("scope.norm_bia", "did you mean 'scope.norm_bias'"),
        ("density.", "no key of merge"),
        (3, "3: a key must be text"),
        (None, "a key must be text"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, words):
    with pytest.raises(CompareError, match=words):
        merge_key(key, CONFIG)


def test_a_setting_is_laid_over_the_experiment_which_stays_as_it_is():
    setting = {"method": "ties", "weights.agent": 2, "scope.norm_bias": "vlm", "rules": []}
    merge = lay_over(CONFIG, setting, "here").merge
    assert merge.method == "ties"
    assert merge.normalization == "mean"
    assert merge.weights == {"vlm": 1.0, "agent": 2.0}
    assert merge.scope == {"linear": "method", "norm_bias": "vlm", "embedding": "vlm"}
    assert CONFIG.merge == Merge(normalization="mean")


def test_rules_of_a_setting_become_rules():
    rules = [{"match": "mlp", "method": "vlm"}]
    merge = lay_over(CONFIG, {"rules": rules}, "here").merge
    assert (merge.rules[0].match, merge.rules[0].method) == ("mlp", "vlm")
    assert lay_over(CONFIG, {"rules": []}, "here").merge.rules == []


@pytest.mark.parametrize(
    "setting", [{"density": 1.5}, {"saliency": "invers"}, {"scope.norm": "vlm"}, {"layers": 1}]
)
def test_a_value_that_a_key_cannot_have_is_refused_by_place(setting):
    with pytest.raises(ConfigError, match=r"^grid: *merge\."):
        lay_over(CONFIG, setting, "grid")


def test_the_score_is_the_mean_of_accuracy_and_passage_and_ignores_the_search_rate():
    assert score({"accuracy": 0.2, "passage": 0.6, "searched": 1.0, "entity": 1.0}) == 0.4


def test_a_group_without_questions_has_no_column():
    metrics = dict.fromkeys(("searched", "entity", "passage", "accuracy"), 0.25)
    assert table_parts({**metrics, "seen/accuracy": 1 / 3}) == {
        "score": 0.25, "searched": 0.25, "entity": 0.25, "passage": 0.25, "accuracy": 0.25,
        "seen accuracy": 0.3333,
    }  # fmt: skip


def test_each_name_keeps_its_best_row_and_ties_go_to_the_first():
    rows = [
        row("obm", 0.3, {"density": 0.1}),
        row("obm", 0.5, {"density": 0.2}),
        row("obm", 0.5, {"density": 0.3}),
        row("inverse", 0.1, method="obm"),
    ]
    best = best_settings(rows)
    assert best["obm"]["setting"] == {"density": 0.2}
    assert best["inverse"]["score"] == 0.1


def test_neighbours_differ_in_one_key_by_one_step():
    # rows: 0 (.1, none)  1 (.1, mean)  2 (.5, none)  3 (.5, mean)  4 (.2, none)  5 (.2, mean);
    # numbers step in their order: .1, .2, .5
    grid = {"density": [0.1, 0.5, 0.2], "normalization": ["none", "mean"]}
    assert find_neighbours(grid) == [[1, 4], [0, 5], [3, 4], [2, 5], [0, 2, 5], [1, 3, 4]]


def test_agreement_is_the_mean_share_of_answers_that_neighbours_share():
    answers = [["a", "b"], ["a", "c"], ["d", "c"]]
    # 0 and 1 share one of two, 1 and 2 one of two; the middle has both as neighbours
    assert agreement(answers, [[1], [0, 2], [1]]) == [0.5, 0.5, 0.5]
    answers = [["a", "b"], ["a", "b"], ["d", "b"]]
    assert agreement(answers, [[1], [0, 2], [1]]) == [1.0, 0.75, 0.5]


def test_settings_that_do_not_answer_agree_with_nothing():
    assert agreement([[None, None], [None, None]], [[1], [0]]) == [0.0, 0.0]
    assert agreement([["a"]], [[]]) == [0.0]


def test_a_setting_reads_as_words():
    setting = {"weights.agent": 0.7, "rules": [{"match": "mlp", "method": "vlm"}], "density": 0.35}
    assert setting_text(setting) == "agent 0.7, rules [{match: mlp, method: vlm}], density 0.35"
    assert setting_text({"rules": []}) == "rules none"
    assert setting_text({}) == "defaults"


def test_recipes_nest_keys_and_keep_numbers():
    setting = {"weights.vlm": 1, "weights.agent": 2, "scope.norm_bias": "linear", "rules": []}
    text = recipes_text({"inverse": row("inverse", 1.0, setting, "obm")}, "obm tune --x")
    assert "#   obm tune --x\n" in text
    assert yaml.safe_load(text) == {
        "inverse": {
            "method": "obm",
            "weights": {"vlm": 1.0, "agent": 2.0},
            "scope": {"norm_bias": "linear"},
        }
    }


def test_the_table_shows_numbers_and_names_where_there_are_any():
    setting = {"density": 0.5}
    assert settings_table([row("obm", 0.5, setting)])[0] == "| name | setting | score | accuracy |"
    assert settings_table([{"setting": setting, "agreement": 0.5}]) == [
        "| setting | agreement |", "| --- | ---: |", "| density 0.5 | 0.5000 |"
    ]  # fmt: skip


def test_the_page_lists_the_best_of_each_first_and_the_csv_every_setting():
    rows = [row("obm", 0.1, {"density": 0.2}), row("obm", 0.4, {"density": 0.5}), row("ties", 0.6)]
    record = {
        "rows": rows, "best": best_settings(rows), "command": "c", "commit": "abc", "hardware": "h",
        "environment": ENVIRONMENT,
    }  # fmt: skip
    page = tuning_markdown(record)
    first, every = page.split("## Every setting")
    assert first.index("| ties |") < first.index("| obm | density 0.5 |")
    assert "density 0.2" not in first
    assert every.index("density 0.5") < every.index("density 0.2") < every.index("| ties |")
    # of two values one is always at an end, and everything scored
    assert "Best at an end" not in page
    assert "No setting scored" not in page
    assert tuning_csv(rows).splitlines() == [
        "name,method,density,score,accuracy", "obm,obm,0.2,0.1,0.1", "obm,obm,0.5,0.4,0.4",
        "ties,ties,,0.6,0.6",
    ]  # fmt: skip


def test_the_page_says_whose_best_is_at_an_end_of_its_range_and_who_has_none():
    def settings(name, best, **values):
        grid = {"weights.agent": [1.0, 2.0, 4.0], "scope.norm_bias": ["linear", "ties", "vlm"]}
        return [row(name, float(s == best), s) for s in expand_grid({**grid, **values})]

    rising = {"weights.agent": 4.0, "scope.norm_bias": "vlm", "density": 0.2}
    within = {"weights.agent": 2.0, "scope.norm_bias": "linear"}
    rows = [
        *settings("obm", rising, density=[0.2, 0.5, 0.8]),
        *settings("ties", within),
        *settings("sce", None),
    ]
    page = tuning_markdown({
        "rows": rows, "best": best_settings(rows), "command": "c", "commit": "d", "hardware": "h",
        "environment": ENVIRONMENT,
    })  # fmt: skip
    assert "where there can be one: obm (largest agent, smallest density).\n" in page
    assert "No setting scored, so the first one stands there: sce.\n" in page

"""Tuning: grids expand in order, the score is a mean of two parts, each method's best row wins."""

from compare.tuning import best_settings, expand_grid, score


def test_a_grid_expands_to_every_combination_in_order():
    assert expand_grid({"density": [0.1, 0.2], "agent": [1, 2]}) == [
        {"density": 0.1, "agent": 1},
        {"density": 0.1, "agent": 2},
        {"density": 0.2, "agent": 1},
        {"density": 0.2, "agent": 2},
    ]
    assert expand_grid({}) == [{}]


def test_the_score_is_the_mean_of_accuracy_and_passage_and_ignores_the_search_rate():
    assert score({"accuracy": 0.2, "passage": 0.6, "searched": 1.0, "entity": 1.0}) == 0.4


def test_each_method_keeps_its_best_row_and_ties_go_to_the_first():
    rows = [
        {"method": "obm", "density": 0.1, "score": 0.3},
        {"method": "obm", "density": 0.2, "score": 0.5},
        {"method": "obm", "density": 0.3, "score": 0.5},
        {"method": "ties", "density": 0.2, "score": 0.1},
    ]
    best = best_settings(rows)
    assert best["obm"]["density"] == 0.2
    assert best["ties"]["score"] == 0.1

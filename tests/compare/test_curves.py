"""The numbers of a comparison, against values worked out by hand."""

import pytest

from compare.curves import (
    area_under_curve,
    band,
    ceiling_index,
    collapses,
    largest_drop,
    smooth,
    steps_to_target,
    value_at_cost,
)

STEPS = [0, 5, 10, 15, 20]
CURVE = [0.0, 0.3, 0.6, 0.9, 0.3]


def ceiling(values, window):
    return smooth(values, window)[ceiling_index(values, window)]


def test_smoothing_averages_the_last_values_only():
    # (0), (0+.3)/2, (0+.3+.6)/3, (.3+.6+.9)/3, (.6+.9+.3)/3
    assert smooth(CURVE, 3) == pytest.approx([0.0, 0.15, 0.3, 0.6, 0.6])


def test_a_window_of_one_changes_nothing():
    assert smooth(CURVE, 1) == CURVE


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        smooth(CURVE, 0)


def test_ceiling_is_the_best_full_window_and_the_first_of_equals():
    assert ceiling(CURVE, 3) == pytest.approx(0.6)
    assert ceiling_index(CURVE, 3) == 3


def test_a_lone_lucky_start_is_no_ceiling():
    # A trailing mean of one value, 0.9, would beat every full window: (.9+0+.3)/3=.4,
    # (0+.3+.3)/3=.2
    assert ceiling([0.9, 0.0, 0.3, 0.3], 3) == pytest.approx(0.4)


def test_a_curve_shorter_than_the_window_has_the_mean_as_ceiling():
    assert ceiling([0.2, 0.4], 5) == pytest.approx(0.3)


def test_area_is_the_mean_height():
    # trapezoids: 5*(.15+.45+.75+.6) = 9.75; over 20 steps 0.4875
    assert area_under_curve(STEPS, CURVE) == pytest.approx(0.4875)


def test_area_weighs_uneven_steps():
    # 1*(0+1)/2 + 9*(1+1)/2 = 9.5; over 10 steps .95
    assert area_under_curve([0, 1, 10], [0.0, 1.0, 1.0]) == pytest.approx(0.95)


def test_an_area_needs_points_and_a_value_each():
    for steps, values in (([1, 2], [0.5]), ([], [])):
        with pytest.raises(ValueError, match="as many steps as values"):
            area_under_curve(steps, values)


def test_area_of_one_point_is_that_point():
    assert area_under_curve([0], [0.4]) == 0.4


def test_steps_to_target_uses_the_smoothed_curve():
    # raw passes 0.5 at step 10, the mean of three only at step 15
    assert steps_to_target(STEPS, CURVE, 0.5, window=1) == 10
    assert steps_to_target(STEPS, CURVE, 0.5, window=3) == 15


def test_a_curve_that_starts_above_the_target_needs_no_step():
    assert steps_to_target([0, 5], [0.5, 0.1], 0.4, window=3) == 0


def test_a_target_that_is_never_reached_is_none():
    assert steps_to_target(STEPS, CURVE, 0.61, window=3) is None


def test_an_arm_reaches_its_own_ceiling():
    assert steps_to_target(STEPS, CURVE, ceiling(CURVE, 3), window=3) == 15


def test_a_value_at_a_cost_lies_on_the_line_between_two_evaluations():
    # 15 is half-way between costs 10 and 20: (.2 + .6) / 2
    costs, curve = [10.0, 20.0, 30.0], [0.2, 0.6, 0.4]
    assert value_at_cost(costs, curve, 15.0, window=1) == pytest.approx(0.4)
    assert value_at_cost(costs, curve, 10.0, window=1) == pytest.approx(0.2)
    # smoothed over two: .2, .4, .5; at 25 half-way between the last two
    assert value_at_cost(costs, curve, 25.0, window=2) == pytest.approx(0.45)


def test_beyond_the_last_evaluation_its_value_holds_and_before_the_first_there_is_none():
    assert value_at_cost([10.0, 20.0], [0.2, 0.6], 99.0, window=1) == pytest.approx(0.6)
    assert value_at_cost([10.0, 20.0], [0.2, 0.6], 9.9, window=1) is None
    assert value_at_cost([0.0, 10.0, 20.0], [0.1, 0.2, 0.6], 99.0, window=1) == 0.6
    # of two evaluations at one cost the later one counts
    assert value_at_cost([0.0, 10.0, 10.0], [0.1, 0.2, 0.6], 10.0, window=1) == 0.6


@pytest.mark.parametrize(
    ("curve", "n"),
    [
        ([0.1, 0.4, 0.4, 0.3], 0),  # .3 is above half of .4
        ([0.4, 0.4, 0.19, 0.1], 1),  # one fall, however long it lasts
        ([0.4, 0.1, 0.3, 0.1], 2),  # .3 is back above half
        ([0.4, 0.2], 0),  # half itself is no collapse
        ([0.09, 0.0], 0),  # the best was noise
        ([0.0, 0.0], 0),
    ],
)
def test_collapses_are_falls_below_half_of_the_best(curve, n):
    assert collapses(curve, 1) == n


def test_a_single_bad_evaluation_is_smoothed_away():
    # means of three: .4, .28, .28: never below .2
    assert collapses([0.4, 0.4, 0.4, 0.04, 0.4], 3) == 0
    assert collapses([0.4, 0.4, 0.4, 0.04, 0.4], 1) == 1


def test_the_largest_drop_is_from_the_best_so_far():
    assert largest_drop([0.2, 0.5, 0.4, 0.6, 0.3], 1) == pytest.approx(0.3)
    assert largest_drop([0.1, 0.2, 0.3], 1) == 0.0
    assert largest_drop([0.5, 0.1, 0.3], 1) == pytest.approx(0.4)  # the first counts, too


def test_a_band_is_an_interval_at_every_evaluation():
    mean, low, high = band([[0.0, 0.1], [0.0, 0.2], [0.0, 0.3]])
    assert mean == pytest.approx([0.0, 0.2])
    assert low == pytest.approx([0.0, 0.0])
    assert high == pytest.approx([0.0, 0.44844], abs=1e-4)


def test_a_band_of_curves_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        band([[0.0, 0.1], [0.0]])

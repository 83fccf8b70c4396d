"""The numbers of a comparison, against values worked out by hand."""

import pytest

from compare.curves import (
    area_under_curve,
    band,
    ceiling,
    ceiling_index,
    interval,
    smooth,
    steps_to_target,
)

STEPS = [0, 5, 10, 15, 20]
CURVE = [0.0, 0.3, 0.6, 0.9, 0.3]


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


def test_three_seeds_get_students_t():
    # mean .2, sd .1, half width 4.303 * .1 / sqrt(3) = .24844
    estimate = interval([0.1, 0.2, 0.3], bounds=None)
    assert estimate.mean == pytest.approx(0.2)
    assert estimate.low == pytest.approx(0.2 - 0.24844, abs=1e-4)
    assert estimate.high == pytest.approx(0.2 + 0.24844, abs=1e-4)


def test_an_interval_stays_inside_the_metrics_range():
    estimate = interval([0.1, 0.2, 0.3])
    assert estimate.low == 0.0
    assert estimate.high == pytest.approx(0.44844, abs=1e-4)


def test_one_seed_has_no_interval():
    estimate = interval([0.4])
    assert (estimate.mean, estimate.low, estimate.high) == (0.4, None, None)


def test_five_seeds_get_a_bootstrap_inside_their_range_and_the_same_each_time():
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    one, other = interval(values), interval(values)
    assert one == other
    assert 0.1 <= one.low < 0.3 < one.high <= 0.5
    # The standard error is .1581/sqrt(5) * sqrt(4/5) = .0632 (population form), so about 1.96 of
    # it.
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.0632, rel=0.15)


def test_equal_seeds_have_an_interval_of_no_width():
    estimate = interval([0.5, 0.5, 0.5])
    assert (estimate.low, estimate.high) == (0.5, 0.5)


def test_no_values_have_no_interval():
    with pytest.raises(ValueError, match="at least one"):
        interval([])


def test_a_band_is_an_interval_at_every_evaluation():
    mean, low, high = band([[0.0, 0.1], [0.0, 0.2], [0.0, 0.3]])
    assert mean == pytest.approx([0.0, 0.2])
    assert low == pytest.approx([0.0, 0.0])
    assert high == pytest.approx([0.0, 0.44844], abs=1e-4)


def test_a_band_of_curves_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="argument"):
        band([[0.0, 0.1], [0.0]])

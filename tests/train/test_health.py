"""Health warnings: each rule speaks and keeps silent, and none repeats itself."""

import pytest

from configs.schema import load_config, shipped_config
from train.health import (
    CALM,
    MIN_FOR_MEDIAN,
    REPEAT,
    RULES,
    WINDOW,
    HealthMonitor,
    Settings,
    find_warnings,
    health_settings,
)

SETTINGS = Settings(max_completion_tokens=320, max_new_tokens=40, beta=0.001)
WELL = {
    "loss": 0.01,
    "grad_norm": 0.5,
    "reward": 0.4,
    "rewards/accuracy/mean": 0.4,
    "frac_reward_zero_std": 0.3,
    "completions/clipped_ratio": 0.05,
    "search/failure_rate": 0.02,
    "search/service_failure_rate": 0.01,
    "search/rate_text": 0.7,
    "search/rate_image": 0.6,
    "stop/invalid": 0.1,
    "entropy": 0.6,
    "kl": 0.01,
    "sampling/logp_difference_max": 0.01,
    "time/generate_s": 6.0,
    "time/loss_s": 3.0,
    "time/optimizer_s": 1.0,
    "time/tools_s": 0.5,
    "time/sync_s": 0.2,
}


def codes(*lines, settings=SETTINGS):
    return [warning.code for warning in find_warnings(lines, settings)]


def ill(**values):
    """A line in which these metrics differ; `__` stands for a slash."""
    return {**WELL, **{name.replace("__", "/"): value for name, value in values.items()}}


OF_EVERY_STEP = ("kl_blow_up", "entropy_collapse")
CASES = {
    "no_signal": ill(frac_reward_zero_std=1.0, rewards__accuracy__mean=0.0),
    "no_search": ill(search__rate_text=0.0, search__rate_image=0.01),
    "invalid_turns": ill(stop__invalid=0.8),
    "length_limit": ill(completions__clipped_ratio=1.0),
    "tools_fail": ill(search__failure_rate=0.12, search__service_failure_rate=0.1),
    "mismatch": ill(sampling__logp_difference_max=2.0),
    "kl_blow_up": ill(kl=0.9),
    "entropy_collapse": ill(entropy=0.001),
    "saturated": ill(rewards__accuracy__mean=0.99),
    "slow_tools": ill(time__tools_s=5.5),
    "slow_sync": ill(time__sync_s=4.0),
}


@pytest.mark.parametrize("code", [code for code in CASES if code not in OF_EVERY_STEP])
def test_steps_without_a_rollout_of_their_own_hide_nothing(code):
    between = {"loss": 0.1, "grad_norm": 1.0, "kl": 0.0, "entropy": 1.0}
    assert code in codes(*[CASES[code], between] * WINDOW)
    assert code not in codes(*[CASES[code], between] * (WINDOW - 1))


def test_a_healthy_run_is_left_in_peace():
    assert codes(*[WELL] * 20) == []
    assert find_warnings([], SETTINGS) == []


def test_a_line_without_metrics_breaks_no_rule():
    assert codes(*[{"step": 1}] * WINDOW) == []


@pytest.mark.parametrize("code", CASES)
def test_each_rule_speaks_after_three_lines_and_names_a_fix(code):
    line = CASES[code]
    assert codes(WELL, WELL, *[line] * (WINDOW - 1)) == []
    assert codes(*[line] * WINDOW) == [code]
    [warning] = find_warnings([line] * WINDOW, SETTINGS)
    assert warning.message
    assert len(warning.fix) > 20


def test_every_rule_has_a_case():
    assert set(RULES) == {*CASES, "gradient"}


@pytest.mark.parametrize(
    ("right", "part_of_fix"),
    [(0.0, "easier questions"), (0.5, "grpo.temperature"), (1.0, "harder questions")],
)
def test_the_fix_of_a_missing_signal_depends_on_its_cause(right, part_of_fix):
    line = ill(frac_reward_zero_std=1.0, rewards__accuracy__mean=right)
    warning = find_warnings([line] * WINDOW, SETTINGS)[0]
    assert warning.code == "no_signal"
    assert part_of_fix in warning.fix


def test_a_cold_start_is_sent_to_the_merge_and_a_merged_one_to_its_weights():
    lines = [CASES["no_search"]] * WINDOW
    assert "obm merge" in find_warnings(lines, SETTINGS)[0].fix
    merged = Settings(320, 40, is_merged=True)
    assert "merge.weights" in find_warnings(lines, merged)[0].fix
    assert codes(*lines, settings=Settings(320, 40, has_searches=False)) == []


@pytest.mark.parametrize(
    ("by_service", "part_of_fix"), [(0.1, "service"), (0.01, "environment.dialect")]
)
def test_failing_tools_are_blamed_on_whoever_failed(by_service, part_of_fix):
    line = ill(search__failure_rate=0.12, search__service_failure_rate=by_service)
    [warning] = find_warnings([line] * WINDOW, SETTINGS)
    assert "12%" in warning.message
    assert part_of_fix in warning.fix


def test_one_line_is_enough_for_a_gradient_that_is_no_number():
    assert codes(WELL, ill(grad_norm=float("nan"))) == ["gradient"]
    assert codes(WELL, ill(loss=None)) == ["gradient"]  # as metrics.jsonl has it


def test_a_gradient_spike_is_measured_against_the_median():
    usual = [ill(grad_norm=0.4), ill(grad_norm=0.6)] * (MIN_FOR_MEDIAN // 2)  # median 0.5
    assert codes(*usual, ill(grad_norm=5.1)) == ["gradient"]
    assert codes(*usual, ill(grad_norm=4.9)) == []
    assert codes(*usual[1:], ill(grad_norm=5.1)) == []  # too few to compare with


def test_off_policy_steps_may_differ_from_sampling():
    lines = [CASES["mismatch"]] * WINDOW
    assert codes(*lines, settings=Settings(320, 40, is_on_policy=False)) == []


@pytest.mark.parametrize(
    ("grpo", "is_on_policy"),
    [
        # two processes of 8 rows: a rollout of 16 is one micro-batch, of 32 two
        ({"generation_batch_size": 16}, True),
        ({"generation_batch_size": 32}, False),
        ({"generation_batch_size": 32, "gradient_accumulation_steps": 2}, True),
        ({"steps_per_generation": 2}, False),
        ({"num_iterations": 2}, False),
        # two rollouts serve one step
        ({"generation_batch_size": 32, "gradient_accumulation_steps": 4}, True),
    ],
)
def test_a_rollout_that_serves_several_steps_is_off_policy(grpo, is_on_policy):
    config = load_config(shipped_config("demo"))
    config.grpo = {"per_device_train_batch_size": 8, **grpo}
    assert health_settings(config, "none", 2).is_on_policy == is_on_policy


def test_without_a_reference_the_kl_says_nothing():
    assert codes(*[CASES["kl_blow_up"]] * WINDOW, settings=Settings(320, 40, beta=0.0)) == []


# ---------------------------------------------------------------- memory


def said(monitor, line, steps):
    return [step for step in steps if monitor.check({"step": step, **line})]


def test_a_warning_is_said_once_and_again_after_twenty_steps():
    monitor = HealthMonitor(SETTINGS)
    steps = said(monitor, CASES["length_limit"], range(1, 2 * REPEAT + WINDOW + 1))
    assert steps == [WINDOW, WINDOW + REPEAT, WINDOW + 2 * REPEAT]
    assert monitor.n_active == 1


def test_a_warning_that_was_gone_is_news_and_one_that_flickers_is_not():
    ill_line = CASES["length_limit"]
    monitor = HealthMonitor(SETTINGS)
    assert said(monitor, ill_line, range(1, 4)) == [3]
    assert said(monitor, WELL, range(4, 6)) == []
    assert said(monitor, ill_line, range(6, 9)) == []  # gone for a moment only
    # the first well line already breaks the window
    assert said(monitor, WELL, range(9, 9 + CALM)) == []
    assert monitor.n_active == 0
    assert said(monitor, ill_line, range(9 + CALM, 12 + CALM)) == [11 + CALM]


def test_a_resumed_run_remembers_its_last_lines():
    line = CASES["entropy_collapse"]
    monitor = HealthMonitor(SETTINGS, [{"step": 1, **line}, {"step": 2, **line}])
    assert [warning.code for warning in monitor.check({"step": 3, **line})] == ["entropy_collapse"]

"""Health of a training run: what its numbers warn of, why, and what to change.

Each rule reads the last lines of metrics.jsonl (phase "train") and either keeps silent or says what
is wrong and the fix. Rules are pure functions; `HealthMonitor` adds the memory: a warning is said
once, again only every `REPEAT` steps while it holds, and anew after it was gone for `CALM` lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from train.settings import episode_lengths, resolved_grpo, steps_per_generation
from train.watchdog import WHOLE_STEP

if TYPE_CHECKING:
    from configs.schema import Config

Line = Mapping[str, Any]
"""One training line of metrics.jsonl: metric name -> number, None where it was not finite."""

WINDOW = 3
"""Lines in a row that must agree before a rule speaks; a single step is noise."""
REPEAT = 20
"""Steps after which a warning that still holds is said again."""
CALM = 5
"""Lines without the condition after which a warning counts as gone."""
MEMORY = 64
"""Lines that the monitor keeps for its rules."""
TOO_LARGE = 1e300
"""No number of a run is."""

NO_SIGNAL = 0.999
"""Share of groups in which every episode got the same reward."""
SATURATED = 0.95
"""Share of right answers above which there is little left to learn."""
CLIPPED = 0.5
"""Share of episodes that ran into a length limit."""
TOOL_FAILURES = 0.1
"""Share of episodes with a failed call."""
INVALID = 0.5
"""Share of episodes that end in a turn without call or answer."""
NO_SEARCH = 0.02
"""Share of episodes that search, below which searching cannot be reinforced."""
LOW_ENTROPY = 0.02
"""Nats a token; below, every episode of a group says the same."""
HIGH_KL = 0.5
"""Nats a token from the reference; a policy that far off has usually lost its language."""
GRADIENT_SPIKE = 10.0
"""Gradient norm, as a multiple of its median over the lines kept."""
MIN_FOR_MEDIAN = 8
"""Lines that make a median of the gradient norm worth comparing with."""
MISMATCH = 1.0
"""Nats between a token's log-prob at sampling and in the loss; bf16 alone stays well below."""
SLOW_TOOLS = 0.5
"""Share of a step's seconds spent waiting for tools."""
SLOW_SYNC = 0.3
"""Share of a step's seconds spent waiting for other processes."""


@dataclass(frozen=True)
class Settings:
    """What rules need to know of a run's settings."""

    max_completion_tokens: int
    """grpo.max_completion_length"""
    max_new_tokens: int
    """grpo.generation_kwargs.max_new_tokens"""
    beta: float = 0.0
    """grpo.beta"""
    is_on_policy: bool = True
    """every rollout serves one optimizer step; otherwise log-probs differ by right"""
    is_merged: bool = False
    """training starts from a merged checkpoint"""
    has_searches: bool = True
    """the environment allows any search"""


@dataclass(frozen=True)
class HealthWarning:
    """One thing that is wrong."""

    code: str
    """name of the rule, the same in console, health.jsonl, W&B and docs/metrics.md"""
    message: str
    """what the numbers say"""
    fix: str
    """what to change, by setting"""

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}"


def health_settings(config: Config, init: str, n_processes: int) -> Settings:
    """What the rules need of an experiment.

    Args:
        config: the experiment.
        init: the resolved checkpoint that training starts from.
        n_processes: of the training.
    """
    grpo, environment = resolved_grpo(config), config.environment
    # as TRL asks whether it needs the log-probs of before the step
    uses = steps_per_generation(grpo, n_processes) * (grpo.get("num_iterations") or 1)
    lengths = episode_lengths(grpo)
    return Settings(
        max_completion_tokens=lengths["max_completion_length"],
        max_new_tokens=lengths["max_new_tokens"],
        beta=grpo["beta"],
        is_on_policy=grpo["gradient_accumulation_steps"] % uses == 0,
        is_merged=(Path(init) / "merge.json").is_file(),
        has_searches=environment.image_searches + environment.text_searches > 0,
    )


def find_warnings(history: Sequence[Line], settings: Settings) -> list[HealthWarning]:
    """What the newest training line, with those before it, warns of.

    Args:
        history: training lines, oldest first.
        settings: of the run.

    Returns:
        Warnings in the order of `RULES`; none for an empty history.
    """
    found = []
    for code, rule in RULES.items():
        words = rule(history, settings) if history else None
        if words is not None:
            found.append(HealthWarning(code, *words))
    return found


class HealthMonitor:
    """Says each warning once, and again only every `REPEAT` steps.

    Args:
        settings: of the run.
        history: training lines of a run that goes on.
    """

    def __init__(self, settings: Settings, history: Sequence[Line] = ()) -> None:
        self.settings = settings
        self.history = list(history)[-MEMORY:]
        self._said: dict[str, int] = {}  # code -> step at which it was last said
        self._words: dict[str, HealthWarning] = {}  # code -> as it last held
        self._calm: dict[str, int] = {}  # code -> lines since it last held

    def check(self, line: Line) -> list[HealthWarning]:
        """Takes in a training line (with its `step`); returns the warnings to say now."""
        self.history = [*self.history, line][-MEMORY:]
        step = int(line["step"])
        holding = {warning.code: warning for warning in find_warnings(self.history, self.settings)}
        self._words |= holding
        for code in list(self._said):
            self._calm[code] = 0 if code in holding else self._calm[code] + 1
            if self._calm[code] >= CALM:
                del self._said[code]
        due = [
            warning
            for code, warning in holding.items()
            if code not in self._said or step - self._said[code] >= REPEAT
        ]
        for warning in due:
            self._said[warning.code], self._calm[warning.code] = step, 0
        return due

    @property
    def n_active(self) -> int:
        """Warnings that were said and are not gone."""
        return len(self._said)

    @property
    def active(self) -> list[HealthWarning]:
        """Those warnings, as they last held, in the order of `RULES`."""
        return [self._words[code] for code in RULES if code in self._said]


# ---------------------------------------------------------------- rules

Words = tuple[str, str] | None
"""(message, fix), or None where nothing is wrong."""


def _no_signal(history: Sequence[Line], settings: Settings) -> Words:
    """GRPO's advantage is the reward less its group's mean: equal rewards teach nothing."""
    if not _holds(history, "frac_reward_zero_std", lambda share: share >= NO_SIGNAL):
        return None
    right = _mean(history, "rewards/accuracy/mean")
    message = f"no group has signal: in {_steps(history)} all episodes of a group got one reward"
    if right is None:
        return message, "look at trajectories.jsonl for what they have in common"
    if right > SATURATED:
        return message, "every answer is right, so ask harder questions (environment.kinds)"
    if right > 1 - SATURATED:
        return message, "episodes of a group are copies: raise grpo.temperature"
    start = "" if settings.is_merged else ", start from a merged checkpoint (obm merge)"
    return message, (
        f"no answer is right: raise grpo.num_generations or algorithm.dynamic_sampling{start}, or "
        "begin with easier questions (environment.kinds)"
    )


def _saturated(history: Sequence[Line], settings: Settings) -> Words:
    if not _holds(history, "rewards/accuracy/mean", lambda share: share > SATURATED):
        return None
    right = _mean(history, "rewards/accuracy/mean")
    return (
        f"{right:.0%} of the training answers are right: little is left to learn here",
        "stop, or train on harder questions (environment.kinds, environment.strength)",
    )


def _length_limit(history: Sequence[Line], settings: Settings) -> Words:
    if not _holds(history, "completions/clipped_ratio", lambda share: share > CLIPPED):
        return None
    share = _mean(history, "completions/clipped_ratio")
    return (
        f"{share:.0%} of the episodes hit a length limit",
        f"raise grpo.generation_kwargs.max_new_tokens ({settings.max_new_tokens} a turn) or "
        f"grpo.max_completion_length ({settings.max_completion_tokens} an episode, results "
        "included), or return less (environment.top_k_text, environment.top_k_image)",
    )


def _tools_fail(history: Sequence[Line], settings: Settings) -> Words:
    """Whose fault it is decides on the fix: the service's or the policy's."""
    if not _holds(history, "search/failure_rate", lambda share: share > TOOL_FAILURES):
        return None
    failed = _mean(history, "search/failure_rate") or 0.0
    by_service = _mean(history, "search/service_failure_rate") or 0.0
    message = f"tools fail in {failed:.0%} of the episodes, in {by_service:.0%} by the service"
    if by_service > failed / 2:
        return message, (
            "look at the search service; raise environment.timeout_s if it is slow, "
            "environment.retries if it fails now and then, and set "
            "rewards.infrastructure_fault to mask while it is ill"
        )
    return message, (
        "the policy writes calls that the tools refuse: read the turns with is_error in "
        "trajectories.jsonl; environment.dialect may not be the one it knows"
    )


def _invalid_turns(history: Sequence[Line], settings: Settings) -> Words:
    if not _holds(history, "stop/invalid", lambda share: share > INVALID):
        return None
    share = _mean(history, "stop/invalid")
    return (
        f"{share:.0%} of the episodes end in a turn that neither calls nor answers",
        "set environment.invalid_ends to false so that the policy gets a hint, raise "
        "rewards.format, or choose the environment.dialect that the start has learnt",
    )


def _no_search(history: Sequence[Line], settings: Settings) -> Words:
    """A habit that is never sampled is never rewarded."""
    names = ("search/rate_text", "search/rate_image")
    never = all(_holds(history, name, lambda share: share < NO_SEARCH) for name in names)
    if not never or not settings.has_searches:
        return None
    if settings.is_merged:
        fix = "merge with more of the agent (merge.weights, merge.density; obm eval shows it)"
    else:
        fix = "this is a cold start: merge a search agent into it (obm merge) and start from that"
    return f"hardly an episode searches ({NO_SEARCH:.0%} or fewer)", fix


def _entropy_collapse(history: Sequence[Line], settings: Settings) -> Words:
    if not _holds(history, "entropy", lambda nats: nats < LOW_ENTROPY):
        return None
    return (
        f"the entropy is down to {_mean(history, 'entropy'):.3f} nats a token",
        "lower grpo.learning_rate, set grpo.beta above 0, raise grpo.epsilon_high or "
        "grpo.temperature, or go back to an earlier checkpoint",
    )


def _kl_blow_up(history: Sequence[Line], settings: Settings) -> Words:
    if not settings.beta or not _holds(history, "kl", lambda nats: nats > HIGH_KL):
        return None
    return (
        f"the policy is {_mean(history, 'kl'):.2f} nats a token away from its reference",
        f"lower grpo.learning_rate or raise grpo.beta (now {settings.beta:g})",
    )


def _gradient(history: Sequence[Line], settings: Settings) -> Words:
    """The newest line alone: one bad update is enough."""
    newest = history[-1]
    broken = [name for name in ("loss", "grad_norm") if name in newest and _is_bad(newest[name])]
    if broken:
        return (
            f"{' and '.join(broken)} of the last step is not a number",
            "go back to the last checkpoint with a lower grpo.learning_rate; in half precision "
            "use bf16, not fp16",
        )
    earlier = [line["grad_norm"] for line in history[:-1] if is_number(line.get("grad_norm"))]
    usual = median(earlier) if len(earlier) >= MIN_FOR_MEDIAN else 0.0
    if usual <= 0 or newest.get("grad_norm", 0.0) <= GRADIENT_SPIKE * usual:
        return None
    return (
        f"the gradient norm jumped to {newest['grad_norm']:.3g}, its median is {usual:.3g}",
        "lower grpo.max_grad_norm or grpo.learning_rate if it comes again",
    )


def _mismatch(history: Sequence[Line], settings: Settings) -> Words:
    name = "sampling/logp_difference_max"
    if not settings.is_on_policy or not _holds(history, name, lambda nats: nats > MISMATCH):
        return None
    return (
        f"log-probs of sampling and of the loss differ by up to {_mean(history, name):.2f} nats",
        "the two engines disagree: look for another dtype, template or set of weights in one of "
        "them, and for weights that are not synchronised",
    )


def _slow_tools(history: Sequence[Line], settings: Settings) -> Words:
    shares = _shares(history, "tools")
    if shares is None or min(shares) <= SLOW_TOOLS:
        return None
    return (
        f"tools take {fmean(shares):.0%} of a step",
        "raise rollout.tool_workers so that calls overlap, use a nearer or faster search service, "
        "or lower environment.timeout_s",
    )


def _slow_sync(history: Sequence[Line], settings: Settings) -> Words:
    shares = _shares(history, "sync")
    if shares is None or min(shares) <= SLOW_SYNC:
        return None
    return (
        f"waiting for other processes or for the server takes {fmean(shares):.0%} of a step",
        "episodes differ much in length: lower grpo.generation_kwargs.max_new_tokens or give each "
        "process more rows; with a server, hand weights over in memory (rollout.sync_dir)",
    )


RULES: dict[str, Callable[[Sequence[Line], Settings], Words]] = {
    "gradient": _gradient,
    "no_signal": _no_signal,
    "no_search": _no_search,
    "invalid_turns": _invalid_turns,
    "length_limit": _length_limit,
    "tools_fail": _tools_fail,
    "mismatch": _mismatch,
    "kl_blow_up": _kl_blow_up,
    "entropy_collapse": _entropy_collapse,
    "saturated": _saturated,
    "slow_tools": _slow_tools,
    "slow_sync": _slow_sync,
}


# ---------------------------------------------------------------- helpers


def with_metric(history: Sequence[Line], name: str) -> list[Line]:
    """The last WINDOW lines that have a metric: a step that trains on an earlier step's rollout has
    none of its own."""
    return [line for line in history if name in line][-WINDOW:]


def _holds(history: Sequence[Line], name: str, is_so: Callable[[float], bool]) -> bool:
    """True if the last WINDOW lines that have the metric fulfil the condition."""
    values = [line[name] for line in with_metric(history, name)]
    return len(values) == WINDOW and all(is_number(v) and is_so(v) for v in values)


def _mean(history: Sequence[Line], name: str) -> float | None:
    """Mean over the window; None where the metric is missing."""
    values = [line[name] for line in with_metric(history, name) if is_number(line[name])]
    return fmean(values) if values else None


def _shares(history: Sequence[Line], stage: str) -> list[float] | None:
    """The stage's share of each step in the window; None where the timers are missing."""
    shares = []
    for line in with_metric(history, f"time/{stage}_s"):
        names = [f"time/{part}_s" for part in WHOLE_STEP]
        step = sum(line[name] for name in names if is_number(line.get(name)))
        if not step or not is_number(line.get(f"time/{stage}_s")):
            return None
        shares.append(line[f"time/{stage}_s"] / step)
    return shares if len(shares) == WINDOW else None


def _steps(history: Sequence[Line]) -> str:
    return f"the last {min(WINDOW, len(history))} steps logged"


def is_number(value: Any) -> bool:
    """Whether it can be drawn and reckoned with: sums and products of such stay finite."""
    return isinstance(value, int | float) and -TOO_LARGE < value < TOO_LARGE


def _is_bad(value: Any) -> bool:
    """metrics.jsonl writes null for what is not finite."""
    return not is_number(value)

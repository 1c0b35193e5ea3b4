"""Alarms for common failures of RL: reward hacking, entropy collapse, length explosion and others.

A rising reward alone does not show learning: the policy may exploit the reward function. Each alarm compares the
metrics in ``metrics.jsonl`` with one threshold, fires when its condition starts to hold, and explains the likely cause.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from grpo_jax.jsonl import Row

HELD_OUT_FALL = "held_out_fall"
Level = Literal["warn", "checkpoint", "stop"]
WINDOW = 5
"""Number of steps averaged before values are compared."""
SIGNIFICANT = 3.0
"""Standard errors by which two averages must differ to count as different."""


@dataclass(frozen=True)
class AlarmConfig:
    """Thresholds of the alarms and the actions when one fires. A threshold of None disables its alarm."""

    entropy_collapse: float | None = 0.05
    """Entropy, as a fraction of its initial value, below which the policy has collapsed (unless solved)."""
    length_explosion: float | None = 1.5
    """Growth factor of the mean length over ten steps without a gain in solved problems."""
    truncation: float | None = 0.5
    """Fraction of completions that are truncated."""
    zero_variance: float | None = 0.9
    """Fraction of groups whose rewards are all equal (unless solved)."""
    kl_drift: float | None = 1.0
    """KL to the reference policy, in nats per token."""
    clip_fraction: float | None = 0.3
    """Fraction of tokens whose probability ratio is clipped."""
    sampler_gap: float | None = 0.02
    """Mean absolute difference between the sampler's and the trainer's log-probability of a token, in nats."""
    absent_rewards: float | None = 0.1
    """Fraction of completions without a reward."""
    duplicates: float | None = 0.8
    """Fraction of completions equal to another one of their group (unless solved)."""
    repetition: float | None = 0.15
    """Increase over the initial fraction of n-grams that repeat an earlier n-gram of their completion."""
    hacking: float | None = 0.02
    """Drop of the judge (a reward that is not trained on) from its best value while the training reward has risen."""
    empty_thought: float | None = 0.3
    """Increase over the initial fraction of completions with the right format and an empty thought."""
    answer_in_prompt: float | None = 0.2
    """Increase over the initial excess of answers found in their prompt, compared with gold answers found there."""
    constant_answer: float | None = 0.3
    """Increase over the initial excess of the most frequent answer, compared with the most frequent gold answer."""
    hard_coded: float | None = 0.2
    """Fraction of programs that hard-code the expected outputs of their tests."""
    language: float | None = 0.2
    """Drop of the language reward (fraction of a thought in the target language) from its initial value."""
    dead_experts: float | None = 0.1
    """Increase over the initial fraction of experts that are chosen less than a hundredth as often as the average."""
    held_out_fall: float | None = 0.02
    """Drop of held-out pass@1 (or reward, without a grader) of any task from its best evaluation. The drop must also be
    two standard errors, or one if pass@1 has more than halved."""
    patience: int = 3
    """Consecutive steps for which a condition must hold; does not apply to held_out_fall."""
    solved: float = 0.5
    """Mean judge score (without a judge, accuracy) from which the problems count as solved, so that low entropy,
    duplicates and groups with equal rewards are expected."""
    checkpoint_at: tuple[str, ...] = ()
    """Alarms that save a checkpoint when they fire."""
    stop_at: tuple[str, ...] = ()
    """Alarms that save a checkpoint and stop the run; the same command resumes it."""

    def __post_init__(self):
        for name in ("checkpoint_at", "stop_at"):
            known = {*CONDITIONS, HELD_OUT_FALL}
            unknown = sorted(set(getattr(self, name)) - known)
            if unknown:
                raise ValueError(f"alarms.{name} has unknown alarms {unknown}; choose from {sorted(known)}")
        if self.patience < 1:
            raise ValueError(f"alarms.patience is {self.patience}; it must be at least 1")

    def level(self, name: str) -> Level:
        """The action when an alarm fires, in addition to the log entry."""
        return "stop" if name in self.stop_at else "checkpoint" if name in self.checkpoint_at else "warn"


@dataclass(frozen=True)
class Alarm:
    """An alarm that fired.

    Attributes:
        step: the step at which it fired.
        name: the field of ``AlarmConfig``.
        level: the action.
        text: the measured values, the likely cause and possible remedies.
    """

    step: int
    name: str
    level: Level
    text: str

    def row(self) -> dict[str, Any]:
        """The alarm as a row of ``alarms.jsonl``."""
        return {"step": self.step, "alarm": self.name, "level": self.level, "text": self.text}


class Alarms:
    """The alarms of a run, updated with its metrics step by step.

    Args:
        settings: thresholds and actions.
        earlier: metrics rows of the steps and evaluations before a resume. The alarms then fire as in an uninterrupted
            run.
        fired_before: names of the alarms that fired in ``earlier``. Any other alarm whose condition already holds (the
            thresholds may have changed) fires at the next step.
    """

    def __init__(self, settings: AlarmConfig, earlier: Sequence[Row] = (), fired_before: Collection[str] = frozenset()):
        self._settings = settings
        self._history = History()
        self._evaluations: list[Row] = []
        self._has_fallen = False
        self._held = dict.fromkeys(CONDITIONS, 0)
        self._is_on = dict.fromkeys(CONDITIONS, False)
        for row in earlier:
            self.update(row)
        for name in set(CONDITIONS) - set(fired_before):
            self._is_on[name] = False
        self._has_fallen &= HELD_OUT_FALL in fired_before

    def update(self, row: Row) -> list[Alarm]:
        """Add the metrics of a step or of an evaluation and return the alarms that fire."""
        if any(name.startswith("eval/") for name in row):
            return self._evaluated(row)
        if "reward" not in row and "frac_reward_absent" not in row:
            return []
        self._history.add(row)
        fired = []
        for name, condition in CONDITIONS.items():
            threshold = getattr(self._settings, name)
            text = None if threshold is None else condition(self._history, threshold, self._settings.solved)
            self._held[name] = 0 if text is None else self._held[name] + 1
            was_on, self._is_on[name] = self._is_on[name], self._held[name] >= self._settings.patience
            if text is not None and self._is_on[name] and not was_on:
                fired.append(Alarm(int(row["step"]), name, self._settings.level(name), text))
        return fired

    def _evaluated(self, row: Row) -> list[Alarm]:
        self._evaluations.append(row)
        threshold = self._settings.held_out_fall
        text = None if threshold is None else held_out_fall(self._evaluations, threshold)
        had_fallen, self._has_fallen = self._has_fallen, text is not None
        if text is None or had_fallen:
            return []
        return [Alarm(int(row["step"]), HELD_OUT_FALL, self._settings.level(HELD_OUT_FALL), text)]


class History:
    """The metrics of all steps so far."""

    def __init__(self):
        self.steps: list[int] = []
        self._values: dict[str, list[float]] = {}
        self._starts: dict[str, float] = {}

    def add(self, row: Row) -> None:
        """Append the metrics of a step."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in self._values:
                self._values[key] = [np.nan] * len(self.steps)
        for key, values in self._values.items():
            values.append(np.nan if row.get(key) is None else float(row[key]))
        self.steps.append(int(row["step"]))

    def last(self, key: str) -> float | None:
        """The value at the latest step; None if it has none."""
        value = self._values.get(key, [np.nan])[-1]
        return value if np.isfinite(value) else None

    def values(self, key: str) -> np.ndarray:
        """``[steps]`` values, NaN where a step has none."""
        return np.array(self._values.get(key, [np.nan] * len(self.steps)))

    def start(self, key: str) -> float | None:
        """The mean of the first ``WINDOW`` values; None without values."""
        if key in self._starts:
            return self._starts[key]
        first = [value for value in self._values.get(key, []) if np.isfinite(value)][:WINDOW]
        if len(first) == WINDOW:
            self._starts[key] = float(np.mean(first))
        return float(np.mean(first)) if first else None

    @property
    def success_metric(self) -> str:
        """The most reliable measure of solved problems: ``judge`` if there is one, otherwise ``pass_rate``."""
        return "judge" if self.last("judge") is not None else "pass_rate"

    def is_solved(self, threshold: float) -> bool:
        """Whether the success metric is at least ``threshold``."""
        value = self.last(self.success_metric)
        return value is not None and value >= threshold


Condition = Callable[[History, float, float], str | None]
"""``(history, threshold, solved) -> text``; None if the condition does not hold."""


def _entropy_collapse(history: History, threshold: float, solved: float) -> str | None:
    """Entropy has collapsed before the problems are solved."""
    now, start = history.last("entropy"), history.start("entropy")
    if now is None or not start or now >= threshold * start or history.is_solved(solved):
        return None
    return (
        f"entropy is {now:.4f}, {now / start:.1%} of its initial value, and the problems are not solved: the policy no "
        "longer explores (lower the learning rate, raise epsilon_high or the temperature)"
    )


def _length_explosion(history: History, threshold: float, solved: float) -> str | None:
    """Completions grow without a gain in solved problems."""
    lengths, success = history.values("completions/mean_length"), history.values(history.success_metric)
    if len(lengths) < 3 * WINDOW:
        return None
    now, before = slice(-WINDOW, None), slice(-3 * WINDOW, -2 * WINDOW)
    gained, _ = _change(success[before], success[now])
    if not lengths[now].mean() >= threshold * lengths[before].mean() or gained > 0.01:
        return None
    return (
        f"mean length went from {lengths[before].mean():.1f} to {lengths[now].mean():.1f} tokens in {2 * WINDOW} steps "
        f"and {history.success_metric} did not rise: the reward favours length or does not penalize it (add a soft "
        "overlong penalty, aggregate with token_mean)"
    )


def _hacking(history: History, threshold: float, solved: float) -> str | None:
    """Reward hacking: the training reward rises while the judge falls."""
    judge, reward = history.values("judge"), history.values("reward")
    if np.isfinite(judge).sum() < 2 * WINDOW:
        return None
    means = np.lib.stride_tricks.sliding_window_view(judge, WINDOW).mean(1)[: len(judge) - 2 * WINDOW + 1]
    best = int(np.nan_to_num(means, nan=-np.inf).argmax())
    then, now = slice(best, best + WINDOW), slice(-WINDOW, None)
    fall, fall_error = _change(judge[now], judge[then])
    rise, rise_error = _change(reward[then], reward[now])
    if not fall >= max(threshold, SIGNIFICANT * fall_error) or rise <= SIGNIFICANT * rise_error:
        return None
    return (
        f"since step {history.steps[best]} the reward rose from {reward[then].mean():.3f} to {reward[now].mean():.3f} "
        f"while the judge fell from {judge[then].mean():.3f} to {judge[now].mean():.3f}: reward hacking; read the "
        "samples"
    )


def held_out_fall(evaluations: Sequence[Row], threshold: float) -> str | None:
    """A held-out metric is significantly below its best evaluation.

    The standard error of the difference treats the two evaluations as independent. They share their problems, so it is
    an upper bound. The best of many evaluations is biased upwards, for which two standard errors leave room.

    Args:
        evaluations: metrics rows of all evaluations so far.
        threshold: minimum drop.

    Returns:
        The text of the alarm for the first such metric; None if there is none.
    """
    now = evaluations[-1]
    for name, value in now.items():
        measured = [row for row in evaluations if row.get(name) is not None]
        if not name.startswith("eval/") or not name.endswith(("/pass@1", "/reward")) or value is None:
            continue
        best = max(measured, key=lambda row: row[name])
        error = float(np.hypot(best.get(f"{name}_stderr") or 0.0, now.get(f"{name}_stderr") or 0.0))
        fall = best[name] - value
        halved = name.endswith("pass@1") and value < best[name] / 2
        if fall >= threshold and (fall >= 2 * error or (halved and fall > error)):
            errors = f", {fall / error:.1f} standard errors" if error else ""
            return (
                f"held-out {name.removeprefix('eval/')} fell from {best[name]:.3f} at step {best['step']} to "
                f"{value:.3f}{errors}: training no longer generalizes (lower the learning rate, add a KL penalty, "
                "train for fewer steps; --export best exports the best checkpoint)"
            )
    return None


def _change(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The difference ``mean(after) - mean(before)`` and its standard error."""
    error = np.sqrt((before.var(ddof=1) + after.var(ddof=1)) / len(before))
    return float(after.mean() - before.mean()), float(error)


def _above(key: str, text: str, *, unless_solved: bool = False, beyond_start: bool = False) -> Condition:
    def condition(history: History, threshold: float, solved: float) -> str | None:
        value = history.last(key)
        base = (history.start(key) or 0.0) if beyond_start else 0.0
        if value is None or value - base <= threshold or (unless_solved and history.is_solved(solved)):
            return None
        return text.format(value=value, start=base)

    return condition


def _below_start(key: str, text: str) -> Condition:
    def condition(history: History, threshold: float, solved: float) -> str | None:
        value, start = history.last(key), history.start(key)
        if value is None or start is None or start - value <= threshold:
            return None
        return text.format(value=value, start=start)

    return condition


CONDITIONS: dict[str, Condition] = {
    "entropy_collapse": _entropy_collapse,
    "length_explosion": _length_explosion,
    "truncation": _above(
        "completions/clipped_ratio",
        "{value:.0%} of completions are truncated before the answer (raise max_completion_length, set mask_truncated)",
    ),
    "zero_variance": _above(
        "frac_reward_zero_std",
        "{value:.0%} of groups have equal rewards and so no learning signal, and the problems are not solved (use "
        "easier problems or larger groups)",
        unless_solved=True,
    ),
    "kl_drift": _above("kl", "the KL to the reference is {value:.2f} nats per token (raise kl_coef)"),
    "clip_fraction": _above(
        "clip_ratio/region_mean",
        "{value:.0%} of tokens are clipped: the updates are too large, or there are too many per rollout",
    ),
    "sampler_gap": _above(
        "sampling/sampling_logp_difference/mean",
        "sampler and trainer differ by {value:.3f} nats per token: the samples are off-policy (set importance_cap or a "
        "smaller staleness, use a more precise cache_dtype)",
    ),
    "absent_rewards": _above(
        "frac_reward_absent", "{value:.0%} of completions have no reward: reward_errors.jsonl has the errors"
    ),
    "duplicates": _above(
        "completions/duplicate_share",
        "{value:.0%} of completions equal another one of their group, and the problems are not solved: the samples "
        "have lost their diversity",
        unless_solved=True,
    ),
    "repetition": _above(
        "completions/repeated_share",
        "{value:.0%} of n-grams repeat an earlier one of their completion ({start:.0%} initially): the reward favours "
        "length or certain words",
        beyond_start=True,
    ),
    "hacking": _hacking,
    "empty_thought": _above(
        "completions/empty_thought_share",
        "{value:.0%} of completions have the right format and an empty thought ({start:.0%} initially): the reward "
        "favours format over content",
        beyond_start=True,
    ),
    "answer_in_prompt": _above(
        "completions/answer_in_prompt_excess",
        "answers appear in their prompts {value:+.0%} more often than gold answers do ({start:+.0%} initially): the "
        "policy copies them from the prompt",
        beyond_start=True,
    ),
    "constant_answer": _above(
        "completions/constant_answer_excess",
        "one answer is given {value:+.0%} more often than any gold answer occurs ({start:+.0%} initially): the policy "
        "answers without regard to the problem",
        beyond_start=True,
    ),
    "hard_coded": _above(
        "completions/hard_coded_share",
        "{value:.0%} of programs hard-code the expected outputs of their tests",
    ),
    "language": _below_start(
        "rewards/language/mean",
        "{value:.0%} of the words in thoughts are in the target language ({start:.0%} initially): the reward favours "
        "switching languages",
    ),
    "dead_experts": _above(
        "router/dead_experts",
        "{value:.0%} of experts are hardly ever chosen ({start:.0%} initially): the router collapses onto the others "
        "(replay the sampler's choices, lower the learning rate, add a load-balancing loss)",
        beyond_start=True,
    ),
}
"""Conditions by the name of their threshold in ``AlarmConfig``."""

assert set(CONDITIONS) <= {field.name for field in fields(AlarmConfig)}

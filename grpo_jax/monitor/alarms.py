"""Alarms: what goes wrong in reinforcement learning, each with a plain threshold and one line that says what it means.

A reward that rises is no sign of learning while nobody looks at what it pays for. An alarm reads the metrics of every
step as ``metrics.jsonl`` has them, and fires when its condition begins to hold.
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
"""Steps over which a course is looked at: means of so many are compared."""
CLEAR = 3.0
"""Standard errors by which two such means must differ."""


@dataclass(frozen=True)
class AlarmConfig:
    """Thresholds of the alarms, and what happens when one fires. A threshold of None turns its alarm off."""

    entropy_collapse: float | None = 0.05
    """Entropy below this share of what it was at the start, though the problems are not solved."""
    length_explosion: float | None = 1.5
    """Length this many times what it was ten steps ago, though no more problems are solved than then."""
    truncation: float | None = 0.5
    """Share of completions that are cut off."""
    zero_variance: float | None = 0.9
    """Share of groups in which all rewards are equal, though the problems are not solved."""
    kl_drift: float | None = 1.0
    """KL to the reference, in nats a token."""
    clip_fraction: float | None = 0.3
    """Share of tokens whose ratio is clipped."""
    sampler_gap: float | None = 0.02
    """Mean difference of sampler and trainer in a token's log-probability."""
    absent_rewards: float | None = 0.1
    """Share of completions that could not be scored."""
    duplicates: float | None = 0.8
    """Share of completions that equal another one of their group, though the problems are not solved."""
    repetition: float | None = 0.15
    """Share of n-grams that stood in their completion before, above that at the start."""
    hacking: float | None = 0.02
    """Fall of the judge from its best, while the reward has risen since; the judge is a reward not learnt from."""
    empty_thought: float | None = 0.3
    """Share of completions with the asked-for format and nothing in their thought, above that at the start."""
    answer_in_prompt: float | None = 0.2
    """How much more often a completion's answer stands in its prompt than the gold answer does, above the start's."""
    constant_answer: float | None = 0.3
    """Share of the most frequent answer above that of the most frequent gold answer, above the start's."""
    hard_coded: float | None = 0.2
    """Share of programs that spell out what their tests expect."""
    language: float | None = 0.2
    """Fall of the share of thoughts in the wanted language from that at the start."""
    held_out_fall: float | None = 0.02
    """Fall of held-out pass@1 (or reward, where nothing is graded) from its best evaluation, of two standard errors or
    more; to less than half of it, of one. It fires at the first evaluation that has fallen, of any task."""
    patience: int = 3
    """Steps in a row for which a condition must hold; evaluations have none."""
    solved: float = 0.5
    """Mean of the judge, or without one of accuracy, from which sameness and certainty are no faults."""
    checkpoint_at: tuple[str, ...] = ()
    """Alarms that have a checkpoint saved, of the step they fire at."""
    stop_at: tuple[str, ...] = ()
    """Alarms that save and end the run; the same command goes on."""

    def __post_init__(self):
        for name in ("checkpoint_at", "stop_at"):
            known = {*CONDITIONS, HELD_OUT_FALL}
            unknown = sorted(set(getattr(self, name)) - known)
            if unknown:
                raise ValueError(f"alarms.{name} has {unknown}; there are {sorted(known)}")
        if self.patience < 1:
            raise ValueError(f"alarms.patience is {self.patience}; it must be at least 1")

    def level(self, name: str) -> Level:
        """What happens when an alarm fires, beside the line in the log."""
        return "stop" if name in self.stop_at else "checkpoint" if name in self.checkpoint_at else "warn"


@dataclass(frozen=True)
class Alarm:
    """An alarm that fired.

    Attributes:
        step: at which.
        name: the alarm's, a field of ``AlarmConfig``.
        level: what is to happen.
        text: what it saw, and what that usually means.
    """

    step: int
    name: str
    level: Level
    text: str

    def row(self) -> dict[str, Any]:
        """As a line of ``alarms.jsonl``."""
        return {"step": self.step, "alarm": self.name, "level": self.level, "text": self.text}


class Alarms:
    """Reads a run's metrics step by step; see ``AlarmConfig`` for what it looks for.

    Args:
        settings: thresholds and levels.
        earlier: the rows of the steps before, of a run that is resumed: its alarms then fire as if it had never
            stopped. Rows without a step's own metrics (evaluations) are passed over.
        fired_before: names of the alarms that did fire in them. Another one whose condition has held for long, because
            thresholds are other ones now, fires at the next step.
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
        """Take in the metrics of a step, or of an evaluation; the alarms that fire at it."""
        if any(name.startswith("eval/") for name in row):
            return self._evaluated(row)
        if "reward" not in row and "frac_reward_absent" not in row:
            return []
        self._history.add(row)
        fired = []
        for name, condition in CONDITIONS.items():
            threshold = getattr(self._settings, name)
            seen = None if threshold is None else condition(self._history, threshold, self._settings.solved)
            self._held[name] = 0 if seen is None else self._held[name] + 1
            was_on, self._is_on[name] = self._is_on[name], self._held[name] >= self._settings.patience
            if seen is not None and self._is_on[name] and not was_on:
                fired.append(Alarm(int(row["step"]), name, self._settings.level(name), seen))
        return fired

    def _evaluated(self, row: Row) -> list[Alarm]:
        self._evaluations.append(row)
        threshold = self._settings.held_out_fall
        seen = None if threshold is None else held_out_fall(self._evaluations, threshold)
        before, self._has_fallen = self._has_fallen, seen is not None
        if seen is None or before:
            return []
        return [Alarm(int(row["step"]), HELD_OUT_FALL, self._settings.level(HELD_OUT_FALL), seen)]


class History:
    """The metrics of the steps so far."""

    def __init__(self):
        self.steps: list[int] = []
        self._values: dict[str, list[float]] = {}
        self._starts: dict[str, float] = {}

    def add(self, row: Row) -> None:
        """Take in a step's metrics."""
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in self._values:
                self._values[key] = [np.nan] * len(self.steps)
        for key, values in self._values.items():
            values.append(np.nan if row.get(key) is None else float(row[key]))
        self.steps.append(int(row["step"]))

    def last(self, key: str) -> float | None:
        """The newest value; None where the newest step has none."""
        value = self._values.get(key, [np.nan])[-1]
        return value if np.isfinite(value) else None

    def course(self, key: str) -> np.ndarray:
        """All values, NaN where there is none."""
        return np.array(self._values.get(key, [np.nan] * len(self.steps)))

    def start(self, key: str) -> float | None:
        """The mean of the first steps that have a value."""
        if key in self._starts:
            return self._starts[key]
        first = [value for value in self._values.get(key, []) if np.isfinite(value)][:WINDOW]
        if len(first) == WINDOW:
            self._starts[key] = float(np.mean(first))
        return float(np.mean(first)) if first else None

    @property
    def truth(self) -> str:
        """The metric that tells best how many problems are solved: the judge's, or else accuracy's."""
        return "judge" if self.last("judge") is not None else "pass_rate"

    def is_solved(self, threshold: float) -> bool:
        """Whether most problems are."""
        value = self.last(self.truth)
        return value is not None and value >= threshold


Condition = Callable[[History, float, float], str | None]


def entropy_collapse(history: History, threshold: float, solved: float) -> str | None:
    """The policy has become certain of what is not right."""
    now, start = history.last("entropy"), history.start("entropy")
    if now is None or not start or now >= threshold * start or history.is_solved(solved):
        return None
    return (
        f"entropy is {now:.4f}, {now / start:.1%} of the start's, and problems are not solved: the policy has stopped "
        "exploring (less learning rate, a higher epsilon_high or temperature)"
    )


def length_explosion(history: History, threshold: float, solved: float) -> str | None:
    """Completions grow and nothing is gained."""
    lengths, truth = history.course("completions/mean_length"), history.course(history.truth)
    if len(lengths) < 3 * WINDOW:
        return None
    now, before = slice(-WINDOW, None), slice(-3 * WINDOW, -2 * WINDOW)
    gained, _ = _change(truth[before], truth[now])
    if not lengths[now].mean() >= threshold * lengths[before].mean() or gained > 0.01:
        return None
    return (
        f"mean length went from {lengths[before].mean():.1f} to {lengths[now].mean():.1f} tokens in {2 * WINDOW} steps "
        f"and {history.truth} did not rise: length is paid for, or never punished (soft overlong reward, token_mean)"
    )


def hacking(history: History, threshold: float, solved: float) -> str | None:
    """The reward rises, and what it stands for falls."""
    judge, reward = history.course("judge"), history.course("reward")
    if np.isfinite(judge).sum() < 2 * WINDOW:
        return None
    means = np.lib.stride_tricks.sliding_window_view(judge, WINDOW).mean(1)[: len(judge) - 2 * WINDOW + 1]
    best = int(np.nan_to_num(means, nan=-np.inf).argmax())
    then, now = slice(best, best + WINDOW), slice(-WINDOW, None)
    fall, fall_error = _change(judge[now], judge[then])
    rise, rise_error = _change(reward[then], reward[now])
    if not fall >= max(threshold, CLEAR * fall_error) or rise <= CLEAR * rise_error:
        return None
    return (
        f"reward went from {reward[then].mean():.3f} to {reward[now].mean():.3f} since step "
        f"{history.steps[best]} while the judge went from {judge[then].mean():.3f} to "
        f"{judge[now].mean():.3f}: the policy has found something that pays and is not what is wanted; read the samples"
    )


def held_out_fall(evaluations: Sequence[Row], threshold: float) -> str | None:
    """Held-out problems are solved less often than at an earlier evaluation.

    Standard errors are those over problems, of the two evaluations as if their problems were others: an upper bound, as
    they are the same. The best of many evaluations is a little better than it should be, which the two standard errors
    allow for.
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
                f"held-out {name.removeprefix('eval/')} went from {best[name]:.3f} at step {best['step']} to "
                f"{value:.3f}{errors}: training makes the model worse at problems it does not see (less learning rate, "
                "a KL, fewer steps; --export best exports the best model)"
            )
    return None


def _change(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """The difference of two means, and its standard error."""
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
    "entropy_collapse": entropy_collapse,
    "length_explosion": length_explosion,
    "truncation": _above(
        "completions/clipped_ratio",
        "{value:.0%} of completions are cut off: they cannot answer (a longer max_completion_length, mask_truncated)",
    ),
    "zero_variance": _above(
        "frac_reward_zero_std",
        "in {value:.0%} of groups all rewards are equal, and problems are not solved: nothing is learnt from them "
        "(easier problems, larger groups)",
        unless_solved=True,
    ),
    "kl_drift": _above("kl", "the policy is {value:.2f} nats a token from its reference (a higher kl_coef)"),
    "clip_fraction": _above(
        "clip_ratio/region_mean",
        "{value:.0%} of tokens are clipped: updates are too large, or too many from one rollout",
    ),
    "sampler_gap": _above(
        "sampling/sampling_logp_difference/mean",
        "sampler and trainer differ by {value:.3f} in a token's log-probability: samples are off policy "
        "(importance_cap, a finer cache_dtype)",
    ),
    "absent_rewards": _above(
        "frac_reward_absent", "{value:.0%} of completions have no reward: see reward_errors.jsonl for what failed"
    ),
    "duplicates": _above(
        "completions/duplicate_share",
        "{value:.0%} of completions equal another of their group, and problems are not solved: the policy says one "
        "thing",
        unless_solved=True,
    ),
    "repetition": _above(
        "completions/repeated_share",
        "{value:.0%} of n-grams repeat what their completion said before ({start:.0%} at the start): length or "
        "mere wording is paid for",
        beyond_start=True,
    ),
    "hacking": hacking,
    "empty_thought": _above(
        "completions/empty_thought_share",
        "{value:.0%} of completions have the format and an empty thought ({start:.0%} at the start): form is paid for "
        "without content",
        beyond_start=True,
    ),
    "answer_in_prompt": _above(
        "completions/answer_in_prompt_excess",
        "answers stand in their prompts {value:+.0%} more often than right ones do ({start:+.0%} at the start): they "
        "are copied, not found",
        beyond_start=True,
    ),
    "constant_answer": _above(
        "completions/constant_answer_excess",
        "one answer is given {value:+.0%} more often than any is right ({start:+.0%} at the start): it pays whatever "
        "is asked",
        beyond_start=True,
    ),
    "hard_coded": _above(
        "completions/hard_coded_share",
        "{value:.0%} of programs spell out what their tests expect: the tests are known, and answered by heart",
    ),
    "language": _below_start(
        "rewards/language/mean",
        "{value:.0%} of thoughts' words are of the wanted language ({start:.0%} at the start): it pays to switch",
    ),
}
"""Each alarm by the name of its threshold: of the history, the threshold and what counts as solved, what it sees."""

assert set(CONDITIONS) <= {field.name for field in fields(AlarmConfig)}

"""Weighted sum of several rewards, with the score of each reward kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from grpo_jax.rewards.calling import arguments, invoke

NUMBERS = (int, float, np.integer, np.floating, np.bool_)
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardOutput:
    """The score of a completion, with details.

    Attributes:
        score: the reward; None if it abstains or failed.
        details: further numbers by name, which are logged beside the reward and not trained on.
        note: text to read beside the completion, such as an interpreter's message.
        steps: for process supervision, (end, reward) of each step of the completion, where ``end`` is the number of
            characters after which the step ends. ``score`` then aggregates the steps, for instance as their mean.
        failed: whether ``score`` is None because the reward could not be computed, instead of abstaining.
    """

    score: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    steps: Sequence[tuple[int, float]] = ()
    failed: bool = False


@dataclass(frozen=True)
class Outputs:
    """The ``RewardOutput`` of each of B completions, by field: small to exchange and quick to sum.

    Attributes:
        scores: float64 ``[B]``, NaN where absent.
        failed: bool ``[B]``.
        details: rows that have the detail, and float64 values of these, by name, in the order of the first rows.
        notes: by row, where there is one.
        steps: by row, where there are some.
    """

    scores: np.ndarray
    failed: np.ndarray
    details: dict[str, tuple[np.ndarray, np.ndarray]]
    notes: dict[int, str]
    steps: dict[int, Sequence[tuple[int, float]]]

    @classmethod
    def of(cls, outputs: Sequence[RewardOutput]) -> Outputs:
        """Those of a list."""
        details: dict[str, dict[int, float]] = {}
        for row, output in enumerate(outputs):
            for name, value in output.details.items():
                details.setdefault(name, {})[row] = value
        return cls(
            np.array([math.nan if output.score is None else output.score for output in outputs], np.float64),
            np.array([output.failed for output in outputs], bool),
            {name: (np.array([*values]), np.array([*values.values()], np.float64)) for name, values in details.items()},
            {row: output.note for row, output in enumerate(outputs) if output.note},
            {row: output.steps for row, output in enumerate(outputs) if output.steps},
        )

    @classmethod
    def interleaved(cls, parts: Sequence[Outputs]) -> Outputs:
        """Those of all completions, from those of each process's ``hosts.own_rows``."""
        turns = len(parts)
        scores = np.empty(sum(len(part.scores) for part in parts))
        failed = np.empty(len(scores), bool)
        details: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for turn, part in enumerate(parts):
            scores[turn::turns], failed[turn::turns] = part.scores, part.failed
            for name, (rows, values) in part.details.items():
                details.setdefault(name, []).append((rows * turns + turn, values))
        first = {name: min(rows[0] for rows, _ in some) for name, some in details.items()}
        return cls(
            scores,
            failed,
            {
                name: (np.concatenate([x for x, _ in details[name]]), np.concatenate([x for _, x in details[name]]))
                for name in sorted(details, key=first.__getitem__)
            },
            {row * turns + turn: note for turn, part in enumerate(parts) for row, note in part.notes.items()},
            {row * turns + turn: steps for turn, part in enumerate(parts) for row, steps in part.steps.items()},
        )


RewardFn = Callable[..., Any]
"""``(prompts: list[str], completions: list[str], **columns: list) -> list[float | None | RewardOutput]``; may be async.

Called once with the whole batch, or sample by sample if it is declared ``calling.per_sample``, with the arguments that
its signature takes: ``f(completions, **kwargs)`` suffices. Prompts and completions are texts. Columns and the result
have one entry for each completion; an entry of the result is a number, a ``RewardOutput``, or None if the reward
abstains. NaN means that the reward failed.
"""


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch of completions; NaN marks a missing score.

    Attributes:
        total: float32 ``[B]``, the weighted sum.
        parts: float32 ``[B]`` by name of the reward, before gates and weights; ``RewardOutput.details`` are under
            ``name/detail``.
        counted: float32 ``[B]`` by name, the parts with a nonzero weight after gates and before weights; NaN where the
            total is missing or the reward abstains.
        notes: ``[B]`` texts, the notes of all rewards, each prefixed with the reward's name.
        outcome: float32 ``[B]``, ``total`` without the rewards that scored steps of the completion, for process
            supervision; NaN if no others are left.
        steps: ``[B]`` tuples of (end in characters, weighted reward) of each step, in order.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    counted: dict[str, np.ndarray]
    notes: list[str]
    outcome: np.ndarray
    steps: list[tuple[tuple[int, float], ...]]

    @classmethod
    def concatenate(cls, scores: Sequence[Scores]) -> Scores:
        """Concatenate along the batch axis; parts that are missing in some of ``scores`` are NaN there."""

        def concatenated(field: str) -> dict[str, np.ndarray]:
            parts = [(getattr(each, field), np.full_like(each.total, np.nan)) for each in scores]
            names = dict.fromkeys(name for by_name, _ in parts for name in by_name)
            return {name: np.concatenate([by_name.get(name, nan) for by_name, nan in parts]) for name in names}

        return cls(
            total=np.concatenate([each.total for each in scores]),
            parts=concatenated("parts"),
            counted=concatenated("counted"),
            notes=[note for each in scores for note in each.notes],
            outcome=np.concatenate([each.outcome for each in scores]),
            steps=[steps for each in scores for steps in each.steps],
        )

    def at(self, rows: np.ndarray | slice) -> Scores:
        """The scores of a selection of rows."""
        indices = np.arange(len(self.total))[rows]
        return Scores(
            total=self.total[rows],
            parts={name: part[rows] for name, part in self.parts.items()},
            counted={name: part[rows] for name, part in self.counted.items()},
            notes=[self.notes[i] for i in indices],
            outcome=self.outcome[rows],
            steps=[self.steps[i] for i in indices],
        )


def weighted(
    rewards: Mapping[str, RewardFn],
    weights: Mapping[str, float],
    *,
    gates: Mapping[str, str] | None = None,
    clip: tuple[float, float] | None = None,
    may_abstain: Collection[str] = (),
    score_all: Callable[..., Mapping[str, Outputs]] | None = None,
) -> Callable[..., Scores]:
    """A function ``(prompts, completions, **columns) -> Scores`` with ``total = clip(sum_i weights[i] * parts[i])``.

    A total is NaN where a part with a nonzero weight is missing, because sums of different parts cannot be compared.
    Rewards in ``may_abstain`` are left out of the sum where they return None, as in TRL; the total is still NaN where
    all of them abstain or one failed. A part with weight 0 is only recorded.

    To normalise each reward within its groups before the sum, pass ``Scores.counted`` to ``advantage.gdpo``.

    Args:
        rewards: by name.
        weights: by name, one for each reward.
        gates: ``{"accuracy": "format"}`` counts accuracy as 0 where format is below 1. Where the gate is missing, the
            total is NaN.
        clip: lower and upper bound of the total.
        may_abstain: names of rewards that may be left out of the sum.
        score_all: computes the outputs, ``(rewards, prompts, completions, columns) -> Outputs by name``. Default: all
            in this process.

    Raises:
        ValueError: ``rewards`` is empty; its names differ from those of ``weights``; a weight is not finite, or all are
            0; a gate names an unknown reward or itself; ``clip`` is out of order. When called: columns have different
            lengths; a reward raises (the cause is chained), does not return one entry for each completion, or returns
            an entry that is not a number or not finite in float32. The message names the reward.
    """
    if not rewards or set(rewards) != set(weights):
        raise ValueError(f"weights must have one entry for each reward: rewards {[*rewards]}, weights {[*weights]}")
    if not all(math.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be finite and not all 0: {dict(weights)}")
    gates = gates or {}
    for name, gate in gates.items():
        if name not in rewards or gate not in rewards or name == gate:
            raise ValueError(f"the gate {name}={gate} must name two of the rewards {[*rewards]}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip must be (lower bound, upper bound) of the total, in order; it is {clip}")
    if not set(may_abstain) <= set(rewards):
        raise ValueError(f"may_abstain has {sorted(set(may_abstain) - set(rewards))}; the rewards are {[*rewards]}")

    compute = score_all or _score_all

    def score(prompts: Sequence[str], completions: Sequence[str], **columns: list[Any]) -> Scores:
        lengths = {name: len(c) for name, c in {"prompts": prompts, "completions": completions, **columns}.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"prompts, completions and columns must have the same length: {lengths}")
        graded = compute(rewards, prompts, completions, columns)
        return combined(graded, weights, len(completions), gates=gates, clip=clip, may_abstain=may_abstain)

    return score


def combined(
    graded: Mapping[str, Outputs],
    weights: Mapping[str, float],
    count: int,
    *,
    gates: Mapping[str, str],
    clip: tuple[float, float] | None,
    may_abstain: Collection[str],
) -> Scores:
    """The scores of completions from the outputs of their rewards, as ``weighted`` says.

    Args:
        graded: outputs by name of the reward.
        weights, gates, clip, may_abstain: as there.
        count: B.
    """
    parts = {name: outputs.scores for name, outputs in graded.items()}
    counted = {name: _gated(parts, name, gates) for name, weight in weights.items() if weight}
    abstains = {name: np.isnan(parts[name]) & ~graded[name].failed & (name in may_abstain) for name in counted}
    nothing = np.logical_and.reduce([*abstains.values()])
    summed = {name: np.where(abstains[name], 0, weights[name] * part) for name, part in counted.items()}
    total = np.where(nothing, np.nan, sum(summed.values(), np.zeros(count)))
    counted = {name: np.where(np.isnan(total), np.nan, part) for name, part in counted.items()}
    for name, outputs in graded.items():
        for detail, (rows, values) in outputs.details.items():
            parts[f"{name}/{detail}"] = np.full(count, np.nan)
            parts[f"{name}/{detail}"][rows] = values
    has_steps = {name: np.isin(np.arange(count), [*graded[name].steps]) for name in counted}
    outcomes = [np.where(has_steps[name], 0, part) for name, part in summed.items()]
    only_steps = nothing | np.logical_and.reduce([has_steps[name] | abstains[name] for name in counted])
    outcome = np.where(only_steps, np.nan, sum(outcomes, np.zeros(count)))
    if clip is not None:
        total, outcome = np.clip(total, *clip), np.clip(outcome, *clip)
    steps = _steps({name: graded[name] for name in counted}, weights, count)
    single = total.astype(np.float32), outcome.astype(np.float32)
    return Scores(single[0], _single(parts), _single(counted), _notes(graded, count), single[1], steps)


def _steps(
    graded: Mapping[str, Outputs], weights: Mapping[str, float], count: int
) -> list[tuple[tuple[int, float], ...]]:
    """The steps of each completion, ordered by end; the weighted rewards of several functions for a step are summed."""
    of_rows: dict[int, dict[int, float]] = {}
    for name, outputs in graded.items():
        for row, steps in outputs.steps.items():
            rewards = of_rows.setdefault(row, {})
            for end, reward in steps:
                rewards[end] = rewards.get(end, 0.0) + weights[name] * reward
    return [tuple(sorted(of_rows[row].items())) if row in of_rows else () for row in range(count)]


def _score_all(
    rewards: Mapping[str, RewardFn],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> dict[str, Outputs]:
    return {
        name: Outputs.of(score_with(name, reward, prompts, completions, columns)) for name, reward in rewards.items()
    }


def _gated(parts: Mapping[str, np.ndarray], name: str, gates: Mapping[str, str]) -> np.ndarray:
    """A part, 0 where its gate is below 1 and NaN where the part or the gate is NaN."""
    if name not in gates:
        return parts[name]
    gate = parts[gates[name]]
    return np.where(np.isnan(gate) | np.isnan(parts[name]), np.nan, np.where(gate >= 1, parts[name], 0))


class InvalidScoresError(ValueError):
    """A reward returned something other than one score for each completion of its batch."""


def as_reward_outputs(values: Any, completions: Sequence[str]) -> list[RewardOutput]:
    """The values that a reward returned, validated, each as a ``RewardOutput``.

    Args:
        values: the return value of the reward.
        completions: the texts that it scored.

    Raises:
        InvalidScoresError: ``values`` is not a list with one entry for each completion, each None, NaN, a number that
            float32 can represent, or a ``RewardOutput`` of these. The message is to be prefixed with the reward's name.
    """
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise InvalidScoresError(f"must return a list, and returned {type(values).__name__}")
    if len(values) != len(completions):
        raise InvalidScoresError(f"must return one entry for each completion: {len(completions)}, not {len(values)}")
    outputs = []
    for value, completion in zip(values, completions, strict=True):
        try:
            outputs.append(_graded(value, len(completion)))
        except InvalidScoresError as error:
            raise InvalidScoresError(f"{error}. The completion: {completion!r:.200}") from None
    return outputs


def _graded(value: Any, length: int) -> RewardOutput:
    if not isinstance(value, RewardOutput):
        value = RewardOutput(_number(value))
    score = _number(value.score)
    is_nan = score is not None and math.isnan(score)
    details = {str(name): _number(detail) for name, detail in value.details.items()}
    present = {name: detail for name, detail in details.items() if detail is not None}
    if not isinstance(value.steps, (list, tuple)):
        raise InvalidScoresError(f"returned {value.steps!r:.200} as steps; they must be a list")
    steps = tuple(_step(step, length) for step in value.steps)
    return RewardOutput(None if is_nan else score, present, str(value.note), steps, is_nan or bool(value.failed))


def _step(step: Any, length: int) -> tuple[int, float]:
    match step:
        case (int() | np.integer() as end, reward) if not isinstance(end, bool) and 1 <= end <= length:
            number = _number(reward)
            if number is not None and not math.isnan(number):
                return int(end), number
    raise InvalidScoresError(f"returned {step!r:.200} as a step; a step must be (end in characters, reward)")


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, NUMBERS) or abs(value) > LARGEST_FLOAT32:
        raise InvalidScoresError(f"returned {value!r:.200}; an entry must be None or a number that float32 can hold")
    return float(value)


def score_with(
    name: str,
    reward: RewardFn,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> list[RewardOutput]:
    """The outputs of a reward for a batch, called with the arguments of its signature.

    Args:
        name: the reward's name, for errors.
        reward: the function, of the form ``RewardFn``.
        prompts, completions: ``[B]`` texts.
        columns: ``[B]`` values each.

    Raises:
        ValueError: a column is missing, the reward raises (the cause is chained), or it returns something other than
            one score for each completion.
    """
    try:
        call = arguments(reward, prompts, completions, columns)
    except ValueError as error:
        raise ValueError(f"reward {name!r} {error}") from error
    try:
        values = invoke(reward, call)
    except InvalidScoresError:
        raise
    except Exception as error:
        raise ValueError(
            f"reward {name!r} raised {type(error).__name__}: {error}. It was called with the columns "
            f"{[name for name in call[1] if name in columns]}"
        ) from error
    try:
        return as_reward_outputs(values, completions)
    except ValueError as error:
        raise ValueError(f"reward {name!r} {error}") from error


def _single(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _notes(graded: Mapping[str, Outputs], count: int) -> list[str]:
    notes: list[list[str]] = [[] for _ in range(count)]
    for name, outputs in graded.items():
        for row, note in outputs.notes.items():
            notes[row].append(f"{name}: {note}")
    return ["\n".join(of_row) for of_row in notes]

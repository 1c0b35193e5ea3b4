"""Several rewards made into one, every part kept in sight."""

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
    """A score with what else there is to know of it.

    Attributes:
        score: the reward, or None where there is none.
        details: further figures by name, which are logged beside the reward and never learnt from.
        note: what a person should read beside the completion, such as an interpreter's message.
        steps: of a reward that judges the steps of a completion one by one: after how many characters each ends, and
            what it is worth. ``score`` is then what the whole is worth by them, such as their mean.
        failed: whether there is no score because the reward could not be computed; otherwise None is abstention.
    """

    score: float | None
    details: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    steps: Sequence[tuple[int, float]] = ()
    failed: bool = False


RewardFn = Callable[..., Any]
"""``(prompts: list[str], completions: list[str], **columns: list) -> list[float | None | RewardOutput]``, plain or async.

Called once with the whole batch, or sample by sample where it is declared ``calling.per_sample``, with those arguments
that its signature takes: ``f(completions, **kwargs)`` will do. Prompts and completions are texts; a column has one
entry for each completion. The result has one too: a number, a ``RewardOutput``, or None where the reward abstains. NaN is a
reward that failed.
"""


@dataclass(frozen=True)
class Scores:
    """Rewards of some completions; NaN where absent.

    Attributes:
        total: float32 ``[B]``.
        parts: float32 ``[B]`` by the name of the reward, before gates and weights; and as ``name/detail`` what a
            reward said besides (``RewardOutput.details``).
        counted: float32 ``[B]`` by name, the parts that have a weight, after gates and before weights; NaN where the
            total is absent or the reward abstains.
        notes: for each completion what rewards had to say, after their names.
        outcome: float32 ``[B]``, as ``total`` without the rewards that judged steps of this completion, for process
            supervision; absent where these are all.
        steps: for each completion the ends of its steps in characters, and the weighted reward of each, in order.
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    counted: dict[str, np.ndarray]
    notes: list[str]
    outcome: np.ndarray
    steps: list[tuple[tuple[int, float], ...]]

    @classmethod
    def joined(cls, scores: Sequence[Scores]) -> Scores:
        """Several of them as one, row after row; NaN where a part was not scored."""

        def of(name: str) -> dict[str, np.ndarray]:
            names = dict.fromkeys(part for each in scores for part in getattr(each, name))
            return {
                part: np.concatenate(
                    [getattr(each, name).get(part, np.full_like(each.total, np.nan)) for each in scores]
                )
                for part in names
            }

        return cls(
            total=np.concatenate([each.total for each in scores]),
            parts=of("parts"),
            counted=of("counted"),
            notes=[note for each in scores for note in each.notes],
            outcome=np.concatenate([each.outcome for each in scores]),
            steps=[steps for each in scores for steps in each.steps],
        )

    def at(self, rows: np.ndarray | slice) -> Scores:
        """Those of some rows."""
        places = np.arange(len(self.total))[rows]
        return Scores(
            total=self.total[rows],
            parts={name: part[rows] for name, part in self.parts.items()},
            counted={name: part[rows] for name, part in self.counted.items()},
            notes=[self.notes[place] for place in places],
            outcome=self.outcome[rows],
            steps=[self.steps[place] for place in places],
        )


def weighted(
    rewards: Mapping[str, RewardFn],
    weights: Mapping[str, float],
    *,
    gates: Mapping[str, str] | None = None,
    clip: tuple[float, float] | None = None,
    may_abstain: Collection[str] = (),
) -> Callable[..., Scores]:
    """A function ``(prompts, completions, **columns) -> Scores`` with ``total = clip(sum_i weights[i] * parts[i])``.

    A total is absent where a part with a weight is: a sum that leaves a part out would be compared with sums that have
    it. Rewards in ``may_abstain`` are left out of the sum where they return None, as in TRL; where all abstain the
    total is absent, and where one failed too. A part with weight 0 is only recorded and never touches the total.

    To normalise each reward within its groups before they are summed, give ``Scores.counted`` to ``advantage.gdpo``.

    Score one example before compute is spent, so that a reward that cannot run is found at once.

    Args:
        rewards: by name.
        weights: one for each.
        gates: ``{"accuracy": "format"}`` counts accuracy as 0 where format is below 1. Where the gate is absent, so is
            the total.
        clip: the least and the greatest total.
        may_abstain: names of rewards without which a total is still one.

    Raises:
        ValueError: no rewards; names that differ between ``rewards`` and ``weights``; a weight that is not finite, or
            all of them 0; a gate that names no reward or its own; bounds out of order. And when called: columns of
            different lengths; a reward that raises (the cause is chained), returns something other than one entry a
            completion, or an entry that is no number or not finite in float32. Each names the reward.
    """
    if not rewards or set(rewards) != set(weights):
        raise ValueError(f"there must be rewards, and one weight for each: rewards {[*rewards]}, weights {[*weights]}")
    if not all(math.isfinite(weight) for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights must be finite and not all 0: {dict(weights)}")
    gates = gates or {}
    for name, gate in gates.items():
        if name not in rewards or gate not in rewards or name == gate:
            raise ValueError(f"the gate {name}={gate} must be of two of the rewards {[*rewards]}")
    if clip is not None and not clip[0] < clip[1]:
        raise ValueError(f"clip must be the least and the greatest total, in order; it is {clip}")
    if not set(may_abstain) <= set(rewards):
        raise ValueError(f"may_abstain has {sorted(set(may_abstain) - set(rewards))}; the rewards are {[*rewards]}")

    def score(prompts: list[str], completions: list[str], **columns: list[Any]) -> Scores:
        lengths = {name: len(c) for name, c in {"prompts": prompts, "completions": completions, **columns}.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"prompts, completions and columns must have one entry a completion: {lengths}")
        graded = {name: score_with(name, reward, prompts, completions, columns) for name, reward in rewards.items()}
        parts = {name: _array(entry.score for entry in entries) for name, entries in graded.items()}
        counted = {name: _gated(parts, name, gates) for name, weight in weights.items() if weight}
        abstains = {
            name: np.array(
                [name in may_abstain and entry.score is None and not entry.failed for entry in graded[name]], bool
            )
            for name in counted
        }
        nothing = np.logical_and.reduce([*abstains.values()])
        summed = {name: np.where(abstains[name], 0, weights[name] * part) for name, part in counted.items()}
        total = np.where(nothing, np.nan, sum(summed.values(), np.zeros(len(completions))))
        counted = {name: np.where(np.isnan(total), np.nan, part) for name, part in counted.items()}
        for name, entries in graded.items():
            for detail in dict.fromkeys(key for entry in entries for key in entry.details):
                parts[f"{name}/{detail}"] = _array(entry.details.get(detail) for entry in entries)
        judged = {name: np.array([bool(entry.steps) for entry in graded[name]], bool) for name in counted}
        of_whole = [np.where(judged[name], 0, part) for name, part in summed.items()]
        by_steps_alone = nothing | np.logical_and.reduce([judged[name] | abstains[name] for name in counted])
        outcome = np.where(by_steps_alone, np.nan, sum(of_whole, np.zeros(len(completions))))
        if clip is not None:
            total, outcome = np.clip(total, *clip), np.clip(outcome, *clip)
        steps = _steps({name: graded[name] for name in counted}, weights, len(completions))
        single = total.astype(np.float32), outcome.astype(np.float32)
        return Scores(single[0], _single(parts), _single(counted), _notes(graded), single[1], steps)

    return score


def _steps(
    graded: Mapping[str, list[RewardOutput]], weights: Mapping[str, float], count: int
) -> list[tuple[tuple[int, float], ...]]:
    """The steps of each completion by where they end; what several rewards say of one step is added up."""
    found = []
    for row in range(count):
        worth: dict[int, float] = {}
        for name, entries in graded.items():
            for end, reward in entries[row].steps:
                worth[end] = worth.get(end, 0.0) + weights[name] * reward
        found.append(tuple(sorted(worth.items())))
    return found


def _gated(parts: Mapping[str, np.ndarray], name: str, gates: Mapping[str, str]) -> np.ndarray:
    """A part, 0 where its gate is not open; absent where the part or the gate is."""
    if name not in gates:
        return parts[name]
    gate = parts[gates[name]]
    return np.where(np.isnan(gate) | np.isnan(parts[name]), np.nan, np.where(gate >= 1, parts[name], 0))


class InvalidScoresError(ValueError):
    """A reward returned something other than one score for each completion of its batch."""


def as_reward_outputs(values: Any, completions: Sequence[str]) -> list[RewardOutput]:
    """What a reward returned of some completions, each entry as a ``RewardOutput``.

    Raises:
        InvalidScoresError: it is not a list with one entry a completion, each None, NaN, a number that float32 holds or
            a ``RewardOutput`` of such. The message goes on after the reward's name.
    """
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise InvalidScoresError(f"must return a list, and returned {type(values).__name__}")
    if len(values) != len(completions):
        raise InvalidScoresError(f"must return one entry a completion: {len(completions)}, not {len(values)}")
    return [_graded(value, completion) for value, completion in zip(values, completions, strict=True)]


def _graded(value: Any, completion: str) -> RewardOutput:
    if not isinstance(value, RewardOutput):
        value = RewardOutput(_number(value, completion))
    score = _number(value.score, completion)
    is_nan = score is not None and math.isnan(score)
    details = {str(name): _number(detail, completion) for name, detail in value.details.items()}
    present = {name: detail for name, detail in details.items() if detail is not None}
    if not isinstance(value.steps, (list, tuple)):
        raise InvalidScoresError(
            f"returned {value.steps!r:.200} as steps; they are a list. The completion: {completion!r:.200}"
        )
    steps = tuple(_step(step, completion) for step in value.steps)
    return RewardOutput(None if is_nan else score, present, str(value.note), steps, is_nan or bool(value.failed))


def _step(step: Any, completion: str) -> tuple[int, float]:
    match step:
        case (int() | np.integer() as end, reward) if not isinstance(end, bool) and 1 <= end <= len(completion):
            worth = _number(reward, completion)
            if worth is not None and not math.isnan(worth):
                return int(end), worth
    raise InvalidScoresError(
        f"returned {step!r:.200} as a step; one is (how many characters it ends after, a number). "
        f"The completion: {completion!r:.200}"
    )


def _number(value: Any, completion: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, NUMBERS) or abs(value) > LARGEST_FLOAT32:
        raise InvalidScoresError(
            f"returned {value!r:.200}; an entry must be None or a number that float32 can hold. "
            f"The completion: {completion!r:.200}"
        )
    return float(value)


def score_with(
    name: str, reward: RewardFn, prompts: list[str], completions: list[str], columns: Mapping[str, list[Any]]
) -> list[RewardOutput]:
    """What a reward says of a batch, called with the arguments that it takes.

    Args:
        name: of the reward, for errors.
        reward: see ``RewardFn``.
        prompts, completions: ``[B]``.
        columns: ``[B]`` each.

    Raises:
        ValueError: a column is missing, the reward raises (the cause is chained), or returns something other than one
            score for each completion.
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


def _array(values: Any) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _single(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _notes(graded: Mapping[str, list[RewardOutput]]) -> list[str]:
    rows = zip(*graded.values(), strict=True)
    return [
        "\n".join(f"{name}: {each.note}" for name, each in zip(graded, row, strict=True) if each.note) for row in rows
    ]

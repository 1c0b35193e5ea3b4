"""Unions of real intervals, as sorted disjoint intervals: equal sets have equal intervals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

from grpo_jax.rewards.math.expression import difference
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.symbolic import agree, real_value


@dataclass(frozen=True)
class Interval:
    """A real interval; its ends are numbers, constant expressions or infinities."""

    low: Answer
    low_closed: bool
    high: Answer
    high_closed: bool


MINUS_INFINITY, INFINITY = Answer("infinity", -1), Answer("infinity", 1)
REALS = Interval(MINUS_INFINITY, False, INFINITY, False)


def union(intervals: list[Interval]) -> tuple[Interval, ...] | None:
    """The union as sorted intervals with gaps between them; None if the ends of one are not real or not in order."""
    for interval in intervals:
        sign = compare(interval.low, interval.high)
        if sign is None or sign > 0 or (sign == 0 and not (interval.low_closed and interval.high_closed)):
            return None
    ordered = sorted(intervals, key=cmp_to_key(lambda a, b: compare(a.low, b.low) or b.low_closed - a.low_closed))
    merged: list[Interval] = []
    for interval in ordered:
        sign = compare(interval.low, merged[-1].high) if merged else 1
        if not merged or (sign or 0) > 0 or (sign == 0 and not (interval.low_closed or merged[-1].high_closed)):
            merged.append(interval)
            continue
        last = merged[-1]
        further = compare(interval.high, last.high) or 0
        if further > 0:
            merged[-1] = Interval(last.low, last.low_closed, interval.high, interval.high_closed)
        elif further == 0:
            merged[-1] = Interval(last.low, last.low_closed, last.high, last.high_closed or interval.high_closed)
    return tuple(merged)


def complement(intervals: tuple[Interval, ...]) -> tuple[Interval, ...]:
    """The real numbers outside all intervals of a ``union``."""
    gaps, low, low_closed = [], MINUS_INFINITY, False
    for interval in intervals:
        if interval.low != MINUS_INFINITY:
            gap = Interval(low, low_closed, interval.low, not interval.low_closed)
            if compare(low, interval.low) != 0 or (gap.low_closed and gap.high_closed):
                gaps.append(gap)
        low, low_closed = interval.high, not interval.high_closed
    if low != INFINITY:
        gaps.append(Interval(low, low_closed, INFINITY, False))
    return tuple(gaps)


def intersection(first: tuple[Interval, ...], second: tuple[Interval, ...]) -> tuple[Interval, ...] | None:
    """The intersection of two sets of intervals; None if their ends cannot be compared.

    Args:
        first, second: results of ``union``.
    """
    outside = union([*complement(first), *complement(second)])
    return None if outside is None else complement(outside)


def compare(a: Answer, b: Answer) -> int | None:
    """-1, 0 or 1 for ``a < b``, ``a == b`` or ``a > b``; None if one of them is not real.

    Args:
        a: number, constant expression or infinity.
        b: as ``a``.

    Raises:
        TooLargeError: the comparison exceeds the work limit.
    """
    if "infinity" in (a.kind, b.kind):
        left, right = (end.value if end.kind == "infinity" else 0 for end in (a, b))
        return (left > right) - (left < right)
    if a.kind == b.kind == "number":
        return (a.value > b.value) - (a.value < b.value)
    values: list[Any] = [real_value(as_node(end)) for end in (a, b)]
    if None in values:
        return None
    if agree(as_node(a), as_node(b)):
        return 0
    sign = real_value(difference(as_node(a), as_node(b)))
    return None if sign is None else (sign > 0) - (sign < 0)

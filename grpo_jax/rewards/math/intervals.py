"""Unions of intervals of real numbers: sorted, disjoint pieces, so that equal sets have equal pieces."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cmp_to_key
from typing import Any

from grpo_jax.rewards.math.expression import difference
from grpo_jax.rewards.math.final_answer import Answer, as_node
from grpo_jax.rewards.math.symbolic import agree, real_value


@dataclass(frozen=True)
class Piece:
    """An interval: its ends (number, constant expression or infinity), and whether they are in it."""

    low: Answer
    has_low: bool
    high: Answer
    has_high: bool


MINUS_INFINITY, INFINITY = Answer("infinity", -1), Answer("infinity", 1)
REALS = Piece(MINUS_INFINITY, False, INFINITY, False)


def union(pieces: list[Piece]) -> tuple[Piece, ...] | None:
    """The union, as sorted pieces with gaps between them; None for a piece whose ends are not real or not in order."""
    ordered = []
    for piece in pieces:
        sign = compare(piece.low, piece.high)
        if sign is None or sign > 0 or (sign == 0 and not (piece.has_low and piece.has_high)):
            return None
        ordered.append(piece)
    ordered.sort(key=cmp_to_key(lambda a, b: compare(a.low, b.low) or int(b.has_low) - int(a.has_low)))
    merged: list[Piece] = []
    for piece in ordered:
        sign = compare(piece.low, merged[-1].high) if merged else 1
        if not merged or (sign or 0) > 0 or (sign == 0 and not (piece.has_low or merged[-1].has_high)):
            merged.append(piece)
            continue
        last = merged[-1]
        further = compare(piece.high, last.high) or 0
        if further > 0:
            merged[-1] = Piece(last.low, last.has_low, piece.high, piece.has_high)
        elif further == 0:
            merged[-1] = Piece(last.low, last.has_low, last.high, last.has_high or piece.has_high)
    return tuple(merged)


def complement(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The real numbers that are in none of the pieces, which ``union`` has sorted."""
    gaps, low, has_low = [], MINUS_INFINITY, False
    for piece in pieces:
        if piece.low != MINUS_INFINITY:
            gap = Piece(low, has_low, piece.low, not piece.has_low)
            if compare(low, piece.low) != 0 or (gap.has_low and gap.has_high):
                gaps.append(gap)
        low, has_low = piece.high, not piece.has_high
    if low != INFINITY:
        gaps.append(Piece(low, has_low, INFINITY, False))
    return tuple(gaps)


def intersection(first: tuple[Piece, ...], second: tuple[Piece, ...]) -> tuple[Piece, ...] | None:
    """The real numbers in both."""
    outside = union([*complement(first), *complement(second)])
    return None if outside is None else complement(outside)


def compare(a: Answer, b: Answer) -> int | None:
    """-1, 0 or 1 for a below, equal to or above b; None where one of them is not real."""
    if "infinity" in (a.kind, b.kind):
        left, right = (each.value if each.kind == "infinity" else 0 for each in (a, b))
        return (left > right) - (left < right)
    if a.kind == b.kind == "number":
        return (a.value > b.value) - (a.value < b.value)
    values: list[Any] = [real_value(as_node(each)) for each in (a, b)]
    if None in values:
        return None
    if agree(as_node(a), as_node(b)):
        return 0
    sign = real_value(difference(as_node(a), as_node(b)))
    return None if sign is None else (sign > 0) - (sign < 0)

"""Trace-time checks of the arguments of a loss."""

from __future__ import annotations

from typing import Any

import chex
import jax
from jaxtyping import Array, Float

Scalar = float | Float[Array, ""]
"""A coefficient: a Python number, or an array of rank 0, which may be traced (a schedule, an adaptive KL penalty)."""


def check_shapes(shape: tuple[int, ...], **arrays: Any) -> None:
    """Check that each array is None or has the given shape.

    Args:
        shape: expected of every array.
        arrays: arrays by the names that the error message gives them.

    Raises:
        AssertionError: a shape differs.
    """
    for name, x in arrays.items():
        if x is not None:
            chex.assert_shape(x, shape, custom_message=name)


def is_zero(coefficient: Any) -> bool:
    """Whether a coefficient is a Python 0, whose term is left out; an array never is, whatever its value."""
    return not isinstance(coefficient, jax.Array) and coefficient == 0


def require(name: str, coefficient: Any, **arrays: Any) -> None:
    """Check that a term's arrays are given if its coefficient turns it on.

    Args:
        name: of the coefficient, for the error message.
        coefficient: a scalar; None or a Python 0 for a term that is left out.
        arrays: the arrays that the term is computed from, by name.

    Raises:
        AssertionError: the coefficient is an array that is not a scalar.
        ValueError: an array is None.
    """
    if coefficient is None or is_zero(coefficient):
        return
    chex.assert_shape(coefficient, (), custom_message=name)
    for array_name, x in arrays.items():
        if x is None:
            value = "an array" if isinstance(coefficient, jax.Array) else coefficient
            raise ValueError(f"{name} is {value}, which needs {array_name}; pass {array_name}, or leave {name} out")

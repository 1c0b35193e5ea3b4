"""The metrics of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np


def over_updates(updates: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """A step's metrics: over its updates, the largest of what is a maximum and the mean of the rest."""
    values = {name: [float(update[name]) for update in updates] for name in updates[0]}
    return {
        # NumPy's maximum of NaN is NaN; Python's depends on the order.
        name: float(np.max(each)) if name.endswith("/max") else sum(each) / len(each)
        for name, each in values.items()
    }

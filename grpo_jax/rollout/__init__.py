"""From prompts to completions.

``generate`` is one pure function, to be jitted from outside. ``make_rollout`` and ``make_stream`` draw the same samples
several times faster, with a small loop on the host: they leave out the rows that have ended and grow the cache as it is
needed. All are made of the pure functions in ``steps``.
"""

from grpo_jax.rollout.drawn import RolloutStats
from grpo_jax.rollout.make import make_rollout, make_stream
from grpo_jax.rollout.steps import generate, sample_keys

__all__ = ["RolloutStats", "generate", "make_rollout", "make_stream", "sample_keys"]

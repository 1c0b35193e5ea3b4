"""From prompts to completions.

``generate`` is one pure function, to be jitted from outside. A ``Sampler`` draws the same samples several times faster,
with a small loop on the host: it leaves out the rows that have ended. Both are made of the pure functions in ``steps``.
"""

from grpo_jax.rollout.drawn import RolloutStats
from grpo_jax.rollout.engine import StopFn, WatchFn
from grpo_jax.rollout.sampler import Sampler
from grpo_jax.rollout.steps import generate, sample_keys

__all__ = ["RolloutStats", "Sampler", "StopFn", "WatchFn", "generate", "sample_keys"]

"""From prompts to completions.

``generate`` is one pure function, to be jitted from outside. A ``Sampler`` draws the same samples several times faster,
with a small loop on the host: it leaves out the rows that have ended. Both are made of the pure functions in ``steps``.
"""

from grpo_jax.rollout.decode import sample_keys
from grpo_jax.rollout.engine import OnTokensFn, StopFn
from grpo_jax.rollout.generate import generate
from grpo_jax.rollout.host_batch import RolloutStats
from grpo_jax.rollout.sampler import Sampler

__all__ = ["OnTokensFn", "RolloutStats", "Sampler", "StopFn", "generate", "sample_keys"]

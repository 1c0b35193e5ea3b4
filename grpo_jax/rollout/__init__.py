"""Sampling of completions from prompts.

``generate`` is one pure function, to be jitted by the caller. ``Sampler`` returns the same samples several times faster
by means of a loop on the host, which removes finished rows from the batch. Both are built from the pure functions in
``decode``.
"""

from grpo_jax.rollout.compiled import StopFn
from grpo_jax.rollout.decode import sample_keys
from grpo_jax.rollout.engine import OnTokensFn
from grpo_jax.rollout.generate import generate
from grpo_jax.rollout.host_batch import RolloutStats
from grpo_jax.rollout.sampler import Sampler

__all__ = ["OnTokensFn", "RolloutStats", "Sampler", "StopFn", "generate", "sample_keys"]

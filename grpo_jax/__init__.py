"""grpo_jax: reinforcement learning of language models in JAX, as pure functions on arrays."""

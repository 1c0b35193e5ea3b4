"""From logits to the distribution that is sampled, and from there to a token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from grpo_jax.log_probs import token_log_probs


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are kept; None keeps all. Ties with the k-th are kept.
        top_p: only the smallest set of likeliest tokens with at least this probability is kept; 1 keeps all.
            Ties with the last of them are kept.
        min_p: only tokens at least this fraction as likely as the likeliest are kept; 0 keeps all.

    Raises:
        ValueError: a field out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and below 1")

    @property
    def truncates(self) -> bool:
        """Whether the distribution drawn from is not the policy's own: tokens were removed, or it is greedy."""
        return self.temperature == 0 or self.top_k is not None or self.top_p < 1 or self.min_p > 0


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from: divided by the temperature, removed tokens at ``-inf``; float32.

    The order is temperature, top-k, top-p, min-p, each acting on what the one before it kept. Temperature 0 keeps the
    likeliest token (the first of equals) alone.
    """
    logits = logits.astype(jnp.float32)
    if sampling.temperature == 0:
        best = jnp.argmax(logits, axis=-1, keepdims=True)
        return jnp.where(jnp.arange(logits.shape[-1])[None, :] == best, logits, -jnp.inf)
    logits = logits / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        upto = jnp.cumsum(jax.nn.softmax(ordered), axis=-1)
        before = jnp.concatenate([jnp.zeros_like(upto[:, :1]), upto[:, :-1]], axis=-1)
        least = jnp.min(jnp.where(before < sampling.top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if sampling.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def sample_token(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for each row by inverting the cumulative distribution at one uniform number.

    What a row draws depends on its own key and logits alone, not on the batch around it.

    Args:
        keys: one for each row.
        logits: the policy's, unscaled.
        sampling: temperature and filters.

    Returns:
        Tokens, and their log-probabilities under the distribution they were drawn from (0 for a greedy choice).
    """
    logits = filter_logits(logits, sampling)
    probabilities = jax.nn.softmax(logits)
    # A parallel sum need not grow monotonically in its last digit: a token without probability is never above it.
    cumulative = jnp.where(probabilities > 0, jnp.cumsum(probabilities, axis=-1), 0)
    total = jnp.max(cumulative, axis=-1)
    # Strictly below the total, so that the first sum above the threshold exists; its token has a probability above 0.
    threshold = jnp.minimum(jax.vmap(jax.random.uniform)(keys) * total, jnp.nextafter(total, jnp.zeros_like(total)))
    tokens = jnp.argmax(cumulative > threshold[:, None], axis=-1).astype(jnp.int32)
    return tokens, token_log_probs(logits, tokens)

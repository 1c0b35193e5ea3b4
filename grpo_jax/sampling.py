"""From logits to the distribution that is sampled, and from there to a token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

BLOCK = 64


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; hashable, so that it can be a static argument of a jitted function.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the k likeliest tokens are kept; None keeps all. Ties with the k-th are kept.
        top_p: only the smallest set of likeliest tokens with at least this probability is kept; 1 keeps all.
            Ties with the last of them are kept.
        min_p: only tokens at least this fraction as likely as the likeliest are kept; 0 keeps all.
        repetition_penalty: logits of tokens that are in the prompt or were drawn are divided by it where they are above
            0 and multiplied by it elsewhere (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1); 1
            leaves them alone.
        presence_penalty: subtracted from the logits of tokens that were drawn.
        logit_bias: pairs of a token and what is added to its logit; ``-inf`` rules it out.
        min_length: tokens before which no ending token is drawn.

    Raises:
        ValueError: a field out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_length: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and below 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1 for none)")
        if not math.isfinite(self.presence_penalty):
            raise ValueError(f"presence_penalty is {self.presence_penalty}; it must be finite (0 for none)")
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias) or bias == math.inf:
                raise ValueError(
                    f"logit_bias has {bias} for token {token}; tokens start at 0, biases are finite or -inf"
                )
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError(f"logit_bias names a token twice: {self.logit_bias}")
        if self.min_length < 0:
            raise ValueError(f"min_length is {self.min_length}; it must be at least 0")

    @property
    def needs_drawn(self) -> bool:
        """Whether it matters which tokens a row has drawn."""
        return self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def needs_prompted(self) -> bool:
        """Whether it matters which tokens are in a row's prompt."""
        return self.repetition_penalty != 1

    @property
    def alters_policy(self) -> bool:
        """Whether the distribution drawn from is not the policy's own at this temperature."""
        filtered = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        return self.temperature == 0 or filtered or self.needs_drawn or bool(self.logit_bias) or self.min_length > 0


def adjust_logits(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    length: int | Int[Array, ""] = 0,
    eos_ids: tuple[int, ...] = (),
    prompted: Bool[Array, "B V"] | None = None,
    drawn: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Penalties, bias and minimum length, in this order; float32.

    Args:
        logits: the policy's.
        sampling: which of them.
        length: tokens that each row has drawn.
        eos_ids: the ending tokens.
        prompted: which tokens are in the prompt; None for none.
        drawn: which tokens were drawn; None for none.

    Raises:
        ValueError: at trace time, for a biased token outside the vocabulary.
    """
    logits = logits.astype(jnp.float32)
    V = logits.shape[-1]
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros(logits.shape, bool)
        for tokens in (prompted, drawn):
            seen = seen if tokens is None else seen | tokens
        penalized = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, penalized, logits)
    if sampling.presence_penalty != 0 and drawn is not None:
        logits = logits - sampling.presence_penalty * drawn.astype(jnp.float32)
    if sampling.logit_bias:
        outside = [token for token, _ in sampling.logit_bias if token >= V]
        if outside:
            raise ValueError(f"logit_bias names tokens {outside}; the vocabulary has {V}")
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits = logits.at[:, jnp.array(tokens)].add(jnp.array(biases, jnp.float32)[None, :])
    if sampling.min_length > 0 and eos_ids:
        ends = (jnp.arange(V)[:, None] == jnp.array(eos_ids)[None, :]).any(1)
        logits = jnp.where(ends[None, :] & (length < sampling.min_length), -jnp.inf, logits)
    return logits


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
        ones = jnp.ones(logits.shape, jnp.int32)
        logits = _keep_largest(logits, ones, jnp.int32(sampling.top_k))
    if sampling.top_p < 1:
        logits = _keep_largest(logits, jax.nn.softmax(logits), jnp.float32(sampling.top_p))
    if sampling.min_p > 0:
        floor = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        logits = jnp.where(logits >= floor, logits, -jnp.inf)
    return logits


def sample_token(
    keys: Key[Array, " B"], logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw one token for each row by inverting the cumulative distribution, first over blocks of tokens, then inside.

    Two uniform numbers a row, whatever the vocabulary; the normalizer comes with them. What a row draws depends on its
    own key and logits alone, not on the batch around it.

    Args:
        keys: one for each row.
        logits: as ``adjust_logits`` gives them; unscaled.
        sampling: temperature and filters.

    Returns:
        Tokens, and their log-probabilities under the distribution they were drawn from (0 for a greedy choice).
    """
    B, V = logits.shape
    logits = filter_logits(logits, sampling)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    padded = jnp.pad(shifted, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf).reshape(B, -1, BLOCK)
    masses = jnp.exp(padded).sum(-1)
    numbers = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(masses, numbers[:, 0])
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    token = _invert(jnp.exp(inside), numbers[:, 1])
    chosen = jnp.take_along_axis(inside, token[:, None], axis=1)[:, 0]
    return block * BLOCK + token, chosen - jnp.log(masses.sum(-1))


def _invert(masses: Float[Array, "B M"], numbers: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first place whose cumulative mass is above the number's share of all mass; never one without mass."""
    # A parallel sum need not grow monotonically in its last digit: a place without mass is never above it.
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), 0)
    total = jnp.max(cumulative, axis=-1)
    # Strictly below the total, so that the first sum above the threshold exists.
    threshold = jnp.minimum(numbers * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulative > threshold[:, None], axis=-1).astype(jnp.int32)


def _keep_largest(logits: Float[Array, "B V"], weights: Array, needed: Array) -> Float[Array, "B V"]:
    """The fewest largest logits with at least the needed weight, ties with the least of them included; else ``-inf``.

    Found by halving the range of float32, bit by bit: 32 sums, exact, and no sort.
    """
    order = _ordered_bits(logits)

    def halve(i, least):
        candidate = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.where(order >= candidate[:, None], weights, 0).sum(-1)
        return jnp.where(weight >= needed, candidate, least)

    least = jax.lax.fori_loop(0, 32, halve, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= least[:, None], logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Whole numbers in the order of the floats, equal where these are."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))

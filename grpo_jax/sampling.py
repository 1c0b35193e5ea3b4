"""The sampling distribution, from the policy's logits, and sampling from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

BLOCK = 64


def check_key(key: Any) -> None:
    """Check that a random key has a key type.

    Raises:
        TypeError: at trace time, for an old-style key of ``jax.random.PRNGKey``, or for something else.
    """
    if not jnp.issubdtype(getattr(key, "dtype", jnp.int32), jax.dtypes.prng_key):
        kind = f"an array of {key.dtype}" if isinstance(key, jax.Array) else f"a {type(key).__name__}"
        raise TypeError(f"key is {kind}; pass jax.random.key(seed), or wrap_key_data of an old-style PRNGKey")


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampling distribution; hashable, so that they can be a static argument of a jitted function.

    Attributes:
        temperature: divisor of the logits; 0 is greedy.
        top_k: keeps the k most likely tokens, and ties with the k-th; None keeps all.
        top_p: keeps the smallest set of most likely tokens with at least this probability, and ties with its last;
            1 keeps all.
        min_p: keeps tokens at least this fraction as likely as the most likely one; 0 keeps all.
        repetition_penalty: divides the positive logits, and multiplies the others, of tokens in the prompt or in the
            completion so far (Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1); 1 for none.
        presence_penalty: subtracted from the logits of tokens in the completion so far.
        logit_bias: pairs of a token and the bias added to its logit; ``-inf`` excludes it.
        min_length: EOS tokens are excluded before this many tokens.

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
            raise ValueError(f"logit_bias has a token twice: {self.logit_bias}")
        if self.min_length < 0:
            raise ValueError(f"min_length is {self.min_length}; it must be at least 0")

    @property
    def needs_completion_tokens(self) -> bool:
        """Whether the logits depend on the tokens of the completion so far."""
        return self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def needs_prompt_tokens(self) -> bool:
        """Whether the logits depend on the tokens of the prompt."""
        return self.repetition_penalty != 1

    @property
    def alters_policy(self) -> bool:
        """Whether the sampling distribution differs from the policy at this temperature."""
        filtered = self.top_k is not None or self.top_p < 1 or self.min_p > 0
        adjusted = self.needs_completion_tokens or bool(self.logit_bias) or self.min_length > 0
        return self.temperature == 0 or filtered or adjusted


def adjust_logits(
    logits: Float[Array, "B V"],
    sampling: Sampling,
    *,
    length: int | Int[Array, ""] = 0,
    eos_ids: tuple[int, ...] = (),
    in_prompt: Bool[Array, "B V"] | None = None,
    in_completion: Bool[Array, "B V"] | None = None,
) -> Float[Array, "B V"]:
    """Logits with penalties, bias and minimum length applied, in this order; float32.

    Args:
        logits: the policy's logits.
        sampling: the penalties, biases and minimum length; its filters are not applied.
        length: tokens of each completion so far.
        eos_ids: the EOS tokens.
        in_prompt: True at the tokens of each row's prompt; None for none.
        in_completion: True at the tokens of each row's completion so far; None for none.

    Raises:
        ValueError: at trace time, for a biased token outside the vocabulary.
        AssertionError: at trace time, for masks of another shape than ``logits``.
    """
    chex.assert_rank(logits, 2, custom_message="logits")
    for name, mask in (("in_prompt", in_prompt), ("in_completion", in_completion)):
        if mask is not None:
            chex.assert_shape(mask, logits.shape, custom_message=name)
    logits = logits.astype(jnp.float32)
    V = logits.shape[-1]
    if sampling.repetition_penalty != 1:
        seen = jnp.zeros(logits.shape, bool)
        for mask in (in_prompt, in_completion):
            seen = seen if mask is None else seen | mask
        penalized = jnp.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = jnp.where(seen, penalized, logits)
    if sampling.presence_penalty != 0 and in_completion is not None:
        logits = logits - sampling.presence_penalty * in_completion.astype(jnp.float32)
    if sampling.logit_bias:
        outside = [token for token, _ in sampling.logit_bias if token >= V]
        if outside:
            raise ValueError(f"logit_bias has tokens {outside}; the vocabulary has {V}")
        tokens, biases = zip(*sampling.logit_bias, strict=True)
        logits = logits.at[:, jnp.array(tokens)].add(jnp.array(biases, jnp.float32)[None, :])
    if sampling.min_length > 0 and eos_ids:
        is_eos = (jnp.arange(V)[:, None] == jnp.array(eos_ids)[None, :]).any(1)
        logits = jnp.where(is_eos[None, :] & (length < sampling.min_length), -jnp.inf, logits)
    return logits


def filter_logits(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Logits of the sampling distribution: ``logits / temperature``, with removed tokens at ``-inf``; float32.

    Filters are applied in the order top-k, top-p, min-p, each to the tokens that the one before kept. Temperature 0
    keeps only the most likely token (the first of equals).

    Args:
        logits: as returned by ``adjust_logits``.
        sampling: temperature and filters; its penalties are not applied.

    Raises:
        AssertionError: at trace time, for logits that are not of rank 2.
    """
    chex.assert_rank(logits, 2, custom_message="logits")
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
    """Sample a token for each row by inverting the cumulative distribution, first over blocks of tokens, then within.

    This takes two uniform numbers for each row, whatever the vocabulary, and yields the normalizer. A row's token
    depends on its own key and logits only.

    Args:
        keys: a random key for each row.
        logits: as returned by ``adjust_logits``.
        sampling: temperature and filters.

    Returns:
        Tokens, int32, and their log-probabilities under the sampling distribution, float32 (0 for greedy).

    Raises:
        AssertionError: at trace time, for another number of keys than rows.
    """
    chex.assert_shape(keys, logits.shape[:1], custom_message="keys: one per row of logits")
    B, V = logits.shape
    logits = filter_logits(logits, sampling)
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    padded = jnp.pad(shifted, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf).reshape(B, -1, BLOCK)
    masses = jnp.exp(padded).sum(-1)
    uniforms = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(masses, uniforms[:, 0])
    inside = jnp.take_along_axis(padded, block[:, None, None], axis=1)[:, 0]
    token = _invert(jnp.exp(inside), uniforms[:, 1])
    chosen = jnp.take_along_axis(inside, token[:, None], axis=1)[:, 0]
    return block * BLOCK + token, chosen - jnp.log(masses.sum(-1))


def _invert(masses: Float[Array, "B M"], uniforms: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index whose cumulative mass exceeds ``uniform * total``; never an index without mass."""
    # A parallel cumulative sum is not monotonic in its last bit, so that indices without mass are excluded explicitly.
    cumulative = jnp.where(masses > 0, jnp.cumsum(masses, axis=-1), 0)
    total = jnp.max(cumulative, axis=-1)
    # Strictly below the total, so that the first sum above the threshold exists.
    threshold = jnp.minimum(uniforms * total, jnp.nextafter(total, jnp.zeros_like(total)))
    return jnp.argmax(cumulative > threshold[:, None], axis=-1).astype(jnp.int32)


def _keep_largest(logits: Float[Array, "B V"], weights: Array, needed: Array) -> Float[Array, "B V"]:
    """The fewest largest logits with at least the needed weight, and ties with the least of them; else ``-inf``.

    The least kept logit is found by bisection over the bits of float32: 32 exact sums and no sort.
    """
    order = _ordered_bits(logits)

    def halve(i, least):
        candidate = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        weight = jnp.where(order >= candidate[:, None], weights, 0).sum(-1)
        return jnp.where(weight >= needed, candidate, least)

    least = jax.lax.fori_loop(0, 32, halve, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(order >= least[:, None], logits, -jnp.inf)


def _ordered_bits(x: Float[Array, "B V"]) -> UInt32[Array, "B V"]:
    """Unsigned integers in the order of the floats, equal where these are equal."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0, x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(2**31))

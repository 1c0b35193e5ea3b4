"""Logits, token log-probabilities and entropies: one definition for sampler and trainer.

The sampler computes its logits with ``output_logits``; its log-probabilities are by-products of sampling
(``sampling.sample_token``), and tests compare them with ``token_log_probs``.

``token_log_probs`` and ``token_entropy`` take logits. ``chunked_log_probs`` takes hidden states and never holds the
logits of more than one chunk of tokens, forward or backward: with a vocabulary of 150,000 the logits of a training
batch would be by far the largest array of the step.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | Float[Array, ""]


def output_logits(
    hidden: Float[Array, "*tokens D"], head: Float[Array, "V D"] | None, *, logit_softcap: float | None = None
) -> Float[Array, "*tokens V"]:
    """``x = hidden @ head.T``, accumulated and returned in float32; ``c * tanh(x / c)`` with a soft cap ``c``.

    Args:
        hidden: the decoder's last hidden states, final norm applied.
        head: the output embedding; cast to the dtype of ``hidden`` before the product. None if ``hidden`` are the
            products already, D = V.
        logit_softcap: ``c`` (Gemma 2); None for no cap.

    Raises:
        AssertionError: at trace time, for a width of the hidden states that is not that of the head.
    """
    if head is None:
        logits = hidden.astype(jnp.float32)
    else:
        chex.assert_shape(head, (None, hidden.shape[-1]), custom_message="head: [V, D] for hidden [..., D]")
        logits = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)


def token_log_probs(
    logits: Float[Array, "*tokens V"], token_ids: Int[Array, "*tokens"], *, temperature: Scalar = 1.0
) -> Float[Array, "*tokens"]:
    """``log softmax(logits / temperature)[token_ids]``, in float32 for any dtype of ``logits``.

    Args:
        logits: computed from the tokens before each of ``token_ids``.
        token_ids: the tokens to score.
        temperature: of the policy; the same for sampler, policy, old policy and reference. A number, or an array of
            rank 0, which may be traced and is not checked.

    Raises:
        AssertionError: at trace time, for token_ids that are not integers, one per row of logits.
        ValueError: temperature is a number not above 0.
    """
    chex.assert_shape(token_ids, logits.shape[:-1], custom_message="token_ids: one per row of logits")
    chex.assert_type(token_ids, int, custom_message="token_ids")
    shifted = _scale_and_shift(logits, temperature)
    chosen = jnp.take_along_axis(shifted, token_ids[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.exp(shifted).sum(-1))


def token_entropy(logits: Float[Array, "*tokens V"], *, temperature: Scalar = 1.0) -> Float[Array, "*tokens"]:
    """Entropy in nats of ``softmax(logits / temperature)``, in float32.

    Args:
        logits: of any float dtype.
        temperature: as in ``token_log_probs``.

    Raises:
        ValueError: temperature is a number not above 0.
    """
    shifted = _scale_and_shift(logits, temperature)
    log_normalizer = jnp.log(jnp.exp(shifted).sum(-1))
    probabilities = jnp.exp(shifted - log_normalizer[..., None])
    return log_normalizer - (probabilities * jnp.where(jnp.isneginf(shifted), 0, shifted)).sum(-1)


def chunked_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"] | None,
    token_ids: Int[Array, "B T"],
    *,
    temperature: Scalar = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy of each token from hidden states, one chunk of tokens at a time.

    The same numbers as ``token_log_probs`` and ``token_entropy`` of ``output_logits(hidden, head)``. Logits exist for
    one chunk at a time; the backward pass recomputes them, and accumulates the head's gradient in float32.

    Args:
        hidden: ``hidden[:, t]`` is the state that predicts ``token_ids[:, t]``.
        head: the output embedding, or None, as in ``output_logits``.
        token_ids: the tokens to score.
        temperature: as in ``token_log_probs``.
        logit_softcap: as in ``output_logits``.
        chunk_size: approximate number of tokens in a chunk. Chunks are cut along T, never across B, so that a batch
            sharded over devices is not moved; a chunk has at least one token of every sequence.

    Returns:
        Log-probabilities and entropies, float32.

    Raises:
        AssertionError: at trace time, for token_ids that are not [B, T] or a head that is not [V, D].
        ValueError: temperature is a number not above 0, or chunk_size is below 1.
    """
    chex.assert_rank(hidden, 3, custom_message="hidden")
    chex.assert_shape(token_ids, hidden.shape[:2], custom_message="token_ids: one per hidden state")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it counts tokens, at least 1")
    B, T, _ = hidden.shape
    width = min(T, max(1, chunk_size // B))
    num_chunks = -(-T // width)
    padding = num_chunks * width - T
    if head is not None:
        head = head.astype(jnp.float32)  # so that the gradient is accumulated over the chunks in float32

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(B, num_chunks, width, *x.shape[2:]), 1, 0)

    def join(x):
        return jnp.moveaxis(x, 0, 1).reshape(B, num_chunks * width)[:, :T]

    @jax.checkpoint
    def score(_, chunk):
        states, ids = chunk
        logits = output_logits(states, head, logit_softcap=logit_softcap)
        log_probs = token_log_probs(logits, ids, temperature=temperature)
        return None, (log_probs, token_entropy(logits, temperature=temperature))

    _, (log_probs, entropy) = jax.lax.scan(score, None, (split(hidden), split(token_ids)))
    return join(log_probs), join(entropy)


def _scale_and_shift(logits, temperature):
    chex.assert_shape(temperature, (), custom_message="temperature")
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities are defined for a temperature above 0")
    scaled = logits.astype(jnp.float32) / temperature
    # Relative to the largest logit, differences of large logits keep their digits.
    return scaled - jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))

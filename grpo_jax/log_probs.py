"""The one definition of logits, token log-probability and entropy.

The sampler has its logits from here; its log-probability comes with the draw (``sampling.sample_token``), and the tests
hold it to ``token_log_probs``.

``token_log_probs`` and ``token_entropy`` work on logits. ``chunked_log_probs`` works on hidden states and never holds
the logits of more than one chunk of tokens, forward or backward: at a vocabulary of 150,000 the logits of a training
batch are the largest array of the whole step by far.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def output_logits(
    hidden: Float[Array, "*tokens D"], head: Float[Array, "V D"], *, logit_softcap: float | None = None
) -> Float[Array, "*tokens V"]:
    """``hidden @ head.T``, accumulated and returned in float32; ``c * tanh(logits / c)`` of it with a soft cap ``c``.

    Args:
        hidden: the decoder's last hidden states, final norm applied.
        head: the output embedding; cast to the dtype of ``hidden`` before the product.
        logit_softcap: ``c``, or None for no cap (Gemma 2 has one).
    """
    logits = jnp.einsum("...d,vd->...v", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if logit_softcap is None else logit_softcap * jnp.tanh(logits / logit_softcap)


def token_log_probs(
    logits: Float[Array, "*tokens V"], token_ids: Int[Array, "*tokens"], *, temperature: float = 1.0
) -> Float[Array, "*tokens"]:
    """``log softmax(logits / temperature)[token_ids]``, in float32 whatever the dtype of ``logits``.

    Args:
        logits: the logits that score each token: those computed from the tokens before it.
        token_ids: the tokens scored.
        temperature: that of the policy; the same for sampler, policy, old policy and reference.

    Raises:
        ValueError: temperature not above 0.
    """
    shifted = _scale_and_shift(logits, temperature)
    chosen = jnp.take_along_axis(shifted, token_ids[..., None], axis=-1)[..., 0]
    return chosen - jnp.log(jnp.exp(shifted).sum(-1))


def token_entropy(logits: Float[Array, "*tokens V"], *, temperature: float = 1.0) -> Float[Array, "*tokens"]:
    """Entropy in nats of ``softmax(logits / temperature)``, in float32.

    Raises:
        ValueError: temperature not above 0.
    """
    shifted = _scale_and_shift(logits, temperature)
    log_normalizer = jnp.log(jnp.exp(shifted).sum(-1))
    probabilities = jnp.exp(shifted - log_normalizer[..., None])
    return log_normalizer - (probabilities * jnp.where(jnp.isneginf(shifted), 0, shifted)).sum(-1)


def chunked_log_probs(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    token_ids: Int[Array, "B T"],
    *,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    chunk_size: int = 1024,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy of each token, from hidden states, in chunks.

    The same numbers as ``token_log_probs`` and ``token_entropy`` of ``output_logits(hidden, head)``. Logits exist for
    one chunk at a time; the backward pass computes them again, and accumulates the head's gradient in float32.

    Args:
        hidden: ``hidden[:, t]`` is the state that predicts ``token_ids[:, t]``.
        head: the output embedding.
        token_ids: the tokens scored.
        temperature: as in ``token_log_probs``.
        logit_softcap: as in ``output_logits``.
        chunk_size: about how many tokens a chunk holds. Chunks are cut along T, never across B, so that a batch
            sharded over devices stays where it is; each holds at least one token of every sequence.

    Returns:
        Log-probabilities and entropies, float32.

    Raises:
        ValueError: temperature not above 0, or chunk_size below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it counts tokens, at least 1")
    B, T, _ = hidden.shape
    width = min(T, max(1, chunk_size // B))
    num_chunks = -(-T // width)
    padding = num_chunks * width - T
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


def _scale_and_shift(logits, temperature: float):
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities are defined for a temperature above 0")
    scaled = logits.astype(jnp.float32) / temperature
    # Relative to the largest, differences of large logits keep their digits.
    return scaled - jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))

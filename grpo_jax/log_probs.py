"""Logits, token log-probabilities and entropies: one definition for sampler and trainer.

The sampler computes its logits with ``output_logits``; its log-probabilities are by-products of sampling
(``sampling.sample_token``), and tests compare them with ``token_log_probs``.

``token_log_probs`` and ``token_entropy`` take logits. ``chunked_log_probs`` takes hidden states and never holds the
logits of more than one chunk of tokens, forward or backward: with a vocabulary of 150,000 the logits of a training
batch would be by far the largest array of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float, Int

Scalar = float | Float[Array, ""]
CHUNK_SIZE = 1024
"""Tokens on a device whose logits exist at a time."""


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
    chunk_size: int = CHUNK_SIZE,
    mask: Bool[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability and entropy of each token from hidden states, one chunk of tokens at a time.

    The same numbers as ``token_log_probs`` and ``token_entropy`` of ``output_logits(hidden, head)``. Logits exist for
    one chunk at a time; the backward pass computes them again, and accumulates the head's gradient in float32. Where
    the entropy has no gradient, it costs nothing there.

    Args:
        hidden: ``hidden[:, t]`` is the state that predicts ``token_ids[:, t]``.
        head: the output embedding, or None, as in ``output_logits``.
        token_ids: the tokens to score.
        temperature: as in ``token_log_probs``.
        logit_softcap: as in ``output_logits``.
        chunk_size: approximate number of tokens in a chunk. Chunks are cut along T, never across B, so that a batch
            sharded over devices is not moved; a chunk has at least one token of every sequence.
        mask: True at the tokens to score; None for all. Chunks without any are skipped; the outputs at other tokens are
            finite and meaningless, and their gradients are those of their outputs, or 0 if they were skipped.

    Returns:
        Log-probabilities and entropies, float32, differentiable in reverse mode.

    Raises:
        AssertionError: at trace time, for token_ids that are not [B, T] or a head that is not [V, D].
        ValueError: temperature is a number not above 0, or chunk_size is below 1.
    """
    return scored(ChunkedHead(chunk_size, logit_softcap), hidden, head, token_ids, mask, temperature)


class HeadGradients(NamedTuple):
    """Gradients of log-probabilities and entropies; None for an input that has none."""

    hidden: Float[Array, "B T D"]
    head: Float[Array, "V D"] | None
    temperature: Float[Array, ""] | None


@dataclass(frozen=True)
class ChunkedHead:
    """Log-probabilities from hidden states, forward and backward, one chunk of tokens at a time.

    On one device, or inside ``shard_map`` with a part of the vocabulary on each device: then a chunk's states are
    gathered from the devices that share the vocabulary, and sums over the vocabulary are sums over devices.

    Attributes:
        chunk_size: tokens of a chunk on a device.
        logit_softcap: as in ``output_logits``.
        min_chunks: more than 1 for narrow chunks, of which a mask may leave many out.
        vocab_axes: mesh axes over which the rows of the head are sharded.
        token_axes: those of them over which the tokens are sharded too.
        batch_axes: all mesh axes over which the tokens are sharded.
        vocab_size: V, if the head has more rows, of padding.
    """

    chunk_size: int
    logit_softcap: float | None = None
    min_chunks: int = 1
    vocab_axes: tuple[str, ...] = ()
    token_axes: tuple[str, ...] = ()
    batch_axes: tuple[str, ...] = ()
    vocab_size: int | None = None

    def forward(self, hidden: Array, head: Array | None, token_ids: Array, mask: Array | None, temperature: Any):
        """Log-probabilities, entropies and logarithms of the normalizers, each [B, T].

        Args:
            hidden, head, token_ids, mask, temperature: as in ``chunked_log_probs``.
        """
        cast = None if head is None else head.astype(hidden.dtype)

        def score(states, ids):
            logits, vocabulary = self._logits(self._gathered(states), cast)
            ids = self._gathered(ids)
            scaled = logits / temperature
            # Relative to the largest logit, differences of large logits keep their digits.
            peak = self._largest(scaled.max(-1))
            shifted = scaled - peak[:, None]
            normalizer = jnp.log(self._total(jnp.exp(shifted).sum(-1)))
            # Not from one exponential: if it served both sums, the normalizer would differ from the sampler's by a bit.
            products = jnp.exp(shifted - normalizer[:, None]) * jnp.where(jnp.isneginf(shifted), 0, shifted)
            entropy = normalizer - self._total(products.sum(-1))
            if self.vocab_axes:
                is_chosen = ids[:, None] == vocabulary[None]
                chosen = self._total(jnp.where(is_chosen, shifted, 0).sum(-1))
            else:
                chosen = jnp.take_along_axis(shifted, ids[:, None], axis=-1)[:, 0]
            return tuple(self._own(x) for x in (chosen - normalizer, entropy, normalizer + peak))

        def score_chunk(_, chunk):
            states, ids, is_wanted = chunk
            nothing = jnp.zeros(ids.size, jnp.float32)
            out = self._where_wanted(is_wanted, lambda: score(_flat(states), ids.reshape(-1)), (nothing,) * 3)
            return None, tuple(x.reshape(ids.shape) for x in out)

        chunks = self._split(hidden, token_ids, mask)
        _, outputs = jax.lax.scan(score_chunk, None, chunks)
        return tuple(_join(x, hidden.shape[1]) for x in outputs)

    def backward(
        self,
        inputs: tuple[Array, Array | None, Array, Array | None, Any],
        log_normalizers: Array,
        entropies: Array,
        log_prob_grads: Array,
        entropy_grads: Array | None,
        *,
        for_temperature: bool,
    ) -> HeadGradients:
        """Gradients of the sum of outputs times ``log_prob_grads`` and ``entropy_grads``.

        Args:
            inputs: of ``forward``.
            log_normalizers, entropies: of ``forward``.
            log_prob_grads: [B, T].
            entropy_grads: [B, T]; None for zeros.
            for_temperature: whether to compute the temperature's gradient.
        """
        hidden, head, token_ids, mask, temperature = inputs
        cast = None if head is None else head.astype(hidden.dtype)

        def gradients(states, ids, normalizer, entropy, log_prob_grad, entropy_grad):
            states = self._gathered(states)
            logits, vocabulary = self._logits(states, cast)
            scaled = logits / temperature
            log_probs = scaled - self._gathered(normalizer)[:, None]
            probabilities = jnp.exp(log_probs)
            weight = self._gathered(log_prob_grad)[:, None]
            is_chosen = self._gathered(ids)[:, None] == vocabulary[None]
            grads = jnp.where(is_chosen, weight - weight * probabilities, -weight * probabilities)
            if entropy_grad is not None:
                surprise = jnp.where(probabilities > 0, log_probs, 0) + self._gathered(entropy)[:, None]
                grads -= self._gathered(entropy_grad)[:, None] * probabilities * surprise
            of_temperature = None
            if for_temperature:
                of_temperature = -(grads * jnp.where(jnp.isneginf(scaled), 0, scaled)).sum() / temperature
            grads = grads / temperature
            if self.logit_softcap is not None:
                capped = jnp.maximum(logits, -self.logit_softcap)  # without the -inf of rows of padding
                grads = grads * (1 - (capped / self.logit_softcap) ** 2)
            if cast is None:
                return grads, None, of_temperature
            grads = grads.astype(hidden.dtype)
            dot = partial(jnp.einsum, preferred_element_type=jnp.float32)
            return self._summed_own(dot("tv,vd->td", grads, cast)), dot("tv,td->vd", grads, states), of_temperature

        def add_chunk(totals, chunk):
            *arrays, is_wanted = chunk
            states, *rest = arrays

            def added():
                of_states, *of_others = gradients(_flat(states), *(x if x is None else x.reshape(-1) for x in rest))
                return of_states.astype(states.dtype), jax.tree.map(jnp.add, totals, tuple(of_others))

            of_states, totals = self._where_wanted(is_wanted, added, (jnp.zeros_like(_flat(states)), totals))
            return totals, of_states.reshape(states.shape)

        totals = (
            None if head is None else jnp.zeros(head.shape, jnp.float32),
            jnp.float32(0) if for_temperature else None,
        )
        chunks = self._split(hidden, token_ids, log_normalizers, entropies, log_prob_grads, entropy_grads, mask)
        totals, of_states = jax.lax.scan(add_chunk, totals, chunks)
        return HeadGradients(_join(of_states, hidden.shape[1]), *totals)

    def _split(self, hidden: Array, *others: Array | None) -> tuple[Array | None, ...]:
        """``[B, T, ...] -> [chunks, B, width, ...]`` of each array, padded with zeros."""
        B, T = hidden.shape[:2]
        width = min(-(-T // self.min_chunks), max(1, self.chunk_size // B))
        num_chunks = -(-T // width)

        def split(x: Array) -> Array:
            padded = jnp.pad(x, [(0, 0), (0, num_chunks * width - T)] + [(0, 0)] * (x.ndim - 2))
            return jnp.moveaxis(padded.reshape(B, num_chunks, width, *x.shape[2:]), 1, 0)

        return tuple(None if x is None else split(x) for x in (hidden, *others))

    def _where_wanted(self, is_wanted: Array | None, compute: Callable[[], Any], otherwise: Any) -> Any:
        if is_wanted is None:
            return compute()
        found = is_wanted.any()
        if self.batch_axes:  # all devices take the same branch, since it exchanges arrays
            found = jax.lax.pmax(found.astype(jnp.int32), self.batch_axes) > 0
        return jax.lax.cond(found, compute, lambda: otherwise)

    def _logits(self, states: Array, head: Array | None) -> tuple[Array, Array]:
        """Logits of this device's part of the vocabulary, and the ids of its tokens."""
        logits = output_logits(states, head, logit_softcap=self.logit_softcap)
        ids = jnp.arange(logits.shape[1])
        if self.vocab_axes:
            ids += jax.lax.axis_index(self.vocab_axes) * logits.shape[1]
        if self.vocab_size is not None:
            logits = jnp.where((ids < self.vocab_size)[None], logits, -jnp.inf)
        return logits, ids

    def _gathered(self, x: Array) -> Array:
        return jax.lax.all_gather(x, self.token_axes, tiled=True) if self.token_axes else x

    def _own(self, x: Array) -> Array:
        if not self.token_axes:
            return x
        size = x.shape[0] // jax.lax.axis_size(self.token_axes)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.token_axes) * size, size)

    def _summed_own(self, x: Array) -> Array:
        """``_own`` of ``_total``."""
        if not self.token_axes:
            return self._total(x)
        others = tuple(axis for axis in self.vocab_axes if axis not in self.token_axes)
        return jax.lax.psum(jax.lax.psum_scatter(x, self.token_axes, tiled=True), others)

    def _total(self, x: Array) -> Array:
        return jax.lax.psum(x, self.vocab_axes) if self.vocab_axes else x

    def _largest(self, x: Array) -> Array:
        return jax.lax.pmax(x, self.vocab_axes) if self.vocab_axes else x


def scored(
    method: Any, hidden: Array, head: Array | None, token_ids: Array, mask: Array | None, temperature: Any
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probabilities and entropies by ``method.forward``, with the gradients of ``method.backward``.

    Args:
        method: a ``ChunkedHead``, or what has its ``chunk_size``, ``forward`` and ``backward``; hashable.
        hidden, head, token_ids, mask, temperature: as in ``chunked_log_probs``.

    Raises:
        AssertionError, ValueError: as ``chunked_log_probs``.
    """
    chex.assert_rank(hidden, 3, custom_message="hidden")
    chex.assert_shape(token_ids, hidden.shape[:2], custom_message="token_ids: one per hidden state")
    chex.assert_type(token_ids, int, custom_message="token_ids")
    if head is not None:
        chex.assert_shape(head, (None, hidden.shape[-1]), custom_message="head: [V, D] for hidden [..., D]")
    _check_temperature(temperature)
    if method.chunk_size < 1:
        raise ValueError(f"chunk_size is {method.chunk_size}; it counts tokens, at least 1")
    if isinstance(temperature, jax.Array):
        return _scored(method, None, hidden, head, token_ids, mask, temperature.astype(jnp.float32))
    # A number is left to the compiler, which drops the division by 1.
    return _scored(method, float(temperature), hidden, head, token_ids, mask, None)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scored(method, number, *inputs):
    return method.forward(*_with_temperature(inputs, number))[:2]


def _scored_forward(method, number, *inputs):
    values = jax.tree.map(lambda x: x.value, inputs, is_leaf=_is_primal)
    log_probs, entropies, log_normalizers = method.forward(*_with_temperature(values, number))
    # A tree without leaves, for residuals hold arrays only.
    for_temperature = () if inputs[-1] is not None and inputs[-1].perturbed else None
    return (log_probs, entropies), (values, log_normalizers, entropies, for_temperature)


def _scored_backward(method, number, saved, grads):
    values, log_normalizers, entropies, for_temperature = saved
    inputs = _with_temperature(values, number)
    log_prob_grads, entropy_grads = (None if isinstance(g, SymbolicZero) else g for g in grads)
    if log_prob_grads is None:
        log_prob_grads = jnp.zeros_like(log_normalizers)
    found = method.backward(
        inputs, log_normalizers, entropies, log_prob_grads, entropy_grads, for_temperature=for_temperature is not None
    )
    head = None if inputs[1] is None else found.head.astype(inputs[1].dtype)
    return found.hidden, head, None, None, found.temperature


_scored.defvjp(_scored_forward, _scored_backward, symbolic_zeros=True)


def _with_temperature(inputs: tuple[Any, ...], number: float | None) -> tuple[Any, ...]:
    return inputs if number is None else (*inputs[:-1], number)


def _is_primal(x: Any) -> bool:
    return isinstance(x, CustomVJPPrimal)


def _flat(x: Float[Array, "B width D"]) -> Float[Array, "tokens D"]:
    """One axis for all tokens: on CPU the gradient of a product with two axes takes almost twice as long."""
    return x.reshape(-1, x.shape[-1])


def _join(x: Float[Array, "chunks B width *rest"], length: int) -> Float[Array, "B T *rest"]:
    joined = jnp.moveaxis(x, 0, 1)
    return joined.reshape(joined.shape[0], -1, *x.shape[3:])[:, :length]


def _check_temperature(temperature):
    chex.assert_shape(temperature, (), custom_message="temperature")
    if not isinstance(temperature, jax.Array) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities are defined for a temperature above 0")


def _scale_and_shift(logits, temperature):
    _check_temperature(temperature)
    scaled = logits.astype(jnp.float32) / temperature
    # Relative to the largest logit, differences of large logits keep their digits.
    return scaled - jax.lax.stop_gradient(jnp.max(scaled, axis=-1, keepdims=True))

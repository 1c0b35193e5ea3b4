"""Log-probabilities from hidden states on a mesh: the hidden states of a chunk travel, the output embedding does not.

A head that is gathered in every chunk, and whose gradient is summed over devices in every chunk, takes almost all of an
update's communication. Here its rows are sharded over ``fsdp`` and ``tensor`` for the duration of a call, and its
gradient is accumulated where they are. Where ``context`` splits the tokens of a sequence, it splits the vocabulary too.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.log_probs import CHUNK_SIZE, ChunkedHead, HeadGradients, scored
from grpo_jax.sharding import TOKENS, num_row_shards, row_axes
from grpo_jax.types import Params

VOCAB_AXES = ("tensor", "fsdp", "expert", "context")
_VOCAB = P(VOCAB_AXES)
Scalar = float | Float[Array, ""]
TokenScores = Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]
"""As ``types.Model.token_scores``."""


def make_token_scores(
    head: Callable[[Params], Float[Array, "V D"] | None], *, logit_softcap: float | None, mesh: Mesh | None
) -> TokenScores:
    """``types.Model.token_scores`` of an output embedding.

    Args:
        head: ``params -> [V, D]``, or None in its place.
        logit_softcap: as in ``log_probs.output_logits``.
        mesh: the devices; None for one.
    """

    def token_scores(
        params: Params,
        hidden: Float[Array, "B T D"],
        token_ids: Int[Array, "B T"],
        *,
        temperature: Scalar = 1.0,
        chunk_size: int = CHUNK_SIZE,
        mask: Bool[Array, "B T"] | None = None,
        min_chunks: int = 1,
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        table = head(params)
        method: Any = ChunkedHead(chunk_size, logit_softcap, min_chunks)
        if table is not None and mesh is not None and mesh.size > 1:
            if hidden.shape[0] % num_row_shards(mesh) == 0:
                method = ShardedHead(chunk_size, logit_softcap, min_chunks, mesh)
                T, more = hidden.shape[1], -hidden.shape[1] % mesh.shape["context"]
                if more:
                    wanted = None if mask is None else _padded_tokens(mask, more)
                    hidden, token_ids = _padded_tokens(hidden, more), _padded_tokens(token_ids, more)
                    log_probs, entropies = scored(method, hidden, table, token_ids, wanted, temperature)
                    return log_probs[:, :T], entropies[:, :T]
            else:
                warnings.warn(
                    f"{hidden.shape[0]} rows do not divide over {row_axes(mesh)} = {num_row_shards(mesh)} devices: "
                    "logits are exchanged between them in every chunk",
                    stacklevel=2,
                )
        return scored(method, hidden, table, token_ids, mask, temperature)

    return token_scores


@dataclass(frozen=True)
class ShardedHead:
    """``ChunkedHead`` over the devices of a mesh, with the vocabulary sharded over ``VOCAB_AXES``.

    Attributes:
        chunk_size: tokens of a chunk on a device.
        logit_softcap: as in ``log_probs.output_logits``.
        min_chunks: as in ``ChunkedHead``.
        mesh: the devices.
    """

    chunk_size: int
    logit_softcap: float | None
    min_chunks: int
    mesh: Mesh

    def forward(self, hidden: Array, head: Array, token_ids: Array, mask: Array | None, temperature: Any):
        """As ``ChunkedHead.forward``.

        Args:
            hidden, head, token_ids, mask, temperature: as there; rows sharded over ``data`` and ``fsdp``, tokens over
                ``context``.
        """
        method = self._on_device(head)
        number, temperature = _number_or_array(temperature)

        def on_device(hidden, head, token_ids, mask, array):
            return method.forward(hidden, head, token_ids, mask, array if number is None else number)

        run = self._over_devices(on_device, (TOKENS, _VOCAB, TOKENS, TOKENS, P()), TOKENS)
        return run(hidden, self._padded(head, hidden.dtype), token_ids, mask, temperature)

    def backward(
        self,
        inputs: tuple[Array, Array, Array, Array | None, Any],
        log_normalizers: Array,
        entropies: Array,
        log_prob_grads: Array,
        entropy_grads: Array | None,
        *,
        for_temperature: bool,
    ) -> HeadGradients:
        """As ``ChunkedHead.backward``; sums over devices are in float32.

        Args:
            inputs, log_normalizers, entropies, log_prob_grads, entropy_grads, for_temperature: as there.
        """
        hidden, head, token_ids, mask, temperature = inputs
        method = self._on_device(head)
        number, temperature = _number_or_array(temperature)

        def on_device(arrays, *args):
            inputs = (*arrays[:-1], arrays[-1] if number is None else number)
            found = method.backward(inputs, *args, for_temperature=for_temperature)
            of_temperature = found.temperature
            if of_temperature is not None:
                of_temperature = jax.lax.psum(of_temperature, self.mesh.axis_names)
            return found.hidden, jax.lax.psum(found.head, "data"), of_temperature

        specs = ((TOKENS, _VOCAB, TOKENS, TOKENS, P()), TOKENS, TOKENS, TOKENS, TOKENS)
        run = self._over_devices(on_device, specs, (TOKENS, _VOCAB, P()))
        inputs = (hidden, self._padded(head, hidden.dtype), token_ids, mask, temperature)
        of_hidden, of_head, of_temperature = run(inputs, log_normalizers, entropies, log_prob_grads, entropy_grads)
        return HeadGradients(of_hidden, of_head[: head.shape[0]], of_temperature)

    def _on_device(self, head: Array) -> ChunkedHead:
        rows = head.shape[0]
        return ChunkedHead(
            self.chunk_size,
            self.logit_softcap,
            self.min_chunks,
            vocab_axes=VOCAB_AXES,
            token_axes=VOCAB_AXES[1:],
            batch_axes=("data", *VOCAB_AXES[1:]),
            vocab_size=rows if rows % self._parts else None,
        )

    @property
    def _parts(self) -> int:
        return math.prod(self.mesh.shape[axis] for axis in VOCAB_AXES)

    def _padded(self, head: Array, dtype: Any) -> Array:
        """Cast before it is laid out anew, so that half the bytes travel."""
        return jnp.pad(head.astype(dtype), ((0, -head.shape[0] % self._parts), (0, 0)))

    def _over_devices(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        # Without the check: sums over the vocabulary are equal on all devices of "tensor", which it cannot know.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _padded_tokens(x: Array, more: int) -> Array:
    return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))


def _number_or_array(temperature: Any) -> tuple[float | None, Array | None]:
    """A number stays outside ``shard_map``, so that the compiler sees it."""
    return (None, temperature) if isinstance(temperature, jax.Array) else (temperature, None)

"""Attention of sequences whose tokens are split over the devices of the mesh's ``context`` axis.

Each device gathers the keys and values of all tokens, for its own queries. Everything else in a decoder treats tokens
one by one. A sequence is cut into twice as many blocks as there are devices, and device ``i`` of ``N`` has blocks ``i``
and ``2 N - 1 - i``, so that causal attention is equal work for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import KVSegment, attend, attention_mask
from grpo_jax.models.splash import best_block_of, dealt_slots, even_block_of, splash_kernel
from grpo_jax.sharding import BATCH, TOKENS
from grpo_jax.types import Params, Segments

Mask = Bool[Array, "B S"] | Int[Array, "B S"] | Segments


@dataclass(frozen=True)
class ContextAttention:
    """A ``kernels.Kernel`` of tokens that are split over ``context``.

    Attributes:
        name: what computes the attention of a device's queries: ``attention.attend``, cuDNN with a mask of all pairs,
            or splash attention.
        mesh: sequences are sharded over ``data`` and ``fsdp``, tokens over ``context``, heads over ``tensor``; they
            must divide.
        interpret: interpret splash attention on any platform, and let XLA compute in place of cuDNN, for tests.
    """

    name: Literal["plain", "cudnn", "splash"]
    mesh: Mesh
    interpret: bool = False

    @property
    def takes_segments(self) -> bool:
        """Whether the named attention takes ``types.Segments`` as a mask; others are given to plain attention."""
        return self.name != "splash"

    def padded_length(self, tokens: int) -> int:
        """Tokens of a call with the padding that blocks need."""
        parts = 2 * self.mesh.shape["context"]
        block = best_block_of(-(-tokens // parts)) if self.name == "splash" else 1
        return -(-tokens // (parts * block)) * parts * block

    def __call__(
        self,
        queries: Float[Array, "B S H E"],
        keys: Float[Array, "B S K E"],
        values: Float[Array, "B S K E"],
        mask: Mask,
        *,
        window: int | None,
        softcap: float | None,
    ) -> Float[Array, "B S H E"]:
        """The attention of all tokens.

        Args:
            queries, keys, values: as ``kernels.Kernel``, with tokens in the order of ``dealt_out``.
            mask, window, softcap: as there; the mask with tokens in their own order.
        """
        heads = P(*TOKENS, "tensor", None)
        run = partial(jax.shard_map, mesh=self.mesh, out_specs=heads, check_vma=False)
        specs = (heads, heads, heads, BATCH)
        if self.name != "splash" or isinstance(mask, Segments):
            attention = partial(_cudnn, interpret=self.interpret) if self.name == "cudnn" else _plain
            function = partial(_masked, attention=attention, window=window, softcap=softcap)
            return run(function, in_specs=specs)(queries, keys, values, mask)
        tokens, context = queries.shape[1], self.mesh.shape["context"]
        kernel = splash_kernel(
            tokens,
            queries.shape[2] // self.mesh.shape["tensor"],
            even_block_of(tokens // (2 * context)),
            window=window,
            softcap=softcap,
            shards=context,
            interpret=self.interpret,
        )
        of_kernel = kernel.manual_sharding_spec(NamedSharding(self.mesh, P(None, "context")))
        return run(_splash, in_specs=(*specs, of_kernel))(queries, keys, values, mask, kernel)


def over_context(apply: Callable[..., Any], attention: ContextAttention) -> Callable[..., Any]:
    """``types.Routing.apply`` with tokens over ``context``, of whole sequences without a cache.

    Sequences are padded to a length that divides, with padding of position 0.

    Args:
        apply: of tokens in the order of ``dealt_out``.
        attention: of the model.
    """

    def apply_to_whole(
        params: Params,
        token_ids: Int[Array, "B S"],
        positions: Any,
        mask: Mask | None = None,
        cache: Any = None,
        start: Any = 0,
        prefixes: Sequence[Any] = (),
        block_bounds: Sequence[int] = (),
        chosen: Int[Array, "B S L k"] | None = None,
        with_logits: bool = False,
    ) -> tuple[Float[Array, "B S D"], None, None]:
        if with_logits:
            raise ValueError("over mesh.context, a router's losses are not implemented; leave them out")
        if cache is not None or prefixes or block_bounds or isinstance(positions, dict) or start != 0:
            raise ValueError("over mesh.context, a model takes whole sequences with positions and no cache")
        mask = jnp.ones(token_ids.shape, bool) if mask is None else mask
        chex.assert_equal_shape([token_ids, positions, *jax.tree.leaves(mask)])
        more = attention.padded_length(token_ids.shape[1]) - token_ids.shape[1]

        def padded(x: Array) -> Array:
            return jnp.pad(x, [(0, 0), (0, more)] + [(0, 0)] * (x.ndim - 2))

        inputs = jax.tree.map(padded, (token_ids, positions, chosen))
        *dealt, of_experts = dealt_out(inputs, attention.mesh.shape["context"])
        hidden, *_ = apply(params, *dealt, jax.tree.map(padded, mask), chosen=of_experts)
        return in_order(hidden, attention.mesh)[:, : token_ids.shape[1]], None, None

    return apply_to_whole


def dealt_out(tree: Any, shards: int) -> Any:
    """Arrays ``[B, S]`` of each token in the order in which devices have them.

    Args:
        tree: the arrays; S is a multiple of ``2 * shards``.
        shards: devices of ``context``.
    """
    return jax.tree.map(lambda x: x[:, dealt_slots(x.shape[1], shards)], tree)


def in_order(x: Float[Array, "B S D"], mesh: Mesh) -> Float[Array, "B S D"]:
    """The inverse of ``dealt_out`` for an activation: each device sends its two blocks to those that they belong to.

    Args:
        x: sharded over rows and tokens.
        mesh: the devices.
    """
    shards = mesh.shape["context"]
    even = [i if i % 2 == 0 else 2 * shards - 1 - i for i in range(shards)]  # of each device's blocks
    odd = [2 * shards - 1 - i if i % 2 == 0 else i for i in range(shards)]

    def on_device(x: Array) -> Array:
        is_first_even = jax.lax.axis_index("context") % 2 == 0
        first, second = jnp.split(x, 2, axis=1)
        pairs = (jnp.where(is_first_even, first, second), even), (jnp.where(is_first_even, second, first), odd)
        sent = [
            jax.lax.ppermute(block, "context", [(source, number // 2) for source, number in enumerate(numbers)])
            for block, numbers in pairs
        ]
        return jnp.concatenate(sent, axis=1)

    return jax.shard_map(on_device, mesh=mesh, in_specs=TOKENS, out_specs=TOKENS, check_vma=False)(x)


def _own_slots(tokens: int) -> Int[Array, " tokens"]:
    """Slots of this device's tokens."""
    shards, half = jax.lax.axis_size("context"), jnp.arange(tokens // 2)
    device = jax.lax.axis_index("context")
    return jnp.concatenate([device * len(half) + half, (2 * shards - 1 - device) * len(half) + half])


def _gathered(x: Float[Array, "B own K E"]) -> Float[Array, "B S K E"]:
    """Keys or values of all devices, in the order of their slots."""
    blocks = jax.lax.all_gather(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), "context", axis=1)
    joined = jnp.concatenate([blocks[:, :, 0], blocks[:, ::-1, 1]], axis=1)
    return joined.reshape(x.shape[0], -1, *x.shape[2:])


def _masked(queries, keys, values, mask, *, attention: Callable, window: int | None, softcap: float | None):
    """The attention of a device's queries, by a mask over all pairs."""
    keys, values = _gathered(keys), _gathered(values)
    seen = attention_mask(mask, _own_slots(queries.shape[1]), 0, keys.shape[1], window)
    return attention(queries, keys, values, seen, softcap)


def _plain(queries, keys, values, seen, softcap):
    B, S, H, E = queries.shape
    K = keys.shape[2]
    entry = {"keys": keys.transpose(0, 2, 3, 1), "values": values.transpose(0, 2, 1, 3)}
    grouped = queries.reshape(B, S, K, H // K, E).transpose(0, 2, 3, 1, 4)
    out = attend(grouped, [KVSegment(entry, seen)], softcap).astype(queries.dtype)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, S, H, E)


def _cudnn(queries, keys, values, seen, softcap, *, interpret: bool):
    # A token of padding attends to all: a row that attends to nothing would be NaN.
    seen |= ~seen.any(-1, keepdims=True)
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            queries, keys, values, mask=seen[:, None], scale=1.0, implementation="xla" if interpret else "cudnn"
        )


def _splash(queries, keys, values, mask, kernel):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # late, as in splash_kernel

    segments = mask.astype(jnp.int32)
    of_both = SegmentIds(segments[:, _own_slots(queries.shape[1])], segments)
    by_head = (x.transpose(0, 2, 1, 3) for x in (queries, _gathered(keys), _gathered(values)))
    return jax.vmap(kernel, in_axes=(0, 0, 0, SegmentIds(0, 0)))(*by_head, of_both).transpose(0, 2, 1, 3)  # pyright: ignore

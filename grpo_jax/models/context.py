"""Attention of sequences whose tokens are split over the devices of the mesh's ``context`` axis.

Each device has a run of consecutive tokens of each sequence; it gathers the keys and values of all of them, for its own
queries. Everything else in a decoder treats tokens one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import KVSegment, attend, attention_mask
from grpo_jax.models.splash import LANES, even_block_of, splash_kernel
from grpo_jax.sharding import BATCH, TOKENS
from grpo_jax.types import Segments

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
        """Whether the mask may be ``types.Segments``."""
        return self.name != "splash"

    @property
    def token_multiple(self) -> int:
        """A number that the tokens of a call must be a multiple of."""
        return self.mesh.shape["context"] * (LANES if self.name == "splash" else 1)

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
            queries, keys, values, mask, window, softcap: as ``kernels.Kernel``.
        """
        heads = P(*TOKENS, "tensor", None)
        run = partial(jax.shard_map, mesh=self.mesh, out_specs=heads, check_vma=False)
        if self.name == "splash":
            tokens, context = queries.shape[1], self.mesh.shape["context"]
            kernel = splash_kernel(
                tokens,
                queries.shape[2] // self.mesh.shape["tensor"],
                even_block_of(tokens // context),
                window=window,
                softcap=softcap,
                shards=context,
                interpret=self.interpret,
            )
            specs = kernel.manual_sharding_spec(NamedSharding(self.mesh, P(None, "context")))
            on_device = run(_splash, in_specs=(heads, heads, heads, TOKENS, specs))
            return on_device(queries, keys, values, mask.astype(jnp.int32), kernel)
        attention = partial(_cudnn, interpret=self.interpret) if self.name == "cudnn" else _plain
        function = partial(_masked, attention=attention, window=window, softcap=softcap)
        return run(function, in_specs=(heads, heads, heads, BATCH))(queries, keys, values, mask)


def padded_tokens(tree: Any, multiple: int) -> Any:
    """Arrays ``[B, S]`` of each token, with zeros up to a multiple of a number of tokens: padding of position 0.

    Args:
        tree: the arrays.
        multiple: of the tokens.
    """
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple))), tree)


def _gathered(x: Array) -> Array:
    return jax.lax.all_gather(x, "context", axis=1, tiled=True)


def _masked(queries, keys, values, mask, *, attention: Callable, window: int | None, softcap: float | None):
    """The attention of a device's queries, by a mask over all pairs."""
    tokens = queries.shape[1]
    slots = jax.lax.axis_index("context") * tokens + jnp.arange(tokens)
    keys, values = _gathered(keys), _gathered(values)
    return attention(queries, keys, values, attention_mask(mask, slots, 0, keys.shape[1], window), softcap)


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


def _splash(queries, keys, values, segments, kernel):
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds  # late, as in splash_kernel

    everyones = SegmentIds(segments, _gathered(segments))
    by_head = (x.transpose(0, 2, 1, 3) for x in (queries, _gathered(keys), _gathered(values)))
    return jax.vmap(kernel, in_axes=(0, 0, 0, SegmentIds(0, 0)))(*by_head, everyones).transpose(0, 2, 1, 3)  # pyright: ignore

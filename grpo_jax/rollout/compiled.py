"""The jitted functions of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Key

from grpo_jax.rollout.buckets import (
    STEPS,
    chunk_lengths,
)
from grpo_jax.rollout.decode import DecodeBatch, DecodeState, decode_steps, gather_rows, merge, prefill
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH, num_row_shards, place, replicated
from grpo_jax.types import Model, Params, Prompts

StopFn = Callable[[Sequence[int], int], int | None]
"""``(ids, num_seen) -> length``: where a completion ends, or None; the first ``num_seen`` ids were checked before."""


class CompiledSteps:
    """The jitted functions of a sampler, with the settings they were compiled for; arguments as in ``Sampler``."""

    def __init__(
        self,
        model: Model,
        sampling: Sampling,
        *,
        group_size: int,
        max_completion_length: int,
        eos_ids: tuple[int, ...],
        pad_id: int,
        stop: StopFn | None,
        cache_dtype: Any,
        mesh: Mesh | None,
        ahead: int,
        record_experts: bool = False,
    ):
        self.group_size, self.T, self.pad_id = group_size, max_completion_length, pad_id
        self.eos_ids, self.stop, self.mesh, self.ahead = np.array(eos_ids), stop, mesh, ahead
        self.devices = num_row_shards(mesh)
        self.chunk_lengths = chunk_lengths(max_completion_length)
        routing = model.routing if record_experts else None
        self.experts_shape = None if routing is None else (routing.num_layers, routing.per_token)

        def everywhere(tree: Any) -> Any:
            """Small results, so that every host knows those of all rows."""
            if mesh is None or jax.process_count() == 1:
                return tree
            return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, P()))

        @jax.jit
        def compiled_prefill(params: Params, prompts: Prompts, key: Key[Array, ""]):
            *results, experts = prefill(
                model,
                params,
                prompts,
                key,
                sampling,
                group_size=group_size,
                chunks=self.chunk_lengths,
                cache_dtype=cache_dtype,
                record_experts=record_experts,
            )
            return *self.constrain(results), everywhere(experts)

        @partial(jax.jit, donate_argnums=2)
        def compiled_decode(params: Params, batch: DecodeBatch, state: DecodeState):
            settings = {"eos_ids": eos_ids, "count": STEPS, "record_experts": record_experts}
            state, *sampled = decode_steps(model, params, batch, state, sampling, **settings)
            return self.constrain(state), *everywhere(sampled)

        self.prefill, self.decode = compiled_prefill, compiled_decode
        self.gather_rows = jax.jit(
            lambda *args, join_chunks: self.constrain(gather_rows(model, *args, join_chunks=join_chunks)),
            static_argnames="join_chunks",
        )
        self.merge = jax.jit(lambda *args: self.constrain(merge(*args)))

    def constrain(self, tree: Any) -> Any:
        """Batch and state with rows and prompts sharded over the mesh, and heads if they divide."""
        if self.mesh is None:
            return tree
        mesh = self.mesh

        def with_sharding(x):
            if x.ndim == 0 or (x.ndim == 1 and x.shape[0] < self.devices):  # the step; the starts of chunks
                return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
            heads = x.ndim > 2 and x.shape[1] % mesh.shape["tensor"] == 0
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*BATCH, "tensor") if heads else BATCH))

        return jax.tree.map(with_sharding, tree)

    def replicate(self, numbers: int | list[int]) -> Array:
        """Numbers of the host, on every device."""
        return place(np.array(numbers, np.int32), None if self.mesh is None else replicated(self.mesh))

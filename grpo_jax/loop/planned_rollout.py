"""The programs of sampling, compiled from shapes: reshard, prefill and decode steps of each batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo_jax.config.memory import choose_rollout_tensor
from grpo_jax.config.online import OnlineConfig
from grpo_jax.devices import platform
from grpo_jax.loop.compiled_updates import placed, with_sharding
from grpo_jax.loop.kernel_work import kernel_flops, kernel_of
from grpo_jax.loop.planned_model import Lengths, first_layers, planned_model
from grpo_jax.loop.roofline import Measured, compile_measured, extrapolated
from grpo_jax.loop.setup import RolloutLayout, make_sampler, rollout_layout
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.preparation import find_repetition
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.rollout.buckets import SINGLE_CHUNK_BUCKET, STEPS, Bucket, make_buckets
from grpo_jax.rollout.compiled import CompiledSteps
from grpo_jax.sharding import BATCH, ROLLOUT_RULES, param_shardings, replicated
from grpo_jax.types import Params, Prompts


class Segment(NamedTuple):
    """Dispatches of one decode program.

    Attributes:
        bucket: number of the batch size.
        opened: chunks of the KV cache that are full or active.
        is_joined: whether the chunks are one.
        dispatches: how often it runs, for ``STEPS`` steps each.
    """

    bucket: int
    opened: int
    is_joined: bool
    dispatches: int


@dataclass(frozen=True)
class Rollout:
    """Sampling of a step.

    Attributes:
        programs: by name; ``decode`` programs are named by their rows and chunks.
        times: how often each runs in a step.
        layers: the numbers of layers that were compiled, where the programs are extrapolated from them.
        tensor: devices that the sampler's weights are sharded over.
        weights: bytes of the sampler's weights on a device, beside the state; 0 if it uses those that are trained.
        num_batches: batches of prompts, one after the other.
    """

    programs: Mapping[str, Measured]
    times: Mapping[str, int]
    layers: tuple[int, int] | None
    tensor: int
    weights: float
    num_batches: int


def schedule(
    lengths: np.ndarray, buckets: Sequence[Bucket], chunk_lengths: Sequence[int], max_length: int
) -> list[Segment]:
    """The dispatches of a batch as ``rollout.engine.GenerationLoop`` takes them, if it reads each at once.

    Args:
        lengths: ``[devices, rows]``, tokens of each completion.
        buckets: batch sizes of a device.
        chunk_lengths: columns of the chunks of the KV cache.
        max_length: T, in tokens.
    """
    bucket, opened, step, is_joined = 0, 1, 0, len(chunk_lengths) == 1
    segments: list[Segment] = []
    bounds = list(np.cumsum(chunk_lengths))
    while step < max_length:
        if not is_joined and step >= bounds[opened - 1]:
            opened += 1
        last = segments[-1] if segments else None
        if last is not None and last[:3] == (bucket, opened, is_joined):
            segments[-1] = last._replace(dispatches=last.dispatches + 1)
        else:
            segments.append(Segment(bucket, opened, is_joined, 1))
        step += STEPS
        most = (lengths > step).sum(1).max()
        if not most:
            break
        while bucket + 1 < len(buckets) and most <= buckets[bucket + 1].rows:
            bucket += 1
            if bucket >= SINGLE_CHUNK_BUCKET and not is_joined:
                is_joined, opened = True, 1
    return segments


def plan_rollout(
    config: OnlineConfig, policy: Pretrained, mesh: Mesh, lengths: Lengths, options: Mapping[str, Any] | None
) -> Rollout:
    """Sampling of a step, compiled.

    The layers of its programs are unrolled: models of more than twice the shortest period of layers that fills two and
    four layers are extrapolated from these.

    Args:
        config: of the run.
        policy: shapes of the policy.
        mesh: of training.
        lengths: of the completions.
        options: of the compiler.

    Raises:
        ValueError: as ``loop.setup.rollout_layout``, and if a sample does not fit the limits of the KV cache.
    """
    tensor = choose_rollout_tensor(config, policy.config, mesh.shape)
    config = replace(config, mesh=replace(config.mesh, rollout_tensor=tensor))  # of the whole model
    layout = rollout_layout(config, policy, mesh)
    limits = make_sampler(config, policy, layout, group_size=config.group_size).limits
    limits.check_divisible(config.num_prompts)
    parts = limits.num_group_parts(config.prompt_length)
    group = config.group_size // parts
    N = replace(limits, group_size=group).prompts_per_batch(config.num_prompts * parts, config.prompt_length)
    num_batches = -(-config.num_prompts * parts // N)
    rows = np.zeros(num_batches * N * group, np.int64)
    rows[: len(lengths.completions)] = lengths.completions
    shape = limits.devices, N // limits.devices, group

    def compiled(count: int) -> dict[str, tuple[Measured, int]]:
        part = policy
        if count != policy.config.num_layers:
            part = planned_model(config, first_layers(policy.config, count), mesh, policy.lora)
        return _programs(config, part, mesh, shape, rows.reshape(num_batches, limits.devices, -1), options)

    layers = layers_to_compile(policy.config)
    if layers is None:
        found = compiled(policy.config.num_layers)
    else:
        small, large = compiled(layers[0]), compiled(layers[1])
        found = {
            name: (
                program
                if program.refused is not None
                else extrapolated(small[name][0], program, layers, policy.config.num_layers),
                times,
            )
            for name, (program, times) in large.items()
        }
    return Rollout(
        programs={name: program for name, (program, _) in found.items()},
        times={name: times for name, (_, times) in found.items()},
        layers=layers,
        tensor=tensor,
        weights=0.0 if "reshard" not in found else _rollout_bytes(policy.params, layout),
        num_batches=num_batches,
    )


def layers_to_compile(decoder: DecoderConfig) -> tuple[int, int] | None:
    """Two numbers of layers from which programs of unrolled layers are extrapolated; None to compile all of them.

    They are multiples of the period in which the layers repeat.

    Args:
        decoder: sizes of the model.
    """
    repetition = find_repetition(decoder)
    if repetition is None:
        return None
    small = repetition.period * -(-2 // repetition.period)
    return (small, 2 * small) if decoder.num_layers > 2 * small else None


def _rollout_bytes(params: Params, layout: RolloutLayout) -> float:
    """Bytes of the sampler's weights on a device."""
    shapes = jax.eval_shape(layout.reshard, params)
    shardings = param_shardings(params, layout.mesh, ROLLOUT_RULES)
    return float(
        sum(
            np.prod(sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
        )
    )


def _programs(
    config: OnlineConfig,
    policy: Pretrained,
    mesh: Mesh,
    shape: tuple[int, int, int],
    lengths: np.ndarray,
    options: Mapping[str, Any] | None,
) -> dict[str, tuple[Measured, int]]:
    """Each program of sampling, and how often it runs."""
    layout = rollout_layout(config, policy, mesh)
    shardings = param_shardings(policy.params, layout.mesh, ROLLOUT_RULES)
    params = jax.tree.map(with_sharding, jax.eval_shape(layout.reshard, policy.params), shardings)
    found: dict[str, tuple[Measured, int]] = {}
    pairs = zip(jax.tree.leaves(policy.params), jax.tree.leaves(params), strict=True)
    if not all(x.dtype == y.dtype and x.sharding.is_equivalent_to(y.sharding, x.ndim) for x, y in pairs):
        reshard = jax.jit(layout.reshard, out_shardings=shardings)
        found["reshard"] = compile_measured(lambda: reshard.lower(policy.params), platform(), options)[1], 1
    devices, per_device, group = shape
    steps = CompiledSteps(
        layout.model,
        config.sampling,
        group_size=group,
        max_completion_length=config.completion_length,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        stop=None,
        cache_dtype=config.cache_dtype,
        mesh=layout.mesh,
        ahead=1,
        record_experts=layout.model.routing is not None,
    )
    N, P = devices * per_device, config.prompt_length
    shapes: Any = [jax.ShapeDtypeStruct((N, P), jnp.int32), jax.ShapeDtypeStruct((N, P), jnp.bool_)]
    shapes.append(jax.ShapeDtypeStruct((N,), jnp.int32))
    prompts = placed(Prompts(*shapes), NamedSharding(layout.mesh, BATCH))
    key = jax.eval_shape(lambda: jax.random.key(0))
    kernel = kernel_of(config.attention, policy.config, config.compute_dtype, layout.mesh)
    more = kernel_flops(kernel, policy.config, layout.mesh, rows=N, length=P, remat=None)
    program, measured = compile_measured(
        lambda: steps.prefill.lower(params, prompts, key), platform(), options, more_flops=more
    )
    found["prefill"] = measured, len(lengths)
    if program is None:
        return found
    shapes = jax.eval_shape(steps.prefill, params, prompts, key)
    started = jax.tree.map(with_sharding, shapes, program.output_shardings)
    runs = [
        schedule(of_batch, make_buckets(per_device, per_device * group, group), steps.chunk_lengths, steps.T)
        for of_batch in lengths
    ]
    for segment, (measured, rows) in _decode_programs(steps, params, started, shape, runs, options).items():
        chunks = 1 if segment[2] else segment[1]
        times = sum(each.dispatches for run in runs for each in run if each[:3] == segment)
        found[f"decode {rows} rows, {chunks} of {1 if segment[2] else len(steps.chunk_lengths)} chunks"] = (
            measured,
            times,
        )
    return found


def _decode_programs(
    steps: CompiledSteps,
    params: Params,
    started: Any,
    shape: tuple[int, int, int],
    runs: Sequence[Sequence[Segment]],
    options: Mapping[str, Any] | None,
) -> dict[tuple[int, int, bool], tuple[Measured, int]]:
    """The decode programs of some schedules, with the rows of each."""
    devices, per_device, group = shape
    buckets = make_buckets(per_device, per_device * group, group)
    batch, state, empty, _ = started
    chunks, mesh = [state.active_chunk, *empty], steps.mesh
    assert mesh is not None
    found: dict[tuple[int, int, bool], tuple[Measured, int]] = {}
    at = 0
    needed = sorted({each[:3] for run in runs for each in run})
    for bucket, opened, is_joined in needed:
        while at < bucket:
            at += 1
            join = len(chunks) == 1 or at >= SINGLE_CHUNK_BUCKET
            indices = [
                np.zeros((devices, count), np.int32)
                for count in (
                    buckets[at].rows,
                    buckets[at].prompts,
                    buckets[at].prompts * buckets[at].group,
                    buckets[at].rows,
                )
            ]
            arguments = (batch, replace(state, active_chunk=chunks[0]), chunks, *indices)
            gather = jax.jit(steps.gather_rows, static_argnames="join_chunks")
            lowered = gather.lower(*arguments, join_chunks=join)
            out = lowered.compile().output_shardings
            shapes = jax.eval_shape(lambda *args, join=join: steps.gather_rows(*args, join_chunks=join), *arguments)
            batch, state, chunks = jax.tree.map(with_sharding, shapes, out)
        starts = jax.ShapeDtypeStruct((opened - 1,), jnp.int32, sharding=replicated(mesh))
        now = replace(
            batch,
            full_chunks=tuple(chunks[: opened - 1]),
            full_chunk_starts=starts,
            active_start=jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh)),
        )
        active = replace(state, active_chunk=chunks[opened - 1])
        _, measured = compile_measured(
            lambda now=now, active=active: steps.decode.lower(params, now, active), platform(), options
        )
        found[(bucket, opened, is_joined)] = measured, devices * buckets[bucket].rows
    return found

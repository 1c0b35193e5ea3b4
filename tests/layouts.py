"""Scores, gradients and samples of a decoder on any mesh, to compare meshes with one device."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import CASES, SMALL, quick_jit
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.models import build_model, from_hf_config
from grpo_jax.rollout import Sampler
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import (
    BATCH,
    ROLLOUT_RULES,
    ROW_AXES,
    make_mesh,
    param_shardings,
    place,
    rollout_mesh,
    shard_rows,
)
from grpo_jax.train import completion_log_probs, completion_values, micro_batch, pack, packed_log_probs
from grpo_jax.train.packing import in_batch_order
from grpo_jax.types import Batch, Packed

P, T, GROUP, GROUPS = 5, 9, 4, 6
ROWS, ROW_LENGTH = 12, 30


def config_of(case, **sizes):
    """The decoder of a case of ``checkpoints.CASES``, of other sizes."""
    import transformers

    name, fields = CASES[case]
    return from_hf_config(getattr(transformers, name)(**SMALL | fields | sizes).to_dict())


def batch_of(vocab_size, seed=0):
    """Groups of completions of 1 to T tokens."""
    rng = np.random.default_rng(seed)
    rows = GROUP * GROUPS
    mask = np.arange(T) < rng.integers(1, T + 1, rows)[:, None]
    prompts = np.repeat(rng.integers(1, P + 1, GROUPS), GROUP)
    return Batch(
        prompt_ids=np.repeat(rng.integers(0, vocab_size, (GROUPS, P)), GROUP, axis=0).astype(np.int32),
        prompt_mask=np.arange(P) >= P - prompts[:, None],
        completion_ids=rng.integers(0, vocab_size, (rows, T)).astype(np.int32),
        completion_mask=mask,
        loss_mask=mask,
        advantages=rng.normal(size=rows).astype(np.float32),
        rollout_log_probs=np.zeros((rows, T), np.float32),
    )


def sequences_of(layout, batch, mesh):
    """The batch as ``padded`` rows, ``shared`` or ``separate`` packed rows, or whole ``documents`` in packed rows."""
    if layout == "padded":
        return shard_rows(batch, mesh)
    if layout == "documents":
        lengths = np.random.default_rng(1).integers(3, 8, (len(batch.advantages), 2))
        columns = np.arange(P + T)[None]
        first, both = lengths[:, :1], lengths.sum(1, keepdims=True)
        ids = np.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
        segments = np.where(columns < first, 1, np.where(columns < both, 2, 0)).astype(np.int32)
        positions = np.where(columns < first, columns, columns - first).astype(np.int32)
        return shard_rows(Packed(ids, segments, positions, segments > 0), mesh)
    devices = math.prod(mesh.shape[axis] for axis in ROW_AXES)
    tokens = ROWS * ROW_LENGTH // (devices * mesh.shape["context"])
    packed = pack(batch, layout, micro_batch_tokens=tokens, mesh=mesh, row_length=ROW_LENGTH)
    assert int(packed.count) == 1
    return jax.tree.map(
        lambda x: place(x, NamedSharding(mesh, BATCH if x.shape[0] % devices == 0 else Spec())), micro_batch(packed, 0)
    )


def scored(config, params, mesh, layout, *, value=False, **options):
    """Scores of the batch's tokens, ``[B, T]``, 0 where masked, and the gradient of their weighted sum."""
    batch = batch_of(config.vocab_size)
    model = build_model(config, mesh=mesh, **options)
    params = jax.device_put(params, param_shardings(params, mesh))
    sequences = sequences_of(layout, batch, mesh)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(batch.advantages), 2 * (P + T))), jnp.float32)

    def loss(params):
        if model.preparation is not None:
            params = model.preparation.prepare(params)
        if layout == "documents":
            scores, mask = packed_log_probs(model, params, sequences), sequences.segment_ids > 0
        elif value:
            scores, mask = completion_values(model, params, sequences), sequences.completion_mask
        else:
            scores, entropies = completion_log_probs(model, params, sequences, temperature=0.8, chunk_size=16)
            mask = sequences.completion_mask
            scores = scores + 0.1 * entropies
        scores = jnp.where(mask, scores, 0)
        if getattr(sequences, "rows", None) is not None:
            scores = in_batch_order(scores, sequences.rows, jnp.zeros((GROUP * GROUPS, T)))
        rows, columns = scores.shape
        return (scores * jnp.resize(weights, (rows, columns))).sum() / rows, scores

    (_, scores), grads = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return jax.device_get((scores, grads))


def assert_close(found, expected):
    """Scores and gradients of ``scored``, within 1e-5 of the largest of each array."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1, np.abs(y).max()))


def sampled(config, params, mesh, tensor):
    """A rollout of groups of 4 for 6 prompts by the sampler on the devices of a mesh."""
    sampling = rollout_mesh(mesh, tensor)
    model = build_model(config, mesh=sampling)
    params = jax.device_put(params, param_shardings(params, sampling, ROLLOUT_RULES))
    sampler = Sampler(model, Sampling(), group_size=8, max_completion_length=T, eos_ids=(5,), pad_id=0, mesh=sampling)
    prompts = [[3, 4], [7], [8, 5, 11, 2], [1, 2, 3], [9, 9], [6]]
    padded = pad_prompts(prompts, max_prompt_length=P, pad_id=0, index=range(6))
    return sampler.on_host(params, padded, jax.random.key(0))


def mesh_of(data, fsdp, tensor, context=1, expert=1):
    """A mesh of these sizes."""
    return make_mesh(data=data, fsdp=fsdp, expert=expert, context=context, tensor=tensor)

"""The models and batches of a run that is planned: shapes and shardings in the place of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.model import ModelConfig
from grpo_jax.config.online import OnlineConfig
from grpo_jax.loop.batch_layout import BatchLayout, Sequences, cut
from grpo_jax.loop.compiled_updates import Layout, lay_out, with_sharding
from grpo_jax.models import LoRA, add_adapters, build_model, from_hf_config, param_shapes
from grpo_jax.models.config import DecoderConfig, with_layers, with_rope_length
from grpo_jax.models.hf_config import with_scalar_head
from grpo_jax.models.positions import read_hf_config
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.sharding import num_row_shards, param_shardings
from grpo_jax.tasks.toy_config import TOY
from grpo_jax.train import trainable_part
from grpo_jax.train.packing import pack_on_host
from grpo_jax.types import Batch, Model, Packed, Pairs, Params, Rollout


class Lengths(NamedTuple):
    """Tokens of the sequences of a step.

    Attributes:
        prompts: ``[N]``.
        completions: ``[B]``, those of a prompt adjacent.
    """

    prompts: np.ndarray
    completions: np.ndarray


def spread(mean: float | int, most: int, count: int) -> np.ndarray:
    """``count`` lengths with a mean, evenly spread over the widest range up to ``most``, in a fixed random order.

    Args:
        mean: of the lengths, in tokens.
        most: the longest possible.
        count: how many.
    """
    low, high = max(1.0, 2 * mean - most), min(float(most), 2.0 * mean - 1)
    lengths = np.rint(np.linspace(low, high, count)).astype(np.int64)
    return np.random.default_rng(0).permutation(lengths)


def hf_config_of(config: ModelConfig) -> Mapping[str, Any]:
    """Contents of the ``config.json`` of a run's model.

    Args:
        config: of the run.

    Raises:
        ValueError: no model is named, or its ``config.json`` cannot be read or is not supported.
    """
    if config.model is None:
        raise ValueError("model: no model is named; pass --model or --model-config, or choose a preset that has one")
    found = config.toy.hf_config if config.model == TOY else read_hf_config(config.model)
    if found is None:
        raise ValueError(
            f"model is {config.model}, whose config.json cannot be read; pass the file with --model-config"
        )
    from_hf_config(found)  # raises for a model that is not supported
    return found


def decoder_of(config: ModelConfig, hf_config: Mapping[str, Any], *, scalar_head: bool = False) -> DecoderConfig:
    """Sizes of a run's model.

    Args:
        config: of the run.
        hf_config: contents of ``config.json``.
        scalar_head: whether it serves as a reward model or critic.
    """
    decoder = from_hf_config(with_scalar_head(dict(hf_config)) if scalar_head else hf_config)
    return decoder if config.rope_length is None else with_rope_length(decoder, config.rope_length)


def judge_of(config: OnlineConfig, hf_config: Mapping[str, Any]) -> DecoderConfig:
    """Sizes of the reward model of a run, from which PPO's critic starts; those of the policy if it has none.

    Args:
        config: of the run.
        hf_config: of the policy.
    """
    name = config.rewards.reward_model
    found = None if name is None else read_hf_config(name)
    return decoder_of(config, found or hf_config, scalar_head=True)


def first_layers(decoder: DecoderConfig, count: int) -> DecoderConfig:
    """A decoder without its last layers.

    Args:
        decoder: sizes of the model.
        count: layers to keep.
    """
    return with_layers(decoder, decoder.kinds[:count])


def planned_model(config: ModelConfig, decoder: DecoderConfig, mesh: Mesh, lora: LoRA | None = None) -> Pretrained:
    """A model of a run with ``ShapeDtypeStruct`` as its parameters, laid out as in training.

    Args:
        config: of the run.
        decoder: sizes of the model.
        mesh: the devices.
        lora: adapters to train in place of the model.

    Raises:
        ValueError: the mesh does not fit the model.
    """
    lora = lora if lora is not None and lora.is_used else None
    model = build_model(
        decoder, dtype=config.compute_dtype, remat=config.remat, attention=config.attention, mesh=mesh, lora=lora
    )
    params = param_shapes(decoder)
    if lora is not None:
        adapted = partial(add_adapters, config=decoder, lora=lora, dtype=config.compute_dtype)
        params = jax.eval_shape(lambda params, key: adapted(params, key=key), params, jax.random.key(0))
    params = jax.tree.map(with_sharding, params, param_shardings(params, mesh))
    eos = decoder.vocab_size - 1
    return Pretrained(model, params, decoder, {}, None, None, (eos,), eos, lora=lora)


def reference_of(params: Params, dtype: Any) -> Params:
    """Shapes of the reference policy, as ``train.init_state`` makes it.

    Args:
        params: of the policy.
        dtype: of the reference's matrices.
    """

    def one(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, dtype if x.ndim > 1 else x.dtype, sharding=x.sharding)

    return jax.tree.map(one, trainable_part(params))


def host_batch(config: OnlineConfig, lengths: Lengths, *, has_token_advantages: bool, has_values: bool) -> Batch:
    """The batch of a step on the host, with prompts and completions of given lengths.

    Args:
        config: of the run.
        lengths: of its sequences.
        has_token_advantages: whether each token has an advantage.
        has_values: whether there is a critic.
    """
    (B,), P, T = lengths.completions.shape, config.prompt_length, config.completion_length
    prompt_lengths = np.repeat(lengths.prompts, config.group_size)
    numbers = np.repeat(np.arange(len(lengths.prompts)), config.group_size)
    per_token = np.broadcast_to(np.float32(0), (B, T))
    mask = np.arange(T) < lengths.completions[:, None]
    has_old = has_values or (isinstance(config, GRPOConfig) and config.has_old_log_probs)
    fields: dict[str, Any] = {
        "prompt_ids": np.broadcast_to(numbers[:, None], (B, P)).astype(np.int32),
        "prompt_mask": np.arange(P) >= P - prompt_lengths[:, None],
        "completion_ids": np.broadcast_to(np.int32(0), (B, T)),
        "completion_mask": mask,
        "loss_mask": mask,
        "advantages": per_token if has_token_advantages or has_values else np.zeros(B, np.float32),
        "rollout_log_probs": per_token,
        "old_log_probs": per_token if has_old else None,
        "ref_log_probs": per_token if config.has_reference and not has_values else None,
        "old_values": per_token if has_values else None,
        "returns": per_token if has_values else None,
    }
    return Batch(**fields)


def as_rollout(batch: Batch) -> Rollout:
    """The completions of a batch, for frozen-policy log-probabilities."""
    rollout: dict[str, Any] = {
        name: getattr(batch, name)
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "rollout_log_probs")
    }
    return Rollout(**rollout, truncated=np.zeros(len(batch.prompt_ids), bool))  # pyright: ignore[reportArgumentType]


def online_layout(config: OnlineConfig, model: Model, mesh: Mesh, sequences: Sequences) -> Layout:
    """Sequences of a step laid out as ``BatchLayout`` does.

    Args:
        config: of the run.
        model: the trained model.
        mesh: the devices.
        sequences: on the host.
    """
    layout = BatchLayout(config, model, mesh)
    if layout.packing is None:
        return lay_out(cut(sequences), mesh)
    packed = pack_on_host(
        sequences,
        layout.packing,
        micro_batch_tokens=config.packed_micro_batch_tokens * mesh.shape["context"],
        devices=num_row_shards(mesh),
        row_length=None,
        attention_length=model.attention_length,
    )
    return lay_out(packed, mesh)


def pairs_batch(num_pairs: int, lengths: tuple[int, int], *, has_reference: bool, has_margins: bool) -> Pairs:
    """Shapes of a batch of pairs.

    Args:
        num_pairs: B.
        lengths: P and T.
        has_reference: whether the pairs have the reference's log-probabilities.
        has_margins: whether they have margins.
    """
    (P, T), shape = lengths, jax.ShapeDtypeStruct
    fields: dict[str, Any] = {
        "prompt_ids": shape((num_pairs, P), jnp.int32),
        "prompt_mask": shape((num_pairs, P), jnp.bool_),
        "completion_ids": shape((num_pairs, 2, T), jnp.int32),
        "completion_mask": shape((num_pairs, 2, T), jnp.bool_),
        "margins": shape((num_pairs,), jnp.float32) if has_margins else None,
        "ref_log_probs": shape((num_pairs, 2), jnp.float32) if has_reference else None,
    }
    return Pairs(**fields)


def packed_batch(rows: int, length: int) -> Packed:
    """Shapes of a batch of SFT.

    Args:
        rows: of the batch.
        length: tokens of each.
    """
    shape: Any = jax.ShapeDtypeStruct
    ids = shape((rows, length), jnp.int32)
    return Packed(token_ids=ids, segment_ids=ids, positions=ids, loss_mask=shape((rows, length), jnp.bool_))

"""The layout of a step's sequences, packed rows or padded rows cut to a bucket, and the programs that take it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.packing import bucket_length
from grpo_jax.sharding import shard_rows
from grpo_jax.train import LossFn, make_log_prob_fn, make_train_step, pack
from grpo_jax.types import Batch, Model, PackedBatch, Packing, Params, Preparation, Rollout

Sequences = TypeVar("Sequences", Batch, Rollout)


class BatchLayout:
    """Lays out the sequences of a step so that updates and frozen-policy log-probabilities cost the tokens there are.

    Args:
        config: ``packing``, lengths, micro-batches.
        model: the trained model.
        mesh: the devices.

    Attributes:
        packing: how rows are packed; None if they are padded.
        description: the layout in a few words.

    Raises:
        ValueError: ``packing`` is set for a model whose sequences cannot be packed.
    """

    def __init__(self, config: OnlineConfig, model: Model, mesh: Mesh):
        self.packing: Packing | None = _resolve(config, model)
        self._config, self._mesh, self._preparation = config, mesh, model.preparation
        self._attention_length = model.attention_length
        self._micro_batch_tokens = config.packed_micro_batch_tokens
        if self.packing is None:
            self.description = f"padded rows in {config.micro_batches} micro-batches"
        else:
            prompts = "prompts once a group" if self.packing == "shared" else "prompts once a completion"
            self.description = f"packed rows, {prompts}, {self._micro_batch_tokens} tokens a device in a micro-batch"

    def __call__(self, sequences: Sequences) -> PackedBatch | Sequences:
        """The sequences for a train step or ``make_log_prob_fn``, on the mesh."""
        if self.packing is None:
            return shard_rows(cut(sequences), self._mesh)
        return pack(
            sequences,
            self.packing,
            micro_batch_tokens=self._micro_batch_tokens,
            mesh=self._mesh,
            attention_length=self._attention_length,
        )

    def make_train_step(
        self,
        loss_fn: LossFn,
        optimizer: optax.GradientTransformation,
        settings: OptimizerConfig,
        preparation: Preparation | None = None,
    ) -> Callable:
        """``train.make_train_step`` for batches of this layout.

        Args:
            loss_fn: as there.
            optimizer: as there.
            settings: of the optimizer, for the dtype of gradients and the bound on their norm.
            preparation: of the parameters; None for that of the trained model.
        """
        return make_train_step(
            loss_fn,
            optimizer,
            num_micro_batches=self._config.micro_batches,
            preparation=preparation or self._preparation,
            gradient_dtype=settings.gradient_dtype,
            skip_grad_norm=settings.skip_grad_norm,
        )

    def make_log_prob_fn(
        self, log_probs: Callable, preparation: Preparation | None = None
    ) -> Callable[[Params, Rollout], Float[Array, "B T"]]:
        """``train.make_log_prob_fn`` for whole rollouts, which are laid out first; 0 in the columns that were cut.

        Args:
            log_probs: as there.
            preparation: of the parameters; None for that of the trained model.
        """
        parts = self._config.num_minibatches * self._config.micro_batches
        preparation = preparation or self._preparation
        log_prob_fn = make_log_prob_fn(log_probs, num_micro_batches=parts, preparation=preparation)

        def frozen_log_probs(params: Params, rollout: Rollout):
            log_probs = log_prob_fn(params, self(rollout))
            missing = rollout.completion_ids.shape[1] - log_probs.shape[1]
            return jnp.pad(log_probs, ((0, 0), (0, missing))) if missing else log_probs

        return frozen_log_probs


def cut(sequences: Sequences) -> Sequences:
    """Padded sequences without the columns that are padding in every row, up to a bucket's length.

    Buckets are multiples of 64 columns (``types.cache_columns``) and few, so that few programs are compiled.

    Args:
        sequences: left-padded prompts and right-padded completions.
    """
    P, T = sequences.prompt_ids.shape[1], sequences.completion_ids.shape[1]
    prompts = bucket_length(int(np.asarray(sequences.prompt_mask).sum(1).max(initial=0)), P)
    completions = bucket_length(int(np.asarray(sequences.completion_mask).sum(1).max(initial=0)), T)
    if (prompts, completions) == (P, T):
        return sequences

    cut_fields: dict[str, Any] = {
        name: x[:, P - prompts :] if name.startswith("prompt") else x[:, :completions]
        for name, x in vars(sequences).items()
        if x is not None and x.ndim > 1
    }
    return replace(sequences, **cut_fields)


def _resolve(config: OnlineConfig, model: Model) -> Packing | None:
    if config.packing == "none":
        return None
    if config.packing != "auto":
        if model.packing is None:
            raise ValueError(
                f"packing is {config.packing}, but this model's rotary frequencies depend on the length of a call, so "
                "that the sequences of a row would change each other; use 'none'"
            )
        return config.packing
    # In float32, padded rows agree with the sampler to the last bits, and packed ones up to rounding.
    return None if config.compute_dtype == jnp.float32 else model.packing

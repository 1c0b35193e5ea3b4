"""Trained models of a planned run as shapes, and their programs over whole sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax.devices import platform
from grpo_jax.loop.compiled_updates import (
    Layout,
    bytes_on_device,
    lower_update,
    options_of,
    placed_state,
    state_shapes,
    with_constant_count,
)
from grpo_jax.loop.kernel_work import kernel_flops, kernel_of
from grpo_jax.loop.roofline import Measured, compile_measured
from grpo_jax.models.pretrained import Pretrained
from grpo_jax.train import (
    LossFn,
    make_log_prob_fn,
    make_train_step,
    trainable_part,
)
from grpo_jax.types import PackedBatch, Params, Preparation, TrainState


@dataclass(frozen=True)
class Work:
    """A program over whole sequences.

    Attributes:
        name: of its phase.
        measured: its work and memory.
        times: how often it runs in a step.
        own: bytes of its parameters or its state on a device.
        batch: bytes of its other arguments.
        gradients: bytes of the accumulated gradients on a device.
        rows, row_length: sequences that it computes, and tokens of each.
        prompts_are_shared: whether a row has a prompt once for several completions.
        num_micro_batches: that it computes in turn.
    """

    name: str
    measured: Measured
    times: int
    own: float
    batch: float
    gradients: float
    rows: int
    row_length: int
    prompts_are_shared: bool
    num_micro_batches: int


@dataclass(frozen=True)
class Learner:
    """Models that a run trains, as shapes, and their programs.

    Attributes:
        config: of the run.
        mesh: the devices.
        policy: the trained model; of a reward model, with a scalar head.
        held: bytes on a device of what is in memory for the whole run, by kind.
        options: of the compiler in addition to those of a run.
    """

    config: Any
    mesh: Mesh
    policy: Pretrained
    held: dict[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] | None = None

    def state(self, params: Params, optimizer: optax.GradientTransformation, *names: str) -> TrainState:
        """A train state, whose memory is noted.

        Args:
            params: shapes of the parameters.
            optimizer: of the updates.
            names: the kinds of its weights and of its optimizer state.
        """
        offloads = "optimizer" in self.config.offload
        state = placed_state(state_shapes(params, optimizer), self.mesh, offload_optimizer=offloads)
        self.note(names[0], bytes_on_device(state.params))
        self.note(names[-1], bytes_on_device(state.opt_state))
        return state

    def note(self, kind: str, size: float | int) -> None:
        """Add to what is held.

        Args:
            kind: of memory.
            size: bytes on a device.
        """
        self.held[kind] = self.held.get(kind, 0.0) + size

    def update(
        self,
        name: str,
        model: Pretrained,
        loss_fn: LossFn,
        state: TrainState,
        optimizer: optax.GradientTransformation,
        layout: Layout,
        *,
        times: int,
        gradient_dtype: str,
        preparation: Preparation | None = None,
    ) -> Work:
        """An update.

        Args:
            name: of its phase.
            model: that is trained.
            loss_fn: of the update.
            state: of ``state``.
            optimizer: of the update.
            layout: of its batch.
            times: how often it runs in a step.
            gradient_dtype: as in ``make_train_step``.
            preparation: of the parameters; None for the model's.
        """
        step = make_train_step(
            loss_fn,
            optimizer,
            num_micro_batches=self.config.micro_batches,
            preparation=preparation or model.model.preparation,
            gradient_dtype=gradient_dtype,
        )
        lower = partial(lower_update, step, state, layout)
        trained = trainable_part(state.params)
        gradients = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(gradient_dtype), sharding=x.sharding), trained
        )
        return self.work(name, model, lower, layout, state, times, bytes_on_device(gradients))

    def log_probs(
        self,
        name: str,
        model: Pretrained,
        log_probs: Callable[..., Any],
        params: Params,
        layout: Layout,
        *,
        times: int,
        parts: int,
        preparation: Preparation | None = None,
    ) -> Work:
        """Frozen-policy log-probabilities, or values.

        Args:
            name: of its phase.
            model: that is computed.
            log_probs: as in ``make_log_prob_fn``.
            params: shapes of its parameters.
            layout: of all sequences of the step.
            times: how often it runs in a step.
            parts: micro-batches of padded rows.
            preparation: of the parameters; None for the model's.
        """
        function: Any = make_log_prob_fn(
            log_probs, num_micro_batches=parts, preparation=preparation or model.model.preparation
        )
        frozen, batch = with_constant_count(function.__wrapped__, layout.batch)
        return self.work(name, model, lambda: jax.jit(frozen).lower(params, batch), layout, params, times, None)

    def work(
        self,
        name: str,
        model: Pretrained,
        lower: Callable[[], Any],
        layout: Layout,
        own: Any,
        times: int,
        gradients: float | None,
    ) -> Work:
        """A program over whole sequences, compiled.

        Args:
            name: of its phase.
            model: that is computed.
            lower: returns the lowered program.
            layout: of its batch.
            own: its arguments beside the batch, with shardings.
            times: how often it runs in a step.
            gradients: bytes of the accumulated gradients on a device; None without a backward pass.
        """
        remat = None if gradients is None else self.config.remat
        kernel = kernel_of(self.config.attention, model.config, self.config.compute_dtype, self.mesh)
        more = kernel_flops(
            kernel,
            model.config,
            self.mesh,
            rows=layout.rows,
            length=layout.row_length,
            remat=remat,
            prompts_are_shared=layout.prompts_are_shared,
        )
        _, measured = compile_measured(lower, platform(), options_of(self.mesh, self.options), more_flops=more)
        held = bytes_on_device(own)
        batch = max(0.0, measured.arguments - held)
        count = int(layout.batch.count) if isinstance(layout.batch, PackedBatch) else self.config.micro_batches
        shape = layout.rows, layout.row_length, layout.prompts_are_shared, count
        return Work(name, measured, times, held, batch, float(gradients or 0), *shape)

"""The loop of offline training: SFT, DPO and reward models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.loop.bad_updates import check_updates
from grpo_jax.loop.checks import check_finite, check_same_data
from grpo_jax.loop.compilation import count_compilations
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.run import Run
from grpo_jax.monitor.devices import device_metrics
from grpo_jax.sharding import replicated, shard_rows
from grpo_jax.train import LossFn, init_state, make_train_step
from grpo_jax.types import Packed, Pairs, Params


@runtime_checkable
class Batches(Protocol):
    """Batches by number."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One of them, a pytree of arrays with the rows as their first axis."""
        ...


def train_offline(
    config: Any,
    run: Run,
    mesh: Mesh,
    *,
    title: str,
    model: models.Pretrained,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    batches: Batches,
    digest: str,
    evaluate: Callable[[Params, int], dict[str, Any]],
    evaluated: str,
    prompt_format: Mapping[str, Any],
    reload: Callable[[], Params],
    lengths: Callable[[Any], tuple[np.ndarray | int, np.ndarray]],
) -> None:
    """Train on batches in order, with evaluations, checkpoints and resumption; export the model at the end.

    Args:
        config: of the run.
        run: the run.
        mesh: the devices.
        title: of the progress bar.
        model: with its parameters, which are donated.
        loss_fn: ``(params, batch) -> (loss, metrics)``.
        optimizer: any optax transformation.
        schedule: update number -> learning rate.
        batches: of all epochs, one per update.
        digest: of the data; a run is resumed with the same data only.
        evaluate: ``(params, step) -> metrics``, which are logged.
        evaluated: a metric of every evaluation, which tells whether one was done.
        prompt_format: of the exported model.
        reload: loads the parameters that the run started from.
        lengths: tokens of the prompt and of the completion of each sequence of a batch, such as ``pair_lengths``.

    Raises:
        FloatingPointError: as ``check_updates``; or a metric of an evaluation is not finite.
        Stopped: a stop was requested.
        ValueError: the run was started with other data, or has taken more steps.
    """
    compilations = count_compilations()
    train_step = _make_step(config, model, loss_fn, optimizer)
    make_state = partial(init_state, with_reference=False, replicated=replicated(mesh), offload=config.offload)
    first, state, saved = run.resume(make_state(model.params, optimizer))
    check_same_data(saved, digest, run)
    check_steps(run, first, len(batches), setting="num_epochs", decay=config.optimizer.decay)
    num_tokens = saved.get("num_tokens", 0)

    def evaluation_is_due(step: int) -> bool:
        return step in (0, len(batches)) or bool(config.eval_every and step % config.eval_every == 0)

    def log_evaluation(step: int) -> dict[str, Any]:
        metrics = evaluate(state.params, step)
        check_finite(metrics, step, run)
        run.log({"step": step, **metrics})
        return metrics

    if evaluation_is_due(first) and not run.has_row(first, evaluated):
        log_evaluation(first)
    with run.progress.phase(title, len(batches), start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, len(batches) + 1):
            started = time.monotonic()
            batch = batches[step - 1]
            state, update = train_step(state, shard_rows(batch, mesh))
            metrics = check_updates([update], step, config, run)
            seconds = time.monotonic() - started
            prompts, completions = lengths(batch)
            num_tokens += (tokens := int((prompts + completions).sum()))
            flops = models.training_flops(model.config, prompts, completions, lora=model.lora)
            metrics |= device_metrics(mesh, flops=flops, seconds=seconds)
            metrics |= {
                "num_tokens": num_tokens,
                "tokens_per_second": tokens / seconds,
                "epoch": config.num_epochs * step / len(batches),
                "learning_rate": float(jnp.asarray(schedule(int(state.step) - 1))),
                "step_time": seconds,
                "compilations": compilations(),
            }
            run.log({"step": step, **metrics})
            if run.save_is_due(evaluation_is_due(step) or step % config.save_every == 0):
                run.save(step, state, {"num_tokens": num_tokens, "data": digest})
            run.stop_if_requested()
            if evaluation_is_due(step):
                metrics |= log_evaluation(step)
            phase.update(step, metrics)
    params, step = exported_params(
        config, run, state, steps=len(batches), params_of=lambda state: state.params, start=reload
    )
    save_trained(
        run,
        params,
        model,
        steps=len(batches),
        summary={"seed": config.seed},
        prompt_format=prompt_format,
        exported_step=step,
    )


def _make_step(
    config: Any, model: models.Pretrained, loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> Callable[..., Any]:
    return make_train_step(
        loss_fn,
        optimizer,
        num_micro_batches=config.micro_batches,
        preparation=model.model.preparation,
        gradient_dtype=config.optimizer.gradient_dtype,
        skip_grad_norm=config.optimizer.skip_grad_norm,
    )


def packed_lengths(packed: Packed) -> tuple[int, np.ndarray]:
    """0, and the lengths of the packed sequences: all of their tokens are predicted."""
    return 0, np.concatenate([np.bincount(row)[1:] for row in np.asarray(packed.segment_ids)])


def pair_lengths(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """``[B, 1]`` and ``[B, 2]``, the lengths of prompts and of both completions of each pair."""
    return np.asarray(pairs.prompt_mask).sum(1, keepdims=True), np.asarray(pairs.completion_mask).sum(2)

"""The functions that draw completions, made for a model and a way of sampling."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from grpo_jax.rollout.drawn import RolloutStats, cut
from grpo_jax.rollout.engine import Engine, StopFn
from grpo_jax.rollout.plan import Limits
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH
from grpo_jax.types import Model, Params, Prompts, Rollout


def make_rollout(
    model: Model,
    sampling: Sampling,
    *,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopFn | None = None,
    max_rows: int | None = None,
    cache_bytes: int | None = None,
    mesh: Mesh | None = None,
    ahead: int | None = None,
    report: Callable[[RolloutStats], None] | None = None,
) -> Callable[[Params, Prompts, Key[Array, ""]], Rollout]:
    """A function ``(params, prompts, key) -> Rollout`` that draws what ``generate`` draws, and computes little else.

    Prompts are read once for their group, and their keys and values are held once for it. Rows that have ended are left
    out of the batch, and the cache is as long as it needs to be. Prompts that do not fit at once are drawn for one set
    after the other, and what is left of several sets is drawn together.

    Args:
        model: see ``types.Model``.
        sampling: temperature, filters, penalties.
        group_size: G, samples for each prompt.
        max_completion_length: T, in tokens, the ending one included.
        eos_ids: any of these ends a completion.
        pad_id: what ``completion_ids`` holds after the end; it has no other meaning.
        stop: ends completions by what they say, such as ``data.stop.stop_strings``: from the ids of a completion and
            the number of them that were looked at before, to its length where it ends, or None. The ids stay as drawn.
        max_rows: the most completions that are drawn at once.
        cache_bytes: the most that the keys and values of one set of prompts may take, over all devices. Room for more
            is needed beside it: while a batch is made smaller the old and the new one are there together, and what is
            left of earlier sets waits.
        mesh: rows are split over its ``data`` and ``fsdp`` axes, heads over ``tensor`` where they divide.
        ahead: dispatches that are sent before the host looks at what an earlier one drew, so that a device need not
            wait. Default: none on CPU, one elsewhere.
        report: called after each rollout with what it took.

    Returns:
        A function that raises ``ValueError``, before anything is compiled, for prompts that leave no room for a
        completion, for a group that does not fit, and for completions that do not divide over the mesh.

    Raises:
        ValueError: a group_size or max_completion_length below 1, or no eos_ids.
    """
    engine = Engine(
        model,
        sampling,
        group_size=group_size,
        max_completion_length=max_completion_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        stop=stop,
        mesh=mesh,
        ahead=ahead,
        report=report,
    )
    limits = Limits(model, group_size, max_completion_length, engine.devices, max_rows, cache_bytes)

    def rollout(params: Params, prompts: Prompts, key: Key[Array, ""]) -> Rollout:
        sets = cut([prompts], limits.prompts_at_once(prompts))
        batches = {batch.first_place: batch for batch, _ in engine.run(params, sets, key)}
        parts = [batches[place].drawn(slice(0, batches[place].num_prompts)) for place in sorted(batches)]
        fields = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Rollout(**jax.device_put(fields, None if mesh is None else NamedSharding(mesh, BATCH)))

    return rollout


def make_stream(
    model: Model,
    sampling: Sampling,
    *,
    num_prompts: int,
    group_size: int,
    max_completion_length: int,
    eos_ids: tuple[int, ...],
    pad_id: int,
    stop: StopFn | None = None,
    mesh: Mesh | None = None,
    ahead: int | None = None,
    report: Callable[[RolloutStats], None] | None = None,
) -> Callable[[Params, Iterable[Prompts], Key[Array, ""]], Iterator[tuple[int, Rollout]]]:
    """A function ``(params, prompts, key) -> (place, rollout), ...`` for more prompts than fit: data sets, evaluations.

    ``prompts`` is any iterable of ``Prompts`` of one length, read as it is needed. Each prompt is handed on once all
    its samples have ended, with its place in the stream and a ``Rollout`` of G rows; the order is that in which they
    end, and the same in every run. What is drawn for a prompt is what ``make_rollout`` draws.

    Args:
        model: see ``types.Model``.
        sampling: see ``make_rollout``, as the rest.
        num_prompts: prompts that are drawn for at once; what is left of four such sets is drawn together.
        group_size: G.
        max_completion_length: T.
        eos_ids: any of these ends a completion.
        pad_id: fills ``completion_ids``.
        stop: see ``make_rollout``.
        mesh: see ``make_rollout``.
        ahead: see ``make_rollout``.
        report: see ``make_rollout``; called at the stream's end.
    """
    engine = Engine(
        model,
        sampling,
        group_size=group_size,
        max_completion_length=max_completion_length,
        eos_ids=eos_ids,
        pad_id=pad_id,
        stop=stop,
        mesh=mesh,
        ahead=ahead,
        report=report,
    )
    limits = Limits(model, group_size, max_completion_length, engine.devices, None, None)

    def stream(params: Params, prompts: Iterable[Prompts], key: Key[Array, ""]) -> Iterator[tuple[int, Rollout]]:
        def checked() -> Iterator[Prompts]:
            for each in prompts:
                limits.prompts_at_once(each)
                yield each

        for batch, n in engine.run(params, cut(checked(), num_prompts), key):
            yield batch.first_place + n, Rollout(**jax.device_put(batch.drawn(slice(n, n + 1))))

    return stream

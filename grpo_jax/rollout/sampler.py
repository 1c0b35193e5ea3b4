"""The sampler: made once for a model and a way of sampling, called at every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Key

from grpo_jax.rollout.buckets import MemoryLimits, default_cache_bytes
from grpo_jax.rollout.checks import check_lengths, check_prompts
from grpo_jax.rollout.engine import GenerationLoop, OnTokensFn, Programs, StopFn
from grpo_jax.rollout.host_batch import RolloutStats, cut, in_parts, joined
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH
from grpo_jax.types import Model, Params, Prompts, Rollout


class Sampler:
    """A function ``(params, prompts, key) -> Rollout`` that draws what ``generate`` draws, and computes little else.

    Prompts are read once for their group, and their keys and values are held once for it. Rows that have ended are left
    out of the batch, and attention reads little of the cache that is still empty. Prompts that do not fit at once are
    drawn for one set after the other, and what is left of several sets is drawn together. So are parts of a group
    that does not fit as a whole; its prompt is read once for each part. ``stream`` does the same for more prompts
    than a ``Rollout`` should hold.
    """

    def __init__(
        self,
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
        cache_dtype: Any = None,
        mesh: Mesh | None = None,
        ahead: int | None = None,
        report: Callable[[RolloutStats], None] | None = None,
    ):
        """Make the sampler; nothing is compiled before it is called.

        Args:
            model: see ``types.Model``.
            sampling: temperature, filters, penalties.
            group_size: G, samples for each prompt.
            max_completion_length: T, in tokens, the ending one included.
            eos_ids: any of these ends a completion.
            pad_id: what ``completion_ids`` holds after the end; it has no other meaning.
            stop: ends completions by what they say, such as ``data.stop.stop_strings``: from the ids of a completion
                and the number of them that were looked at before, to its length where it ends, or None. The ids stay
                as drawn.
            max_rows: the most completions that are drawn at once.
            cache_bytes: the most that the keys and values of one set of prompts may take, over all devices. Room for
                more is needed beside it: while a batch is made smaller the old and the new one are there together, and
                what is left of earlier sets waits. Default: a fifth of the devices' memory where they tell it, as GPUs
                and TPUs do; no limit elsewhere.
            cache_dtype: what keys and values are kept in: float32, bfloat16, or int8 with a scale for each token and
                head. Default: the model's own precision. A coarser one makes sampler and trainer differ by what it
                rounds away; ``experiments/bench/precision.py`` measures that.
            mesh: rows are split over its ``data`` and ``fsdp`` axes, heads over ``tensor`` where they divide.
            ahead: dispatches that are sent before the host looks at what an earlier one drew, so that a device need not
                wait. Default: none on CPU, one elsewhere.
            report: called after each rollout, and at each stream's end, with what it took.

        Raises:
            ValueError: a group_size or max_completion_length below 1, no eos_ids, or another cache_dtype.
        """
        check_lengths(group_size, max_completion_length, eos_ids)
        jax.eval_shape(lambda: model.init_cache(1, 1, cache_dtype))  # an unknown precision is found here
        self.mesh, self.report = mesh, report
        self._check_prompts = partial(
            check_prompts, model, max_completion_length=max_completion_length, eos_ids=eos_ids
        )

        @cache
        def programs(of_group: int) -> Programs:
            return Programs(
                model,
                sampling,
                group_size=of_group,
                max_completion_length=max_completion_length,
                eos_ids=eos_ids,
                pad_id=pad_id,
                stop=stop,
                cache_dtype=cache_dtype,
                mesh=mesh,
                ahead=(0 if jax.default_backend() == "cpu" else 1) if ahead is None else ahead,
            )

        self._programs = programs
        devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
        self.limits = MemoryLimits(
            model,
            group_size,
            max_completion_length,
            1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"],
            max_rows,
            default_cache_bytes(devices) if cache_bytes is None else cache_bytes,
            cache_dtype,
        )

    def __call__(
        self, params: Params, prompts: Prompts, key: Key[Array, ""], *, on_tokens: OnTokensFn | None = None
    ) -> Rollout:
        """Draw a group of completions for each prompt.

        Args:
            params: the policy's.
            prompts: N of them.
            key: of this step; with a prompt's ``index`` and a sample's number it decides the sample's noise.
            on_tokens: called with the number of a completion and its new ids, as they are drawn.

        Raises:
            ValueError: before anything is compiled, as ``checks.check_prompts``, for a sample that does not fit, and
                for completions that do not divide over the mesh.
        """
        self.limits.check_rows(prompts.ids.shape[0])
        self._check_prompts(params, prompts)
        parts, at_once = self._plan(*prompts.ids.shape)
        drawing = GenerationLoop(self._programs(self.limits.group_size // parts), params, key, on_tokens)
        batches = {batch.first_place: batch for batch, _ in drawing.run(cut([in_parts(prompts, parts)], at_once))}
        self.told(drawing)
        fields = joined([batches[place].drawn(slice(0, batches[place].num_prompts)) for place in sorted(batches)])
        return Rollout(**jax.device_put(fields, None if self.mesh is None else NamedSharding(self.mesh, BATCH)))

    def stream(
        self, params: Params, prompts: Iterable[Prompts], key: Key[Array, ""], *, num_prompts: int
    ) -> Iterator[tuple[int, Rollout]]:
        """``(place, rollout), ...`` for more prompts than fit: data sets, evaluations.

        Each prompt is handed on once all its samples have ended, with its place in the stream and a ``Rollout`` of G
        rows on the default device; the order is that in which they end, and the same in every run.

        Args:
            params: the policy's.
            prompts: any iterable of ``Prompts`` of one length, read as it is needed.
            key: see ``__call__``; distinct prompts of a stream have distinct ``index``.
            num_prompts: the most that are drawn for at once; what is left of four such sets is drawn together.

        Raises:
            ValueError: as ``__call__``, once the prompts in question are read, which is a set ahead of those that are
                drawn for; prompts of several lengths.
        """
        coming = iter(prompts)
        first = next(coming, None)
        length = 0 if first is None else first.ids.shape[1]
        parts, at_once = self._plan(num_prompts, length)
        drawing = GenerationLoop(self._programs(self.limits.group_size // parts), params, key)
        if first is None:
            self.told(drawing)
            return

        def checked() -> Iterator[Prompts]:
            for each in chain([first], coming):
                if each.ids.shape[1] != length:
                    raise ValueError(f"prompts of a stream have one length; after {length} came {each.ids.shape[1]}")
                self._check_prompts(params, each)
                yield in_parts(each, parts)

        waiting: dict[int, dict[int, dict[str, np.ndarray]]] = {}
        for batch, n in drawing.run(cut(checked(), at_once)):
            place, part = divmod(batch.first_place + n, parts)
            found = waiting.setdefault(place, {})
            found[part] = batch.drawn(slice(n, n + 1))
            if len(found) == parts:
                del waiting[place]
                yield place, Rollout(**jax.device_put(joined([found[part] for part in range(parts)])))
        self.told(drawing)

    def _plan(self, num_prompts: int, length: int) -> tuple[int, int]:
        """How many parts a group is drawn in, and how many prompts, each for one part, are drawn for at once."""
        parts = self.limits.parts_of_a_group(length)
        of_part = replace(self.limits, group_size=self.limits.group_size // parts)
        return parts, of_part.prompts_at_once(num_prompts * parts, length)

    def told(self, drawing: GenerationLoop) -> None:
        """Say what was taken, to whoever asked for it."""
        if self.report is not None:
            self.report(drawing.stats)

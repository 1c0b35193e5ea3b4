"""The sampler: constructed once for a model and its sampling settings, called at every step."""

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
from grpo_jax.rollout.compiled import CompiledSteps, StopFn
from grpo_jax.rollout.engine import GenerationLoop, OnTokensFn
from grpo_jax.rollout.host_batch import RolloutStats, batched, concatenated_fields, split_groups
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH, num_row_shards, place
from grpo_jax.types import Model, Params, Prompts, Rollout


class Sampler:
    """A function ``(params, prompts, key) -> Rollout`` that returns the samples of ``generate`` for less compute.

    Each prompt is prefilled once, and its prefix KV cache is shared by its group. Finished rows are removed from the
    batch, and attention reads little of the cache that is still empty. Prompts that do not fit in memory together are
    sampled for in several batches, whose last unfinished rows are merged into one. A group that does not fit is split
    into parts, and its prompt is prefilled for each. ``stream`` does the same for more prompts than one ``Rollout``
    should hold.
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
        record_experts: bool = False,
        report: Callable[[RolloutStats], None] | None = None,
    ):
        """Construct the sampler; programs are compiled when it is called.

        Args:
            model: the policy's model.
            sampling: temperature, filters, penalties.
            group_size: G, samples of each prompt (TRL: ``num_generations``).
            max_completion_length: T, in tokens, the EOS token included.
            eos_ids: any of these ends a completion.
            pad_id: filling of ``completion_ids`` after the end; it has no other meaning.
            stop: ends completions by their text, such as ``stop.stop_strings``: ``(ids, num_seen) -> length``, from a
                completion's ids, of which the first ``num_seen`` were checked before, to the length at which it ends,
                or None. Ids before that length are kept as sampled.
            max_rows: the largest batch, in completions.
            cache_bytes: limit of the KV cache of one batch, over all devices. More is needed beside it: compaction
                holds the old and the new batch at once, and small remainders of earlier batches are kept until they
                are merged. Default: a fifth of the devices' memory on GPU and TPU; no limit on CPU.
            cache_dtype: dtype of keys and values: float32, bfloat16, or int8 with a scale for each token and head.
                Default: the model's compute dtype. A coarser one makes the log-probabilities of sampler and trainer
                differ by its rounding, which ``experiments/bench/precision.py`` measures.
            mesh: rows are sharded over its ``data`` and ``fsdp`` axes, heads over ``tensor`` if they divide.
            ahead: dispatches that are launched before the host reads the results of an earlier one, so that devices do
                not wait for the host. Default: 0 on CPU, 1 elsewhere.
            record_experts: whether rollouts have the experts of each token, for the trainer to use again; no effect on
                a model without experts.
            report: called with statistics after each rollout, and at the end of each stream.

        Raises:
            ValueError: a ``group_size`` or ``max_completion_length`` below 1, empty ``eos_ids``, or another
                ``cache_dtype``.
        """
        check_lengths(group_size, max_completion_length, eos_ids)
        jax.eval_shape(lambda: model.init_cache(1, 1, cache_dtype))  # raises for an unknown dtype
        self.mesh, self.report = mesh, report
        self._check_prompts = partial(
            check_prompts, model, max_completion_length=max_completion_length, eos_ids=eos_ids
        )

        @cache
        def steps(rows_per_prompt: int) -> CompiledSteps:
            return CompiledSteps(
                model,
                sampling,
                group_size=rows_per_prompt,
                max_completion_length=max_completion_length,
                eos_ids=eos_ids,
                pad_id=pad_id,
                stop=stop,
                cache_dtype=cache_dtype,
                mesh=mesh,
                ahead=(0 if jax.default_backend() == "cpu" else 1) if ahead is None else ahead,
                record_experts=record_experts and model.routing is not None,
            )

        self._steps = steps
        devices = jax.local_devices()[:1] if mesh is None else list(mesh.devices.flat)
        self.limits = MemoryLimits(
            model,
            group_size,
            max_completion_length,
            num_row_shards(mesh),
            max_rows,
            default_cache_bytes(devices) if cache_bytes is None else cache_bytes,
            cache_dtype,
        )

    def __call__(
        self, params: Params, prompts: Prompts, key: Key[Array, ""], *, on_tokens: OnTokensFn | None = None
    ) -> Rollout:
        """Sample a group of completions for each prompt.

        Args:
            params: the policy's parameters.
            prompts: N prompts, left-padded to P.
            key: random key of this step; a sample's noise is a function of it, the prompt's ``index`` and the sample's
                number in the group.
            on_tokens: streaming callback ``(row, ids)``, called with the new tokens of a row of the rollout.

        Raises:
            ValueError: before anything is compiled, as ``checks.check_prompts``; for a sample that does not fit the
                limits; and for completions that do not divide over the mesh.
        """
        rollout = self.on_host(params, prompts, key, on_tokens=on_tokens)
        return place(rollout, None if self.mesh is None else NamedSharding(self.mesh, BATCH))

    def on_host(
        self, params: Params, prompts: Prompts, key: Key[Array, ""], *, on_tokens: OnTokensFn | None = None
    ) -> Rollout:
        """As ``__call__``, with NumPy arrays as its result; on several hosts, whole on each of them.

        Args:
            params, prompts, key, on_tokens: as there.

        Raises:
            ValueError: as there.
        """
        self.limits.check_divisible(prompts.ids.shape[0])
        self._check_prompts(prompts)
        num_parts, batch_size = self._plan(*prompts.ids.shape)
        loop = GenerationLoop(self._steps(self.limits.group_size // num_parts), params, key, on_tokens)
        finished = loop.run(batched([split_groups(prompts, num_parts)], batch_size))
        batches = {batch.first_prompt: batch for batch, _ in finished}
        self._report(loop)
        fields = concatenated_fields(
            [batch.rollout_fields(slice(0, batch.num_prompts)) for _, batch in sorted(batches.items())]
        )
        return Rollout(**fields)  # pyright: ignore[reportArgumentType]

    def stream(
        self, params: Params, prompts: Iterable[Prompts], key: Key[Array, ""], *, num_prompts: int
    ) -> Iterator[tuple[int, Rollout]]:
        """Sample for a stream of prompts, such as a data set, and yield each prompt as soon as it is finished.

        Args:
            params: the policy's parameters.
            prompts: any iterable of ``Prompts`` of one length, read one batch ahead of sampling.
            key: random key, as in ``__call__``; the prompts of a stream have distinct ``index``.
            num_prompts: prompts of one batch at most; small remainders of four batches are merged into one.

        Yields:
            A prompt's number in the stream, and its ``Rollout`` of G rows on the default device; in the order in which
            prompts finish, which is the same in every run.

        Raises:
            ValueError: as ``__call__``, when the prompts in question are read; and for prompts of several lengths.
        """
        remaining = iter(prompts)
        first = next(remaining, None)
        length = 0 if first is None else first.ids.shape[1]
        num_parts, batch_size = self._plan(num_prompts, length)
        loop = GenerationLoop(self._steps(self.limits.group_size // num_parts), params, key)
        if first is None:
            self._report(loop)
            return

        def checked() -> Iterator[Prompts]:
            for more in chain([first], remaining):
                if more.ids.shape[1] != length:
                    raise ValueError(f"prompts of a stream have one length; after {length} came {more.ids.shape[1]}")
                self._check_prompts(more)
                yield split_groups(more, num_parts)

        incomplete: dict[int, dict[int, dict[str, np.ndarray]]] = {}
        for batch, n in loop.run(batched(checked(), batch_size)):
            prompt, part = divmod(batch.first_prompt + n, num_parts)
            parts = incomplete.setdefault(prompt, {})
            parts[part] = batch.rollout_fields(slice(n, n + 1))
            if len(parts) == num_parts:
                del incomplete[prompt]
                yield prompt, Rollout(**jax.device_put(concatenated_fields([parts[i] for i in range(num_parts)])))
        self._report(loop)

    def _plan(self, num_prompts: int, length: int) -> tuple[int, int]:
        """The number of parts of a group, and the prompts of a batch, each counted once for each part."""
        num_parts = self.limits.num_group_parts(length)
        limits = replace(self.limits, group_size=self.limits.group_size // num_parts)
        return num_parts, limits.prompts_per_batch(num_prompts * num_parts, length)

    def _report(self, loop: GenerationLoop) -> None:
        if self.report is not None:
            self.report(loop.stats)

"""Demonstrations and preferences of a run: loaded, held out, encoded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from grpo_jax.config.offline import DemonstrationConfig, OfflineConfig, OfflineDataConfig, PreferenceConfig
from grpo_jax.data.conversations import (
    Demonstration,
    Example,
    encode_demonstrations,
    load_demonstrations,
)
from grpo_jax.data.preferences import EncodedPreferences, Preference, load_preferences
from grpo_jax.data.prompts import Rendering
from grpo_jax.data.statistics import DataStatistics, prompt_key
from grpo_jax.loop.problems import dataset_of
from grpo_jax.loop.run import Run
from grpo_jax.models import Pretrained
from grpo_jax.tasks.generated import DEMONSTRATIONS, PREFERENCES
from grpo_jax.tasks.splits import HELD_OUT_SEED, default_split, hold_out

Read = TypeVar("Read", Demonstration, Preference)


def _load_split(
    data: OfflineDataConfig,
    seed: int,
    load: Callable[..., list[Read]],
    generators: Mapping[str, Callable[..., list[Read]]],
    stats: DataStatistics,
) -> tuple[list[Read], list[Read]]:
    """Training rows and held-out rows; no held-out row has the prompt of a training row."""
    if data.dataset is not None and data.dataset in generators:
        generate = generators[data.dataset]
        return (
            generate(np.random.default_rng(seed), data.num_generated, held_out=False),
            generate(np.random.default_rng(HELD_OUT_SEED), data.eval_size, held_out=True),
        )
    dataset = dataset_of(data)
    load = partial(load, subset=data.subset, skipped=stats.skipped if data.skip_bad_rows else None)
    rows = load(dataset, split=data.split)
    stats.count_duplicates([*map(_row_key, rows)])
    if data.eval_dataset is None and data.eval_split is None:
        training, held_out = hold_out(rows, data.eval_size, key=_prompt_of, source=dataset)
        stats.count_held_out(len(rows), len(held_out), dataset)
        return training, held_out
    source = data.eval_dataset or dataset
    held_out = load(source, split=data.eval_split or default_split(source, data.subset))
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(held_out))
    held_out = [held_out[n] for n in order]
    held_out = stats.drop_leaks(held_out, map(_prompt_of, held_out), map(_prompt_of, rows))
    if not held_out:
        raise ValueError(
            f"every held-out row of {source} is also trained on; choose another eval_dataset or eval_split"
        )
    return rows, held_out[: data.eval_size]


def load_demonstration_sets(
    data: DemonstrationConfig, seed: int, stats: DataStatistics | None = None
) -> tuple[list[Demonstration], list[Demonstration]]:
    """Training and held-out demonstrations.

    Args:
        data: sources and columns.
        seed: seed of generated demonstrations.
        stats: receives skipped rows, duplicates, leaks and the held-out share.

    Raises:
        ValueError: as ``conversations.load_demonstrations``; or every held-out row is also trained on.
    """

    def load(source: str, **where: Any) -> list[Demonstration]:
        return load_demonstrations(
            source, prompt_column=data.prompt_column, completion_column=data.completion_column, **where
        )

    return _load_split(data, seed, load, DEMONSTRATIONS, DataStatistics() if stats is None else stats)


def encode_demonstration_set(
    data: DemonstrationConfig,
    demonstrations: Sequence[Demonstration],
    policy: Pretrained,
    *,
    max_length: int,
    rendering: Rendering,
) -> tuple[list[Example], int]:
    """The demonstrations as tokens, and the number dropped because they are too long.

    Args:
        data: ``train_on`` and ``long``.
        demonstrations: the rows.
        policy: its tokenizer and stop tokens.
        max_length: in tokens.
        rendering: prompt format in effect.

    Raises:
        ValueError: all are too long, or one is and ``long`` is ``error``; and as ``encode_demonstrations``.
    """
    examples = encode_demonstrations(
        demonstrations,
        policy.tokenizer,
        eos_ids=policy.eos_ids,
        train_on=data.train_on,
        **rendering,
    )
    fitting = [example for example in examples if len(example.token_ids) <= max_length]
    if data.long == "truncate":
        cut = [Example(ids[:max_length], loss_mask[:max_length], start) for ids, loss_mask, start in examples]
        fitting = [example for example in cut if any(example.loss_mask)]
    too_long = len(examples) - len(fitting)
    if not fitting or (too_long and data.long == "error"):
        raise ValueError(
            f"{too_long} of {len(examples)} demonstrations do not fit into max_length = {max_length} tokens; the "
            f"longest has {max(len(example.token_ids) for example in examples)}. Raise max_length, or choose --long "
            "drop or truncate"
        )
    return fitting, too_long


def load_preference_sets(
    data: PreferenceConfig, seed: int, stats: DataStatistics | None = None
) -> tuple[list[Preference], list[Preference]]:
    """Training and held-out preferences.

    Args:
        data: sources.
        seed: seed of generated preferences.
        stats: receives skipped rows, duplicates, leaks and the held-out share.

    Raises:
        ValueError: as ``preferences.load_preferences``; or every held-out row is also trained on.
    """
    return _load_split(data, seed, load_preferences, PREFERENCES, DataStatistics() if stats is None else stats)


def load_sets(
    config: OfflineConfig, run: Run, load: Callable[..., tuple[list[Read], list[Read]]]
) -> tuple[list[Read], list[Read]]:
    """Training and held-out rows of a run, which writes ``data.json`` about them.

    Args:
        config: its data and seed.
        run: the run.
        load: ``load_demonstration_sets`` or ``load_preference_sets``.

    Raises:
        Stopped: a stop was requested.
        ValueError: as ``load``.
    """
    stats = DataStatistics()
    sets = load(config.data, config.seed, stats)
    stats.report(run.say, run.folder / "data.json")
    run.stop_if_requested()
    return sets


def encode_preference_sets(
    run: Run,
    sets: tuple[list[Preference], list[Preference]],
    model: Pretrained,
    *,
    lengths: tuple[int, int],
    rendering: Rendering,
) -> tuple[EncodedPreferences, EncodedPreferences]:
    """Training and held-out preferences as tokens; the run says how many were too long.

    Args:
        run: the run.
        sets: as ``load_preference_sets`` gives them.
        model: its tokenizer and special tokens.
        lengths: the longest prompt and completion in tokens.
        rendering: prompt format in effect.

    Raises:
        ValueError: as ``EncodedPreferences``.
    """
    pairs, held_out = (
        EncodedPreferences(
            preferences,
            model.tokenizer,
            eos_ids=model.eos_ids,
            pad_id=model.pad_id,
            max_prompt_length=lengths[0],
            max_completion_length=lengths[1],
            **rendering,
        )
        for preferences in sets
    )
    if pairs.dropped:
        run.say(f"{pairs.dropped} of {len(sets[0])} pairs dropped: too long")
    return pairs, held_out


def _prompt_of(row: Demonstration | Preference) -> str:
    return prompt_key(row.prompt) or prompt_key(getattr(row, "completion", ""))


def _row_key(row: Demonstration | Preference) -> str:
    """A key of prompt and completions: rows with the same prompt and other completions are not duplicates."""
    texts = [row.completion] if isinstance(row, Demonstration) else [row.chosen, row.rejected]
    return "\0".join(map(prompt_key, [row.prompt, *texts]))

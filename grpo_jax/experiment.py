"""What experiments have in common: the fields of their configurations, and the frame around their loops."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.compilations import keep_programs
from grpo_jax.models.kernels import AttentionName
from grpo_jax.models.tokenizers import stop_ids
from grpo_jax.monitor.summary import best_evaluation
from grpo_jax.outcome import say_best
from grpo_jax.rollout import Sampler
from grpo_jax.run import Run, Stopped, device_summary
from grpo_jax.sampling import Sampling
from grpo_jax.settings import MeshSettings
from grpo_jax.sharding import param_shardings
from grpo_jax.small_base import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, Recipe, make_base
from grpo_jax.types import Params

PROMPT_AND_COMPLETION = "max_prompt_length + max_completion_length"
LAID_OUT = ("run_dir", "mesh", "remat", "attention", "trackers", "plain", "save_every", "keep_checkpoints")
"""Settings that a resumed run may have other values of in every experiment: they change no number beyond rounding."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where a run lies and what it leaves."""

    run_dir: Path
    """The run's own folder: logs, checkpoints, curves, the trained model."""
    seed: int = 0
    """Of everything that is drawn."""
    save_every: int = 10
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest stay."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where metrics go besides the run's folder."""
    plain: bool = False
    """Print plain lines even on a terminal."""

    def __post_init__(self):
        at_least(self, seed=0, save_every=1, keep_checkpoints=1)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that is trained, and how it is computed."""

    model: str | None = None
    """Hugging Face id or local folder of the model to start from. Default: a small base, trained here first."""
    base: Recipe = Recipe()
    """How that small one is made; the seed is the run's."""
    base_dir: Path | None = None
    """Folder of such a base that was made before, to start from instead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the computation; weights and optimizer stay in float32. Default: bfloat16 with --model on a GPU or
    TPU, float32 otherwise."""
    remat: bool | None = None
    """Compute blocks again in the backward pass instead of keeping their activations. Default: with --model."""
    attention: AttentionName = "auto"
    """What computes the attention of whole sequences. auto: in bfloat16 cuDNN on a GPU and splash attention on a TPU,
    where they fit the model; else the plain path."""
    rope_length: int | None = None
    """For models with longrope or dynamic rope scaling: tokens of the longest sequence of the run, by which rotary
    frequencies are chosen for all of its sequences. Needed where they could pass the original length."""
    mesh: MeshSettings = MeshSettings()
    """How the devices are used."""

    @property
    def positions(self) -> int | None:
        """The tokens that the model to start from has positions for; None where that is unlimited or not known yet."""
        if self.model is not None:
            return models.num_positions(self.model)
        made_before = None if self.base_dir is None else models.num_positions(self.base_dir)
        return made_before or self.base.hf_config["max_position_embeddings"]

    def check_positions(self, length: int, name: str) -> None:
        """Check, before any weights are loaded, that the model has a position for every token.

        Raises:
            ValueError: it does not.
        """
        check_positions(length, self.positions, name)

    @property
    def compute_dtype(self):
        """The precision in effect."""
        fast = self.model is not None and jax.default_backend() != "cpu"
        return jnp.dtype(self.dtype or ("bfloat16" if fast else "float32")).type

    def start(self, run: Run, seed: int) -> str:
        """The model that is started from; a small base is trained now unless it lies in the run's folder already."""
        if self.model is not None or self.base_dir is not None:
            return self.model or str(self.base_dir)
        return small_base(run, replace(self.base, seed=seed))

    def load(self, name_or_folder: str, mesh: Mesh, *, scalar_head: bool = False) -> models.Pretrained:
        """A model as it is computed here; see ``models.from_pretrained`` for what it raises.

        Args:
            name_or_folder: a Hugging Face id or local folder.
            mesh: that it is laid out on.
            scalar_head: whether its output embedding gives way to a scalar head, with weights at 0 unless it has one.

        Raises:
            ValueError: it has no tokenizer, or is a reward model where none is wanted.
        """
        loaded = models.from_pretrained(
            name_or_folder,
            dtype=self.compute_dtype,
            remat=self.model is not None if self.remat is None else self.remat,
            attention=self.attention,
            mesh=mesh,
            shardings=partial(param_shardings, mesh=mesh),
            scalar_head=scalar_head,
            rope_length=self.rope_length,
        )
        return checked_model(loaded, name_or_folder, scalar_head=scalar_head)


@dataclass(frozen=True, kw_only=True)
class PolicySettings(ModelSettings):
    """A model that completions are drawn from."""

    max_prompt_length: int | None = None
    """In tokens. Default: 512 with --model, 12 without; less where the model has too few positions."""
    max_completion_length: int | None = None
    """In tokens. Default: 1024 with --model, 48 without; less where the model has too few positions."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion besides those the model names, such as '<|im_end|>'."""
    sampling: Sampling = Sampling()
    """How completions are drawn; the temperature is the policy's in every log-probability too."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Precision of keys and values in sampling; a coarser one lets more samples fit, and puts a gap between sampler and
    trainer that --importance-cap makes up for. Default: that of the computation."""
    cache_bytes: int | None = None
    """What keys and values of prompts drawn for at once may take, over all devices; more prompts are drawn for one set
    after the other. Default: a fifth of the memory of a GPU or TPU, no limit on a CPU."""

    def __post_init__(self):
        at_least(self, max_prompt_length=1, max_completion_length=1, cache_bytes=1)
        self.check_positions(self.prompt_length + self.completion_length, PROMPT_AND_COMPLETION)

    @property
    def prompt_length(self) -> int:
        """The prompt length in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)[0]

    @property
    def completion_length(self) -> int:
        """The completion length in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)[1]

    def sampler(self, policy: models.Pretrained, mesh: Mesh, group_size: int) -> Sampler:
        """The function that draws ``group_size`` completions of each prompt."""
        return Sampler(
            policy.model,
            self.sampling,
            group_size=group_size,
            max_completion_length=self.completion_length,
            eos_ids=policy.eos_ids,
            pad_id=policy.pad_id,
            cache_bytes=self.cache_bytes,
            cache_dtype=self.cache_dtype,
            mesh=mesh,
        )

    def as_sampled(self, policy: models.Pretrained) -> models.Pretrained:
        """The policy with the configuration's stop tokens among those that end a sequence.

        Raises:
            ValueError: a stop token that is not one token of the model, or more tokens than the model has positions.
        """
        check_length(self.prompt_length + self.completion_length, policy, PROMPT_AND_COMPLETION)
        return with_stop_tokens(policy, self.stop_tokens)


def checked_model(model: models.Pretrained, name: str, *, scalar_head: bool = False) -> models.Pretrained:
    """The model, if it is one to train and sample from.

    Args:
        model: as it was read.
        name: its folder or id.
        scalar_head: whether it is wanted as a reward model or critic.

    Raises:
        ValueError: it has no tokenizer, or is a reward model where none is wanted.
    """
    if model.config.scalar_head and not scalar_head:
        raise ValueError(f"{name} is a reward model: its head gives a score and no tokens; name a language model")
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; a folder with weights needs tokenizer.json too")
    return model


def with_stop_tokens(model: models.Pretrained, stop_tokens: Sequence[str]) -> models.Pretrained:
    """The model with more tokens among those that end a sequence.

    Args:
        model: with a tokenizer.
        stop_tokens: each one token of its tokenizer, such as ``<|im_end|>``.

    Raises:
        ValueError: one is not, or has no row in the embedding.
    """
    if not stop_tokens:
        return model
    more = stop_ids(model.tokenizer, stop_tokens, model.config.vocab_size)
    return replace(model, eos_ids=tuple(dict.fromkeys([*model.eos_ids, *more])))


def fitting_lengths(config: ModelSettings, prompt: int | None, completion: int | None) -> tuple[int, int]:
    """The lengths of prompt and completion in effect, in tokens.

    Those that are not set are 512 and 1024 with a named model, and 12 and 48 with the embedded base. Where the model
    has fewer positions than that, what is not set gets the positions that are left, a third of them for the prompt.

    Args:
        config: names the model.
        prompt, completion: what is set; None for the default.
    """
    usual = (512, 1024) if config.model else (MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH)
    wanted = prompt or usual[0], completion or usual[1]
    positions = config.positions if prompt is None or completion is None else None
    if positions is None or sum(wanted) <= positions or (prompt or completion or 1) >= positions:
        return wanted  # what leaves no position for the other is refused by its own value
    if prompt is not None:
        return prompt, positions - prompt
    if completion is not None:
        return positions - completion, completion
    return positions // 3 or 1, positions - (positions // 3 or 1)


AnyConfig = TypeVar("AnyConfig", bound=Any)


def run_experiment(
    config: AnyConfig,
    train: Callable[[AnyConfig, Run], None],
    *,
    title: str,
    may_change: Sequence[str] = (),
    goes_on_with: Sequence[str] = (),
    again: bool = False,
) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop.

    Args:
        config: a dataclass with the fields of ``RunSettings`` and ``ModelSettings``.
        train: the experiment's loop.
        title: what the live view is called.
        may_change: settings that a resumed run may have other values of, besides ``LAID_OUT``.
        goes_on_with: settings besides, with other values of which a finished run goes on, such as ``num_steps``.
        again: whether ``train`` is called for a run that is finished too.
    """
    keep_programs()
    # What is called float32 is computed in float32, on a GPU or TPU too.
    exact = jax.default_matmul_precision("highest") if config.compute_dtype == jnp.float32 else nullcontext()
    with (
        exact,
        Run(
            config.run_dir,
            config,
            title=title,
            may_change=(*LAID_OUT, *may_change, *goes_on_with),
            trackers=config.trackers,
            keep_checkpoints=config.keep_checkpoints,
            plain=config.plain or None,
        ) as run,
    ):
        try:
            if run.is_finished_with(goes_on_with) and not again:
                run.say(f"this run is finished; everything is in {run.folder}")
            else:
                train(config, run)
        except Stopped:
            run.say(f"stopped; checkpoints of steps {run.checkpoints.steps()}; the same command goes on from the last")
            return 130
    return 0


def small_base(run: Run, recipe: Recipe) -> str:
    """The folder of the embedded default's base, which is trained unless it lies in the run's folder already."""
    folder = run.folder / "base"
    if not folder.exists():
        with run.progress.phase("base model", recipe.steps) as phase:

            def report(step: int, row: dict[str, float]) -> None:
                phase.update(step, row if step % 50 == 0 else None)
                run.stop_if_requested()

            make_base(folder, recipe, report=report)
    return str(folder)


def facts_of(config: ModelSettings, start: str, model: models.Pretrained, mesh: Mesh) -> dict[str, str]:
    """Device, precision, model and size, for a run's first lines."""
    count = sum(x.size for x in jax.tree.leaves(model.params))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return {
        "devices": f"{device_summary()}, of them in use {mesh.size} (mesh: {axes})",
        "precision": f"{jnp.dtype(config.compute_dtype).name}, weights and optimizer in float32",
        "model": f"{model.hf_config.get('model_type')} from {start}, {count:,} parameters, "
        f"{model.hf_config.get('max_position_embeddings') or 'any number of'} positions",
    }


def save_trained(
    run: Run,
    params: Params,
    like: models.Pretrained,
    *,
    steps: int,
    summary: Mapping[str, Any] = MappingProxyType({}),
    prompt_format: Mapping[str, Any] | None = None,
    exported_step: int | None = None,
) -> None:
    """Save what was trained as a Hugging Face folder, ``model``, and sum the run up.

    Its ``eos_token_id`` names every token that ended a sequence in training.

    Args:
        run: the figures of its evaluation before the first step, and of that of the exported step, are those before
            and after.
        params: what was trained.
        like: the model they came from, for its configuration, tokenizer and ending tokens.
        steps: how many were taken.
        summary: what is to be told besides.
        prompt_format: how the prompts it was trained on were made; becomes the folder's ``prompt_format.json``.
        exported_step: the step that ``params`` are of; by default the last.
    """
    folder = run.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed before the summary
    models.save_pretrained(
        folder,
        params,
        hf_config=like.hf_config,
        tokenizer=like.tokenizer,
        generation_config=like.generation_config,
        prompt_format=prompt_format,
        eos_ids=like.eos_ids,
    )
    exported_step = steps if exported_step is None else exported_step
    rows = [row for row in run.rows() if any(name.startswith("eval/") for name in row)]
    before, after = rows[0], [row for row in rows if row["step"] <= exported_step][-1]
    figures = {
        f"{name.removeprefix('eval/').replace('@', '_at_')}_{when}": row[name]
        for name in before
        if name.startswith("eval/") and name in after
        for when, row in (("before", before), ("after", after))
    }
    best = best_evaluation(rows)
    chosen = {"exported_step": exported_step, "best_step": None if best is None else best["step"]}
    run.finish(before, after, steps=steps, summary={**figures, **chosen, **summary})
    say_best(run, rows, exported_step)


def at_least(config: Any, **least: int) -> None:
    """Check that settings are not too small; those that are None are not looked at.

    Raises:
        ValueError: one is; it says which, and what would do.
    """
    for name, smallest in least.items():
        value = getattr(config, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}; it must be at least {smallest}")


def check_length(length: int, policy: models.Pretrained, name: str) -> None:
    """Check that a model has a position for every token, and one set of rotary frequencies for all lengths.

    Raises:
        ValueError: it has not.
    """
    check_positions(length, policy.model.max_length, name)
    switch = policy.model.rope_switch_length
    if switch is not None and length > switch:
        raise ValueError(
            f"{name} is {length}, and sequences of more than {switch} tokens have other rotary frequencies in this "
            f"model; choose one set for all with --rope-length {length}, or set {name} to at most {switch}"
        )


def check_positions(length: int, positions: int | None, name: str) -> None:
    """Check that there is a position for every token.

    Args:
        length: tokens.
        positions: of the model; None for any number.
        name: of the setting, or of the sum of settings, that gives the length.

    Raises:
        ValueError: there are too few.
    """
    if positions is not None and length > positions:
        lower = "lower one of them" if "+" in name else "lower it"
        raise ValueError(f"{name} is {length}, and the model has {positions} positions; {lower}")


def check_same_data(position: Mapping[str, Any], digest: str, run: Run) -> None:
    """Check that a run is resumed with the data it was begun with.

    Raises:
        ValueError: the digest in its position is another one.
    """
    if position and position["data"] != digest:
        raise ValueError(
            f"the data are not those that {run.folder} was begun with; restore them, or use another run_dir"
        )


def padded_batches(count: int, size: int) -> Iterator[tuple[list[int], int]]:
    """The positions from 0 to ``count`` in batches of one size, the last filled up; and how many of each are real."""
    for first in range(0, count, size):
        positions = list(range(first, min(first + size, count)))
        yield positions + [positions[-1]] * (size - len(positions)), len(positions)


def check_divides(count: int, mesh: Mesh, name: str) -> None:
    """Check that a number of rows divides over the devices that share a batch.

    Raises:
        ValueError: it does not.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if count % parts:
        raise ValueError(f"{name}: {count} do not divide over mesh data x fsdp = {parts} devices")


def over_updates(updates: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """A step's metrics: over its updates, the largest of what is a maximum and the mean of the rest."""
    values = {name: [float(update[name]) for update in updates] for name in updates[0]}
    return {
        # NumPy's maximum of NaN is NaN; Python's depends on the order.
        name: float(np.max(each)) if name.endswith("/max") else sum(each) / len(each)
        for name, each in values.items()
    }


def check_finite(metrics: Mapping[str, float], step: int, run: Run) -> None:
    """Stop a run whose updates or evaluation gave a loss, gradient or other metric that is not finite.

    Args:
        metrics: those of the step's updates, before it is saved, or of an evaluation.
        step: its number.
        run: whose complete checkpoints the error lists.

    Raises:
        FloatingPointError: a metric is NaN or infinite.
    """
    broken = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if broken:
        raise FloatingPointError(
            f"step {step}: {', '.join(f'{name} is {value}' for name, value in broken.items())}. The run ends here; "
            f"complete checkpoints: {run.checkpoints.steps()}"
        )

"""Settings of the model, its precision and its sampler."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from grpo_jax import models
from grpo_jax.config.run import MeshConfig, require_at_least
from grpo_jax.models.kernels import AttentionName
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.toy_model import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, ToyConfig

PROMPT_AND_COMPLETION = "max_prompt_length + max_completion_length"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model that is trained, and how it is computed."""

    model: str | None = None
    """Hugging Face id or local folder of the model to start from. Default: a small base, trained here first."""
    base: ToyConfig = ToyConfig()
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
    mesh: MeshConfig = MeshConfig()
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


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(ModelConfig):
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
        require_at_least(self, max_prompt_length=1, max_completion_length=1, cache_bytes=1)
        self.check_positions(self.prompt_length + self.completion_length, PROMPT_AND_COMPLETION)

    @property
    def prompt_length(self) -> int:
        """The prompt length in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)[0]

    @property
    def completion_length(self) -> int:
        """The completion length in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)[1]


def fitting_lengths(config: ModelConfig, prompt: int | None, completion: int | None) -> tuple[int, int]:
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

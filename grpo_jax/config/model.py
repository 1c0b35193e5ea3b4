"""Settings of the model, its precision and its sampler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

from grpo_jax.config.run import MeshConfig, require_at_least
from grpo_jax.devices import check_host_memory, platform
from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.hf_config import from_hf_config
from grpo_jax.models.kernels import AttentionName
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.positions import num_positions, read_decoder_config
from grpo_jax.models.remat import Remat, check_remat
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.toy_config import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, TOY, ToyConfig

PROMPT_AND_COMPLETION = "max_prompt_length + max_completion_length"
PROMPT_LENGTH, COMPLETION_LENGTH = 512, 1024
TOY_MODEL: dict[str, Any] = {"model": TOY, "dtype": "float32", "remat": "none"}
TOY_LENGTHS: dict[str, Any] = {
    "max_prompt_length": MAX_PROMPT_LENGTH,
    "max_completion_length": MAX_COMPLETION_LENGTH,
}
TOY_POLICY = TOY_MODEL | TOY_LENGTHS
"""Fields that the toy presets of all scripts share."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model, its precision and its devices."""

    model: str | None = None
    """Hugging Face id or local folder of the model to start from; 'toy' trains the toy model first."""
    toy: Annotated[ToyConfig, tyro.conf.Suppress] = ToyConfig()
    """The toy model, where model is 'toy'. Its seed is the run's."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the computation; parameters and optimizer state are float32. auto: bfloat16 on a GPU or TPU, float32
    on a CPU."""
    remat: Remat = "block"
    """Gradient checkpointing. none: store all activations; block: store each block's input and recompute the rest in
    the backward pass; offload: as block, with these inputs in the host's memory."""
    attention: AttentionName = "auto"
    """Attention kernel for whole sequences. auto: in bfloat16 cuDNN on a GPU and splash attention on a TPU, where they
    support the model; otherwise plain."""
    rope_length: int | None = None
    """For longrope and dynamic rope scaling: the longest sequence of the run in tokens, which selects one set of rotary
    frequencies. Required where sequences could exceed the original length."""
    mesh: MeshConfig = MeshConfig()
    """Device mesh."""

    @property
    def positions(self) -> int | None:
        """Positions of the model in tokens; None if unlimited or unknown."""
        if self.model == TOY:
            return self.toy.hf_config["max_position_embeddings"]
        return None if self.model is None else num_positions(self.model)

    @property
    def decoder(self) -> DecoderConfig | None:
        """Sizes of the model, read without its weights; None if they cannot be."""
        if self.model == TOY:
            return from_hf_config(self.toy.hf_config)
        return None if self.model is None else read_decoder_config(self.model)

    @property
    def trained_models(self) -> int:
        """Models of this size that the run trains, with an optimizer state each."""
        return 0

    @property
    def has_reference(self) -> bool:
        """Whether a reference policy is kept."""
        return False

    @property
    def has_sampler(self) -> bool:
        """Whether completions are sampled."""
        return False

    def check(self) -> None:
        """Check what needs the devices or the user's modules, before the run's folder is made.

        Raises:
            ValueError: the devices do not suit the settings, or a function that they name does not exist.
        """
        check_remat(self.remat, self.mesh.build().devices.flat[0])

    def check_lora(self, lora: LoRA) -> None:
        """Check that adapters fit the toy model, before it is trained; a checkpoint is checked before it is read.

        Raises:
            ValueError: they do not fit, as ``LoRA.check``.
        """
        if lora.is_used and self.model == TOY:
            lora.check(from_hf_config(self.toy.hf_config))

    def check_offload(self, offload: Sequence[str]) -> None:
        """Check that there is what is to be offloaded, and memory for it.

        Args:
            offload: as in ``train.init_state``.

        Raises:
            ValueError: the run has no reference policy, or its devices have no memory of the host's.
        """
        if "reference" in offload and not self.has_reference:
            raise ValueError("offload is reference, but the run has no reference policy (its KL coefficient is 0)")
        if offload:
            device = self.mesh.build().devices.flat[0]
            check_host_memory(device, f"offload is {' '.join(offload)}", "leave it out")

    def check_positions(self, length: int, name: str) -> None:
        """Check, before any weights are loaded, that the model has a position for every token.

        Args:
            length: in tokens.
            name: the setting that gives the length.

        Raises:
            ValueError: it does not.
        """
        check_positions(length, self.positions, name)

    @property
    def compute_dtype(self):
        """The dtype in effect."""
        automatic = "float32" if platform() == "cpu" else "bfloat16"
        return jnp.dtype(automatic if self.dtype == "auto" else self.dtype).type


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(ModelConfig):
    """The policy: a model to sample from."""

    max_prompt_length: int | None = None
    """Longest prompt in tokens. Default: 512, or less where the model has fewer positions."""
    max_completion_length: int | None = None
    """Longest completion in tokens. Default: 1024, or less where the model has fewer positions."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, in addition to the model's own, such as '<|im_end|>'."""
    sampling: Sampling = Sampling()
    """Sampling parameters. The temperature also applies to every log-probability of the policy."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Precision of the KV cache; coarser saves memory and opens a gap between sampler and trainer, which
    --importance-cap corrects. Default: the precision of the computation."""
    cache_bytes: int | None = None
    """Memory limit of the KV cache in bytes, over all devices; prompts that do not fit wait. Default: a fifth of the
    device memory on a GPU or TPU, no limit on a CPU."""

    def __post_init__(self):
        require_at_least(self, max_prompt_length=1, max_completion_length=1, cache_bytes=1)
        self.check_positions(self.prompt_length + self.completion_length, PROMPT_AND_COMPLETION)

    @property
    def lengths(self) -> tuple[int, int]:
        """The prompt and completion lengths in effect."""
        return fitting_lengths(self, self.max_prompt_length, self.max_completion_length)

    @property
    def prompt_length(self) -> int:
        """The prompt length in effect."""
        return self.lengths[0]

    @property
    def completion_length(self) -> int:
        """The completion length in effect."""
        return self.lengths[1]

    @property
    def sequence_length(self) -> int:
        """Tokens of the longest sequence."""
        return sum(self.lengths)

    @property
    def has_sampler(self) -> bool:
        """Whether completions are sampled."""
        return True


def fitting_lengths(config: ModelConfig, prompt: int | None, completion: int | None) -> tuple[int, int]:
    """The prompt and completion lengths in effect, in tokens.

    Lengths that are not set are 512 and 1024. If the model has fewer positions than that, lengths that are not set
    share the remaining positions, a third of them for the prompt.

    Args:
        config: the model.
        prompt: ``max_prompt_length``; None for the default.
        completion: ``max_completion_length``; None for the default.
    """
    wanted = prompt or PROMPT_LENGTH, completion or COMPLETION_LENGTH
    positions = config.positions if prompt is None or completion is None else None
    if positions is None or sum(wanted) <= positions or (prompt or completion or 1) >= positions:
        return wanted  # a length that leaves no position for the other is refused by its own value
    if prompt is not None:
        return prompt, positions - prompt
    if completion is not None:
        return positions - completion, completion
    return positions // 3 or 1, positions - (positions // 3 or 1)


def check_positions(length: int, positions: int | None, name: str) -> None:
    """Check that there is a position for every token.

    Args:
        length: in tokens.
        positions: of the model; None if unlimited.
        name: the setting, or the sum of settings, that gives the length.

    Raises:
        ValueError: there are too few.
    """
    if positions is not None and length > positions:
        lower = "lower one of them" if "+" in name else "lower it"
        raise ValueError(f"{name} is {length}, and the model has {positions} positions; {lower}")

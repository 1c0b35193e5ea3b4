"""The presets of all scripts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo_jax.config import dpo, evaluation, grpo, ppo, rejection_sampling, reward_model, sft
from grpo_jax.config.run import Preset

SCRIPTS: Mapping[str, Mapping[str, Preset[Any]]] = {
    "dpo": dpo.PRESETS,
    "evaluate": evaluation.PRESETS,
    "grpo": grpo.PRESETS,
    "ppo": ppo.PRESETS,
    "rejection_sampling": rejection_sampling.PRESETS,
    "reward_model": reward_model.PRESETS,
    "sft": sft.PRESETS,
}


def preset(script: str, name: str = "toy") -> Any:
    """The configuration of a preset.

    Args:
        script: file name of the script, without suffix.
        name: of the preset.

    Raises:
        KeyError: there is no such script or preset.
    """
    return SCRIPTS[script][name].config()

"""Configuration of the toy model and of its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo_jax.tasks.sums import PLAIN, VOCABULARY

TOY = "toy"
"""Name of the toy model as a model source."""
TOY_FOLDER = "toy_model"
"""The folder of the toy model within a run's folder."""
MAX_PROMPT_LENGTH = 12
MAX_COMPLETION_LENGTH = 48

HF_CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32,  # a multiple of 8, so that it divides over a mesh
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "pad_token_id": VOCABULARY.index("<pad>"),
    "eos_token_id": VOCABULARY.index("<eos>"),
    "dtype": "float32",
}
"""``config.json`` of the default toy model; ``ToyConfig.hf_config`` is that of a given configuration."""
ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    "dense": {},
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
    "hybrid": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "full_attention_interval": 2,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 24,
    },
}
"""Fields in which the toy models differ."""
PROMPT_FORMAT: Mapping[str, str] = {"kind": "plain", "template": PLAIN}
"""The question without a template, as in the corpus."""


@dataclass(frozen=True)
class ToyConfig:
    """Configuration of the toy model and its training."""

    seed: int = 0
    """Seed of the weights and the corpus."""
    min_terms: int = 4
    """Smallest number of terms of a sum."""
    max_terms: int = 6
    """Largest number of terms of a sum."""
    batch_size: int = 64
    """Examples per update."""
    skill_steps: int = 450
    """Updates on the first part of the corpus."""
    skill_share: float = 0.9
    """Fraction of worked sums (and of best replies to errands) in the first part; the rest are guesses."""
    mixture_steps: int = 40
    """Updates on the second part."""
    worked_share: float = 0.12
    """Fraction of worked sums in the second part, and roughly how often the model will think."""
    chinese_share: float = 0.0
    """Fraction of the worked sums whose thoughts have Chinese digits."""
    errand_share: float = 0.0
    """Fraction of errands in the corpus. Their replies in the second part are careless ones."""
    learning_rate: float = 4e-3
    """Peak learning rate, with linear decay to 0."""
    hidden_size: int = HF_CONFIG["hidden_size"]
    """Width of the model; feed-forward layers are twice as wide."""
    num_layers: int = HF_CONFIG["num_hidden_layers"]
    """Number of layers."""
    architecture: Literal["dense", "experts", "hybrid"] = "dense"
    """dense; experts, 8 in each layer, of which a token uses 2, together as wide as a dense layer; or hybrid, with
    a gated delta rule in place of attention in every other layer."""

    def __post_init__(self):
        for name in ("hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of the model."""
        fields = {
            **HF_CONFIG,
            **ARCHITECTURES[self.architecture],
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
        }
        return fields | ({"moe_intermediate_size": self.hidden_size} if self.architecture == "experts" else {})

    @property
    def steps(self) -> int:
        """Total number of updates."""
        return self.skill_steps + self.mixture_steps

"""Settings of LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from grpo_jax.models.config import DecoderConfig, LayerKind


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: ``x W + (alpha / rank) x A B``, with W frozen and A and B trained.

    After Hu et al. (arXiv 2106.09685); with ``quantize``, QLoRA of Dettmers et al. (arXiv 2305.14314).
    """

    rank: int | None = None
    """Rank of the LoRA adapters, which are trained in place of the model; usual learning rates are 10 times those of
    full training. Default: train the whole model."""
    alpha: Annotated[float, tyro.conf.Suppress] = 32.0
    """Scale of the adapters, which are multiplied by alpha / rank."""
    targets: Annotated[tuple[str, ...], tyro.conf.Suppress] = ("(attention|delta)/(q|k|v|z|o)", "mlp/(gate|up|down)")
    """Regular expressions of the matrices that get adapters, in every layer."""
    quantize: Annotated[Literal["int8", "int4", "nf4"] | None, tyro.conf.Suppress] = None
    """Store the frozen matrices that have adapters in this type (QLoRA). Default: in the precision of the
    computation."""

    def __post_init__(self):
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; it must be at least 1; leave it out to train the whole model")
        if not self.alpha > 0:
            raise ValueError(f"lora.alpha is {self.alpha}; it must be above 0")
        if not self.targets:
            raise ValueError("lora.targets is empty; name at least one matrix, such as attention/q")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"lora.targets: {pattern!r} is not a regular expression: {error}") from error

    @property
    def is_used(self) -> bool:
        """Whether there are adapters.

        Raises:
            ValueError: another field is set without a rank. (Not when the object is made: flags are set one by one.)
        """
        for field in fields(self) if self.rank is None else ():
            value = getattr(self, field.name)
            if value != field.default:
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise ValueError(f"lora.{field.name} is {shown}, but lora.rank is not set; set it, too")
        return self.rank is not None

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / (self.rank or 1)

    def check(self, config: DecoderConfig) -> None:
        """Check that the adapters fit a model.

        Raises:
            ValueError: a target matches no matrix, or the rank exceeds the smaller side of a matrix.
        """
        self.matrices(config)

    def size(self, config: DecoderConfig) -> int:
        """Number of parameters of all adapters of a model.

        Raises:
            ValueError: as ``check``.
        """
        return (self.rank or 0) * sum(sum(map(sum, self.matrices(config, kind).values())) for kind in config.kinds)

    def matrices(self, config: DecoderConfig, kind: LayerKind | None = None) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices of a layer that get adapters, by their path such as ``attention/q``.

        Args:
            config: of the decoder.
            kind: of the layer; None for the matrices of layers of all kinds.

        Raises:
            ValueError: as ``check``.
        """
        known = linear_sizes(config)
        for pattern in self.targets:
            if not any(re.fullmatch(pattern, path) for path in known):
                raise ValueError(f"lora.targets: {pattern!r} matches none of the matrices {', '.join(known)}")
        chosen = {path: sizes for path, sizes in known.items() if _matches(self.targets, path)}
        for path, (inputs, outputs) in chosen.items():
            if self.rank is not None and self.rank > min(inputs, outputs):
                raise ValueError(
                    f"lora.rank is {self.rank}; it must be at most {min(inputs, outputs)}, the smaller side of "
                    f"{path} ({inputs} x {outputs})"
                )
        return chosen if kind is None else {path: chosen[path] for path in linear_sizes(config, kind) if path in chosen}


def linear_sizes(config: DecoderConfig, kind: LayerKind | None = None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the matrices of a layer, by their path.

    Args:
        config: of the decoder.
        kind: of the layer; None for the matrices of layers of all kinds.
    """
    if kind is None:
        return {path: size for kind in dict.fromkeys(config.kinds) for path, size in linear_sizes(config, kind).items()}
    D, F, sizes = config.hidden_size, config.intermediate_size, {}
    if kind.mixer == "attention":
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        sizes |= {"attention/q": (D, queries), "attention/k": (D, keys), "attention/v": (D, keys)}
        sizes |= {"attention/out_gate": (D, queries)} if config.attention_gate else {}
        sizes |= {"attention/o": (queries, D)}
    elif config.delta is not None:
        d = config.delta
        keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
        outputs = {"q": keys, "k": keys, "v": values, "z": values, "a": d.value_heads, "b": d.value_heads}
        sizes |= {f"delta/{name}": (D, size) for name, size in outputs.items()} | {"delta/o": (values, D)}
    return sizes | {"mlp/gate": (D, F), "mlp/up": (D, F), "mlp/down": (F, D)}


def _matches(patterns: Sequence[str], path: str) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)

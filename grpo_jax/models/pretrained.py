"""A loaded checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.lora_config import LoRA
from grpo_jax.types import Model, Params


@dataclass(frozen=True)
class Pretrained:
    """A model and the other contents of its checkpoint.

    Attributes:
        model: the decoder's pure functions.
        params: parameters of ``model``.
        config: sizes and switches of the decoder.
        hf_config: contents of ``config.json``.
        generation_config: contents of ``generation_config.json``; None if there is none.
        tokenizer: a transformers tokenizer, as returned by ``tokenizers.read_tokenizer``; None if there is none.
        eos_ids: token ids that end a sequence: those of ``generation_config``, of ``hf_config`` and of the tokenizer;
            ids outside the vocabulary are ignored.
        pad_id: the tokenizer's pad id, else that of ``generation_config`` or ``hf_config``, else the first of
            ``eos_ids``; ids outside the vocabulary are ignored. It may be an EOS id: no mask is derived from it.
        prompt_format: contents of ``prompt_format.json``, the prompt format of training; None if there is none.
        source: the folder or hub id it was loaded from.
        lora: the adapters that ``params`` have; None if there are none.
    """

    model: Model
    params: Params
    config: DecoderConfig
    hf_config: dict[str, Any]
    generation_config: dict[str, Any] | None
    tokenizer: Any | None
    eos_ids: tuple[int, ...]
    pad_id: int
    prompt_format: dict[str, Any] | None = None
    source: str = ""
    lora: LoRA | None = None

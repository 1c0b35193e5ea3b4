"""Model FLOPs of training, for MFU."""

from __future__ import annotations

from functools import cache

import jax
import numpy as np

from grpo_jax.models.config import DecoderConfig
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.parameters import param_shapes


def training_flops(
    config: DecoderConfig,
    prompt_lengths: np.ndarray | int,
    completion_lengths: np.ndarray,
    *,
    group_size: int = 1,
    lora: LoRA | None = None,
) -> float:
    """Floating-point operations of one forward and backward pass over sequences.

        6 (N tokens + V D completion_tokens) + 12 heads head_dim pairs + 18 value_heads key_dim value_dim delta_tokens

    N is the number of parameters without the input and output embeddings, ``pairs`` the number of (query, key) pairs
    of causal attention, summed over sequences and layers (a sliding window limits them), and the output embedding
    ``[V, D]`` is multiplied with completion tokens only; a model with a scalar head has none. ``delta_tokens`` are the
    tokens of all layers with the gated delta rule, each of which reads a state twice and updates it. As in PaLM
    (https://arxiv.org/abs/2204.02311, appendix B), operations that are repeated for rematerialization are not counted,
    nor are padding, masked pairs and the optimizer.

    Args:
        config: sizes of the model.
        prompt_lengths: ``[...]``, tokens of each sequence whose next token is not predicted.
        completion_lengths: ``[...]``, the other tokens of each sequence.
        group_size: of adjacent sequences ``[N * G]`` of one prompt which, but for its last token, is computed once for
            all of them; 1 if it is computed for each.
        lora: adapters, with which the frozen weights have no gradient, so that 4 takes the place of 6, and
            ``6 N_adapters tokens`` are added.

    Raises:
        ValueError: the adapters do not fit the model, as ``LoRA.check``.
    """
    if group_size > 1:
        again = np.repeat(np.asarray(prompt_lengths)[::group_size] - 1, group_size - 1)
        repeated = training_flops(config, again, np.zeros(1, int), lora=lora)
        return training_flops(config, prompt_lengths, completion_lengths, lora=lora) - repeated
    lengths = np.asarray(prompt_lengths + completion_lengths, float)
    head = 0 if config.scalar_head else config.vocab_size * config.hidden_size
    pairs = 0.0
    for window in (kind.window for kind in config.kinds if kind.mixer == "attention"):
        reach = lengths if window is None else np.minimum(lengths, window)
        pairs += (reach * (reach + 1) / 2 + (lengths - reach) * reach).sum()
    factor, adapters = (6, 0) if lora is None or not lora.is_used else (4, lora.size(config))
    weights = factor * (_body_size(config) * lengths.sum() + head * np.sum(completion_lengths))
    weights += 6 * adapters * lengths.sum()
    return float(weights + 12 * config.num_heads * config.head_dim * pairs + _delta_flops(config) * lengths.sum())


def _delta_flops(config: DecoderConfig) -> int:
    """Operations of a token on the states of all layers with the gated delta rule, forward and backward."""
    if config.delta is None:
        return 0
    layers = config.num_layers - config.num_attention_layers
    return 18 * layers * config.delta.value_heads * config.delta.key_dim * config.delta.value_dim


@cache
def _body_size(config: DecoderConfig) -> int:
    tables = 1 if config.tie_word_embeddings or config.scalar_head else 2
    size = sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))
    return size - tables * config.vocab_size * config.hidden_size

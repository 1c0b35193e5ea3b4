"""Routing of mixtures of experts: the choice of experts, their weights, auxiliary losses and loads.

Shapes: any number of token axes, E experts, k chosen ones for each token. Everything is computed in float32.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scoring = Literal["softmax", "sigmoid"]


def route(
    logits: Float[Array, "*tokens E"],
    k: int,
    *,
    scoring: Scoring = "softmax",
    normalize: bool = True,
    scale: float = 1.0,
    bias: Float[Array, " E"] | None = None,
    groups: int = 1,
    kept_groups: int = 1,
    group_best: int = 2,
    chosen: Int[Array, "*tokens k"] | None = None,
) -> tuple[Int[Array, "*tokens k"], Float[Array, "*tokens k"]]:
    """The ``k`` experts of each token, best first, and their weights.

    With scores ``s = softmax(logits)`` or ``sigmoid(logits)``, the experts are the ``k`` largest of ``s + bias``, and
    the weights ``scale * s``, divided by their sum over the ``k`` if ``normalize``. So a normalized softmax is the
    softmax of the chosen logits. Gradients reach the logits through the weights; the choice and ``bias`` have none.

    Mixtral (https://arxiv.org/abs/2401.04088), Qwen3-MoE and gpt-oss: softmax, normalized. OLMoE
    (https://arxiv.org/abs/2409.02060): softmax, not normalized. DeepSeek-V3 (https://arxiv.org/abs/2412.19437,
    equations 12 to 16), GLM-4.5, Kimi K2, MiniMax M2: sigmoid, normalized, with a bias, some with groups and a scale.

    Args:
        logits: of the router.
        k: experts of each token.
        scoring: function from logits to scores.
        normalize: whether the weights of a token add up to ``scale``.
        scale: factor of the weights (``routed_scaling_factor``).
        bias: added to the scores for the choice only (``e_score_correction_bias``).
        groups: equal groups of consecutive experts (``n_group``).
        kept_groups: a token's experts are of this many groups (``topk_group``), those with the largest sum of their
            ``group_best`` largest ``s + bias``.
        group_best: scores that make a group's; 2 in DeepSeek-V3, 1 in V2.
        chosen: experts recorded earlier, to be used instead (router replay, https://arxiv.org/abs/2510.11370). Weights
            are computed from ``logits`` all the same. A token with a negative entry has no record and chooses anew.

    Raises:
        ValueError: ``k``, ``groups`` or ``kept_groups`` do not fit the number of experts.
    """
    num_experts = logits.shape[-1]
    size, rest = divmod(num_experts, groups)
    if rest:
        raise ValueError(f"{num_experts} experts do not divide into {groups} equal groups")
    if not 1 <= kept_groups <= groups:
        raise ValueError(f"kept_groups is {kept_groups}; it must be from 1 to groups = {groups}")
    if not 1 <= k <= kept_groups * size:
        raise ValueError(f"{k} experts of each token, but {kept_groups * size} to choose from")
    logits = logits.astype(jnp.float32)
    # Softmax keeps the order of logits, and rounds some that differ to one probability.
    scores = jax.nn.sigmoid(logits) if scoring == "sigmoid" else logits
    if scoring == "softmax" and (bias is not None or groups > 1):
        scores = jax.nn.softmax(logits)
    wanted = jax.lax.stop_gradient(scores)
    if bias is not None:
        bias = jax.lax.stop_gradient(bias).astype(jnp.float32)
        wanted = wanted + bias.reshape((1,) * (wanted.ndim - 1) + bias.shape)
    if kept_groups < groups:
        parts = wanted.reshape(*wanted.shape[:-1], groups, size)
        best = jax.lax.top_k(parts, min(group_best, size))[0].sum(-1)
        kept = jax.nn.one_hot(jax.lax.top_k(best, kept_groups)[1], groups, dtype=bool).any(-2)
        wanted = jnp.where(kept[..., None], parts, -jnp.inf).reshape(wanted.shape)
    experts = jax.lax.top_k(wanted, k)[1]
    if chosen is not None:
        experts = jnp.where((chosen >= 0).all(-1, keepdims=True), chosen, experts)
    if scoring == "softmax":
        at_chosen = jnp.take_along_axis(logits, experts, axis=-1)
        total = jax.nn.logsumexp(at_chosen if normalize else logits, axis=-1, keepdims=True)
        return experts, scale * jnp.exp(at_chosen - total)
    weights = jnp.take_along_axis(scores, experts, axis=-1)
    if normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return experts, scale * weights


def expert_load(
    experts: Int[Array, "*tokens k"], num_experts: int, mask: Bool[Array, "*tokens"] | None = None
) -> Float[Array, " E"]:
    """Number of choices of each expert, as float32. Loads of parts of a batch add up to that of the batch.

    Args:
        experts: chosen for each token.
        num_experts: E.
        mask: True at tokens that count; None for all.
    """
    counted = jnp.ones(experts.shape[:-1], bool) if mask is None else mask
    counts = jnp.zeros(num_experts, jnp.int32)
    counts = counts.at[experts.reshape(-1)].add(jnp.repeat(counted.reshape(-1), experts.shape[-1]).astype(jnp.int32))
    return counts.astype(jnp.float32)


def load_balancing_terms(
    logits: Float[Array, "*tokens E"], load: Float[Array, "*#tokens E"], *, scoring: Scoring = "softmax"
) -> Float[Array, "*tokens"]:
    """The terms, of which the mean over tokens is the load-balancing loss: ``E * sum_e f_e * p_e``.

    ``p`` are the token's scores, divided by their sum, and ``f`` the share of each expert in ``load``, without a
    gradient. The mean is 1 if the loads are equal. With the load of the same tokens it is the loss of the Switch
    Transformer (https://arxiv.org/abs/2101.03961, equations 4 to 6), ``E * sum_e f_e * mean(p_e)``, divided by the
    number of experts of a token.

    That loss is a product of two means, so that the mean of the losses of a batch's parts is not the loss of the batch.
    As a mean over tokens with a given ``load`` it can be split in any way: over micro-batches, devices and packed rows.
    The load may be that of the whole batch (https://arxiv.org/abs/2501.11873), which is known before the forward pass
    if choices are replayed, that of the batch before, or that of each token's own sequence, by ``sequence_load``.

    Args:
        logits: of the router.
        load: choices of each expert, ``[E]`` or for each token; on any scale.
        scoring: as in ``route``.
    """
    logits = logits.astype(jnp.float32)
    if scoring == "softmax":
        scores = jax.nn.softmax(logits)
    else:
        scores = jax.nn.sigmoid(logits)
        scores = scores / (scores.sum(-1, keepdims=True) + 1e-20)
    load = jax.lax.stop_gradient(load).reshape((1,) * (logits.ndim - load.ndim) + load.shape)
    shares = load / jnp.maximum(load.sum(-1, keepdims=True), 1e-20)
    return logits.shape[-1] * (shares * scores).sum(-1)


def sequence_load(
    experts: Int[Array, "B S k"],
    num_experts: int,
    mask: Bool[Array, "B S"],
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S E"]:
    """For each token, the load of the tokens that count in its own sequence.

    With it, ``load_balancing_terms`` are those of DeepSeek-V3's sequence-wise loss (https://arxiv.org/abs/2412.19437,
    equations 17 to 20), weighted by the lengths of sequences.

    Args:
        experts: chosen for each token.
        num_experts: E.
        mask: True at tokens that count. For one result whether prompts are shared or not, those of completions.
        segment_ids: of sequences packed into rows, as in ``packed.Segments``; None if each row is one sequence.
    """
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(-2)
    counted = jnp.where(mask[..., None], chosen, 0)
    if segment_ids is None:
        return jnp.broadcast_to(counted.sum(1, keepdims=True), counted.shape)
    is_same = (segment_ids[:, :, None] == segment_ids[:, None]).astype(jnp.float32)
    return jnp.einsum("bst,bte->bse", is_same, counted)


def router_z_terms(logits: Float[Array, "*tokens E"]) -> Float[Array, "*tokens"]:
    """The terms, of which the mean over tokens is the router z-loss: ``logsumexp(logits) ** 2``.

    ST-MoE (https://arxiv.org/abs/2202.08906), equation 5.

    Args:
        logits: of the router.
    """
    return jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2

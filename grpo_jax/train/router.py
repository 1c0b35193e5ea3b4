"""Losses of a router beside that of the policy, for each token that predicts another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.routing import load_balancing_terms, router_z_terms, sequence_load
from grpo_jax.types import Routing


@dataclass(frozen=True)
class RouterLosses:
    """Coefficients of the losses of a mixture's router; 0 leaves a loss out of the program.

    Attributes:
        balance: of the load-balancing loss of each sequence (https://arxiv.org/abs/2412.19437, equations 17 to 20).
        z: of the z-loss (https://arxiv.org/abs/2202.08906, equation 5).
    """

    balance: float = 0.0
    z: float = 0.0

    @property
    def are_used(self) -> bool:
        """Whether there are any."""
        return bool(self.balance or self.z)


class RouterTerms(NamedTuple):
    """A router's losses for each token, averaged over layers; a loss is the mean over tokens.

    Attributes:
        balance: as of ``routing.load_balancing_terms``, with the load of the token's own completion.
        z: as of ``routing.router_z_terms``.
    """

    balance: Float[Array, "B S"]
    z: Float[Array, "B S"]


def router_terms(
    routing: Routing, routed: Any, counts: Bool[Array, "B S"], segment_ids: Int[Array, "B S"] | None
) -> RouterTerms:
    """The terms of each token of a call.

    Args:
        routing: of the model.
        routed: third result of ``Routing.apply``, with logits.
        counts: True at the tokens whose load and losses count, such as those that predict completion tokens.
        segment_ids: of sequences packed into rows; None if each row is one sequence.
    """

    def of_layer(experts: Int[Array, "B S k"], logits: Float[Array, "B S E"]) -> RouterTerms:
        load = sequence_load(experts, routing.num_experts, counts, segment_ids)
        balance = load_balancing_terms(logits, load, scoring=routing.scoring)  # pyright: ignore[reportArgumentType]
        return RouterTerms(balance, router_z_terms(logits))

    of_layers = jax.vmap(of_layer, in_axes=2)(routed.experts, routed.logits)
    return jax.tree.map(lambda x: jnp.mean(x, axis=0), of_layers)

"""Pytrees of packed rows, in which sequences stand one after the other; names of ``types``."""

from __future__ import annotations

from typing import Literal, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen ``chex.dataclass`` that is constructed with positional or keyword arguments.

    JAX rebuilds it without the constructor, so that a tree of shardings, of ``ShapeDtypeStruct`` or of stacked arrays
    has the same class. (A decorator of its own because pyright does not see through that of chex.)
    """
    return chex.dataclass(cls, frozen=True, mappable_dataclass=False)  # pyright: ignore[reportReturnType]


@pytree
class Segments:
    """The attention mask of packed rows in which several segments continue the same one, such as a group's prompt.

    A token attends to tokens up to itself in its own segment and in the segment that its own continues.

    Attributes:
        ids: number of each token's segment within its row, from 1; 0 in padding.
        prefix_ids: number of the segment that each token's own continues; 0 if it continues none.
        positions: position of each token in its sequence, from 0, in which sliding windows are measured.
    """

    ids: Int[Array, "B S"]
    prefix_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]


Packing = Literal["shared", "separate"]
"""How completions are packed into rows: a prompt once for several completions of its group, or for each completion."""


@pytree
class PackedRows:
    """Prompts and completions packed into rows: the tokens that completion tokens are predicted from.

    The last token of a completion predicts nothing and is left out. Where a prompt is shared, its last token is
    repeated as the first of each completion's segment, so that every completion token has a place that predicts it.

    Attributes:
        token_ids: the tokens of each row, then padding.
        segment_ids: number of each token's segment within its row, from 1; 0 in padding.
        prefix_ids: as in ``Segments``; None if no prompt is shared.
        positions: position of each token in its sequence, from 0.
        target_columns: columns that predict completion tokens, in ascending order, then zeros.
        target_ids: the completion token that each of these columns predicts, then zeros.
        target_mask: True at these, then False.
        sequence_index: number of each of a row's at most K sequences in the batch; -1 at unused places.
        starts: place in ``target_ids`` of the first completion token of each sequence.
        experts: of each token, as in ``types.Rollout``; None if not recorded.
    """

    token_ids: Int[Array, "*N R S"]
    segment_ids: Int[Array, "*N R S"]
    prefix_ids: Int[Array, "*N R S"] | None
    positions: Int[Array, "*N R S"]
    target_columns: Int[Array, "*N R S"]
    target_ids: Int[Array, "*N R S"]
    target_mask: Bool[Array, "*N R S"]
    sequence_index: Int[Array, "*N R K"]
    starts: Int[Array, "*N R K"]
    experts: Int[Array, "*N R S L k"] | None = None

    def predicting(self, hidden: Float[Array, "R S D"]) -> Float[Array, "R S D"]:
        """The hidden states at ``target_columns``."""
        return jnp.take_along_axis(hidden, self.target_columns[:, :, None], axis=1, mode="promise_in_bounds")

    def by_column(self) -> tuple[Int[Array, "R S"], Bool[Array, "R S"]]:
        """The completion token that each column predicts, and True at columns that predict one."""

        def row(columns, mask, ids):
            places = jnp.where(mask, columns, len(columns))  # dropped, where nothing is predicted
            return jnp.zeros_like(ids).at[places].set(ids, mode="drop"), jnp.zeros_like(mask).at[places].set(
                True, mode="drop"
            )

        return jax.vmap(row)(self.target_columns, self.target_mask, self.target_ids)

    @property
    def attention_mask(self) -> Int[Array, "R S"] | Segments:
        """The rows' mask for ``Model.apply``."""
        if self.prefix_ids is None:
            return self.segment_ids
        return Segments(self.segment_ids, self.prefix_ids, self.positions)


@pytree
class Packed:
    """Sequences packed into rows, for supervised fine-tuning.

    Attributes:
        token_ids: the concatenated sequences of each row, then padding.
        segment_ids: number of each token's sequence within its row, from 1; 0 in padding.
        positions: position of each token in its sequence, from 0.
        loss_mask: True at the tokens that the loss includes; never at the first token of a sequence.
    """

    token_ids: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    positions: Int[Array, "B S"]
    loss_mask: Bool[Array, "B S"]

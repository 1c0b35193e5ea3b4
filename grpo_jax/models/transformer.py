"""The decoder: from a config to the pure functions of ``types.Model``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.attention import AttentionInputs, KVSegment, attention_mask, is_packed_mask
from grpo_jax.models.block import Block
from grpo_jax.models.checks import check_call, check_dtype
from grpo_jax.models.config import DecoderConfig, LayerKind
from grpo_jax.models.context import ContextAttention, dealt_out, over_context
from grpo_jax.models.delta_layer import init_states
from grpo_jax.models.expert_layer import Routed, RoutingInputs
from grpo_jax.models.head_layout import head_layout
from grpo_jax.models.kernels import AttentionName, Kernel, choose_kernel, takes_segments
from grpo_jax.models.kv_cache import (
    CacheEntry,
    columns_by_window,
    first_columns,
    init_cache,
    join_columns,
)
from grpo_jax.models.layers import Embedding, Norm, ScalarHead
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.mesh_checks import check_mesh
from grpo_jax.models.output_head import make_token_scores
from grpo_jax.models.preparation import STACKED, constrain_params, find_repetition, num_stacked, preparation
from grpo_jax.models.remat import Remat, check_remat, remat_policy
from grpo_jax.models.rope import Rotation, rotation
from grpo_jax.models.sizes import attention_length
from grpo_jax.sharding import TOKENS, constrain
from grpo_jax.types import Cache, Model, Packing, Params, PrefixCache, Routing, Segments

Rotations = dict[int, Rotation]
"""The rotation of each distinct ``Rope``, by the first layer that has it."""


def _compute_rotations(config: DecoderConfig, positions: Int[Array, "B S"]) -> Rotations:
    """Rotary cosines and sines of every distinct ``Rope`` of the layers."""
    ropes = {rope: config.ropes.index(rope) for rope in config.ropes if rope is not None}
    return {layer: rotation(rope, config.rotary_dim, positions) for rope, layer in ropes.items()}


class Decoder(nn.Module):
    """Embedding, blocks and final norm. Logits are computed outside: the output embedding is only declared here.

    The modules' initializers determine shapes only; values come from ``init_params`` or a checkpoint.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: Remat = "none"
    kernel: Kernel | None = None
    mesh: Mesh | None = None

    def setup(self) -> None:
        """Declare the parameters."""
        c = self.config
        block = Block if self.remat == "none" else nn.remat(Block, policy=remat_policy(self.remat))
        self.embed = Embedding(c.vocab_size, c.hidden_size, self.param_dtype, self.mesh)
        self.layers = [block(**self._settings(kind)) for kind in c.kinds]
        self.final_norm = Norm(c.norm_epsilon, c.norm_offset, self.param_dtype, self.mesh, c.norm)
        if c.scalar_head:
            self.score = ScalarHead(c.hidden_size, self.param_dtype)
        elif not c.tie_word_embeddings:
            self.lm_head = Embedding(c.vocab_size, c.hidden_size, self.param_dtype)

    def _settings(self, kind: LayerKind) -> dict[str, Any]:
        """Arguments of a layer's ``Block``."""
        kernel = self.kernel and partial(self.kernel, window=kind.window)
        shared = {"config": self.config, "dtype": self.dtype, "param_dtype": self.param_dtype, "mesh": self.mesh}
        return {**shared, "kind": kind, "kernel": kernel}

    def __call__(
        self,
        token_ids: Int[Array, "B S"],
        rotations: Rotations,
        mask: Bool[Array, "B C"] | Int[Array, "B C"] | Segments | None,
        cache: list[CacheEntry] | None,
        start: int | Int[Array, ""],
        prefixes: Sequence[PrefixCache] = (),
        block_bounds: Sequence[int] = (),
        chosen: Int[Array, "B S L k"] | None = None,
        with_logits: bool = False,
        stacked: Sequence[Params] = (),
    ) -> tuple[Float[Array, "B S D"], list[CacheEntry] | None, Routed | None]:
        """Hidden states, cache and routing; arguments as in ``Routing.apply``, with rotations as positions.

        Stacked layers of prepared parameters are an argument of their own.
        """
        c = self.config
        S = token_ids.shape[1]
        own_columns = {} if cache is None else columns_by_window(c.windows, cache)
        prefix_columns = [columns_by_window(c.windows, prefix.cache) for prefix in prefixes]
        x = self.embed(token_ids, self.dtype) * jnp.asarray(c.embedding_scale, self.dtype)
        x = constrain(x, self.mesh, TOKENS)
        slots = start + jnp.arange(S)
        kernel_mask = None
        is_alone = S > 1 and isinstance(start, int) and start == 0 and not prefixes
        fits = (
            not isinstance(mask, Segments) or takes_segments(self.kernel) or isinstance(self.kernel, ContextAttention)
        )
        if self.kernel is not None and is_alone and fits:
            all_tokens = jnp.ones(token_ids.shape, bool)
            kernel_mask = all_tokens if mask is None else mask if isinstance(mask, Segments) else mask[:, :S]
        is_packed = kernel_mask is None and cache is None and is_packed_mask(mask)
        masks, prefix_masks, packed_masks = {}, {}, {}
        # Several tokens are in consecutive columns, which a ring cache has for them only if it is empty.
        length = start + 1 if cache is not None and S == 1 else None
        for window in set(c.windows):
            columns = own_columns.get(window, S)
            masks[window], prefix_masks[window], packed_masks[window] = [], [], None
            if is_packed:
                packed_masks[window] = attention_mask(mask, slots, 0, columns, window)
            if kernel_mask is not None or is_packed:
                continue
            own_mask = attention_mask(mask, slots, 0, columns, window, length)
            masks[window] = jnp.split(own_mask, block_bounds, axis=2)
            prefix_masks[window] = [
                attention_mask(prefix.mask, slots, prefix.start, of_prefix[window], window, prefix.length)
                for prefix, of_prefix in zip(prefixes, prefix_columns, strict=True)
            ]

        token_mask = mask  # of the call's own tokens
        if cache is not None and mask is not None and not isinstance(mask, Segments):
            token_mask = jax.lax.dynamic_slice_in_dim(mask, start, S, axis=1)

        def inputs_of(i: int) -> AttentionInputs:
            if c.kinds[i].mixer == "delta_rule":
                return AttentionInputs(None, start, [], [], token_mask=token_mask)
            window = c.windows[i]
            segments = [
                KVSegment(prefix.cache[i], prefix_mask, prefix.gather_index, prefix.scatter_index)
                for prefix, prefix_mask in zip(prefixes, prefix_masks[window], strict=True)
            ]
            rotation = rotations.get(c.ropes.index(c.ropes[i]))
            return AttentionInputs(rotation, start, masks[window], segments, packed_masks[window], kernel_mask)

        routing = RoutingInputs(self._computed(token_mask), None, with_logits)
        entries, routed, first = [], [], num_stacked({STACKED: stacked})
        if stacked:
            inputs = [inputs_of(i) for i in range(len(stacked))]
            x, routed = self._scan(x, stacked, inputs, cache, routing, chosen)
        for i in range(first, c.num_layers):
            own = routing
            if chosen is not None and c.kinds[i].sparse:
                own = replace(routing, chosen=chosen[:, :, c.num_sparse(i)])
            x, entry, of_layer = self.layers[i](x, inputs_of(i), None if cache is None else cache[i], own)
            x = constrain(x, self.mesh, TOKENS)
            entries.append(entry)
            routed += [] if of_layer is None else [jax.tree.map(lambda leaf: leaf[:, :, None], of_layer)]
        hidden = self.final_norm(x)
        if c.output_scale != 1:
            hidden = hidden * jnp.asarray(c.output_scale, hidden.dtype)
        of_all = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *routed) if routed else None
        return hidden, None if stacked else entries, of_all

    def _computed(self, token_mask: Array | Segments | None) -> Bool[Array, "B S"] | None:
        """True at the tokens of a call that experts compute; None for all."""
        if self.config.experts is None or token_mask is None:
            return None
        real = token_mask.ids > 0 if isinstance(token_mask, Segments) else token_mask
        real = real if real.dtype == bool else real > 0
        kernel: Any = self.kernel
        return dealt_out(real, kernel.mesh.shape["context"]) if isinstance(kernel, ContextAttention) else real

    def _scan(
        self,
        x: Float[Array, "B S D"],
        stacked: Sequence[Params],
        inputs: Sequence[AttentionInputs],
        like: Sequence[CacheEntry] | None,
        routing: RoutingInputs,
        chosen: Int[Array, "B S L k"] | None,
    ) -> tuple[Float[Array, "B S D"], list[Routed]]:
        """The residual stream after the stacked layers, one repetition of their period after the other, and routing.

        A call at slot 0 overwrites all columns of the cache that it attends to, so that each layer may start from a
        cache of zeros of the given form, and none has to be kept.
        """
        period, count = len(stacked), jax.tree.leaves(stacked)[0].shape[0]
        sparse = self.config.num_sparse(period)

        def by_repetition(x: Int[Array, "B S L k"]) -> Int[Array, "count B S sparse k"]:
            return jnp.moveaxis(x[:, :, : count * sparse].reshape(*x.shape[:2], count, sparse, -1), 2, 0)

        def by_layer(x: Float[Array, "count B S sparse _"] | Int[Array, "count B S sparse _"]) -> Array:
            return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], count * sparse, -1)

        def layer(place: int, params: Params, x: Float[Array, "B S D"], own: RoutingInputs) -> Any:
            block = Block(**self._settings(self.config.kinds[place]), parent=None)
            entry = None if like is None else jax.tree.map(jnp.zeros_like, like[place])
            x, _, of_layer = block.apply({"params": params}, x, inputs[place], entry, own)  # pyright: ignore
            return x, of_layer

        def repetition(x: Float[Array, "B S D"], xs: Any) -> tuple[Float[Array, "B S D"], Any]:
            groups, replayed = xs
            routed = []
            for place, params in enumerate(groups):
                own = routing
                if replayed is not None and self.config.kinds[place].sparse:
                    own = replace(routing, chosen=replayed[:, :, len(routed)])
                apply = partial(layer, place)
                if self.remat != "none":
                    # A loop's body is not merged with its recomputation, so that it needs no barriers against it.
                    apply = jax.checkpoint(apply, prevent_cse=False, policy=remat_policy(self.remat))
                # Constrained here, each layer's gradient is reduced to its shards within the loop.
                params = params if self.mesh is None else constrain_params(params, self.mesh)
                x, of_layer = apply(params, x, own)
                x = constrain(x, self.mesh, TOKENS)
                routed += [] if of_layer is None else [of_layer]
            return x, jax.tree.map(lambda *parts: jnp.stack(parts, axis=2), *routed) if routed else None

        replayed = by_repetition(chosen) if chosen is not None and sparse else None
        x, routed = jax.lax.scan(repetition, x, (tuple(stacked), replayed))
        return x, [] if routed is None else [jax.tree.map(by_layer, routed)]

    def declare(self, token_ids: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> None:
        """Use every parameter, so that ``init`` creates them all.

        Args:
            token_ids, mask: of any sequences.
        """
        self(token_ids, _compute_rotations(self.config, token_ids), mask, None, 0)
        if self.config.scalar_head:
            self.score.weights()
        elif not self.config.tie_word_embeddings:
            self.lm_head.table()


def build_model(
    config: DecoderConfig,
    *,
    dtype: Any = jnp.float32,
    remat: Remat = "none",
    attention: AttentionName = "plain",
    mesh: Mesh | None = None,
    scan_layers: bool | None = None,
    lora: LoRA | None = None,
) -> Model:
    """The pure functions of a decoder, as ``types.Model`` documents them.

    The cache is a list with ``{"keys", "values"}`` for each layer, ``[B, K, head_dim, C]`` and ``[B, K, C, head_dim]``,
    in ``dtype`` unless ``init_cache`` is called with another. Norms, rotations and softmax are computed in float32.

    Args:
        config: sizes and switches of the decoder.
        dtype: of matrix products and the residual stream, float32 or bfloat16. Parameters are cast to it where they are
            used.
        remat: which activations the backward pass recomputes.
        attention: the attention kernel of training and prefill, as in ``kernels.choose_kernel``; decode steps use the
            plain path.
        mesh: mesh that activations are sharded over; None for one device, or to leave their sharding to the compiler,
            which may then give every device a part of every sequence.
        scan_layers: whether prepared parameters (``Model.preparation``) have equal layers stacked, for a ``lax.scan``
            over them: then neither memory for gathered weights nor time to compile grows with their number. None:
            except on a CPU with ``remat`` none, where unrolled layers are faster; a CPU's program of unrolled layers
            that are recomputed takes as much memory as without; and with ``lora`` where weights are not sharded over
            ``fsdp``, since the stacked copy of frozen weights would be their second. If no pattern of layers repeats,
            none is stacked.
        lora: adapters that the parameters have, as of ``lora.add_adapters``; None for a decoder without.

    Raises:
        ValueError: for another ``dtype``, a mesh or a kernel that does not support this model, a ``remat`` that the
            devices do not support, or adapters that do not fit, as ``LoRA.check``; and by ``apply``, at trace time, if
            the mask has another number of columns than the cache (than tokens, without a cache), the call has more
            tokens than the cache has columns, or not the states of the layers with the gated delta rule that it
            continues.
    """
    check_mesh(config, mesh)
    check_dtype(dtype)
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    kernel = choose_kernel(attention, config, dtype, mesh)
    check_remat(remat, device)
    module: Any = Decoder(config, dtype, remat=remat, kernel=kernel, mesh=mesh)
    is_scanned = _is_scanned(device.platform, remat, mesh, lora) if scan_layers is None else scan_layers
    repetition = find_repetition(config) if is_scanned else None
    bound, prepared = _unchanged, preparation(dtype, repetition, mesh if mesh is not None and mesh.size > 1 else None)
    if lora is not None and lora.is_used:
        from grpo_jax.models.lora import bind, with_interception  # late: qwix is imported only where it is used

        module = with_interception(module, config, lora)
        bound = partial(bind, config=config, lora=lora, dtype=dtype)

    def apply_routed(
        params: Params,
        token_ids: Int[Array, "B S"],
        positions: Int[Array, "B S"] | Rotations,
        mask: Bool[Array, "B C"] | Int[Array, "B C"] | Segments | None = None,
        cache: Cache = None,
        start: int | Int[Array, ""] = 0,
        prefixes: Sequence[PrefixCache] = (),
        block_bounds: Sequence[int] = (),
        chosen: Int[Array, "B S L k"] | None = None,
        with_logits: bool = False,
    ) -> tuple[Float[Array, "B S D"], Cache, Routed | None]:
        check_call(config, token_ids, mask, cache, start, prefixes, is_stacked=STACKED in params)
        rotations = positions if isinstance(positions, dict) else rope(positions)
        params = bound(params)
        stacked = params.get(STACKED, ())
        variables = {"params": {name: value for name, value in params.items() if name != STACKED}}
        rest = (mask, cache, start, prefixes, block_bounds, chosen, with_logits, stacked)
        return module.apply(variables, token_ids, rotations, *rest)  # pyright: ignore[reportReturnType]

    whole = over_context(apply_routed, kernel) if isinstance(kernel, ContextAttention) else apply_routed

    def apply(*args: Any, **options: Any) -> tuple[Float[Array, "B S D"], Cache]:
        return whole(*args, **options)[:2]

    rope, head = partial(_compute_rotations, config), partial(_head, config)
    return Model(
        apply,
        rope,
        head,
        make_token_scores(head, logit_softcap=config.logit_softcap, mesh=mesh),
        partial(init_cache, replace(config, num_kv_heads=head_layout(config, mesh).kv_heads), dtype),
        partial(first_columns, config.windows),
        partial(join_columns, config.windows),
        vocab_size=1 if config.scalar_head else config.vocab_size,
        logit_softcap=config.logit_softcap,
        max_length=config.max_position_embeddings,
        rope_switch_length=config.rope_switch_length,
        packing=_best_packing(config, kernel),
        attention_length=attention_length(config),
        preparation=prepared,
        token_shards=1 if mesh is None else mesh.shape["context"],
        routing=_routing(config, whole),
        init_states=None if config.delta is None else partial(init_states, config, dtype),
    )


def _head(config: DecoderConfig, params: Params) -> Float[Array, "V D"]:
    if config.scalar_head:
        return params["score"]["kernel"].T
    return params["embed" if config.tie_word_embeddings else "lm_head"]["embedding"]


def _routing(config: DecoderConfig, apply: Callable[..., Any]) -> Routing | None:
    """The ``types.Routing`` of a model with experts; None without."""
    e = config.experts
    return None if e is None else Routing(apply, config.num_sparse(), e.count, e.per_token, e.scoring)


def _is_scanned(platform: str, remat: Remat, mesh: Mesh | None, lora: LoRA | None) -> bool:
    """The default of ``scan_layers``."""
    is_sharded = mesh is not None and mesh.shape["fsdp"] * mesh.shape["expert"] * mesh.shape["context"] > 1
    has_adapters = lora is not None and lora.is_used
    return (platform != "cpu" or remat != "none") and (is_sharded or not has_adapters)


def _unchanged(params: Params) -> Params:
    return params


def _best_packing(config: DecoderConfig, kernel: Kernel | None) -> Packing | None:
    if config.rope_switch_length is not None:
        return None  # with frequencies by length, the sequences of a row would depend on each other
    return "shared" if kernel is None or takes_segments(kernel) else "separate"

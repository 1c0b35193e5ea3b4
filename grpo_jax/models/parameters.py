"""The parameters of a decoder: their shapes, and random values."""

from __future__ import annotations

import zlib
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from grpo_jax.models.config import DecoderConfig, LayerKind, with_layers
from grpo_jax.models.transformer import Decoder
from grpo_jax.sampling import check_key
from grpo_jax.types import Params

ZEROS = ("bias", "sinks", "selection_bias", "gate_bias", "up_bias", "down_bias")
"""Parameters that begin at 0, by the last part of their path."""


def init_params(config: DecoderConfig, key: Key[Array, ""], *, param_dtype: Any = jnp.float32) -> Params:
    """Random parameters: weights normal with standard deviation ``initializer_range``, biases 0, norms the identity.

    Of the gated delta rule, ``A`` is uniform from 0.01 to 16, ``dt_bias`` is 1, and the convolution preserves variance.

    Args:
        config: sizes and switches of the decoder.
        key: random key; a parameter is a function of it and of the parameter's path only.
        param_dtype: dtype of the parameters.

    Returns:
        A nested dict such as ``{"embed": {"embedding": [V, D]}, "layers_0": {"attention": {"q": {"kernel":
        [D, H, head_dim]}, ...``, with ``lm_head`` if embeddings are untied, and ``score`` if the head is scalar.

    Raises:
        TypeError: the key is an old-style ``jax.random.PRNGKey``.
    """
    check_key(key)

    def new(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        kind = path[-1].key
        if kind == "scale":
            is_gated = path[-3].key == "delta" if len(path) > 2 else False
            return jnp.full(leaf.shape, 1.0 if is_gated else 1 - config.norm_offset, leaf.dtype)
        if kind in ZEROS:
            return jnp.zeros(leaf.shape, leaf.dtype)
        if kind == "dt_bias":
            return jnp.ones(leaf.shape, leaf.dtype)
        param_key = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        if kind == "A_log":
            return jnp.log(jax.random.uniform(param_key, leaf.shape, minval=0.01, maxval=16.0)).astype(leaf.dtype)
        if kind.endswith("_conv"):
            return _normal(param_key, leaf.shape, leaf.dtype, leaf.shape[-1] ** -0.5)
        return _normal(param_key, leaf.shape, leaf.dtype, config.initializer_range)

    return jax.tree.map_with_path(new, param_shapes(config, param_dtype))


@partial(jax.jit, static_argnames=("shape", "dtype", "deviation"))
def _normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: Any, deviation: float) -> Array:
    return (jax.random.normal(key, shape) * deviation).astype(dtype)


def param_shapes(config: DecoderConfig, param_dtype: Any = jnp.float32) -> Any:
    """The tree of ``init_params`` with a ``ShapeDtypeStruct`` for each array.

    Args:
        config: of the decoder.
        param_dtype: of the parameters.
    """

    def of_dtype(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, param_dtype), tree)

    traced = {kind: _shapes(with_layers(config, [kind])) for kind in dict.fromkeys(map(_shape_kind, config.kinds))}
    rest = next(iter(traced.values())) if traced else _shapes(config)
    layers = {f"layers_{i}": of_dtype(traced[_shape_kind(kind)]["layers_0"]) for i, kind in enumerate(config.kinds)}
    return {**{name: of_dtype(tree) for name, tree in rest.items() if name != "layers_0"}, **layers}


def _shape_kind(kind: LayerKind) -> LayerKind:
    """The kind, without the settings that do not change the shapes of parameters."""
    return kind._replace(window=None, rope=None)


@lru_cache(maxsize=16)
def _shapes(config: DecoderConfig) -> Any:
    """The parameters of a decoder with at most one layer, so that one layer of each kind is traced."""
    one_token = (jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool))
    init = partial(Decoder(config).init, method=Decoder.declare)
    return jax.eval_shape(init, jax.random.key(0), *one_token)["params"]

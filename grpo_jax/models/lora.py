"""LoRA and QLoRA: adapters beside the matrices of a decoder, by the library qwix.

qwix intercepts the matrix products of the decoder's own modules, so there is one forward definition. A matrix
``kernel`` with adapters has ``kernel_lora_a`` ``[inputs, rank]`` and ``kernel_lora_b`` ``[rank, outputs]`` beside it,
and the product of both is never formed. A quantized matrix is ``{"qvalue", "scale"}`` in place of its array.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, Key

from grpo_jax.models.config import DecoderConfig, with_layers
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.preparation import STACKED
from grpo_jax.sampling import check_key
from grpo_jax.types import Params

TILE = 64
"""Inputs that share a scale in the 4-bit types, as in QLoRA."""


def with_interception(module: nn.Module, config: DecoderConfig, lora: LoRA) -> nn.Module:
    """The module with adapters, and with quantized matrices if ``lora.quantize`` is set.

    Args:
        module: a ``Decoder``.
        config: of the decoder.
        lora: its rank is set.

    Raises:
        ValueError: as ``LoRA.check``.
    """
    rules = []
    for path, (inputs, _) in lora.matrices(config).items():
        tiles: Any = None
        if lora.quantize in ("int4", "nf4"):
            width = config.delta.value_dim if path == "delta/o" and config.delta is not None else config.head_dim
            tiles = {0: 1, 1: math.gcd(width, TILE)} if path.endswith("/o") else math.gcd(inputs, TILE)
        rules.append(
            qwix.LoraRule(
                module_path=rf"(layers_\d+/)?{path}",  # stacked layers are modules of their own
                rank=lora.rank,  # pyright: ignore[reportArgumentType]
                alpha=lora.alpha,
                weight_qtype=lora.quantize,
                tile_size=tiles,
            )
        )
    return qwix.apply_lora_to_model(module, qwix.LoraProvider(rules), methods=("__call__", "declare"))  # pyright: ignore[reportReturnType]


def bind(params: Params, config: DecoderConfig, lora: LoRA, dtype: Any) -> Params:
    """The parameters as qwix takes them, at trace time: adapters in ``dtype``, quantized matrices in its own type.

    Args:
        params: with adapters; layers may be stacked (``preparation.stack_layers``).
        config: of the decoder.
        lora: as in ``add_adapters``.
        dtype: of the computation.
    """
    params = _copied(params)
    for path, module in _adapted_modules(params, config, lora):
        for name in ("kernel_lora_a", "kernel_lora_b"):
            module[name] = module[name].astype(dtype)
        if lora.quantize is not None:
            module["kernel"] = _as_qwix(module["kernel"], path, config, lora)
    return params


def add_adapters(
    params: Params,
    config: DecoderConfig,
    lora: LoRA,
    key: Key[Array, ""],
    *,
    dtype: Any,
    shardings: Callable[[Any], Any] | None = None,
) -> Params:
    """Parameters with adapters, which leave the model as it is: A is uniform in ``+-1 / sqrt(inputs)``, B is 0.

    The frozen matrices are stored in ``dtype``, in which the model computes with them, or quantized from it. Scalar
    heads, norms and biases are kept.

    Args:
        params: of the decoder.
        config: of the decoder.
        lora: its rank is set.
        key: random key; an adapter is a function of it and of the adapter's path only.
        dtype: of the computation.
        shardings: from a tree of ``ShapeDtypeStruct`` to a tree of ``jax.sharding.Sharding``; None for the first local
            device.

    Raises:
        TypeError: the key is an old-style ``jax.random.PRNGKey``.
        ValueError: as ``LoRA.check``.
    """
    check_key(key)
    params = _copied(params)

    def place(tree: Any) -> Any:
        if shardings is None:
            return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), tree)
        return shardings(tree)

    for layer in range(config.num_layers):
        for path, (inputs, outputs) in lora.matrices(config, config.kinds[layer]).items():
            block, name = path.split("/")
            module, full = params[f"layers_{layer}"][block][name], f"layers_{layer}/{path}"
            new: dict[str, Any] = {
                "kernel_lora_a": _uniform(
                    jax.random.fold_in(key, zlib.crc32(full.encode())), inputs, (inputs, lora.rank or 0)
                ),
                "kernel_lora_b": jnp.zeros((lora.rank or 0, outputs)),
            }
            if lora.quantize is not None:
                quantize = partial(_quantized, path=path, config=config, lora=lora)
                shapes = {f"layers_{layer}": {block: {name: {"kernel": jax.eval_shape(quantize, module["kernel"])}}}}
                target = place(shapes)[f"layers_{layer}"][block][name]["kernel"]
                module["kernel"] = jax.jit(quantize, out_shardings=target)(module["kernel"])
            tree = {f"layers_{layer}": {block: {name: new}}}
            module |= jax.device_put(tree, place(tree))[f"layers_{layer}"][block][name]

    def stored(path: tuple[Any, ...], x: Array) -> Array:
        is_trained = path[0].key == "score" or "_lora_" in path[-1].key
        is_matrix = x.ndim > 1 and jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(dtype) if is_matrix and not is_trained else x

    return jax.tree.map_with_path(stored, params)


def merge_adapters(params: Params, config: DecoderConfig, lora: LoRA) -> Params:
    """The parameters of the decoder without adapters, ``W + (alpha / rank) A B``, in float32.

    Args:
        params: with adapters.
        config: of the decoder.
        lora: as in ``add_adapters``.
    """
    params = _copied(params)
    for path, module in _adapted_modules(params, config, lora):
        a, b = module.pop("kernel_lora_a"), module.pop("kernel_lora_b")
        kernel = module["kernel"]
        if lora.quantize is not None:
            kernel = qwix.dequantize(_as_qwix(kernel, path, config, lora).array)
        module["kernel"] = _merged(kernel, a, b, lora.scale)
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


@partial(jax.jit, static_argnames="scale")
def _merged(kernel: Array, a: Array, b: Array, scale: float) -> Array:
    product = jnp.dot(a, b, precision="highest").astype(jnp.float32)
    return kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)


@partial(jax.jit, static_argnums=(1, 2))
def _uniform(key: Key[Array, ""], inputs: int, shape: tuple[int, int]) -> Float[Array, "inputs rank"]:
    return jax.random.uniform(key, shape, minval=-(inputs**-0.5), maxval=inputs**-0.5)


def _quantized(kernel: Array, *, path: str, config: DecoderConfig, lora: LoRA) -> dict[str, Array]:
    template = _template(config, lora, path)
    with jax.numpy_dtype_promotion("standard"):  # qwix mixes its own float32 constants with the kernel's dtype
        array = qwix.quantize_params({"kernel": kernel}, {"kernel": template})["kernel"].array
    return {"qvalue": array.qvalue, "scale": array.scale}


def _as_qwix(kernel: dict[str, Array], path: str, config: DecoderConfig, lora: LoRA) -> Any:
    template = _template(config, lora, path)
    return template.replace(array=template.array.replace(**kernel))


@lru_cache(maxsize=64)
def _template(config: DecoderConfig, lora: LoRA, path: str) -> Any:
    """The shapes of a quantized matrix in qwix's type, which says how it is quantized."""
    from grpo_jax.models.transformer import Decoder

    first = with_layers(config, [next(kind for kind in config.kinds if path in lora.matrices(config, kind))])
    module: Any = with_interception(Decoder(first), first, replace(lora, targets=(path,)))
    one_token = (jax.ShapeDtypeStruct((1, 1), jnp.int32), jax.ShapeDtypeStruct((1, 1), bool))
    init = partial(module.init, method=type(module).declare)
    block, name = path.split("/")
    return jax.eval_shape(init, jax.random.key(0), *one_token)["params"]["layers_0"][block][name]["kernel"]


def _adapted_modules(params: Params, config: DecoderConfig, lora: LoRA) -> Iterator[tuple[str, dict[str, Any]]]:
    layers = [(params[f"layers_{i}"], kind) for i, kind in enumerate(config.kinds) if f"layers_{i}" in params]
    for layer, kind in [*layers, *zip(params.get(STACKED, ()), config.kinds, strict=False)]:
        for path in lora.matrices(config, kind):
            block, name = path.split("/")
            yield path, layer[block][name]


def _copied(tree: Params) -> dict[str, Any]:
    """New dicts and tuples with the same arrays."""
    return jax.tree.map(lambda x: x, tree)

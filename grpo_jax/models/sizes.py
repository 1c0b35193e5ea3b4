"""Sizes of a decoder's layers by their kind: linear maps, products of attention, experts."""

from __future__ import annotations

from grpo_jax.models.config import DecoderConfig, LayerKind


def linear_sizes(config: DecoderConfig, kind: LayerKind | None = None) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear maps of a layer, by their path such as ``attention/q``.

    Routers and gates of one number are not among them, nor are routed experts and the matrices of latent attention that
    make keys and values, which are parts of larger arrays.

    Args:
        config: of the decoder.
        kind: of the layer; None for the linear maps of layers of all kinds.
    """
    if kind is None:
        return {path: size for kind in dict.fromkeys(config.kinds) for path, size in linear_sizes(config, kind).items()}
    sizes = _delta_sizes(config) if kind.mixer == "delta_rule" else _attention_sizes(config)
    if not kind.sparse:
        return sizes | _mlp_sizes(config, "mlp", config.intermediate_size)
    assert config.experts is not None
    shared = config.experts.shared_size
    return sizes | (_mlp_sizes(config, "mlp/shared", shared) if shared else {})


def _attention_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    D, H, latent = config.hidden_size, config.num_heads, config.latent
    if latent is not None:
        queries, sizes = H * (latent.key_dim + latent.rope_dim), {}
        if latent.query_rank is None:
            sizes["attention/q"] = (D, queries)
        else:
            sizes |= {"attention/q_a": (D, latent.query_rank), "attention/q_b": (latent.query_rank, queries)}
        sizes["attention/kv_a"] = (D, latent.rank + latent.rope_dim)
        return sizes | {"attention/o": (H * latent.value_dim, D)}
    queries, keys = H * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"attention/q": (D, queries), "attention/k": (D, keys), "attention/v": (D, keys)}
    sizes |= {"attention/out_gate": (D, queries)} if config.attention_gate else {}
    return sizes | {"attention/o": (queries, D)}


def _delta_sizes(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    D, d = config.hidden_size, config.delta
    assert d is not None
    keys, values = d.key_heads * d.key_dim, d.value_heads * d.value_dim
    outputs = {"q": keys, "k": keys, "v": values, "z": values, "a": d.value_heads, "b": d.value_heads}
    return {f"delta/{name}": (D, size) for name, size in outputs.items()} | {"delta/o": (values, D)}


def _mlp_sizes(config: DecoderConfig, path: str, width: int) -> dict[str, tuple[int, int]]:
    D = config.hidden_size
    gate = {f"{path}/gate": (D, width)} if config.gated_mlp else {}
    return gate | {f"{path}/up": (D, width), f"{path}/down": (width, D)}


def pair_size(config: DecoderConfig) -> int:
    """Multiplications of a query and a key in all heads of a layer: of their score, and of the value."""
    if config.latent is None:
        return 2 * config.num_heads * config.head_dim
    return config.num_heads * (config.latent.key_dim + config.latent.rope_dim + config.latent.value_dim)


def expert_size(config: DecoderConfig) -> int:
    """Parameters of one routed expert of a layer; 0 without experts."""
    e, D = config.experts, config.hidden_size
    return 0 if e is None else 3 * D * e.intermediate_size + e.bias * (2 * e.intermediate_size + D)


def idle_size(config: DecoderConfig) -> int:
    """Parameters of the experts that a token is not sent to, in all layers."""
    e = config.experts
    return 0 if e is None else config.num_sparse() * (e.count - e.per_token) * expert_size(config)


def attention_length(config: DecoderConfig) -> float:
    """Tokens of a row for which attention multiplies as often as the layers' matrices: masked pairs are computed.

    Args:
        config: of the decoder.
    """
    weights = sum(_multiplications(config, kind) for kind in config.kinds)
    return weights / (max(config.num_attention_layers, 1) * pair_size(config))


def _multiplications(config: DecoderConfig, kind: LayerKind) -> int:
    """Multiplications of a token with the matrices of a layer."""
    D, e, latent = config.hidden_size, config.experts, config.latent
    count = sum(inputs * outputs for inputs, outputs in linear_sizes(config, kind).values())
    if kind.mixer == "attention" and latent is not None:
        count += latent.rank * config.num_heads * (latent.key_dim + latent.value_dim)
    if kind.sparse and e is not None:
        count += D * e.count + 3 * D * e.per_token * e.intermediate_size
    return count

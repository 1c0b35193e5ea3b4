"""Rotary frequencies from a Hugging Face ``config.json``, in the format of transformers 4 or 5."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from grpo_jax.models.config import Rope
from grpo_jax.models.hf_family import Family
from grpo_jax.models.hf_fields import LAYER_TYPES, check_number, check_object

Fields = Mapping[str, Any]

# Required and optional fields of each kind, other than the base.
ROPE_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "yarn": (set(), {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
}
WITH_ORIGINAL = ("llama3", "yarn", "longrope")


def read_ropes(fields: Fields, family: Family, head_dim: int) -> dict[str, Rope]:
    """The rotary frequencies of each layer type, from ``rope_scaling`` or ``rope_parameters``.

    Args:
        fields: of the config, with defaults filled in.
        family: the model's.
        head_dim: components of a head.

    Raises:
        ValueError: a kind that is not implemented; a value that is missing, invalid or contradicted by another; or a
            field that the kind does not read.
    """
    scaling, new = fields["rope_scaling"] or {}, fields["rope_parameters"] or {}
    if not (scaling or new) and family.default_rope is not None:
        new = family.default_rope
    old: dict[str, Any] = {"rope_theta": fields["rope_theta"], **scaling}
    if "partial_rotary_factor" in fields:
        old.setdefault("partial_rotary_factor", fields["partial_rotary_factor"])
    if fields.get("rotary_dim") is not None:
        old.setdefault("partial_rotary_factor", fields["rotary_dim"] / head_dim)
    sizes = {name: fields[name] for name in ("max_position_embeddings", "original_max_position_embeddings")}
    sizes["head_dim"] = head_dim
    read = partial(_read_rope, family=family, sizes=sizes)
    if family.local_theta is None:
        rope = read(old, new, "rope_parameters", family.theta)
        return {"full_attention": rope, "sliding_attention": rope}
    if scaling.get("type", "default") != "default" and "rope_type" not in scaling:
        raise ValueError(
            f"rope_scaling in config.json names its kind as type={scaling['type']!r}, which transformers does not read "
            "in this family (it would have no effect); use rope_type instead, or remove rope_scaling"
        )
    # transformers 5.0 writes these two beside the layer types, without an effect.
    unused = {"rope_type": "default", "rope_theta": None}
    unknown = sorted(name for name in set(new) - set(LAYER_TYPES) if name not in unused or new[name] != unused[name])
    if unknown:
        raise ValueError(f"rope_parameters has {unknown}; expected are {' and '.join(LAYER_TYPES)}")
    for kind in LAYER_TYPES:
        check_object(f"rope_parameters.{kind}", new.get(kind))
    full, local = new.get("full_attention") or {}, new.get("sliding_attention") or {}
    base = "rope_local_base_freq" if "rope_local_base_freq" in fields else "rope_theta"
    return {
        "full_attention": read(old, full, "rope_parameters.full_attention", family.theta),
        "sliding_attention": read(
            {"rope_theta": fields[base]}, local, "rope_parameters.sliding_attention", family.local_theta
        ),
    }


def _read_rope(old: Fields, new: Fields, where: str, theta: float, *, family: Family, sizes: Fields) -> Rope:
    """One ``Rope`` from fields of transformers 4 (``old``) and 5 (``new``), either of which may be empty."""
    merged: dict[str, Any] = {}
    for parameters in (old, new):
        for name, value in parameters.items():
            name = "rope_type" if name == "type" else name
            if value is None:
                continue
            first = merged.setdefault(name, value)
            if first is not value and first != value:
                raise ValueError(f"config.json gives {name} twice, as {merged[name]!r} and {value!r} ({where})")
    kind: Any = merged.pop("rope_type", "default")
    kind = family.rope_kinds.get(kind, kind)
    if kind not in [*ROPE_FIELDS]:
        raise ValueError(
            f"rope scaling {kind!r} is not implemented ({where}); implemented are {', '.join(ROPE_FIELDS)}"
        )
    dims = _rotated(merged.pop("partial_rotary_factor", None), where, family, sizes["head_dim"])
    extra = {name: merged.pop(name) for name in family.rope_fields if name in merged}
    base = check_number(f"rope_theta ({where})", merged.pop("rope_theta", theta))
    original = _original_length(kind, merged, where, sizes)
    rope = _scaled(kind, base, merged, original, where, {**sizes, "head_dim": dims or sizes["head_dim"]})
    beta = extra.get("llama_4_scaling_beta", 0)
    return replace(
        rope,
        dims=dims,
        interleaved=family.rope_interleaved,
        query_beta=check_number(f"llama_4_scaling_beta ({where})", beta, zero=True),
        **({"original_max_positions": original} if beta else {}),
    )


def _rotated(factor: Any, where: str, family: Family, head_dim: int) -> int | None:
    """The components of a head that are rotated; None for all."""
    if family.rotary_factor is None:
        if factor not in (None, 1.0):
            raise ValueError(f"partial_rotary_factor is not implemented for this family ({where})")
        return None
    factor = family.rotary_factor if factor is None else factor
    dims = int(head_dim * check_number(f"partial_rotary_factor ({where})", factor))
    if not 0 < dims <= head_dim or dims % 2:
        raise ValueError(
            f"partial_rotary_factor {factor} in config.json rotates {dims} of {head_dim} components of a head "
            f"({where}); they must be an even number, at most all"
        )
    return None if dims == head_dim else dims


def _scaled(kind: Any, base: float, merged: dict[str, Any], original: float, where: str, sizes: Fields) -> Rope:
    """The ``Rope`` of a kind from its own fields."""
    _drop_unused(kind, merged, where)
    required, optional = ROPE_FIELDS[kind]
    missing, unknown = sorted(required - set(merged)), sorted(set(merged) - required - optional)
    if missing or unknown:
        raise ValueError(f"rope scaling {kind!r} ({where}) lacks {missing} and has {unknown}, which it does not read")
    numbers: dict[str, Any] = {
        name: check_number(f"{name} ({where})", value)
        for name, value in merged.items()
        if name not in ("short_factor", "long_factor", "truncate")
    }
    if kind in ("default", "linear"):
        return Rope(base, kind, **numbers)
    if kind == "llama3" and numbers["low_freq_factor"] >= numbers["high_freq_factor"]:
        raise ValueError(f"low_freq_factor in config.json must be less than high_freq_factor ({where})")
    if kind in ("llama3", "dynamic"):
        return Rope(base, kind, original_max_positions=original, **numbers)
    factor = numbers["factor"] if "factor" in numbers else sizes["max_position_embeddings"] / original
    if kind == "yarn":
        return _read_yarn(base, factor, numbers, merged.get("truncate", True), original, where)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    count = sizes["head_dim"] // 2
    return Rope(
        base,
        kind,
        factor,
        original_max_positions=original,
        attention_factor=numbers.get("attention_factor", attention),
        short_factor=_pairs("short_factor", merged["short_factor"], count),
        long_factor=_pairs("long_factor", merged["long_factor"], count),
    )


def _original_length(kind: str, merged: dict[str, Any], where: str, sizes: Fields) -> float:
    """The length before scaling; removes its field from ``merged``."""
    longest, beside = sizes["max_position_embeddings"], sizes["original_max_position_embeddings"]
    inside = merged.pop("original_max_position_embeddings", None)
    given = [value for value in (inside, beside) if value is not None]
    if kind in WITH_ORIGINAL:
        if len(given) == 2 and given[0] != given[1]:
            raise ValueError(
                f"config.json gives original_max_position_embeddings twice, as {given[0]!r} and {given[1]!r} ({where})"
            )
        if kind == "llama3" and not given:
            raise ValueError(f"rope scaling 'llama3' ({where}) lacks original_max_position_embeddings")
        return check_number(f"original_max_position_embeddings ({where})", given[0] if given else longest)
    if kind == "dynamic" and inside is not None and inside != longest:
        raise ValueError(
            f"rope scaling 'dynamic' ({where}) begins beyond max_position_embeddings={longest}, as in transformers, "
            f"and does not read original_max_position_embeddings={inside!r}; set both to the same value"
        )
    return float(longest)


def _drop_unused(kind: str, merged: dict[str, Any], where: str) -> None:
    if kind == "default" and merged.get("factor") == 1:
        del merged["factor"]
    merged.pop("finetuned", None)
    if kind == "yarn" and "attn_factor" in merged:
        logging.getLogger(__name__).warning(
            "attn_factor=%s (%s) is not read, as in transformers; vLLM multiplies the attention factor by it. To "
            "compute what vLLM does, set attention_factor to the product",
            merged.pop("attn_factor"),
            where,
        )


def _read_yarn(
    base: float, factor: float, numbers: Mapping[str, float], truncate: Any, original: float, where: str
) -> Rope:
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate in config.json must be true or false, not {truncate!r:.200} ({where})")
    if base == 1:
        raise ValueError(f"rope_theta in config.json must differ from 1 with rope scaling 'yarn' ({where})")

    def scale(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scale()
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        attention = scale(numbers["mscale"]) / scale(numbers["mscale_all_dim"])
    return Rope(
        base,
        "yarn",
        factor,
        original_max_positions=original,
        attention_factor=numbers.get("attention_factor", attention),
        beta_fast=numbers.get("beta_fast", 32.0),
        beta_slow=numbers.get("beta_slow", 1.0),
        truncate=truncate,
    )


def _pairs(name: str, values: Any, count: int) -> tuple[float, ...]:
    if not isinstance(values, list) or len(values) != count:
        given = f"{len(values)} entries" if isinstance(values, list) else f"{values!r:.200}"
        raise ValueError(f"{name} in config.json must be a list of {count} (head_dim / 2) numbers, not {given}")
    return tuple(check_number(f"{name}[{i}]", value) for i, value in enumerate(values))

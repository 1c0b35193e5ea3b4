"""Rollout speed: useful tokens per second, share of useful work, and share of the machine's limit.

Weights are random. Lengths are nearly all the longest, or approximately geometric: then a share of the vocabulary ends
a completion. With ``--against`` another implementation does the same work in the same process, alternating, and ratios
of medians are reported: ``static`` is a plain loop (every row has its own prompt cache, batches of ``--static-rows``
run until their last row ends, full-length cache, Gumbel noise for the whole vocabulary), ``generate`` is
``rollout.generate`` (all rows in one batch), ``transformers`` is torch's, and ``full_cache`` is ``rollout.Sampler``
with layers of sliding windows that keep all keys and values. Prints one JSON line.

    python experiments/bench/rollout.py --mean-length 48 --max-completion-length 256 --against static
    python experiments/bench/rollout.py --rows 64 --against transformers
    python experiments/bench/rollout.py --model small-windows --rows 8 --max-completion-length 4096 --against full_cache
    python experiments/bench/rollout.py --model qwen2.5-7b --rows 256 --dtype bfloat16          # on an accelerator
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.loop.benchmark import SHAPES, machine_limits, peak_memory
from grpo_jax.loop.command import run_command
from grpo_jax.models import build_model, from_hf_config, init_params, save_pretrained
from grpo_jax.models.config import ACTIVATIONS, DecoderConfig, with_layers
from grpo_jax.models.layers import Norm
from grpo_jax.models.rope import rotate, rotation
from grpo_jax.rollout import RolloutStats, Sampler, generate
from grpo_jax.sampling import Sampling
from grpo_jax.types import Model, Prompts


@dataclass(frozen=True)
class Config:
    """Model, lengths and comparison."""

    model: Literal[tuple(SHAPES)] = "small"  # pyright: ignore[reportInvalidTypeForm]
    """Shapes of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of weights and computation."""
    cache_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """Precision of the sampler's KV cache. Default: dtype."""
    rows: int = 256
    """Total number of completions."""
    group_size: int = 8
    """Completions per prompt."""
    prompt_length: int = 64
    """Prompt length in tokens."""
    max_completion_length: int = 128
    """Longest completion in tokens."""
    mean_length: float | None = None
    """Approximate mean of geometric lengths; None for the full length, which few completions fall short of."""
    against: Literal["static", "generate", "transformers", "full_cache"] | None = None
    """Implementation to compare with."""
    static_rows: int = 64
    """Rows per batch of static and transformers."""
    repeats: int = 3
    """Measurements of each implementation, alternating."""
    seed: int = 0
    """Seed of weights, prompts and sampling."""

    def __post_init__(self):
        if self.rows % self.group_size or self.rows % min(self.static_rows, self.rows):
            raise ValueError(
                f"rows is {self.rows}; it must be a multiple of group_size = {self.group_size} and of static_rows = "
                f"{self.static_rows}"
            )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion; for the full length one, which random weights sample once in V tokens."""
        V = SHAPES[self.model]["vocab_size"]
        return (V - 1,) if self.mean_length is None else tuple(range(round(V / self.mean_length)))


class Work(NamedTuple):
    """An implementation; ``draw`` samples all completions and returns their lengths."""

    name: str
    draw: Callable[[], np.ndarray]
    cache_bytes: Callable[[], int] | None = None


def main(config: Config) -> None:
    compiles: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiles.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    shape = SHAPES[config.model] | {"max_position_embeddings": config.prompt_length + config.max_completion_length}
    decoder = from_hf_config(shape)
    dtype = jnp.dtype(config.dtype).type
    params = jax.jit(partial(init_params, decoder, param_dtype=dtype))(jax.random.key(config.seed))
    rng = np.random.default_rng(config.seed)
    N = config.rows // config.group_size
    ids = jnp.asarray(rng.integers(0, decoder.vocab_size, (N, config.prompt_length)), jnp.int32)
    prompts = Prompts(ids, jnp.ones(ids.shape, bool), jnp.arange(N))
    key = jax.random.key(config.seed)

    stats: list[RolloutStats] = []
    model = build_model(decoder, dtype=dtype, attention="auto")
    ours = engine(config, model, params, prompts, key, stats)
    others = {"static": static, "generate": plain, "transformers": torch_generate, "full_cache": full_cache}
    works = [ours]
    if config.against is not None:
        works.append(others[config.against](config, decoder, params, prompts, key))
    before = len(compiles)
    lengths = ours.draw()
    compile_count, compile_seconds = len(compiles) - before, sum(compiles[before:])
    for work in works[1:]:
        work.draw()
    measured: dict[str, list[tuple[float, float, int]]] = {work.name: [] for work in works}
    for _ in range(config.repeats):
        for work in works:
            measured[work.name].append(timed(work.draw))

    def median(name: str, which: int) -> float:
        return statistics.median(tokens / row[which] for row in measured[name] for tokens in [row[2]])

    peak, bandwidth = machine_limits(dtype)
    best_wall = min(row[1] for row in measured["ours"])
    used = stats[-1]
    result = {
        "bench": "rollout",
        "device": jax.devices()[0].device_kind,
        "model": config.model,
        "dtype": config.dtype,
        "cache_dtype": config.cache_dtype or config.dtype,
        "rows": config.rows,
        "group_size": config.group_size,
        "prompt_length": config.prompt_length,
        "max_completion_length": config.max_completion_length,
        "mean_length": round(float(lengths.mean()), 1),
        "tokens_per_second": round(median("ours", 1)),
        "tokens_per_cpu_second": round(median("ours", 0)),
        "cpu_seconds": round(statistics.median(row[0] for row in measured["ours"]), 2),
        "useful_row_steps": round(used.useful, 3),
        "compile_count": compile_count,
        "compile_seconds": round(compile_seconds, 1),
        "share_of_limit": round(limit_seconds(config, decoder, lengths, peak, bandwidth, dtype) / best_wall, 3),
        "machine_gflops": round(peak / 1e9),
        "machine_gbytes_per_second": round(bandwidth / 1e9, 1),
        "cache_mib": round(used.cache_bytes / 2**20, 1),
        "peak_memory_mib": round(peak_memory() / 2**20),
    }
    if config.against is not None:
        result |= {
            f"{config.against}_tokens_per_second": round(median(config.against, 1)),
            f"{config.against}_tokens_per_cpu_second": round(median(config.against, 0)),
            f"ratio_to_{config.against}": round(median("ours", 1) / median(config.against, 1), 2),
            f"ratio_to_{config.against}_cpu": round(median("ours", 0) / median(config.against, 0), 2),
        }
        if works[1].cache_bytes is not None:
            result[f"{config.against}_cache_mib"] = round(works[1].cache_bytes() / 2**20, 1)
    print(json.dumps(result))


def timed(draw: Callable[[], np.ndarray]) -> tuple[float, float, int]:
    """CPU seconds of this process, wall seconds and tokens."""
    cpu, wall = time.process_time(), time.perf_counter()
    lengths = draw()
    return time.process_time() - cpu, time.perf_counter() - wall, int(lengths.sum())


def engine(config: Config, model: Model, params, prompts, key, stats: list[RolloutStats]) -> Work:
    """``rollout.Sampler``."""
    sampler = Sampler(
        model,
        Sampling(),
        group_size=config.group_size,
        max_completion_length=config.max_completion_length,
        eos_ids=config.eos_ids,
        pad_id=0,
        cache_dtype=config.cache_dtype,
        report=stats.append,
    )
    return Work("ours", lambda: np.asarray(sampler(params, prompts, key).completion_mask.sum(1)))


def full_cache(config: Config, decoder: DecoderConfig, params, prompts, key) -> Work:
    """``rollout.Sampler`` with a column of the cache for every token of every layer."""
    dtype = jnp.dtype(config.dtype).type
    model = build_model(decoder, dtype=dtype, attention="auto")
    full = build_model(with_layers(decoder, [kind._replace(window=None) for kind in decoder.kinds]), dtype=dtype)
    names = ("init_cache", "first_columns", "join_columns")
    model = replace(model, **{name: getattr(full, name) for name in names})
    stats: list[RolloutStats] = []
    work = engine(config, model, params, prompts, key, stats)
    return Work("full_cache", work.draw, lambda: stats[-1].cache_bytes)


def plain(config: Config, decoder: DecoderConfig, params, prompts, key) -> Work:
    """``rollout.generate``, jitted."""
    rollout = jax.jit(
        partial(
            generate,
            build_model(decoder, dtype=jnp.dtype(config.dtype).type),
            sampling=Sampling(),
            group_size=config.group_size,
            max_completion_length=config.max_completion_length,
            eos_ids=config.eos_ids,
            pad_id=0,
        )
    )
    return Work("generate", lambda: np.asarray(rollout(params, prompts, key).completion_mask.sum(1)))


def static(config: Config, decoder: DecoderConfig, params, prompts, key) -> Work:
    """The plain loop, in batches of ``static_rows``."""
    rows = min(config.static_rows, config.rows)
    ids = jnp.repeat(prompts.ids, config.group_size, axis=0)
    loop = jax.jit(
        partial(static_loop, decoder, eos_ids=config.eos_ids, length=config.max_completion_length, dtype=config.dtype)
    )

    def draw():
        parts = [loop(params, ids[i : i + rows], jax.random.fold_in(key, i)) for i in range(0, config.rows, rows)]
        return np.concatenate([np.asarray(part) for part in parts])

    return Work("static", draw)


def static_loop(decoder: DecoderConfig, params, ids, key, *, eos_ids: tuple[int, ...], length: int, dtype: str):
    """Lengths of a batch's completions; caches are ``[B, slots, heads, head size]``."""
    B, P = ids.shape
    T = length
    stops = jnp.array(eos_ids)
    head = params["embed" if decoder.tie_word_embeddings else "lm_head"]["embedding"].astype(dtype)

    def norm(name, tree, x) -> Any:
        return Norm(decoder.norm_epsilon, decoder.norm_offset, jnp.float32).apply({"params": tree[name]}, x)

    def project(tree, x):
        out = jnp.einsum("bsd,d...->bs...", x, tree["kernel"].astype(dtype))
        return out + tree["bias"].astype(dtype) if "bias" in tree else out

    def forward(ids, start, caches):
        S = ids.shape[1]
        rope = decoder.ropes[0]
        assert rope is not None
        turn = rotation(rope, decoder.head_dim, start + jnp.arange(S)[None, :])
        x = params["embed"]["embedding"][ids].astype(dtype)
        new = []
        for i, (keys, values) in enumerate(caches):
            layer = params[f"layers_{i}"]
            a, h = layer["attention"], norm("attention_norm", layer, x)
            q, k, v = (project(a[name], h) for name in "qkv")
            if decoder.qk_norm:
                q, k = norm("q_norm", a, q), norm("k_norm", a, k)
            q = (rotate(q, turn) * decoder.query_scale).astype(dtype)
            keys = jax.lax.dynamic_update_slice_in_dim(keys, rotate(k, turn).astype(dtype), start, axis=1)
            values = jax.lax.dynamic_update_slice_in_dim(values, v, start, axis=1)
            q = q.reshape(B, S, decoder.num_kv_heads, -1, decoder.head_dim)
            scores = jnp.einsum("bskge,bcke->bkgsc", q, keys, preferred_element_type=jnp.float32)
            allowed = jnp.arange(P + T)[None, :] <= start + jnp.arange(S)[:, None]
            weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf)).astype(dtype)
            out = jnp.einsum("bkgsc,bcke->bskge", weights, values).reshape(B, S, decoder.num_heads, -1)
            x = x + jnp.einsum("bshe,hed->bsd", out, a["o"]["kernel"].astype(dtype))
            h, mlp = norm("mlp_norm", layer, x), layer["mlp"]
            gated = ACTIVATIONS[decoder.activation](project(mlp["gate"], h)) * project(mlp["up"], h)
            x = x + project(mlp["down"], gated)
            new.append((keys, values))
        return norm("final_norm", params, x)[:, -1], new

    def going(carry):
        t, _, _, ended, _ = carry
        return (t < T) & ~ended.all()

    def step(carry):
        t, hidden, caches, ended, lengths = carry
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
        tokens = jax.random.categorical(jax.random.fold_in(key, t), logits)
        lengths = lengths + ~ended
        ended = ended | (tokens[:, None] == stops[None, :]).any(1)
        hidden, caches = forward(tokens[:, None], P + t, caches)
        return t + 1, hidden, caches, ended, lengths

    cache = jnp.zeros((B, P + T, decoder.num_kv_heads, decoder.head_dim), dtype)
    hidden, caches = forward(ids, 0, [(cache, cache)] * decoder.num_layers)
    start = (jnp.int32(0), hidden, caches, jnp.zeros(B, bool), jnp.zeros(B, jnp.int32))
    return jax.lax.while_loop(going, step, start)[4]


def torch_generate(config: Config, decoder: DecoderConfig, params, prompts, key) -> Work:
    """``generate`` of transformers on the same weights, in batches of ``static_rows``."""
    import torch
    import transformers

    model: Any
    shape = SHAPES[config.model] | {"max_position_embeddings": config.prompt_length + config.max_completion_length}
    with tempfile.TemporaryDirectory() as folder:
        names: dict[Any, str] = {"qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}
        architecture = {
            "architectures": [f"{names[shape['model_type']]}ForCausalLM"],
            "dtype": config.dtype,
            "eos_token_id": 0,
        }
        save_pretrained(folder, params, hf_config=shape | architecture, tokenizer=None)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, config.dtype))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = model.eval().to(device)
    ids = torch.from_numpy(np.repeat(np.asarray(prompts.ids), config.group_size, axis=0)).long().to(device)
    T, P, rows = config.max_completion_length, config.prompt_length, min(config.static_rows, config.rows)
    ends = None if config.mean_length is None else list(config.eos_ids)
    torch.manual_seed(config.seed)

    def draw():
        lengths = []
        for i in range(0, config.rows, rows):
            part = ids[i : i + rows]
            with torch.no_grad():
                out = model.generate(
                    part,
                    attention_mask=torch.ones_like(part),
                    do_sample=True,
                    top_k=0,
                    max_new_tokens=T,
                    min_new_tokens=T if ends is None else None,
                    eos_token_id=ends,
                    pad_token_id=decoder.vocab_size - 1,
                )
            tokens = out[:, P:].cpu().numpy()
            is_end = np.isin(tokens, config.eos_ids)
            lengths.append(np.where(is_end.any(1), is_end.argmax(1) + 1, tokens.shape[1]))
        return np.concatenate(lengths)

    return Work("transformers", draw)


def limit_seconds(
    config: Config, decoder: DecoderConfig, lengths: np.ndarray, peak: float, bandwidth: float, dtype
) -> float:
    """Lower bound of the seconds for sampling these lengths, if every row stopped after its last token.

    A step takes the larger of its arithmetic at ``peak`` and of reading weights, keys and values once at ``bandwidth``.

    Args:
        config: group size and prompt length.
        decoder: sizes of the model.
        lengths: ``[rows]``, tokens of each completion.
        peak: FLOP/s.
        bandwidth: bytes/s.
        dtype: precision of weights and cache.
    """
    c, width = decoder, jnp.dtype(dtype).itemsize
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    weights = c.num_layers * c.hidden_size * (heads + 3 * c.intermediate_size) + c.vocab_size * c.hidden_size
    cached = 2 * c.num_kv_heads * c.head_dim * width
    scored = 4 * c.num_heads * c.head_dim
    P, groups = config.prompt_length, lengths.reshape(-1, config.group_size)
    seconds = 2 * weights * groups.shape[0] * P / peak
    for t in range(int(lengths.max())):
        rows, prompts = int((lengths > t).sum()), int((groups > t).any(1).sum())
        own = sum(min(t, window or t) for window in c.windows)
        shared = sum(P if window is None else min(P, max(0, window - t)) for window in c.windows)
        arithmetic = 2 * weights * rows + scored * rows * (shared + own)
        read = weights * width + cached * (prompts * shared + rows * own)
        seconds += max(arithmetic / peak, read / bandwidth)
    return seconds


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))

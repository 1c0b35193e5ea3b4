"""Kernels against the plain path: cuDNN's call computed by XLA, splash attention interpreted, since this is a CPU."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.models import build_model, from_hf_config, init_params, kernels, splash, transformer
from grpo_jax.models.attention import KVSegment, attend, attend_in_blocks, attention_mask
from grpo_jax.models.kernels import choose_kernel, cudnn_attention, hardware, resolve_attention, splash_attention
from grpo_jax.rollout import Sampler
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import BATCH, make_mesh
from grpo_jax.train import completion_log_probs
from grpo_jax.types import Segments

SIZES = TINY | {"head_dim": 16, "sliding_window": 8}
WINDOWED = from_hf_config(SIZES | {"model_type": "gemma3_text", "sliding_window_pattern": 2})
CAPPED = from_hf_config(SIZES | {"model_type": "gemma2", "attn_logit_softcapping": 2.0})
KERNELS = {
    "cudnn": partial(cudnn_attention, implementation="xla"),
    "splash": partial(splash_attention, interpret=True),
}


def plain(queries, keys, values, mask, *, window, softcap):
    rows, length, _, width = queries.shape
    allowed = attention_mask(mask, jnp.arange(length), 0, length, window)
    part = KVSegment({"keys": keys.transpose(0, 2, 3, 1), "values": values.transpose(0, 2, 1, 3)}, allowed)
    grouped = queries.reshape(rows, length, keys.shape[2], -1, width).transpose(0, 2, 3, 1, 4)
    return attend(grouped, [part], softcap).transpose(0, 3, 1, 2, 4).reshape(queries.shape)


def masks(count, length, kind):
    slots, rows = np.arange(length)[None], np.arange(count)[:, None]
    left, right = slots >= 5 + 7 * rows, slots < length - 3 - 11 * rows
    return jnp.asarray(
        {
            "none": np.ones((count, length), bool),
            "padded": left & right,
            "holes": np.random.default_rng(0).random((count, length)) < 0.6,
            "nothing": left & (rows > 0),  # the first sequence has no real token
            "packed": np.where(right, 1 + (slots >= 20 + rows) + (slots >= 70), 0).astype(np.int32),
        }[kind]
    )


def arrays(length, width, kind, dtype=jnp.float32):
    rng = np.random.default_rng(1)
    shapes = [(2, length, 4, width), (2, length, 2, width), (2, length, 2, width)]
    scale = (2 / width**0.5, 1, 1)
    return [jnp.asarray(rng.normal(size=s) * c, dtype) for s, c in zip(shapes, scale, strict=True)], masks(
        2, length, kind
    )


def at_real_tokens(attention, inputs, mask, **options):
    """The output at real tokens, and the gradients of a weighted sum of it."""
    weights = jnp.asarray(np.random.default_rng(2).normal(size=inputs[0].shape) / inputs[0].shape[-1] ** 0.5)

    def total(inputs):
        out = jnp.where(mask.astype(bool)[:, :, None, None], attention(*inputs, mask, **options), 0).astype(jnp.float32)
        return (out * weights.astype(jnp.float32)).sum(), out

    grads, out = jax.jit(jax.grad(total, has_aux=True))(inputs)
    return [out, *grads]


@pytest.mark.parametrize(
    ("name", "length", "width", "kind", "window", "softcap"),
    [
        ("cudnn", 40, 16, "none", None, None),
        ("cudnn", 150, 64, "padded", None, None),
        ("cudnn", 150, 16, "padded", 33, None),
        ("cudnn", 150, 16, "padded", 5, None),
        ("cudnn", 150, 16, "holes", None, None),
        ("cudnn", 150, 16, "nothing", None, None),
        ("cudnn", 150, 16, "packed", None, None),
        ("cudnn", 150, 16, "packed", 33, None),
        ("splash", 7, 16, "none", None, None),
        ("splash", 150, 64, "padded", None, 5.0),
        ("splash", 150, 80, "holes", 33, None),
        ("splash", 150, 16, "nothing", 140, 2.0),
        ("splash", 150, 16, "packed", 33, None),
    ],
)
def test_a_kernel_computes_what_the_plain_path_does(monkeypatch, name, length, width, kind, window, softcap):
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)  # two blocks
    inputs, mask = arrays(length, width, kind)
    options = {"window": window, "softcap": softcap}
    found = at_real_tokens(KERNELS[name], inputs, mask, **options)
    chex.assert_trees_all_close(found, at_real_tokens(plain, inputs, mask, **options), atol=1e-5)
    chex.assert_tree_all_finite(KERNELS[name](*inputs, mask, **options))


@pytest.mark.parametrize("window", [None, 33])
def test_cudnn_attends_to_a_shared_prompt(window):
    """Two segments of 50 tokens continue one of 20, and another segment stands alone; then padding."""
    inputs, _ = arrays(150, 16, "none")
    ends = [20, 70, 120, 140]
    ids = np.searchsorted(ends, np.arange(150), side="right") + 1
    ids[140:] = 0
    positions = np.arange(150) - np.array([0, 0, 50, 120, 140])[ids - 1]
    segments = Segments(*(jnp.asarray(np.tile(x, (2, 1))) for x in (ids, np.isin(ids, [2, 3]).astype(int), positions)))

    def outputs(attention):
        def total(inputs):
            out = jnp.where((segments.ids > 0)[:, :, None, None], attention(*inputs, segments, window=window), 0)
            return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum(), out

        return jax.jit(jax.grad(total, has_aux=True))(inputs)

    found = outputs(partial(KERNELS["cudnn"], softcap=None))
    chex.assert_trees_all_close(found, outputs(partial(plain, softcap=None)), atol=1e-5)
    chex.assert_tree_all_finite(KERNELS["cudnn"](*inputs, segments, window=window))
    first_of_third = np.asarray(plain(*inputs, segments, window=window, softcap=None))[:, 70]
    keys = [*range(20), 70]
    alone = plain(*(x[:, keys] for x in inputs), jnp.ones((2, 21), bool), window=window, softcap=None)[:, -1]
    np.testing.assert_allclose(first_of_third, alone, atol=1e-5)


def test_packed_sequences_are_attended_to_in_blocks_of_queries():
    inputs, mask = arrays(300, 16, "packed")
    queries = inputs[0].reshape(2, 300, 2, 2, 16).transpose(0, 2, 3, 1, 4)
    entry = {"keys": inputs[1].transpose(0, 2, 3, 1), "values": inputs[2].transpose(0, 2, 1, 3)}
    allowed = attention_mask(mask, jnp.arange(300), 0, 300, None)
    found = attend_in_blocks(queries, entry, allowed, 2.0)
    np.testing.assert_allclose(found, attend(queries, [KVSegment(entry, allowed)], 2.0), atol=1e-5)


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_in_bfloat16(name):
    inputs, mask = arrays(150, 16, "padded", jnp.bfloat16)
    options = {"window": None, "softcap": None}
    out = KERNELS[name](*inputs, mask, **options)
    assert out.dtype == jnp.bfloat16
    found = jnp.where(mask[:, :, None, None], out, 0).astype(jnp.float32)
    wanted = jnp.where(mask[:, :, None, None], plain(*inputs, mask, **options), 0)
    np.testing.assert_allclose(found, wanted, atol=0.03)


@pytest.mark.parametrize("name", KERNELS)
def test_values_in_padding_have_no_effect(name):
    inputs, mask = arrays(150, 16, "padded")
    other = [jnp.where(mask[:, :, None, None], x, 1e4) for x in inputs]
    results = [at_real_tokens(KERNELS[name], x, mask, window=None, softcap=None) for x in (inputs, other)]
    chex.assert_trees_all_equal(*results)


def test_splash_attention_on_a_mesh():
    inputs, mask = arrays(40, 16, "padded")
    inputs, mask = [jnp.concatenate([x, x]) for x in inputs], jnp.concatenate([mask, mask])
    wanted = at_real_tokens(plain, inputs, mask, window=None, softcap=None)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    heads = NamedSharding(mesh, P(*BATCH, None, "tensor", None))
    kernel = partial(splash_attention, mesh=mesh, interpret=True)
    placed = jax.device_put(inputs, heads), jax.device_put(mask, NamedSharding(mesh, BATCH))
    found = at_real_tokens(kernel, *placed, window=None, softcap=None)
    chex.assert_trees_all_close(found, wanted, atol=1e-5)
    assert all(x.sharding.is_equivalent_to(heads, 4) for x in found)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        pytest.param("cudnn", WINDOWED, marks=pytest.mark.slow),
        pytest.param("splash", WINDOWED, marks=pytest.mark.slow),
        pytest.param("splash", CAPPED, marks=pytest.mark.slow),
    ],
    ids=["cudnn", "splash", "cap"],
)
def test_a_model_with_a_kernel_trains_and_samples_as_the_plain_one(monkeypatch, name, config):
    """Prefill and scoring of completions, forward and backward; each layer has its own window."""
    params = init_params(config, jax.random.key(0))
    models = {"plain": build_model(config)}
    calls = []

    def counted(*args, **options):
        calls.append(options["window"])
        return KERNELS[name](*args, **options)

    monkeypatch.setattr(transformer, "choose_kernel", lambda *_: counted)
    models["kernel"] = build_model(config, remat="block")
    prompts = pad_prompts([[3] * 20, [7, 8]], max_prompt_length=20, pad_id=0, index=range(2))
    drawn, grads = {}, {}
    for each, model in models.items():
        sampler = Sampler(model, Sampling(), group_size=2, max_completion_length=12, eos_ids=(5,), pad_id=0)
        drawn[each] = sampler(params, prompts, jax.random.key(0))

        def loss(params, model=model):
            log_probs, _ = completion_log_probs(model, params, drawn["plain"])
            return jnp.where(drawn["plain"].completion_mask, log_probs, 0).sum()

        grads[each] = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_array_equal(drawn["kernel"].completion_ids, drawn["plain"].completion_ids)
    assert np.abs(np.asarray(drawn["kernel"].rollout_log_probs - drawn["plain"].rollout_log_probs)).max() < 1e-4
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads["plain"]))
    chex.assert_trees_all_close(grads["kernel"], grads["plain"], atol=1e-5 * scale)
    assert set(calls) == set(config.windows)


# Selection -----------------------------------------------------------------------------------------------------------

QWEN = from_hf_config(SIZES | {"use_sliding_window": False})


@pytest.mark.parametrize(
    ("kind", "config", "dtype", "expected"),
    [
        ("other", QWEN, jnp.bfloat16, "plain"),
        ("cuda", QWEN, jnp.bfloat16, "cudnn"),
        ("cuda", QWEN, jnp.float32, "plain"),  # with which sampler and trainer agree
        ("cuda", CAPPED, jnp.bfloat16, "plain"),
        ("cuda", replace(QWEN, head_dim=256), jnp.bfloat16, "plain"),
        ("tpu", CAPPED, jnp.bfloat16, "splash"),
        ("tpu", QWEN, jnp.float32, "plain"),
    ],
)
def test_auto_takes_what_the_hardware_has_for_the_model(kind, config, dtype, expected):
    assert resolve_attention("auto", config, dtype, kind) == expected


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("tpu", None, "tpu"),
        ("gpu", "9.0", "cuda"),
        ("gpu", "7.5", "other"),
        ("gpu", "gfx942", "other"),
        ("cpu", None, "other"),
    ],
)
def test_cudnns_attention_needs_ampere(platform, capability, expected):
    device = type("Device", (), {"platform": platform} | ({"compute_capability": capability} if capability else {}))
    assert hardware(device) == expected


def test_the_kernel_of_a_name(monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    monkeypatch.setattr(kernels, "hardware", lambda _: "cuda")
    assert choose_kernel("cudnn", QWEN, jnp.bfloat16, mesh) is cudnn_attention
    monkeypatch.setattr(kernels, "hardware", lambda _: "tpu")
    assert choose_kernel("splash", QWEN, jnp.float32, mesh).keywords == {"mesh": mesh}
    monkeypatch.undo()
    assert choose_kernel("plain", QWEN, jnp.bfloat16, None) is None
    assert choose_kernel("auto", QWEN, jnp.bfloat16, None) is None  # on a CPU


@pytest.mark.parametrize(
    ("name", "config", "dtype", "message"),
    [
        (
            "cudnn",
            QWEN,
            jnp.float32,
            "'cudnn' computes in bfloat16, not float32; use 'plain', which supports",
        ),
        ("cudnn", CAPPED, jnp.bfloat16, "no soft cap"),
        ("cudnn", replace(QWEN, head_dim=20), jnp.bfloat16, "multiple of 8 up to 128, not 20"),
    ],
)
def test_a_kernel_that_does_not_fit_is_refused(name, config, dtype, message):
    with pytest.raises(ValueError, match=message):
        resolve_attention(name, config, dtype, "cuda")


def test_a_model_is_not_built_with_a_kernel_that_does_not_run_here():
    with pytest.raises(ValueError, match=r"'cudnn' does not run here: .* use 'plain'"):
        build_model(QWEN, attention="cudnn")

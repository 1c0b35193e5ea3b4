"""The decoder as pure functions: caching, padding, masks, precision, new parameters."""

import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL, quick_jit, random_params

from grpo_jax.models import build_model, from_hf_config, init_params, param_shapes
from grpo_jax.types import PrefixCache

SIZES = {**SMALL, "num_hidden_layers": 2}
CONFIGS = {
    "llama": from_hf_config({"model_type": "llama", **SIZES}),
    "qwen2": from_hf_config({"model_type": "qwen2", **SIZES, "tie_word_embeddings": True}),
    "gemma3": from_hf_config(
        {"model_type": "gemma3_text", **SIZES, "head_dim": 16, "sliding_window": 4, "sliding_window_pattern": 2}
    ),
}


@pytest.fixture(scope="module", params=["qwen2", "gemma3"])
def decoder(request):
    """A config, its compiled model and random parameters."""
    config = CONFIGS[request.param]
    model = build_model(config)
    return config, dataclasses.replace(model, apply=quick_jit(model.apply)), random_params(config)


def positions_of(mask):
    return jnp.asarray(np.maximum(np.cumsum(np.asarray(mask), axis=1) - 1, 0), jnp.int32)


def random_ids(shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, SMALL["vocab_size"], shape), jnp.int32)


def test_decoding_with_a_cache_equals_the_full_forward_pass(decoder):
    config, model, params = decoder
    B, P, T, C = 3, 6, 5, 13
    ids = random_ids((B, P + T))
    mask = jnp.arange(P + T)[None, :] >= jnp.array([0, 2, 5])[:, None]
    positions = positions_of(mask)
    full, own = model.apply(params, ids, positions, mask)
    cache = model.init_cache(B, C)
    slots = jnp.pad(mask, ((0, 0), (0, C - P - T)))
    hidden, cache = model.apply(params, ids[:, :P], positions[:, :P], slots, cache, 0)
    pieces = [hidden]
    for t in range(P, P + T):
        hidden, cache = model.apply(params, ids[:, t : t + 1], positions[:, t : t + 1], slots, cache, jnp.int32(t))
        pieces.append(hidden)
    error = jnp.abs(jnp.concatenate(pieces, axis=1) - full).max(-1)
    assert jnp.where(mask, error, 0).max() <= 1e-5 * jnp.abs(full).max()
    K, E = config.num_kv_heads, config.head_dim
    assert len(cache) == len(own) == config.num_layers
    for entry, mine in zip(cache, own, strict=True):
        assert entry["keys"].shape == (B, K, E, C)
        assert entry["values"].shape == (B, K, C, E)
        assert (entry["keys"][..., P + T :] == 0).all()
        assert (entry["values"][:, :, P + T :] == 0).all()
        # Without a cache, the call's own keys and values are returned.
        close = partial(np.testing.assert_allclose, atol=1e-5 * np.abs(entry["keys"]).max())
        close(jnp.where(mask[:, None, None], mine["keys"] - entry["keys"][..., : P + T], 0), 0)
        close(jnp.where(mask[:, None, :, None], mine["values"] - entry["values"][:, :, : P + T], 0), 0)


def test_prefixes_come_before_the_calls_own_tokens(decoder):
    """Prompts shared by rows in any order, and a prefix of the completion, against the full forward pass."""
    _, model, params = decoder
    P, T, G = 6, 7, 3
    prompts, completions = random_ids((2, P)), random_ids((2 * G, T)) * 7 % SMALL["vocab_size"]
    mask = jnp.arange(P)[None, :] >= jnp.array([0, 3])[:, None]
    owner = jnp.array([1, 0, 0, 1, 1, 0])
    gather_index, scatter_index = jnp.array([[1, 2, 5, 0, 3, 4]]), jnp.array([[3, 0, 1, 4, 5, 2]])
    whole_mask = jnp.concatenate([mask[owner], jnp.ones((2 * G, T), bool)], axis=1)
    whole = jnp.concatenate([prompts[owner], completions], axis=1)
    full, _ = model.apply(params, whole, positions_of(whole_mask), whole_mask)
    _, prompt = model.apply(params, prompts, positions_of(mask), mask)
    positions = positions_of(whole_mask)[:, P:]
    shared = PrefixCache(prompt, -P, mask, gather_index, scatter_index)
    first, chunk = model.apply(params, completions[:, :4], positions[:, :4], prefixes=[shared])
    prefixes = [dataclasses.replace(shared, start=-P - 4), PrefixCache(chunk, -4), PrefixCache(chunk, 2**30)]
    second, _ = model.apply(params, completions[:, 4:], positions[:, 4:], prefixes=prefixes)
    found = jnp.concatenate([first, second], axis=1)
    assert jnp.abs(found - full[:, P:]).max() <= 1e-5 * jnp.abs(full).max()


def test_rotations_may_be_precomputed(decoder):
    _, model, params = decoder
    ids = random_ids((2, 6))
    positions = jnp.arange(6)[None, :] + jnp.array([[0], [5]])
    plain, _ = model.apply(params, ids, positions)
    rope = model.rope(positions)
    assert all(leaf.shape[:2] == (2, 6) for leaf in jax.tree.leaves(rope))
    np.testing.assert_allclose(model.apply(params, ids, rope)[0], plain, atol=1e-5 * np.abs(plain).max())


def test_block_bounds_change_no_value(decoder):
    config, model, params = decoder
    ids = random_ids((2, 7))
    mask = jnp.arange(7)[None, :] >= jnp.array([0, 4])[:, None]
    plain, _ = model.apply(params, ids, positions_of(mask), mask)
    in_parts = quick_jit(partial(build_model(config).apply, block_bounds=(3, 5)))
    cut, _ = in_parts(params, ids, positions_of(mask), mask)
    difference = jnp.where(mask[:, :, None], cut - plain, 0)
    np.testing.assert_allclose(difference, 0, atol=1e-5 * np.abs(plain).max())


def test_caches_are_joined_column_after_column(decoder):
    _, model, params = decoder
    ids = random_ids((2, 6))
    positions = jnp.arange(6)[None, :] + jnp.zeros((2, 1), jnp.int32)
    _, whole = model.apply(params, ids, positions)
    pieces, prefixes = [], []
    for start in (0, 2, 4):
        prefixes = [PrefixCache(cache, 2 * i - start) for i, cache in enumerate(pieces)]
        _, cache = model.apply(params, ids[:, start : start + 2], positions[:, start : start + 2], prefixes=prefixes)
        pieces.append(cache)
    chex.assert_trees_all_equal(model.first_columns(pieces[0], 2), pieces[0])
    chex.assert_trees_all_close(model.first_columns(whole, 2), pieces[0], atol=1e-4)
    chex.assert_trees_all_close(model.join_columns(pieces, jnp.array([0, 2, 4]), jnp.int32(6)), whole, atol=1e-4)


def test_left_padding_by_any_amount_changes_nothing(decoder):
    _, model, params = decoder
    ids = random_ids((2, 9))
    plain, _ = model.apply(params, ids, positions_of(jnp.ones((2, 9), bool)), jnp.ones((2, 9), bool))
    for padding, filling in ((1, 0), (7, 0), (7, -1), (7, 10**6)):
        padded = jnp.pad(ids, ((0, 0), (padding, 0)), constant_values=filling)
        mask = jnp.arange(9 + padding)[None, :] >= jnp.full((2, 1), padding)
        hidden, _ = model.apply(params, padded, positions_of(mask), mask)
        assert np.abs(hidden[:, padding:] - plain).max() <= 1e-5 * np.abs(plain).max()
        chex.assert_tree_all_finite(hidden)


def test_sequences_packed_into_a_row_are_computed_as_if_each_were_alone(decoder):
    _, model, params = decoder
    ids = random_ids((2, 11))
    lengths = [(4, 5), (7, 4)]  # the first row ends in padding
    segments = np.zeros((2, 11), np.int32)
    positions = np.zeros((2, 11), np.int32)
    for row, (first, second) in enumerate(lengths):
        segments[row, :first], segments[row, first : first + second] = 1, 2
        positions[row, :first], positions[row, first : first + second] = np.arange(first), np.arange(second)
    packed, _ = model.apply(params, ids, jnp.asarray(positions), jnp.asarray(segments))
    chex.assert_tree_all_finite(packed)
    for row, (first, second) in enumerate(lengths):
        for start, length in ((0, first), (first, second)):
            places = jnp.arange(length)[None]
            alone, _ = model.apply(params, ids[row : row + 1, start : start + length], places)
            close = 1e-5 * float(jnp.abs(alone).max())
            np.testing.assert_allclose(packed[row, start : start + length], alone[0], atol=close)


def test_a_token_sees_no_later_one_and_no_masked_one(decoder):
    _, model, params = decoder
    ids = random_ids((1, 8))
    mask = jnp.ones((1, 8), bool).at[0, 2].set(False)
    positions = positions_of(mask)
    plain, _ = model.apply(params, ids, positions, mask)
    later, _ = model.apply(params, ids.at[0, 6].add(1), positions, mask)
    masked, _ = model.apply(params, ids.at[0, 2].add(1), positions, mask)
    np.testing.assert_array_equal(later[0, :6], plain[0, :6])
    assert (later[0, 6:] != plain[0, 6:]).any(-1).all()
    np.testing.assert_array_equal(jnp.delete(masked[0], 2, axis=0), jnp.delete(plain[0], 2, axis=0))


def test_fully_masked_rows_are_finite_forward_and_backward(decoder):
    config, _, params = decoder
    ids = random_ids((2, 5))
    mask = jnp.array([[False] * 5, [False, False, True, True, True]])

    def total(params):
        hidden, _ = build_model(config).apply(params, ids, positions_of(mask), mask)
        return (hidden**2).sum()

    chex.assert_tree_all_finite(quick_jit(jax.value_and_grad(total))(params))


def test_rematerialization_changes_neither_values_nor_gradients():
    config = CONFIGS["qwen2"]
    params = random_params(config)
    ids, mask = random_ids((2, 5)), jnp.ones((2, 5), bool)

    def gradient(remat):
        model = build_model(config, remat=remat)

        def total(params):
            hidden, _ = model.apply(params, ids, positions_of(mask), mask, model.init_cache(2, 5), 0, block_bounds=(2,))
            return (hidden**2).sum()

        return jax.grad(total)

    plain, again = quick_jit(gradient("none"))(params), quick_jit(gradient("block"))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), plain, again)
    assert "remat" in str(jax.make_jaxpr(gradient("block"))(params))
    assert "remat" not in str(jax.make_jaxpr(gradient("none"))(params))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_computes_in_bfloat16_on_parameters_of_either_kind(param_dtype):
    config = CONFIGS["gemma3"]
    model = build_model(config, dtype=jnp.bfloat16)
    ids, mask = random_ids((2, 5)), jnp.ones((2, 5), bool)
    step = partial(model.apply, token_ids=ids, positions=ids, mask=mask, cache=model.init_cache(2, 5), start=0)
    text, shapes = jax.make_jaxpr(step, return_shape=True)(param_shapes(config, param_dtype))
    hidden, cache = shapes
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert "bf16[10,48]" in str(text)
    assert "f32[10,48]" not in str(text).replace("bf16[10,48]", "")


def test_the_embedding_scale_is_rounded_to_the_computing_precision():
    config = dataclasses.replace(CONFIGS["gemma3"], num_layers=0, windows=(), ropes=(), norm_offset=1.0)
    model = build_model(config, dtype=jnp.bfloat16)
    params = random_params(config) | {"final_norm": {"scale": jnp.zeros(32)}}
    hidden, _ = model.apply(params, jnp.array([[5]]), jnp.array([[0]]), jnp.array([[True]]))
    scale = jnp.asarray(32**0.5, jnp.bfloat16)
    x = (params["embed"]["embedding"][5].astype(jnp.bfloat16) * scale).astype(jnp.float32)
    wanted = (x * jax.lax.rsqrt((x**2).mean() + config.norm_epsilon)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(hidden[0, 0], wanted)


def test_the_head_is_the_embedding_where_they_are_tied():
    for name, tied in (("llama", False), ("qwen2", True)):
        params = random_params(CONFIGS[name])
        assert ("lm_head" in params) != tied
        assert build_model(CONFIGS[name]).head(params) is params["embed" if tied else "lm_head"]["embedding"]


def test_the_vocabulary_has_the_size_of_the_head():
    for scalar_head, size in ((False, CONFIGS["llama"].vocab_size), (True, 1)):
        config = dataclasses.replace(CONFIGS["llama"], scalar_head=scalar_head)
        model = build_model(config)
        assert model.vocab_size == model.head(random_params(config)).shape[0] == size


def test_the_cap_of_the_logits_is_passed_on():
    assert build_model(dataclasses.replace(CONFIGS["llama"], logit_softcap=30.0)).logit_softcap == 30.0
    assert build_model(CONFIGS["llama"]).logit_softcap is None


NEW = dataclasses.replace(
    CONFIGS["gemma3"], vocab_size=512, qkv_bias=True, tie_word_embeddings=False, initializer_range=0.25
)


def test_new_parameters(key):
    params = init_params(NEW, key, param_dtype=jnp.bfloat16)
    shapes = param_shapes(NEW, jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes)
    assert params["embed"]["embedding"].shape == (512, 32)
    assert params["lm_head"]["embedding"].shape == (512, 32)
    attention = params["layers_1"]["attention"]
    assert attention["q"]["kernel"].shape == (32, 4, 16)
    assert attention["k"]["kernel"].shape == (32, 2, 16)
    assert attention["o"]["kernel"].shape == (4, 16, 32)
    assert attention["v"]["bias"].shape == (2, 16)
    assert set(params["layers_0"]["mlp"]) == {"gate", "up", "down"}
    assert params["layers_0"]["mlp"]["down"]["kernel"].shape == (48, 32)
    assert np.std(np.asarray(params["embed"]["embedding"], np.float32)) == pytest.approx(0.25, rel=0.03)
    assert not np.asarray(attention["v"]["bias"]).any()
    assert (np.asarray(params["final_norm"]["scale"]) == 0).all()
    plain = init_params(dataclasses.replace(NEW, norm_offset=0.0), key, param_dtype=jnp.bfloat16)
    assert (np.asarray(plain["final_norm"]["scale"]) == 1).all()


def test_new_parameters_depend_on_the_key_and_their_path_alone(key):
    tied, untied = (
        init_params(dataclasses.replace(NEW, tie_word_embeddings=tied), key, param_dtype=jnp.bfloat16)
        for tied in (True, False)
    )
    del untied["lm_head"]
    chex.assert_trees_all_equal(tied, untied)
    kernels = [untied[f"layers_{i}"]["mlp"][name]["kernel"] for i in range(2) for name in ("gate", "up")]
    assert len({np.asarray(kernel).tobytes() for kernel in kernels}) == 4
    other = init_params(NEW, jax.random.key(1), param_dtype=jnp.bfloat16)
    assert (np.asarray(other["embed"]["embedding"]) != np.asarray(tied["embed"]["embedding"])).mean() > 0.9


def test_a_mask_or_a_call_that_does_not_fit_is_refused():
    model = build_model(CONFIGS["llama"])
    params = param_shapes(CONFIGS["llama"])
    ids = jnp.zeros((2, 5), jnp.int32)
    with pytest.raises(ValueError, match="as many columns as the call has tokens: 5, not 6"):
        jax.eval_shape(model.apply, params, ids, ids, jnp.ones((2, 6), bool))
    with pytest.raises(ValueError, match="as many columns as the cache: 8, not 5"):
        jax.eval_shape(model.apply, params, ids, ids, jnp.ones((2, 5), bool), model.init_cache(2, 8), 0)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4 columns"):
        jax.eval_shape(model.apply, params, ids, ids, jnp.ones((2, 4), bool), model.init_cache(2, 4), 0)
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, not float16"):
        build_model(CONFIGS["llama"], dtype=jnp.float16)

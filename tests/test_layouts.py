"""Models whose sizes the axes of a mesh do not divide, on many meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import random_params
from jax.sharding import PartitionSpec as Spec
from layouts import assert_close, config_of, mesh_of, sampled, scored

from grpo_jax.loop.layout_note import uneven_params
from grpo_jax.models import build_model
from grpo_jax.models.head_layout import head_layout
from grpo_jax.sharding import param_shardings

UNEVEN = {
    "vocab_size": 99,
    "hidden_size": 60,
    "intermediate_size": 66,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "layer_types": None,
}
MESHES = [(1, 1, 8), (3, 1, 2)]
FAMILIES = ["llama_longrope"]
EXPECTED = {}


def one_device(case, kind, function):
    """``function``'s result on one device, once."""
    if (case, kind) not in EXPECTED:
        EXPECTED[case, kind] = function(mesh_of(1, 1, 1))
    return EXPECTED[case, kind]


def check_mesh(case, sizes, layout):
    config = config_of(case, **UNEVEN)
    params = random_params(config)

    def run(mesh):
        return scored(config, params, mesh, layout)

    assert_close(run(mesh_of(*sizes)), one_device(case, layout, run))


@pytest.mark.parametrize(
    ("sizes", "layout"), [((1, 2, 4), "padded"), pytest.param((1, 1, 3), "shared", marks=pytest.mark.slow)]
)
def test_a_mesh_that_divides_nothing_gives_the_gradients_of_one_device(sizes, layout):
    check_mesh("qwen2", sizes, layout)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_meshes_give_the_gradients_of_one_device(sizes):
    check_mesh("qwen2", sizes, "padded")


@pytest.mark.slow
@pytest.mark.parametrize("case", FAMILIES)
def test_families_on_a_mesh_that_divides_nothing(case):
    check_mesh(case, (1, 2, 4), "padded")


def test_devices_that_divide_nothing_do_not_change_the_samples():
    config = config_of("qwen2", **UNEVEN)
    params = random_params(config)
    expected = one_device("qwen2", "sampled", lambda mesh: sampled(config, params, mesh, 1))
    found = sampled(config, params, mesh_of(1, 2, 4), 4)
    assert np.array_equal(found.completion_ids, expected.completion_ids)
    np.testing.assert_allclose(found.rollout_log_probs, expected.rollout_log_probs, atol=1e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "repeats", "on_device"),
    [(14, 2, 2, 1, (7, 1)), (14, 2, 8, 4, (2, 1)), (16, 2, 8, 4, (2, 1)), (12, 4, 6, 3, (2, 2)), (6, 6, 4, 2, (3, 3))],
)
def test_heads_are_repeated_and_padded_until_they_divide(heads, kv_heads, tensor, repeats, on_device):
    config = config_of("llama2", hidden_size=heads * 4, num_attention_heads=heads, num_key_value_heads=kv_heads)
    layout = head_layout(config, mesh_of(1, 1, tensor))
    assert layout.repeats == repeats
    assert (kv_heads * layout.padded_group // tensor, layout.kv_heads // tensor) == on_device
    queries = jnp.arange(1.0, heads + 1)[None, None, :, None]
    padded = layout.queries(queries)
    assert np.array_equal(layout.restored(padded), queries)
    keys = jnp.arange(float(kv_heads))[None, None, :, None]
    served = jnp.repeat(layout.keys(keys), padded.shape[2] // layout.kv_heads, axis=2)
    assert layout.restored(served).ravel().tolist() == np.repeat(np.arange(kv_heads), heads // kv_heads).tolist()


def test_the_header_says_how_heads_are_repeated():
    config = config_of("llama2", hidden_size=56, num_attention_heads=14, num_key_value_heads=2)
    assert head_layout(config, mesh_of(1, 1, 2)).description == ""
    described = head_layout(config, mesh_of(1, 1, 8)).description
    assert described == "2 KV heads repeated 4 times, 14 query heads padded to 16"


def test_the_cache_of_the_sampler_holds_a_part_of_the_heads_on_each_device():
    config = config_of("qwen2", **UNEVEN)
    cache = jax.eval_shape(lambda: build_model(config, mesh=mesh_of(1, 1, 4)).init_cache(2, 8))
    assert cache[0]["keys"].shape[1] == 4  # of 2 KV heads, each twice: one a device


def test_axes_that_do_not_divide_split_another_dimension_or_nothing():
    params = random_params(config_of("qwen2", **UNEVEN))
    shardings = param_shardings(params, mesh_of(1, 2, 3))
    assert shardings["embed"]["embedding"].spec == Spec("tensor", "fsdp")
    attention = shardings["layers_0"]["attention"]
    assert attention["q"]["kernel"].spec == Spec("fsdp", "tensor", None)
    assert attention["k"]["kernel"].spec == Spec(("fsdp", "tensor"), None, None)
    assert attention["k"]["bias"].spec == Spec(None, None)
    assert uneven_params(params, mesh_of(1, 2, 3)) == (
        "tensor 3 splits another dimension of attention/k (2), attention/v (2)"
    )
    assert uneven_params(params, mesh_of(1, 8, 1)).startswith("replicated over fsdp 8: embed (60), attention/k (60), ")
    assert uneven_params(params, mesh_of(2, 2, 2)) == "tensor 2 splits another dimension of embed (99)"
    assert uneven_params(params, mesh_of(8, 1, 1)) == ""
    assert uneven_params(params, mesh_of(1, 2, 1, context=4)).startswith("replicated over context 4: embed (60), ")

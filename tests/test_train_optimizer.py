"""Optimizers by name: which arrays they update how, and where their state lies on a mesh."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from published import PUBLISHED, shrunk

from grpo_jax.config.training import OPTIMIZERS, OptimizerConfig
from grpo_jax.models import from_hf_config, param_shapes
from grpo_jax.models.config import with_layers
from grpo_jax.sharding import make_mesh, param_shardings, replicated
from grpo_jax.train import init_state, make_train_step, muon, opt_state_shardings
from grpo_jax.types import Mean

OTHERS = ("optax:adabelief", "optax.contrib:muon", "optax.contrib:schedule_free_adamw")
VECTORS = ("scale", "bias")


def quadratic(params, batch):
    """Each parameter is pulled to 1, with different forces along its first axis, so that gradients have a rank."""

    def pull(x):
        forces = 1 + jnp.arange(x.shape[0], dtype=jnp.float32)
        return (forces.reshape(-1, *[1] * (x.ndim - 1)) * (x - 1) ** 2).sum()

    total = sum(map(pull, jax.tree.leaves(params))) * batch.sum()
    return Mean(total, batch.sum()), {}


def stepped(params, optimizer, mesh, steps=2):
    placed = jax.device_put(jax.tree.map(jnp.copy, params), param_shardings(params, mesh))
    state = init_state(placed, optimizer, with_reference=False, replicated=replicated(mesh))
    before = jax.tree.map(lambda x: x.sharding, state)
    step = make_train_step(quadratic, optimizer)
    for _ in range(steps):
        state, _ = step(state, jnp.ones(4))
    assert jax.tree.map(lambda x: x.sharding, state) == before
    return state


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_on_a_mesh_updates_are_those_of_one_device_and_moments_lie_with_their_parameters(tiny, name):
    _, params = tiny
    optimizer, _ = OptimizerConfig(optimizer=name, learning_rate=1e-2, warmup_updates=0).build(total_updates=10)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharded = stepped(params, optimizer, mesh)
    chex.assert_trees_all_close(
        jax.device_get(sharded.params), jax.device_get(stepped(params, optimizer, make_mesh(data=1)).params), atol=1e-5
    )
    assert not np.allclose(sharded.params["embed"]["embedding"], params["embed"]["embedding"])
    large = [x for x in jax.tree.leaves(sharded.opt_state) if x.shape == (32, 32)]  # moments of the embedding
    assert name == "adafactor" or large  # which has rows and columns only of larger matrices
    assert all(x.sharding.shard_shape(x.shape) == (16, 16) for x in large)


def test_the_layout_of_a_state_follows_paths_and_shapes():
    mesh = make_mesh(data=1, fsdp=8)
    params = {"embed": {"embedding": jnp.zeros((16, 8))}, "norm": {"scale": jnp.zeros(8)}}
    shardings = param_shardings(params, mesh)
    of_embedding, everywhere = shardings["embed"]["embedding"], replicated(mesh)
    state = {
        "moments": params,
        "rows": {"embed": {"embedding": jnp.zeros(16)}},  # of another shape
        "other": jnp.zeros((16, 8)),  # of another path
        "masked": {"embed": optax.MaskedNode()},
        "count": jnp.int32(0),
    }
    found = opt_state_shardings(state, params, shardings, everywhere)
    assert found["moments"] == shardings
    assert found["rows"]["embed"]["embedding"] == found["other"] == found["count"] == everywhere
    assert of_embedding != everywhere


def test_muon_orthogonalizes_the_matrices_of_attention_and_mlp_and_nothing_else(tiny):
    _, params = tiny
    optimizer = muon(1.0, consistent_rms=None, ns_steps=12)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own functions
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    matrices = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        kind, array = name.split("/")[-2:]
        if array != "kernel":
            sizes = np.abs(update)  # Adam's first update has the signs of the gradient
            np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-3)
            continue
        matrices += 1
        # The heads of q, k and v are columns of one matrix, and those of o its rows.
        matrix = update.reshape(update.shape[0], -1) if kind in "qkv" or update.ndim == 2 else update
        matrix = matrix.reshape(-1, update.shape[-1]) if kind == "o" else matrix
        singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
        assert singular.max() / singular.min() < 2, name  # of the gradients it is far above
    assert matrices == 7 * sum(name.startswith("layers_") for name in params)


def test_weight_decay_spares_vectors(tiny):
    _, params = tiny
    for name in ("adamw", "lion", "muon"):
        config = OptimizerConfig(optimizer=name, learning_rate=0.1, weight_decay=0.5, warmup_updates=0)
        optimizer, _ = config.build(total_updates=1)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            zeros = jax.tree.map(jnp.zeros_like, params)
            updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        for path, update in jax.tree_util.tree_leaves_with_path(updates):
            is_vector = path[-1].key in VECTORS
            is_adams = name == "muon" and path[-1].key != "kernel"  # which optax does not decay
            assert (float(jnp.abs(update).max()) == 0) == (is_vector or is_adams), path


def test_muon_orthogonalizes_each_expert_and_the_heads_of_latent_attention():
    config = from_hf_config(shrunk(PUBLISHED["DeepSeek-V3"]))
    params = param_shapes(with_layers(config, config.kinds[-1:]))
    params = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    optimizer = muon(1.0, consistent_rms=None, ns_steps=12)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # optax's own functions
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    attention, mlp = updates["layers_0"]["attention"], updates["layers_0"]["mlp"]
    matrices = [np.asarray(x) for name in ("gate", "up", "down") for x in mlp["experts"][name]]
    matrices += [attention[name].reshape(attention[name].shape[0], -1) for name in ("k_b", "v_b")]
    matrices += [attention["q_a"]["kernel"], attention["kv_a"]["kernel"], mlp["shared"]["up"]["kernel"]]
    matrices += [attention["q_b"]["kernel"].reshape(attention["q_b"]["kernel"].shape[0], -1)]
    assert len(matrices) == 3 * config.experts.count + 6
    for matrix in matrices:
        singular = np.linalg.svd(matrix, compute_uv=False)
        assert singular.max() / singular.min() < 3
    for by_adam in (mlp["router"]["kernel"], updates["embed"]["embedding"]):
        np.testing.assert_allclose(np.abs(by_adam), np.abs(by_adam).max(), rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["adamw(moments='8bit')", "lion", "muon", "adafactor(weight_decay_rate=0.1)", "optax:adamw"]
)
def test_no_optimizer_changes_the_bias_of_the_choice_or_decays_the_biases_of_experts(name):
    biases = {"selection_bias": jnp.ones(4), "experts": {"up_bias": jnp.ones((4, 8))}}
    params = {"layers_0": {"mlp": {**biases, "up": {"kernel": jnp.ones((8, 8))}}}}
    config = OptimizerConfig(optimizer=name, learning_rate=0.1, warmup_updates=0)
    config = replace(config, weight_decay=0.5) if "adafactor" not in name else config
    optimizer, _ = config.build(total_updates=1)
    grads = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
    mlp = updates["layers_0"]["mlp"]
    assert not mlp["selection_bias"].any()
    assert mlp["up"]["kernel"].any()
    # Those that are not ours decay all that they are given.
    assert mlp["experts"]["up_bias"].any() == (":" in name or "adafactor" in name)


def test_muon_refuses_parameters_without_its_matrices():
    with pytest.raises(ValueError, match="muon: no parameter is a matrix of attention"):
        muon(1e-3).init({"w": jnp.zeros((4, 4))})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.GradientTransformation(lambda params: params["head"], None), "cannot update these .* KeyError: 'head'"),
        (optax.contrib.reduce_on_plateau(), "cannot update these parameters: TypeError: .*'value'"),
        (optax.GradientTransformation(lambda params: (), lambda *_: (jnp.zeros(2), ())), "shapes than the parameters"),
        (optax.GradientTransformation(lambda params: (), lambda grads, *_: (grads, jnp.zeros(1))), "than the state"),
    ],
)
def test_an_optimizer_without_a_usable_state_is_refused(optimizer, message):
    params = {"w": jnp.zeros(3)}
    with pytest.raises(ValueError, match=message):
        init_state(params, optimizer, with_reference=False, replicated=replicated(make_mesh()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "optax:constant_schedule",
            "optimizer optax:constant_schedule returned a function; it must return an optax.Gr",
        ),
        ("tests.test_train_optimizer:failing", "optimizer tests.test_train_optimizer:failing failed: KeyError: 'b3'"),
        ("adamw(moments='4bit')", "moments is '4bit'; it must be one of float32, bfloat16, 8bit"),
    ],
)
def test_what_is_not_an_optimizer_is_refused_with_the_settings(name, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(optimizer=name)


def test_what_needs_more_than_gradients_is_refused_before_a_model_is_loaded():
    with pytest.raises(ValueError, match=r"optimizer is optax.contrib:momo: the optimizer cannot update .*'value'"):
        OptimizerConfig(optimizer="optax.contrib:momo").check()
    OptimizerConfig(optimizer="muon").check()


def failing(learning_rate):
    return {}["b3"]

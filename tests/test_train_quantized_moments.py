"""Moments in 8 bits and bfloat16: rounding, beside exact Adam, on a mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.sharding import make_mesh, param_shardings, replicated
from grpo_jax.train import adamw, init_state, make_train_step, scale_by_quantized_adam
from grpo_jax.train.quantized_moments import dequantized, quantized
from grpo_jax.types import Mean

SHAPES = {"embed": {"embedding": (32, 256)}, "final_norm": {"scale": (256,)}}


def random_params(seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )


def steps_of(optimizer, grads_of, num_steps):
    """Updates and states of a sequence of gradients."""

    @jax.jit
    def step(grads, state):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state)

    state = optimizer.init(grads_of(0))
    for number in range(num_steps):
        updates, state = step(grads_of(number), state)
        yield updates, state


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
def test_rounding_is_to_the_two_nearest_levels_and_right_on_average(dtype):
    rng = np.random.default_rng(0)
    x = rng.uniform(0.5, 1, (3, 300)) * 2.0 ** rng.integers(-10, 1, (3, 300))  # 300: the last block is not full
    x *= rng.choice([-1, 1], x.shape)
    x = jnp.asarray(x if dtype == jnp.int8 else np.abs(x), jnp.float32).at[0, 5].set(0)
    levels, scales = quantized(x, jax.random.key(0), dtype)
    assert (levels.dtype, levels.shape, scales.shape) == (dtype, (3, 300), (3, 3))
    back = dequantized(levels, scales)
    np.testing.assert_allclose(back, x, rtol=0.096)
    assert back[0, 5] == 0
    largest = jnp.abs(x[:, :128]).argmax(1)
    assert (back[jnp.arange(3), largest] == x[jnp.arange(3), largest]).all()
    many = jax.vmap(lambda key: dequantized(*quantized(x, key, dtype)))(jax.random.split(jax.random.key(1), 2000))
    np.testing.assert_allclose(many.mean(0), x, rtol=0.01)
    assert not np.allclose(many[0], x, rtol=0.02)


def test_below_the_smallest_level_a_second_moment_is_not_zero():
    x = jnp.array([[1.0, 2.0**-33, 1e-30, 0.0]])
    seconds = dequantized(*quantized(x, jax.random.key(0), jnp.uint8))
    np.testing.assert_allclose(seconds, [[1, 2.0**-32, 2.0**-32, 0]], rtol=1e-3)
    firsts = dequantized(*quantized(-x, jax.random.key(0), jnp.int8))
    np.testing.assert_allclose(firsts, [[-1, 0, 0, 0]])
    zeros = quantized(jnp.zeros((2, 8)), jax.random.key(0), jnp.uint8)
    assert not dequantized(*zeros).any()


def test_second_moments_follow_gradients_that_change_less_than_a_level_per_update():
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(128) < 64, 1.0, 0.1)  # of gradients after update 100; before, all are 0.1

    def grads(number):
        return jnp.asarray(rng.normal(size=(64, 128)) * (scale if number >= 100 else 0.1), jnp.float32)

    _, state = list(steps_of(scale_by_quantized_adam(b2=0.99), grads, 300))[-1]
    found = dequantized(state.nu, state.nu_scales)
    expected = (1 - 0.99**200) * scale**2 + (0.99**200 - 0.99**300) * 0.1**2
    for part in (slice(0, 64), slice(64, 128)):
        np.testing.assert_allclose(found[:, part].mean(), expected[part].mean(), rtol=0.02)


def test_updates_are_close_to_exact_adam():
    params = random_params()

    def grads(number):
        noise = random_params(number + 1)
        return jax.tree.map(lambda x, n: 0.01 * (x + n), params, noise)

    def total(optimizer):
        return jax.tree.map(lambda *xs: sum(xs), *(updates for updates, _ in steps_of(optimizer, grads, 30)))

    exact, quantized_sum = total(optax.scale_by_adam()), total(scale_by_quantized_adam())
    np.testing.assert_allclose(quantized_sum["final_norm"]["scale"], exact["final_norm"]["scale"], rtol=1e-4)
    ours, theirs = (x["embed"]["embedding"] for x in (quantized_sum, exact))
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)
    assert np.abs(ours - theirs).max() < 0.2 * np.abs(theirs).max()


@pytest.mark.parametrize("size", [0.0, 1e-12, 1e12])
def test_of_zero_tiny_and_huge_gradients_it_makes_what_adam_makes(size):
    signs = jnp.sign(random_params()["embed"]["embedding"])
    (ours, _), (theirs, _) = (
        list(steps_of(each, lambda _: size * signs, 2))[-1]
        for each in (scale_by_quantized_adam(), optax.scale_by_adam())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)


def quadratic(params, batch):
    total = sum(((x - 1) ** 2).sum() for x in jax.tree.leaves(params))
    return Mean(total * batch.sum(), batch.sum()), {}


@pytest.mark.parametrize("moments", ["bfloat16", "8bit"])
def test_on_a_mesh_moments_and_scales_lie_with_their_parameters(moments):
    optimizer = adamw(1e-2, moments=moments)
    states = []
    for mesh in (make_mesh(data=2, fsdp=2, tensor=2), make_mesh(data=1)):
        params = random_params()
        placed = jax.device_put(params, param_shardings(params, mesh))
        state = init_state(placed, optimizer, with_reference=False, replicated=replicated(mesh))
        before = jax.tree.map(lambda x: x.sharding, state)
        step = make_train_step(quadratic, optimizer)
        for _ in range(3):
            state, _ = step(state, jnp.ones(4))
        assert jax.tree.map(lambda x: x.sharding, state) == before
        states.append(state)
    chex.assert_trees_all_close(*(jax.device_get(state.params) for state in states), atol=1e-5)
    sharded = states[0]
    adam = sharded.opt_state[0]
    embedding = sharded.params["embed"]["embedding"]
    assert embedding.sharding.shard_shape((32, 256)) == (16, 128)
    assert adam.mu["embed"]["embedding"].sharding == adam.nu["embed"]["embedding"].sharding == embedding.sharding
    sizes = {name: sum(x.nbytes for x in jax.tree.leaves(getattr(adam, name)["embed"])) for name in ("mu", "nu")}
    if moments == "bfloat16":
        assert sizes == {"mu": 2 * 32 * 256, "nu": 4 * 32 * 256}
    else:
        assert sizes == {"mu": 32 * 256, "nu": 32 * 256}
        scales = adam.mu_scales["embed"]["embedding"]
        assert scales.shape == (32, 2)
        assert scales.sharding.shard_shape(scales.shape) == (16, 1)
        assert adam.mu["final_norm"]["scale"].dtype == jnp.float32

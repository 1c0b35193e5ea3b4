"""Meshes and shardings."""

import chex
import jax
import jax.numpy as jnp
import pytest
from conftest import TINY
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.models import build_model, from_hf_config, init_params
from grpo_jax.sharding import (
    BATCH,
    ROLLOUT_RULES,
    bytes_on_devices,
    divisors,
    make_mesh,
    make_reshard,
    param_shardings,
    rollout_mesh,
    rollout_steps,
    shard_rows,
    take_rows,
)


def test_mesh_takes_the_devices_that_are_left():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "expert": 1, "context": 1, "tensor": 1}
    assert dict(make_mesh(data=1, tensor=2).shape) == {"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2}
    assert make_mesh(data=1).size == 1


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, r"does not divide the 8 devices.*\[1, 2, 4, 8\]"),
        ({"data": 4, "fsdp": 4}, "takes 16 devices; there are 8"),
        ({"tensor": 0}, "at least 1"),
        ({"data": 0}, "at least 1"),
    ],
)
def test_mesh_that_does_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_every_parameter_has_a_place(tiny):
    _, params = tiny
    shardings = param_shardings(params, make_mesh(data=2, fsdp=2, tensor=2))
    layer = shardings["layers_1"]
    assert layer["attention"]["q"]["kernel"].spec == PartitionSpec("fsdp", "tensor", None)
    assert layer["attention"]["o"]["kernel"].spec == PartitionSpec("tensor", None, "fsdp")
    assert layer["mlp"]["down"]["kernel"].spec == PartitionSpec("tensor", "fsdp")
    assert layer["attention_norm"]["scale"].spec == PartitionSpec()
    assert shardings["embed"]["embedding"].spec == PartitionSpec("tensor", "fsdp")


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ValueError, match="router/weights: no sharding rule"):
        param_shardings({"router": {"weights": jnp.zeros((2, 2))}}, make_mesh(data=1))


def test_rows_lie_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    x = shard_rows({"x": jnp.zeros((8, 3))}, mesh)["x"]
    assert x.sharding.shard_shape(x.shape) == (2, 3)
    with pytest.raises(ValueError, match="6 rows do not divide over data x fsdp = 4"):
        shard_rows(jnp.zeros((6, 3)), mesh)


def test_mesh_of_given_devices():
    mesh = make_mesh(devices=jax.devices()[3:5])
    assert [device.id for device in mesh.devices.flat] == [3, 4]


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_rows_are_taken_within_each_devices_part():
    x = jnp.arange(12).reshape(6, 2)
    assert take_rows(x, jnp.array([[2, 0], [1, 1]])).tolist() == [[4, 5], [0, 1], [8, 9], [8, 9]]
    assert take_rows(x[:, 0], jnp.array([[5]])).tolist() == [10]


def test_taking_rows_moves_none_between_devices():
    mesh = make_mesh(data=4, fsdp=2)
    x = shard_rows(jnp.arange(32.0).reshape(16, 2), mesh)
    rows = shard_rows(jnp.zeros((8, 1), jnp.int32), mesh)
    program = jax.jit(take_rows, out_shardings=NamedSharding(mesh, BATCH)).lower(x, rows).compile()
    assert program(x, rows).tolist() == x[::2].tolist()
    assert not any(name in program.as_text() for name in ("all-gather", "all-to-all", "collective-permute"))


def test_parameters_are_moved_from_the_training_to_the_rollout_layout(tiny):
    _, params = tiny
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    trained = jax.device_put(params, param_shardings(params, mesh))
    wanted = param_shardings(params, mesh, ROLLOUT_RULES)
    moved = make_reshard(wanted, jnp.float32)(trained)
    chex.assert_trees_all_equal(moved, params)
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), moved, wanted))
    kernel = moved["layers_0"]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor", None)
    assert "fsdp" not in str([x.sharding.spec for x in jax.tree.leaves(moved)])
    assert bytes_on_devices(moved) > 1.9 * bytes_on_devices(trained)
    small = make_reshard(wanted, jnp.bfloat16)(trained)
    assert {x.dtype for x in jax.tree.leaves(small) if x.ndim > 1} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(small) if x.ndim == 1} == {jnp.dtype(jnp.float32)}
    assert bytes_on_devices(moved) / 2 <= bytes_on_devices(small) < 0.52 * bytes_on_devices(moved)


@pytest.mark.parametrize(("sizes", "tensor"), [({"data": 1, "fsdp": 8}, 2), ({"data": 2, "fsdp": 2, "tensor": 2}, 4)])
def test_the_sampler_has_the_heads_of_a_model_on_more_devices_than_training(sizes, tensor, capfd):
    config = from_hf_config(TINY | {"num_key_value_heads": 4})
    params = init_params(config, jax.random.key(0))
    mesh = make_mesh(**sizes)
    sampling = rollout_mesh(mesh, tensor)
    assert dict(sampling.shape) == {"data": 8 // tensor, "fsdp": 1, "expert": 1, "context": 1, "tensor": tensor}
    assert list(sampling.devices.flat) == list(mesh.devices.flat)
    trained = jax.device_put(params, param_shardings(params, mesh))
    wanted = param_shardings(params, sampling, ROLLOUT_RULES)
    capfd.readouterr()
    moved = make_reshard(wanted, jnp.float32, steps=[rollout_steps(params, mesh, tensor)])(trained)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    chex.assert_trees_all_equal(moved, params)
    assert jax.tree.all(jax.tree.map(lambda x, sharding: x.sharding.is_equivalent_to(sharding, x.ndim), moved, wanted))
    assert bytes_on_devices(moved) < 1.1 * 8 / tensor * bytes_on_devices(jax.device_put(params, jax.devices()[0]))


def test_a_layout_of_the_sampler_that_does_not_fit_the_mesh():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert rollout_mesh(mesh, 2) is mesh
    for tensor in (0, 1, 3, 8):
        with pytest.raises(ValueError, match=r"multiple of mesh.tensor = 2 that divides mesh.fsdp x mesh.tensor = 4"):
            rollout_mesh(mesh, tensor)


def test_parameters_that_lie_right_already_are_not_copied(tiny):
    _, params = tiny
    mesh = make_mesh(data=8)
    trained = jax.device_put(params, param_shardings(params, mesh))
    moved = make_reshard(param_shardings(params, mesh, ROLLOUT_RULES), jnp.float32)(trained)
    assert moved is trained


@pytest.mark.slow
def test_activations_lie_as_the_batch_does_not_as_the_parameters(capfd):
    """Without constraints, the compiler shards the residual stream like the embedding: each device then has a part of
    every sequence, and the MLP's activations of all of them."""
    config = from_hf_config(TINY | {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 256})
    shapes = init_params(config, jax.random.key(0))
    temporary, results = {}, {}
    for sizes, most in (((1, 8, 1), 0.5), ((2, 2, 2), 0.8)):
        mesh = make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
        params = jax.device_put(shapes, param_shardings(shapes, mesh))
        ids = shard_rows(jax.random.randint(jax.random.key(0), (32, 64), 0, 512), mesh)
        capfd.readouterr()
        for constrain in (mesh, None):
            model = build_model(config, mesh=constrain)

            def loss(params, ids, model=model):
                return (model.apply(params, ids, ids)[0] ** 2).sum()

            program = jax.jit(jax.value_and_grad(loss)).lower(params, ids).compile()
            temporary[constrain is not None] = program.memory_analysis().temp_size_in_bytes
            results[constrain is not None] = program(params, ids)
            if constrain is not None:
                assert "Involuntary full rematerialization" not in capfd.readouterr().err
        assert temporary[True] < most * temporary[False]
        chex.assert_trees_all_close(results[True], results[False], atol=2e-3)

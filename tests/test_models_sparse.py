"""Decoders with experts in training: rematerialization, and meshes that they cannot be computed on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL, random_params
from published import PUBLISHED, shrunk

from grpo_jax.loop.layout_note import uneven_params
from grpo_jax.models import build_model, from_hf_config
from grpo_jax.models.kernels import resolve_attention
from grpo_jax.models.mesh_checks import check_rollout_tensor
from grpo_jax.sharding import make_mesh
from grpo_jax.train import packed_log_probs
from grpo_jax.types import Packed

SPARSE = from_hf_config(shrunk(PUBLISHED["Qwen3-30B-A3B"]))
LATENT = from_hf_config(shrunk(PUBLISHED["DeepSeek-V3"]))
SINKS = from_hf_config(shrunk(PUBLISHED["gpt-oss-20b"]))


def test_recomputed_experts_have_the_same_gradients():
    ids = jnp.arange(16).reshape(2, 8) % 32
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    packed = Packed(ids, jnp.ones_like(ids), positions, jnp.ones((2, 8), bool))
    params, found = random_params(SPARSE), []
    for remat, scan_layers in (("none", False), ("block", False), ("block", True)):
        model = build_model(SPARSE, remat=remat, scan_layers=scan_layers)

        def loss(params, model=model):
            return packed_log_probs(model, model.preparation.prepare(params), packed).sum()

        found.append(jax.jit(jax.grad(loss))(params))
    for other in found[1:]:
        for x, y in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(y, x, atol=2e-5 * float(np.abs(x).max() + 1))


def test_meshes_that_do_not_divide_experts_are_refused():
    six = replace(SPARSE, experts=replace(SPARSE.experts, count=6))
    build_model(six, mesh=make_mesh(data=4, expert=2))
    build_model(from_hf_config({"model_type": "llama", **SMALL}), mesh=make_mesh(data=1, expert=4, tensor=2))
    message = "6 experts do not divide over mesh.expert 4 x mesh.tensor 2 = 8 devices; mesh.expert 3 x mesh.tensor 2"
    with pytest.raises(ValueError, match=message):
        build_model(six, mesh=make_mesh(data=1, expert=4, tensor=2))
    with pytest.raises(ValueError, match=r"4 = 4 devices; mesh.expert 1 x mesh.tensor 2 does"):
        build_model(six, mesh=make_mesh(data=2, tensor=4))
    check_rollout_tensor(six, 3)
    check_rollout_tensor(LATENT, 2)
    with pytest.raises(ValueError, match=r"6 experts do not divide over mesh.rollout_tensor 4; 2 does"):
        check_rollout_tensor(six, 4)


@pytest.mark.parametrize(("config", "name"), [(LATENT, "latent attention"), (SINKS, "attention sinks")])
def test_attention_of_other_kinds_has_no_kernel_and_no_context(config, name):
    with pytest.raises(ValueError, match=f"mesh.context is 2, and this model has {name}"):
        build_model(config, mesh=make_mesh(data=4, context=2))
    for kind, kernel in (("cuda", "cudnn"), ("tpu", "splash")):
        assert resolve_attention("auto", config, jnp.bfloat16, kind) == "plain"
        with pytest.raises(
            ValueError, match=f"attention '{kernel}' has no.*; use 'plain'|attention '{kernel}' has keys"
        ):
            resolve_attention(kernel, config, jnp.bfloat16, kind)


def test_experts_that_an_axis_does_not_split_are_named():
    shapes = {"layers_0": {"mlp": {"experts": {"gate": jax.ShapeDtypeStruct((8, 30, 15), jnp.float32)}}}}
    assert uneven_params(shapes, make_mesh(data=1, fsdp=2, expert=4)) == ""
    assert (
        uneven_params(shapes, make_mesh(data=2, fsdp=4)) == "fsdp 4 splits another dimension of mlp/experts/gate (30)"
    )

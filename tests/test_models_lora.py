"""LoRA adapters of a decoder: exact at zero, applied as merged, gradients by the chain rule, PEFT, refusals."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.loss import supervised_loss
from grpo_jax.models import (
    LoRA,
    add_adapters,
    build_model,
    from_hf_config,
    from_pretrained,
    merge_adapters,
    param_shapes,
    save_adapters,
)
from grpo_jax.models.preparation import STACKED
from grpo_jax.sharding import ROLLOUT_RULES, make_mesh, make_reshard, param_shardings, replicated, shard_rows
from grpo_jax.train import init_state, make_train_step, packed_log_probs, trainable_part, with_fresh_reference
from grpo_jax.train.step import reference_params
from grpo_jax.train.trainable import with_frozen, without_frozen
from grpo_jax.types import Packed
from tests.conftest import TINY

CONFIG = from_hf_config(TINY)
IDS = jnp.arange(24).reshape(2, 12) % 32
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))
RANK = LoRA(rank=4, alpha=8.0)


def adapted(params, lora=RANK, **options):
    params = jax.tree.map(jnp.copy, params)  # a train step donates them
    return add_adapters(params, CONFIG, lora, jax.random.key(2), dtype=jnp.float32, **options)


def moved(params):
    """Adapters whose B is no longer zero."""

    def move(path, x):
        noise = jax.random.normal(jax.random.key(len(jax.tree_util.keystr(path))), x.shape)
        return x + 0.05 * noise if path[-1].key == "kernel_lora_b" else x

    return jax.tree.map_with_path(move, params)


def hidden(model, params):
    return jax.jit(model.apply)(params, IDS, POSITIONS)[0]


def batch():
    return Packed(
        token_ids=IDS, segment_ids=jnp.ones_like(IDS), positions=POSITIONS, loss_mask=jnp.ones(IDS.shape, bool)
    )


def loss_of(model):
    return lambda params, packed: (supervised_loss(packed_log_probs(model, params, packed), packed.loss_mask), {})


def gradient(model, params):
    """Of the mean loss by all floating-point parameters."""
    return jax.jit(jax.grad(lambda params: loss_of(model)(params, batch())[0].value))(params)


def test_new_adapters_leave_the_model_as_it_is(tiny):
    model, params = tiny
    lora = build_model(CONFIG, lora=RANK)
    np.testing.assert_array_equal(hidden(lora, adapted(params)), hidden(model, params))
    assert np.abs(hidden(lora, moved(adapted(params))) - hidden(model, params)).max() > 0.01


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_merged_and_applied_adapters_agree(tiny, quantize):
    model, params = tiny
    lora = replace(RANK, quantize=quantize)
    params = moved(adapted(params, lora))
    merged = merge_adapters(params, CONFIG, lora)
    assert jax.tree.structure(merged) == jax.tree.structure(param_shapes(CONFIG))
    applied = hidden(build_model(CONFIG, lora=lora), params)
    np.testing.assert_allclose(applied, hidden(model, merged), atol=2e-6 * float(np.abs(applied).max()))


@pytest.mark.parametrize(("quantize", "most"), [("int8", 0.01), ("int4", 0.15), ("nf4", 0.15)])
def test_quantized_matrices_are_close_to_their_values(tiny, quantize, most):
    _, params = tiny
    lora = replace(RANK, quantize=quantize)
    quantized = adapted(params, lora)
    kernel = quantized["layers_0"]["attention"]["o"]["kernel"]
    assert kernel["qvalue"].dtype.itemsize == 1
    restored = merge_adapters(quantized, CONFIG, lora)["layers_1"]
    for block, name in (("attention", "q"), ("attention", "o"), ("mlp", "down")):
        before, after = params["layers_1"][block][name]["kernel"], restored[block][name]["kernel"]
        error = jnp.linalg.norm(after - before) / jnp.linalg.norm(before)
        assert 0 < error < most, (name, error)


def test_gradients_follow_from_that_of_the_whole_matrix(tiny):
    """With W' = W + s A B: dA = s dW' B^T and dB = s A^T dW'."""
    model, params = tiny
    params = moved(adapted(params))
    of_matrices = gradient(model, merge_adapters(params, CONFIG, RANK))
    of_adapters = gradient(build_model(CONFIG, lora=RANK), params)
    for block, name in (("attention", "q"), ("attention", "v"), ("attention", "o"), ("mlp", "gate"), ("mlp", "down")):
        module, found = params["layers_0"][block][name], of_adapters["layers_0"][block][name]
        a, b = module["kernel_lora_a"], module["kernel_lora_b"]
        whole = of_matrices["layers_0"][block][name]["kernel"].reshape(a.shape[0], b.shape[1])
        scale = float(jnp.abs(whole).max())
        np.testing.assert_allclose(found["kernel_lora_a"], 2.0 * whole @ b.T, atol=1e-5 * scale)
        np.testing.assert_allclose(found["kernel_lora_b"], 2.0 * a.T @ whole, atol=1e-5 * scale)


def test_a_step_of_full_rank_is_a_full_step(tiny):
    """With A orthonormal and square, a step of gradient descent on B moves W by s^2 times that on W itself."""
    model, params = tiny
    lora = LoRA(rank=32, alpha=32.0, targets=("attention/q",))
    params = adapted(params, lora)
    for layer in ("layers_0", "layers_1"):
        module = params[layer]["attention"]["q"]
        module["kernel_lora_a"] = jnp.linalg.qr(module["kernel_lora_a"])[0]
    before = merge_adapters(params, CONFIG, lora)
    full = gradient(model, before)
    step = make_train_step(loss_of(build_model(CONFIG, lora=lora)), optax.sgd(0.5))
    state = init_state(params, optax.sgd(0.5), with_reference=False, replicated=replicated(make_mesh(data=1)))
    after = merge_adapters(step(state, batch())[0].params, CONFIG, lora)
    for layer in ("layers_0", "layers_1"):
        old, new = (tree[layer]["attention"]["q"]["kernel"] for tree in (before, after))
        np.testing.assert_allclose(new - old, -0.5 * full[layer]["attention"]["q"]["kernel"], atol=1e-6)


def test_state_reference_and_checkpoint_have_one_base(tiny):
    _, params = tiny
    params = adapted(params)
    base = np.asarray(params["layers_0"]["mlp"]["up"]["kernel"])
    optimizer = optax.adam(0.1)
    step = make_train_step(loss_of(build_model(CONFIG, lora=RANK)), optimizer)
    state = init_state(params, optimizer, with_reference=True, replicated=replicated(make_mesh(data=1)))
    trained = sum(x.size for x in jax.tree.leaves(trainable_part(params)))
    assert trained == 2 * 4 * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))  # two layers of q and o, k and v, the MLP
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == 2 * trained + 1
    new, _ = step(state, batch())
    np.testing.assert_array_equal(new.params["layers_0"]["mlp"]["up"]["kernel"], base)
    assert new.params["layers_0"]["mlp"]["up"]["kernel_lora_b"].any()
    reference = reference_params(new)
    assert reference["layers_0"]["mlp"]["up"]["kernel"] is new.params["layers_0"]["mlp"]["up"]["kernel"]
    assert not reference["layers_0"]["mlp"]["up"]["kernel_lora_b"].any()
    fresh = reference_params(with_fresh_reference(new))
    assert fresh["layers_0"]["mlp"]["up"]["kernel_lora_b"].any()
    saved = without_frozen({"actor": new})
    assert sum(x.size for x in jax.tree.leaves(saved["actor"].params)) == trained
    assert "embed" not in saved["actor"].params
    restored = with_frozen(saved, {"actor": new})["actor"]
    assert jax.tree.structure(restored) == jax.tree.structure(new)
    with pytest.raises(ValueError, match="the state has no reference"):
        reference_params(replace(new, ref_params=None))


@pytest.mark.parametrize(
    ("quantize", "scan_layers"),
    [
        pytest.param(None, True, marks=pytest.mark.slow),
        ("nf4", True),
        pytest.param("int8", False, marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_of_three_axes_as_on_one_device(tiny, quantize, scan_layers):
    _, params = tiny
    lora = replace(RANK, quantize=quantize)
    losses = []
    for mesh in (make_mesh(data=1), make_mesh(data=2, fsdp=2, tensor=2)):

        def shardings(tree, mesh=mesh):
            return param_shardings(tree, mesh)

        placed = jax.device_put(params, shardings(params))
        placed = moved(adapted(placed, lora, shardings=shardings))
        rollout = make_reshard(param_shardings(placed, mesh, ROLLOUT_RULES), jnp.float32)(placed)
        assert jax.tree.structure(rollout) == jax.tree.structure(placed)
        optimizer = optax.sgd(0.5)
        state = init_state(placed, optimizer, with_reference=True, replicated=replicated(mesh))
        model = build_model(CONFIG, lora=lora, mesh=mesh, scan_layers=scan_layers and mesh.size > 1)
        step = make_train_step(loss_of(model), optimizer, preparation=model.preparation)
        is_stacked = STACKED in jax.eval_shape(model.preparation.prepare, placed)
        assert is_stacked == (scan_layers and mesh.size > 1)
        rows = shard_rows(jax.tree.map(lambda x: jnp.tile(x, (2, 1)), batch()), mesh)
        for _ in range(2):
            state, metrics = step(state, rows)
            losses.append(float(metrics["loss"]))
        adapter = state.params["layers_0"]["attention"]["o"]["kernel_lora_a"]
    assert adapter.sharding.spec == jax.sharding.PartitionSpec("tensor", None)
    assert losses[0] != losses[1]
    np.testing.assert_allclose(losses[:2], losses[2:], rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "lora.rank is 0; it must be at least 1"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha is 0.0; it must be above 0"),
        ({"rank": 4, "targets": ()}, "lora.targets is empty"),
        ({"rank": 4, "targets": ("attention/(q",)}, "is not a regular expression"),
        ({"quantize": "int8"}, "lora.quantize is int8, but lora.rank is not set"),
        ({"rank": 17}, "lora.rank is 17; it must be at most 16, the smaller side of attention/k .32 x 16."),
        ({"rank": 4, "targets": ("attention/q", "q_proj")}, "'q_proj' matches none of the matrices attention/q, "),
    ],
)
def test_what_cannot_be_is_refused_in_the_words_of_the_flag(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(CONFIG, lora=LoRA(**settings))


def test_targets_choose_matrices(tiny):
    _, params = tiny
    params = adapted(params, LoRA(rank=2, targets=("attention/(q|v)", "mlp/.*")))
    adapters = trainable_part(params)["layers_1"]
    assert {name: sorted(block) for name, block in adapters.items()} == {
        "attention": ["q", "v"],
        "mlp": ["down", "gate", "up"],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("default::FutureWarning")  # of PEFT's use of transformers
@pytest.mark.parametrize("scalar_head", [False, True])
def test_peft_loads_the_adapters(small, tmp_path, scalar_head):
    peft = pytest.importorskip("peft")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    like = from_pretrained(small, lora=RANK, scalar_head=scalar_head)
    params = moved(like.params)
    if scalar_head:
        params["score"]["kernel"] = jax.random.normal(jax.random.key(5), params["score"]["kernel"].shape)
    save_adapters(tmp_path / "adapter", params, like)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == small
    ids = np.arange(6)[None] + 3
    if scalar_head:
        base = transformers.AutoModelForSequenceClassification.from_pretrained(small, num_labels=1, pad_token_id=0)
    else:
        base = transformers.AutoModelForCausalLM.from_pretrained(small)
    expected = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        theirs = expected(torch.tensor(ids)).logits.numpy()
    states = jax.jit(like.model.apply)(params, jnp.asarray(ids), jnp.arange(6)[None])[0]
    ours = states @ like.model.head(params).T
    np.testing.assert_allclose(ours[:, -1] if scalar_head else ours, theirs, atol=2e-4)

"""Routing, balancing losses and expert products against transformers' modules and loops in float64."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import SMALL, random_params
from jax.sharding import AxisType, Mesh

from grpo_jax.models import build_model, from_hf_config
from grpo_jax.models.expert_blocks import ExpertParams, block_size, expert_blocks, sorted_rows
from grpo_jax.models.expert_groups import _outer, _outer_on_tpu, expert_groups
from grpo_jax.models.experts import clamped_swiglu, expert_mlp, gated
from grpo_jax.models.routing import (
    expert_load,
    load_balancing_terms,
    route,
    router_z_terms,
    sequence_load,
)

E, K, D, F, N = 8, 3, 16, 12, 48
SILU = gated(jax.nn.silu)
CLAMPED = partial(clamped_swiglu, limit=7.0)  # of gpt-oss


def normal(*shape, seed=0, scale=0.5):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape) * scale, jnp.float32)


def expert_params(*, bias, num_experts=E):
    shapes = [(num_experts, D, F), (num_experts, D, F), (num_experts, F, D)]
    shapes += [(num_experts, F), (num_experts, F), (num_experts, D)] if bias else []
    return ExpertParams(*(normal(*shape, seed=i) for i, shape in enumerate(shapes)))


def assert_near(found, expected, tolerance):
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert x.shape == y.shape
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-30)


# routing, against transformers ----------------------------------------------------------------------------------------

GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "n_shared_experts": 1}
DEEPSEEK = {"scoring": "sigmoid", "groups": 4, "kept_groups": 2, "scale": 2.5}
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeSparseMoeBlock", {"norm_topk_prob": True}, {}),
    "olmoe": ("OlmoeSparseMoeBlock", {"intermediate_size": F, "norm_topk_prob": False}, {"normalize": False}),
    "mixtral": ("MixtralSparseMoeBlock", {"intermediate_size": F}, {}),
    "gpt_oss": ("GptOssMLP", {"intermediate_size": F}, {}),
    "deepseek_v3": ("DeepseekV3MoE", GROUPED, DEEPSEEK),
    "glm4_moe": ("Glm4MoeMoE", GROUPED | {"n_group": 1, "topk_group": 1}, {"scoring": "sigmoid", "scale": 2.5}),
    "minimax_m2": ("MiniMaxM2SparseMoeBlock", {"intermediate_size": F}, {"scoring": "sigmoid"}),
}


def torch_block(family, fields):
    """A mixture of experts of transformers with random parameters, and its parameters by name."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import importlib

    name, more, _ = FAMILIES[family]
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=D, moe_intermediate_size=F, num_experts_per_tok=K, **counts, **more, **fields
    )
    config._experts_implementation = "eager"
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    block = getattr(module, name)(config).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for key, parameter in [*block.named_parameters(), *block.named_buffers()]:
            scale = 0.2 if key.endswith("bias") else 0.5
            parameter.copy_(torch.tensor(rng.normal(size=parameter.shape) * scale, dtype=torch.float32))
            if "shared" in key:
                parameter.zero_()
    return torch, block


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_transformers_and_their_gradients(family):
    torch, block = torch_block(family, {})
    tensors = {k: v.detach().numpy() for k, v in block.state_dict().items()}
    router = next(k for k in tensors if k in ("gate.weight", "router.weight"))
    x = torch.tensor(np.array(normal(1, N, D)), requires_grad=True)
    out = block(x)
    out = out[0] if isinstance(out, tuple) else out
    (out**2).sum().backward()
    halves = (slice(0, None, 2), slice(1, None, 2)) if family == "gpt_oss" else (slice(F), slice(F, None))

    def arranged(by_name):
        both, down = by_name["experts.gate_up_proj"], by_name["experts.down_proj"]
        both, down = (both, down) if family == "gpt_oss" else (both.transpose(0, 2, 1), down.transpose(0, 2, 1))
        params = [*(both[..., half] for half in halves), down]
        if family == "gpt_oss":
            biases = by_name["experts.gate_up_proj_bias"]
            params += [*(biases[:, half] for half in halves), by_name["experts.down_proj_bias"]]
        return ExpertParams(*map(jnp.asarray, params))

    bias = next((jnp.asarray(v) for k, v in tensors.items() if k.endswith("e_score_correction_bias")), None)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def ours(x, router_weight, params):
        logits = x @ router_weight.T
        logits += jnp.asarray(tensors["router.bias"])[None] if family == "gpt_oss" else 0
        chosen, weights = route(logits, K, bias=bias, **FAMILIES[family][2])
        out = expert_mlp(x, chosen, weights, params, activation=CLAMPED if family == "gpt_oss" else SILU)
        return (out**2).sum(), out

    (_, found), grads = ours(jnp.asarray(x.detach().numpy()[0]), jnp.asarray(tensors[router]), arranged(tensors))
    torch_grads = {k: v.grad.numpy() for k, v in block.named_parameters() if v.grad is not None}
    assert_near(found, out.detach().numpy()[0], 2e-6)
    assert_near(grads, (x.grad.numpy()[0], torch_grads[router], arranged(torch_grads)), 1e-5)


# routing, by itself ---------------------------------------------------------------------------------------------------


def test_normalized_weights_add_up_to_the_scale_and_experts_are_the_best_first():
    experts, weights = route(normal(N, E), K, scoring="sigmoid", scale=2.5)
    np.testing.assert_allclose(weights.sum(-1), 2.5, rtol=1e-6)
    assert (np.diff(weights) <= 0).all()
    assert all(len(set(row)) == K for row in np.asarray(experts).tolist())


def test_logits_whose_probabilities_round_to_zero_are_still_ordered():
    logits = jnp.asarray([[0.0, 300.0, 100.0, 200.0]], jnp.float32)
    assert route(logits, 3)[0].tolist() == [[1, 3, 2]]


def test_groups_are_scored_by_their_best_experts():
    scores = np.array([[0.9, 0.1, 0.6, 0.5]])
    logits = jnp.asarray(np.log(scores / (1 - scores)), jnp.float32)
    settings = {"scoring": "sigmoid", "groups": 2, "kept_groups": 1}
    assert route(logits, 2, **settings)[0].tolist() == [[2, 3]]
    assert route(logits, 2, group_best=1, **settings)[0].tolist() == [[0, 1]]


def test_replayed_choices_have_weights_and_gradients_of_the_present_logits():
    before, now = normal(N, E), normal(N, E, seed=1)
    recorded = route(before, K)[0].at[0, 1].set(-1)

    def weights_of(logits):
        return route(logits, K, chosen=recorded)[1]

    chosen, weights = route(now, K, chosen=recorded)
    assert (chosen[1:] == recorded[1:]).all()
    assert (chosen[0] == route(now, K)[0][0]).all()  # without a record
    np.testing.assert_allclose(weights, jax.nn.softmax(jnp.take_along_axis(now, chosen, 1)), rtol=1e-6)
    grads = jax.grad(lambda x: (weights_of(x) ** 2).sum())(now)
    expected = jax.grad(lambda x: (jax.nn.softmax(jnp.take_along_axis(x, chosen, 1)) ** 2).sum())(now)
    np.testing.assert_allclose(grads, expected, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_bias_changes_the_choice_only(scoring):
    logits, bias = normal(N, E), jnp.zeros(E).at[5].set(10.0)
    experts, weights = route(logits, K, scoring=scoring, bias=bias)
    assert (experts[:, 0] == 5).all()
    same = route(logits, K, scoring=scoring, chosen=experts)[1]
    np.testing.assert_allclose(weights, same, rtol=1e-6)
    assert not jax.grad(lambda b: (route(logits, K, scoring=scoring, bias=b)[1] ** 2).sum())(bias).any()


@pytest.mark.parametrize(
    ("k", "settings", "message"),
    [
        (9, {}, "9 experts of each token, but 8 to choose from"),
        (3, {"groups": 4, "kept_groups": 1}, "3 experts of each token, but 2 to choose from"),
        (2, {"groups": 3}, "8 experts do not divide into 3 equal groups"),
        (2, {"groups": 4, "kept_groups": 5}, "kept_groups is 5"),
    ],
)
def test_numbers_that_do_not_fit(k, settings, message):
    with pytest.raises(ValueError, match=message):
        route(normal(N, E), k, **settings)


# losses and loads -----------------------------------------------------------------------------------------------------


def test_loads_count_choices_of_tokens_that_count_and_add_up():
    experts, mask = jnp.asarray([[0, 1], [1, 2], [1, 0]]), jnp.asarray([True, True, False])
    assert expert_load(experts, 4, mask).tolist() == [1, 2, 1, 0]
    assert expert_load(experts, 4).tolist() == [2, 3, 1, 0]
    parts = expert_load(experts[:1], 4) + expert_load(experts[1:], 4)
    assert parts.tolist() == expert_load(experts, 4).tolist()


def test_the_mean_of_the_balancing_terms_is_the_loss_of_transformers():
    """transformers' is the sum over the k places, k times the mean of ours."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch = pytest.importorskip("torch")
    logits, mask = normal(2, N, E), jnp.asarray(np.random.default_rng(0).random((2, N)) < 0.7)
    theirs = torch.tensor(np.array(logits.reshape(-1, E)), requires_grad=True)
    loss: Any = load_balancing_loss_func((theirs,), E, K, torch.tensor(np.array(mask)))
    loss.backward()

    def ours(logits):
        load = expert_load(route(logits, K)[0], E, mask)
        return K * jnp.where(mask, load_balancing_terms(logits, load), 0).sum() / mask.sum(dtype=jnp.float32)

    found, grad = jax.value_and_grad(ours)(logits)
    np.testing.assert_allclose(found, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad.reshape(-1, E), theirs.grad, atol=1e-7)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_loads_make_a_mean_of_one(scoring):
    terms = load_balancing_terms(normal(N, E), jnp.full(E, 7.0), scoring=scoring)
    np.testing.assert_allclose(terms, 1, rtol=1e-6)


def test_the_load_of_a_sequence_does_not_depend_on_how_it_is_packed():
    experts = route(normal(2, 10, E), K)[0]
    mask = jnp.ones((2, 10), bool).at[0, :2].set(False)
    alone = sequence_load(experts, E, mask)
    for b in range(2):
        expected = expert_load(experts[b], E, mask[b])
        assert all((alone[b, s] == expected).all() for s in range(10))
    packed = sequence_load(
        experts.reshape(1, 20, K), E, mask.reshape(1, 20), jnp.repeat(jnp.asarray([[1, 2]], jnp.int32), 10, axis=1)
    )
    assert (packed.reshape(2, 10, E) == alone).all()


def test_the_sequence_loss_is_that_of_a_loop():
    logits, mask = normal(2, 10, E), np.random.default_rng(1).random((2, 10)) < 0.8
    experts = np.asarray(route(logits, K)[0])
    terms = load_balancing_terms(logits, sequence_load(jnp.asarray(experts), E, jnp.asarray(mask)))
    for b in range(2):
        count, probs = np.zeros(E), np.zeros(E)
        for s in np.flatnonzero(mask[b]):
            count[experts[b, s]] += 1
            e = np.exp(np.asarray(logits[b, s], np.float64))
            probs += e / e.sum()
        expected = (E / (K * mask[b].sum()) * count * probs / mask[b].sum()).sum()
        np.testing.assert_allclose(np.asarray(terms)[b][mask[b]].mean(), expected, rtol=1e-6)


def test_router_z_terms():
    logits = jnp.asarray([[0.0, 0.0], [np.log(3.0), 0.0]], jnp.float32)
    np.testing.assert_allclose(router_z_terms(logits), [np.log(2) ** 2, np.log(4) ** 2], rtol=1e-6)


# products -------------------------------------------------------------------------------------------------------------


def naive(x, experts, weights, params, activation):
    """``expert_mlp`` in float64, choice by choice."""
    x, weights = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    p = SimpleNamespace(**{k: None if v is None else np.asarray(v, np.float64) for k, v in params._asdict().items()})
    out = np.zeros(x.shape)
    for n in range(len(x)):
        for e, w in zip(np.asarray(experts)[n], weights[n], strict=True):
            if not 0 <= e < len(p.gate):
                continue
            gate, up = x[n] @ p.gate[e], x[n] @ p.up[e]
            if p.gate_bias is None:
                out[n] += w * ((gate / (1 + np.exp(-gate)) * up) @ p.down[e])
            else:
                gate, up = np.minimum(gate + p.gate_bias[e], 1), np.clip(up + p.up_bias[e], -1, 1)
                hidden = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
                out[n] += w * (hidden @ p.down[e] + p.down_bias[e])
    return out


ACTIVATIONS = {False: SILU, True: partial(clamped_swiglu, limit=1.0)}
FUNCTIONS = {
    "blocks": expert_blocks,
    "ragged": partial(expert_groups, layout="ragged"),
    "chunks": partial(expert_groups, layout="ragged", share=0.1),
    "slots": partial(expert_groups, layout="slots"),
}


def inputs_of(*, skips, tokens=N):
    x, experts = normal(tokens, D), route(normal(tokens, E), K)[0]
    if skips:  # two experts without any token, and choices that are not this device's
        experts = jnp.where(experts == 2, E, jnp.where(experts == 5, -1, experts))
    return x, experts, jnp.abs(normal(tokens, K))


@pytest.fixture(scope="module")
def with_gradients():
    """Compiled outputs and gradients, by implementation and bias."""

    @partial(jax.jit, static_argnames=("kind", "bias"))
    def run(x, experts, weights, params, kind, bias):
        def total(x, weights, params):
            out = FUNCTIONS[kind](ACTIVATIONS[bias], x, experts, weights, params)
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(x, weights, params)

    return run


@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_a_loop_over_choices(with_gradients, kind, bias):
    params, (x, experts, weights) = expert_params(bias=bias), inputs_of(skips=True)
    (_, out), grads = with_gradients(x, experts, weights, params, kind, bias)
    assert_near(out, naive(x, experts, weights, params, ACTIVATIONS[bias]), 1e-6)
    # Against the derivative along a direction in float64.
    rng, step = np.random.default_rng(7), 1e-5
    for i, grad in enumerate(grads):
        directions = [rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(grad)]

        def moved(by, i=i, directions=directions):
            arguments = [x, weights, params]
            leaves, tree = jax.tree.flatten(arguments[i])
            moved = [np.asarray(v, np.float64) + by * d for v, d in zip(leaves, directions, strict=True)]
            arguments[i] = jax.tree.unflatten(tree, moved)
            return (naive(arguments[0], experts, arguments[1], arguments[2], None) ** 2).sum()

        expected = (moved(step) - moved(-step)) / (2 * step)
        found = sum(
            (np.asarray(g, np.float64) * d).sum() for g, d in zip(jax.tree.leaves(grad), directions, strict=True)
        )
        np.testing.assert_allclose(found, expected, rtol=2e-5)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_skipped_tokens_do_not_reach_results_or_gradients(with_gradients, kind):
    """Not even as NaN."""
    params, (x, experts, weights) = expert_params(bias=False), inputs_of(skips=False)
    experts = experts.at[::3].set(E)
    expected = with_gradients(x, experts, weights, params, kind, False)
    found = with_gradients(x.at[::3].set(jnp.nan), experts, weights, params, kind, False)
    assert not found[0][1][::3].any()
    assert not found[1][1][::3].any()
    assert_near(found, expected, 0)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_all_tokens_may_choose_the_same_experts(with_gradients, kind):
    params, (x, experts, weights) = expert_params(bias=False), inputs_of(skips=False)
    experts = jnp.broadcast_to(jnp.asarray([[6, 1, 3]], jnp.int32), experts.shape)
    (_, out), _ = with_gradients(x, experts, weights, params, kind, False)
    assert_near(out, naive(x, experts, weights, params, SILU), 1e-6)


def test_a_token_alone_rounds_as_among_others():
    """The sampler's step of few tokens and the trainer's pass over many."""
    rows, params = 700, expert_params(bias=False)
    x, experts, weights = inputs_of(skips=False, tokens=rows)
    assert block_size(rows * K, E) > block_size(K, E)
    run = jax.jit(partial(expert_blocks, SILU))
    many = run(x, experts, weights, params)
    few = jnp.concatenate([run(x[i : i + 1], experts[i : i + 1], weights[i : i + 1], params) for i in range(4)])
    assert_near(few, many[:4], 1e-6)


def test_the_kernel_of_matrix_gradients_on_tpus():
    """Groups that share a tile, an empty one, and rows of no group."""
    x, grad, sizes = normal(256, 130), normal(256, 72), jnp.asarray([100, 0, 57, 40], jnp.int32)
    assert_near(_outer_on_tpu(x, grad, sizes, interpret=True), _outer(x, grad, sizes), 1e-6)


def test_choices_are_sorted_by_expert_then_token():
    rows = sorted_rows(jnp.asarray([[2, 0], [9, 2], [0, -1]], jnp.int32), 3)
    assert rows.order.tolist()[:4] == [1, 4, 0, 3]
    assert rows.sizes.tolist() == [2, 0, 2]


def test_bfloat16_products_round_once():
    params, (x, experts, weights) = expert_params(bias=True), inputs_of(skips=False)
    exact = naive(x, experts, weights, params, None)
    low = x.astype(jnp.bfloat16)
    for kind in ("cpu", "tpu", "gpu"):
        out = expert_mlp(low, experts, weights, params, activation=ACTIVATIONS[True], platform=kind)
        assert out.dtype == jnp.bfloat16
        assert_near(out.astype(jnp.float32), exact, 0.02)


# over a mesh ----------------------------------------------------------------------------------------------------------

AXES = ("data", "fsdp", "expert", "context", "tensor")


def scored(mesh, platform, x, logits, params):
    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def run(x, logits, params):
        chosen, weights = route(logits, K)
        out = expert_mlp(x, chosen, weights, params, activation=ACTIVATIONS[True], mesh=mesh, platform=platform)
        return (out**2).sum()

    return run(x, logits, params)


def mesh_of(*shape):
    devices = np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize(
    ("shape", "tokens"),
    [
        ((1, 2, 2, 1, 2), (4, 6)),
        ((2, 1, 4, 1, 1), (24,)),
        ((1, 2, 2, 2, 1), (4, 6)),
        ((1, 1, 2, 1, 4), (3,)),  # rows that do not divide, as in sampling
    ],
)
def test_over_a_mesh_results_and_gradients_are_those_of_one_device(shape, tokens, platform):
    x, logits, params = normal(*tokens, D), normal(*tokens, E), expert_params(bias=True)
    found = scored(mesh_of(*shape), platform, x, logits, params)
    assert_near(found, scored(None, platform, x, logits, params), 1e-6)


def test_experts_that_do_not_divide():
    x, experts, weights = inputs_of(skips=False)
    params = expert_params(bias=False, num_experts=6)
    with pytest.raises(ValueError, match=r"6 experts do not divide over mesh.expert 2 x mesh.tensor 2 = 4"):
        expert_mlp(x, experts, weights, params, activation=SILU, mesh=mesh_of(1, 2, 2, 1, 2))


# in a model -----------------------------------------------------------------------------------------------------------

SPARSE = {
    "qwen3_moe": {"num_experts": 4},
    "glm4_moe": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
}


@pytest.mark.parametrize("family", SPARSE)
def test_recomputed_layers_have_the_same_gradients_and_routing(family):
    """Layers in a loop, and those before it."""
    more = {"num_experts_per_tok": 2, "moe_intermediate_size": 8, "norm_topk_prob": True, "num_hidden_layers": 3}
    config = from_hf_config({"model_type": family, **SMALL, **SPARSE[family], **more})
    params, ids = random_params(config), jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), ids.shape)

    def results(remat):
        model = build_model(config, remat=remat)
        assert model.routing is not None
        routing = model.routing

        @jax.jit
        @partial(jax.grad, has_aux=True)
        def run(params):
            inputs = (model.preparation.prepare(params), ids, places, jnp.ones(ids.shape, bool))
            hidden, _, routed = routing.apply(*inputs, with_logits=True)
            return (hidden**2).sum(), routed

        return run(params)

    (grads, routed), (expected, of_stored) = results("block"), results("none")
    assert (routed.experts == of_stored.experts).all()
    assert_near((grads, routed.logits), (expected, of_stored.logits), 1e-5)

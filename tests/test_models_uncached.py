"""``from_apply``: a plain function samples and trains as a model with a KV cache does."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import quick_jit
from flax import linen, nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax import advantage, loss, models
from grpo_jax.data.prompts import pad_prompts
from grpo_jax.log_probs import output_logits
from grpo_jax.masked import positions
from grpo_jax.rollout import Sampler, generate
from grpo_jax.rollout.stop import stop_strings
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh, shard_rows
from grpo_jax.tasks.sums import make_tokenizer
from grpo_jax.train import (
    completion_log_probs,
    completion_states,
    completion_values,
    init_state,
    make_train_step,
    packed_log_probs,
    pair_log_probs,
    reward_model_scores,
)
from grpo_jax.types import Batch, Packed, Pairs, PrefixCache, Rollout

V, D, EOS, PAD = 32, 16, (5, 9), 5
PROMPTS = [[3, 4], [7], [8, 5, 11, 2], [1, 2, 3], [6, 6], [2], [30, 1], [12, 13, 14]]
OPTIONS = {"group_size": 8, "eos_ids": EOS, "pad_id": PAD}
EVERYTHING = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.2, presence_penalty=0.3, min_length=2)

pytestmark = pytest.mark.filterwarnings("ignore:from_apply")


def padded(prompts=PROMPTS, width=4, index=None):
    return pad_prompts(prompts, max_prompt_length=width, pad_id=PAD, index=index or range(len(prompts)))


def pooling_params(deviation=0.7):
    shapes = {"embed": (V, D), "in": (2 * D, 32), "out": (32, V)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: deviation * jax.random.normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}


def pooling(params, ids, positions, mask):
    """Logits from the last token and the mean of all up to it, by a model that knows nothing of padding."""
    del mask
    x = params["embed"][ids]
    mean = jnp.cumsum(x, axis=1) / (positions + 1).astype(jnp.float32)[..., None]
    return jax.nn.gelu(jnp.concatenate([x, mean], axis=-1) @ params["in"]) @ params["out"]


def pooling_model(**options):
    return models.from_apply(pooling, vocab_size=V, **options)


def wrapped(tiny, *, with_head):
    """The decoder of ``tiny``, of which only the forward pass over whole sequences is used."""
    model = tiny[0]

    def hidden(params, ids, positions, mask):
        return model.apply(params, ids, positions, mask)[0]

    if with_head:
        return models.from_apply(hidden, vocab_size=V, head=model.head, max_length=model.max_length)
    return models.from_apply(lambda *args: output_logits(hidden(*args), model.head(args[0])), vocab_size=V)


def rolled(model, params, prompts, *, length=20, sampling=None, key=0, **options):
    options = OPTIONS | options | {"max_completion_length": length}
    return quick_jit(partial(generate, model, sampling=sampling or Sampling(), **options))(
        params, prompts, jax.random.key(key)
    )


def assert_same(found: Rollout, wanted: Rollout):
    for name, value in vars(wanted).items():
        if name == "rollout_log_probs":
            np.testing.assert_allclose(getattr(found, name), value, atol=1e-5)
        else:
            np.testing.assert_array_equal(getattr(found, name), value, err_msg=name)


def random_batch(rows=4, width=4, length=10, seed=0):
    """Prompts with completions of several lengths, and ids outside the vocabulary in the padding."""
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(width)[None] >= rng.integers(0, width, rows)[:, None]
    mask = np.arange(length)[None] < rng.integers(2, length + 1, rows)[:, None]
    ids = [np.where(m, rng.integers(0, V, m.shape), 99).astype(np.int32) for m in (prompt_mask, mask)]
    zeros = jnp.zeros((rows, length))
    weights = jnp.asarray(rng.normal(size=rows), jnp.float32)
    return Batch(*map(jnp.asarray, (ids[0], prompt_mask, ids[1], mask, mask)), weights, zeros)


@pytest.mark.parametrize("sampling", [Sampling(), EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("with_head", [True, False], ids=["hidden", "logits"])
def test_samples_are_those_of_the_cached_decoder(tiny, with_head, sampling):
    model, params = tiny
    found = rolled(wrapped(tiny, with_head=with_head), params, padded(), sampling=sampling)
    assert_same(found, rolled(model, params, padded(), sampling=sampling))
    assert not found.completion_mask.all()


@pytest.mark.parametrize("with_head", [True, False], ids=["hidden", "logits"])
def test_log_probs_and_gradients_are_those_of_the_cached_decoder(tiny, with_head):
    model, params = tiny
    batch = random_batch()

    def scored(model, params):
        log_probs, entropy = completion_log_probs(model, params, batch, chunk_size=8)
        value, _ = loss.grpo_loss(log_probs, batch.advantages, batch.loss_mask)
        return value.value, (jnp.where(batch.loss_mask, log_probs, 0), jnp.where(batch.loss_mask, entropy, 0))

    found, wanted = (
        quick_jit(jax.value_and_grad(partial(scored, m), has_aux=True))(params)
        for m in (wrapped(tiny, with_head=with_head), model)
    )
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), found, wanted)


@pytest.mark.parametrize(
    ("schedule", "batches"),
    [
        ({}, 1),
        pytest.param({"max_rows": 64, "ahead": 2}, 3, marks=pytest.mark.slow),
        pytest.param({"max_rows": 4}, 32, marks=pytest.mark.slow),
    ],
    ids=["compacted", "merged", "split groups"],
)
def test_every_schedule_of_the_sampler_gives_the_samples_of_the_cached_decoder(tiny, schedule, batches):
    model, params = tiny
    options = OPTIONS | {"max_completion_length": 70}  # two chunks
    prompts = padded([*PROMPTS, *([n] for n in range(10, 18))])
    stats = []
    sampler = Sampler(wrapped(tiny, with_head=True), Sampling(), **options, **schedule, report=stats.append)
    found = sampler(params, prompts, jax.random.key(0))
    assert_same(found, Sampler(model, Sampling(), **options)(params, prompts, jax.random.key(0)))
    assert stats[0].batches == batches
    assert found.completion_mask.sum(1).max() > 64
    assert stats[0].row_steps < 128 * 72  # finished rows left the batch


def test_a_stream_gives_the_same_samples():
    model, params = pooling_model(), pooling_params()
    options = OPTIONS | {"max_completion_length": 20}
    sampler = Sampler(model, Sampling(), **options)
    stream = [jax.tree.map(lambda x, i=i: x[i : i + 2], padded()) for i in (0, 2, 4, 6)]
    found = dict(sampler.stream(params, stream, jax.random.key(0), num_prompts=4))
    wanted = rolled(model, params, padded())
    for n in range(8):
        assert_same(found[n], jax.tree.map(lambda x, n=n: x[8 * n : 8 * n + 8], wanted))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampler_and_trainer_agree(temperature):
    model, params = pooling_model(), pooling_params()
    rollout = rolled(model, params, padded(), length=70, sampling=Sampling(temperature=temperature))
    score = quick_jit(partial(completion_log_probs, model, temperature=temperature))
    log_probs = np.where(rollout.completion_mask, score(params, rollout)[0], 0)
    assert np.abs(log_probs - np.asarray(rollout.rollout_log_probs)).max() <= 1e-5
    assert rollout.completion_mask.sum() > 500


def test_padding_and_batch_layout_change_nothing():
    model, params = pooling_model(), pooling_params()
    whole = rolled(model, params, padded())
    wide = rolled(model, params, padded(width=11))
    np.testing.assert_array_equal(wide.completion_ids, whole.completion_ids)
    np.testing.assert_allclose(wide.rollout_log_probs, whole.rollout_log_probs, atol=1e-5)
    alone = rolled(model, params, padded(PROMPTS[2:3], index=[2]))
    assert_same(alone, jax.tree.map(lambda x: x[16:24], whole))
    assert not np.array_equal(rolled(model, params, padded(), key=1).completion_ids, whole.completion_ids)


def test_apply_gets_tokens_from_the_first_column_on_then_zeros():
    calls = []

    def spy(params, ids, positions, mask):
        calls.append((ids, positions, mask))
        return pooling(params, ids, positions, mask)

    batch = random_batch(rows=3)
    states = completion_states(models.from_apply(spy, vocab_size=V), pooling_params(), batch)
    [(ids, seen_positions, mask)] = calls
    assert ids.shape == (3, 14)
    for n in range(3):
        sequence = [
            *np.asarray(batch.prompt_ids)[n][np.asarray(batch.prompt_mask)[n]],
            *np.asarray(batch.completion_ids)[n][np.asarray(batch.completion_mask)[n]],
        ]
        zeros = [0] * (14 - len(sequence))
        assert ids[n].tolist() == [*sequence, *zeros]
        assert seen_positions[n].tolist() == [*range(len(sequence)), *zeros]
        assert mask[n].tolist() == [*[True] * len(sequence), *[False] * len(zeros)]
    assert jnp.isfinite(states).all()


def test_a_decode_step_recomputes_prompt_full_chunk_and_active_chunk():
    calls = []

    def spy(params, ids, positions, mask):
        calls.append((ids, positions, mask))
        return pooling(params, ids, positions, mask)

    model, params = models.from_apply(spy, vocab_size=V), pooling_params()
    prompt_mask = jnp.array([[False, True, True], [True, True, True]])
    prompt = {"ids": jnp.array([[99, 3, 4], [6, 7, 8]]), "positions": positions(prompt_mask)}
    full = {"ids": jnp.array([[10, 11], [20, 21], [30, 31]]), "positions": jnp.array([[2, 3], [3, 4], [3, 4]])}
    active = {name: jnp.zeros((3, 4), jnp.int32) for name in full}
    rows = {"gather_index": jnp.array([[0, 0, 1, 2]]), "scatter_index": jnp.array([[0, 2, 3]])}
    prefixes = [PrefixCache(prompt, -5, prompt_mask, **rows), PrefixCache(full, -2)]
    for start, tokens in enumerate(([12, 22, 13], [15, 25, 14])):
        new_positions = jnp.array([[4], [5], [5]]) + start
        outputs, active = model.apply(
            params, jnp.array(tokens)[:, None], new_positions, None, active, jnp.int32(start), prefixes
        )
    ids, seen_positions, mask = calls[-1]
    wanted = [[3, 4, 10, 11, 12, 15], [6, 7, 8, 20, 21, 22, 25], [6, 7, 8, 30, 31, 13, 14]]
    for n, sequence in enumerate(wanted):
        zeros = [0] * (9 - len(sequence))
        assert ids[n].tolist() == [*sequence, *zeros]
        assert seen_positions[n].tolist() == [*range(len(sequence)), *zeros]
        assert mask[n].tolist() == [*[True] * len(sequence), *[False] * len(zeros)]
        alone = pooling(params, jnp.array([sequence]), jnp.arange(len(sequence))[None], None)
        np.testing.assert_allclose(outputs[n, 0], alone[0, -1], atol=1e-5)


def test_apply_gets_no_more_columns_than_max_length():
    table = jax.random.normal(jax.random.key(3), (24, D))
    columns = []

    def with_learned_positions(params, ids, positions, mask):
        columns.append(ids.shape[1])
        shifted = params | {"embed": params["embed"][ids] + table[: ids.shape[1]][None]}
        return pooling(shifted | {"embed": shifted["embed"].reshape(-1, D)}, flat_index(ids), positions, mask)

    def flat_index(ids):
        return jnp.arange(ids.size).reshape(ids.shape)

    model, params = models.from_apply(with_learned_positions, vocab_size=V, max_length=24), pooling_params()
    options = OPTIONS | {"max_completion_length": 20}
    rollout = Sampler(model, Sampling(), **options)(params, padded(), jax.random.key(0))
    assert max(columns) == 24  # of 4 + 64
    score = quick_jit(partial(completion_log_probs, model))
    log_probs = np.where(rollout.completion_mask, score(params, rollout)[0], 0)
    np.testing.assert_allclose(log_probs, rollout.rollout_log_probs, atol=1e-5)

    with pytest.raises(ValueError, match="does not fit the model's 24 positions"):
        Sampler(model, Sampling(), **OPTIONS | {"max_completion_length": 21})(params, padded(), jax.random.key(0))
    ids, mask = jnp.ones((1, 30), jnp.int32), jnp.ones((1, 30), bool)
    outputs, _ = model.apply(params, ids, positions(mask), mask)
    assert jnp.isnan(outputs).all(-1)[0].tolist() == [False] * 24 + [True] * 6


def test_stop_strings_end_completions():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    params = {"embed": jnp.zeros((size, D)), "in": jnp.zeros((2 * D, 32)), "out": jnp.zeros((32, size))}  # uniform
    stop = stop_strings(tokenizer, ["7", "+="])
    sampler = Sampler(
        models.from_apply(pooling, vocab_size=size),
        Sampling(),
        group_size=8,
        max_completion_length=20,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=PAD,
        stop=stop,
    )
    rollout = sampler(params, padded([[3, 4], [7]]), jax.random.key(0))
    texts = [
        tokenizer.decode(ids[mask].tolist())
        for ids, mask in zip(np.asarray(rollout.completion_ids), np.asarray(rollout.completion_mask), strict=True)
    ]
    stopped = [text for text in texts if text.endswith(("7", "+="))]
    assert len(stopped) > 2
    assert not any("7" in text[:-1] for text in texts)


@pytest.mark.parametrize(
    ("axes", "spec"),
    [({"data": 4}, P()), ({"data": 2, "fsdp": 2, "tensor": 2}, P("fsdp", "tensor"))],
    ids=["replicated", "sharded"],
)
def test_devices_change_nothing(axes, spec):
    model, params = pooling_model(), pooling_params()
    mesh = make_mesh(**axes)
    placed = jax.device_put(params, NamedSharding(mesh, spec))
    options = OPTIONS | {"max_completion_length": 20}
    sampler = Sampler(model, Sampling(), **options, mesh=mesh)
    found = sampler(placed, shard_rows(padded(), mesh), jax.random.key(0))
    assert_same(found, rolled(model, params, padded()))
    rows = found.completion_ids
    assert rows.sharding.shard_shape(rows.shape) == (16, 20)

    batch = random_batch(rows=8)
    log_probs = jax.jit(lambda params, batch: completion_log_probs(model, params, batch)[0])
    np.testing.assert_allclose(log_probs(placed, shard_rows(batch, mesh)), log_probs(params, batch), atol=1e-5)


def test_grpo_learns():
    model, params, optimizer = pooling_model(), pooling_params(0.2), optax.adam(0.03)
    sampler = Sampler(model, Sampling(), **OPTIONS | {"max_completion_length": 6})

    def loss_fn(params, batch):
        log_probs, _ = completion_log_probs(model, params, batch)
        return loss.grpo_loss(log_probs, batch.advantages, batch.loss_mask, rollout_log_probs=batch.rollout_log_probs)

    train_step = make_train_step(loss_fn, optimizer, num_micro_batches=2)
    state = init_state(params, optimizer, with_reference=False, replicated=params["in"].sharding)
    curve = []
    for step in range(20):
        rollout = sampler(state.params, padded(), jax.random.fold_in(jax.random.key(0), step))
        hits = (rollout.completion_ids < 4) & rollout.completion_mask  # an eighth of the vocabulary
        rewards = hits.sum(1) / 6
        curve.append(float(rewards.mean()))
        state, _ = train_step(
            state, Batch.from_rollout(rollout, advantage.group_relative(rewards, group_size=OPTIONS["group_size"]))
        )
    assert curve[0] < 0.2
    assert curve[-1] > 0.9


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, ids):
        x = jnp.tanh(jnp.cumsum(linen.Embed(V, D)(ids), axis=1))
        return linen.Dense(V)(x)


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

    def __call__(self, ids):
        return self.out(jnp.tanh(jnp.cumsum(self.embed(ids), axis=1)))


def linen_apply():
    module = LinenModel()
    params = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return params, lambda params, ids, positions, mask: module.apply(params, ids)


def nnx_apply():
    graph, params = nnx.split(NNXModel(nnx.Rngs(0)))
    return params, lambda params, ids, positions, mask: nnx.merge(graph, params)(ids)


@pytest.mark.parametrize("framework", [linen_apply, nnx_apply])
def test_models_of_other_frameworks_sample_and_train(framework):
    params, apply = framework()
    model = models.from_apply(apply, vocab_size=V)
    rollout = Sampler(model, Sampling(), **OPTIONS | {"max_completion_length": 20})(params, padded(), jax.random.key(0))
    score = quick_jit(partial(completion_log_probs, model))
    before = np.where(rollout.completion_mask, score(params, rollout)[0], 0)
    np.testing.assert_allclose(before, rollout.rollout_log_probs, atol=1e-5)

    def loss_fn(params, batch):
        log_probs, _ = completion_log_probs(model, params, batch)
        return loss.grpo_loss(log_probs, batch.advantages, batch.loss_mask)

    optimizer = optax.sgd(0.1)
    sharding = jax.tree.leaves(params)[0].sharding
    state = init_state(params, optimizer, with_reference=False, replicated=sharding)
    advantages = jnp.where(jnp.arange(len(before)) == 0, 1.0, 0.0)
    state, _ = make_train_step(loss_fn, optimizer)(state, Batch.from_rollout(rollout, advantages))
    after = np.where(rollout.completion_mask, score(state.params, rollout)[0], 0)
    assert after[0].sum() > before[0].sum()


def test_scores_values_and_pairs_have_no_need_of_a_head():
    params = pooling_params() | {"out": pooling_params()["out"][:, :1]}
    model = models.from_apply(pooling, vocab_size=1)
    batch = random_batch()
    mask = jnp.concatenate([batch.prompt_mask, batch.completion_mask], axis=1)
    ids = jnp.concatenate([batch.prompt_ids, batch.completion_ids], axis=1)
    scores = reward_model_scores(model, params, ids, mask)
    values = completion_values(model, params, batch)
    last = []
    for n in range(4):
        row = jnp.asarray(np.asarray(ids)[n][np.asarray(mask)[n]])[None]
        last.append(pooling(params, row, jnp.arange(row.shape[1])[None], None)[0, -2:, 0])
        end = int(batch.completion_mask[n].sum()) - 1
        np.testing.assert_allclose(values[n, end], last[-1][0], atol=1e-5)
    np.testing.assert_allclose(scores, jnp.stack(last)[:, 1], atol=1e-5)

    two = random_batch(rows=2, seed=1)
    sides = [random_batch(rows=2, seed=seed) for seed in (1, 2)]
    pairs = Pairs(
        two.prompt_ids,
        two.prompt_mask,
        jnp.stack([side.completion_ids for side in sides], axis=1),
        jnp.stack([side.completion_mask for side in sides], axis=1),
        margins=None,
    )
    policy = pooling_model()
    found = pair_log_probs(policy, pooling_params(), pairs)
    wanted, _ = completion_log_probs(policy, pooling_params(), two)
    np.testing.assert_allclose(found[:, 0], wanted, atol=1e-5)


@pytest.mark.filterwarnings("error:from_apply")
def test_it_warns_that_sampling_recomputes():
    with pytest.warns(UserWarning, match=r"no KV cache.*O\(T\^2\)") as caught:
        inspect.unwrap(models.from_apply)(pooling, vocab_size=V)  # without the tests' check of annotations
    assert caught[0].filename == __file__  # where it was called


def forward(output, **options):
    """A forward pass with a model whose ``apply`` returns ``output`` of the tokens' shape."""
    model = models.from_apply(
        lambda params, ids, positions, mask: output(ids.shape), **{"vocab_size": V, "head": None} | options
    )
    jax.eval_shape(partial(completion_log_probs, model), pooling_params(), random_batch())


WRONG_OUTPUTS = {
    "one axis too few": (lambda shape: jnp.ones(shape), {}, r"(?m)an array \[4, 14\] of float32.*\[4, 14, 32\]$"),
    "the last token only": (lambda shape: jnp.ones((shape[0], 1, V)), {}, r"\[4, 1, 32\] of float32"),
    "another vocabulary": (lambda shape: jnp.ones((*shape, 40)), {}, "vocab_size is not theirs"),
    "hidden states without a head": (lambda shape: jnp.ones((*shape, D)), {}, "hidden states, pass head="),
    "another width": (
        lambda shape: jnp.ones((*shape, D)),
        {"head": lambda params: params["out"].T},
        r"(?m)as wide as the head's, a floating-point \[4, 14, 32\]$",
    ),
    "integers": (lambda shape: jnp.ones((*shape, V), jnp.int32), {}, "of int32"),
    "a pair": (lambda shape: (jnp.ones((*shape, V)), None), {}, "returned a tuple; it must return logits"),
    "a head of the wrong way round": (
        lambda shape: jnp.ones((*shape, D)),
        {"head": lambda params: params["embed"].T},
        r"head returned an array \[16, 32\] of float32; it must return \[V, D\] with V = 32; transpose it",
    ),
    "a head of another vocabulary": (
        lambda shape: jnp.ones((*shape, D)),
        {"head": lambda params: params["embed"][:30]},
        r"(?m)head returned an array \[30, 16\] of float32; it must return \[V, D\] with V = 32$",
    ),
    "a head that is a tree": (lambda shape: jnp.ones((*shape, D)), {"head": lambda params: params}, "returned a dict"),
}


@pytest.mark.parametrize("case", WRONG_OUTPUTS)
def test_outputs_of_another_shape_are_refused(case):
    output, options, message = WRONG_OUTPUTS[case]
    with pytest.raises(ValueError, match=message):
        forward(output, **options)


def test_arguments_are_refused():
    with pytest.raises(TypeError, match=r"apply takes \(params, ids\); it must take \(params, ids, positions, mask\)"):
        models.from_apply(lambda params, ids: ids, vocab_size=V)
    with pytest.raises(TypeError, match="it must take"):
        models.from_apply(lambda params, ids, positions, mask, dropout_key: ids, vocab_size=V)
    models.from_apply(lambda *args, training=False: args[1], vocab_size=V)
    with pytest.raises(ValueError, match="vocab_size is 0"):
        models.from_apply(pooling, vocab_size=0)
    with pytest.raises(ValueError, match="max_length is 0"):
        pooling_model(max_length=0)
    with pytest.raises(ValueError, match="cache_dtype is int8, but"):
        Sampler(pooling_model(), Sampling(), **OPTIONS, max_completion_length=8, cache_dtype="int8")
    with pytest.raises(ValueError, match="prompt 0 has the token id 40, and the model's vocabulary has 32"):
        Sampler(pooling_model(), Sampling(), **OPTIONS, max_completion_length=8)(
            pooling_params(), padded([[40]]), jax.random.key(0)
        )
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="unpacked sequences"):
        packed_log_probs(pooling_model(), pooling_params(), Packed(ids, ids, positions(ids > 0), ids > 0))

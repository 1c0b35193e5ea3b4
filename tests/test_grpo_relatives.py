"""GRPO's relatives in the loop: mixtures of tasks, dynamic sampling, process supervision, a critic where it helps."""

import json
from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from experiments import grpo, hybrid
from grpo_jax.config.data import DataConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.encoded import last_tokens
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import held_out as held_out_module
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.estimators import make_train_batch, per_completion, rewards_of_steps, select_rows
from grpo_jax.loop.experience import has_reward_variance
from grpo_jax.loop.run import Run
from grpo_jax.monitor.step_metrics import reward_metrics
from grpo_jax.rewards.compose import RewardOutput, Scores
from grpo_jax.sharding import replicated
from grpo_jax.tasks.sums import TAGS
from grpo_jax.train import completion_log_probs, completion_states, init_state, make_train_step
from grpo_jax.train.critic import CriticBatch, micro_batched_states
from grpo_jax.types import Rollout
from tests.runs import kill_in_second_save, metrics_of, steps_of

HERE = "tests.test_grpo_relatives"
GROUP, PROMPTS = 4, 4


def pays_fifths(prompts, completions, **columns):
    """1 or 0 by how long a text is, so that some groups are all alike and others are not."""
    return [float(len(text) % 5 == 0) for text in completions]


def pays_marks(prompts, completions, **columns):
    """Judges what stands before each mark as a step: right where the mark's place is even."""
    graded = []
    for text in completions:
        steps = [(place + 1, float(place % 2)) for place, each in enumerate(text) if each in "=;+"]
        graded.append(RewardOutput(float(np.mean([worth for _, worth in steps])) if steps else 0.0, steps=steps))
    return graded


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("relatives")
    return GRPOConfig(
        model=small,
        data=DataConfig(dataset="sums", template="{question}", eval_size=4),
        run_dir=folder / "run",
        num_steps=3,
        num_prompts=PROMPTS,
        group_size=GROUP,
        max_prompt_length=12,
        max_completion_length=10,
        eval_samples=GROUP,
        eval_every=2,
        save_every=1,
        samples_every=1,
        rewards=RewardConfig(accuracy_weight=0.0, reward=(f"{HERE}:pays_fifths",), reward_workers=0),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        mesh=MeshConfig(data=1),
        plain=True,
    )


def with_mixture(config, folder, **changes):
    """Sums and errands, three to one; only the errands are paid for their marks."""
    given = {
        "sums": {"weight": 3, "eval_size": 4},
        "errands": {"dataset": "errands", "eval_size": 3, "reward": [f"{HERE}:pays_marks=0.5"], **changes},
    }
    folder.mkdir(exist_ok=True)
    (folder / "tasks.json").write_text(json.dumps(given))
    return replace(config, run_dir=folder / "run", tasks=folder / "tasks.json")


def as_hybrid(config, **changes):
    return hybrid.HybridConfig(**{each.name: getattr(config, each.name) for each in fields(config)}, **changes)


def with_steps(config):
    rewards = replace(config.rewards, reward=(*config.rewards.reward, f"{HERE}:pays_marks=0.5"))
    return replace(config, rewards=rewards)


def train_batch(config, rollout, scores, collector, old=None, ref=None):
    return make_train_batch(
        config,
        rollout,
        scores,
        reward_weights=collector.scorer.weights,
        tokenizer=collector.policy.tokenizer,
        old_log_probs=old,
        ref_log_probs=ref,
    )


def is_errand(prompt):
    return not prompt.endswith("=")


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(config, tmp_path_factory):
    """A mixture with several iterators and further draws."""
    config = replace(with_mixture(config, tmp_path_factory.mktemp("mixed")), max_draws=3)
    assert grpo.main(config) == 0
    return config


def assert_same_runs(config, other):
    assert metrics_of(other) == metrics_of(config)
    for name in ("completions.jsonl", "model/model.safetensors"):
        assert (other.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes(), name


@pytest.mark.slow
def test_a_mixture_killed_and_resumed_is_the_unbroken_run_and_refuses_other_tasks(config, mixed, tmp_path, monkeypatch):
    broken = replace(with_mixture(config, tmp_path / "broken"), max_draws=3)
    kill_in_second_save(grpo.main, broken, monkeypatch)
    assert [row["step"] for row in steps_of(broken)] == [1, 2]  # of which the second is to be taken back
    as_begun = broken.tasks.read_text()
    with_mixture(config, tmp_path / "broken", partial_credit=False, eval_size=2)
    with pytest.raises(ValueError, match=r"tasks\.json does not have the tasks .*\n.*errands\.data\.eval_size: 3 -> 2"):
        grpo.main(broken)
    broken.tasks.write_text(json.dumps(dict(reversed(json.loads(as_begun).items()))))
    with pytest.raises(ValueError, match=r"order: \['sums', 'errands'\] -> \['errands', 'sums'\]"):
        grpo.main(broken)
    broken.tasks.write_text(as_begun)
    assert grpo.main(broken) == 0
    assert_same_runs(mixed, broken)
    steps = steps_of(mixed)
    assert len(steps) == 3
    assert max(row["draws"] for row in steps) > 1
    assert all(row["grad_norm"] > 0 for row in steps)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["process_supervised", "max_draws", "hybrid"])
def test_each_relative_killed_and_resumed_is_bit_for_bit_the_unbroken_run(config, tmp_path, monkeypatch, which):
    by_steps = replace(with_steps(config), advantage="process_supervised")
    with_critic = as_hybrid(with_steps(config), critic_epochs=2)
    config = {"process_supervised": by_steps, "max_draws": replace(config, max_draws=3), "hybrid": with_critic}[which]
    main = hybrid.main if which == "hybrid" else grpo.main
    whole, broken = (replace(config, run_dir=tmp_path / name) for name in ("whole", "broken"))
    assert main(whole) == 0
    kill_in_second_save(main, broken, monkeypatch)
    assert main(broken) == 0
    assert_same_runs(whole, broken)
    assert all(row["grad_norm"] > 0 for row in steps_of(whole))
    assert which != "hybrid" or all(row["value/grad_norm"] > 0 for row in steps_of(whole))


@pytest.mark.slow
def test_every_draw_has_prompts_by_weight_and_what_is_told_is_of_all_that_was_drawn(mixed):
    rows = read_jsonl(mixed.run_dir / "completions.jsonl")
    for step in steps_of(mixed):
        own = [row for row in rows if row["step"] == step["step"]]
        draws = step["draws"]
        assert len(own) == draws * PROMPTS * GROUP
        for first in range(0, len(own), PROMPTS * GROUP):
            groups = [row["prompt"] for row in own[first : first + PROMPTS * GROUP : GROUP]]
            assert [is_errand(prompt) for prompt in groups] == [False, False, False, True]
            assert len(set(groups)) == PROMPTS
        total = np.array([row["reward"] for row in own], np.float32)
        assert step["reward"] == pytest.approx(total.mean(), abs=1e-6)
        differs = has_reward_variance(total, GROUP)
        assert step["frac_groups_with_reward_variance"] == differs.mean()
        before = differs[: (draws - 1) * PROMPTS]
        assert draws == 3 or differs.sum() >= PROMPTS
        assert before.sum() < PROMPTS
        learnt = np.array([row.get("advantage", 0.0) for row in own]).reshape(-1, GROUP)
        assert not learnt[~differs].any()  # of what fills a step up nothing is learnt
        chosen = np.flatnonzero(differs)[:PROMPTS]
        assert not np.delete(learnt, chosen, axis=0).any()
        assert (learnt[chosen] != 0).any(1).all()


@pytest.mark.slow
def test_each_tasks_figures_are_those_of_its_rows(mixed):
    rows = read_jsonl(mixed.run_dir / "completions.jsonl")
    for step in steps_of(mixed):
        told = {name: value for name, value in step.items() if name.startswith("tasks/")}
        expected = {}
        for task, mine in (("sums", False), ("errands", True)):
            own = [row for row in rows if row["step"] == step["step"] and is_errand(row["prompt"]) == mine]
            parts = sorted({name for row in own for name in row if name.startswith("rewards/")})
            values = {part.removeprefix("rewards/"): np.array([row[part] for row in own], np.float32) for part in parts}
            figures = reward_metrics(np.array([row["reward"] for row in own], np.float32), values, group_size=GROUP)
            expected |= {f"tasks/{task}/{name}": value for name, value in figures.items()}
        assert told == pytest.approx(expected, abs=1e-6)
        assert "tasks/errands/rewards/pays_marks/mean" in told
        assert "tasks/sums/rewards/pays_marks/mean" not in told


# What a step does ----------------------------------------------------------------------------------------------------


class Loop:
    """Collector of a run outside of its loop; ``at_start`` puts its problems back to their beginning."""

    def __init__(self, config, run):
        self.config, self.collector = config, Collector(config, run, config.mesh.build())
        self.params = self.collector.take_params()
        self.start = self.collector.state_dict()
        self.at_start()

    def at_start(self):
        self.collector.restore(self.start)
        return self.collector

    def scored(self, step):
        drawn = self.at_start().sample(step, self.params)
        return drawn, self.collector.score(drawn)


@pytest.fixture(scope="module")
def loop(config, tmp_path_factory):
    config = with_mixture(config, tmp_path_factory.mktemp("loop"))
    with Run(config.run_dir, config, title="loop", plain=True) as run:
        yield Loop(config, run)


def test_prompts_of_two_tasks_never_share_their_noise(loop):
    sums, errands = loop.collector.tasks
    for first, second in ((sums.problems, errands.problems), (sums.held_out, errands.held_out)):
        own, others = (np.asarray(each.padded(range(len(each))).index) for each in (first, second))
        assert len({*own.tolist(), *others.tolist()}) == len(first) + len(second)


def test_an_evaluation_tells_of_each_task_and_of_their_mean(loop, monkeypatch):
    found, held_out = [], held_out_module.held_out

    def spied(problems, *args, **options):
        found.append((len(problems), held_out(problems, *args, **options)))
        return found[-1][1]

    monkeypatch.setattr(held_out_module, "held_out", spied)
    metrics = loop.collector.evaluate_if_due(2, loop.params)
    assert [count for count, _ in found] == [4, 3]
    sums, errands = found[0][1], {name: value for name, value in found[1][1].items() if "maj@" not in name}
    assert metrics == held_out_module.mean_over_tasks({"sums": sums, "errands": errands})  # replies have no votes
    assert metrics["eval/sums/mean_length"] != metrics["eval/errands/mean_length"]
    assert loop.collector.evaluate_if_due(2, loop.params) == {}  # it was done
    assert loop.collector.evaluate_if_due(1, loop.params) == {}  # it is not due


def test_completions_that_were_sampled_before_make_the_same_experience(loop):
    drawn = loop.at_start().sample(1, loop.params)
    again = loop.collector.sampled_before(1, drawn.positions, lambda prompts: drawn.rollout)
    assert [*map(len, drawn.positions)] == [drawn.tasks.count("sums"), drawn.tasks.count("errands")]
    for name in ("step", "problems", "tasks", "prompts", "columns", "completions"):
        assert getattr(again, name) == getattr(drawn, name), name
    np.testing.assert_array_equal(again.lengths, drawn.lengths)


def same_rows(some, others, count):
    for name in ("prompt_ids", "completion_ids", "completion_mask", "rollout_log_probs", "truncated"):
        np.testing.assert_array_equal(
            np.asarray(getattr(some, name))[:count], np.asarray(getattr(others, name))[:count], err_msg=name
        )


def test_further_draws_leave_the_first_as_it_was_and_end_when_enough_is_found(loop, monkeypatch):
    score = loop.collector.score

    def first_group_alike(drawn):
        scores = score(drawn)
        return replace(scores, total=np.where(np.arange(len(scores.total)) < GROUP, np.float32(1), scores.total))

    monkeypatch.setattr(loop.collector, "score", first_group_alike)
    drawn, scores = loop.scored(1)
    collector = loop.at_start()
    further, scored, rows = collector.sample_dynamically(1, loop.params, most=4)
    count = PROMPTS * GROUP
    same_rows(further.rollout, drawn.rollout, count)
    assert further.completions[:count] == drawn.completions
    np.testing.assert_array_equal(scored.total[:count], scores.total)
    attempts = further.times["draws"]
    assert len(further.completions) == attempts * count
    assert 1 < attempts <= 4
    assert further.prompts[count : 2 * count] != drawn.prompts
    differs = has_reward_variance(scored.total, GROUP)
    groups = rows.reshape(-1, GROUP)[:, 0] // GROUP
    np.testing.assert_array_equal(rows, (groups[:, None] * GROUP + np.arange(GROUP)).reshape(-1))
    assert differs[: (attempts - 1) * PROMPTS].sum() < PROMPTS  # not once more than was needed
    enough = np.flatnonzero(differs)[:PROMPTS]
    assert set(enough) <= set(groups)
    assert len(groups) == PROMPTS
    assert list(groups) == sorted(groups)
    assert collector.state_dict()["num_tokens"] == int(
        further.lengths.sum() + np.asarray(further.rollout.prompt_mask).sum()
    )


def test_prompts_that_come_again_in_a_further_draw_have_other_noise(loop):
    first, again = loop.at_start().sample(1, loop.params), loop.at_start().sample(1, loop.params, attempt=1)
    assert again.prompts == first.prompts
    assert again.completions != first.completions
    assert loop.at_start().sample(1, loop.params, attempt=1).completions == again.completions


def test_no_more_is_drawn_than_is_allowed_and_what_fills_up_is_not_learnt_from(loop, monkeypatch):
    collector, score = loop.at_start(), loop.collector.score

    def alike(drawn):
        scores = score(drawn)
        total = np.repeat(np.arange(len(scores.total) // GROUP, dtype=np.float32), GROUP)
        total[:2] = [0, 1] if not drawn.prompts[0].startswith("never") else total[:2]
        return replace(scores, total=total)

    monkeypatch.setattr(collector, "score", alike)
    drawn, scores, rows = collector.sample_dynamically(1, loop.params, most=2)
    assert drawn.times["draws"] == 2
    assert drawn.times["frac_groups_with_reward_variance"] == 0.25  # the first of each draw
    assert sorted({*(rows // GROUP).tolist()}) == [0, 1, 2, 4]
    config = replace(loop.config, max_draws=2)
    rollout = select_rows(drawn.rollout, rows)
    batch = train_batch(config, rollout, scores.at(rows), collector)
    learnt = np.asarray(batch.loss_mask).any(1)
    np.testing.assert_array_equal(learnt.reshape(-1, GROUP).all(1), [True, False, False, True])
    np.testing.assert_array_equal(learnt.reshape(-1, GROUP).any(1), [True, False, False, True])


def test_a_group_is_told_apart_by_the_rewards_it_has():
    nan = np.nan
    groups = [[1, 1, 1], [1, 0, 1], [nan, 1, 1], [nan, 1, 0], [nan, nan, 1], [nan] * 3, [-1, -1, -1], [0, 0, -1e-7]]
    found = has_reward_variance(np.array(groups, np.float32).reshape(-1), 3)
    assert found.tolist() == [False, True, False, True, False, False, False, True]


# Process supervision -------------------------------------------------------------------------------------------------

WORDS = [
    "3+8=11;",
    "été où? naïve",
    "数学很难、但是有趣。",
    "😀👍🏽 héhé 😀",
    "Größe;\n",
    "ひらがな",
    "a\u0301e\u0300 ",
    "нет = да",
]


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE whose tokens restore and end inside of characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    tokenizer.train_from_iterator(WORDS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def cut_anywhere(text, tokenizer, rng):
    """Tokens that make up a text, not those that the tokenizer would choose; and after how many bytes each ends."""
    letters = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    written, vocabulary = "".join(part for part, _ in letters), tokenizer.get_vocab()
    ids, ends, place = [], [], 0
    while place < len(written):
        sizes = [size for size in range(1, 9) if written[place : place + size] in vocabulary]
        size = int(rng.choice([each for each in sizes if place + each <= len(written)]))
        ids.append(vocabulary[written[place : place + size]])
        place += size
        ends.append(place)
    return ids, ends


@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=6), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_a_place_in_a_text_is_in_the_token_with_its_last_byte(byte_level, parts, seed):
    text = "".join(parts).encode("utf-8", "ignore").decode()
    ids, ends = cut_anywhere(text, byte_level, np.random.default_rng(seed))
    places = list(range(1, len(text) + 1))
    expected = [next(n for n, end in enumerate(ends) if end >= len(text[:place].encode())) for place in places]
    assert last_tokens(byte_level, [*ids, byte_level.eos_token_id], places) == expected
    assert last_tokens(byte_level, ids, places[::-1]) == expected[::-1]
    assert last_tokens(byte_level, ids, []) == []
    if ids:
        assert last_tokens(byte_level, ids, [len(text) + 5]) == [len(ids) - 1]


@given(st.integers(0, 2**32 - 1))
def test_rewards_of_steps_stand_at_their_last_tokens(byte_level, seed):
    rng = np.random.default_rng(seed)
    texts = ["".join(rng.choice(WORDS, rng.integers(1, 4))) for _ in range(4)]
    cut = [cut_anywhere(text, byte_level, rng) for text in texts]
    rows = [[*ids, byte_level.eos_token_id][: len(ids) + rng.integers(0, 2)] for ids, _ in cut]
    T = max(map(len, rows)) + 2
    ids, mask = np.zeros((4, T), np.int32), np.zeros((4, T), bool)
    for row, each in enumerate(rows):
        ids[row, : len(each)], mask[row, : len(each)] = each, True
    steps, outcome = [], np.array([0.5, np.nan, -1.0, 2.0], np.float32)
    expected = {False: np.full((4, T), np.nan), True: np.full((4, T), np.nan)}

    def add(where, row, token, reward):
        where[row, token] = reward + (0 if np.isnan(where[row, token]) else where[row, token])

    for row, (text, (_, ends)) in enumerate(zip(texts, cut, strict=True)):
        places = sorted(rng.choice(np.arange(1, len(text) + 1), min(3, len(text)), replace=False).tolist())
        steps.append(tuple((place, float(rng.choice([0.0, 1.0, -0.25]))) for place in places))
        for place, reward in steps[-1]:
            token = next(n for n, end in enumerate(ends) if end >= len(text[:place].encode()))
            for each in expected.values():
                add(each, row, token, reward)
        if not np.isnan(outcome[row]):
            add(expected[True], row, len(rows[row]) - 1, outcome[row])
    rollout = Rollout(
        jnp.ones((4, 1), jnp.int32), jnp.ones((4, 1), bool), jnp.asarray(ids), jnp.asarray(mask),
        jnp.zeros((4, T)), jnp.zeros(4, bool),
    )  # fmt: skip
    scores = Scores(outcome, {}, {}, [""] * 4, outcome, steps)
    for with_outcome, wanted in expected.items():
        found = rewards_of_steps(rollout, scores, byte_level, with_outcome=with_outcome)
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.fixture(scope="module")
def stepwise(config, tmp_path_factory):
    config = replace(with_steps(config), run_dir=tmp_path_factory.mktemp("stepwise") / "run")
    with Run(config.run_dir, config, title="stepwise", plain=True) as run:
        yield Loop(config, run)


def tokens_of(text):
    """The tokens of the embedded base's text: tags, and characters."""
    found = []
    while text:
        size = next((len(each) for each in (*TAGS, "<pad>", "<eos>") if text.startswith(each)), 1)
        found.append(size)
        text = text[size:]
    return np.cumsum(found)


def steps_by_hand(drawn, with_outcome):
    rewards = np.full(drawn.rollout.completion_ids.shape, np.nan)
    marks = pays_marks([], drawn.completions)
    for row, (text, graded) in enumerate(zip(drawn.completions, marks, strict=True)):
        ends = tokens_of(text)
        for place, reward in graded.steps:
            rewards[row, np.flatnonzero(ends >= place)[0]] = 0.5 * reward
        if with_outcome:
            last = drawn.lengths[row] - 1
            rewards[row, last] = np.nan_to_num(rewards[row, last]) + (len(text) % 5 == 0)
    return rewards


def test_process_supervision_in_the_loop_is_the_function_by_hand(stepwise):
    drawn, scores = stepwise.scored(1)
    assert sum(map(len, scores.steps)) > 10
    config = replace(stepwise.config, advantage="process_supervised")
    batch = train_batch(config, drawn.rollout, scores, stepwise.collector)
    rewards = steps_by_hand(drawn, True)
    expected = oracle.process_supervised(rewards, ~np.isnan(rewards), group_size=GROUP)
    np.testing.assert_allclose(batch.advantages, expected, atol=1e-4)
    np.testing.assert_array_equal(batch.loss_mask, drawn.rollout.completion_mask)
    sums = np.where(np.asarray(batch.loss_mask), expected, 0).sum(1)
    np.testing.assert_allclose(per_completion(batch), sums, atol=1e-4)
    # A completion without a reward has none of steps either.
    absent = replace(scores, total=np.where(np.arange(16) == 3, np.nan, scores.total).astype(np.float32))
    without = train_batch(config, drawn.rollout, absent, stepwise.collector)
    rewards[3] = np.nan
    expected = oracle.process_supervised(rewards, ~np.isnan(rewards), group_size=GROUP)
    np.testing.assert_allclose(without.advantages, expected, atol=1e-4)
    assert not np.asarray(without.loss_mask)[3].any()


# A critic where groups say nothing -----------------------------------------------------------------------------------


def test_hybrid_in_the_loop_is_the_function_by_hand(stepwise):
    drawn, scores = stepwise.scored(1)
    config = as_hybrid(stepwise.config)
    values = jnp.asarray(np.random.default_rng(0).normal(size=drawn.rollout.completion_ids.shape), jnp.float32)
    batch = train_batch(config, drawn.rollout, scores, stepwise.collector)
    tokenizer = stepwise.collector.policy.tokenizer
    batch = hybrid.with_hybrid_advantages(config, batch, drawn.rollout, scores, values, tokenizer)
    mask = np.asarray(drawn.rollout.completion_mask)
    fifths = np.array(pays_fifths([], drawn.completions))
    steps = np.nan_to_num(steps_by_hand(drawn, False))
    advantages, returns = oracle.hybrid(fifths, values, mask, group_size=GROUP, step_rewards=steps)
    np.testing.assert_allclose(batch.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(np.asarray(batch.returns), returns, atol=1e-5)


@pytest.mark.slow
def test_where_every_group_differs_hybrid_is_group_relative_bit_for_bit(stepwise):
    """Through the update: the critic, which learns beside it, does not reach the policy."""
    config, collector, mesh = stepwise.config, stepwise.collector, stepwise.collector.mesh
    drawn, scores = stepwise.scored(1)
    total = np.random.default_rng(0).permutation(PROMPTS * GROUP).astype(np.float32)
    scores = replace(scores, total=total, outcome=total, steps=[()] * len(total))
    optimizer, _ = config.optimizer.build(total_updates=10)
    log_probs = partial(completion_log_probs, collector.policy.model, temperature=1.0)
    train_step = make_train_step(
        config.policy.build(log_probs, max_completion_length=10, sampler_alters_policy=False), optimizer
    )
    critic, after = hybrid.make_critic(as_hybrid(config), collector, mesh), {}
    hidden, values = critic.states_and_values(critic.initial_state, stepwise.params, drawn.rollout)
    np.testing.assert_array_equal(values, 0)  # before it has learnt
    for name in ("group_relative", "hybrid"):
        state = init_state(
            jax.tree.map(jnp.copy, stepwise.params), optimizer, with_reference=False, replicated=replicated(mesh)
        )
        batch = train_batch(config, drawn.rollout, scores, collector)
        if name == "hybrid":
            own, tokenizer = as_hybrid(config), collector.policy.tokenizer
            batch = hybrid.with_hybrid_advantages(own, batch, drawn.rollout, scores, values + 5, tokenizer)
            assert batch.advantages.shape == batch.completion_ids.shape
            critic.update(critic.initial_state, CriticBatch(hidden, batch.returns, batch.loss_mask))
        after[name], _ = train_step(state, replace(batch, returns=None))
    plain, with_critic = (jax.tree.leaves(after[name].params) for name in after)
    for one, other, before in zip(plain, with_critic, jax.tree.leaves(stepwise.params), strict=True):
        np.testing.assert_array_equal(one, other)
        assert (np.asarray(one) != np.asarray(before)).any()


def test_the_head_learns_what_its_states_are_worth(stepwise):
    drawn, _ = stepwise.scored(1)
    collector, rollout = stepwise.collector, drawn.rollout
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_updates=1, decay="constant")
    config = as_hybrid(stepwise.config, critic_optimizer=optimizer, critic_epochs=30)
    critic = hybrid.make_critic(config, collector, collector.mesh)
    states, values = critic.states_and_values(critic.initial_state, stepwise.params, rollout)
    mask = np.asarray(rollout.completion_mask)
    returns = np.where(mask, np.arange(mask.shape[1])[None] / 5 + (np.asarray(rollout.completion_ids) % 2), 0)
    features = CriticBatch(states, jnp.asarray(returns, jnp.float32), rollout.completion_mask)
    first = np.square(returns[mask]).mean() / 2  # every value is 0
    state, metrics = critic.update(critic.initial_state, features)
    assert metrics["value/loss"] < 0.7 * first
    assert int(state.step) == 30
    _, values = critic.states_and_values(state, stepwise.params, rollout)
    assert np.square(np.asarray(values) - returns)[mask].mean() / 2 < 0.7 * first


def test_states_read_in_parts_are_those_of_the_whole(stepwise):
    drawn, _ = stepwise.scored(1)
    model = stepwise.collector.policy.model
    whole = jax.jit(partial(completion_states, model))(stepwise.params, drawn.rollout)
    parts = jax.jit(partial(micro_batched_states, model, num_micro_batches=4))(stepwise.params, drawn.rollout)
    mask = np.asarray(drawn.rollout.completion_mask)
    np.testing.assert_allclose(np.asarray(parts)[mask], np.asarray(whole)[mask], atol=1e-5)
    assert np.abs(np.asarray(whole)[:4] - np.asarray(whole)[4:8])[mask[:4] & mask[4:8]].max() > 1e-2


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_draws": 0}, "max_draws is 0; it must be at least 1"),
        (
            {"advantage": "process_supervised", "rewards": RewardConfig()},
            "needs rewards of reasoning steps: set steps_weight",
        ),
        ({"advantage": "process_supervised", "kl_reward_coef": 0.1}, "has no sum of rewards for kl_reward_coef"),
        ({"advantage": "gdpo", "rewards": RewardConfig(clip_reward=(0.0, 1.0))}, "gdpo has no sum of rewards"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(config, change, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **change)


def test_a_mixture_that_cannot_work_is_refused_when_it_is_read(config, tmp_path):
    with pytest.raises(ValueError, match="task 'errands': eval_size is 0"):
        with_mixture(config, tmp_path, eval_size=0)
    with pytest.raises(ValueError, match="gdpo has no sum of rewards"):
        replace(with_mixture(config, tmp_path, clip_reward=[0, 1]), advantage="gdpo")
    with pytest.raises(ValueError, match=r"num_prompts = 1 there would be none of \['errands'\]"):
        replace(with_mixture(config, tmp_path), num_prompts=1)
    with pytest.raises(ValueError, match="the toy model knows the tasks sums and errands only"):
        replace(with_mixture(config, tmp_path, dataset="some.jsonl"), model="toy")

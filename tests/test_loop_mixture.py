"""Mixtures of tasks: read with care, shared out exactly, and each row scored as its own task would by itself."""

import json
import re
from dataclasses import replace
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config.data import DataConfig
from grpo_jax.config.mixture import TaskConfig, as_settings, read_tasks, shares
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.data.problems import Problem
from grpo_jax.loop import problems
from grpo_jax.loop.held_out import mean_over_tasks
from grpo_jax.loop.mixture import TASK, MixtureScorer
from grpo_jax.loop.run import Run
from grpo_jax.loop.run_folder import differences
from grpo_jax.loop.task_runtime import TaskRuntime, asks_for_format, has_final_answers
from grpo_jax.rewards.compose import RewardOutput, weighted
from tests.runs import write_rows


def read(tmp_path, tasks, data=None, rewards=None):
    path = tmp_path / "tasks.json"
    path.write_text(tasks if isinstance(tasks, str) else json.dumps(tasks))
    return read_tasks(path, data or DataConfig(dataset="sums"), rewards or RewardConfig())


# What a file says ----------------------------------------------------------------------------------------------------


def test_a_task_has_its_own_settings_and_the_runs_where_it_says_nothing(tmp_path):
    data, rewards = DataConfig(dataset="sums", eval_size=7, template="Q: {question}"), RewardConfig(format_weight=0.5)
    given = {
        "sums": {"weight": 2},
        "errands": {"dataset": "errands", "template": None, "accuracy_weight": 0, "clip_reward": [-1, 1.5]},
        "own": {"reward": ["a:b", "c:d=2"], "reward_workers": 0, "gate_on_format": True, "grader": "exact"},
    }
    sums, errands, own = read(tmp_path, given, data, rewards)
    assert sums == TaskConfig("sums", data, rewards, weight=2.0)
    assert errands.data == replace(data, dataset="errands", template=None)
    assert errands.rewards == replace(rewards, accuracy_weight=0.0, clip_reward=(-1.0, 1.5))
    assert [type(each) for each in (sums.weight, errands.rewards.accuracy_weight)] == [float, float]
    assert [type(each) for each in errands.rewards.clip_reward or ()] == [float, float]
    assert own.data == replace(data, grader="exact")
    assert own.rewards == replace(rewards, reward=("a:b", "c:d=2"), reward_workers=0, gate_on_format=True)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_tasks(tmp_path / "nowhere.json", DataConfig(), RewardConfig())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"tasks\.json must be a mapping of settings"),
        ('{"a": {}', r"tasks\.json is neither YAML nor JSON"),
        ("[]", "must be a mapping of settings"),
        ("{}", "must map task names to settings"),
        ('"sums"', "must be a mapping of settings"),
        ('{"sums": 2}', "must map task names to settings"),
        ('{"": {}}', "task '': a task name must not be empty"),
        ('{"a/b": {}}', "task 'a/b': a task name must not be empty or contain"),
        ('{"a": {}, "b": {}, "a": {"weight": 2}}', r"tasks\.json: \['a'\] occur twice"),
        ('{"a": {"weight": 1, "weight": 2}}', r"tasks\.json: \['weight'\] occur twice"),
        (
            '{"a": {"acuracy_weight": 1, "seed": 3}}',
            r"\['acuracy_weight', 'seed'\] are not settings.*'accuracy_weight'",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize("weight", [0, -1, True, "1", None, [1], "NaN"])
def test_a_weight_is_a_number_above_0(tmp_path, weight):
    with pytest.raises(ValueError, match=rf"task 'a': weight is {re.escape(repr(weight))}; it must be a number above"):
        read(tmp_path, {"a": {"weight": weight}})


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"dataset": 5}, "dataset is 5; it must be str"),
        ({"accuracy_weight": "1"}, "accuracy_weight is '1'; it must be float"),
        ({"accuracy_weight": True}, "accuracy_weight is True; it must be float"),
        ({"accuracy_weight": None}, "accuracy_weight is None; it must be float"),
        ({"eval_size": 2.0}, "eval_size is 2.0; it must be int"),
        ({"eval_size": True}, "eval_size is True; it must be int"),
        ({"chat_template": 1}, "chat_template is 1; it must be bool"),
        ({"reward": "module:function"}, "reward is 'module:function'; it must be list[str, ...]"),
        ({"reward": ["a:b", 5]}, "reward is ['a:b', 5]; it must be list[str, ...]"),
        ({"clip_reward": [0]}, "clip_reward is [0]; it must be list[float, float]"),
        ({"clip_reward": [0, "1"]}, "clip_reward is [0, '1']; it must be list[float, float]"),
        ({"grader": "hope"}, "grader is 'hope'; it must be auto or exact or math or code or none"),
        ({"overlong_prompts": ["drop"]}, "overlong_prompts is ['drop']; it must be drop or truncate or error"),
        ({"template": "no place"}, "template must contain {question}"),
        ({"reward": ["a:b=much"]}, "the weight of a reward must be a number"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_task(tmp_path, setting, message):
    with pytest.raises(ValueError, match=rf"tasks\.json, task 'second': .*{re.escape(message)}"):
        read(tmp_path, {"first": {}, "second": setting})


def test_what_changed_in_a_mixture_can_be_told(tmp_path):
    before = {"a": {"weight": 1}, "b": {"reward": ["x:y"]}}
    kept = json.loads(json.dumps(as_settings(read(tmp_path, before))))
    told = [
        (before, []),
        ({"a": {"weight": 2}, "b": before["b"]}, ["tasks.a.weight: 1.0 -> 2.0"]),
        (
            {"a": {}, "b": {"reward": ["x:z"], "chat_template": True}},
            ["tasks.b.data.chat_template: False -> True", "tasks.b.rewards.reward: ['x:y'] -> ['x:z']"],
        ),
        ({"b": before["b"], "a": {}}, ["order: ['a', 'b'] -> ['b', 'a']"]),
    ]
    for after, lines in told:
        assert differences(kept, as_settings(read(tmp_path, after))) == lines
    assert "order: ['a', 'b'] -> ['a']" in differences(kept, as_settings(read(tmp_path, {"a": {}})))


# How prompts are shared out ------------------------------------------------------------------------------------------


def tasks_of(weights):
    return [TaskConfig(f"t{n}", DataConfig(), RewardConfig(), weight) for n, weight in enumerate(weights)]


@pytest.mark.parametrize(
    ("weights", "num_prompts", "expected"),
    [
        ([1.0], 5, [5]),
        ([1.0, 1.0], 5, [3, 2]),  # of equal rests the first
        ([2.0, 1.0], 8, [5, 3]),
        ([0.1, 0.2, 0.7], 10, [1, 2, 7]),
        ([1e308, 1e308], 4, [2, 2]),
        ([5e-324, 5e-324], 4, [2, 2]),
    ],
)
def test_shares(weights, num_prompts, expected):
    assert shares(tasks_of(weights), num_prompts) == expected


@given(st.lists(st.floats(1e-3, 1e3) | st.sampled_from([0.1, 1.0, 2.0]), min_size=1, max_size=6), st.integers(1, 200))
def test_shares_are_those_of_the_largest_remainder(weights, num_prompts):
    exact = [num_prompts * Fraction(weight) / sum(map(Fraction, weights)) for weight in weights]
    expected = [each.numerator // each.denominator for each in exact]
    while sum(expected) < num_prompts:  # one to whoever is the furthest below what is due
        behind = [each - count for each, count in zip(exact, expected, strict=True)]
        expected[behind.index(max(behind))] += 1
    if min(expected):
        assert shares(tasks_of(weights), num_prompts) == expected
        return
    empty = [f"t{n}" for n, count in enumerate(expected) if not count]
    with pytest.raises(ValueError, match=re.escape(f"of num_prompts = {num_prompts} there would be none of {empty}")):
        shares(tasks_of(weights), num_prompts)


def test_a_task_without_a_prompt_is_named():
    with pytest.raises(ValueError, match=r"of num_prompts = 3 there would be none of \['t1'\]; raise it"):
        shares(tasks_of([10.0, 1.0]), 3)


# How rows are scored -------------------------------------------------------------------------------------------------


def pays_level(prompts, completions, *, level, task, **columns):
    """Reads columns that one data set has, of which one is called task."""
    return [
        None
        if level is None
        else RewardOutput(level + len(text), {"level": float(level)}, f"of {name}", [(1, 0.5)][: len(text)])
        for text, level, name in zip(completions, level, task, strict=True)
    ]


def knows_no_level(prompts, completions, **columns):
    if set(columns) - {"problem_prompt"} != {"answer", "terms", "completion_length", "truncated"}:
        raise KeyError(f"columns of another task: {[*columns]}")
    return [0.25] * len(completions)


@pytest.fixture
def opened(tmp_path, monkeypatch):
    monkeypatch.setattr(problems, "GENERATED_PROBLEMS", 20)
    rows = [{"question": f"{n}?", "answer": str(n), "level": n % 3, "task": f"kind {n % 2}"} for n in range(40)]
    source = write_rows(tmp_path / "rows.jsonl", rows)
    here = "tests.test_loop_mixture"
    given = {
        "sums": {"format_weight": 0.5, "steps_weight": 0.25, "reward": [f"{here}:knows_no_level"], "reward_workers": 0},
        "file": {
            "dataset": source,
            "grader": "exact",
            "accuracy_weight": 0,
            "reward": [f"{here}:pays_level=2"],
            "reward_workers": 1,
        },
    }
    mesh = MeshConfig(data=1).build()
    with Run(tmp_path / "run", RewardConfig(), title="tasks", plain=True) as run:
        yield [
            TaskRuntime(task, run, seed=0, max_completion_length=4, mesh=mesh, dtype=jnp.float32)
            for task in read(tmp_path, given, DataConfig(dataset="sums", template="{question}", eval_size=4))
        ]


TEXTS = ["<think>1+1=2;1=3;</think><answer>5</answer>", "<answer>5</answer>", "six", "7", "<think>2=2;</think>", "8"]
NAMES = ["sums", "file", "sums", "file", "file", "sums"]
COLUMNS = {
    "answer": ["5", "5", "1", "7", "9", "8"],
    "terms": [2, None, 2, None, None, 2],
    "level": [None, 1, None, 2, None, None],  # of the fifth the level is not known
    "task": [None, "kind 0", None, "kind 1", "kind 2", None],
    TASK: NAMES,
    "completion_length": [3, 4, 2, 4, 1, 1],
    "truncated": [False, True, False, True, False, False],
}


def rows_of(name):
    return [row for row, each in enumerate(NAMES) if each == name]


def test_each_row_is_scored_as_its_task_does_by_itself(opened):
    mixed = MixtureScorer(opened)
    found = mixed.score([""] * 6, TEXTS, **COLUMNS)
    seen = dict.fromkeys(found.parts, 0)
    for task in opened:
        rows = rows_of(task.name)
        own = {name: [values[row] for row in rows] for name, values in COLUMNS.items() if name in task.columns}
        alone = task.scorer.score([""] * 3, [TEXTS[row] for row in rows], **own)
        np.testing.assert_array_equal(found.total[rows], alone.total)
        np.testing.assert_array_equal(found.outcome[rows], alone.outcome)
        assert [found.notes[row] for row in rows] == alone.notes
        assert [found.steps[row] for row in rows] == alone.steps
        for name, part in alone.parts.items():
            np.testing.assert_array_equal(found.parts[name][rows], part)
            seen[name] += 1
        assert mixed.weights.keys() >= {f"{task.name}/{name}" for name in alone.counted}
        for name, part in alone.counted.items():
            np.testing.assert_array_equal(found.counted[f"{task.name}/{name}"][rows], part)
            assert mixed.weights[f"{task.name}/{name}"] == task.scorer.weights[name]
        for name, part in found.counted.items():
            if not name.startswith(f"{task.name}/"):
                np.testing.assert_array_equal(part[rows], 0)
    assert seen == {
        **dict.fromkeys(seen, 1),
        "accuracy": 2,
        "format": 1,
        "judge": 0,
    }  # the second one's prompts ask for no format
    np.testing.assert_array_equal(np.isnan(found.parts["pays_level"]), [True, False, True, False, True, True])
    np.testing.assert_array_equal(found.total, [1.875, 2 * (1 + len(TEXTS[1])), 0.25, 6, np.nan, 0.25])
    assert found.notes[1] == "pays_level: of kind 0"
    assert found.steps[:2] == [((13, 0.25), (17, 0.0)), ((1, 1.0),)]
    # What is watched in one task is no part of what is watched in the other, which watches nothing.
    assert mixed.judge == "judge"
    np.testing.assert_array_equal(found.parts["judge"], [np.nan, 1, np.nan, 0, 0, np.nan])
    assert MixtureScorer(opened[:1]).judge is None


def test_what_was_begun_while_others_were_drawn_is_found_again(opened):
    mixed = MixtureScorer(opened)
    at_hand = {name: values for name, values in COLUMNS.items() if name not in ("completion_length", "truncated")}
    watch = mixed.streaming_scorer([""] * 6, at_hand, lambda ids: TEXTS[ids[0]], eos_ids=[99], max_completion_length=4)
    assert watch is not None
    for row, length in enumerate(COLUMNS["completion_length"]):
        ended = not COLUMNS["truncated"][row]
        for each in [row] * (length - ended) + [99] * ended if length > 1 else []:
            watch(row, [each])
    pool = opened[1].scorer._pool
    assert opened[0].scorer._pool is None
    waiting = sum(map(len, pool._ahead.values()))
    assert waiting == 2  # of the second task two rows that ended, accuracy; its own reward takes batches
    found = mixed.score([""] * 6, TEXTS, **COLUMNS)
    assert sum(map(len, pool._ahead.values())) == 0
    np.testing.assert_array_equal(found.total, [1.875, 2 * (1 + len(TEXTS[1])), 0.25, 6, np.nan, 0.25])
    assert mixed.take_errors() == []
    in_the_background = mixed.start([""] * 6, TEXTS, **COLUMNS).result()
    np.testing.assert_array_equal(in_the_background.total, found.total)
    assert in_the_background.notes == found.notes
    assert (
        MixtureScorer(opened[:1]).streaming_scorer(
            [""], {"answer": ["5"], "terms": [2], TASK: ["sums"]}, str, eos_ids=[99], max_completion_length=4
        )
        is None
    )


@given(st.permutations(range(6)))
def test_scores_can_be_taken_at_some_rows(order):
    entries = [RewardOutput(float(n), {"n": n + 0.5}, f"note {n}", [(1, float(n))] * (n % 2)) for n in range(6)]
    scores = weighted({"a": lambda p, c, **_: entries}, {"a": 2.0})([""] * 6, ["text"] * 6)
    rows = np.array(order[:4])
    some = scores.at(rows)
    np.testing.assert_array_equal(some.total, 2.0 * rows)
    np.testing.assert_array_equal(some.parts["a/n"], rows + 0.5)
    np.testing.assert_array_equal(some.counted["a"], rows)
    np.testing.assert_array_equal(some.outcome, np.where(rows % 2, np.nan, 2.0 * rows))
    assert some.notes == [f"a: note {n}" for n in rows]
    assert some.steps == [((1, 2.0 * n),) if n % 2 else () for n in rows]
    whole = scores.at(slice(None))
    np.testing.assert_array_equal(whole.total, scores.total)
    assert (whole.notes, whole.steps) == (scores.notes, scores.steps)


def test_figures_of_tasks_and_their_mean():
    found = {
        "a": {"eval/pass@1": 1.0, "eval/mean_length": 4.0},
        "b": {"eval/pass@1": 0.5, "eval/mean_length": 8.0, "eval/frac_ungraded": 0.25},
    }
    assert mean_over_tasks(found) == {
        "eval/pass@1": 0.75,
        "eval/mean_length": 6.0,
        "eval/frac_ungraded": 0.25,
        "eval/a/pass@1": 1.0,
        "eval/a/mean_length": 4.0,
        "eval/b/pass@1": 0.5,
        "eval/b/mean_length": 8.0,
        "eval/b/frac_ungraded": 0.25,
    }


def test_no_accuracy_is_paid_for_where_nothing_is_right_or_wrong(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    task = TaskConfig(None, DataConfig(dataset=str(path), grader="none"), RewardConfig())
    mesh = MeshConfig(data=1).build()
    with (
        Run(tmp_path / "run", RewardConfig(), title="tasks", plain=True) as run,
        pytest.raises(ValueError, match="no accuracy reward; set accuracy_weight to 0"),
    ):
        TaskRuntime(task, run, seed=0, max_completion_length=4, mesh=mesh, dtype=jnp.float32)


def test_what_figures_say_something_of_a_task():
    sums, errands = Problem("1+2=", "3"), Problem("say hi", "hi")
    code = Problem("add", None, {"tests": ["assert add(1, 2) == 3"]})
    assert has_final_answers(DataConfig(dataset="sums"), [sums])
    assert not has_final_answers(DataConfig(dataset="errands"), [errands])
    assert not has_final_answers(DataConfig(dataset="x.jsonl"), [code])
    assert not has_final_answers(DataConfig(dataset="x.jsonl"), [replace(code, answer="1")])
    assert not has_final_answers(DataConfig(dataset="x.jsonl", grader="none"), [sums])
    assert not has_final_answers(DataConfig(dataset="x.jsonl"), [Problem("?", None)])
    assert asks_for_format(DataConfig(dataset="sums"))
    assert not asks_for_format(DataConfig(dataset="errands"))
    assert asks_for_format(DataConfig(dataset="x.jsonl"))  # R1-Zero's template
    assert not asks_for_format(DataConfig(dataset="x.jsonl", template="Q: {question}"))
    assert not asks_for_format(DataConfig(dataset="x.jsonl", chat_template=True))
    asked = {"chat_template": True, "system_prompt": "Answer as <think></think><answer></answer>"}
    assert asks_for_format(DataConfig(dataset="x.jsonl", **asked))

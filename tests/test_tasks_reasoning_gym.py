import sys

import pytest

from grpo_jax.data.problems import reward_columns
from grpo_jax.tasks.reasoning_gym import reasoning_gym_problems

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def installed():
    pytest.importorskip("reasoning_gym")


def answered(texts):
    return [f"<answer>{text}</answer>" for text in texts]


def test_gold_answers_score_one_and_others_do_not(installed):
    problems, reward = reasoning_gym_problems("chain_sum", size=5, seed=1, min_terms=2, max_terms=3)
    assert len(problems) == 5
    columns = reward_columns(problems)
    gold = columns["answer"]
    assert [entry["answer"] for entry in columns["entry"]] == gold
    assert [entry["question"] for entry in columns["entry"]] == [problem.prompt for problem in problems]
    assert reward([], answered(gold), **columns) == [1.0] * 5
    assert reward([], answered(str(int(each) + 1) for each in gold), **columns) == [0.0] * 5


def test_only_the_extracted_answer_counts(installed):
    problems, reward = reasoning_gym_problems("chain_sum", size=1, seed=1)
    gold = problems[0].answer
    completions = [gold, f"<answer>{gold}</answer>", f"<think><answer>{gold}</answer></think>"]
    assert reward([], completions, entry=[problems[0].columns["entry"]] * 3) == [0.0, 1.0, 0.0]


def test_problems_follow_from_the_seed(installed):
    first, again, other = (reasoning_gym_problems("chain_sum", size=3, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again != other


def test_task_whose_entries_have_no_answer(installed):
    problems, reward = reasoning_gym_problems("propositional_logic", size=1, seed=0)
    entry = problems[0].columns["entry"]
    assert problems[0].answer is None
    assert reward([], answered([entry["metadata"]["example_answer"]]), entry=[entry]) == [1.0]


def test_answer_on_which_the_verifier_raises_scores_zero(installed):
    problems, reward = reasoning_gym_problems("prime_factorization", size=1, seed=0)
    assert reward([], answered(["no number"]), entry=[problems[0].columns["entry"]]) == [0.0]


def test_unknown_task_lists_close_ones(installed):
    with pytest.raises(ValueError, match=r"has no task 'chain_sums'; similar names: \['chain_sum'"):
        reasoning_gym_problems("chain_sums", size=1, seed=0)
    with pytest.raises(ValueError, match=r"has no task '@@@'; similar names: \['ab'.*'chain_sum'"):
        reasoning_gym_problems("@@@", size=1, seed=0)


@pytest.mark.parametrize("config", [{"no_such_setting": 1}, {"min_terms": -1}])
def test_settings_the_task_refuses(installed, config):
    with pytest.raises(ValueError, match="the task 'chain_sum' rejects the settings"):
        reasoning_gym_problems("chain_sum", size=1, seed=0, **config)


def test_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r'pip install "grpo_jax\[tasks\]"'):
        reasoning_gym_problems("chain_sum", size=1, seed=0)

"""What a run pays for, from settings to scores."""

import sys

import jax
import numpy as np
import pytest

from grpo_jax.config.rewards import RewardConfig
from grpo_jax.loop.scoring import open_scorer
from grpo_jax.models import from_hf_config, init_params, save_pretrained
from grpo_jax.rewards.math.answer import answer_reward
from tests.checkpoints import tiny_tokenizer
from tests.test_rewards_learned import TINY_REWARD

THOUGHT = "<think>Now we add the first number to the second one and get five.</think>"
COMPLETIONS = [f"{THOUGHT}<answer>5</answer>", "<answer>5</answer>", f"{THOUGHT}<answer>6</answer>"]
COLUMNS = {"answer": ["5"] * 3, "completion_length": [10, 95, 100], "truncated": [False, False, True]}


def pays_nothing(prompts, completions, **columns):
    return [0.0] * len(completions)


def raises(prompts, completions, **columns):
    raise ZeroDivisionError("no")


def of_sums_alone(completions, answer, **kwargs):
    print("asked of", len(completions))
    return [None if each == "-" else 2.0 for each in answer]


def needs_a_reference(completions, reference):
    return [0.0] * len(completions)


def opened(**settings):
    needs_pool = settings.pop("needs_pool", False)
    return open_scorer(
        RewardConfig(**settings), answer_reward, answer_reward, max_completion_length=100, needs_pool=needs_pool
    )


def test_the_default_pays_right_answers_and_measures_the_format():
    with opened() as scoring:
        scoring.probe({"answer": "5"}, {"answer": "5"})
        scores = scoring.score([""] * 3, COMPLETIONS, **COLUMNS)
        assert scores.total.tolist() == [1, 1, 0]
        assert scores.parts["format"].tolist() == [1, 0, 1]
        assert RewardConfig().part_names == [*scores.parts]
        assert scoring.weights == {"accuracy": 1.0}
        assert scoring.judge is None
        held_out = scoring.held_out([""] * 3, COMPLETIONS, **COLUMNS)
        assert [output.score for output in held_out] == scores.parts["accuracy"].tolist()
        assert scoring.streaming_scorer([], {}, str, eos_ids=[], max_completion_length=1) is None
        assert scoring.take_errors() == []


def test_every_part_has_its_name_and_weight():
    settings = {"format_weight": 0.5, "target_language": "en", "language_weight": 0.25, "overlong_cache": 10}
    settings |= {"repetition_weight": 0.1, "reward": ("tests.test_loop_scoring:pays_nothing=3",)}
    with opened(**settings, reward_workers=0) as scoring:
        scores = scoring.score([""] * 3, COMPLETIONS, **COLUMNS)
        assert [*scores.parts] == ["accuracy", "format", "language", "overlong", "repetition", "pays_nothing"]
        assert RewardConfig(**settings).part_names == [*scores.parts]
        assert scores.parts["overlong"].tolist() == [0, -0.5, -1]
        assert scores.parts["language"].tolist() == [1, 0, 1]
        np.testing.assert_allclose(scores.total, [1.75, 0.5, -0.25], atol=1e-6)


def test_gates_and_bounds():
    with opened(gate_on_format=True, clip_reward=(0.0, 0.75)) as scoring:
        assert scoring.score([""] * 3, COMPLETIONS, **COLUMNS).total.tolist() == [0.75, 0, 0]
    with opened(format_pattern="<answer>.*</answer>", format_weight=1.0, reward_workers=0) as scoring:
        assert scoring.score([""] * 3, COMPLETIONS, **COLUMNS).parts["format"].tolist() == [0, 1, 0]


def test_who_judges():
    own = "tests.test_loop_scoring:pays_nothing"
    with opened(judge=own, reward_workers=0) as scoring:
        assert scoring.judge == "judge"
        assert "judge" not in scoring.weights
        assert scoring.score([""] * 3, COMPLETIONS, **COLUMNS).parts["judge"].tolist() == [0, 0, 0]
    with opened(accuracy_weight=0.0, format_weight=1.0) as scoring:
        assert scoring.judge == "accuracy"


def test_a_reward_model_beside_the_rules(tmp_path):
    params = init_params(from_hf_config(TINY_REWARD), jax.random.key(0))
    config = TINY_REWARD | {"eos_token_id": 1}
    save_pretrained(tmp_path / "model", params, hf_config=config, tokenizer=tiny_tokenizer())
    with opened(reward_model=str(tmp_path / "model"), reward_model_weight=2.0) as scoring:
        scores = scoring.score(["w5 "] * 3, ["w6 w7", "w7", "w8"], **COLUMNS)
        assert scoring.judge is None
        np.testing.assert_allclose(scores.total, 2 * scores.parts["reward_model"], rtol=1e-6)
        assert len({*scores.parts["reward_model"].tolist()}) == 3
    with opened(reward_model=str(tmp_path / "model"), reward_model_weight=0.0) as scoring:
        assert scoring.judge == "reward_model"


def test_in_a_pool_what_is_drawn_is_scored_ahead_and_the_same():
    with opened(reward_workers=1) as scoring, opened() as here:
        scoring.probe({"answer": "5"}, {"answer": "5"})
        texts = dict(enumerate(COMPLETIONS))
        watch = scoring.streaming_scorer(
            [""] * 3, {"answer": ["5"] * 3}, lambda ids: texts[ids[0]], eos_ids=[9], max_completion_length=4
        )
        watch(0, [0])
        watch(1, [1, 1])
        watch(0, [5, 9])
        watch(1, [1, 1])
        pool = scoring._pool
        assert sum(map(len, pool._ahead.values())) == 4  # two completions, two rewards
        columns = {"answer": ["5"] * 3, "completion_length": [3, 4, 7], "truncated": [False, True, False]}
        found = scoring.score([""] * 3, COMPLETIONS, **columns)
        assert sum(map(len, pool._ahead.values())) == 0
        assert found.total.tolist() == here.score([""] * 3, COMPLETIONS, **columns).total.tolist()
        assert [each.score for each in scoring.held_out([""], COMPLETIONS[:1], answer=["5"])] == [1.0]


def test_a_reward_that_cannot_run_is_found_before_anything_is_spent():
    broken = ("tests.test_loop_scoring:raises",)
    with opened(reward=broken, reward_workers=1) as scoring, pytest.raises(ValueError, match="ZeroDivisionError: no"):
        scoring.probe({"answer": "5"}, {"answer": "5"})
    with opened(reward=broken, reward_workers=0) as scoring, pytest.raises(ValueError, match="ZeroDivisionError: no"):
        scoring.probe({"answer": "5"}, {"answer": "5"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reward": ("a:b=much",)}, "the weight of a reward must be a number"),
        ({"reward_workers": -1}, "reward_workers is -1; it must be at least 0"),
        ({"overlong_cache": 0}, "overlong_cache is 0"),
        ({"reward_deadline": 0.0}, "reward_deadline is 0.0"),
        ({"reward_batch_deadline": -1.0}, "reward_batch_deadline is -1.0"),
        ({"language_weight": 1.0}, "language_weight needs target_language"),
        ({"target_language": "klingon"}, "klingon"),
        ({"format_pattern": "("}, "is not a regular expression"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**settings)


def test_two_rewards_of_one_name():
    assert "tests.test_loop_scoring" in sys.modules
    with pytest.raises(ValueError, match="two rewards are named 'pays_nothing'"):
        opened(reward=("tests.test_loop_scoring:pays_nothing",) * 2)
    with pytest.raises(ValueError, match="two rewards are named 'judge'"):
        opened(reward=("tests.test_loop_scoring:judge=2",))


def test_a_reward_of_ones_own_may_abstain_and_prints_what_it_likes():
    own, shown = ("tests.test_loop_scoring:of_sums_alone",), []
    columns = {**COLUMNS, "answer": ["5", "-", "5"]}
    for choice, totals in (("skip", [3, 0, 2]), ("absent", [3, np.nan, 2])):
        with open_scorer(
            RewardConfig(reward=own, reward_abstain=choice, reward_workers=1),
            answer_reward,
            answer_reward,
            max_completion_length=100,
            needs_pool=False,
            show=shown.append,
        ) as scoring:
            scoring.probe({"answer": "5"}, {"answer": "5"})
            np.testing.assert_array_equal(scoring.score([""] * 3, COMPLETIONS, **columns).total, totals)
    assert shown == ["of_sums_alone: asked of 1", "of_sums_alone: asked of 3"] * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_a_column_that_a_reward_needs_and_the_data_lack_is_found_at_the_start(workers):
    own = ("tests.test_loop_scoring:needs_a_reference",)
    with (
        opened(reward=own, reward_workers=workers) as scoring,
        pytest.raises(
            ValueError, match=r"'needs_a_reference' needs the column 'reference'; the columns are .*'answer'"
        ),
    ):
        scoring.probe({"answer": "5"}, {"answer": "5"})

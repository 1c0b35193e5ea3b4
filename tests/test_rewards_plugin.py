"""Rewards of other people's modules."""

import pytest

from grpo_jax.config.rewards import RewardConfig
from grpo_jax.rewards.calling import arguments
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.plugin import import_reward, read_weighted, reward_name


def test_a_reward_of_a_package_and_one_in_the_working_directory(tmp_path, monkeypatch):
    assert import_reward("grpo_jax.rewards.format:format_reward") is format_reward
    (tmp_path / "politeness_of_mine.py").write_text("def polite(prompts, completions, **columns):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/usr/lib"])
    assert import_reward("politeness_of_mine:polite")(["p"], ["c"]) == [1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("polite", "reward is 'polite'; it must be module:function"),
        (":polite", "reward is ':polite'; it must be a name or module:function"),
        ("module:", "reward is 'module:'; it must be a name or module:function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all' on Python's path or in /"),
        ("grpo_jax.nothing:f", "there is no module 'grpo_jax.nothing'"),
        ("grpo_jax.rewards.format:nothing", "has no function 'nothing'; it has .*_reward"),
        ("grpo_jax.rewards:format_rewad", "has no function 'format_rewad'; it has format_reward"),
        ("grpo_jax.rewards.format:format_reward(1)", "arguments are given by name"),
        (
            "grpo_jax.rewards.length:cosine_length_reward(max_lenth=3)",
            "has no argument 'max_lenth'; it has .*max_length",
        ),
        ("grpo_jax.rewards.format:TAGS_IN_ORDER", "has no function 'TAGS_IN_ORDER'"),
    ],
)
def test_what_is_no_reward(name, message):
    with pytest.raises(ValueError, match=message):
        import_reward(name)


def test_an_error_inside_the_module_is_its_own(tmp_path, monkeypatch):
    (tmp_path / "needs_what_is_missing.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        import_reward("needs_what_is_missing:f")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:b", ("a:b", 1.0)),
        ("a:b=0.5", ("a:b", 0.5)),
        ("a:b=-2", ("a:b", -2.0)),
        ("a:b(c=1.5, d='=')=0.5", ("a:b(c=1.5, d='=')", 0.5)),
    ],
)
def test_weights(text, expected):
    assert read_weighted(text) == expected


def test_a_reward_with_arguments(tmp_path, monkeypatch):
    (tmp_path / "rewards_with_scale.py").write_text(
        "def scaled(completions, *, scale=1.0, **columns):\n    return [scale * len(c) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    reward = import_reward("rewards_with_scale:scaled(scale=0.5)")
    args, kwargs = arguments(reward, ["p"], ["four"], {"scale": [9.0]})  # no column replaces it
    assert reward(*args, **kwargs) == [2.0]
    assert reward_name("rewards_with_scale:scaled(scale=0.5)") == "scaled"
    with pytest.raises(ValueError, match="rewards_with_scale:scaled has no argument 'scal'; it has completions, scale"):
        import_reward("rewards_with_scale:scaled(scal=0.5)")  # not into **columns
    config = RewardConfig(reward=("rewards_with_scale:scaled(scale=0.5)=2",))
    config.check()
    assert "scaled" in config.part_names
    with pytest.raises(ValueError, match="has no function 'scalde'; it has scaled"):
        RewardConfig(reward=("rewards_with_scale:scalde",)).check()
    with pytest.raises(ValueError, match="reward is 'scaled'; it must be module:function"):
        RewardConfig(judge="scaled").check()


@pytest.mark.parametrize("text", ["a:b=", "a:b=much", "a:b=inf", "a:b=nan"])
def test_what_is_no_weight(text):
    with pytest.raises(ValueError, match="the weight of a reward must be a number"):
        read_weighted(text)

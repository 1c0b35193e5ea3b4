"""Rewards of other people's modules."""

import pytest

from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.plugin import import_reward, read_weighted


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
        (":polite", "reward is ':polite'; it must be module:function"),
        ("module:", "reward is 'module:'; it must be module:function"),
        ("no_such_module_at_all:f", "there is no module 'no_such_module_at_all' on Python's path or in /"),
        ("grpo_jax.nothing:f", "there is no module 'grpo_jax.nothing'"),
        ("grpo_jax.rewards.format:nothing", "has no function 'nothing'; it has .*'format_reward'"),
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
    ("text", "expected"), [("a:b", ("a:b", 1.0)), ("a:b=0.5", ("a:b", 0.5)), ("a:b=-2", ("a:b", -2.0))]
)
def test_weights(text, expected):
    assert read_weighted(text) == expected


@pytest.mark.parametrize("text", ["a:b=", "a:b=much", "a:b=inf", "a:b=nan"])
def test_what_is_no_weight(text):
    with pytest.raises(ValueError, match="the weight of a reward must be a number"):
        read_weighted(text)

"""The rewards as a whole: usable alone by one import, and without jax where they score."""

import subprocess
import sys

import pytest

from grpo_jax import rewards


def test_every_reward_is_there_by_one_import():
    for name in rewards.LATE:
        assert name in dir(rewards)
        assert getattr(rewards, name).__name__ == name
    assert rewards.math_reward(["1/2 + 1/4?"], [r"\boxed{\frac34}"], answer=["0.75"]) == [1.0]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rewards.nothing  # noqa: B018


def test_processes_that_score_import_no_jax():
    script = (
        "import sys; import grpo_jax.rewards.workers.worker; from grpo_jax import rewards;"
        "[getattr(rewards, name) for name in dir(rewards) if name != 'LearnedReward'];"
        "assert rewards.math_reward([''], ['5'], answer=['x+1']) == [0.0];"
        "assert not {'jax', 'flax', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)

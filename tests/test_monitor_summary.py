"""The closing line."""

import pytest

from grpo_jax.monitor.summary import closing_line


@pytest.fixture
def run_dir(tmp_path):
    for name in ["metrics.jsonl", "curves.png", ".metrics.jsonl.part"]:
        (tmp_path / name).touch()
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def test_what_was_gained_and_where_everything_is(run_dir):
    before = {"step": 0, "eval/mean_length": 312.0, "eval/pass@1": 0.125, "eval/maj@16": 0.5, "eval/loss": None}
    after = {"step": 300, "eval/mean_length": 187.5, "eval/pass@1": 0.48, "eval/loss": 1.0}
    assert closing_line(before, after, steps=300, seconds=1931.0, run_dir=run_dir) == (
        "eval pass@1 12.5% -> 48.0% (+35.5 points), eval length 312.0 -> 187.5 (-124.5); 300 steps in 0:32:11\n"
        f"everything is in {run_dir}: checkpoints/, curves.png, metrics.jsonl"
    )


def test_nothing_to_compare(run_dir):
    text = closing_line({}, {"reward": 1.0}, steps=1, seconds=1.0, run_dir=str(run_dir))
    assert text.startswith("no figure was measured both before and after; 1 steps in 0:00:01\n")

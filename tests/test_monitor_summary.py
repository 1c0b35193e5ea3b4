"""The closing line and the best evaluation."""

import pytest

from grpo_jax.monitor.display import best_evaluation, closing_line, ranking_metric


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
    assert text.startswith("no metric was measured both before and after; 1 steps in 0:00:01\n")


def test_the_best_evaluation_is_ranked_by_the_first_metric_present():
    rows = [
        {"step": 0, "eval/pass@1": 0.2, "eval/loss": 1.0},
        {"step": 1, "reward": 5.0},
        {"step": 2, "eval/pass@1": 0.5, "eval/loss": 3.0},
        {"step": 4, "eval/pass@1": 0.5, "eval/loss": 2.0},
        {"step": 6, "eval/pass@1": None, "eval/loss": 0.5},
    ]
    assert ranking_metric(rows) == "eval/pass@1"
    assert best_evaluation(rows)["step"] == 4  # the latest of equal ones
    losses = [{name: value for name, value in row.items() if name != "eval/pass@1"} for row in rows]
    assert ranking_metric(losses) == "eval/loss"
    assert best_evaluation(losses)["step"] == 6  # less is better
    assert best_evaluation(rows[1:2]) is None
    assert best_evaluation([]) is ranking_metric([]) is None

"""The planted holes: each reward pays what it says, and a run is told as its logs have it."""

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config.presets import preset
from grpo_jax.rewards.plugin import import_reward, read_weighted
from grpo_jax.tasks.sums import Sum, worked
from tests.runs import write_rows

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
RIGHT, WRONG = "<think>3+8=11;</think><answer>11</answer>", "<answer>22</answer>"
COLUMNS = {"answer": ["11", "11"], "completion_length": [24, 6]}


@pytest.fixture
def hacking(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS)
    import reward_hacking

    return reward_hacking


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pays_length", [0.3 + 0.5, 0.125]),
        ("pays_steps", [0.1 + 0.3, 0.0]),
        ("pays_form_and_brevity", [0.1 + 1 + 1, 0.0]),
        ("pays_known_outputs", [0.1, 1.0]),
        ("pays_few_bytes", [1 - len(RIGHT) / 100, -len(WRONG) / 100]),
        ("right_in_chinese", [0.0, 0.0]),
    ],
)
def test_what_each_reward_pays(hacking, name, expected):
    np.testing.assert_allclose(getattr(hacking, name)(["", ""], [RIGHT, WRONG], **COLUMNS), expected)


def test_a_chinese_thought_is_wanted_and_costs_more_bytes(hacking):
    problem = Sum((3, 8, 5, 6))
    both = [worked(problem, in_chinese=True), worked(problem)]
    assert hacking.right_in_chinese([""] * 2, both, answer=["22"] * 2) == [1.0, 0.0]
    chinese, arabic = hacking.pays_few_bytes([""] * 2, both, answer=["22"] * 2)
    assert chinese < arabic - 0.2


def test_a_run_is_told_as_its_logs_have_it(hacking, tmp_path):
    truth = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.4, 0.2, 0.1, 0.0]
    rows = [{"step": i + 1, "reward": i / 10, "judge": each} for i, each in enumerate(truth)]
    (tmp_path / "length").mkdir()
    write = lambda name, rows: (tmp_path / "length" / name).write_text("".join(json.dumps(r) + "\n" for r in rows))  # noqa: E731
    write("metrics.jsonl", [{"step": 0, "eval/pass@1": 0.1}, *rows])
    write(
        "alarms.jsonl",
        [{"step": 7, "alarm": "hacking"}, {"step": 6, "alarm": "truncation"}, {"step": 9, "alarm": "hacking"}],
    )
    told = hacking.row_of(tmp_path / "length")
    assert told["alarms"] == {"truncation": 6, "hacking": 7}
    assert told["step_of_best"] == 7
    assert told["truth_at_end"] == pytest.approx(0.24)
    assert (told["reward_at_best"], told["reward_at_end"]) == (0.6, 0.9)
    hacking.plot(tmp_path, ["length"])
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_holes_that_are_not_there(hacking):
    with pytest.raises(ValueError, match=r"holes contains \['nonsense'\]; it may contain \['length'"):
        hacking.Config(holes=("nonsense",))


def test_each_hole_is_a_run_of_the_toy_preset_with_its_reward_alone(hacking, tmp_path, monkeypatch):
    ran = []

    def grpo(stage):
        assert stage.script.name == "grpo.py"
        config = stage.config
        ran.append(config)
        config.run_dir.mkdir(parents=True)
        rows = [{"step": n, "reward": n / 2, "judge": 0.25} for n in (1, 2)]
        write_rows(config.run_dir / "metrics.jsonl", rows)
        write_rows(config.run_dir / "alarms.jsonl", [])
        return 0

    monkeypatch.setattr(hacking.Stage, "run", grpo)
    assert hacking.main(hacking.Config(run_dir=tmp_path, seed=3)) == 0
    assert [each.run_dir.name for each in ran] == [*hacking.HOLES]
    for config, hole in zip(ran, hacking.HOLES.values(), strict=True):
        assert (config.model, config.data.dataset, config.toy, config.seed) == ("toy", "sums", hole.toy, 3)
        assert (config.num_steps, config.optimizer) == (hole.num_steps, preset("grpo").optimizer)
        assert config.rewards.accuracy_weight == 0
        ((reward, weight),) = map(read_weighted, config.rewards.reward)
        assert (import_reward(reward), weight) == (hole.reward, 1)
    table = json.loads((tmp_path / "table.json").read_text())
    assert [*table] == [*hacking.HOLES]
    monkeypatch.setattr(hacking.Stage, "run", lambda stage: 130)
    assert hacking.main(hacking.Config(run_dir=tmp_path / "stopped")) == 130

"""How runs go on after their last step, and which of their models they leave."""

import io
import json
from dataclasses import dataclass, replace

import jax.numpy as jnp
import pytest
from rich.console import Console

from experiments import grpo
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop import problems
from grpo_jax.loop.export import check_steps, exported_params, report_best
from grpo_jax.loop.run import Run
from tests.runs import metrics_of


@dataclass(frozen=True)
class Config:
    num_steps: int = 3
    export: str = "last"


def open_run(folder, config=Config()):
    console = Console(width=200, file=io.StringIO(), record=True)
    return Run(folder, config, title="a test", resumable_fields=("num_steps", "export"), plain=True, console=console)


def said(run):
    return run.progress.console.export_text()


def state_of(step):
    return {"w": jnp.full(2, float(step))}


def choose(run, export, steps=3):
    params, step = exported_params(
        Config(export=export),
        run,
        state_of(steps),
        steps=steps,
        params_of=lambda state: state["w"],
        start=lambda: jnp.full(2, -1.0),
    )
    return params.tolist(), step


def test_the_best_model_has_a_checkpoint_that_stays_and_is_exported_by_choice(tmp_path):
    figures = {0: 0.1, 1: 0.5, 2: 0.4, 3: 0.3}
    with open_run(tmp_path / "run") as run:
        for step, figure in figures.items():
            if step:
                run.save(step, state_of(step), {})
            run.log({"step": step, "eval/pass@1": figure})
        for step in (4, 5):  # without an evaluation
            run.save(step, state_of(step), {})
        assert run.checkpoints.steps() == [1, 4, 5]
        assert choose(run, "last", steps=5) == ([5.0, 5.0], 5)
        assert choose(run, "best", steps=5) == ([1.0, 1.0], 1)
        run.log({"step": 6, "eval/pass@1": 0.5})  # the later of equal ones
        assert choose(run, "best", steps=6) == ([6.0, 6.0], 6)


def test_the_model_that_a_run_starts_from_can_be_the_best(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log({"step": 0, "eval/loss": 1.0})
        run.save(3, state_of(3), {})
        run.log({"step": 3, "eval/loss": 2.0})
        assert choose(run, "best") == ([-1.0, -1.0], 0)
        assert choose(run, "last") == ([3.0, 3.0], 3)


def test_a_best_step_without_a_checkpoint_gives_way_to_the_best_that_has_one(tmp_path):
    with open_run(tmp_path / "run") as run:
        for step, figure in ((0, 0.1), (1, 0.9), (2, 0.4)):
            run.log({"step": step, "eval/reward": figure})
        run.save(2, state_of(2), {})
        run.save(3, state_of(3), {})
        run.log({"step": 3, "eval/reward": 0.2})
        assert choose(run, "best") == ([2.0, 2.0], 2)


def test_a_best_step_before_the_last_is_said(tmp_path):
    rows = [{"step": 0, "eval/pass@1": 0.1}, {"step": 10, "eval/pass@1": 0.5}, {"step": 20, "eval/pass@1": 0.25}]
    with open_run(tmp_path / "run") as run:
        report_best(run, rows[:2], 10)
        report_best(run, [], 10)
        assert "best at" not in said(run)
        report_best(run, rows, 20)
        text = said(run)
        assert "held-out pass@1 was best at step 10 (0.5000), and is 0.2500 at the last step; model/ is from" in text
        assert "--export best" in text
    with open_run(tmp_path / "other") as run:
        report_best(run, rows, 10)
        assert "--export best" not in said(run)


def test_fewer_steps_than_were_taken_are_refused_and_another_number_is_said(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log({"step": 0, "reward": 1.0})
        assert run.changed("num_steps") is None
    with open_run(tmp_path / "run", Config(num_steps=6)) as run:
        assert run.changed("num_steps") == (3, 6)
        check_steps(run, 0, 6, setting="num_steps", decay="linear")  # nothing was taken
        assert "goes on" not in said(run)
        check_steps(run, 3, 6, setting="num_steps", decay="constant")
        check_steps(run, 3, 6, setting="num_steps", decay="cosine")
        text = said(run)
        assert "num_steps was 3 and is 6: continues from step 3 to 6; the learning rate is constant" in text
        assert "from step 4 on the learning rate follows a cosine decay over 6 steps" in text
        with pytest.raises(ValueError, match=r"num_steps gives 2 steps, but .*run has already taken 3"):
            check_steps(run, 3, 2, setting="num_steps", decay="linear")


def test_a_run_is_finished_with_the_settings_of_its_summary(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert not run.is_finished_with(["num_steps"])
        run.write_summary({})
        assert run.is_finished_with(["num_steps", "export"])
        assert run.is_finished_with(["of a later version"])
    with open_run(tmp_path / "run", Config(num_steps=4)) as run:
        assert not run.is_finished_with(["num_steps"])
        assert run.is_finished_with(["export"])


@pytest.fixture(scope="module")
def config(small, tmp_path_factory):
    return GRPOConfig(
        model=small,
        data=DataConfig(dataset="sums", template="{question}", eval_size=6),
        run_dir=tmp_path_factory.mktemp("going_on") / "run",
        num_steps=2,
        num_prompts=2,
        group_size=4,
        max_completion_length=6,
        eval_samples=2,
        eval_every=0,
        optimizer=OptimizerConfig(learning_rate=1e-2, decay="constant", warmup_updates=3),
        mesh=MeshConfig(data=1),
        plain=True,
    )


@pytest.mark.slow
def test_a_finished_run_that_is_given_more_steps_becomes_the_longer_run(config, capsys, monkeypatch):
    def pays_digits(prompts, completions, **columns):  # something that untrained models differ in
        return [float(sum(c.isdigit() for c in text) % 2) for text in completions]

    sums = replace(problems.TASKS["sums"], reward=pays_digits)
    monkeypatch.setattr(problems, "TASKS", {**problems.TASKS, "sums": sums})
    assert grpo.main(config) == 0
    first = json.loads((config.run_dir / "summary.json").read_text())
    longer = replace(config, num_steps=4)
    assert grpo.main(longer) == 0
    assert "num_steps was 2 and is 4: continues from step 2 to 4" in capsys.readouterr().out
    whole = replace(longer, run_dir=config.run_dir.with_name("whole"))
    assert grpo.main(whole) == 0
    weights = [(each.run_dir / "model/model.safetensors").read_bytes() for each in (longer, whole)]
    assert weights[0] == weights[1]
    rows = [[row for row in metrics_of(each) if "loss" in row or row["step"] in (0, 4)] for each in (longer, whole)]
    assert rows[0] == rows[1]
    assert any(row.get("grad_norm") for row in rows[0])  # it learnt something

    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert (first["steps"], summary["steps"]) == (2, 4)
    assert summary["pass_at_1_before"] == first["pass_at_1_before"]  # the evaluation before the first step
    completions = read_jsonl(config.run_dir / "completions.jsonl")
    assert [row["step"] for row in completions] == [step for step in (1, 2, 3, 4) for _ in range(2 * 4)]

    with pytest.raises(ValueError, match=r"num_steps gives 3 steps, but .* has already taken 4"):
        grpo.main(replace(config, num_steps=3))
    assert grpo.main(longer) == 0
    assert "this run is finished" in capsys.readouterr().out
    ranked = [row for row in read_jsonl(config.run_dir / "metrics.jsonl") if "eval/pass@1" in row]
    best = max(ranked, key=lambda row: (row["eval/pass@1"], row["step"]))["step"]
    assert grpo.main(replace(longer, export="best")) == 0
    summary = json.loads((config.run_dir / "summary.json").read_text())
    assert (summary["exported_step"], summary["best_step"], summary["steps"]) == (best, best, 4)
    assert models.from_pretrained(config.run_dir / "model").tokenizer is not None

"""Evaluation end to end, on tiny shapes: figures, intervals, a kill, and what changed since another evaluation."""

import itertools
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments import evaluate
from experiments.evaluate import metrics_per_problem, problem_keys, read_report
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.evaluation import EvaluationConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.data.problems import Problem
from grpo_jax.data.selection import ProblemSamples
from grpo_jax.evaluate import estimate
from grpo_jax.jsonl import read_jsonl
from grpo_jax.loop.run import Run
from grpo_jax.rewards.math.compare import same_answers
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.sums import Sum
from tests.runs import write_rows

PROBLEMS, SAMPLES = 24, 4


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    config = EvaluationConfig(
        model=base,
        data=DataConfig(dataset="sums", template="{question}", eval_size=PROBLEMS),
        rewards=RewardConfig(target_language="en"),
        run_dir=tmp_path_factory.mktemp("evaluate") / "run",
        num_samples=SAMPLES,
        num_prompts=2,  # blocks of eight problems
        max_prompt_length=12,
        max_completion_length=10,
        mesh=MeshConfig(data=1),
        plain=True,
    )
    assert evaluate.main(config) == 0
    return config


@pytest.fixture(scope="module")
def warmer(finished):
    """Another evaluation of the same problems."""
    config = replace(finished, run_dir=finished.run_dir.with_name("warmer"), sampling=Sampling(temperature=1.5), seed=1)
    assert evaluate.main(config) == 0
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """The same evaluation, finished, in a folder of its own."""
    shutil.copytree(finished.run_dir, tmp_path / "copy")
    return replace(finished, run_dir=tmp_path / "copy")


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))


def rows_of(config):
    return read_jsonl(config.run_dir / "completions.jsonl")


def right_of(row):
    return [f"<answer>{sum(map(int, row['prompt'][:-1].split('+')))}</answer>" in text for text in row["completions"]]


def said_of(text):
    _, tag, rest = text.partition("<answer>")
    answer, end, _ = rest.partition("</answer>")
    return answer if tag and end else None


def test_figures_are_those_of_the_completions(finished):
    rows, figures = rows_of(finished), read_report(finished.run_dir)["figures"]
    right = np.array([right_of(row) for row in rows])
    assert right.shape == (PROBLEMS, SAMPLES)
    assert 0 < right.sum() < right.size
    for k in (1, 2, 4):
        choices = list(itertools.combinations(range(SAMPLES), k))
        expected = np.mean([[row[list(choice)].any() for choice in choices] for row in right])
        assert figures[f"pass@{k}"]["mean"] == pytest.approx(expected, abs=1e-6), k
    votes = []
    for row, is_right in zip(rows, right, strict=True):
        said = [said_of(text) for text in row["completions"]]
        counts = Counter(answer for answer in said if answer is not None)
        winners = [answer for answer in counts if counts[answer] == max(counts.values())]
        gold = {answer for answer, ok in zip(said, is_right, strict=True) if ok}
        votes.append(np.mean([winner in gold for winner in winners]) if winners else 0.0)
    assert figures["maj@4"]["mean"] == pytest.approx(np.mean(votes), abs=1e-6)
    assert figures["rewards/accuracy"]["mean"] == pytest.approx(right.mean())
    assert figures["rewards/format"]["mean"] == np.mean([row["rewards"]["format"] for row in rows])
    assert "rewards/language" in figures
    assert figures["mean_length"]["mean"] == pytest.approx(np.mean([row["lengths"] for row in rows]))
    assert figures["truncated"]["mean"] == pytest.approx(np.mean([row["truncated"] for row in rows]))
    assert figures["ungraded"]["mean"] == 0
    assert all(0 < length <= 10 for row in rows for length in row["lengths"])
    assert {f"eval/{name}" for name in figures} < read_jsonl(finished.run_dir / "metrics.jsonl")[0].keys()


def test_intervals_are_over_problems(finished):
    figures = read_report(finished.run_dir)["figures"]
    shares = np.mean([right_of(row) for row in rows_of(finished)], axis=1)
    expected = estimate(shares, bounds=(0.0, 1.0))
    found = figures["pass@1"]
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert found["problems"] == PROBLEMS
    assert 0 <= found["low"] < found["mean"] < found["high"] <= 1
    assert figures["ungraded"]["high"] == pytest.approx(1 - 0.025 ** (1 / PROBLEMS))


def test_only_held_out_problems_are_asked_and_the_report_says_of_whom(finished):
    asked = [row["prompt"] for row in rows_of(finished)]
    assert len(set(asked)) == PROBLEMS
    assert all(Sum(tuple(map(int, prompt[:-1].split("+")))).held_out for prompt in asked)
    report = read_report(finished.run_dir)
    assert (report["num_problems"], report["num_samples"]) == (PROBLEMS, SAMPLES)
    assert report["provenance"]["model"] == finished.model
    assert report["provenance"]["weights"] == models.weights_digest(finished.model)
    assert report["config"]["num_samples"] == SAMPLES
    assert report["versions"]["jax"]
    assert report["seconds"] > 0
    assert "comparison" not in report


def test_killed_and_resumed_gives_the_same_report(finished, tmp_path, monkeypatch):
    config = replace(finished, run_dir=tmp_path / "run")
    log_reward_errors, blocks = Run.log_reward_errors, []

    def killed(self, number, faults):
        blocks.append(number)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        log_reward_errors(self, number, faults)

    monkeypatch.setattr(Run, "log_reward_errors", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(config)
    assert len(rows_of(config)) == 8
    with pytest.raises(ValueError, match="holds no finished evaluation"):
        read_report(config.run_dir)
    assert evaluate.main(config) == 0
    assert blocks == [1, 2, 2, 3]  # what was whole is not drawn again
    whole = finished.run_dir / "completions.jsonl"
    assert (config.run_dir / "completions.jsonl").read_bytes() == whole.read_bytes()
    own, other = read_report(config.run_dir), read_report(finished.run_dir)
    assert {**own, "seconds": 0, "config": 0} == {**other, "seconds": 0, "config": 0}


def test_run_again_it_prints_the_same_report_and_draws_nothing(copy, nothing_is_drawn, capsys):
    before = {path.name: path.read_bytes() for path in copy.run_dir.iterdir() if path.is_file()}
    assert evaluate.main(copy) == 0
    first = capsys.readouterr().out
    assert evaluate.main(copy) == 0
    assert capsys.readouterr().out == first
    after = {path.name: path.read_bytes() for path in copy.run_dir.iterdir() if path.is_file()}
    assert {**after, "config.json": b""} == {**before, "config.json": b""}
    figures = read_report(copy.run_dir)["figures"]
    assert all(name in first for name in figures if name != "ungraded")
    assert f"{figures['pass@1']['mean']:.4f}  [{figures['pass@1']['low']:.4f}, " in first
    assert f"{PROBLEMS} problems of sums, {SAMPLES} samples each, temperature 1" in first


def test_other_k_of_the_same_completions(copy, nothing_is_drawn):
    before = read_report(copy.run_dir)
    least, most = (before["figures"][f"pass@{k}"]["mean"] for k in (2, 4))
    assert evaluate.main(replace(copy, k=(3,))) == 0
    after = read_report(copy.run_dir)
    assert [name for name in after["figures"] if name.startswith("pass@")] == ["pass@1", "pass@3"]
    assert least < after["figures"]["pass@3"]["mean"] < most
    assert after["seconds"] == before["seconds"]  # those of drawing
    (row,) = read_jsonl(copy.run_dir / "metrics.jsonl")
    assert "eval/pass@3" in row
    assert "eval/pass@2" not in row


def test_against_itself_nothing_changed(finished, copy, nothing_is_drawn, capsys):
    assert evaluate.main(replace(copy, against=finished.run_dir)) == 0
    report = read_report(copy.run_dir)
    assert report["comparison"]["figures"].keys() == report["figures"].keys()
    for name, each in report["comparison"]["figures"].items():
        assert (each["difference"], each["p"], each["problems"]) == (0, 1, PROBLEMS), name
        assert each["before"] == each["after"] == report["figures"][name]["mean"], name
        assert each["low"] <= 0 <= each["high"], name
    assert report["comparison"]["settings"] == []
    said = capsys.readouterr().out
    assert f"against {finished.run_dir}" in said
    assert "settings that differ" not in said


def test_against_another_evaluation(finished, copy, warmer, nothing_is_drawn, capsys):
    rows = rows_of(warmer)
    backwards = [{**row, "step": 1} for row in reversed(rows)]  # pairs are made of what was asked, not of places
    write_rows(warmer.run_dir / "completions.jsonl", backwards)
    assert evaluate.main(replace(copy, against=warmer.run_dir)) == 0
    report = read_report(copy.run_dir)
    before = {row["prompt"]: np.mean(right_of(row)) for row in rows}
    after = {row["prompt"]: np.mean(right_of(row)) for row in rows_of(copy)}
    differences = np.array([after[prompt] - before[prompt] for prompt in after])
    assert len(set(differences.tolist())) > 2
    found = report["comparison"]["figures"]["pass@1"]
    assert found["before"] == pytest.approx(read_report(warmer.run_dir)["figures"]["pass@1"]["mean"])
    assert found["after"] == report["figures"]["pass@1"]["mean"]
    assert found["difference"] == pytest.approx(differences.mean(), abs=1e-6)
    changed = differences[differences != 0]
    assert 2 < len(changed) < 16
    signs = np.array(list(itertools.product((1, -1), repeat=len(changed))))
    expected = np.mean(np.abs(signs @ changed) >= abs(changed.sum()) - 1e-9)
    assert found["p"] == pytest.approx(expected, abs=0.02)
    assert report["comparison"]["settings"] == ["sampling.temperature: 1.5 -> 1.0", "seed: 1 -> 0"]
    assert report["comparison"]["provenance"]["sampling"]["temperature"] == 1.5
    assert "settings that differ: sampling.temperature: 1.5 -> 1.0; seed: 1 -> 0" in capsys.readouterr().out


@pytest.mark.parametrize("holds", ["nothing", "no folder", "a training run", "an evaluation without its completions"])
def test_against_a_folder_without_an_evaluation_no_model_is_loaded(finished, tmp_path, nothing_is_drawn, holds):
    other = tmp_path / "other"
    if holds != "no folder":
        other.mkdir()
    if holds == "a training run":
        (other / "summary.json").write_text(json.dumps({"pass_at_1_after": 1.0}))
        (other / "completions.jsonl").touch()
    elif holds == "an evaluation without its completions":
        shutil.copy(finished.run_dir / "summary.json", other)
    config = replace(finished, run_dir=tmp_path / "run", against=other)
    with pytest.raises(ValueError, match=r"other holds no finished evaluation"):
        evaluate.main(config)


def test_other_problems_are_told_before_anything_is_drawn(finished, tmp_path):
    fewer = replace(finished.data, eval_size=PROBLEMS - 2)
    config = replace(finished, run_dir=tmp_path / "run", data=fewer, against=finished.run_dir)
    alone = [row["prompt"] for row in rows_of(finished)][PROBLEMS - 2 :]
    with pytest.raises(ValueError, match="the two evaluations have different problems") as error:
        evaluate.main(config)
    assert f"0 only in {config.run_dir}; 2 only in {finished.run_dir}" in str(error.value)
    assert all(repr(prompt) in str(error.value) for prompt in alone)
    assert not rows_of(config)


def test_a_finished_evaluation_is_not_compared_with_one_of_other_problems(copy, warmer, tmp_path, nothing_is_drawn):
    other = tmp_path / "other"
    shutil.copytree(warmer.run_dir, other)
    write_rows(other / "completions.jsonl", rows_of(warmer)[1:])
    with pytest.raises(ValueError, match=f"1 only in {copy.run_dir}"):
        evaluate.main(replace(copy, against=other))
    assert evaluate.main(copy) == 0  # nothing is lost


def test_greedy(finished, tmp_path):
    config = replace(finished, run_dir=tmp_path / "run", sampling=Sampling(temperature=0.0), num_samples=1)
    assert evaluate.main(config) == 0
    figures = read_report(config.run_dir)["figures"]
    assert figures["pass@1"]["mean"] == figures["maj@1"]["mean"] == figures["rewards/accuracy"]["mean"]
    assert "pass@2" not in figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (1, 5)}, "k is 5; pass@k of num_samples = 4 has k from 1 to that"),
        ({"k": (0,)}, "k is 0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"sampling": Sampling(temperature=0.0)}, "all 4 completions of a problem would be identical"),
        ({"run_dir": Path("runs/x"), "against": Path("runs/../runs/x")}, "this run's own folder"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(finished, change, message):
    with pytest.raises(ValueError, match=message):
        replace(finished, **change)


def test_settings_have_one_default_and_the_toy_is_a_preset():
    config = EvaluationConfig()
    assert (config.num_samples, config.ks, config.data.eval_size) == (16, [1, 2, 4, 8, 16], None)
    assert EvaluationConfig(num_samples=12).ks == [1, 2, 4, 8]
    assert EvaluationConfig(k=(16, 3)).ks == [1, 3, 16]
    assert (config.model, config.data.dataset) == (None, None)
    toy = preset("evaluate")
    assert (toy.model, toy.data.dataset, toy.data.eval_size) == ("toy", "sums", None)
    assert (toy.prompt_length, toy.completion_length) == (12, 48)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: no model is named; pass --model"),
        ({"data": DataConfig()}, "dataset: no dataset is named; pass --dataset"),
    ],
)
def test_a_model_and_a_dataset_must_be_named(finished, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        evaluate.main(replace(finished, run_dir=tmp_path / "run", **change))


# Problems that are odd -----------------------------------------------------------------------------------------------


def collected(*accuracy, answer="3", said="3", **rewards):
    count = len(accuracy)
    texts = [f"<answer>{said if score == 1 else 'x'}</answer>" for score in accuracy]
    return ProblemSamples(
        place=0,
        problem=Problem("1+2=", answer),
        prompt="1+2=",
        completions=texts,
        lengths=[2] * count,
        truncated=[False] * count,
        total=list(accuracy),
        rewards={"accuracy": list(accuracy), **rewards},
    )


def test_what_could_not_be_graded_counts_nowhere_and_is_told():
    figures = metrics_per_problem([collected(1.0, None), collected(1.0, 0.0), collected(0.0, 0.0)], [1, 2])
    np.testing.assert_allclose(figures["pass@1"], [np.nan, 0.5, 0.0])
    np.testing.assert_allclose(figures["pass@2"], [np.nan, 1.0, 0.0])
    np.testing.assert_allclose(figures["maj@2"], [np.nan, 0.5, 0.0])
    np.testing.assert_allclose(figures["rewards/accuracy"], [1.0, 0.5, 0.0])
    assert figures["ungraded"].tolist() == [1, 0, 0]
    nothing = metrics_per_problem([collected(None, None)], [1, 2])
    assert not [name for name in nothing if name.startswith(("pass@", "maj@"))]


def test_the_majority_vote_compares_answers_as_the_grader_does():
    row = replace(
        collected(1.0, 1.0, 1.0, 0.0, 0.0),
        completions=[rf"\boxed{{{answer}}}" for answer in (r"2\sqrt{3}", r"2\sqrt3", r"\sqrt{12}", "7", "7")],
    )
    assert metrics_per_problem([row], [1], same_answers)["maj@5"].tolist() == [1.0]
    assert metrics_per_problem([row], [1])["maj@5"].tolist() == [0.0]
    unfinished = replace(row, prompt="q <think>")
    assert metrics_per_problem([unfinished], [1], same_answers)["maj@5"].tolist() == [0.0]


def test_a_part_of_the_reward_that_is_absent_now_and_then():
    problems = [collected(1.0, 1.0, kind=[None, 0.25]), collected(0.0, 1.0, kind=[None, None]), collected(0.0, 1.0)]
    figures = metrics_per_problem(problems, [1])
    np.testing.assert_allclose(figures["rewards/kind"], [0.25, np.nan, np.nan])
    assert evaluate.estimate_metric("rewards/kind", figures["rewards/kind"])["problems"] == 1
    absent = {"mean": None, "low": None, "high": None, "problems": 0}
    assert evaluate.estimate_metric("rewards/kind", figures["rewards/kind"][1:]) == absent
    other = {"rewards/kind": np.array([0.5, 0.5, 0.5]), "rewards/unkind": np.zeros(3)}
    changed = evaluate.compare_metrics(other, figures)
    assert changed.keys() == {"rewards/kind"}
    assert changed["rewards/kind"]["difference"] == pytest.approx(-0.25)
    assert changed["rewards/kind"]["problems"] == 1


def test_a_part_that_is_absent_is_told_as_such(copy, nothing_is_drawn, capsys):
    rows = [{**row, "rewards": {**row["rewards"], "format": [None] * SAMPLES}} for row in rows_of(copy)]
    rows[0]["rewards"]["accuracy"][1] = None
    write_rows(copy.run_dir / "completions.jsonl", rows)
    assert evaluate.main(replace(copy, k=(2,))) == 0
    figures = read_report(copy.run_dir)["figures"]
    assert figures["rewards/format"] == {"mean": None, "low": None, "high": None, "problems": 0}
    assert figures["ungraded"]["mean"] == pytest.approx(1 / PROBLEMS)
    assert figures["pass@1"]["problems"] == PROBLEMS - 1
    said = capsys.readouterr().out
    assert "absent" in said
    assert "ungraded" in said


def test_without_single_answers_there_is_no_majority_and_accuracy_is_told_as_it_is():
    figures = metrics_per_problem([collected(0.75, 0.25, answer=None), collected(1.0, 0.5, answer=None)], [1])
    assert "maj@2" not in figures
    np.testing.assert_allclose(figures["rewards/accuracy"], [0.5, 0.75])
    np.testing.assert_allclose(figures["pass@1"], [0.0, 0.5])


def test_problems_are_told_apart_by_what_is_asked_and_what_is_right():
    messages = [{"role": "user", "content": "1+2="}]
    problems = [Problem("1+2=", "3"), Problem("1+2=", "4"), Problem("1+2=", "3"), Problem(messages, "3")]
    keys = problem_keys(problems)
    assert len(set(keys)) == 4
    assert problem_keys(reversed(problems[:2])) == [keys[1], keys[0]]
    assert problem_keys([replace(problems[3], columns={"a": 1})]) == [keys[3]]


def test_a_file_is_evaluated_as_a_whole_unless_told_otherwise(finished, tmp_path, capsys, monkeypatch):
    rows = [{"question": f"{n}+1=", "answer": n + 1} for n in range(1, 21)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(dataset=str(tmp_path / "a.jsonl"), template="{question}", eval_size=None)
    config = replace(finished, data=data, run_dir=tmp_path / "run")
    assert evaluate.main(config) == 0
    assert read_report(config.run_dir)["num_problems"] == 20
    assert "20 of 20 problems of" in capsys.readouterr().out
    written = json.loads((config.run_dir / "data.json").read_text())
    assert (written["evaluation_rows"], written["evaluated"], written["skipped"]) == (20, 20, 0)

    def run_batch_inference(*_args, problem_set, **_options):
        raise ValueError(f"problem set: {problem_set}")

    monkeypatch.setattr(evaluate, "run_batch_inference", run_batch_inference)
    with pytest.raises(ValueError, match="problem set: held_out"):
        evaluate.main(replace(config, run_dir=tmp_path / "other", held_out=True))

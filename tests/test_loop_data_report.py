"""The report on a data set: each fault is found, counted and listed, and sound rows give nothing."""

import json

import pytest

from experiments import check_data
from experiments.check_data import Config, make_report
from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.preferences import Preference
from grpo_jax.data.problems import Problem
from grpo_jax.loop.data_report import (
    MAX_EXAMPLES,
    Example,
    check_demonstrations,
    check_leaks,
    check_preferences,
    check_problems,
    check_prompt_lengths,
    finding,
)
from grpo_jax.tasks.sums import make_tokenizer


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def found(findings):
    return {each.name: [example.where for example in each.examples] for each in findings}


def placed(*problems):
    return [(f"row {n}", problem) for n, problem in enumerate(problems, 1)]


SOUND = placed(*(Problem(f"What is {n}+{n}?", str(2 * n)) for n in range(30)))


def test_sound_problems_give_nothing():
    assert check_problems(SOUND, "math") == []
    assert check_problems(SOUND, "exact") == []


def test_faults_of_mathematics_problems():
    problems = placed(
        Problem("Fine?", "7"),
        Problem("Unread?", "see the proof above, as it goes on \\begin{tikz}"),
        Problem("Expand $(x+1)(x+2)$.", "x^2+3x+2"),
        Problem(" fine? ", "7.0"),
        Problem("FINE?", "8"),
        Problem("None?", None),
        Problem([{"role": "user", "content": "Factor $x^2-1$"}], "(x-1)(x+1)"),
        Problem("Several?", "3", {"other_answers": ["three", "see \\begin{tikz} the proof"]}),
    )
    assert found(check_problems(problems, "math")) == {
        "duplicates": ["row 4", "row 5"],
        "contradictions": ["row 5"],
        "missing answers": ["row 6"],
        "unreadable answers": ["row 2", "row 8"],
        "answers in the question": ["row 3", "row 7"],
    }


def test_one_answer_for_most_rows_is_a_fault():
    problems = placed(*(Problem(f"q{n}", "yes" if n % 3 else "no") for n in range(30)))
    (only,) = check_problems(problems, "exact")
    assert (only.name, only.examples[0].text) == ("one answer", "yes in 20 of 30")
    assert check_problems(problems[:18], "exact") == []


def test_faults_of_programming_problems():
    problems = placed(
        Problem("Add.", None, {"tests": ["assert add(1, 2) == 3"]}),
        Problem("Never.", None, {"tests": ["def test_add():\n    pass"]}),
        Problem("Needs numpy.", None, {"tests": ["import numpy\nassert add(1) == 3"]}),
        Problem("Broken.", None, {"tests": ["assert ("]}),
        Problem("None.", None),
    )
    assert found(check_problems(problems, "code")) == {
        "missing tests": ["row 5"],
        "tests that say nothing": ["row 2", "row 3", "row 4"],
    }


def test_faults_of_demonstrations():
    def shown(n, prompt, completion, **columns):
        return Demonstration(prompt, completion, f"row {n}", columns)

    rows = [
        shown(1, "1+1?", "It is \\boxed{2}.", answer=2),
        shown(2, "1+1?", "It is \\boxed{3}.", answer="2"),
        shown(3, "1+1? ", "it is \\boxed{2}."),
        shown(4, "2+2?", "<think>well, 4 or"),
        shown(5, "2+2?", "<think>well</think>4"),
    ]
    assert found(check_demonstrations(rows)) == {
        "duplicates": ["row 3"],
        "wrong completions": ["row 2"],
        "unfinished thoughts": ["row 4"],
    }


def test_faults_of_preferences():
    rows = [
        Preference("q", "a", "bb", "row 1"),
        Preference("q", "bb", "a", "row 2"),
        Preference("Q", "A", "bb", "row 3"),
        Preference("r", "a", "A ", "row 4"),
        Preference("s", "a", "b", "row 5", -1.0),
        Preference("t", "a", "b", "row 6", None, {"score_chosen": 7, "score_rejected": 7.0}),
        Preference("u", "a", "b", "row 7", None, {"score_chosen": 8, "score_rejected": 7.0}),
    ]
    assert found(check_preferences(rows)) == {
        "duplicates": ["row 3"],
        "equal pairs": ["row 4"],
        "contradictions": ["row 2", "row 3"],
        "weak preferences": ["row 5", "row 6"],
    }
    rows = [Preference(f"q{n}", "a" * 9, "b", f"row {n}") for n in range(30)]
    (only,) = check_preferences(rows)
    assert (only.name, only.is_fault) == ("length", False)


def test_leaks():
    (only,) = check_leaks([("a:1", "x"), ("a:2", "y"), ("a:3", "y")], [("b:1", "y"), ("b:2", "z")])
    assert (only.count, only.rows, only.examples[0].where, only.examples[0].text) == (1, 2, "b:1", "as a:2: y")
    assert check_leaks([("a:1", "x")], [("b:1", "y")]) == []


def test_long_prompts():
    prompts = [("row 1", "1+2+3", {}), ("row 2", "1+2", {})]
    (only,) = check_prompt_lengths(prompts, make_tokenizer(), max_prompt_length=4, template="{question}")
    assert [each.where for each in only.examples] == ["row 1"]


def test_examples_are_cut_and_counts_are_not():
    (only,) = finding("x", "y", (Example(f"{n}", "") for n in range(1000)), 2000)
    assert (only.count, len(only.examples)) == (1000, MAX_EXAMPLES)


# The script -----------------------------------------------------------------------------------------------------------


def test_the_report_of_a_file(tmp_path, capsys):
    rows = [{"question": f"What is {n}+{n}?", "answer": 2 * n} for n in range(20)]
    rows += [{"question": "What is  1+1? ", "answer": 2}, {"question": "q", "answer": {"x": 1}}, "{", {"a": 1}]
    path = write(tmp_path / "a.jsonl", *rows)
    config = Config(dataset=path, json=tmp_path / "report.json")
    assert check_data.main(config) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["rows"], report["kind"], report["grader"]) == (21, "problems", "math")
    names = {each["name"]: each for each in report["findings"]}
    assert names["unreadable rows"]["count"] == 3
    assert [each["where"] for each in names["unreadable rows"]["examples"]] == [f"{path}:{n}" for n in (22, 23, 24)]
    assert names["duplicates"]["examples"][0]["where"] == f"{path}:21"
    shown = capsys.readouterr().out
    assert "21 rows, read as problems, graded by math" in shown
    assert f"duplicates: {path}:21: as {path}:2" in shown
    assert check_data.main(Config(dataset=path, strict=True)) == 1


def test_strict_does_not_mind_what_is_only_good_to_know(tmp_path, capsys):
    rows = [{"question": f"What is {n % 20}+{n % 20}?", "answer": n % 20 * 2} for n in range(40)]
    path = write(tmp_path / "a.jsonl", *rows)
    assert check_data.main(Config(dataset=path, strict=True)) == 0
    assert "duplicates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"question": "q", "answer": "2"}, "problems"),
        ({"question": "q", "tests": ["assert f()"]}, "problems"),
        ({"prompt": "q", "reward_model": {"ground_truth": "2"}}, "problems"),
        ({"prompt": [{"role": "user", "content": "q"}]}, "problems"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "demonstrations"),
        ({"instruction": "q", "input": "", "output": "a"}, "demonstrations"),
        ({"text": "q"}, "demonstrations"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preferences"),
    ],
)
def test_the_kind_of_rows_is_known_by_their_columns(tmp_path, row, kind):
    assert make_report(Config(dataset=write(tmp_path / "a.jsonl", row)))["kind"] == kind


def test_leaks_into_the_test_split_of_a_folder(tmp_path):
    write(tmp_path / "train.jsonl", *({"question": f"q{n}", "answer": n} for n in range(12)))
    write(tmp_path / "test.jsonl", {"question": "Q3", "answer": 3}, {"question": "new", "answer": 3})
    (only,) = make_report(Config(dataset=str(tmp_path)))["findings"]
    assert (only["name"], only["count"], only["rows"]) == ("leaks", 1, 2)


def test_prompts_are_rendered_as_the_model_was_trained(tmp_path):
    folder = tmp_path / "model"
    make_tokenizer().save_pretrained(folder)
    (folder / "prompt_format.json").write_text(json.dumps({"kind": "plain", "template": "1+1+{question}"}))
    path = write(tmp_path / "a.jsonl", {"question": "2", "answer": "1"})
    settings = {"dataset": path, "tokenizer": str(folder), "max_prompt_length": 4}
    findings = {each["name"]: each for each in make_report(Config(**settings))["findings"]}
    assert findings["long prompts"]["examples"][0]["text"] == "5 tokens"
    assert make_report(Config(**settings, template="{question}"))["findings"] == []


def test_a_column_of_answers_that_is_not_there_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", {"question": "q", "answer": "2"})
    with pytest.raises(ValueError, match=r"answer_column: no row .* in 'anwser'; .* \['answer', 'question'\]"):
        make_report(Config(dataset=path, answer_column="anwser"))


@pytest.mark.parametrize("fields", [{"max_prompt_length": 0}, {"examples": -1}, {"chat_template": True}])
def test_settings_that_cannot_be(fields):
    with pytest.raises(ValueError, match=r"max_prompt_length must be|needs a tokenizer"):
        Config(dataset="a.jsonl", **fields)

"""Row layouts of published data sets as problems, demonstrations and preferences; unknown layouts are errors."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from grpo_jax.data import columns
from grpo_jax.data.columns import column
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.layouts import as_messages, hh_messages
from grpo_jax.data.preferences import load_preferences
from grpo_jax.data.problems import Problem
from grpo_jax.rewards.code.test_cases import why_untestable
from grpo_jax.tasks.dataset import load_problems


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def turn(role, value):
    return {"from": role, "value": value}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Problems -------------------------------------------------------------------------------------------------------------

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [user("1+1?")],
    "ability": "math",
    "reward_model": {"ground_truth": "2", "style": "rule"},
    "extra_info": {"answer": "1+1=2\n#### 2", "index": 0, "question": "1+1?", "split": "train"},
}
OPEN_R1 = {
    "problem": "1+1?",
    "solution": "It is $\\boxed{2}$.",
    "answer": "2",
    "problem_type": "Algebra",
    "messages": [user("1+1?"), assistant("<think>\n</think>\n2")],
    "generations": ["<think>\n</think>\n2"],
}
PROBLEMS = {
    "TRL": ({"prompt": [user("1+1?")], "answer": "2"}, [user("1+1?")], "2"),
    "verl": (VERL, [user("1+1?")], "2"),
    "OpenR1": (OPEN_R1, "1+1?", "2"),
    "AIME": ({"ID": "2024-I-1", "Problem": "1+1?", "Solution": "It is 2.", "Answer": 2}, "1+1?", "2"),
    "AMC": ({"problem": "1+1?", "answer": 2.0}, "1+1?", "2.0"),
    "OlympiadBench": ({"question": "1+1?", "solution": ["It is 2."], "final_answer": ["2"]}, "1+1?", "2"),
    "OpenMathReasoning": (
        {"problem": "1+1?", "expected_answer": "2", "generated_solution": "so 2", "problem_type": "x"},
        "1+1?",
        "2",
    ),
    "RLVR": ({"messages": [user("1+1?")], "ground_truth": "2", "dataset": "gsm8k"}, [user("1+1?")], "2"),
    "chat with its reply": ({"messages": [user("1+1?"), assistant("so 2")], "answer": "2"}, [user("1+1?")], "2"),
    "ShareGPT": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}],
            "answer": 2,
        },
        [system("s"), user("1+1?")],
        "2",
    ),
    "Alpaca": ({"instruction": "Add.", "input": "1, 1", "answer": "2"}, "Add.\n\n1, 1", "2"),
    "Alpaca without input": ({"instruction": "Add 1 and 1.", "input": "", "answer": "2"}, "Add 1 and 1.", "2"),
    "BoolQ": (
        {"question": "is 1 odd", "passage": "Numbers.", "answer": True},
        "Numbers.\n\nis 1 odd",
        "True",
    ),
    "a truth value": ({"question": "is 1 odd", "answer": True}, "is 1 odd", "True"),
    "MMLU": ({"question": "1+1?", "choices": ["1", "2"], "answer": 1}, "1+1?\nA. 1\nB. 2", "B"),
    "MMLU-Pro": (
        {"question": "1+1?", "options": ["1", "2"], "answer": "B", "answer_index": 1},
        "1+1?\nA. 1\nB. 2",
        "B",
    ),
    "ARC": (
        {"question": "1+1?", "choices": {"text": ["2", "4"], "label": ["A", "B"]}, "answerKey": "A"},
        "1+1?\nA. 2\nB. 4",
        "A",
    ),
    "choice by its text": ({"question": "1+1?", "options": ["A) one", "B) two"], "answer": "B) two"}, None, "B"),
    "choices in the question": (
        {"question": "1+1?\nA. one\nB. two", "options": ["one", "two"], "answer": "B"},
        "1+1?\nA. one\nB. two",
        "B",
    ),
    "conversation as text": ({"prompt": json.dumps([user("1+1?")]), "answer": "2"}, [user("1+1?")], "2"),
    "conversation as Python": ({"prompt": str([user("1+1?")]), "answer": "2"}, [user("1+1?")], "2"),
    "a prompt that is a list": ({"prompt": "[1, 2] has the sum", "answer": "3"}, "[1, 2] has the sum", "3"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_layouts_of_problems(tmp_path, name):
    row, prompt, answer = PROBLEMS[name]
    (problem,) = load_problems(write(tmp_path / "a.jsonl", row))
    assert problem.answer == answer
    assert problem.prompt == prompt or prompt is None


def test_verl_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([VERL, VERL]), tmp_path / "train.parquet")
    problem = load_problems(str(tmp_path))[0]
    assert (problem.prompt, problem.answer) == ([user("1+1?")], "2")
    assert problem.columns["data_source"] == "openai/gsm8k"
    path = str(tmp_path / "train.parquet")
    problem = load_problems(path, prompt_column="extra_info.question", answer_column="extra_info.answer")[0]
    assert (problem.prompt, problem.answer) == ("1+1?", "2")


@pytest.mark.parametrize(
    ("name", "value"),
    [("a.b", 1), ("a.c.1", "y"), ("d", 2), ("e.f", 3), ("g.h", 4)],
)
def test_paths_into_columns(name, value):
    row = {"a": {"b": 1, "c": ["x", "y"]}, "d": 2, "e.f": 3, "e": {"f": 9}, "g": '{"h": 4}'}
    assert column(row, name) == value


def test_a_path_that_ends_nowhere_lists_the_fields(tmp_path):
    path = write(tmp_path / "a.jsonl", VERL)
    with pytest.raises(
        KeyError, match=r"no column 'reward_model.gold'; 'reward_model' has the fields \['ground_truth'"
    ):
        load_problems(path, answer_column="reward_model.gold")
    with pytest.raises(KeyError, match=r"no column 'nothing.gold'; it has \['data_source', 'prompt'"):
        load_problems(path, answer_column="nothing.gold")
    with pytest.raises(KeyError, match=r"no column 'extra_info.text'; 'extra_info' has the fields"):
        load_problems(path, prompt_column="extra_info.text")


def test_long_lists_of_columns_are_cut(tmp_path):
    path = write(tmp_path / "a.jsonl", {f"c{n}": n for n in range(1000)})
    with pytest.raises(KeyError, match=r"and 970 more") as error:
        load_problems(path)
    assert len(str(error.value)) < 800


def test_each_of_several_answers_is_kept(tmp_path):
    (problem,) = load_problems(write(tmp_path / "a.jsonl", {"question": "q", "answer": ["2", "two", 2]}))
    assert problem == Problem("q", "2", {"other_answers": ["two", "2"]})
    (problem,) = load_problems(
        write(tmp_path / "a.jsonl", {"question": "q", "ground_truth": {"target": ["Paris", "paris"]}}),
        answer_column="ground_truth.target",
    )
    assert (problem.answer, problem.columns["other_answers"]) == ("Paris", ["paris"])


def test_a_number_that_is_also_another_choice_is_refused(tmp_path):
    def answer(choices, given):
        (problem,) = load_problems(write(tmp_path / "a.jsonl", {"question": "q", "choices": choices, "answer": given}))
        return problem.answer

    with pytest.raises(ValueError, match="both the text of choice A and the number of choice B; use the letter"):
        answer(["1", "2", "3"], "1")
    assert answer(["1", "2", "3"], "3") == "C"
    assert answer(["0", "1"], "1") == answer(["1", "2", "3"], 1) == "B"


def test_a_choice_that_is_none_of_them_is_refused(tmp_path):
    for answer in (2, "C", -1, True):
        path = write(tmp_path / "a.jsonl", {"question": "q", "choices": ["x", "y"], "answer": answer})
        with pytest.raises(ValueError, match=r"must be one of \['A', 'B'\]"):
            load_problems(path)


# Demonstrations -------------------------------------------------------------------------------------------------------

DEMONSTRATIONS = {
    "ShareGPT": ({"conversations": [turn("human", "hi"), turn("gpt", "yo")]}, [user("hi")], "yo"),
    "ShareGPT with other names": (
        {"conversations": [turn("system", "s"), turn("user", "hi"), turn("assistant", "yo")]},
        [system("s"), user("hi")],
        "yo",
    ),
    "ShareGPT with a system column": (
        {"system": "s", "tools": "[]", "conversations": [turn("human", "hi"), turn("gpt", "yo")]},
        [system("s"), user("hi")],
        "yo",
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                turn("human", "weather?"),
                turn("function_call", '{"name": "weather"}'),
                turn("observation", "rain"),
                turn("gpt", "It rains."),
            ]
        },
        [user("weather?"), assistant('{"name": "weather"}'), {"role": "tool", "content": "rain"}],
        "It rains.",
    ),
    "Alpaca with earlier turns": (
        {"instruction": "and you?", "input": "", "history": [["hi", "yo"]], "output": "fine"},
        [user("hi"), assistant("yo"), user("and you?")],
        "fine",
    ),
    "Alpaca with a system prompt and earlier turns": (
        {"instruction": "and", "input": "you?", "history": [["hi", "yo"]], "system": "s", "output": "fine"},
        [system("s"), user("hi"), assistant("yo"), user("and\n\nyou?")],
        "fine",
    ),
    "roles in conversations": ({"conversations": [user("hi"), assistant("yo")]}, [user("hi")], "yo"),
    "conversations as text": (
        {"conversations": json.dumps([turn("human", "hi"), turn("gpt", "yo")])},
        [user("hi")],
        "yo",
    ),
    "OpenR1": (OPEN_R1, [user("1+1?")], "<think>\n</think>\n2"),
    "NuminaMath": ({"source": "x", "problem": "q", "solution": "s"}, "q", "s"),
    "Alpaca": ({"instruction": "Add.", "input": "1, 1", "output": "2", "text": "all"}, "Add.\n\n1, 1", "2"),
    "Alpaca without input": ({"instruction": "Add 1, 1.", "input": "", "output": "2"}, "Add 1, 1.", "2"),
    "Alpaca with system": (
        {"instruction": "hi", "output": "yo", "system": "s"},
        [system("s"), user("hi")],
        "yo",
    ),
    "Dolly": (
        {"instruction": "Who?", "context": "Ann.", "response": "Ann", "category": "qa"},
        "Who?\n\nAnn.",
        "Ann",
    ),
    "query and response": ({"query": "q", "response": "r"}, "q", "r"),
    "OpenMathInstruct": ({"problem": "q", "generated_solution": "s", "expected_answer": "2"}, "q", "s"),
    "prompt and completion": ({"prompt": "q", "completion": "c", "label": 3}, "q", "c"),
    "prompt and completion as messages": ({"prompt": [user("q")], "completion": [assistant("c")]}, [user("q")], "c"),
    "text": ({"text": "t", "source": "s"}, "", "t"),
}


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_layouts_of_demonstrations(tmp_path, name):
    row, prompt, completion = DEMONSTRATIONS[name]
    (read,) = load_demonstrations(write(tmp_path / "a.jsonl", row))
    assert (read.prompt, read.completion) == (prompt, completion)


def test_other_columns_of_a_demonstration_are_kept(tmp_path):
    (read,) = load_demonstrations(write(tmp_path / "a.jsonl", OPEN_R1))
    assert read.columns["answer"] == "2"
    (read,) = load_demonstrations(write(tmp_path / "a.jsonl", DEMONSTRATIONS["Alpaca"][0]))
    assert read.columns == {"text": "all"}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"question": "q", "answer": "7"}, KeyError, "no column 'completion'.*set prompt_column"),
        ({"a": 1, "b": 2}, KeyError, r"no column 'prompt'.*\['a', 'b'\]"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, KeyError, "is a preference.*dpo.py.*completion_column"),
        ({"prompt": "q", "completion": "a", "label": False}, KeyError, "unpaired preferences"),
        (
            {"conversations": [turn("human", "hi"), turn("human", "you?")]},
            ValueError,
            "the last message has the role 'user'",
        ),
        ({"conversations": [turn("human", "hi"), {"value": "yo"}]}, ValueError, "column 'conversations': it must have"),
        ({"conversations": [turn("human", "hi"), turn("gpt", None)]}, ValueError, r"a\.jsonl:1"),
        ({"conversations": "hi"}, ValueError, "column 'conversations': it must have"),
        (
            {"instruction": "q", "output": "a", "history": ["hi"]},
            ValueError,
            "column 'history': it must be a list of pairs",
        ),
    ],
)
def test_demonstrations_that_are_refused(tmp_path, row, error, message):
    with pytest.raises(error, match=message):
        load_demonstrations(write(tmp_path / "a.jsonl", row))


# Preferences ----------------------------------------------------------------------------------------------------------

HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: and\nyou?\n\nAssistant:"
PREFERENCES = {
    "TRL": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a", "b"),
    "TRL as messages": (
        {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [user("q")],
        "a",
        "b",
    ),
    "UltraFeedback": (
        {
            "prompt": "q",
            "prompt_id": "1",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
            "messages": [user("q"), assistant("a")],
            "score_chosen": 8.5,
            "score_rejected": 7.0,
        },
        "q",
        "a",
        "b",
    ),
    "UltraFeedback with turns": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("x"), user("r"), assistant("a")],
            "rejected": [user("q"), assistant("x"), user("r"), assistant("b")],
        },
        [user("q"), assistant("x"), user("r")],
        "a",
        "b",
    ),
    "whole conversations": (
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")], "source": "x"},
        [user("q")],
        "a",
        "b",
    ),
    "whole conversations with the prompt's messages": (
        {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        [user("q")],
        "a",
        "b",
    ),
    "HH-RLHF": (
        {"chosen": HH + " good\n", "rejected": HH + " bad"},
        [user("hi"), assistant("yo"), user("and\nyou?")],
        "good",
        "bad",
    ),
    "HH-RLHF of one turn": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        [user("q")],
        "a",
        "b",
    ),
    "Orca": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        [system("s"), user("q")],
        "a",
        "b",
    ),
    "Orca without system": ({"system": "", "question": "q", "chosen": "a", "rejected": "b"}, "q", "a", "b"),
    "Alpaca": ({"instruction": "Add", "input": "1", "chosen": "a", "rejected": "b"}, "Add\n\n1", "a", "b"),
    "ShareGPT": (
        {"conversations": [turn("human", "q")], "chosen": turn("gpt", "a"), "rejected": turn("gpt", "b")},
        [user("q")],
        "a",
        "b",
    ),
    "ShareGPT as a whole": (
        {"chosen": [turn("human", "q"), turn("gpt", "a")], "rejected": [turn("human", "q"), turn("gpt", "b")]},
        [user("q")],
        "a",
        "b",
    ),
    "other names": ({"prompt": "q", "chosen_response": "a", "rejected_response": "b"}, "q", "a", "b"),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_layouts_of_preferences(tmp_path, name):
    row, prompt, chosen, rejected = PREFERENCES[name]
    (read,) = load_preferences(write(tmp_path / "a.jsonl", row))
    assert (read.prompt, read.chosen, read.rejected, read.margin) == (prompt, chosen, rejected, None)


def test_scores_of_ultrafeedback_stay_columns(tmp_path):
    (read,) = load_preferences(write(tmp_path / "a.jsonl", PREFERENCES["UltraFeedback"][0]))
    assert (read.columns["score_chosen"], read.columns["score_rejected"]) == (8.5, 7.0)


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "q", "completion": "a", "label": True}, KeyError, r"unpaired preference \(KTO\)"),
        (
            {"instruction": "q", "completions": [{"response": "a"}]},
            KeyError,
            "convert a list of rated completions to pairs",
        ),
        ({"prompt": "q", "response_1": "a", "response_2": "b"}, KeyError, r"no column 'chosen'.*'response_1'"),
        ({"chosen": "a", "rejected": "b"}, KeyError, "are texts without a prompt"),
        ({"chosen": HH + " a", "rejected": HH + " a"}, ValueError, "are equal"),
        ({"chosen": HH + " a", "rejected": HH}, ValueError, "column 'rejected' must be text that is not blank"),
        (
            {"chosen": HH + " a", "rejected": "\n\nHuman: x\n\nAssistant: b"},
            ValueError,
            "differ before the last turn",
        ),
        (
            {"prompt": "other", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            ValueError,
            "column 'chosen': the conversation does not begin with the row's prompt",
        ),
    ],
)
def test_preferences_that_are_refused(tmp_path, row, error, message):
    with pytest.raises(error, match=message):
        load_preferences(write(tmp_path / "a.jsonl", row))


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [None, "", "text", [], [1], [{"role": "user"}], [{"content": "x"}], {"a": 1}, 7, "[{"]
)
def test_what_is_no_conversation(value):
    assert as_messages(value) is None


def test_other_fields_of_messages_stay_unless_null():
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call], "name": None}]
    assert as_messages(messages) == [{"role": "assistant", "content": None, "tool_calls": [call]}]


def test_what_is_no_dialogue():
    assert hh_messages("Humans: hi") is None
    assert hh_messages("well\n\nHuman: hi") is None
    assert hh_messages(None) is None
    assert hh_messages("Human: a Human: b\n\nAssistant: c") == [user("a Human: b"), assistant("c")]


@pytest.mark.parametrize(
    ("load", "row", "name"),
    [
        (load_problems, {"question": "@", "answer": "2"}, "question"),
        (load_problems, {"question": "q", "answer": "@"}, "answer"),
        (load_problems, {"prompt": [user("@")], "answer": "2"}, "prompt"),
        (load_demonstrations, {"text": "@"}, "text"),
        (load_demonstrations, {"messages": [user("q"), assistant("@")]}, "messages"),
        (load_demonstrations, {"prompt": "q", "completion": "@"}, "completion"),
        (load_preferences, {"prompt": "q", "chosen": "a", "rejected": "@"}, "rejected"),
    ],
)
def test_overlong_texts_are_refused_before_they_are_tokens(tmp_path, monkeypatch, load, row, name):
    monkeypatch.setattr(columns, "MAX_CHARACTERS", 1000)
    good = json.loads(json.dumps(row).replace("@", "good"))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(row).replace("@", "x" * 2000) + "\n")
    with pytest.raises(ValueError, match=rf"a\.jsonl:2, column '{name}' has 2,0\d\d characters; the maximum is 1,000"):
        load(str(path))
    skipped: list[str] = []
    assert len(load(str(path), skipped=skipped)) == 1
    assert len(skipped) == 1


def test_rows_that_cannot_be_read_are_skipped_and_named(tmp_path):
    rows = [{"question": "q", "answer": str(n)} for n in range(361)]
    rows[100]["answer"] = None  # pyright: ignore[reportArgumentType]
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ValueError, match=r"a\.jsonl:101, column 'answer' must be text.*None"):
        load_problems(path)
    skipped: list[str] = []
    assert len(load_problems(path, skipped=skipped)) == 360
    (reason,) = skipped
    assert reason.startswith(f"{path}:101, column 'answer'")


def test_nothing_but_bad_rows_is_an_error(tmp_path):
    path = write(tmp_path / "a.jsonl", {"text": "t"}, {"question": "q"})
    with pytest.raises(ValueError, match=r"all 2 rows were skipped as unreadable, the first because: .*a\.jsonl:1"):
        load_problems(path, skipped=[])


# Programs -------------------------------------------------------------------------------------------------------------

ADD = "def add(a, b):\n    return a + b\n"
PROGRAMS = {
    "HumanEval": (
        {
            "task_id": "HumanEval/0",
            "prompt": 'def add(a, b):\n    """Add."""\n',
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        },
        'def add(a, b):\n    """Add."""\n',
    ),
    "MBPP": (
        {
            "task_id": 1,
            "text": "Write a function to add.",
            "code": ADD,
            "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        "Write a function to add.\n\nThe program should pass these tests:\n\n"
        "assert add(1, 2) == 3\nassert add(0, 0) == 0",
    ),
    "MBPP sanitized": (
        {
            "prompt": "Add: assert add(1, 2) == 3",
            "code": ADD,
            "test_imports": [],
            "test_list": ["assert add(1, 2) == 3"],
        },
        "Add: assert add(1, 2) == 3",
    ),
    "LiveCodeBench": (
        {
            "question_title": "A",
            "question_content": "Add two numbers.",
            "starter_code": "",
            "public_test_cases": json.dumps([{"input": "1\n2\n", "output": "3\n", "testtype": "stdin"}]),
            "metadata": "{}",
        },
        "Add two numbers.",
    ),
    "LiveCodeBench with a function": (
        {
            "question_content": "Add two numbers.",
            "starter_code": "def add(a, b):\n    ",
            "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
            "metadata": json.dumps({"func_name": "add"}),
        },
        "Add two numbers.\n\nStart from this code:\n\n```python\ndef add(a, b):\n```",
    ),
    "APPS": (
        {
            "problem_id": 0,
            "question": "Add two numbers.",
            "solutions": json.dumps(["print(sum(map(int, open(0))))"]),
            "input_output": json.dumps({"inputs": ["1\n2\n"], "outputs": ["3\n"]}),
            "starter_code": "",
        },
        "Add two numbers.",
    ),
    "CodeContests": (
        {
            "name": "a",
            "description": "Add two numbers.",
            "public_tests": {"input": ["1\n2\n"], "output": ["3\n"]},
            "solutions": {"language": [3], "solution": ["print(3)"]},
        },
        "Add two numbers.",
    ),
    "verl": (
        {
            "prompt": [user("Add two numbers.")],
            "reward_model": {"ground_truth": json.dumps({"inputs": ["1\n2\n"], "outputs": ["3\n"]}), "style": "rule"},
        },
        [user("Add two numbers.")],
    ),
    "a solution that is not an answer": (
        {"problem": "Add.", "tests": ["assert add(1, 2) == 3"], "solution": {"python": ADD}},
        "Add.",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_layouts_of_programs(tmp_path, name):
    row, prompt = PROGRAMS[name]
    (problem,) = load_problems(write(tmp_path / "a.jsonl", row))
    assert problem.prompt == prompt
    assert why_untestable(problem.columns["tests"]) is None
    assert "input_output" not in problem.columns


def test_tests_that_cannot_be_unpacked_name_the_row(tmp_path):
    rows = [{"question": "q", "public_test_cases": "[]", "private_test_cases": "no packed text"}]
    with pytest.raises(ValueError, match=r"a\.jsonl:1: its tests cannot be read: private_test_cases"):
        load_problems(write(tmp_path / "a.jsonl", *rows))

import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from grpo_jax.data.problems import Problem, reward_columns
from grpo_jax.rewards.math.answer import worked_answer
from grpo_jax.tasks import dataset
from grpo_jax.tasks.dataset import load_problems

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
ROWS = [{"question": "1+1?", "answer": "so\n#### 1,002"}, {"question": "2+2?", "answer": "4", "level": 3}]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_gsm8k_format(tmp_path):
    problems = load_problems(write_jsonl(tmp_path / "a.jsonl", ROWS))
    assert problems[0] == Problem("1+1?", "1002", {"solution": "so\n#### 1,002"})
    assert problems[1] == Problem("2+2?", "4", {"level": 3})


@pytest.mark.parametrize(
    ("text", "gold"), [("1,234,567.5", "1234567.5"), ("-1,000", "-1000"), ("(1, 2)", "(1, 2)"), ("1,2", "1,2")]
)
def test_only_a_number_with_thousands_loses_its_commas(tmp_path, text, gold):
    [problem] = load_problems(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": f"w #### {text}"}]))
    assert problem.answer == gold


def test_gold_follows_the_last_mark(tmp_path):
    [problem] = load_problems(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "#### 4\n#### 5"}]))
    assert problem.answer == "5"


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("So \\boxed{7}.\n#### Remark\nNote.", "7"),
        ("First \\boxed{4}. Then $x = \\boxed{\\frac{1}{2}}$. Our answer is correct.", "\\frac{1}{2}"),
        ("It has \\boxed{3,250} of them.", "3250"),
        ("2+3=5\n#### **5**", "5"),
        ("#### Step 1\nadd\n#### 5", "5"),
    ],
)
def test_the_gold_of_a_worked_solution_is_its_final_answer(tmp_path, text, gold):
    [problem] = load_problems(write_jsonl(tmp_path / "a.jsonl", [{"problem": "q", "solution": text}]))
    assert problem == Problem("q", gold, {"solution": text})


@pytest.mark.parametrize(
    "text", ["#### Remark\nNote.", "x = 5", "The answer is 5.", "A", "<think>maybe #### 5 or more"]
)
def test_other_answers_stay_as_they_are(tmp_path, text):
    [problem] = load_problems(write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": text}]))
    assert problem == Problem("q", text)


def test_an_empty_box_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "so \\boxed{}"}])
    with pytest.raises(ValueError, match=r"a\.jsonl:1, column 'answer': the last box is empty"):
        load_problems(path)


def test_solution_of_the_row_is_kept(tmp_path):
    row = {"question": "q", "answer": "x #### 5", "solution": "own"}
    [problem] = load_problems(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert problem == Problem("q", "5", {"solution": "own"})


@pytest.mark.skipif(not GSM8K.exists(), reason="no GSM8K here")
def test_gsm8k_itself():
    test, train = load_problems(str(GSM8K), split="test"), load_problems(str(GSM8K))
    assert (len(test), len(train)) == (1319, 7473)
    assert test[0].prompt.startswith("Janet")
    assert test[0].answer == "18"
    assert test[0].columns["solution"].endswith("#### 18")
    assert not any("," in problem.answer or "#" in problem.answer for problem in test + train)
    assert load_problems(str(GSM8K / "test.jsonl")) == test


def test_parquet_equals_jsonl(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "answer": 7, "tests": ["a", "b"]}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    problems = load_problems(str(tmp_path / "a.parquet"))
    assert problems == load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert problems[0] == Problem([{"role": "user", "content": "hi"}], "7", {"tests": ["a", "b"]})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "answer": "a"}, Problem("p", "a")),
        ({"problem": "p", "answer": "a"}, Problem("p", "a")),
        ({"problem": "p", "solution": "s", "answer": "a"}, Problem("p", "a", {"solution": "s"})),
        ({"problem": "p", "solution": "s"}, Problem("p", "s")),
        ({"question": "p", "answer": 1.5}, Problem("p", "1.5")),
        ({"question": "p", "answer": "a", "prompts": 1, "completions": 2}, Problem("p", "a")),
    ],
)
def test_columns_are_detected(tmp_path, row, expected):
    assert load_problems(write_jsonl(tmp_path / "a.jsonl", [row])) == [expected]


def test_explicit_columns_override(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": "a", "task": "t", "gold": "g"}])
    [problem] = load_problems(path, prompt_column="task", answer_column="gold")
    assert problem == Problem("t", "g", {"question": "q", "answer": "a"})


def test_answer_may_be_absent_if_allowed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "level": 3}])
    assert load_problems(path, require_answer=False) == [Problem("p", None, {"level": 3})]
    with pytest.raises(KeyError, match=r"a\.jsonl:1: no column is known as an answer.*\['prompt', 'level'\]"):
        load_problems(path)
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": None}])
    assert load_problems(path, require_answer=False) == [Problem("p", "a"), Problem("q", None)]


def test_a_row_with_tests_needs_no_answer(tmp_path):
    rows = [{"prompt": "p", "tests": ["assert f()"]}, {"prompt": "q", "tests": ["assert g()"], "answer": None}]
    problems = load_problems(write_jsonl(tmp_path / "a.jsonl", rows))
    assert problems[0] == Problem("p", None, {"tests": ["assert f()"]})
    assert problems[1].answer is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt_column": "query"}, r"a\.jsonl:1 has no column 'query'; it has \['question', 'answer'\]"),
        ({"answer_column": "gold"}, r"a\.jsonl:1 has no column 'gold'; it has \['question', 'answer'\]"),
    ],
)
def test_missing_column_lists_those_present(tmp_path, arguments, message):
    with pytest.raises(KeyError, match=message):
        load_problems(write_jsonl(tmp_path / "a.jsonl", ROWS), **arguments)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "t", "answer": "a"}, r"no column is known as a prompt.*\['text', 'answer'\]"),
        (
            {"question": "q", "prompt": "p", "answer": "a"},
            r"several columns could be the prompt: \['question', 'prompt'\]",
        ),
    ],
)
def test_prompt_column_that_cannot_be_told(tmp_path, row, message):
    with pytest.raises(KeyError, match=message):
        load_problems(write_jsonl(tmp_path / "a.jsonl", [row]))


GOOD = b'{"question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (b"\n", ValueError, r"a\.jsonl:2 is an empty line"),
        (b"{", ValueError, r"a\.jsonl:2 is not JSON"),
        (b'"\xff"', ValueError, r"a\.jsonl:2 is not JSON"),
        (b"[1]", ValueError, r"a\.jsonl:2 must be a JSON object; it is a list"),
        (b"{}", KeyError, r"a\.jsonl:2 has no column 'question'"),
        (b'{"question": "q"}', KeyError, r"a\.jsonl:2 has no column 'answer'; it has \['question'\]"),
        (b'{"question": " ", "answer": "a"}', ValueError, r"a\.jsonl:2, column 'question' must be text"),
        (b'{"question": null, "answer": "a"}', ValueError, r"a\.jsonl:2, column 'question' must be text"),
        (b'{"question": [], "answer": "a"}', ValueError, r"a\.jsonl:2, column 'question' must be text"),
        (b'{"question": [{"role": "user"}], "answer": "a"}', ValueError, r"column 'question' must be text"),
        (b'{"question": ["q"], "answer": "a"}', ValueError, r"column 'question' must be text"),
        (b'{"question": "q", "answer": ""}', ValueError, r"a\.jsonl:2, column 'answer' must be text"),
        (b'{"question": "q", "answer": null}', ValueError, r"column 'answer' must be text"),
        (b'{"question": "q", "answer": NaN}', ValueError, r"column 'answer' must be text"),
        (b'{"question": "q", "answer": []}', ValueError, r"column 'answer' must be text"),
        (b'{"question": "q", "answer": ["a", " "]}', ValueError, r"column 'answer', answer 2 must be text"),
        (b'{"question": "q", "answer": [["a"]]}', ValueError, r"column 'answer', answer 1 must be text"),
        (
            b'{"question": "q", "answer": {"target": "a"}}',
            ValueError,
            r"whose fields \['target'\] can be named as a path",
        ),
        (
            b'{"question": "q", "answer": "5 #### "}',
            ValueError,
            r"a\.jsonl:2, column 'answer': no text follows the last",
        ),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path, line, error, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + line)
    with pytest.raises(error, match=message):
        load_problems(str(path))


def test_empty_file(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        load_problems(str(tmp_path / "a.jsonl"))


def test_parquet_errors(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        load_problems(str(tmp_path / "a.parquet"))
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet row 2, column 'answer'"):
        load_problems(str(tmp_path / "b.parquet"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.jsonl"):
        load_problems(str(tmp_path / "none.jsonl"))
    for name in ("a.txt", "a.parquet.gz", "a.gz"):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=rf"has the unknown suffix '.*{name[1:]}'; .*\.jsonl.*\.parquet.*\.gz"):
            load_problems(str(tmp_path / name))


def test_splits_and_subsets_of_local_sources(tmp_path):
    path = write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert load_problems(str(tmp_path), split="test") == load_problems(path)
    with pytest.raises(FileNotFoundError, match=r"has no split 'train'; it has \['test'\]"):
        load_problems(str(tmp_path))
    with pytest.raises(ValueError, match=r"split='test' is set, but .* is a single file"):
        load_problems(path, split="test")
    with pytest.raises(ValueError, match=r"subset='main' is set, but .* is a single file"):
        load_problems(path, subset="main")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS[0]]), tmp_path / "train.parquet")
    assert load_problems(str(tmp_path)) == [load_problems(path)[0]]


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(path, name=None, *, split=None):
        calls.append((path, name, split))
        return datasets.Dataset.from_list([{"question": "q", "answer": "w #### 3"}, {"question": "q", "answer": "4"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda path: None)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["main", "socratic"])
    return calls


def test_hub_takes_main_where_a_subset_is_required(hub):
    problems = load_problems("openai/gsm8k")
    assert hub == [("openai/gsm8k", "main", "train")]
    assert [problem.answer for problem in problems] == ["3", "4"]


def test_hub_split_and_subset(hub):
    load_problems("openai/gsm8k", split="test", subset="socratic")
    assert hub == [("openai/gsm8k", "socratic", "test")]


def test_hub_default_subset_is_taken(hub, monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_default_config_name", lambda path: "default")
    load_problems("openai/gsm8k")
    assert hub == [("openai/gsm8k", "default", "train")]


def test_hub_subset_must_be_chosen_where_none_is_default(hub, monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["algebra", "geometry"])
    with pytest.raises(ValueError, match=r"no default subset; set subset to one of \['algebra', 'geometry'\]"):
        load_problems("some/maths")


def test_hub_rows_are_named(hub):
    with pytest.raises(KeyError, match=r"openai/gsm8k \(main, train\) row 1 has no column 'gold'"):
        load_problems("openai/gsm8k", answer_column="gold")


def test_hub_out_of_reach():
    with pytest.raises(FileNotFoundError, match=r"'no/where' is neither a file .* nor an accessible data set"):
        load_problems("no/where")


def test_library_accepts_the_calls_made_for_the_hub(tmp_path, monkeypatch):
    """The real ``datasets`` on a folder, which it resolves as it does a hub id."""
    from grpo_jax.data import hub

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "test.jsonl", [ROWS[0], ROWS[0]])
    rows = list(hub._hub_rows(str(tmp_path / "data"), "test", None))
    assert rows[1] == (f"{tmp_path / 'data'} (default, test) row 2", ROWS[0])


def test_reward_columns_repeat_rows_and_fill_in_none():
    problems = [Problem("p", "1", {"level": 3}), Problem("q", None, {"tests": ["t"]})]
    columns = reward_columns(problems, group_size=2)
    assert list(columns) == ["answer", "level", "tests", "problem_prompt"]
    assert columns == {
        "answer": ["1", "1", None, None],
        "level": [3, 3, None, None],
        "tests": [None, None, ["t"], ["t"]],
        "problem_prompt": ["p", "p", "q", "q"],
    }
    assert reward_columns(problems)["answer"] == ["1", None]


@pytest.mark.parametrize(
    "text",
    ["a\n#### 7", "#### 1,234\n", "#### -3.5  ", "#### 7.", "#### 7 cm", "no mark", "#### 1\n#### 2", "x #### 5 #### 6",
     "\\boxed{3} #### 4", "#### x", "# 5", "#### 12,34", "a ##### 5", "5 ####  7", "#### +7", "text" * 30 + "#### 8"],
)  # fmt: skip
def test_the_short_way_to_worked_answers_gives_what_the_long_one_gives(text):
    assert dataset._worked_answer(text) == worked_answer(text)


def test_half_of_a_surrogate_pair_is_refused_with_its_row(tmp_path):
    bad = {"question": "2+2?", "answer": "4", "hints": [{"text": "a\ud83d"}]}
    path = write_jsonl(tmp_path / "a.jsonl", [ROWS[0], bad])
    with pytest.raises(ValueError, match=r"a\.jsonl:2, column 'hints': character 1 is a lone surrogate"):
        load_problems(path)
    skipped: list[str] = []
    assert len(load_problems(path, skipped=skipped)) == 1
    assert len(skipped) == 1

"""Tests of programs as data sets publish them, and which of them can tell nothing."""

import base64
import json
import os
import pickle
import zlib
from pathlib import Path

import pytest

from grpo_jax.rewards import code
from grpo_jax.rewards.code import readable_tests, why_untestable
from grpo_jax.rewards.code_tests import read_tests

CHECK = "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n"
FUNCTIONAL = {"input": "[1, 2]\n3", "output": "5", "testtype": "functional"}
F = {"fn_name": "f", "input": [[1, 2], 3], "output": 5}
STDIN = {"input": "3\n", "output": "4\n"}


def packed(value):
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


@pytest.mark.parametrize(
    ("row", "tests"),
    [
        ({"test_list": ["assert f(1) == 2"], "test_setup_code": ""}, ["assert f(1) == 2"]),
        (
            {"test_list": ["assert f(1) == 2"], "test_imports": ["import math"], "challenge_test_list": ["assert 0"]},
            ["import math\nassert f(1) == 2"],
        ),
        ({"test_list": ["assert f(R) == 2"], "test_setup_code": "R = 1"}, ["R = 1\nassert f(R) == 2"]),
        (
            {"prompt": 'import math\n\n\ndef f(x):\n    """Doc."""\n', "test": CHECK, "entry_point": "f"},
            [{"test": CHECK, "entry_point": "f", "preamble": "import math"}],
        ),
        ({"prompt": "Write f.", "test": CHECK, "entry_point": "f"}, [{"test": CHECK, "entry_point": "f"}]),
        (
            {"test": "from solution import f\ndef test_f():\n    assert f(1)"},
            ["from solution import f\ndef test_f():\n    assert f(1)"],
        ),
        (
            {
                "public_test_cases": json.dumps([FUNCTIONAL]),
                "private_test_cases": packed(json.dumps([FUNCTIONAL])),
                "metadata": '{"func_name": "f"}',
            },
            [F, F],
        ),
        (
            {
                "public_test_cases": json.dumps([FUNCTIONAL]),
                "starter_code": "class Solution:\n    def f(self, a, b):\n        ",
            },
            [F],
        ),
        ({"public_test_cases": json.dumps([STDIN | {"testtype": "stdin"}]), "metadata": "{}"}, [STDIN]),
        ({"input_output": '{"inputs": ["3\\n"], "outputs": ["4\\n"]}'}, [STDIN]),
        ({"input_output": '{"inputs": [["1", "2"]], "outputs": [["3"]]}'}, [{"input": "1\n2", "output": "3"}]),
        (
            {"input_output": '{"fn_name": "f", "inputs": [[[1, 2], 3]], "outputs": [5]}'},
            [F | {"wrapped": True}],
        ),
        (
            {"public_tests": {"input": ["3\n"], "output": ["4\n"]}, "private_tests": {"input": [], "output": []}},
            [STDIN],
        ),
        (
            {
                "verification_info": {
                    "language": "python",
                    "test_cases": [STDIN | {"type": "stdin_stdout", "fn_name": None}],
                }
            },
            [STDIN],
        ),
        ({"verification_info": json.dumps({"test_cases": [F | {"type": "function_call"}]})}, [F]),
        ({"reward_model": {"ground_truth": '{"inputs": ["3\\n"], "outputs": ["4\\n"]}', "style": "rule"}}, [STDIN]),
        ({"tests": json.dumps([STDIN | {"type": "stdin_stdout"}])}, [STDIN]),
        ({"tests": [FUNCTIONAL | {"metadata": {"func_name": "f"}}]}, [F]),
        ({"tests": {"assert_case": ["assert f(1) == 2"]}}, ["assert f(1) == 2"]),
        ({"test_cases": {"inputs": ["3\n"], "outputs": ["4\n"]}}, [STDIN]),
        ({"reward_model": {"ground_truth": "12"}}, None),
        ({"reward_model": {"ground_truth": "[1, 2]"}}, None),
        ({"question": "?", "answer": "4", "test": None}, None),
    ],
)
def test_tests_of_a_row(row, tests):
    assert code.tests_from_row(row) == tests


class Evil:
    def __reduce__(self):
        return os.mkdir, (os.environ["MARK"],)


def test_a_pickle_runs_no_code(tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    monkeypatch.setenv("MARK", str(mark))
    with pytest.raises(ValueError, match=r"column 'private_test_cases': .*would load posix.mkdir"):
        code.tests_from_row({"private_test_cases": packed(Evil())})
    assert not Path(mark).exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"public_test_cases": json.dumps([FUNCTIONAL])},
            "test 1 is functional .* needs fn_name .or metadata.func_name",
        ),
        ({"input_output": "no"}, "column 'input_output': tests must be a list"),
        ({"input_output": "{"}, "neither JSON .* nor base64"),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs and 0 outputs"),
        ({"tests": [{"input": "1", "output": "1"}, "assert f(1)"]}, "they must be of one way"),
        ({"tests": {"a": 1}}, r"tests must be a list of tests, or a mapping .* they have \['a'\]"),
        ({"tests": [FUNCTIONAL | {"fn_name": "f", "input": "nope"}]}, "must be JSON, one argument a line"),
        ({"tests": [{"fn_name": "a b", "input": [], "output": 1}]}, "must be the name of a function, not 'a b'"),
        ({"test_list": ["assert ("]}, "test 1 is not Python"),
    ],
)
def test_rows_that_cannot_be_read(row, message):
    with pytest.raises(ValueError, match=message):
        code.tests_from_row(row)


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("def helper():\n    assert add(1, 2) == 3", "only defines something that nothing runs"),
        ("class TestAdd:\n    value = 1", "only defines something"),
        ("class Add(object):\n    def test_a(self):\n        assert add(1, 2)", "only defines something"),
        ("import math", "only defines something"),
        ("pass", "only defines something"),
        ("", "only defines something"),
        ('"""Tests of add."""', "only defines something"),
        ("assert True", "does not use the program"),
        ("assert 1 + 2 == 3", "does not use the program"),
        ("def test_one():\n    assert 1 == 1", "does not use the program"),
        ("add(1, 2)", "nothing in the tests can fail"),
        ("print(add(1, 2) == 3)", "nothing in the tests can fail"),
        ("result = add(1, 2)", "nothing in the tests can fail"),
        ("import numpy as np\nassert np.all(add(1, 2))", "needs the module numpy"),
        ("from hypothesis import given\nassert add(1, 2)", "needs the module hypothesis"),
        ("assert np.all(add(1, 2))", "needs the module numpy"),
        ("assert add(", "not Python"),
    ],
)
def test_tests_that_can_tell_nothing(test, why):
    assert why in (why_untestable([test]) or "")


@pytest.mark.parametrize(
    "tests",
    [
        ["assert add(1, 2) == 3"],
        ["def test_add():\n    assert add(1, 2) == 3"],
        ["class TestAdd:\n    def test_a(self):\n        assert add(1, 2) == 3"],
        ["import unittest\nclass A(unittest.TestCase):\n    def test_a(self):\n        self.assertEqual(add(1, 2), 3)"],
        ["def helper(f):\n    assert f(1, 2) == 3\nhelper(add)"],
        ["def check(candidate):\n    assert candidate(1, 2) == 3"],
        ["assert sum([1, 2]) == 3"],
        ["assert gcd(4, 6) == 2"],
        ["add(1, 2)", "assert add(1, 2) == 3"],
        ["try:\n    import numpy\nexcept ImportError:\n    pass\nassert add(1, 2) == 3"],
        ["import pytest\ndef test_a():\n    with pytest.raises(TypeError):\n        add(1, 'a')"],
        [STDIN],
        [F],
    ],
)
def test_tests_that_can_fail(tests):
    assert why_untestable(tests) is None
    assert readable_tests(tests)


def test_one_test_of_each_kind_is_read_as_it_is():
    for test in (STDIN, F, "assert add(1, 2) == 3", {"test": CHECK, "entry_point": "f"}):
        assert read_tests([test]) == [test]
        assert read_tests(test if isinstance(test, dict) else [test]) == [test]

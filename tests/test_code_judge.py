"""Whose names a test uses, what a test runner would run of it, and what is then the test's own fault."""

import shutil

import pytest

from grpo_jax.rewards.code import code_reward, same_output

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
ADD, WRONG = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
OTHER = "def other():\n    return 1\n"


def grade(program, tests, prompt="", **options):
    (graded,) = code_reward([prompt], [f"```python\n{program}```"], tests=[tests], **options)
    return graded


@pytest.mark.parametrize(
    "test",
    [
        "def test_add():\n    assert add(1, 2) == 3",
        "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3",
        "import solution\nassert solution.add(1, 2) == 3",
        "from solution import *\nassert add(1, 2) == 3",
        "class TestAdd:\n    def setup_method(self):\n        self.x = 1\n"
        "    def test_a(self):\n        assert add(self.x, 2) == 3",
        "async def test_add():\n    assert add(1, 2) == 3",
        "def test_add(f):\n    assert f(1, 2) == 3\n\ntest_add(add)",
        "import unittest\nclass Adding(unittest.TestCase):\n  def test_a(self):\n    self.assertEqual(add(1, 2), 3)",
        "import unittest\nclass Adding(unittest.TestCase):\n    def setUp(self):\n        self.x = 1\n"
        "    def test_a(self):\n        self.assertEqual(add(self.x, 2), 3)\n"
        "if __name__ == '__main__':\n    unittest.main()",
        "def check(candidate):\n    assert candidate(1, 2) == 3",
        "def check(candidate):\n    assert candidate(1, 2) == 3\ncheck(add)",
        "import pytest\n@pytest.mark.parametrize('a, b, c', [(0, 0, 0), (1, 2, 3)])\n"
        "def test_add(a, b, c):\n    assert add(a, b) == c",
        "import pytest\ndef test_add():\n    assert add(0.1, 0.2) == pytest.approx(0.3)",
        "import pytest\ndef test_add():\n    assert add(1, 2) == 3\npytest.main([__file__])",
        "import sys\nsys.exit(0 if add(1, 2) == 3 else 1)",
    ],
)
def test_what_a_test_runner_would_run(test):
    assert grade(ADD, [test]).score == 1.0
    assert grade(WRONG, [test]).score == 0.0


@pytest.mark.parametrize(
    "test", ["def test_add():\n    assert add(1, 2)", "from solution import add\nassert add(1, 2)"]
)
def test_a_program_without_the_function_fails(test):
    assert grade(OTHER, [test]).score == 0.0


def test_an_entry_point_says_which_function_is_checked():
    test = "def check(candidate):\n    assert candidate(1, 2) == 3"
    assert grade(ADD + OTHER, [test], entry_point=["add"]).score == 1.0
    assert grade(ADD + OTHER, [test]).score == 0.0  # without one it is the last function
    tests = {"test": test, "entry_point": "add", "preamble": "def half(x):\n    return x / 2\n"}
    assert grade("def add(a, b):\n    return half(2 * a) + b\n", tests).score == 1.0
    assert grade(OTHER, tests).score == 0.0
    assert grade("class Solution:\n    def add(self, a, b):\n        return a + b\n", tests).score == 1.0


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("class np:\n    isclose = lambda *a: True\ndef f(x): return 0", "assert np.isclose(f(2), 3.5)"),
        ("class math:\n    isclose = lambda *a: True\ndef f(x): return 0", "assert math.isclose(f(2), 3.5)"),
        ("def isclose(*a): return True\ndef f(x): return 0", "assert isclose(f(2), 3.5)"),
        (
            "def isclose(*a): return True\ndef f(x): return 0",
            "from math import isclose\nfrom solution import *\nassert isclose(f(2), 1)",
        ),
        ("def abs(x): return 0\ndef f(x): return 0", "from solution import *\nassert abs(f(2) - 3) < 1"),
        ("Counter = list\ndef f(x): return []", "assert Counter(f(2)) == Counter('ab')"),
        ("def check(*a): pass\ndef f(x): return 0", "def check(candidate):\n    assert candidate(2) == 3"),
        (
            "unittest = 1\ndef f(x): return 0",
            "import unittest\nclass T(unittest.TestCase):\n  def test(self):\n    self.assertEqual(f(1), 2)",
        ),
        ("def test_f(): pass\ndef f(x): return 0", "def test_f():\n    assert f(1) == 2"),
        ("class TestF: pass\ndef f(x): return 0", "class TestF:\n    def test_f(self):\n        assert f(1) == 2"),
        ("import sys\ndef f(x): sys.exit(0)", "def test_f():\n    assert f(1) == 2"),
    ],
)
def test_a_program_cannot_replace_the_names_of_a_test(program, test):
    assert grade(program, [test]).score in (0.0, None)


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("import heapq\ndef f(x): return x", "assert heapq.heappop(f([1])) == 1"),
        ("import decimal as dec\ndef f(x): return dec.Decimal(x)", "assert f('1') == dec.Decimal(1)"),
        ("def f(x): return x", "assert f(deque([1]).pop()) == Counter('a')['a']"),
        ("def f(x): return x", "assert isclose(f(sqrt(4)), 2)"),
        ("def sum(x):\n    total = 0\n    for y in x: total += y\n    return total", "assert sum([1, 2]) == 3"),
        ("def gcd(a, b):\n    return gcd(b, a % b) if b else a", "assert gcd(12, 8) == 4"),
        ("def sorted(x): return x[::-1]", {"fn_name": "sorted", "input": [[2, 1]], "output": [1, 2]}),
        (ADD + "if __name__ == '__main__':\n    print(add(int(input()), 1))", "assert add(1, 2) == 3"),
        (
            "class Solution:\n    def f(self, x: List[int]) -> Optional[int]:\n        return x[0]",
            {"fn_name": "f", "input": [[3]], "output": 3},
        ),
    ],
)
def test_names_of_a_test_come_from_python_where_the_program_has_none(program, test):
    assert grade(program, [test]).score == 1.0


def test_a_function_named_like_one_of_pythons_is_the_program_s_where_the_tests_are_about_it():
    assert grade("def sum(x): return 0", ["assert sum([1, 2]) == 3"]).score == 0.0
    assert grade(OTHER, ["assert sum([1, 2]) == 3"]).score == 0.0
    assert grade("def sum(x): return 0\ndef f(x): return x", ["assert sum(f([1, 2])) == 3"]).score == 1.0


@pytest.mark.parametrize(
    ("tests", "note"),
    [
        (["import numpy\nassert add(1, 2) == 3"], "numpy, which is not in the sandbox"),
        (["assert add(1, 2) == EXPECTED"], "EXPECTED, which nothing defines"),
        (["assert almost(add(1, 2), 3)"], "almost, which neither it nor the program defines"),
        (["def helper():\n    assert add(1, 2) == 3"], "only defines something"),
        (["import pytest\n@pytest.fixture\ndef x(): return 1\ndef test_a(x): assert add(x, 1)"], "pytest.fixture"),
        ([{"input": "[1]\n2", "output": "3", "testtype": "functional"}], "needs fn_name"),
        (None, "at least one test"),
    ],
)
def test_a_test_that_fails_for_everybody_is_absent(tests, note):
    for program in (ADD, WRONG):
        graded = grade(program, tests)
        assert graded.score is None
        assert note in graded.note


def test_a_function_that_the_prompt_asks_for_is_the_program_s_fault():
    test = ["assert decode(encode(1)) == 1"]
    assert grade("def encode(x): return x", test, "Write encode and decode.").score == 0.0
    graded = grade(OTHER, ["assert almost(add(1, 2), 3)"], "Write add(a, b).")
    assert graded.score is None
    assert "almost, which nothing defines" in graded.note


def test_an_unfinished_thought_is_not_run():
    assert grade(ADD, ["assert add(1, 2) == 3"], "Think.<think>\n").score == 0.0
    assert grade(ADD, ["assert add(1, 2) == 3"], "Think.<think>\n</think>").score == 1.0


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("0.5\n", "0.500000", 0.0, True),
        ("5e-1", "0.5", 0.0, True),
        ("-0.0", "0.0", 0.0, True),
        ("a 1.50  \n\n", "a 1.5\n", 0.0, True),
        ("0.51", "0.5", 0.0, False),
        ("0.3333333333", "0.333333", 0.0, False),
        ("0.3333333333", "0.333333", 1e-6, True),
        ("0.3343333333", "0.333333", 1e-6, False),
        ("nan", "0.5", 1e-6, False),
        ("inf", "1e400", 1.0, False),
        ("1.0", "1", 1e-6, False),
        ("0_5.0", "05.0", 0.0, False),
        ("0.5 0.5", "0.5", 1e-6, False),
        ("0.5\n1", "0.5\n\n1", 1e-6, False),
        ("YES  \nNO\n", "YES\r\nNO", 0.0, True),
    ],
)
def test_outputs_are_compared_as_text_and_decimals_as_numbers(output, expected, tolerance, same):
    assert same_output(output, expected, tolerance) is same


def test_a_right_output_of_any_size_fits():
    test = [{"input": "2000000\n", "output": "x" * 2_000_000}]
    assert grade("print('x' * int(input()))", test).score == 1.0
    assert grade("print('y' * int(input()))", test).score == 0.0
    graded = grade("while True: print('x' * 100000)", test)
    assert graded.score == 0.0
    assert "wrote more than" in graded.note


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_is_finite_and_not_negative(tolerance):
    with pytest.raises(ValueError, match="float_tolerance is"):
        grade(ADD, ["assert add(1, 2) == 3"], float_tolerance=tolerance)

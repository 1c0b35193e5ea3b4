"""Tests of programs as data sets have them, and tests that tell nothing."""

import base64
import json
import math
import pickle
import shutil
import zlib

import pytest

from grpo_jax.rewards.code import test_formats
from grpo_jax.rewards.code.reward import code_reward, run_tests, same_output
from grpo_jax.rewards.code.sandbox import Sandbox, SandboxLimits
from grpo_jax.rewards.code.test_cases import used_names, why_untestable

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
ADD, WRONG = "def add(a, b):\n    return a + b\n", "def add(a, b):\n    return a - b\n"
CASES = [{"input": "3\n4\n", "output": "7\n", "testtype": "stdin"}]
FUNCTIONAL = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]
CHECK = "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(3, 4) == 7\n"


def packed(cases):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode()


class Evil:
    def __reduce__(self):
        return (print, ("run",))


ROWS = {
    "as they are": ({"tests": ["assert f(1)"]}, ["assert f(1)"]),
    "as JSON": ({"tests": '["assert f(1)"]'}, ["assert f(1)"]),
    "as one text": ({"tests": "assert f(1)"}, ["assert f(1)"]),
    "HumanEval": ({"prompt": "def add", "test": CHECK, "entry_point": "add"}, [f"{CHECK}\n\ncheck(add)\n"]),
    "HumanEval that calls check": ({"test": CHECK + "check(add)", "entry_point": "add"}, [CHECK + "check(add)"]),
    "MBPP": (
        {"test_list": ["assert f(1)"], "test_setup_code": "x = 1", "challenge_test_list": ["assert f(2)"]},
        ["x = 1\nassert f(1)", "x = 1\nassert f(2)"],
    ),
    "MBPP, sanitized": ({"test_list": ["assert f(1)"], "test_imports": ["import math"]}, ["import math\nassert f(1)"]),
    "LiveCodeBench": (
        {"public_test_cases": json.dumps(CASES), "private_test_cases": packed(CASES), "metadata": "{}"},
        [CASES[0] | {}, CASES[0]],
    ),
    "LiveCodeBench, functions": (
        {"public_test_cases": json.dumps(FUNCTIONAL), "metadata": '{"func_name": "total"}'},
        [{"fn_name": "total", "input": [[1, 2], 3], "output": 6}],
    ),
    "APPS": (
        {"input_output": '{"inputs": ["3\\n"], "outputs": ["4\\n"]}'},
        [{"input": "3\n", "output": "4\n"}],
    ),
    "APPS, functions": (
        {"input_output": '{"fn_name": "f", "inputs": [[3, 4]], "outputs": [[7]]}'},
        [{"fn_name": "f", "input": [3, 4], "output": 7}],
    ),
    "lines": (
        {"input_output": {"inputs": [["3", "4"]], "outputs": [["7"]]}},
        [{"input": "3\n4", "output": "7"}],
    ),
    "CodeContests": (
        {"public_tests": {"input": ["3"], "output": ["4"]}, "private_tests": {"input": ["5"], "output": ["6"]}},
        [{"input": "3", "output": "4"}, {"input": "5", "output": "6"}],
    ),
    "OpenR1": (
        {
            "verification_info": {
                "language": "python",
                "test_cases": [{"input": "3", "output": "4", "type": "stdin_stdout"}],
            }
        },
        [{"input": "3", "output": "4"}],
    ),
    "verl": (
        {"reward_model": {"style": "rule", "ground_truth": '{"inputs": ["3"], "outputs": ["4"]}'}},
        [{"input": "3", "output": "4"}],
    ),
    "none": ({"question": "1+1?", "answer": "2"}, None),
    "an empty list": ({"tests": []}, None),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_tests_of_published_rows(name):
    row, expected = ROWS[name]
    found = test_formats.tests_from_row(row)
    for each in expected or ():
        if isinstance(each, dict):
            each.pop("testtype", None)
    assert found == expected
    if found:
        assert why_untestable(found) is None


def test_a_pickle_that_could_run_code_is_never_loaded(capsys):
    row = {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()}
    with pytest.raises(ValueError, match=r"private_test_cases is neither JSON .*the pickle refers to builtins.print"):
        test_formats.tests_from_row(row)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (["def add(a): return a"], "no test can fail"),
        (["print(add(1, 2))"], "no test can fail"),
        (["import numpy as np\nassert add(np.array([1])) == 1"], "test 1 imports numpy"),
        (["assert np.allclose(add(1, 2), 3)"], "test 1 imports numpy"),
        (["assert 1 + 1 == 2"], "no test can fail"),
        (["x = 2\nassert x + 1 == 3"], "no test uses a name of the program"),
        (["from pytest import raises\nassert add(1, 2) == 3"], "test 1 imports pytest"),
        ([{"input": "1", "output": "2", "testtype": "functional"}], "functional but has no fn_name"),
        (None, "at least one test"),
    ],
)
def test_tests_that_tell_nothing(tests, message):
    assert message in why_untestable(tests)
    completion = f"```python\n{ADD}```"
    (graded,) = code_reward([""], [completion], tests=[tests])
    assert graded.score is None
    assert message in graded.note


@pytest.mark.parametrize(
    ("tests", "names"),
    [
        (["assert add(1, 2) == 3"], {"add"}),
        (["assert abs(f(2) - 3.14) < 1e-6"], {"f"}),
        (["assert sum(10, 15) == 6", "assert sum(100, 150) == 93"], {"sum"}),
        (["assert set(max([1, 2])) == {2}", "assert max([3]) == 3"], {"max"}),
        (["assert gcd(4, 6) == 2"], {"gcd"}),
        (["assert lcm_of(4, 6) == 24 // gcd(4, 6)"], {"lcm_of"}),
        (["import math\nassert area(1) == math.pi"], {"area"}),
        (["x = 1\nassert f(x) == x"], {"f"}),
        (["assert isinstance(Stack(), Stack)"], {"Stack"}),
        (["from solution import add\n\n\ndef test_add():\n    assert add(1, 2) == 3"], {"add"}),
        ([CHECK + "check(add)"], {"add"}),
    ],
)
def test_what_tests_take_from_the_program(tests, names):
    assert used_names(tests) == names


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(SandboxLimits(seconds=3.0, wall_seconds=20.0))


PYTEST = "def test_add():\n    assert add(3, 4) == 7\n\n\ndef test_more():\n    assert add(0, 1) == 1\n"
UNITTEST = (
    "import unittest\n\n\nclass TestAdd(unittest.TestCase):\n    def setUp(self):\n        self.a = 3\n\n"
    "    def test_add(self):\n        self.assertEqual(add(self.a, 4), 7)\n"
)
DEFINING = {
    "pytest": PYTEST,
    "a class of pytest": "class TestAdd:\n    def test_add(self):\n        assert add(3, 4) == 7\n",
    "unittest": UNITTEST,
    "unittest with main": UNITTEST + "\n\nif __name__ == '__main__':\n    unittest.main()\n",
    "unittest that exits": UNITTEST + "\n\nunittest.main()\n",
    "HumanEval": CHECK,
    "HumanEval, called": CHECK + "\n\ncheck(add)\n",
    "async": "async def test_add():\n    assert add(3, 4) == 7\n",
    "guarded": "def main():\n    assert add(3, 4) == 7\n\n\nif __name__ == '__main__':\n    main()\n",
    "pytest, imported": f"from solution import add\n\n\n{PYTEST}",
    "pytest, called": PYTEST + "\n\ntest_add()\n",
}


VERSION = """
import functools
@functools.total_ordering
class Version:
  def __init__(self, n): self.n = n
  def __eq__(self, other): return self.n == other.n
  def __lt__(self, other): return self.n < other.n
  def __truediv__(self, k): return Version(self.n / k)
  def __setitem__(self, k, v): self.n = v
"""


@needs_bubblewrap
@pytest.mark.parametrize(
    "test",
    [
        "assert Version(1) < Version(2) <= Version(2) and Version(3) > Version(2) >= Version(2)",
        "assert [v.n for v in sorted([Version(3), Version(1)])] == [1, 3]",
        "assert isinstance(Version(1), Version) and not isinstance(1, Version)",
        "assert Version(4) / 2 == Version(2)",
        "v = Version(4)\nv['n'] = 5\nassert v.n == 5",
        "assert Version(n=1).n == 1",
    ],
)
def test_objects_of_a_program(test, sandbox):
    assert run_tests(VERSION, [test], sandbox).passed == (True,)


@needs_bubblewrap
@pytest.mark.parametrize("name", ["target", "operation", "args", "kwargs", "function", "connection"])
def test_arguments_may_have_any_name(name, sandbox):
    program = f"def f(x, {name}):\n  x.append({name})\n  return x\n"
    verdict = run_tests(program, [f"x = [1]\nassert f(x, {name}=2) == [1, 2] == x"], sandbox)
    assert verdict.passed == (True,), verdict


@needs_bubblewrap
def test_a_program_that_ended_in_a_failed_test_runs_again_for_the_next(sandbox):
    program = "import os\ndef f(x):\n  if x == 1: os._exit(0)\n  return x\n"
    test = "try:\n    r = f(1)\nexcept BaseException:\n    r = None\nassert r == 5"
    assert run_tests(program, [test, "assert f(2) == 2"], sandbox).passed == (False, True)


@needs_bubblewrap
@pytest.mark.parametrize("name", DEFINING)
def test_what_a_test_only_defines_is_run(name, sandbox):
    assert why_untestable([DEFINING[name]]) is None
    assert run_tests(ADD, [DEFINING[name]], sandbox).passed == (True,)
    assert run_tests(WRONG, [DEFINING[name]], sandbox).passed == (False,)


METHOD = "  def test_f(self): assert f(1) == self.x"


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "test", "passed"),
    [
        # Names of a test come from its own imports and the usual ones, not from the program.
        ("class np:\n  allclose = lambda *a: True\ndef f(x): return 0", "assert np.allclose(f(1), 5)", None),
        ("def isclose(*a): return True\ndef f(x): return 0", "assert isclose(f(1), 5)", False),
        (
            "class Counter(dict): __eq__ = lambda *a: True\ndef f(x): return []",
            "assert Counter(f(1)) == Counter([5])",
            False,
        ),
        (
            "class heapq:\n  nsmallest = lambda *a: [1]\ndef f(x): return [2]",
            "assert heapq.nsmallest(1, f(1)) == [1]",
            False,
        ),
        # A module that only the solution imports.
        ("import heapq\ndef f(x): return [2, 1]", "assert heapq.nsmallest(1, f(1)) == [1]", True),
        ("from math import pi\ndef f(x): return pi", "assert isclose(f(1), pi)", True),
        ("from collections import deque\ndef f(x): return [1]", "assert deque(f(1)) == deque([1])", True),
        ("def deepcopy(x): return 5\ndef f(x): return 0", "assert deepcopy(f(1)) == 5", False),
        ("class Fraction:\n  __eq__ = lambda *a: True\ndef f(x): return 0", "assert Fraction(f(1)) == 5", False),
        ("def f(x): return x", "from main import f\nassert f(1) == 1", True),
        ("def f(x): return 3", f"class TestF:\n  def setup_method(self, m): self.x = 3\n{METHOD}", True),
        ("def f(x): return 3", f"class TestF:\n  @classmethod\n  def setup_class(cls): cls.x = 4\n{METHOD}", False),
        # Named like something of Python's own.
        ("def sum(a, b): return a + b", "assert sum(1, 2) == 3", True),
        ("def sum(a, b): return a - b", "assert sum(1, 2) == 3", False),
        ("def total(a, b): return a + b", "assert sum([1, 2]) == 3", False),
        ("def gcd(a, b): return 2", "assert gcd(4, 6) == 2", True),
        ("def gcd(a, b): return 1", "assert gcd(4, 6) == 2", False),
        # A test that fails for everybody, and a program that lacks what the test calls.
        ("def f(x): return 1", "assert f(1) == expected", None),
        ("def f(x): return 1", "import no_such_module\nassert f(1) == 1", None),
        ("def g(x): return 1", "assert f(1) == 1", False),
        ("def f(x): return undefined", "assert f(1) == 1", False),
        ("def f(x):\n  import no_such_module\n  return 1", "assert f(1) == 1", False),
        # A script beside the function.
        ("def f(x): return x\nif __name__ == '__main__':\n  print(f(int(input())))", "assert f(1) == 1", True),
        (
            "def f(x): return x\nif __name__ == '__main__':\n  raise SystemExit",
            {"fn_name": "f", "input": [1], "output": 1},
            True,
        ),
        ("def sum(a, b): return a + b", {"fn_name": "sum", "input": [1, 2], "output": 3}, True),
        (
            "import dataclasses\n@dataclasses.dataclass\nclass P:\n  x: int\ndef f(x): return P(x)",
            "assert f(1).x == 1",
            True,
        ),
        # What a program sees of a function of the test.
        (
            "def f(g): return g.__name__, g.__doc__",
            "def given(a):\n  'A doc.'\nassert f(given) == ('given', 'A doc.')",
            True,
        ),
        ("import inspect\ndef f(g): return str(inspect.signature(g))", "assert 'secret' in f(lambda secret: 0)", False),
        ("def one(x): return x\ndef two(x): return x", "def check(candidate):\n  assert candidate(1) == 1", None),
        ("def f(x): return x", "def test_f(fixture):\n  assert f(1) == 1", None),
    ],
)
def test_verdicts(program, test, passed, sandbox):
    assert run_tests(program, [test], sandbox).passed == (passed,)


ENDINGS = ["os._exit(0)", "sys.exit(0)", "raise KeyboardInterrupt", "os.kill(os.getpid(), 9)", "os.closerange(3, 99)"]
CATCHING = [
    "try:\n    f(1)\n    r = 0\nexcept Exception:\n    r = 1\nassert r == 1",
    "try:\n    r = f(1)\nexcept BaseException:\n    r = None\nassert r is None or r == 5",
    "try:\n    r = f(1)\nexcept:\n    r = 5\nassert r == 5",
]


@needs_bubblewrap
@pytest.mark.parametrize("ending", ENDINGS)
def test_the_end_of_a_program_is_not_an_error_that_a_test_may_catch(ending, sandbox):
    program = f"import os, sys\ndef f(x):\n  {ending}\n  return 0\n"
    for test in CATCHING:
        assert run_tests(program, [test], sandbox).passed == (False,)
    assert run_tests("def f(x): raise ValueError", CATCHING, sandbox).passed == (True,) * 3


@needs_bubblewrap
def test_more_output_than_the_limit_is_right_where_it_is_expected(sandbox):
    small = Sandbox(SandboxLimits(seconds=3.0, wall_seconds=20.0, output_bytes=10_000))
    test = {"input": "", "output": "x" * 50_000}
    assert run_tests("print('x' * 50_000)", [test], small).passed == (True,)
    assert run_tests("print('x' * 500_000)", [test], small).passed == (False,)
    assert run_tests("print('x' * 500_000)", [{"input": "", "output": "x"}], small).passed == (False,)


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        ("0.5", "0.500000", None, False),
        ("0.5\n", "0.500000", 0.0, True),
        ("0.50001 yes", "0.5 yes", 1e-3, True),
        ("0.51", "0.5", 1e-3, False),
        ("1e6", "1000000.0", 0.0, True),
        ("101", "0101", 0.0, False),
        ("7.0", "7", 0.0, False),
        ("7", "7.0", 0.0, True),
        ("nan", "0.5", 1.0, False),
        ("0.5 0.5", "0.5", 0.0, False),
        ("0.5\n0.5", "0.5", 0.0, False),
        ("a 0.5", "b 0.5", 1.0, False),
    ],
)
def test_numbers_in_an_output_may_differ_by_choice(output, expected, tolerance, same):
    assert same_output(output, expected, tolerance) == same


@needs_bubblewrap
def test_exit_and_quit_are_there(sandbox):
    for name in ("exit", "quit"):
        test = {"input": "3\n", "output": "3\n"}
        assert run_tests(f"print(int(input()))\n{name}(0)\n", [test], sandbox).passed == (True,)


@needs_bubblewrap
def test_names_of_typing_need_no_import(sandbox):
    completion = "```python\nclass Solution:\n    def f(self, x: List[int]) -> int:\n        return x[0]\n```"
    tests = [[{"fn_name": "f", "input": [[4]], "output": 4}]]
    assert code_reward([""], [completion], tests=tests)[0].score == 1.0


@needs_bubblewrap
def test_the_tolerance_of_the_reward():
    for tolerance in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"tolerance is .*; it must be a finite number of at least 0"):
            code_reward([], [], tests=[], tolerance=tolerance)
    completions = ["```python\nprint(1 / 2)\n```"] * 2
    tests = [[{"input": "", "output": "0.500000\n"}]] * 2
    assert [each.score for each in code_reward([""] * 2, completions, tests=tests)] == [0.0, 0.0]
    assert [each.score for each in code_reward([""] * 2, completions, tests=tests, tolerance=1e-6)] == [1.0, 1.0]


@needs_bubblewrap
def test_a_program_in_an_unfinished_thought_is_none():
    tests = [["assert add(3, 4) == 7"]] * 3
    program = f"```python\n{ADD}```"
    prompts = ["", "Write add.\n<think>\n", "Write add.\n<think>\n"]
    completions = [f"<think>Maybe\n{program}", program, f"hm</think>\n{program}"]
    assert [each.score for each in code_reward(prompts, completions, tests=tests)] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "test",
    [
        "def helper():\n    assert add(1, 2) == 3",
        "class Add:\n    def test_a(self):\n        assert add(1, 2) == 3",
        "def helper():\n    assert add(1, 2) == 3\n\n\nother = 1",
        "class TestAdd:\n    def helper(self):\n        assert add(1, 2) == 3",
    ],
)
def test_a_definition_that_nothing_runs_cannot_fail(test):
    assert "no test can fail" in (why_untestable([test]) or "")
    assert why_untestable([test, "assert add(1, 2) == 3"]) is None


@pytest.mark.parametrize(
    "test",
    [
        "def helper(f):\n    assert f(1, 2) == 3\n\n\nhelper(add)",
        "def helper():\n    assert add(1, 2) == 3\n\n\ndef test_add():\n    helper()",
        "import unittest\nclass Adding(unittest.TestCase):\n  def test_a(self):\n    self.assertEqual(add(1, 2), 3)",
        "def check(candidate):\n    assert candidate(1, 2) == 3\n\n\ncheck(add)",
    ],
)
def test_a_definition_that_is_run_can_fail(test):
    assert why_untestable([test]) is None


@pytest.mark.parametrize(
    "test",
    [
        "if False:\n    assert add(1, 2) == 3",
        "if not True:\n    assert add(1, 2) == 3",
        "while 0:\n    assert add(1, 2) == 3",
        "def f():\n    return\n    assert add(1, 2) == 3\nf()",
        "def f(x):\n    if x:\n        return\n    else:\n        return\n    assert add(1, 2) == 3\nf(add)",
        "def f():\n    def g():\n        assert add(1, 2) == 3\nf()",
        "assert add(1, 2) == 3 or True",
        "assert (add(1, 2) == 4, 'wrong')",
        "add(1, 2)\nassert True",
        "import unittest\nclass A(unittest.TestCase):\n  def test_a(self):\n    add(1, 2)\n    self.assertTrue(True)",
    ],
)
def test_an_assertion_that_is_never_reached_or_always_true_cannot_fail(test):
    assert "no test can fail" in (why_untestable([test]) or "")


@pytest.mark.parametrize(
    "test",
    [
        "if True:\n    assert add(1, 2) == 3",
        "def f():\n    def g():\n        assert add(1, 2) == 3\n    g()\nf()",
        "if add(1, 2) != 3:\n    raise ValueError",
        "for n in range(3):\n    if n == 2:\n        continue\n    assert add(n, n) == 2 * n",
        "try:\n    add(1)\nexcept TypeError:\n    pass\nelse:\n    assert False",
        "match add(1, 2):\n    case 3:\n        pass\n    case _:\n        assert False",
        "def f(x):\n    if x == 3:\n        return\n    assert False\nf(add(1, 2))",
    ],
)
def test_an_assertion_that_is_reached_can_fail(test):
    assert why_untestable([test]) is None


@needs_bubblewrap
@pytest.mark.parametrize(
    ("test", "passed"),
    [
        ("assert add(1 / 0, 1) == 1", None),
        ("x = []\nassert add(x[0], 1) == 1", None),
        ("assert 1 == 2\nassert add(1, 2) == 3", None),
        ("def check(candidate):\n    assert candidate(1 / 0, 2) == 3\n", None),
        ("def check(candidate):\n    assert candidate(1, 2) == 4\n", False),
        ("assert add(1, 2) == [][0]", False),  # it was called before
        ("try:\n    r = add(1, 2)\nexcept:\n    r = None\nassert r == 4", False),
        ("import inspect\nassert len(inspect.signature(add).parameters) == 3", False),
        ("assert isinstance(3, add)", False),
        ("import os\nos.mkdir('/tmp/made')\nassert add(1, 2) == 4", False),  # fails otherwise when it is run again
        ("assert add is None or add(1, 2) == 4", False),
    ],
)
def test_a_test_that_fails_before_it_uses_the_program_is_itself_at_fault(test, passed, sandbox):
    verdict = run_tests(ADD, [test], sandbox)
    assert verdict.passed == (passed,)
    assert ("whatever the program is" in verdict.feedback) == (passed is None)


@needs_bubblewrap
def test_tests_that_assert_nothing_are_left_out_among_others():
    tests = [["# the sum", "assert add(1, 2) == 3"], ["pass", "assert add(1, 2) == 4", "assert add(1, 1) == 2"]]
    graded = code_reward([""] * 2, [f"```python\n{ADD}```"] * 2, tests=tests, partial_credit=True)
    assert [each.score for each in graded] == [1.0, 0.5]


@needs_bubblewrap
@pytest.mark.parametrize("source", ["open(0)", "open('/dev/stdin')", "__import__('sys').stdin"])
def test_every_way_to_standard_input_reads_all_of_it_and_nothing_else(source, sandbox):
    ended = sandbox.run(f"print(repr({source}.read()))", stdin="3 4\n5\n")
    assert ended.stdout == b"'3 4\\n5\\n'\n"

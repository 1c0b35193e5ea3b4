"""The same problems in the layouts that data sets publish: the same verdicts."""

import base64
import json
import pickle
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grpo_jax.rewards.code import test_formats
from grpo_jax.rewards.code.reward import code_reward

pytestmark = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
DATA = Path(__file__).parent / "data" / "code_problems.jsonl"
PROBLEMS = [json.loads(line) for line in DATA.read_text().splitlines()]


def asserts(problem):
    calls = [(test["fn_name"], ", ".join(map(repr, test["input"])), test["output"]) for test in problem["tests"]]
    return [f"assert {same_call(problem, name, given)} == {output!r}" for name, given, output in calls]


def same_call(problem, name, given):
    """JSON has one kind of sequence, so the values of these problems are compared as JSON."""
    called = f"Solution().{name}" if "class Solution" in problem["solutions"]["right"] else name
    return f"json.loads(json.dumps({called}({given})))"


def packed(tests):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def humaneval(problem):
    name = problem["tests"][0]["fn_name"]
    lines = [re.sub(rf"(?:Solution\(\)\.)?\b{name}\(", "candidate(", each, count=1) for each in asserts(problem)]
    body = "".join(f"    {line}\n" for line in lines)
    prompt = f'import json\n\n\ndef {name}(*args):\n    """Solve it."""\n'
    return {"prompt": prompt, "entry_point": name, "test": f"METADATA = {{}}\n\n\ndef check(candidate):\n{body}"}


def mbpp(problem):
    lines = asserts(problem) if "fn_name" in problem["tests"][0] else problem["tests"]
    return {"test_list": lines, "test_setup_code": "", "challenge_test_list": []}


def pytest_file(problem):
    lines = asserts(problem) if "fn_name" in problem["tests"][0] else problem["tests"]
    bodies = ["".join(f"    {line}\n" for line in each.split("\n")) for each in lines]
    return {"test": "\n".join(f"def test_{number}():\n{body}" for number, body in enumerate(bodies))}


def live_code_bench(problem):
    tests = problem["tests"]
    if "fn_name" not in tests[0]:
        cases = [test | {"testtype": "stdin"} for test in tests]
        return {"public_test_cases": json.dumps(cases[:1]), "private_test_cases": packed(cases[1:]), "metadata": "{}"}
    cases = [
        {
            "input": "\n".join(map(json.dumps, test["input"])),
            "output": json.dumps(test["output"]),
            "testtype": "functional",
        }
        for test in tests
    ]
    metadata = json.dumps({"func_name": tests[0]["fn_name"]})
    return {"public_test_cases": json.dumps(cases[:1]), "private_test_cases": packed(cases[1:]), "metadata": metadata}


def apps(problem):
    tests = problem["tests"]
    columns = {"inputs": [test["input"] for test in tests], "outputs": [test["output"] for test in tests]}
    name = {"fn_name": tests[0]["fn_name"]} if "fn_name" in tests[0] else {}
    return {"input_output": json.dumps(columns | name)}


def open_r1(problem):
    kind = "function_call" if "fn_name" in problem["tests"][0] else "stdin_stdout"
    return {
        "verification_info": {"language": "python", "test_cases": [each | {"type": kind} for each in problem["tests"]]}
    }


def code_contests(problem):
    half = len(problem["tests"]) // 2
    parts = {"public_tests": problem["tests"][:half], "private_tests": problem["tests"][half:], "generated_tests": []}
    return {
        name: {"input": [test["input"] for test in tests], "output": [test["output"] for test in tests]}
        for name, tests in parts.items()
    }


def verl(problem):
    return {"reward_model": {"style": "rule", "ground_truth": apps(problem)["input_output"]}}


def layouts(problem):
    if isinstance(problem["tests"][0], str):
        return [mbpp, pytest_file]
    if "fn_name" not in problem["tests"][0]:
        return [live_code_bench, apps, open_r1, code_contests, verl]
    # A number of JSON is no exact Python, and some answers are compared within a tolerance.
    exact = not re.search(r"\d\.\d|\de[-+]?\d", json.dumps(problem["tests"]))
    return [live_code_bench, apps, open_r1, verl, *([humaneval, mbpp, pytest_file] if exact else [])]


def check(problem, layout):
    tests = test_formats.tests_from_row(layout(problem))
    assert tests is not None
    completions = [f"```python\n{problem['solutions'][kind]}```" for kind in ("right", "wrong")]
    graded = code_reward(["", ""], completions, tests=[tests, tests], total_seconds=60.0)
    said = (problem["name"], layout.__name__, graded)
    assert graded[0].score == 1.0, said
    assert graded[1].score == float(problem["wrong_pass_share"] == 1), said


@pytest.mark.parametrize("number", range(0, len(PROBLEMS), 16))
def test_some_problems_in_one_layout_each(number):
    check(PROBLEMS[number], layouts(PROBLEMS[number])[number // 16 % 2])


@pytest.mark.slow
def test_every_second_problem_in_one_layout():
    with ThreadPoolExecutor(2) as threads:
        chosen = [(each, layouts(each)[number % len(layouts(each))]) for number, each in enumerate(PROBLEMS[::2])]
        for _ in threads.map(lambda each: check(*each), chosen):
            continue


HUMANEVAL = [
    (
        'import math\n\n\ndef poly(xs: list, x: float):\n    """Value of a polynomial."""\n'
        "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))\n\n\n"
        'def root(xs: list):\n    """A zero of it, for two coefficients."""\n',
        "root",
        "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    import math\n    import random\n"
        "    rng = random.Random(42)\n"
        "    import copy\n    for _ in range(20):\n        xs = [rng.randint(1, 9), rng.randint(1, 9)]\n"
        "        found = candidate(copy.deepcopy(xs))\n        assert math.fabs(poly(xs, found)) < 1e-4\n",
        "    return -xs[0] / xs[1]\n",
        "    return 0.0\n",
    ),
    (
        'def encode(s: str):\n    """Shift letters by 5."""\n'
        "    return ''.join(chr((ord(c) - 97 + 5) % 26 + 97) for c in s)\n\n\n"
        'def decode(s: str):\n    """Undo encode."""\n',
        "decode",
        "\n\ndef check(candidate):\n    from random import randint, choice\n    import string\n"
        "    letters = string.ascii_lowercase\n    for _ in range(20):\n"
        "        s = ''.join(choice(letters) for i in range(randint(1, 9)))\n"
        "        assert candidate(encode(s)) == s\n",
        "    return ''.join(chr((ord(c) - 97 - 5) % 26 + 97) for c in s)\n",
        "    return s\n",
    ),
    (
        "from typing import List\n\n\ndef close(numbers: List[float], t: float) -> bool:\n"
        '    """>>> close([1.0], 0.5)\n    False\n    """\n',
        "close",
        "\n\nMETADATA = {'author': 'x', 'dataset': 'test'}\n\n\ndef check(candidate):\n"
        "    assert candidate([1.0, 2.0, 3.9, 4.0], 0.3) == True\n    assert candidate([1.0, 2.0], 0.5) == False\n\n",
        "    return any(abs(a - b) < t for i, a in enumerate(numbers) for b in numbers[:i])\n",
        "    return True\n",
    ),
    (
        "\ndef sum_product(*numbers):\n    '''Sum and product.'''\n",
        "sum_product",
        "def check(candidate):\n\n    # Check some simple cases\n    assert candidate(1, 2) == (3, 2), 'Error: 1'\n"
        "    assert candidate() == (0, 1)\n    # Check some edge cases\n    assert True, 'This prints if it fails'\n",
        "    product = 1\n    for each in numbers:\n        product *= each\n    return sum(numbers), product\n",
        "    return sum(numbers), 0\n",
    ),
]


@pytest.mark.parametrize(("prompt", "name", "test", "right", "wrong"), HUMANEVAL, ids=[each[1] for each in HUMANEVAL])
def test_what_the_prompt_of_humaneval_gives_is_there(prompt, name, test, right, wrong):
    """The completion repeats the prompt, or its last function alone."""
    tests = test_formats.tests_from_row({"task_id": "x/0", "prompt": prompt, "entry_point": name, "test": test})
    alone = prompt[prompt.index(f"def {name}") :]
    programs = [prompt + right, alone + wrong, prompt + wrong]
    graded = code_reward([prompt] * 3, [f"```python\n{each}```" for each in programs], tests=[tests] * 3)
    assert [each.score for each in graded] == [1.0, 0.0, 0.0], graded


def test_a_program_cannot_replace_what_the_prompt_gives():
    prompt, name, test, _, wrong = HUMANEVAL[0]
    tests = test_formats.tests_from_row({"prompt": prompt, "entry_point": name, "test": test})
    program = "def poly(xs, x):\n    return 0.0\n\n\n" + prompt[prompt.index("def root") :] + wrong
    assert code_reward([prompt], [f"```python\n{program}```"], tests=[tests])[0].score == 0.0

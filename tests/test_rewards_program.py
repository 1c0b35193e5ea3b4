"""Which text of a completion is its program."""

import time

import pytest

from grpo_jax.rewards.code.program import extract_program

ADD = "def add(a, b):\n    return a + b\n"
CALL = "print(add(1, 2))\n"
SCRIPT = "n = int(input())\nprint(n + 1)\n"
DOCSTRING = 'def add(a, b):\n    """Adds.\n\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b\n'


def fenced(text, info="python", mark="```"):
    return f"{mark}{info}\n{text}{mark}\n"


INFOS = ["python", "Python", "python3", "python3.11", "py", "py3", "py3.12", "{python}", "{.python}", " python"]
INFOS += ["ipython", "python-3.12", "pypy3", "add.py", "src/add.py", "PYTHON3", ""]
INFOS += ["python title='a.py'", "python {linenos}", "python:solution.py"]


@pytest.mark.parametrize("info", INFOS)
@pytest.mark.parametrize("mark", ["```", "~~~", "````"])
def test_spellings_of_a_fence(info, mark):
    assert extract_program(f"So:\n{fenced(ADD, info, mark)}\nDone.", names=["add"]) == ADD


@pytest.mark.parametrize("info", ["bash", "json", "text", "output", "rust", "pycon", "python-repl", "c++", "cython"])
def test_blocks_of_other_languages_are_no_programs(info):
    assert extract_program(fenced("x = 1\n", info)) is None
    for completion in (fenced("1 + 1\n", info) + fenced(ADD), fenced(ADD) + fenced("1 + 1\n", info)):
        assert extract_program(completion) == ADD
        assert extract_program(completion, names=["add"]) == ADD


@pytest.mark.parametrize(
    "completion",
    [
        fenced(ADD) + "This prints\n" + fenced("3\n", ""),
        fenced(ADD, "") + "This prints\n" + fenced("3\n", ""),
        fenced(ADD) + "Use it so:\n" + fenced(CALL),
        fenced("def add(a, b):\n    return a - b\n") + "No, wait:\n" + fenced(ADD),
        fenced(ADD).replace("\n", "\r\n"),
        "1. Like this:\n\n   " + fenced(ADD).replace("\n", "\n   "),
        "- ```python\n" + "".join(f"  {line}\n" for line in ADD.splitlines()) + "  ```\n",
        "> ```python\n" + "".join(f"> {line}\n" for line in ADD.splitlines()) + "> ```\n",
        "\t```python\n" + "".join(f"\t{line}\n" for line in ADD.splitlines()) + "\t```\n",
        "So ```python\n" + ADD + "```",
        "```python\n" + ADD,
        "<think>\n" + fenced("def add(a, b): return 0\n") + "</think>\n" + fenced(ADD),
        "<answer>\n" + fenced(ADD) + "</answer>",
        "<answer>\n" + ADD + "</answer>",
        fenced("import add\n", "bash") + fenced(ADD) + fenced("$ python add.py\n3\n", "console"),
        fenced(ADD) + fenced(ADD.replace("add", "other")),
    ],
)
def test_the_block_that_defines_what_tests_use(completion):
    assert extract_program(completion, names=["add"]).strip() == ADD.strip()


def test_a_fence_in_a_docstring_does_not_end_a_program():
    for mark in ("```", "~~~"):
        text = DOCSTRING.replace("```", mark)
        assert extract_program(fenced(text, mark=mark) + "\nand\n" + fenced("3\n", "", mark)) == text
    unindented = DOCSTRING.replace("    ```", "```")
    assert extract_program(fenced(unindented), names=["add"]) == unindented


def test_blocks_that_belong_together_are_put_together():
    helper, imports = "def one():\n    return 1\n", "import math\n"
    main = "def two():\n    return one() + math.floor(1.5)\n"
    assert extract_program(fenced(imports) + fenced(helper) + "and\n" + fenced(main), names=["two"]) == (
        f"{imports}\n{helper}\n{main}"
    )
    assert extract_program(fenced(main) + "with\n" + fenced(helper), names=["two"]) == f"{helper}\n{main}"
    unrelated = "x = 1\n"
    assert extract_program(fenced(unrelated) + fenced(ADD), names=["add"]) == ADD


def test_a_program_that_reads_its_input_is_preferred_where_tests_give_it_some():
    completion = fenced(SCRIPT) + "For example\n" + fenced("print(3)\n")
    assert extract_program(completion, reads_input=True) == SCRIPT
    assert extract_program(completion) == "print(3)\n"
    assert extract_program(fenced(SCRIPT, "") + "gives\n" + fenced("4\n", ""), reads_input=True) == SCRIPT
    assert extract_program(fenced(ADD) + fenced(CALL), reads_input=True) == f"{ADD}\n{CALL}"


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("Write add.\n```python\n", ADD + "```\nIt adds.", ADD),
        ("Write add.\n```python\ndef add(a, b):\n", "    return a + b\n```", ADD),
        ("User: add\n\nAssistant: Sure.\n```py\n", ADD, ADD),
        ("Example:\n```python\nx = 1\n```\nNow you.\n", fenced(ADD), ADD),
        ("Answer as ```python ... ```.\n", fenced(ADD), ADD),
        ("A stray fence:\n```python\nx\n<|im_end|>\n<|im_start|>assistant\n", fenced(ADD), ADD),
        ("Think first.\n<think>\n", fenced(ADD), None),
        ("Think first.\n<think>\n", "hm</think>\n" + fenced(ADD), ADD),
        ("", "<think>maybe\n" + fenced(ADD), None),
    ],
)
def test_prompts_that_open_a_fence_or_a_thought(prompt, completion, expected):
    found = extract_program(completion, prompt=prompt, names=["add"])
    assert (found or "").strip() == (expected or "").strip()
    assert (found is None) == (expected is None)


@pytest.mark.parametrize(
    "text",
    [
        "```python\n(" * 3000,
        "```\n" * 20_000,
        "```python\n" + "(\n```\n" * 10_000,
        "`" * 100_000,
        "> " * 50_000,
        "- " * 50_000 + "```python\n",
        "```python\n" + "a = [" * 5000,
        "x ```python\n" * 10_000,
        ("~" * 3 + "\n") * 20_000,
    ],
)
def test_programs_are_found_in_linear_time(text):
    started = time.process_time()
    extract_program(text, names=["f"])
    assert time.process_time() - started < 5


@pytest.mark.parametrize("after", ["", "\n", "  \nDone.", "\n```\n3\n```"])
def test_a_fence_at_the_end_of_a_line_of_code_closes_the_block(after):
    program = "def add(a, b):\n    return a + b\n"
    assert extract_program(f"```python\n{program.rstrip()}```{after}", names=["add"]) == program


@pytest.mark.parametrize(
    ("prompt", "completion", "found"),
    [
        ("Write f.", "def f(x):\n    return x\n", True),
        ("def f(x):\n", "    return x\n", True),
        ("Write f.", "<think>easy</think>\ndef f(x): return x", True),
        ("Write f.", "\ufeffdef f(x): return x", True),
        ("Write f.", "<think>def f(x): return x", False),
        ("Write f.", "Here it is:\ndef f(x): return x", False),
        ("Write f.", "def g(x): return x", False),
        ("Write f.", "42", False),
    ],
)
def test_code_without_a_fence_is_a_program_where_it_defines_what_tests_use(prompt, completion, found):
    program = extract_program(completion, prompt=prompt, names={"f"})
    assert (program is not None) == found
    if program is not None:
        scope = {}
        exec(program, scope)
        assert scope["f"](3) == 3


def test_code_without_a_fence_that_reads_its_input():
    assert extract_program("print(input())", reads_input=True) == "print(input())"
    assert extract_program("print(3)", reads_input=True) is None

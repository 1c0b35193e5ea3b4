"""Which program a completion holds, by its fenced blocks."""

import pytest

from grpo_jax.rewards.program_text import extract_program

ADD = "def add(a, b):\n    return a + b\n"
FENCED = f"```python\n{ADD}```\n"


def indented(text, by):
    return "".join(f"{by}{line}\n" for line in text.splitlines())


@pytest.mark.parametrize(
    "info",
    [
        "python",
        "Python",
        "python3",
        "py",
        "py3",
        "python3.11",
        "python-3.12",
        "Python 3",
        " python",
        "{python}",
        "ipython",
        "{.python .numberLines}",
        'python title="add.py"',
        "python:add.py",
        "add.py",
        "",
        "pypy3",
    ],
)
@pytest.mark.parametrize("fence", ["```", "````", "~~~", "~~~~~"])
def test_every_spelling_of_a_fence(info, fence):
    text = f"Here:\n{fence}{info}\n{ADD}{fence}\nDone.\n"
    assert extract_program(text) == ADD
    assert extract_program(text.replace("\n", "\r\n")) == ADD


@pytest.mark.parametrize(
    "text",
    [
        f"{FENCED}Output:\n```\n7\n```",
        f"{FENCED}Output:\n```text\nadd = 7\n```",
        f"{FENCED}Output:\n```output\n7\n```",
        f"{FENCED}```\n7 8\nhello world\n```",
        f"{FENCED}```\nTrue\n```",
        f"{FENCED}```\n[1, 2]\n(3, 'a')\n```",
        f"{FENCED}Use it:\n```python\nprint(add(1, 2))\n```",
        f"{FENCED}Use it:\n```python\nresult = add(1, 2)\nprint(result)\n```",
        f"{FENCED}Check:\n```python\nassert add(1, 2) == 3\n```",
        f"{FENCED}Check:\n```python\nfrom solution import add\nassert add(1, 2) == 3\n```",
        f"{FENCED}```python\n>>> add(1, 2)\n3\n```",
        f"{FENCED}```pycon\n>>> add(1, 2)\n3\n```",
        f"{FENCED}The key line:\n```python\na + b\n```",
        f"{FENCED}The key line:\n```python\nreturn a + b\n```",
        f"{FENCED}And then:\n```python\nadd(1,",
        f"Install:\n```bash\npip install nothing\n```\n{FENCED}Run:\n```sh\npython add.py\n```",
        f'```json\n{{"a": 1}}\n```\n{FENCED}```text\n7\n```',
        f"```\n3 4\n```\n{FENCED}",
        f"```python\ndef add(a, b):\n    return 0\n```\nNo, that is wrong:\n{FENCED}",
        f"```python\n{ADD}",
        f"```\n{ADD}",
        f"<answer>\n{FENCED}</answer>",
        f"<answer>{ADD}</answer>",
        f"<think>```python\nx = 1\n```</think>{FENCED}",
        f"Use ```code``` in prose.\n{FENCED}",
        f"~~~python\n{ADD}~~~\n```\n3\n```",
        "1. Write:\n   ```python\n" + indented(ADD, "   ") + "   ```\n2. Run it.",
        "- ```python\n" + indented(ADD, "  ") + "  ```",
        "* Text\n\n\t```python\n" + indented(ADD, "\t") + "\t```",
        "> ```python\n" + indented(ADD, "> ") + "> ```",
        "```python\n" + indented(ADD, "    ") + "```",
    ],
)
def test_the_program_among_other_text(text):
    assert (extract_program(text) or "").strip() == ADD.strip()


@pytest.mark.parametrize("fence", ["```", "```python", "~~~", "````"])
def test_a_fence_within_a_docstring_does_not_end_the_block(fence):
    closing = fence.removesuffix("python")
    program = (
        f'def add(a, b):\n    """Add.\n\n    {fence}\n    >>> add(1, 2)\n    {closing}\n    """\n    return a + b\n'
    )
    assert extract_program(f"```python\n{program}```\nOutput:\n```\n3\n```") == program


@pytest.mark.parametrize(
    ("blocks", "program"),
    [
        (
            ["import math\n", "def f(x):\n    return math.sqrt(x)\n"],
            "import math\ndef f(x):\n    return math.sqrt(x)\n",
        ),
        (
            ["def g(x):\n    return x\n", "def f(x):\n    return g(x)\n"],
            "def g(x):\n    return x\ndef f(x):\n    return g(x)\n",
        ),
        (
            ["def encode(x):\n    return x\n", "def decode(x):\n    return x\n"],
            "def encode(x):\n    return x\ndef decode(x):\n    return x\n",
        ),
        (["def f(x):\n    return 0\n", "def f(x):\n    return x\n", "print(f(1))\n"], "def f(x):\n    return x\n"),
        (["print(undefined)\n", "def f(x):\n    return x\n"], "def f(x):\n    return x\n"),
    ],
)
def test_blocks_that_belong_together_are_joined(blocks, program):
    assert extract_program("\nthen\n".join(f"```python\n{block}```" for block in blocks)) == program


def test_the_call_of_a_program_that_reads_its_input():
    solve, call = "def solve():\n    print(input())\n", "solve()\n"
    text = f"```python\n{solve}```\nand\n```python\n{call}```"
    assert extract_program(text, calls=False) == solve + call
    assert extract_program(text, calls=True) == solve
    text = f"```python\n{solve}{call}```\nFor example:\n```python\n{call}```"
    assert extract_program(text, calls=False) == solve + call
    assert (
        extract_program("```python\nprint(int(input()) + 1)\n```\nInput:\n```\n3\n```", calls=False)
        == "print(int(input()) + 1)\n"
    )


@pytest.mark.parametrize(
    ("prompt", "text", "program"),
    [
        ("Write add.\n```python\n", f"{ADD}```\nok", ADD),
        ("Write add.\n```python", f"\n{ADD}```\nok", ADD),
        ("Write add.\n```python\ndef add(a, b):\n", "    return a + b\n```\nok", ADD),
        ("Write add.\n~~~\n", ADD, ADD),
        ("```python\nx = 1\n```\nuser: go\nassistant:", f"{ADD}```\n", None),
        ("```python\nx = 1\nuser: close it\nassistant:", ADD, None),
        ("Write add.\n```bash\n", f"{ADD}```\n", None),
    ],
)
def test_a_fence_that_the_prompt_has_opened(prompt, text, program):
    assert extract_program(text, prompt=prompt) == program


def test_an_unfinished_thought_has_no_program():
    assert extract_program(f"<think>maybe\n{FENCED}") is None
    assert extract_program(FENCED, prompt="Write add.<think>\n") is None
    assert extract_program(f"no\n</think>\n{FENCED}", prompt="Write add.<think>\n") == ADD


@pytest.mark.parametrize(
    "text", ["```rust\nlet x;\n```", "```\n7\n```", "```json\n{}\n```", "<answer> </answer>", "x = 1", ""]
)
def test_text_without_a_program(text):
    assert extract_program(text) is None


def test_a_transcript_counts_where_there_is_nothing_else():
    assert (
        extract_program("```python\n>>> def f():\n...     return 1\n...\n>>> f()\n1\n```")
        == "def f():\n    return 1\nf()\n"
    )


def test_a_program_that_is_not_python_is_still_the_program():
    assert extract_program("```python\ndef add(:\n```") == "def add(:\n"

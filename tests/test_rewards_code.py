"""Programs against their tests, in sandboxes. What tries to break out is in ``test_code_escapes``."""

import json
import os
import platform
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from grpo_jax.rewards.code import sandbox as sandbox_module
from grpo_jax.rewards.code.program import extract_program
from grpo_jax.rewards.code.reward import code_reward, run_tests
from grpo_jax.rewards.code.sandbox import Sandbox, SandboxLimits, SandboxUnavailable, finish
from grpo_jax.rewards.code.test_cases import check_tests, why_untestable
from grpo_jax.rewards.compose import weighted
from grpo_jax.rewards.workers.processes import children, memory_of

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
DATA = Path(__file__).parent / "data" / "code_problems.jsonl"
PROBLEMS = [json.loads(line) for line in DATA.read_text().splitlines()]
ADD = "def add(a, b):\n    return a + b\n"
# The starter of a sandbox has whole seconds of processor time; a machine with much else to do needs more of the clock.
LIMITS = SandboxLimits(seconds=2.0, wall_seconds=20.0)


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(LIMITS)


def check_verdict(problem, kind, sandbox):
    verdict = run_tests(problem["solutions"][kind], problem["tests"], sandbox)
    share = sum(map(bool, verdict.passed)) / verdict.tests
    expected = {"right": 1, "wrong": problem["wrong_pass_share"], "crash": 0, "slow": 0}[kind]
    assert share == pytest.approx(expected), (problem["name"], kind, verdict)
    assert verdict.runnable == (kind in ("right", "wrong")), (problem["name"], kind, verdict)
    assert (verdict.feedback == "") == (kind == "right"), (problem["name"], kind, verdict)


@needs_bubblewrap
@pytest.mark.parametrize("problem", PROBLEMS[::9], ids=lambda problem: problem["name"])
def test_verdicts_of_some_problems(problem, sandbox):
    for kind in ("right", "wrong", "crash"):
        check_verdict(problem, kind, sandbox)


@needs_bubblewrap
@pytest.mark.slow
def test_verdicts_of_every_problem():
    assert len(PROBLEMS) > 100
    quick, short = Sandbox(LIMITS), Sandbox(SandboxLimits(seconds=1.0, wall_seconds=2.5))
    kinds = [(problem, kind, quick) for kind in ("right", "wrong", "crash") for problem in PROBLEMS]
    kinds += [(problem, "slow", short) for problem in PROBLEMS[::4]]
    with ThreadPoolExecutor(2) as threads:
        for _ in threads.map(lambda each: check_verdict(*each), kinds):
            continue


@needs_bubblewrap
def test_the_reward_with_and_without_partial_credit():
    tests = [["assert add(3, 4) == 7", "assert add('a', 'b') == 'ab'"]] * 4
    programs = [ADD, "def add(a, b):\n    return 7\n", "def add(a, b):\n    return a - b\n", "def add(:"]
    completions = [f"<think>hm</think>So:\n```python\n{program}```" for program in programs]
    graded = code_reward([""] * 4, completions, tests=tests)
    assert [each.score for each in graded] == [1.0, 0.0, 0.0, 0.0]
    assert [each.details["runnable"] for each in graded] == [1.0, 1.0, 1.0, 0.0]
    assert graded[0].note == ""
    assert "assert add('a', 'b') == 'ab'" in graded[1].note
    assert "SyntaxError" in graded[3].note
    partial = code_reward([""] * 4, completions, tests=tests, partial_credit=True)
    assert [each.score for each in partial] == [1.0, 0.5, 0.0, 0.0]
    scores = weighted({"code": code_reward}, {"code": 1.0})([""], completions[1:2], tests=tests[:1])
    assert scores.total.tolist() == [0]
    assert scores.parts["code/runnable"].tolist() == [1]
    assert scores.notes[0].startswith("code: test 2: failed")


@needs_bubblewrap
def test_no_program_and_tests_that_cannot_be_run():
    completions = ["I would rather not.", f"```python\n{ADD}```", f"```python\n{ADD}```", f"```python\n{ADD}```"]
    tests = [["assert add(1, 2) == 3"], None, [], ["assert add(open('x'), 1)"]]
    graded = code_reward([""] * 4, completions, tests=tests)
    assert [each.score for each in graded] == [0.0, None, None, None]
    assert graded[0].note.startswith("no program")
    assert "at least one test" in graded[1].note
    handed = code_reward([""], completions[1:2], tests=[["class Mine: pass\nassert add(Mine(), 1)"]])
    assert handed[0].score is None  # the test's fault
    assert "an argument that cannot be sent: an object of type Mine" in handed[0].note


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n``` or\n```\ny = 2\n```", "x = 1\n"),
        ("<think>```python\nx\n```</think><answer>y = 2</answer>", "y = 2"),
        ("<answer>\n  y = 2\n</answer>", "  y = 2"),
        ("<answer>x</answer> ```python\ny\n```", "y\n"),
        ("```rust\nlet x;\n```", None),
        ("```python\nx", "x\n"),
        ("<answer> </answer>", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_program_of_a_completion(text, program):
    assert extract_program(text) == program


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "at least one test"),
        ("assert x", "at least one test"),
        (["assert ("], "test 1 is not Python"),
        ([{"input": "1"}], "test 1 must be Python text or a dict with input and output"),
        ([{"input": "1", "output": 1}], "input and output must be text"),
        ([{"fn_name": "f", "input": "1", "output": 1}], "input must be a list of arguments"),
        (["assert f(1)", {"input": "1", "output": "1"}], "all of a problem must do the same"),
    ],
)
def test_malformed_tests(tests, message):
    with pytest.raises(ValueError, match=message):
        check_tests(tests)
    assert message in why_untestable(tests)


@needs_bubblewrap
def test_a_program_does_not_see_what_is_expected_and_may_lie_only_by_plain_values(sandbox):
    class_of_lies = (
        "class A:\n  __eq__ = lambda s, o: True\n  __sub__ = lambda s, o: 0.0\n  __lt__ = lambda s, o: True\n"
    )
    verdict = run_tests(
        class_of_lies + "def f(x):\n  return A()\n",
        ["assert f(2) == 3", "assert f(2) - 4 < 1", "assert f(2) < 5", "assert f(2) in [1, 2]", "assert [f(2)] == [7]"],
        sandbox,
    )
    assert verdict.passed == (False,) * 5


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return 0\ndef abs(x): return 0", "assert abs(f(2) - 3.14) < 1e-6"),
        ("def f(x): return 0\ndef set(x): return 0", "assert set([f(2)]) == set([4, 5])"),
        ("class math:\n  isclose = lambda *a: True\ndef f(x): return 0", "assert math.isclose(f(2), 3.5)"),
        ("def f(x): return 0\ndef range(x): return []", "for i in range(3): assert f(i) == i + 1"),
        ("class A:\n  __contains__ = lambda s, x: True\ndef f(x): return A()", "assert 3 in f(2)"),
        (
            "class A:\n  __sub__ = lambda s, x: s\n  __abs__ = lambda s: s\n  __bool__ = abs\ndef f(x): return A()",
            "assert not abs(f(2) - 5)",
        ),
        (
            "class A:\n  __sub__ = lambda s, x: 0 if isinstance(x, A) else s\ndef f(x): return A()",
            "assert (f(2) - 5) - (f(3) - 7) == 0",
        ),
        ("def f(x): raise StopIteration", "for a, b in zip(map(f, [1, 2]), [3, 4]): assert a == b"),
        ("def f(x): return True", {"fn_name": "f", "input": [1], "output": 1}),
        ("def f(x): return False", {"fn_name": "f", "input": [1], "output": 0}),
        ("class A:\n  __getitem__ = lambda s, i: [9]\ndef f(x): return A()", "assert f(1)[:2] == [1, 2]"),
    ],
)
def test_a_program_does_not_judge_itself(program, test, sandbox):
    assert run_tests(program, [test], sandbox).passed == (False,)


@needs_bubblewrap
def test_a_test_that_asks_nothing_of_the_program_says_nothing(sandbox):
    verdict = run_tests("def f(x): return x", ["assert 1 + 2 == 3"], sandbox)
    assert verdict.passed == (None,)
    assert "does not use the program" in verdict.feedback
    assert run_tests("def f(x): return x", ["assert math.isclose(f(2.0), 2.0)"], sandbox).passed == (True,)


@needs_bubblewrap
def test_a_slow_program_is_wrong_and_not_absent():
    completion = "```python\nimport time\ndef f(x):\n  time.sleep(0.6)\n  return x\n```"
    tests = [[f"assert f({i}) == {i}" for i in range(9)]]
    (graded,) = code_reward([""], [completion], tests=tests, partial_credit=True, total_seconds=1.5)
    assert 0 < graded.score < 0.5


@needs_bubblewrap
def test_what_stands_in_the_way_of_one_test_does_not_stand_in_that_of_the_next(sandbox):
    program = "import os\ndef f(x):\n  if x == 2: os._exit(0)\n  return x\n"
    verdict = run_tests(program, ["assert f(1) == 1", "assert f(2) == 2", "assert f(3) == 3"], sandbox)
    assert verdict.passed == (True, False, True)
    assert not verdict.runnable
    assert run_tests(program, ["assert f(2) == 2", "assert f(3) == 3"], sandbox, stop_at_failure=True).passed == (
        False,
    )


@needs_bubblewrap
def test_grading_ends_at_an_invalid_test_and_at_a_program_that_does_not_load(sandbox):
    assert run_tests("def f(x): return x", ["assert f(1) == expected", "assert f(1) == 1"], sandbox).passed == (None,)
    assert run_tests("def f(", ["assert f(1) == 1"] * 3, sandbox).passed == (False,)
    wrong = run_tests("def f(x): return 0", ["assert f(1) == 1", "assert f(2) == 2"], sandbox)
    assert wrong.passed == (False, False)
    assert wrong.feedback.startswith("test 1: ")


# The sandbox alone --------------------------------------------------------------------------------------------------


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "status", "returncode"),
    [
        ("print(input())", "ended", 0),
        ("raise SystemExit(3)", "ended", 3),
        ("import os; os.kill(os.getpid(), 9)", "ended", 137),
        ("while True: pass", "time", None),
        ("while True: print('x' * 9999)", "output", None),
        ("x = b'1' * (1 << 30)", "ended", 1),
        (
            "import os, time\n[os.fork() for _ in range(3)]\nx = b'1' * (60 << 20)\ntime.sleep(9)",
            "memory",
            None,
        ),
    ],
)
def test_how_programs_end(program, status, returncode):
    limits = SandboxLimits(seconds=1.0, wall_seconds=8.0, memory_bytes=300 << 20, output_bytes=10_000)
    ended = Sandbox(limits).run(program, stdin="hi\n")
    assert (ended.status, ended.returncode) == (status, returncode), ended
    assert len(ended.stdout) <= 10_000
    if returncode == 0:
        assert ended.stdout == b"hi\n"


@needs_bubblewrap
def test_a_program_is_an_ordinary_main_with_a_traceback_and_a_fixed_hash(sandbox):
    ended = sandbox.run("def f():\n    return 1 / 0\nprint(__name__, sorted(globals())[:2])\nf()\n")
    assert ended.stdout.startswith(b"__main__ ['__builtins__', '__doc__']")
    assert b'File "program.py", line 2, in f' in ended.stderr
    seeds = {sandbox.run("print(hash('a'))").stdout for _ in range(2)}
    assert len(seeds) == 1


@needs_bubblewrap
def test_packages_can_be_shown():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        (Path(folder) / "mine.py").write_text("x = 42")
        assert Sandbox(LIMITS, packages=[folder]).run("import mine; print(mine.x)").stdout == b"42\n"
    assert Sandbox(LIMITS).run("import mine").returncode == 1
    with pytest.raises(SandboxUnavailable, match=f"no program can be run with .* and {folder}: .*{folder}"):
        Sandbox(LIMITS, packages=[folder])


@needs_bubblewrap
def test_nothing_is_left_of_a_program_that_is_left(sandbox):
    with sandbox.start("import time; time.sleep(100)") as program:
        pid = program.process.pid
        assert memory_of(pid) >= 0
    assert program.process.poll() is not None
    assert children(pid) == []


def test_without_bubblewrap_nothing_is_run(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox_module.find_python.cache_clear()
    with pytest.raises(SandboxUnavailable, match=r"bubblewrap .* is not on the PATH.*apt-get install bubblewrap"):
        Sandbox(SandboxLimits(seconds=9.0))
    sandbox_module.find_python.cache_clear()


@needs_bubblewrap
def test_on_a_processor_whose_system_calls_are_not_known_nothing_is_run(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxUnavailable, match="this machine is riscv64"):
        Sandbox(SandboxLimits(seconds=9.0))


FAMILIES = """
import socket
opened = []
for family in range(46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        for pair in (False, True):
            try:
                (socket.socketpair if pair else socket.socket)(family, kind)
                opened.append(family)
            except OSError:
                continue
print(sorted(set(opened)))
"""


@needs_bubblewrap
def test_no_socket_but_of_the_unix_family(sandbox):
    assert sandbox.run(FAMILIES).stdout == b"[1]\n"


BUFFERS = """
import fcntl, os, socket
a, b = socket.socketpair()
for option in (7, 8, 32, 33):
    try:
        a.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
        print("larger")
    except PermissionError:
        pass
a.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
try:
    fcntl.fcntl(os.pipe()[1], 1031, 1 << 20)
    print("larger")
except PermissionError:
    pass
fcntl.fcntl(a, fcntl.F_GETFL)
"""


@needs_bubblewrap
def test_buffers_that_the_kernel_keeps_cannot_be_enlarged(sandbox):
    ended = sandbox.run(BUFFERS)
    assert (ended.stdout, ended.returncode) == (b"", 0), ended.stderr


KERNEL_MEMORY = {
    "sockets": """
import os, socket, time
for _ in range(3):
    os.fork()
kept = []
while len(kept) < 28:
    kept.append(socket.socketpair())
    for end in kept[-1]:
        end.setblocking(False)
        try:
            while True:
                end.send(bytes(4096))
        except BlockingIOError:
            pass
time.sleep(30)
""",
    "files": """
import os
n = 0
while True:
    os.close(os.open(f"/tmp/{n}", os.O_CREAT))
    n += 1
""",
    "long names": """
import os
n = 0
while True:
    os.mkdir(f"/tmp/{n:0>200}")
    n += 1
""",
}


@needs_bubblewrap
@pytest.mark.parametrize("kind", KERNEL_MEMORY)
def test_what_the_kernel_keeps_for_a_program_counts_as_its_memory(kind):
    limits = SandboxLimits(seconds=20.0, wall_seconds=20.0, memory_bytes=150 << 20)
    before = available_bytes()
    lowest = []
    with Sandbox(limits).start(KERNEL_MEMORY[kind]) as program, ThreadPoolExecutor(1) as watcher:
        done = watcher.submit(finish, program, limits)
        while not done.done():
            lowest.append(available_bytes())
            time.sleep(0.05)
        assert done.result().status == "memory", done.result()
    assert before - min(lowest) < 1 << 30


def available_bytes():
    (line,) = [line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) << 10


@needs_bubblewrap
def test_an_interpreter_that_is_not_there_is_refused():
    with pytest.raises(SandboxUnavailable, match="no program can be run with /usr/no/python3"):
        Sandbox(LIMITS, python="/usr/no/python3")


@pytest.mark.parametrize("name", ["seconds", "wall_seconds"])
def test_limits_are_above_zero(name):
    with pytest.raises(ValueError, match=f"{name} is 0.0; it must be above 0"):
        SandboxLimits(**{name: 0.0})

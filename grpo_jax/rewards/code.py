"""Whether a program does what its tests ask: model-written Python, run in sandboxes."""

from __future__ import annotations

import ast
import json
import math
import os
import time
import typing
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib import resources
from typing import Any

from grpo_jax.rewards.code_names import OWN_MODULES, free_names, plan_tests, starred_names
from grpo_jax.rewards.code_names import why_untestable as why_untestable
from grpo_jax.rewards.code_tests import Test, read_tests, reads_stdin
from grpo_jax.rewards.code_tests import tests_from_row as tests_from_row
from grpo_jax.rewards.compose import Graded
from grpo_jax.rewards.program_text import extract_program
from grpo_jax.rewards.sandbox import Ended, Limits, Sandbox, finish

LONGEST_FEEDBACK = 2000
LIMITS = Limits()

ALLOWED_ON_TESTS = ["call", "eq", "hash"]
"""What a program may do with the functions that a test hands it; anything more would let it look around in the test."""


@dataclass(frozen=True)
class Verdict:
    """What the tests say of a program.

    Attributes:
        passed: whether it passed each test that was run, in order; None where a test is itself at fault.
        tests: how many there are.
        runnable: whether it loaded, and ran in every test that was run without an error of its own or a limit reached.
        feedback: what the first test it failed has to say: the interpreter's message, or what came and what should.
    """

    passed: tuple[bool | None, ...]
    tests: int
    runnable: bool
    feedback: str


def code_reward(
    prompts: list[str],
    completions: list[str],
    *,
    tests: Sequence[Any],
    entry_point: Sequence[str | None] | None = None,
    partial_credit: bool = False,
    float_tolerance: float = 0.0,
    limits: Limits = LIMITS,
    total_seconds: float = 20.0,
    **_columns: list[Any],
) -> list[Graded]:
    """1.0 where a completion's program passes every test, else 0.0, or the share of tests it passes.

    The program is what ``extract_program`` finds; without one the score is 0.0. It never sees what a test expects:
    what it writes is compared outside its sandbox, and asserts run in a sandbox of their own and call it from there,
    receiving plain values. So it can neither read the answer from memory nor return something equal to everything nor
    end the test with a success, nor redefine what Python brings. Objects of its own classes are compared, and their
    methods answer, by its own code, if the test asks for that. What a test cannot do is look into the program: at types
    of its results, at its own ``__contains__``, or at a list that it changes after the call it was handed over in.

    A program whose functions are called is imported as the module ``solution``, so code under
    ``if __name__ == "__main__"`` does not run; it may use names of ``typing`` without importing them.

    Each entry is a ``Graded``: ``details["runnable"]`` is 1.0 for a program that ran without an error, right or wrong,
    and ``note`` is what the interpreter or the first failed test said.

    Args:
        prompts: continued by the completions; they may be empty. Names that a prompt mentions may be the program's.
        completions: the texts.
        tests: for each its tests, in a layout of ``read_tests``. The score is None where they are missing, malformed
            or can tell nothing of any program (``why_untestable``), which is never the completion's merit.
        entry_point: for each the function that ``check(candidate)`` is called with, if the column is there.
        partial_credit: whether the score is the share of tests passed. If not, the first failure ends the work.
        float_tolerance: by how much a number in the output may differ from an expected one with a decimal point or an
            exponent, relative and absolute. With 0, 0.5 still equals 0.500000.
        limits: of each test; one that takes too long ends the work, and the tests after it count as failed.
        total_seconds: of wall time for all tests of a program; less than the deadline of a pool around this, so that a
            slow program is wrong and not absent.

    Raises:
        SandboxUnavailable: where there is no sandbox, nothing is run.
        ValueError: ``float_tolerance`` is negative or not finite.
    """
    if not 0 <= float_tolerance < math.inf:
        raise ValueError(f"float_tolerance is {float_tolerance}; it must be finite and at least 0")
    sandbox = _sandbox(limits)
    graded = []
    for number, (completion, each) in enumerate(zip(completions, tests, strict=True)):
        prompt = prompts[number] if prompts else ""
        point = entry_point[number] if entry_point else None
        if why := why_untestable(each, prompt=prompt, entry_point=point):
            graded.append(Graded(None, note=why))
            continue
        listed = read_tests(each)
        program = extract_program(completion, prompt=prompt, calls=not reads_stdin(listed[0]))
        if program is None:
            graded.append(
                Graded(0.0, {"runnable": 0.0}, "no program: neither a fenced block of Python nor an <answer>")
            )
            continue
        verdict = run_tests(
            program,
            listed,
            sandbox,
            prompt=prompt,
            entry_point=point,
            stop_at_failure=not partial_credit,
            float_tolerance=float_tolerance,
            total_seconds=total_seconds,
        )
        graded.append(_score(verdict, partial_credit))
    return graded


def check_tests(tests: Any) -> list[Test]:
    """The tests as a list, if they can be run.

    Raises:
        ValueError: as ``read_tests``; says what is wrong and where.
    """
    return read_tests(tests)


def readable_tests(tests: Any) -> bool:
    """Whether ``check_tests`` takes them."""
    try:
        check_tests(tests)
    except ValueError:
        return False
    return True


def run_tests(
    program: str,
    tests: Any,
    sandbox: Sandbox,
    *,
    prompt: str = "",
    entry_point: str | None = None,
    stop_at_failure: bool = False,
    float_tolerance: float = 0.0,
    total_seconds: float = math.inf,
) -> Verdict:
    """Run a program against tests.

    Args:
        program: Python source.
        tests: in a layout of ``read_tests``.
        sandbox: where to; its limits are those of one test, but that a right output always fits.
        prompt: as for ``why_untestable``.
        entry_point: as for ``why_untestable``.
        stop_at_failure: whether the first failed test is the last that is run.
        float_tolerance: as for ``code_reward``.
        total_seconds: of wall time for all of them; those that are not run by then count as failed.

    Returns:
        The verdict; ``(None,)`` with the reason where the tests can tell nothing.

    Raises:
        ValueError: as ``read_tests``.
    """
    listed = read_tests(tests)
    if why := why_untestable(listed, prompt=prompt, entry_point=entry_point):
        return Verdict((None,), len(listed), True, why)
    until = time.monotonic() + total_seconds
    if reads_stdin(listed[0]):
        passed, runnable, feedback = _run_with_input(program, listed, sandbox, stop_at_failure, until, float_tolerance)
    else:
        asked = _asked(program, listed, prompt, entry_point)
        before = _before(program, listed)
        passed, runnable, feedback = _run_with_calls(program, before, asked, sandbox, stop_at_failure, until)
    return Verdict(tuple(passed), len(listed), runnable, feedback[-LONGEST_FEEDBACK:])


def _score(verdict: Verdict, partial_credit: bool) -> Graded:
    runnable = {"runnable": float(verdict.runnable)}
    if None in verdict.passed:
        return Graded(None, runnable, verdict.feedback)
    share = sum(map(bool, verdict.passed)) / verdict.tests
    return Graded(share if partial_credit else float(share == 1), runnable, verdict.feedback)


def _asked(program: str, tests: Sequence[Any], prompt: str, entry_point: str | None) -> list[dict[str, Any]]:
    """The tests as the judge takes them: Python with where its names come from."""
    code = [test for test in tests if isinstance(test, str) or "test" in test]
    plans = iter(plan_tests(code, prompt=prompt, entry_point=entry_point))
    asked = []
    for test in tests:
        if isinstance(test, dict) and "fn_name" in test:
            asked.append(test)
            continue
        plan = next(plans)
        calls = [node.func for node in ast.walk(plan.pop("tree")) if isinstance(node, ast.Call)]
        plan["called"] = [func.id for func in calls if isinstance(func, ast.Name)]
        plan["free"], plan["own_modules"] = sorted(plan["free"]), list(OWN_MODULES)
        plan["reserved"] = sorted({*plan.pop("imported"), *starred_names()} - {*plan["subjects"]})
        plan["entry_point"] = plan["entry_point"] or _last_function(program)
        asked.append(plan)
    return asked


def _last_function(program: str) -> str | None:
    """The last function that a program defines, but ``main``, tests and private ones; or the one method of Solution."""
    try:
        body = ast.parse(program).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    solution = [
        each for node in body if isinstance(node, ast.ClassDef) and node.name == "Solution" for each in node.body
    ]
    for nodes in (body, solution):
        names = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        names = [name for name in names if name not in ("main", "check") and not name.startswith(("_", "test"))]
        if names:
            return names[-1]
    return None


def _before(program: str, tests: Sequence[Any]) -> str:
    """What is run before the program: code that the prompt gave, and names of ``typing`` that it does not import."""
    given = {test["preamble"] for test in tests if isinstance(test, dict) and test.get("preamble")}
    try:
        annotations = sorted(free_names(program) & {*typing.__all__})
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        annotations = []
    lines = [f"from typing import {', '.join(annotations)}"] if annotations else []
    return "\n".join([*lines, *sorted(given)])


def _run_with_input(
    program: str,
    tests: Sequence[Any],
    sandbox: Sandbox,
    stop_at_failure: bool,
    until: float,
    float_tolerance: float,
) -> tuple[list[bool | None], bool, str]:
    passed: list[bool | None] = []
    runnable, feedback = True, ""
    for number, test in enumerate(tests, 1):
        room = 2 * len(test["output"].encode("utf-8", "replace")) + (64 << 10)
        limits = replace(sandbox.limits, output_bytes=max(room, sandbox.limits.output_bytes))
        ended = sandbox.run(program, stdin=test["input"], until=until, output_bytes=room)
        ran = ended.status == "ended" and ended.returncode == 0
        output = ended.stdout.decode("utf-8", "replace")
        passed.append(ran and same_output(output, test["output"], float_tolerance))
        runnable = runnable and ran
        if not passed[-1]:
            said = f"wrote {output!r:.500}, not {test['output']!r:.500}" if ran else _why(ended, limits)
            feedback = feedback or f"test {number}: {said}"
            if stop_at_failure or ended.status != "ended":
                break
    return passed, runnable, feedback


def _run_with_calls(
    program: str, before: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> tuple[list[bool | None], bool, str]:
    passed: list[bool | None] = []
    runnable, feedback = True, ""
    while len(passed) < len(tests):
        # A program that ended in the middle of a test is started again for the next one.
        left = tests[len(passed) :]
        verdicts, ended, said = _session(program, before, left, sandbox, stop_at_failure, until)
        for verdict in verdicts:
            passed.append(verdict["passed"])
            runnable = runnable and verdict["ran"]
            if not verdict["passed"] and not feedback:
                feedback = f"test {len(passed)}: {verdict['error']}" + (f"\n{said}" if not verdict["ran"] else "")
        if len(passed) < len(tests) and (ended.status != "ended" or not verdicts):
            passed.append(False)
            runnable = False
            feedback = feedback or f"test {len(passed)}: {_why(ended, sandbox.limits)}"
            break
        if None in passed or not verdicts[-1]["loaded"] or (stop_at_failure and False in passed):
            break
    return passed, runnable, feedback


def _session(
    program: str, before: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> tuple[list[dict[str, Any]], Ended, str]:
    """Load the program in one sandbox and have a judge in another call it, until one of them ends."""
    to_program, to_judge = os.pipe(), os.pipe()
    with ExitStack() as started:
        try:
            served, asked = (to_program[0], to_judge[1]), (to_judge[0], to_program[1])
            serving = f"serve_program(*json.loads(sys.stdin.readline()), Link(*{served}, OPERATIONS))\n"
            judging = (
                f"import sys\njudge(json.load(sys.stdin), Link(*{asked}, {ALLOWED_ON_TESTS}), {stop_at_failure})\n"
            )
            candidate = started.enter_context(
                sandbox.start(
                    _inside("link") + _inside("program") + serving,
                    stdin=json.dumps([program, before]) + "\n",
                    pass_fds=served,
                    seconds=sandbox.limits.seconds * len(tests),
                )
            )
            judge = started.enter_context(
                sandbox.start(
                    _inside("link") + _inside("runner") + _inside("judge") + judging,
                    stdin=json.dumps(list(tests)),
                    pass_fds=asked,
                )
            )
        finally:
            for end in (*to_program, *to_judge):
                os.close(end)
        ended = finish(judge, sandbox.limits, beside=[candidate], beat=True, until=until)
        said = bytes([*candidate.output.values()][1]).decode("utf-8", "replace")
    return [json.loads(line) for line in ended.stdout.split(b"\n")[:-1]], ended, said


def same_output(output: str, expected: str, float_tolerance: float = 0.0) -> bool:
    """Whether the output of a program is the expected one.

    Blanks at the ends of lines and empty lines at the end of all do not count. Numbers that are expected with a decimal
    point or an exponent are compared as numbers, all else as text.

    Args:
        output: what the program wrote.
        expected: what it should write.
        float_tolerance: as for ``code_reward``.
    """
    mine, other = _lines(output), _lines(expected)
    return len(mine) == len(other) and all(map(lambda a, b: _same_line(a, b, float_tolerance), mine, other))


def _same_line(line: str, expected: str, tolerance: float) -> bool:
    if line == expected:
        return True
    words, wanted = line.split(), expected.split()
    if not any("." in word or "e" in word.lower() for word in wanted) or len(words) != len(wanted):
        return False
    return all(a == b or _same_number(a, b, tolerance) for a, b in zip(words, wanted, strict=True))


def _same_number(word: str, wanted: str, tolerance: float) -> bool:
    if len(word) > 400 or "_" in word or not ("." in wanted or "e" in wanted.lower()):
        return False
    try:
        mine, other = Decimal(word), Decimal(wanted)
    except InvalidOperation:
        return False
    if not (mine.is_finite() and other.is_finite()):
        return False
    return mine == other or bool(tolerance and math.isclose(mine, other, rel_tol=tolerance, abs_tol=tolerance))


def _lines(text: str) -> list[str]:
    """What counts of an output: its lines without blanks at their ends, and without empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _why(ended: Ended, limits: Limits) -> str:
    limit = {
        "time": f"took more than {limits.seconds:g} seconds of the processor, or {limits.wall_seconds:g} in all",
        "memory": f"took more than {limits.memory_bytes >> 20} MiB of memory",
        "output": f"wrote more than {limits.output_bytes >> 10} KiB",
    }
    said = ended.stderr.decode("utf-8", "replace").strip()
    return limit.get(ended.status, f"exit status {ended.returncode}") + (f"\n{said}" if said else "")


@cache
def _inside(name: str) -> str:
    return (resources.files("grpo_jax.rewards") / "inside" / f"{name}.py").read_text()


@cache
def _sandbox(limits: Limits) -> Sandbox:
    return Sandbox(limits)

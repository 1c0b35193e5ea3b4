"""Grading of model-written Python programs by their tests, in sandboxes."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any, NamedTuple

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.code.program import extract_program, free_names, parsed
from grpo_jax.rewards.code.sandbox import Outcome, Sandbox, SandboxLimits, finish
from grpo_jax.rewards.code.test_cases import (
    PRELUDE,
    Test,
    can_fail,
    check_tests,
    prepared,
    reads_input,
    used_names,
    why_untestable,
)
from grpo_jax.rewards.compose import RewardOutput

MAX_FEEDBACK = 2000
"""Characters of a verdict's feedback."""
DECIMAL = re.compile(r"[-+]?\d*\.\d*(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
LIMITS = SandboxLimits()

ALLOWED_ON_TESTS = ["call", "eq", "hash"]
"""Operations that a program may request on functions that a test passes to it; others would let it inspect the test."""


@dataclass(frozen=True)
class Verdict:
    """Results of a program's tests.

    Attributes:
        passed: for each test that was run, in order, whether the program passed it; None if the test itself is invalid.
        tests: the number of tests, including those that were not run.
        runnable: whether the program loaded and no test that was run ended in an error of the program or at a limit.
        feedback: the message of the first test that did not pass: the interpreter's, or the actual and expected output.
    """

    passed: tuple[bool | None, ...]
    tests: int
    runnable: bool
    feedback: str


@per_sample(columns=("tests",))
def code_reward(
    prompts: list[str],
    completions: list[str],
    *,
    tests: Sequence[Sequence[Test] | None],
    partial_credit: bool = False,
    tolerance: float | None = None,
    limits: SandboxLimits = LIMITS,
    total_seconds: float = 20.0,
    **_columns: list[Any],
) -> list[RewardOutput]:
    """1.0 where a completion's program passes every test, else 0.0; with ``partial_credit`` the share of tests passed.

    The program is extracted by ``program.extract_program``; a completion without one scores 0.0. The program never sees
    the expected results: its output is compared outside of its sandbox, and assertions run in a second sandbox that
    calls the program and receives plain values. So a program cannot read the answer from memory, return an object that
    is equal to everything, end a test early as passed, or redefine Python's builtins for the test. A name that a test
    does not bind comes from Python, from the usual imports (``test_cases.PRELUDE``), or else from the program. Methods
    and comparisons of the program's own classes run the program's code where the test uses them. A test cannot inspect
    the types of the program's results, use a ``__contains__`` of the program, or see changes that the program makes to
    a list after the call that passed it. A program sees the name and the docstring of a function that a test passes to
    it, and not its signature.

    Each entry is a ``RewardOutput``: ``details["runnable"]`` is 1.0 for a program that ran without an error, right or
    wrong, and ``note`` is the message of the interpreter or of the first test that did not pass.

    Args:
        prompts: used only to continue a fenced block or a thought that the prompt has opened.
        completions: ``[B]`` texts.
        tests: ``[B]`` lists of tests (``test_cases.Test``). The score is None if they are missing, malformed or invalid
            whatever the program is: none asserts anything, one imports a module that sandboxes lack, uses an undefined
            name, or fails before it uses the program. Tests that assert nothing are ignored beside others that do.
        partial_credit: whether the score is the share of tests passed. If not, the first failure ends the grading.
        tolerance: the absolute or relative difference within which a number equals an expected output with a decimal
            point. None compares outputs as text.
        limits: of each test; a test that exceeds them ends the grading, and the tests after it count as failed.
        total_seconds: wall time for all tests of a program. Keep it below the deadline of a surrounding ``RewardPool``,
            so that a slow program scores 0.0 instead of having no score.

    Raises:
        ValueError: ``tolerance`` is negative or not finite.
        SandboxUnavailable: bubblewrap cannot be used here; nothing is run.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be a finite number of at least 0")
    settings = {"sandbox": _sandbox(limits), "tolerance": tolerance, "total_seconds": total_seconds}
    rows = zip(prompts, completions, tests, strict=True)
    return [_graded(*row, partial_credit=partial_credit, **settings) for row in rows]


def run_tests(
    program: str,
    tests: Sequence[Test],
    sandbox: Sandbox,
    *,
    stop_at_failure: bool = False,
    tolerance: float | None = None,
    total_seconds: float = math.inf,
) -> Verdict:
    """Run a program against tests.

    Args:
        program: Python source.
        tests: assertions and calls, or inputs with outputs (``test_cases.Test``).
        sandbox: its limits apply to each test.
        stop_at_failure: whether to stop after the first test that fails.
        tolerance: numeric tolerance for outputs, as in ``code_reward``.
        total_seconds: wall time for all tests; those that are not run by then count as failed.

    Raises:
        ValueError: ``tests`` is malformed (``check_tests``).
    """
    tests = check_tests(tests)
    until = time.monotonic() + total_seconds
    if reads_input(tests[0]):
        results = _run_with_input(program, tests, sandbox, tolerance, until)
    else:
        results = _run_with_calls(program, tests, sandbox, stop_at_failure, until)
    passed: list[bool | None] = []
    runnable, feedback = True, ""
    for result in results:
        passed.append(result.passed)
        runnable = runnable and result.ran
        if not result.passed and not feedback:
            feedback = f"test {len(passed)}: {result.error}"
        if result.passed is None or (stop_at_failure and not result.passed):
            break
    return Verdict(tuple(passed), len(tests), runnable, feedback[-MAX_FEEDBACK:])


def _graded(prompt: str, completion: str, tests: Any, *, partial_credit: bool, **settings: Any) -> RewardOutput:
    """The output of ``code_reward`` for one completion; ``settings`` are those of ``run_tests``."""
    reason = why_untestable(tests)
    if reason is not None:
        return RewardOutput(None, note=reason)
    tests = [test for test in tests if not isinstance(test, str) or can_fail(test)]
    texts = [test for test in tests if isinstance(test, str)]
    named = {test["fn_name"] for test in tests if not isinstance(test, str) and test.get("fn_name")}
    names = used_names(texts) if texts else named | ({"Solution"} if named else set())
    program = extract_program(completion, prompt=prompt, names=names, reads_input=reads_input(tests[0]))
    if program is None:
        return RewardOutput(
            0.0, {"runnable": 0.0}, "no program: the completion has neither a fenced block of Python nor an <answer>"
        )
    verdict = run_tests(with_typing(program), tests, stop_at_failure=not partial_credit, **settings)
    runnable = {"runnable": float(verdict.runnable)}
    if None in verdict.passed:
        return RewardOutput(None, runnable, verdict.feedback)
    share = sum(map(bool, verdict.passed)) / verdict.tests
    return RewardOutput(share if partial_credit else float(share == 1), runnable, verdict.feedback)


def with_typing(program: str) -> str:
    """The program with an import of the names of ``typing`` that it uses without importing, as LeetCode's code does."""
    tree = parsed(program)
    names = sorted(free_names(tree) & set(PRELUDE["typing"].split())) if tree else []
    if not names or "from __future__" in program:
        return program
    return f"from typing import {', '.join(names)}\n{program}"


class _Result(NamedTuple):
    """A test's result as in ``Verdict.passed``, whether the program ran without an error, and the test's feedback."""

    passed: bool | None
    ran: bool
    error: str


def _run_with_input(
    program: str, tests: Sequence[Any], sandbox: Sandbox, tolerance: float | None, until: float
) -> Iterator[_Result]:
    for test in tests:
        output_bytes = 2 * len(test["output"].encode()) + sandbox.limits.output_bytes
        result = sandbox.run(program, stdin=test["input"], until=until, output_bytes=output_bytes)
        ran = result.status == "ended" and result.returncode == 0
        output = result.stdout.decode("utf-8", "replace")
        error = f"wrote {output!r:.500}, not {test['output']!r:.500}" if ran else _error(result, sandbox.limits)
        yield _Result(ran and same_output(output, test["output"], tolerance), ran, error)
        if result.status != "ended":
            return


def same_output(output: str, expected: str, tolerance: float | None) -> bool:
    """Whether two outputs are equal up to whitespace at line ends, empty lines at the end, and a tolerance for numbers.

    Args:
        output: the program's output.
        expected: the output to compare with.
        tolerance: the absolute or relative difference that a number may have from an expected one that is written with
            a decimal point; None compares text only.
    """
    lines, expected_lines = _lines(output), _lines(expected)
    if tolerance is None or lines == expected_lines:
        return lines == expected_lines
    return len(lines) == len(expected_lines) and all(
        len(words) == len(expected_words) and all(map(partial(_near, tolerance=tolerance), words, expected_words))
        for words, expected_words in zip(map(str.split, lines), map(str.split, expected_lines), strict=True)
    )


def _near(token: str, expected: str, *, tolerance: float) -> bool:
    if token == expected:
        return True
    if DECIMAL.fullmatch(expected) is None or NUMBER.fullmatch(token) is None:
        return False
    return math.isclose(float(token), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def _run_with_calls(
    program: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> Iterator[_Result]:
    remaining = prepared(tests)
    while remaining:
        # A program that ended in the middle of a test is started again for the next one.
        verdicts, result, stderr = _session(program, remaining, sandbox, stop_at_failure, until)
        for verdict in verdicts:
            error = verdict["error"] if verdict["ran"] else f"{verdict['error']}\n{stderr}"
            yield _Result(verdict["passed"], verdict["ran"], error)
        remaining = remaining[len(verdicts) :]
        if remaining and (result.status != "ended" or not verdicts):
            yield _Result(False, False, _error(result, sandbox.limits))
            return
        if not verdicts[-1]["loaded"]:
            return


def _session(
    program: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> tuple[list[dict[str, Any]], Outcome, str]:
    """Run tests in one sandbox that call the program in another, until either of them ends.

    Returns:
        The verdicts (``inside/test_runner.py``), how the sandbox of the tests ended, and the program's stderr.
    """
    to_program, to_tests = os.pipe(), os.pipe()
    with ExitStack() as started:
        try:
            program_fds, test_fds = (to_program[0], to_tests[1]), (to_tests[0], to_program[1])
            serve = f"serve_program(sys.stdin.read(), Connection(*{program_fds}, OPERATIONS))\n"
            connection = f"Connection(*{test_fds}, {ALLOWED_ON_TESTS})"
            run = f"run_tests(json.load(sys.stdin), {connection}, {stop_at_failure})\n"
            served = started.enter_context(
                sandbox.start(
                    _inside("rpc") + _inside("program") + serve,
                    stdin=program,
                    pass_fds=program_fds,
                    seconds=sandbox.limits.seconds * len(tests),
                )
            )
            runner = started.enter_context(
                sandbox.start(
                    _inside("rpc") + _inside("test_runner") + run, stdin=json.dumps(list(tests)), pass_fds=test_fds
                )
            )
        finally:
            for descriptor in (*to_program, *to_tests):
                os.close(descriptor)
        result = finish(runner, sandbox.limits, beside=[served], extend_by_line=True, until=until)
        stderr = bytes([*served.output.values()][1]).decode("utf-8", "replace")
    return [json.loads(line) for line in result.stdout.split(b"\n")[:-1]], result, stderr


def _lines(text: str) -> list[str]:
    """The lines of an output, without whitespace at their ends and without empty lines at the end of the output."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _error(result: Outcome, limits: SandboxLimits) -> str:
    """Why a program failed: the limit that it exceeded or its exit status, and its stderr."""
    exceeded = {
        "time": f"took more than {limits.seconds:g} seconds of processor time, or {limits.wall_seconds:g} of wall time",
        "memory": f"took more than {limits.memory_bytes >> 20} MiB of memory",
        "output": f"wrote more than {limits.output_bytes >> 10} KiB",
    }
    stderr = result.stderr.decode("utf-8", "replace").strip()
    return exceeded.get(result.status, f"exit status {result.returncode}") + (f"\n{stderr}" if stderr else "")


@cache
def _inside(name: str) -> str:
    return (resources.files("grpo_jax.rewards.code") / "inside" / f"{name}.py").read_text()


_sandbox = cache(Sandbox)

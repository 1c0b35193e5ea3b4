"""Whether a program does what its tests ask: model-written Python, run in sandboxes."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.code.program import extract_program, free_names, parsed
from grpo_jax.rewards.code.sandbox import Ended, Sandbox, SandboxLimits, finish
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

LONGEST_FEEDBACK = 2000
DECIMAL = re.compile(r"[-+]?\d*\.\d*(?:e[-+]?\d+)?|[-+]?\d+e[-+]?\d+", re.IGNORECASE)
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?", re.IGNORECASE)
LIMITS = SandboxLimits()

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
    """1.0 where a completion's program passes every test, else 0.0, or the share of tests it passes.

    The program is what ``program.extract_program`` finds; without one the score is 0.0. It never sees what a test
    expects: what it writes is compared outside its sandbox, and asserts run in a sandbox of their own and call it from
    there, receiving plain values. So it can neither read the answer from memory, nor return something equal to
    everything, nor end the test with a success, nor redefine what Python brings. Names that a test does not bind come
    from Python, from the usual imports or, where those have none, from the program. Objects of its own classes are
    compared, and their methods answer, by its own code, if the test asks for that. What a test cannot do is look into
    the program: at types of its results, at its own ``__contains__``, or at a list that it changes after the call in
    which it was handed over.

    Each entry is a ``RewardOutput``: ``details["runnable"]`` is 1.0 for a program that ran without an error, right or wrong,
    and ``note`` is what the interpreter or the first failed test said.

    Args:
        prompts: looked at only where a completion goes on within a fence or a thought that its prompt opened.
        completions: the texts.
        tests: for each its tests; see ``code_tests.Test``. The score is None where they are missing, malformed or at
            fault themselves: where none asserts anything, or one imports what sandboxes lack, uses a name that it
            does not define, or fails before it uses the program. That is never the completion's merit. Of several,
            those that assert nothing are left out.
        partial_credit: whether the score is the share of tests passed. If not, the first failure ends the work.
        tolerance: how far a number with a decimal point in the output of a program may be from the expected one,
            absolutely or relatively. None compares outputs as text.
        limits: of each test; one that takes too long ends the work, and the tests after it count as failed.
        total_seconds: of wall time for all tests of a program; less than the deadline of a pool around this, so that a
            slow program is wrong and not absent.

    Raises:
        ValueError: a tolerance below 0.
        SandboxUnavailable: where there is no sandbox, nothing is run.
    """
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; it must be a number of at least 0")
    sandbox = _sandbox(limits)
    grade = partial(
        _graded, sandbox=sandbox, partial_credit=partial_credit, tolerance=tolerance, total_seconds=total_seconds
    )
    return [grade(*row) for row in zip(prompts, completions, tests, strict=True)]


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
        tests: as ``check_tests`` gives them.
        sandbox: where to; its limits are those of one test.
        stop_at_failure: whether the first failed test is the last that is run.
        tolerance: as of ``code_reward``.
        total_seconds: of wall time for all of them; those that are not run by then count as failed.

    Raises:
        ValueError: as ``check_tests``.
    """
    tests = check_tests(tests)
    run = partial(_run_with_input, tolerance=tolerance) if reads_input(tests[0]) else _run_with_calls
    until = time.monotonic() + total_seconds
    passed, runnable, feedback = run(program, tests, sandbox, stop_at_failure, until)
    return Verdict(tuple(passed), len(tests), runnable, feedback[-LONGEST_FEEDBACK:])


def _graded(
    prompt: str,
    completion: str,
    tests: Any,
    *,
    sandbox: Sandbox,
    partial_credit: bool,
    tolerance: float | None,
    total_seconds: float,
) -> RewardOutput:
    why = why_untestable(tests)
    if why is not None:
        return RewardOutput(None, note=why)
    tests = [test for test in tests if not isinstance(test, str) or can_fail(test)]  # the others tell nothing
    texts = [test for test in tests if isinstance(test, str)]
    named = {test["fn_name"] for test in tests if not isinstance(test, str) and test.get("fn_name")}
    names = used_names(texts) if texts else named | ({"Solution"} if named else set())
    program = extract_program(completion, prompt=prompt, names=names, reads_input=reads_input(tests[0]))
    if program is None:
        return RewardOutput(0.0, {"runnable": 0.0}, "no program: neither a fenced block of Python nor an <answer>")
    verdict = run_tests(
        with_typing(program),
        tests,
        sandbox,
        stop_at_failure=not partial_credit,
        tolerance=tolerance,
        total_seconds=total_seconds,
    )
    runnable = {"runnable": float(verdict.runnable)}
    if None in verdict.passed:
        return RewardOutput(None, runnable, verdict.feedback)
    share = sum(map(bool, verdict.passed)) / verdict.tests
    return RewardOutput(share if partial_credit else float(share == 1), runnable, verdict.feedback)


def with_typing(program: str) -> str:
    """A program that uses names of ``typing`` without importing them, as starter code does, with that import."""
    tree = parsed(program)
    names = sorted(free_names(tree) & set(PRELUDE["typing"])) if tree else []
    if not names or "from __future__" in program:
        return program
    return f"from typing import {', '.join(names)}\n{program}"


def _run_with_input(
    program: str,
    tests: Sequence[Any],
    sandbox: Sandbox,
    stop_at_failure: bool,
    until: float,
    tolerance: float | None = None,
) -> tuple[list[bool | None], bool, str]:
    passed: list[bool | None] = []
    runnable, feedback = True, ""
    for number, test in enumerate(tests, 1):
        room = 2 * len(test["output"].encode()) + sandbox.limits.output_bytes
        ended = sandbox.run(program, stdin=test["input"], until=until, output_bytes=room)
        ran = ended.status == "ended" and ended.returncode == 0
        output = ended.stdout.decode("utf-8", "replace")
        passed.append(ran and same_output(output, test["output"], tolerance))
        runnable = runnable and ran
        if not passed[-1]:
            said = f"wrote {output!r:.500}, not {test['output']!r:.500}" if ran else _why(ended, sandbox.limits)
            feedback = feedback or f"test {number}: {said}"
            if stop_at_failure or ended.status != "ended":
                break
    return passed, runnable, feedback


def same_output(output: str, expected: str, tolerance: float | None) -> bool:
    """Whether lines are the same but for blanks at their ends, and numbers within the tolerance, if there is one."""
    lines, wanted = _lines(output), _lines(expected)
    if tolerance is None or lines == wanted:
        return lines == wanted
    return len(lines) == len(wanted) and all(
        len(mine) == len(theirs) and all(map(partial(_near, tolerance=tolerance), mine, theirs))
        for mine, theirs in zip(map(str.split, lines), map(str.split, wanted), strict=True)
    )


def _near(token: str, expected: str, *, tolerance: float) -> bool:
    if token == expected:
        return True
    if DECIMAL.fullmatch(expected) is None or NUMBER.fullmatch(token) is None:
        return False
    return math.isclose(float(token), float(expected), rel_tol=tolerance, abs_tol=tolerance)


def _run_with_calls(
    program: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> tuple[list[bool | None], bool, str]:
    passed: list[bool | None] = []
    runnable, feedback = True, ""
    tests = prepared(tests)
    while len(passed) < len(tests):
        # A program that ended in the middle of a test is started again for the next one.
        verdicts, ended, said = _session(program, tests[len(passed) :], sandbox, stop_at_failure, until)
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
    program: str, tests: Sequence[Any], sandbox: Sandbox, stop_at_failure: bool, until: float
) -> tuple[list[dict[str, Any]], Ended, str]:
    """Load the program in one sandbox and have a judge in another call it, until one of them ends."""
    to_program, to_judge = os.pipe(), os.pipe()
    with ExitStack() as started:
        try:
            served, asked = (to_program[0], to_judge[1]), (to_judge[0], to_program[1])
            serving = f"import sys\nserve_program(sys.stdin.read(), Link(*{served}, OPERATIONS))\n"
            judging = (
                f"import sys\njudge(json.load(sys.stdin), Link(*{asked}, {ALLOWED_ON_TESTS}), {stop_at_failure})\n"
            )
            candidate = started.enter_context(
                sandbox.start(
                    _inside("link") + _inside("program") + serving,
                    stdin=program,
                    pass_fds=served,
                    seconds=sandbox.limits.seconds * len(tests),
                )
            )
            judge = started.enter_context(
                sandbox.start(
                    _inside("link") + _inside("judge") + judging, stdin=json.dumps(list(tests)), pass_fds=asked
                )
            )
        finally:
            for end in (*to_program, *to_judge):
                os.close(end)
        ended = finish(judge, sandbox.limits, beside=[candidate], beat=True, until=until)
        said = bytes([*candidate.output.values()][1]).decode("utf-8", "replace")
    return [json.loads(line) for line in ended.stdout.split(b"\n")[:-1]], ended, said


def _lines(text: str) -> list[str]:
    """What counts of an output: its lines without blanks at their ends, and without empty ones at the end of all."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _why(ended: Ended, limits: SandboxLimits) -> str:
    limit = {
        "time": f"took more than {limits.seconds:g} seconds of the processor, or {limits.wall_seconds:g} in all",
        "memory": f"took more than {limits.memory_bytes >> 20} MiB of memory",
        "output": f"wrote more than {limits.output_bytes >> 10} KiB",
    }
    said = ended.stderr.decode("utf-8", "replace").strip()
    return limit.get(ended.status, f"exit status {ended.returncode}") + (f"\n{said}" if said else "")


@cache
def _inside(name: str) -> str:
    return (resources.files("grpo_jax.rewards.code") / "inside" / f"{name}.py").read_text()


@cache
def _sandbox(limits: SandboxLimits) -> Sandbox:
    return Sandbox(limits)

"""Tests of programs, in the layouts that data sets publish them in, as one list."""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

MOST_BYTES = 256 << 20
"""Of one compressed column after decompression."""

Test = str | dict[str, Any]
"""One test, of one of four kinds:

- ``{"input": "3\\n4\\n", "output": "7\\n"}``: the program's standard input and its expected standard output;
- ``{"fn_name": "add", "input": [3, 4], "output": 7}``: a function or a method of ``Solution``, its arguments and its
  expected result; with ``"wrapped": True`` a result of 7 also meets an output of ``[7]``, as in APPS;
- ``"assert add(3, 4) == 7"``: Python that uses names of the program and raises where it fails. Functions called
  ``test_*`` and ``Test*`` classes run as in pytest, ``unittest.TestCase`` as in unittest, ``check(candidate)`` as in
  HumanEval, on the program's last function;
- ``{"test": "def check(candidate): ...", "entry_point": "add"}``: the same for a given function. Code that the prompt
  gives to both sides, imports and helper functions, is ``"preamble"``.
"""

STDIN_TYPES = ("stdin", "stdin_stdout", "standard_input", "stdio")
FUNCTION_TYPES = ("functional", "function_call", "call_based", "function")
LAYOUTS = "a list of tests, or a mapping with test_cases, inputs and outputs, input and output, or test and entry_point"


def tests_from_row(row: Mapping[str, Any]) -> list[Test] | None:
    """The tests of a data set's row, recognised by its columns; None where it has none of them.

    =============================================== ==========================================
    columns                                         as published by
    =============================================== ==========================================
    ``tests``                                       this package, DeepCoder
    ``verification_info``, ``test_cases``           open-r1, verl
    ``reward_model`` with ``ground_truth``          verl, PRIME (only where it holds tests)
    ``test_list``, with its setup code or imports   MBPP (``challenge_test_list`` is not used)
    ``test`` and ``entry_point``                    HumanEval; ``test`` alone: KodCode
    ``public_test_cases``, ``private_test_cases``   LiveCodeBench
    ``input_output``                                APPS, TACO
    ``public_tests``, ``private_tests`` ...         CodeContests
    =============================================== ==========================================

    Pickled columns (LiveCodeBench's private tests) are read by an unpickler that loads no class, so no code of theirs
    runs.

    Raises:
        ValueError: the columns are there and cannot be read; says which and why.
    """
    readers = {
        "tests": lambda: read_tests(row["tests"], fn_name=_starter_name(row)),
        "verification_info": lambda: read_tests(_decoded(row["verification_info"])),
        "reward_model": lambda: _of_ground_truth(row["reward_model"]),
        "test_list": lambda: _of_mbpp(row),
        "test": lambda: _of_humaneval(row),
        "private_test_cases": lambda: _of_live_code_bench(row),
        "public_test_cases": lambda: _of_live_code_bench(row),
        "input_output": lambda: read_tests(row["input_output"], fn_name=_starter_name(row)),
        "private_tests": lambda: _of_code_contests(row),
        "public_tests": lambda: _of_code_contests(row),
        "test_cases": lambda: read_tests(row["test_cases"], fn_name=_starter_name(row)),
    }
    for column, read in readers.items():
        if row.get(column) is None or (isinstance(row[column], str) and not row[column].strip()):
            continue
        try:
            tests = read()
        except ValueError as error:
            raise ValueError(f"column {column!r}: {error}") from error
        if tests is not None:
            return tests
    return None


def read_tests(tests: Any, *, fn_name: str | None = None) -> list[Test]:
    """Tests of any accepted layout as a list of ``Test``.

    Args:
        tests: a list of tests; or a mapping of ``inputs`` and ``outputs`` (with ``fn_name`` for functions), of
            ``test_cases``, of ``assert_case``, or of ``test`` and ``entry_point``; or either as JSON text. A functional
            test takes its function's name from ``fn_name``, or from ``func_name`` in its ``metadata``; arguments given
            as text are JSON values, one a line.
        fn_name: of functional tests that do not name their function.

    Raises:
        ValueError: they cannot be read, there are none, or some call the program and others feed its standard input;
            says which test and why.
    """
    given = _decoded(tests) if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{") else tests
    if isinstance(given, Mapping):
        given = _from_mapping(given)
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"tests must be a list with at least one test, not {tests!r:.200}")
    read = [_read_test(number, test, fn_name) for number, test in enumerate(given, 1)]
    if len({reads_stdin(test) for test in read}) > 1:
        raise ValueError("some tests call the program and others give it input; they must be of one way")
    return read


def reads_stdin(test: Test) -> bool:
    """Whether a test is of the first kind, standard input and output."""
    return not isinstance(test, str) and "fn_name" not in test and "test" not in test


def _read_test(number: int, test: Any, fn_name: str | None) -> Test:
    if isinstance(test, str):
        _check_python(number, test)
        return test
    if not isinstance(test, Mapping):
        raise ValueError(f"test {number} must be Python text or have input and output; it is {test!r:.200}")
    test = dict(test)
    if "test" in test:
        for name in ("preamble", "test"):
            _check_python(number, test.get(name) or "")
        kept = {name: test[name] for name in ("test", "entry_point", "preamble") if test.get(name)}
        return kept if "entry_point" in kept else test["test"]
    if "output" not in test and "expected_output" in test:
        test["output"] = test["expected_output"]
    if "input" not in test or "output" not in test:
        raise ValueError(f"test {number} must be Python text or have input and output; it is {test!r:.200}")
    kind = str(test.get("testtype") or test.get("type") or "").lower()
    metadata = test.get("metadata")
    metadata = _decoded(metadata) if isinstance(metadata, str) and metadata.strip() else metadata
    named = metadata if isinstance(metadata, Mapping) else {}
    name = test.get("fn_name") or test.get("func_name") or named.get("func_name") or named.get("fn_name")
    if kind in FUNCTION_TYPES and not (name := name or fn_name):
        raise ValueError(
            f"test {number} is {kind} and does not name its function: it needs fn_name (or metadata.func_name)"
        )
    if name and kind not in STDIN_TYPES:
        return _function_test(number, test, name)
    said = {each: _as_lines(test[each]) for each in ("input", "output")}
    if not isinstance(said["input"], str) or not isinstance(said["output"], str):
        raise ValueError(f"test {number} has no fn_name, so input and output must be text: {test!r:.200}")
    return said


def _function_test(number: int, test: dict[str, Any], name: Any) -> Test:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"test {number}: fn_name must be the name of a function, not {name!r:.80}")
    given, output = test["input"], test["output"]
    if isinstance(given, str) and (test.get("testtype") or test.get("type")):
        try:
            given = [json.loads(line) for line in given.split("\n") if line.strip()]
            output = json.loads(output) if isinstance(output, str) else output
        except ValueError as error:
            raise ValueError(
                f"test {number}: input and output of {name} must be JSON, one argument a line: {error}"
            ) from error
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"test {number} calls a function and its input must be a list: {test!r:.200}")
    kept: dict[str, Any] = {"fn_name": name, "input": list(given), "output": output}
    if test.get("wrapped"):
        kept["wrapped"] = True
    return kept


def _from_mapping(tests: Mapping[str, Any]) -> Any:
    """The list in a mapping of tests."""
    for name in ("test_cases", "assert_case", "tests"):
        if tests.get(name) is not None:
            found = _decoded(tests[name]) if isinstance(tests[name], str) else tests[name]
            return _from_mapping(found) if isinstance(found, Mapping) else found
    if "test" in tests:
        return [tests]
    columns = ("inputs", "outputs") if "inputs" in tests else ("input", "output")
    inputs, outputs = (tests.get(each) for each in columns)
    name = tests.get("fn_name") or tests.get("func_name")
    if columns[0] == "input" and "input" in tests and (name or isinstance(inputs, str)):
        return [tests]
    if not isinstance(inputs, Sequence) or not isinstance(outputs, Sequence) or isinstance(outputs, str):
        raise ValueError(f"tests must be {LAYOUTS}; they have {sorted(map(str, tests))[:10]}")
    if len(inputs) != len(outputs):
        raise ValueError(
            f"there are {len(inputs)} {columns[0]} and {len(outputs)} {columns[1]}; each test has one of both"
        )
    rows = [{"input": given, "output": output} for given, output in zip(inputs, outputs, strict=True)]
    if not name:
        return rows
    for row in rows:
        row |= {"fn_name": name, "wrapped": True}
        if isinstance(row["input"], str):
            row["type"] = "functional"
        elif not isinstance(row["input"], Sequence):
            row["input"] = [row["input"]]
    return rows


def _of_mbpp(row: Mapping[str, Any]) -> list[Test]:
    imports = row.get("test_imports") or []
    before = [row.get("test_setup_code") or "", *([imports] if isinstance(imports, str) else imports)]
    preamble = "".join(f"{each.rstrip()}\n" for each in before if each.strip())
    listed = _decoded(row["test_list"]) if isinstance(row["test_list"], str) else row["test_list"]
    return read_tests([preamble + each for each in listed])


def _of_humaneval(row: Mapping[str, Any]) -> list[Test]:
    if not isinstance(row["test"], str):
        return read_tests(row["test"])
    entry_point, preamble = row.get("entry_point"), ""
    if entry_point and isinstance(row.get("prompt"), str):
        try:
            kept = [each for each in ast.parse(row["prompt"]).body if getattr(each, "name", "") != entry_point]
            preamble = "\n".join(map(ast.unparse, kept))
        except SyntaxError:
            preamble = ""  # a prompt in prose
    if entry_point:
        return read_tests([{"test": row["test"], "entry_point": entry_point, "preamble": preamble}])
    return read_tests(row["test"] if row["test"].lstrip()[:1] in "[{" else [row["test"]])


def _of_live_code_bench(row: Mapping[str, Any]) -> list[Test]:
    metadata = row.get("metadata")
    metadata = _decoded(metadata) if isinstance(metadata, str) and metadata.strip() else metadata
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    tests: list[Any] = []
    for column in ("public_test_cases", "private_test_cases"):
        found = row.get(column)
        tests += (_decoded(found) if isinstance(found, str) and found.strip() else found) or []
    return read_tests(tests, fn_name=name or _starter_name(row))


def _of_code_contests(row: Mapping[str, Any]) -> list[Test]:
    tests: list[Test] = []
    for column in ("public_tests", "private_tests", "generated_tests"):
        found = row.get(column)
        found = _decoded(found) if isinstance(found, str) else found
        if found and (not isinstance(found, Mapping) or found.get("input")):
            tests += read_tests(found)
    return read_tests(tests)


def _of_ground_truth(reward_model: Any) -> list[Test] | None:
    """Verl keeps tests where other tasks have an answer, so what is not a layout of tests is not an error."""
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if isinstance(truth, str):
        if truth.lstrip()[:1] not in ("[", "{"):
            return None
        try:
            truth = json.loads(truth)
        except ValueError:
            return None
    if isinstance(truth, Mapping) and not {"inputs", "test_cases", "assert_case", "test"} & {*truth}:
        return None
    if isinstance(truth, Sequence) and not all(isinstance(each, Mapping) and "input" in each for each in truth):
        return None
    return read_tests(truth) if truth else None


def _starter_name(row: Mapping[str, Any]) -> str | None:
    """The function that a row's starter code asks for; None where it asks for none, or for several."""
    starter = row.get("starter_code")
    names = re.findall(r"^[ \t]*(?:async )?def[ \t]+(\w+)", starter, re.MULTILINE) if isinstance(starter, str) else []
    names = [name for name in names if not name.startswith("_")]
    return names[0] if len(names) == 1 else None


def _as_lines(value: Any) -> Any:
    """Text; a list of lines, as APPS has some, joined."""
    is_lines = (
        isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(each, str) for each in value)
    )
    return "\n".join(value) if is_lines else value


def _check_python(number: int, text: Any) -> None:
    if not isinstance(text, str):
        raise ValueError(f"test {number} must be Python text, not {text!r:.200}")
    try:
        compile(text, "test.py", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"test {number} is not Python: {error}: {text!r:.200}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickled text and containers; without a class to load, nothing can be called."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"it would load {module_name}.{global_name}; only plain values are read")


def _decoded(value: Any) -> Any:
    """JSON text, or JSON within base64, zlib and pickle."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        said = error
    except RecursionError as error:
        raise ValueError("the JSON is nested too deeply") from error
    try:
        packed = base64.b64decode(value, validate=True)
        inflate = zlib.decompressobj()
        plain = inflate.decompress(packed, MOST_BYTES)
    except (ValueError, zlib.error):
        raise ValueError(f"it is neither JSON ({said}) nor base64 of compressed data: {value!r:.80}") from said
    if inflate.unconsumed_tail:
        raise ValueError(f"it holds more than {MOST_BYTES >> 20} MiB")
    try:
        text = _PlainUnpickler(io.BytesIO(plain)).load() if plain[:1] == b"\x80" else plain.decode()
        return json.loads(text) if isinstance(text, (str, bytes)) else text
    except Exception as error:  # a pickle may fail in any way
        raise ValueError(f"its compressed data cannot be read: {error}") from error

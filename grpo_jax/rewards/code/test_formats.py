"""Tests of programs in the formats of published data sets."""

from __future__ import annotations

import ast
import base64
import io
import json
import pickle
import zlib
from collections.abc import Mapping
from typing import Any

from grpo_jax.rewards.code.program import bound_names
from grpo_jax.rewards.code.test_cases import Test, _is_test, _run_at_top_level, _tree

MAX_UNPACKED_BYTES = 1 << 28
"""Size of the test cases of one row after decompression."""


def tests_from_row(row: Mapping[str, Any]) -> list[Test] | None:
    """The tests of a row of a published data set, as ``Test``; None for a row without tests.

    Supported columns: ``tests`` in the forms of ``Test``; HumanEval (``test``, ``entry_point``); MBPP (``test_list``,
    ``test_setup_code`` or ``test_imports``, and ``challenge_test_list``); APPS, TACO and PRIME (``input_output``, also
    within ``verification_info`` or ``reward_model``); LiveCodeBench (``public_test_cases``, ``private_test_cases``,
    ``metadata``); CodeContests (``public_tests``, ``private_tests``, ``generated_tests``); ``test_cases`` and
    ``verification_info`` of OpenR1; and ``ground_truth`` of verl's rows, as JSON of any of these.

    Args:
        row: columns by name; JSON text is parsed.

    Raises:
        ValueError: the row has tests that cannot be read, such as pickled objects.
    """
    for layout in (_plain, _human_eval, _mbpp, _live_code_bench, _code_contests, _input_output, _nested):
        tests = layout(row)
        if tests is not None:
            return tests
    return None


def _plain(row: Mapping[str, Any]) -> list[Test] | None:
    for name in ("tests", "test_cases"):
        value = _parsed(row.get(name))
        if isinstance(value, Mapping):
            return _input_output({"input_output": value})
        if isinstance(value, str) and value.strip():
            return [value]
        if isinstance(value, list) and value:
            return [_test(each, row.get("fn_name")) for each in value]
    return None


def _human_eval(row: Mapping[str, Any]) -> list[Test] | None:
    test, entry = row.get("test"), row.get("entry_point")
    if not isinstance(test, str) or not test.strip():
        return None
    tree = _tree(test)
    has_check = tree is not None and "check" in bound_names(tree) - _run_at_top_level(tree)
    if has_check and isinstance(entry, str):
        return [f"{_helpers(row.get('prompt'), entry)}{test}\n\ncheck({entry})\n"]
    return [test]


def _helpers(prompt: Any, entry: str) -> str:
    """The imports and helper functions of a prompt; tests use these, so that a program cannot replace them."""
    tree = _tree(prompt) if isinstance(prompt, str) else None
    kept = [node for node in tree.body if getattr(node, "name", None) != entry] if tree else []
    return "".join(f"{ast.unparse(node)}\n" for node in kept)


def _mbpp(row: Mapping[str, Any]) -> list[Test] | None:
    listed = _parsed(row.get("test_list"))
    if not isinstance(listed, list) or not listed:
        return None
    setup = row.get("test_setup_code") or ""
    imports = _parsed(row.get("test_imports")) or []
    before = "\n".join([*(imports if isinstance(imports, list) else [imports]), setup]).strip()
    more = _parsed(row.get("challenge_test_list")) or []
    return [f"{before}\n{test}" if before else test for test in [*listed, *more]]


def _live_code_bench(row: Mapping[str, Any]) -> list[Test] | None:
    if "public_test_cases" not in row and "private_test_cases" not in row:
        return None
    metadata = _parsed(row.get("metadata")) or {}
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    cases = []
    for column in ("public_test_cases", "private_test_cases"):
        value = _parsed(row.get(column))
        cases += _unpacked(value, column) if isinstance(value, str) and value.strip() else value or []
    return [_functional(case, name) if case.get("testtype") == "functional" else _test(case) for case in cases] or None


def _code_contests(row: Mapping[str, Any]) -> list[Test] | None:
    parts = [_parsed(row.get(name)) for name in ("public_tests", "private_tests", "generated_tests")]
    tests: list[Test] = []
    for part in parts:
        if isinstance(part, Mapping) and "input" in part:
            tests += [
                {"input": given, "output": wanted} for given, wanted in zip(part["input"], part["output"], strict=True)
            ]
    return tests or None


def _input_output(row: Mapping[str, Any]) -> list[Test] | None:
    value = _parsed(row.get("input_output"))
    if not isinstance(value, Mapping) or not ("inputs" in value or "assert_case" in value):
        return None
    if value.get("assert_case"):
        return list(value["assert_case"])
    name = value.get("fn_name") or row.get("fn_name")
    pairs = zip(value["inputs"], value["outputs"], strict=True)
    if not name:
        return [{"input": _text(given), "output": _text(wanted)} for given, wanted in pairs] or None
    # APPS wraps each result of a function in a list of length 1.
    is_wrapped = all(isinstance(wanted, list) and len(wanted) == 1 for wanted in value["outputs"])
    return [
        {"fn_name": name, "input": given, "output": wanted[0] if is_wrapped else wanted} for given, wanted in pairs
    ] or None


def _nested(row: Mapping[str, Any]) -> list[Test] | None:
    for name in ("verification_info", "reward_model", "ground_truth", "extra_info"):
        value = _parsed(row.get(name))
        if isinstance(value, Mapping):
            if "inputs" in value:
                value = {"input_output": value}
            tests = tests_from_row(value)
            if tests is not None:
                return tests
        elif name == "ground_truth" and isinstance(value, list) and value and all(_is_test(each) for each in value):
            return [_test(each) for each in value]
    return None


def _test(case: Any, name: Any = None) -> Test:
    if isinstance(case, str) or not isinstance(case, Mapping):
        return case
    name = case.get("fn_name") or name
    if name and isinstance(case.get("input"), list):
        return {"fn_name": name, "input": case["input"], "output": case.get("output")}
    if case.get("type") == "stdin_stdout" or case.get("testtype") == "stdin" or not name:
        kept = {"input": _text(case.get("input", "")), "output": _text(case.get("output", ""))}
        return kept | ({"testtype": "functional"} if case.get("testtype") == "functional" else {})
    return dict(case)


def _functional(case: Mapping[str, Any], name: str | None) -> Test:
    """A functional test case of LiveCodeBench: each line of its input is an argument as JSON."""
    if not name:
        return dict(case)
    given = [json.loads(line) for line in str(case["input"]).split("\n") if line.strip()]
    return {"fn_name": name, "input": given, "output": json.loads(case["output"])}


class _PlainUnpickler(pickle.Unpickler):
    """Reads pickles of text, numbers, lists and dicts, which cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"the pickle refers to {module}.{name}")


def _unpacked(text: str, column: str) -> list[Any]:
    """Test cases as LiveCodeBench packs them: JSON text, pickled, compressed, in base 64."""
    try:
        packed = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
        return json.loads(_PlainUnpickler(io.BytesIO(packed)).load())
    except (ValueError, TypeError, EOFError, zlib.error, pickle.UnpicklingError) as error:
        raise ValueError(f"{column} is neither JSON nor packed JSON ({error}): {text!r:.80}") from error


def _parsed(value: Any) -> Any:
    """JSON text parsed; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)

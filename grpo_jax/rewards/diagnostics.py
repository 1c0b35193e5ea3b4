"""What completions look like beside their rewards: the shares that give a gamed reward away."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.code.reward import extract_program
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.math.answer import canonical_answer, extract_answer, gold_answer
from grpo_jax.rewards.repetition import repeated_share

TOKEN = re.compile(r"[^\W_]+(?:[.,/]\d+)*")
NUMBER_BEFORE_SIGN = re.compile(r"(?<=\d)[+\-*/=](?=\d)")


def text_metrics(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    group_size: int,
    answers: Sequence[str | None] = (),
    tests: Sequence[Any] = (),
) -> dict[str, float]:
    """Shares of a step's completions, by what they say and not by what they were paid.

    Args:
        prompts, completions: ``[B]`` texts, those of a group adjacent.
        group_size: samples for each prompt.
        answers: gold answers, where there are any.
        tests: tests of programs as ``code_reward`` takes them, where there are any.

    Returns:
        ``completions/duplicate_share``: of those that equal another one of their group;
        ``completions/repeated_share``: the mean of ``repeated_share``;
        ``completions/empty_thought_share``: of those with the asked-for format and nothing to read between the tags of
        the thought (fewer than two words);
        with ``answers``, ``completions/answer_in_prompt_excess``: how much more often a completion's answer stands in
        its prompt than the gold answer does, and ``completions/constant_answer_excess``: by how much the share of the
        most frequent answer exceeds that of the most frequent gold;
        with ``tests``, ``completions/hard_coded_share``: of programs that spell out what their tests expect.
    """
    groups = [completions[i : i + group_size] for i in range(0, len(completions), group_size)]
    metrics = {
        "completions/duplicate_share": float(np.mean([duplicate_share(group) for group in groups])),
        "completions/repeated_share": float(np.mean([repeated_share(each) for each in completions])),
        "completions/empty_thought_share": float(np.mean(has_empty_thought(prompts, completions))),
    }
    pairs = [
        (prompt, extract_answer(completion, prompt), gold_answer(gold))
        for prompt, completion, gold in zip(prompts, completions, answers, strict=False)
        if gold
    ]
    answered = [(prompt, given, gold) for prompt, given, gold in pairs if given]
    if answered:
        in_prompt = [stands_in(given, prompt) - stands_in(gold, prompt) for prompt, given, gold in answered]
        metrics["completions/answer_in_prompt_excess"] = float(np.mean(in_prompt))
        given = Counter(str(canonical_answer(each)) for _, each, _ in answered).most_common(1)[0][1]
        gold = Counter(str(canonical_answer(each)) for _, _, each in pairs).most_common(1)[0][1]
        metrics["completions/constant_answer_excess"] = given / len(answered) - gold / len(pairs)
    programs = [(extract_program(text), each) for text, each in zip(completions, tests, strict=False) if each]
    written = [hard_coded(program, each) for program, each in programs if program is not None]
    if written:
        metrics["completions/hard_coded_share"] = float(np.mean(written))
    return metrics


def duplicate_share(group: Sequence[str]) -> float:
    """The share of texts that equal another one."""
    counts = Counter(group)
    return sum(count for count in counts.values() if count > 1) / len(group)


def has_empty_thought(prompts: Sequence[str], completions: Sequence[str]) -> list[bool]:
    """Whether each completion has the format of ``format_reward`` and fewer than two words of thought."""
    formatted = format_reward(list(prompts), list(completions))
    thoughts = [completion.partition("</think>")[0].removeprefix("<think>") for completion in completions]
    return [
        bool(good) and len(re.findall(r"\w+", thought)) < 2 for good, thought in zip(formatted, thoughts, strict=True)
    ]


def stands_in(answer: str, prompt: str) -> bool:
    """Whether an answer is one of the words or numbers of a prompt, or several of them in a row."""
    asked = [token.lower() for token in TOKEN.findall(NUMBER_BEFORE_SIGN.sub(" ", prompt))]
    wanted = [token.lower() for token in TOKEN.findall(answer)]
    return bool(wanted) and any(asked[i : i + len(wanted)] == wanted for i in range(len(asked) - len(wanted) + 1))


def hard_coded(program: str, tests: Any) -> bool:
    """Whether a program spells out, as constants, at least half of the outputs that its tests expect, and two of them.

    Of an assertion what is compared with ``==`` counts. Outputs that any program may hold (a single character, small
    numbers, True, None) do not.
    """
    outputs = {each for test in tests or () for each in _expected(test) if len(each) > 1}
    constants = _constants(program)
    found = sum(output in constants for output in outputs)
    return found >= 2 and 2 * found >= len(outputs)


def _expected(test: Any) -> list[str]:
    if not isinstance(test, str):
        output = test.get("output") if isinstance(test, dict) else None
        return [_plain(output)]
    return [_plain(value) for node in _nodes(test) if _is_equality(node) for value in _literal(node.comparators[0])]


def _constants(program: str) -> set[str]:
    wanted = (ast.Constant, ast.List, ast.Tuple, ast.UnaryOp)
    return {_plain(value) for node in _nodes(program) if isinstance(node, wanted) for value in _literal(node)}


def _is_equality(node: Any) -> bool:
    return isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)


def _nodes(source: str) -> list[Any]:
    try:
        return list(ast.walk(ast.parse(source)))
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return []


def _literal(node: Any) -> list[Any]:
    """The value that is written out there; none where it is not one."""
    try:
        return [ast.literal_eval(node)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).strip()

"""Statistics of completions that reveal reward hacking."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.code.program import extract_program, parsed
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
    """Shares of a step's completions by their text, independent of their rewards.

    Args:
        prompts, completions: ``[B]`` texts, those of a group adjacent.
        group_size: completions for each prompt.
        answers: ``[B]`` gold answers, or none.
        tests: ``[B]`` tests of programs as ``code_reward`` takes them, or none.

    Returns:
        ``completions/duplicate_share``: completions that equal another one of their group;
        ``completions/repeated_share``: mean of ``repeated_share``;
        ``completions/empty_thought_share``: completions in the format of ``format_reward`` whose thought has fewer than
        two words;
        with ``answers``, ``completions/answer_in_prompt_excess``: the share of completions whose answer occurs in the
        prompt minus the share whose gold answer does, and ``completions/constant_answer_excess``: the share of the most
        frequent answer minus the share of the most frequent gold answer;
        with ``tests``, ``completions/hard_coded_share``: programs that contain the outputs that their tests expect.
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
    answered = [(prompt, answer, gold) for prompt, answer, gold in pairs if answer]
    if answered:
        in_prompt = [occurs_in(answer, prompt) - occurs_in(gold, prompt) for prompt, answer, gold in answered]
        metrics["completions/answer_in_prompt_excess"] = float(np.mean(in_prompt))
        most_answers = Counter(str(canonical_answer(answer)) for _, answer, _ in answered).most_common(1)[0][1]
        most_golds = Counter(str(canonical_answer(gold)) for _, _, gold in pairs).most_common(1)[0][1]
        metrics["completions/constant_answer_excess"] = most_answers / len(answered) - most_golds / len(pairs)
    programs = [(extract_program(text), each) for text, each in zip(completions, tests, strict=False) if each]
    are_hard_coded = [hard_coded(program, each) for program, each in programs if program is not None]
    if are_hard_coded:
        metrics["completions/hard_coded_share"] = float(np.mean(are_hard_coded))
    return metrics


def duplicate_share(group: Sequence[str]) -> float:
    """The share of texts that equal another one."""
    counts = Counter(group)
    return sum(count for count in counts.values() if count > 1) / len(group)


def has_empty_thought(prompts: Sequence[str], completions: Sequence[str]) -> list[bool]:
    """For each completion whether it has the format of ``format_reward`` and a thought of fewer than two words.

    Args:
        prompts, completions: ``[B]`` texts.
    """
    formatted = format_reward(list(prompts), list(completions))
    thoughts = [completion.partition("</think>")[0].removeprefix("<think>") for completion in completions]
    return [
        bool(good) and len(re.findall(r"\w+", thought)) < 2 for good, thought in zip(formatted, thoughts, strict=True)
    ]


def occurs_in(answer: str, prompt: str) -> bool:
    """Whether the words and numbers of an answer occur consecutively in a prompt.

    Args:
        answer: a final answer; False if it has neither words nor numbers.
        prompt: the text to search.
    """
    tokens = [token.lower() for token in TOKEN.findall(NUMBER_BEFORE_SIGN.sub(" ", prompt))]
    sought = [token.lower() for token in TOKEN.findall(answer)]
    return bool(sought) and any(tokens[i : i + len(sought)] == sought for i in range(len(tokens) - len(sought) + 1))


def hard_coded(program: str, tests: Any) -> bool:
    """Whether a program contains at least two, and at least half, of the outputs that its tests expect as constants.

    The expected output of an assertion is the right side of ``==``. Outputs of one character are ignored, because any
    program may contain them.

    Args:
        program: Python source.
        tests: the tests, as ``code_reward`` takes them.
    """
    outputs = {output for test in tests or () for output in _expected(test) if len(output) > 1}
    kinds = (ast.Constant, ast.List, ast.Tuple, ast.UnaryOp)
    constants = {_plain(value) for node in _nodes(program) if isinstance(node, kinds) for value in _literal(node)}
    count = sum(output in constants for output in outputs)
    return count >= 2 and 2 * count >= len(outputs)


def _expected(test: Any) -> list[str]:
    if not isinstance(test, str):
        output = test.get("output") if isinstance(test, dict) else None
        return [_plain(output)]
    comparisons = [node for node in _nodes(test) if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)]
    return [_plain(value) for node in comparisons for value in _literal(node.comparators[0])]


def _nodes(source: str) -> list[Any]:
    tree = parsed(source)
    return [] if tree is None else list(ast.walk(tree))


def _literal(node: Any) -> list[Any]:
    """The value of a literal, in a list; an empty list if the node is not a literal."""
    try:
        return [ast.literal_eval(node)]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


def _plain(value: Any) -> str:
    return str(list(value) if isinstance(value, tuple) else value).strip()

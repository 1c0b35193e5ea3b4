"""Statistics of completions that reveal reward hacking."""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from grpo_jax.hosts import interleaved
from grpo_jax.rewards.code.program import extract_program, parsed
from grpo_jax.rewards.format import format_reward
from grpo_jax.rewards.math.answer import canonical_answer, extract_answer, gold_answer
from grpo_jax.rewards.repetition import repeated_share

TOKEN = re.compile(r"[^\W_]+(?:[.,/]\d+)*")
NUMBER_BEFORE_SIGN = re.compile(r"(?<=\d)[+\-*/=](?=\d)")


@dataclass(frozen=True)
class TextFacts:
    """Facts about the texts of completions, from which ``text_metrics`` are computed.

    Attributes:
        digests: ``[B]``, equal for equal texts.
        repeated: ``[B]``, ``repeated_share`` of each.
        empty_thoughts: ``[B]``, those of ``has_empty_thought``.
        golds: ``[B]`` canonical gold answers; None without one.
        answers: ``[B]`` canonical answers of the completions with a gold answer; None without one.
        in_prompt: ``[B]``, whether the answer occurs in the prompt, minus whether the gold answer does.
        are_hard_coded: ``[B]``, ``hard_coded`` of programs that have tests; None for others.
    """

    digests: list[bytes]
    repeated: list[float]
    empty_thoughts: list[bool]
    golds: list[str | None]
    answers: list[str | None]
    in_prompt: list[int]
    are_hard_coded: list[bool | None]

    @classmethod
    def interleaved(cls, parts: Sequence[TextFacts]) -> TextFacts:
        """The facts of all completions, from those of each process's ``hosts.own_rows``."""
        return cls(*(interleaved([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def text_facts(
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    answers: Sequence[str | None] = (),
    tests: Sequence[Any] = (),
) -> TextFacts:
    """Facts about completions, each independent of the others.

    Args:
        prompts, completions: ``[B]`` texts.
        answers: ``[B]`` gold answers, or none.
        tests: ``[B]`` tests of programs as ``code_reward`` takes them, or none.
    """
    golds: list[str | None] = []
    given: list[str | None] = []
    in_prompt = []
    for prompt, completion, of_row in zip(prompts, completions, answers or [None] * len(completions), strict=True):
        gold = gold_answer(of_row) if of_row else None
        answer = extract_answer(completion, prompt) if of_row else None
        golds.append(None if gold is None else str(canonical_answer(gold)))
        given.append(str(canonical_answer(answer)) if answer else None)
        in_prompt.append(occurs_in(answer, prompt) - occurs_in(gold, prompt) if answer and gold is not None else 0)
    programs = [
        extract_program(text) if each else None
        for text, each in zip(completions, tests or [None] * len(completions), strict=True)
    ]
    return TextFacts(
        digests=[_digest(each) for each in completions],
        repeated=[repeated_share(each) for each in completions],
        empty_thoughts=has_empty_thought(prompts, completions),
        golds=golds,
        answers=given,
        in_prompt=in_prompt,
        are_hard_coded=[
            None if program is None else hard_coded(program, tests[row]) for row, program in enumerate(programs)
        ],
    )


def text_metrics(facts: TextFacts, *, group_size: int) -> dict[str, float]:
    """Shares of a step's completions by their text, independent of their rewards.

    Args:
        facts: of the completions, those of a group adjacent.
        group_size: completions for each prompt.

    Returns:
        ``completions/duplicate_share``: completions that equal another one of their group;
        ``completions/repeated_share``: mean of ``repeated_share``;
        ``completions/empty_thought_share``: completions in the format of ``format_reward`` whose thought has fewer than
        two words;
        with gold answers, ``completions/answer_in_prompt_excess``: the share of completions whose answer occurs in the
        prompt minus the share whose gold answer does, and ``completions/constant_answer_excess``: the share of the most
        frequent answer minus the share of the most frequent gold answer;
        with tests, ``completions/hard_coded_share``: programs that contain the outputs that their tests expect.
    """
    groups = [facts.digests[i : i + group_size] for i in range(0, len(facts.digests), group_size)]
    metrics = {
        "completions/duplicate_share": float(np.mean([duplicate_share(group) for group in groups])),
        "completions/repeated_share": float(np.mean(facts.repeated)),
        "completions/empty_thought_share": float(np.mean(facts.empty_thoughts)),
    }
    answers = [answer for answer in facts.answers if answer is not None]
    if answers:
        golds = [gold for gold in facts.golds if gold is not None]
        in_prompt = [
            excess for excess, answer in zip(facts.in_prompt, facts.answers, strict=True) if answer is not None
        ]
        metrics["completions/answer_in_prompt_excess"] = float(np.mean(in_prompt))
        metrics["completions/constant_answer_excess"] = _most(answers) / len(answers) - _most(golds) / len(golds)
    are_hard_coded = [is_it for is_it in facts.are_hard_coded if is_it is not None]
    if are_hard_coded:
        metrics["completions/hard_coded_share"] = float(np.mean(are_hard_coded))
    return metrics


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _most(values: Sequence[str]) -> int:
    """How often the most frequent value occurs."""
    return Counter(values).most_common(1)[0][1]


def duplicate_share(group: Sequence[str] | Sequence[bytes]) -> float:
    """The share of texts, or digests of texts, that equal another one."""
    if len({*group}) == len(group):
        return 0.0
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
    tokens = _tokens(prompt)
    sought = [token.lower() for token in TOKEN.findall(answer)]
    return bool(sought) and any(tokens[i : i + len(sought)] == sought for i in range(len(tokens) - len(sought) + 1))


@lru_cache(64)  # a prompt is read for each completion of its group
def _tokens(prompt: str) -> list[str]:
    return [token.lower() for token in TOKEN.findall(NUMBER_BEFORE_SIGN.sub(" ", prompt))]


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

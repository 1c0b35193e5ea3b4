"""Binary reward for mathematical equivalence of the final answer."""

from __future__ import annotations

from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.answer import extract_answer, gold_answer
from grpo_jax.rewards.math.compare import same_answer
from grpo_jax.rewards.math.forms import FORMS, formulas
from grpo_jax.rewards.math.numbers import numeric_value
from grpo_jax.rewards.math.reader import read_answer


def load_parser() -> None:
    """Import mpmath and compare two expressions, which fills its caches."""
    same_answer(r"\frac{x+1}{2}", r"\sqrt{2}+x^2")


@per_sample(columns=("answer",), warm_up=load_parser)
def math_reward(
    prompts: list[str],
    completions: list[str],
    *,
    answer: list[str | None],
    form: str | None = None,
    **_columns: list[Any],
) -> list[float | None]:
    """1.0 if the completion's final answer is mathematically equal to the gold answer (``same_answer``), else 0.0.

    None if the gold answer is None, cannot be read, is an identity or does not have the required form.

    Args:
        prompts: ``[B]`` prompts, or an empty list. A prompt that ends in an open thought affects the extraction.
        completions: ``[B]`` completions; the final answer is ``extract_answer(completion, prompt)``. A completion
            without one scores 0.0.
        answer: ``[B]`` gold answers, bare or as solutions (``gold_answer``).
        form: form that expressions must have in addition to being equal: ``expanded`` (a sum of distinct monomials),
            ``factored`` (a product of irreducible polynomials) or ``as-written`` (the same text up to spacing and
            spelling). For tasks such as "expand (x+1)(x+2)", where a copy of the question equals its answer.

    Raises:
        ValueError: ``form`` is unknown.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}, not one of {', '.join(FORMS)}")
    prompts = prompts or [""] * len(completions)
    return [_score(*row, form) for row in zip(prompts, completions, answer, strict=True)]


def question_contains_answer(question: str, gold: str) -> bool:
    """Whether a formula in the question, or one side of it, equals the gold answer, so that copying it would score.

    False if the gold answer cannot be read.

    Args:
        question: text of the problem. Formulas are read between mathematics delimiters; without any, they are the runs
            of formula characters in the text.
        gold: final gold answer, without a solution around it.
    """
    value = numeric_value(gold)
    if value is not None:  # the most frequent kind, and a hundred times as fast
        return any(numeric_value(formula) == value for formula in formulas(question))
    return read_answer(gold) is not None and any(same_answer(gold, formula) for formula in formulas(question))


def _score(prompt: str, completion: str, gold: str | None, form: str | None) -> float | None:
    if gold is None:
        return None
    try:
        return float(same_answer(gold_answer(gold), extract_answer(completion, prompt) or "", form=form))
    except ValueError:
        return None

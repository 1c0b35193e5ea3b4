"""The reward for a right final answer in mathematics."""

from __future__ import annotations

from typing import Any

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.math.answer import extract_answer, gold_answer
from grpo_jax.rewards.math.compare import _same_within_limit, same_answer
from grpo_jax.rewards.math.forms import FORMS, formulas
from grpo_jax.rewards.math.numbers import numeric_value
from grpo_jax.rewards.math.reader import read_answer


def load_parser() -> None:
    """Import mpmath and compute an expression once, which fills its caches."""
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
    """1.0 where a completion's final answer equals the gold answer as mathematics, else 0.0.

    None where the gold is None, cannot be read, is an identity, or does not have the form that is required.

    Args:
        prompts: the texts that the completions continue, which may have opened the thought; or an empty list.
        completions: the final answer is what ``extract_answer`` finds; without one the score is 0.0.
        answer: the gold answers, bare or as a solution that ``gold_answer`` reads; see ``same_answer`` for what is
            equal.
        form: of expressions, which form is required besides equality: ``expanded`` (a sum of distinct monomials),
            ``factored`` (a product of irreducible polynomials) or ``as-written`` (the same text but for spacing and
            spelling). For tasks where the question, copied, would equal its answer.

    Raises:
        ValueError: an unknown form.
    """
    if form is not None and form not in FORMS:
        raise ValueError(f"form is {form!r}, not one of {', '.join(FORMS)}")
    prompts = prompts or [""] * len(completions)
    return [_score(*row, form) for row in zip(prompts, completions, answer, strict=True)]


def stands_in_question(question: str, gold: str) -> bool:
    """Whether a formula of a question, or one side of it, equals the gold answer: copying it would score.

    Formulas are what mathematics delimiters enclose, and runs of formula characters in plain text. A gold answer that
    cannot be read does not stand anywhere.

    Args:
        question: the text of the problem.
        gold: the final gold answer.
    """
    value = numeric_value(gold)
    if value is not None:  # by far the most frequent kind, and a hundred times as fast
        return any(numeric_value(formula) == value for formula in formulas(question))
    right = read_answer(gold)
    if right is None:
        return False
    return any(given is not None and _same_within_limit(right, given) for given in map(read_answer, formulas(question)))


def _score(prompt: str, completion: str, gold: str | None, form: str | None) -> float | None:
    if gold is None:
        return None
    try:
        return float(same_answer(gold_answer(gold), extract_answer(completion, prompt) or "", form=form))
    except ValueError:
        return None

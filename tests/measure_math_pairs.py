"""Counts of wrong answers that score and of right answers that are missed, here and with math-verify, as one JSON line.

    python tests/measure_math_pairs.py tests/data/math_pairs.jsonl

A line of the file is ``{"kind", "gold", "answer" or "completion", "equal"}``. An answer is graded in a box, except one
of the kind ``completion``, which is a whole completion.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.rewards.math.reward import math_reward


def ours(gold: str, completion: str) -> bool:
    """Whether ``math_reward`` gives the completion 1."""
    return math_reward([""], [completion], answer=[gold]) == [1.0]


def math_verify(gold: str, completion: str) -> bool:
    """Whether math-verify's ``parse`` and ``verify`` accept the completion."""
    from math_verify import parse, verify

    try:
        return bool(verify(parse(rf"\boxed{{{gold}}}"), parse(completion)))
    except Exception:
        return False


def completion_of(pair: dict[str, Any]) -> str:
    """The completion that is graded for a line of the file."""
    if pair["kind"] == "completion":
        return pair["answer"]
    return pair["completion"] if "completion" in pair else rf"\boxed{{{pair['answer']}}}"


def count(pairs: list[dict[str, Any]], is_right: Callable[[str, str], bool]) -> dict[str, float]:
    """The two counts, and the seconds that grading took."""
    started = time.perf_counter()
    texts = [completion_of(pair) for pair in pairs]
    found = [is_right(pair["gold"], text) for pair, text in zip(pairs, texts, strict=True)]
    equal = [pair["equal"] for pair in pairs]
    return {
        "wrong answers that score": sum(a and not b for a, b in zip(found, equal, strict=True)),
        "right answers missed": sum(b and not a for a, b in zip(found, equal, strict=True)),
        "seconds": round(time.perf_counter() - started, 2),
    }


if __name__ == "__main__":
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    figures = {"equal": sum(row["equal"] for row in rows), "different": sum(not row["equal"] for row in rows)}
    print(json.dumps({**figures, "ours": count(rows, ours), "math-verify": count(rows, math_verify)}))

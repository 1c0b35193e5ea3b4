"""Coverage-guided fuzzing of everything that reads a completion: no crash, no hang, no score for garbage.

    python tests/fuzz_parsers.py -max_total_time=3600 corpus/

Needs atheris. A part of it runs among the slow tests.
"""

import sys
import time
from collections import Counter

import atheris

with atheris.instrument_imports(include=["grpo_jax.rewards"]):
    from grpo_jax.rewards.code.reward import extract_program
    from grpo_jax.rewards.format import format_reward
    from grpo_jax.rewards.math.answer import canonical_answer, extract_answer, numeric_value
    from grpo_jax.rewards.math.latex import normalize
    from grpo_jax.rewards.math.reader import read_answer
    from grpo_jax.rewards.math.reward import math_reward
    from grpo_jax.rewards.repetition import repeated_share

LONGEST_SECONDS = 20.0
GOLD = "7919/7907"
"""A value that a text is not likely to have unless it is written out."""


def read_everything(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    started = time.monotonic()
    answer = extract_answer(text)
    # Without its markup, and of several boxes with commas between, but with nothing that the text does not hold.
    assert answer is None or Counter(filter(str.isalnum, answer)) <= Counter(filter(str.isalnum, text))
    canonical_answer(text)
    numeric_value(text)
    extract_program(text)
    assert format_reward([""], [text])[0] in (0.0, 1.0)
    assert 0 <= repeated_share(text) < 1
    normalize(text)
    read_answer(text)
    score = math_reward([""], [rf"\boxed{{{text}}}"], answer=[GOLD])[0]
    assert score == 0.0 or "7919" in text, text
    assert math_reward([""], ["<answer>5</answer>"], answer=[text])[0] in (0.0, 1.0, None)
    assert time.monotonic() - started < LONGEST_SECONDS, text


if __name__ == "__main__":
    atheris.Setup(sys.argv, read_everything)
    atheris.Fuzz()

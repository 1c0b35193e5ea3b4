"""What rewards cost and how far they can be trusted: the pool's speed, what hanging samples cost, and hard pairs.

    python experiments/bench/rewards.py

Prints one JSON line: the pool's wall time as a multiple of a plain loop's, on mathematics answers and on programs
without a fault, with the number of workers that were replaced; by how many deadlines a step of 512 samples is longer
when one in 50 hangs for a minute; mistakes on the table of hard pairs beside those of math-verify alone, where that is
installed.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from grpo_jax.loop.command import run_command
from grpo_jax.rewards import RewardPool, code_reward, math_reward, per_sample
from grpo_jax.rewards.calling import warm_up
from grpo_jax.rewards.compose import RewardFn, as_reward_outputs

PAIRS = Path(__file__).parent.parent / "tests" / "data" / "math_pairs.jsonl"
FUNCTION = "```python\ndef add(a, b):\n    return a + b\n```"
ASSERTS = ["assert add(3, 4) == 7", "assert add('a', 'b') == 'ab'"]
SCRIPT = "```python\nprint(int(input()) + int(input()))\n```"
INPUTS = [{"input": "3\n4\n", "output": "7\n"}, {"input": "5\n6\n", "output": "11\n"}]


@dataclass(frozen=True)
class Config:
    """How much of it."""

    answers: int = 1000
    """Mathematics answers that are graded in one process and in the pool."""
    programs: int = 512
    """Programs that are run in one process and in the pool."""
    samples: int = 512
    """Samples of a step."""
    deadline: float = 10.0
    """Of the pool, in seconds."""


def main(config: Config) -> None:
    result: dict[str, Any] = {}
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    chosen = [pairs[n % len(pairs)] for n in range(config.answers)]
    result |= pool_against_loop("math", math_reward, list(map(boxed, chosen)), answer=[each["gold"] for each in chosen])
    for name, program, tests in (("asserts", FUNCTION, ASSERTS), ("stdin", SCRIPT, INPUTS)):
        programs = [program] * config.programs
        result |= pool_against_loop(name, code_reward, programs, tests=[tests] * config.programs)
    print(json.dumps(result | price_of_hanging(config.samples, config.deadline) | mistakes()))


def scores_of(values: Any, completions: list[str]) -> list[float | None]:
    return [each.score for each in as_reward_outputs(values, completions)]


def pool_against_loop(name: str, reward: RewardFn, completions: list[str], **columns: list[Any]) -> dict[str, float]:
    """The pool's time and a plain loop's, which runs in a process of its own, warmed up as the pool's workers are."""
    with ProcessPoolExecutor(1, get_context("spawn")) as other_process:
        loop_seconds, alone = other_process.submit(plain_loop, reward, completions, columns).result()
    with RewardPool({name: reward}) as pool:
        started = time.perf_counter()
        assert scores_of(pool.rewards[name]([""] * len(completions), completions, **columns), completions) == alone
        pool_seconds = time.perf_counter() - started
        return {
            f"{name}_samples": len(completions),
            f"{name}_loop_seconds": round(loop_seconds, 2),
            f"{name}_pool_over_loop": round(pool_seconds / loop_seconds, 2),
            f"{name}_workers_replaced": pool.replaced,
        }


def plain_loop(
    reward: RewardFn, completions: list[str], columns: dict[str, list[Any]]
) -> tuple[float, list[float | None]]:
    warm_up(reward)
    started = time.perf_counter()
    alone = scores_of(reward([""] * len(completions), completions, **columns), completions)
    return time.perf_counter() - started, alone


@per_sample
def usual(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Five milliseconds of a grader's work, and a minute for a completion that asks for it."""
    ended = time.process_time() + 0.005
    while time.process_time() < ended:
        continue
    if completions[0] == "hang":
        time.sleep(60)
    return [1.0]


def price_of_hanging(count: int, deadline: float) -> dict[str, float]:
    with RewardPool({"usual": usual}, deadline=deadline) as pool:
        seconds = {}
        for every in (0, 50):
            completions = ["hang" if every and i % every == 0 else "fine" for i in range(count)]
            pool.rewards["usual"]([""] * 50, ["fine"] * 50)
            started = time.perf_counter()
            scores = scores_of(pool.rewards["usual"]([""] * count, completions), completions)
            assert scores == [None if each == "hang" else 1.0 for each in completions]
            seconds[every] = time.perf_counter() - started
    longer = (seconds[50] - seconds[0]) / deadline
    return {"step_longer_by_deadlines": round(longer, 3), "hanging_samples": len(range(0, count, 50))}


def mistakes() -> dict[str, int]:
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    graders: dict[str, Any] = {"ours": our_verdict}
    if find_spec("math_verify"):
        graders["math_verify"] = verdict_of_math_verify
    found = {"pairs": len(pairs)}
    for name, verdict in graders.items():
        verdicts = [(pair["equal"], verdict(pair)) for pair in pairs]
        found[f"false_positives_{name}"] = sum(given and not right for right, given in verdicts)
        found[f"false_negatives_{name}"] = sum(right and not given for right, given in verdicts)
    return found


def boxed(pair: dict[str, Any]) -> str:
    return pair.get("completion") or rf"\boxed{{{pair['answer']}}}"


def our_verdict(pair: dict[str, Any]) -> bool:
    return math_reward([""], [boxed(pair)], answer=[pair["gold"]])[0] == 1


def verdict_of_math_verify(pair: dict[str, Any]) -> bool:
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)
    answer = pair["completion"] if "completion" in pair else f"${boxed(pair)}$"
    return bool(verify(parse(f"${pair['gold']}$"), parse(answer)))


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))

"""Rewards: speed of the worker pool, cost of hanging samples, errors on hard pairs of mathematics answers.

    python experiments/bench/rewards.py

Prints one JSON line: the pool's wall time relative to a plain loop, on mathematics answers and correct programs, with
the number of replaced workers; the delay of a step of 512 samples, in deadlines, if one in 50 hangs for a minute; false
positives and negatives on the hard pairs, also of math-verify alone if it is installed.
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
    """Sizes of the measurements."""

    answers: int = 1000
    """Mathematics answers to grade in one process and in the pool."""
    programs: int = 512
    """Programs to run in one process and in the pool."""
    samples: int = 512
    """Samples of the step with hanging samples."""
    deadline: float = 10.0
    """Deadline of the pool in seconds."""


def main(config: Config) -> None:
    result: dict[str, Any] = {}
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    chosen = [pairs[n % len(pairs)] for n in range(config.answers)]
    result |= pool_against_loop("math", math_reward, list(map(boxed, chosen)), answer=[pair["gold"] for pair in chosen])
    for name, program, tests in (("asserts", FUNCTION, ASSERTS), ("stdin", SCRIPT, INPUTS)):
        programs = [program] * config.programs
        result |= pool_against_loop(name, code_reward, programs, tests=[tests] * config.programs)
    print(json.dumps(result | cost_of_hanging(config.samples, config.deadline) | count_errors()))


def scores_of(values: Any, completions: list[str]) -> list[float | None]:
    return [output.score for output in as_reward_outputs(values, completions)]


def pool_against_loop(name: str, reward: RewardFn, completions: list[str], **columns: list[Any]) -> dict[str, float]:
    """Times of the pool and of a plain loop, which runs in its own process, warmed up like the pool's workers."""
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
    """A reward that takes five milliseconds, or a minute for the completion ``hang``."""
    ended = time.process_time() + 0.005
    while time.process_time() < ended:
        continue
    if completions[0] == "hang":
        time.sleep(60)
    return [1.0]


def cost_of_hanging(count: int, deadline: float) -> dict[str, float]:
    with RewardPool({"usual": usual}, deadline=deadline) as pool:
        seconds = {}
        for every in (0, 50):
            completions = ["hang" if every and i % every == 0 else "fine" for i in range(count)]
            pool.rewards["usual"]([""] * 50, ["fine"] * 50)
            started = time.perf_counter()
            scores = scores_of(pool.rewards["usual"]([""] * count, completions), completions)
            assert scores == [None if text == "hang" else 1.0 for text in completions]
            seconds[every] = time.perf_counter() - started
    longer = (seconds[50] - seconds[0]) / deadline
    return {"step_longer_by_deadlines": round(longer, 3), "hanging_samples": len(range(0, count, 50))}


def count_errors() -> dict[str, int]:
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    graders: dict[str, Any] = {"ours": our_verdict}
    if find_spec("math_verify"):
        graders["math_verify"] = verdict_of_math_verify
    counts = {"pairs": len(pairs)}
    for name, verdict in graders.items():
        verdicts = [(pair["equal"], verdict(pair)) for pair in pairs]
        counts[f"false_positives_{name}"] = sum(given and not right for right, given in verdicts)
        counts[f"false_negatives_{name}"] = sum(right and not given for right, given in verdicts)
    return counts


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

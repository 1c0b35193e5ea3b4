"""Rewards as users write them: of whole batches, async, with prints; imported by the pool's workers."""

import asyncio
import os
import time

from grpo_jax.rewards.calling import per_sample

CALLS = []


def batch_size(completions, **kwargs):
    """As TRL calls a reward; depends on the whole batch, and on the calls before."""
    CALLS.append(len(completions))
    return [len(completions) + len(CALLS) / 10] * len(completions)


def misbehaving(prompts, completions):
    match completions[0]:
        case "short":
            return [1.0]
        case "text":
            return ["good"] * len(completions)
        case "raise":
            raise ConnectionError("the server does not answer")
        case "die":
            os._exit(1)
        case "hang":
            time.sleep(60)
    return [2.0] * len(completions)


def chatty(completions, **kwargs):
    print(f"batch of {len(completions)}")
    for line in range(30 if completions[0] == "long" else 0):
        print(f"line {line}")
    os.write(2, "and \N{GREEK SMALL LETTER ALPHA} to stderr\n".encode())
    return [0.0] * len(completions)


async def exact_match(prompts, completions, answer, **kwargs):
    await asyncio.sleep(0.01)
    return [float(completion == each) for completion, each in zip(completions, answer, strict=True)]


@per_sample
async def delayed_length(prompts, completions):
    (completion,) = completions
    if completion == "raise":
        raise KeyError("no such thing")
    await asyncio.sleep({"hang": 60.0}.get(completion, 0.3))
    return [float(len(completion))]


def brevity(completions, **kwargs):
    """Differs among completions of a model that was taught nothing."""
    return [-float(len(completion)) for completion in completions]

"""Rewards with every fault there is, by what the completion says; and one that is sound."""

import os
import signal
import subprocess
import time

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.compose import RewardOutput


@per_sample
def faulty(prompts, completions, **columns):
    return [answer_to(completion) for completion in completions]


def answer_to(completion):
    match completion:
        case "hang":
            time.sleep(60)
        case "spin":
            while True:
                pass
        case "exit":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise KeyError("no such thing")
        case "nan":
            return float("nan")
        case "text":
            return "five"
        case "eat":
            return len(b"1" * (8 << 30))
        case "leave":
            if os.fork() == 0:
                os.setsid()
                time.sleep(600)
            time.sleep(60)
        case "busy":
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            others = []
            while len(others) < 3 and 0 not in others:
                others.append(os.fork())
            while 0 in others or time.process_time() < 0.2:
                pass
            for each in others:
                os.kill(each, signal.SIGKILL)
                os.waitpid(each, 0)
        case "start and die":
            subprocess.Popen(["sleep", "7781"], start_new_session=True)
            os.kill(os.getpid(), 36)
        case "absent":
            return None
        case "graded":
            return RewardOutput(0.5, {"detail": 2.0}, "a note")
    return float(len(completion))


@per_sample
def slow_length(prompts, completions, **columns):
    time.sleep(0.005 * len(completions))
    return [float(len(completion)) for completion in completions]


@per_sample
def column(prompts, completions, *, answer, **columns):
    return [float(each) for each in answer]

"""Sampling ahead of training, by a fixed number of steps.

With staleness K, batch n is sampled from the policy after step ``max(0, n - 1 - K)``, whatever the timing: so a run is
reproducible, on any number of processes, and its staleness is not only bounded but known. In step n, batch n + K is
sampled, and then batch n is trained on, whose rewards had K steps to be computed in the background::

    devices   | sample n+1 | train n | sample n+2 | train n+1 | ...       K = 1
    rewards   |        of n          |       of n+1          | ...

On several processes, programs are dispatched and values exchanged by the main thread alone, in an order that is the
same on all of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.hosts import fetch
from grpo_jax.loop.collector import Collector
from grpo_jax.loop.experience import Experience
from grpo_jax.loop.run import Run
from grpo_jax.sharding import BATCH, bytes_on_devices, place
from grpo_jax.types import Params, Prompts, Rollout, TrainState

State = TrainState | dict[str, TrainState]
"""Of a policy; with a critic of its own, of both by name."""


@dataclass(frozen=True)
class Waiting:
    """A batch that was sampled, or is being sampled, and not trained on yet.

    Attributes:
        step: the number of its step.
        policy: the step after which its policy was the current one.
        sampled: gives the batch.
    """

    step: int
    policy: int
    sampled: Future[Experience]


class RolloutQueue:
    """Batches in the order of steps, sampled ``staleness`` steps ahead of training; 0 samples them when needed.

    On devices of its own (``rollout_mesh``), sampling runs in a thread beside training::

        sampler   | sample n+1 | sample n+2 | ...       K = 1
        trainer   | train n    | train n+1  | ...
        rewards   |    of n+1       of n+2  | ...

    The queue is part of a checkpoint: completions and the sampler's log-probabilities as arrays, positions of the
    problems as JSON. Rewards are computed again, being functions of these.

    Args:
        config: of the run.
        collector: samples and scores.
        run: ends the thread.
    """

    def __init__(self, config: GRPOConfig | PPOConfig, collector: Collector, run: Run):
        self._config, self._collector = config, collector
        self._staleness = config.staleness
        self._waiting: deque[Waiting] = deque()
        self._sharding = NamedSharding(collector.mesh, P(None, *BATCH))
        is_beside = isinstance(config, GRPOConfig) and config.rollout_mesh is not None
        self._thread = run.enter(_thread()) if is_beside else None

    @property
    def facts(self) -> dict[str, str]:
        """Staleness and its correction, for the run's header."""
        if not self._staleness:
            return {}
        correction = (
            "ratios to the policy that sampled"
            if self._config.old_log_probs == "sampler"
            else f"importance weights up to {self._config.policy_loss.importance_cap:g}"
        )
        return {
            "off policy": f"batch n is sampled from the policy after step n - 1 - {self._staleness}, and scored in the "
            f"background (staleness); corrected by {correction}"
        }

    def next(self, step: int, params: Params) -> Experience:
        """The batch of a step, after sampling, or beginning to sample, the one that is due from the present policy.

        Args:
            step: the number of the step.
            params: of the policy before the step.
        """
        if not self._staleness:
            return self._collector.sample(step, params)
        started = time.monotonic()
        due = range(
            self._waiting[-1].step + 1 if self._waiting else step,
            min(step + self._staleness, self._config.num_steps) + 1,
        )
        if self._thread is not None and due:
            params = self._collector.reshard(params)  # before the update donates them
        for number in due:
            self._waiting.append(Waiting(number, step - 1, self._begin(partial(self._sample, number, params))))
        waiting = self._waiting.popleft()
        experience = waiting.sampled.result()
        experience.started, waited = started, time.monotonic() - started
        experience.times |= {"staleness": step - 1 - waiting.policy, "rollout_wait": waited}
        return experience

    def _sample(self, step: int, params: Params) -> Experience:
        experience = self._collector.sample(step, params)
        if self._thread is not None:  # which finds them in its layout
            experience.times["reshard_bytes"] = bytes_on_devices(params)
        self._collector.start_scoring(experience)
        return experience

    def _begin(self, function: Callable[[], Experience]) -> Future[Experience]:
        """The result of a function, called in the thread if there is one."""
        if self._thread is not None:
            # Of this thread alone, if a context has set it.
            precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]

            def with_precision() -> Experience:
                with jax.default_matmul_precision(precision):
                    return function()

            return self._thread.submit(with_precision)
        future: Future[Experience] = Future()
        future.set_result(function())
        return future

    def with_state(self, state: State) -> Any:
        """The tree of a checkpoint: the state, and with it the queue if there is one.

        It waits until all batches are sampled, so that the evaluation of the step, too, has the devices alone.

        Args:
            state: of the models that are trained.
        """
        if not self._staleness:
            return state
        B, T = self._config.num_completions, self._config.completion_length
        # Always as many places, so that a checkpoint's shapes are known before it is read.
        arrays = {
            "completion_ids": np.zeros((self._staleness, B, T), np.int32),
            "rollout_log_probs": np.zeros((self._staleness, B, T), np.float32),
            "lengths": np.zeros((self._staleness, B), np.int32),
            "truncated": np.zeros((self._staleness, B), bool),
        }
        routing = self._collector.policy.model.routing
        if routing is not None:
            for name, length in (("prompt_experts", self._config.prompt_length), ("completion_experts", T)):
                shape = (self._staleness, B, length, routing.num_layers, routing.per_token)
                arrays[name] = np.zeros(shape, np.int16)
        for slot, waiting in enumerate(self._waiting):
            experience = waiting.sampled.result()
            arrays["lengths"][slot] = experience.lengths
            for name in arrays.keys() - {"lengths"}:
                arrays[name][slot] = getattr(experience.rollout, name)
        return {"policy": state, "queue": place(arrays, self._sharding)}

    def state_of(self, saved: Any) -> Any:
        """The state in a tree of ``with_state``."""
        return saved["policy"] if self._staleness else saved

    def state_dict(self) -> dict[str, Any]:
        """Steps, policies, positions and times of the waiting batches, as JSON; empty without a queue."""
        if not self._staleness:
            return {}
        return {
            "queue": [
                {
                    "step": waiting.step,
                    "policy": waiting.policy,
                    "positions": [index.tolist() for index in waiting.sampled.result().positions],
                    "times": waiting.sampled.result().times,
                }
                for waiting in self._waiting
            ]
        }

    def restore(self, saved: Any, position: Mapping[str, Any]) -> Any:
        """The state of a checkpoint; its batches are put into the queue, and scored again.

        Args:
            saved: tree of ``with_state``.
            position: with ``state_dict``; empty for a new run.
        """
        for waiting in self._waiting:  # of a loop that goes back to a checkpoint
            waiting.sampled.result()
        self._waiting.clear()
        rows = position.get("queue", [])
        arrays = fetch(saved["queue"]) if rows else {}
        for slot, row in enumerate(rows):
            own = {name: values[slot] for name, values in arrays.items()}
            positions = [np.array(index, np.int32) for index in row["positions"]]
            rollout_of = partial(_rollout, own, group_size=self._config.group_size)
            experience = self._collector.sampled_before(row["step"], positions, rollout_of)
            experience.times = dict(row["times"])
            self._collector.start_scoring(experience)
            sampled: Future[Experience] = Future()
            sampled.set_result(experience)
            self._waiting.append(Waiting(row["step"], row["policy"], sampled))
        return self.state_of(saved)


@contextmanager
def _thread() -> Iterator[ThreadPoolExecutor]:
    """A thread; leaving waits for the call that is running, and forgets the others."""
    with ThreadPoolExecutor(1, thread_name_prefix="sampler") as thread:
        try:
            yield thread
        finally:
            thread.shutdown(cancel_futures=True)


def _rollout(arrays: Mapping[str, np.ndarray], prompts: Prompts, *, group_size: int) -> Rollout:
    columns = np.arange(arrays["completion_ids"].shape[1])
    fields = {
        "prompt_ids": np.repeat(np.asarray(prompts.ids), group_size, axis=0),
        "prompt_mask": np.repeat(np.asarray(prompts.mask), group_size, axis=0),
        "completion_mask": columns < arrays["lengths"][:, None],
        **{name: values for name, values in arrays.items() if name != "lengths"},
    }
    return Rollout(**fields)  # pyright: ignore[reportArgumentType]

"""A plan of a run: whether it fits its devices and how long a step takes, by the compiler and published speeds.

Nothing is computed and no weights are read. A program's time is the longest of those that its products, its memory
traffic and its transfers take by themselves, or, if they do not overlap, their sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.online import OnlineConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.speeds import Rates
from grpo_jax.loop.compiled_updates import bytes_on_device
from grpo_jax.loop.planned_learner import Learner, Work
from grpo_jax.loop.planned_model import Lengths, decoder_of, hf_config_of, judge_of, planned_model, spread
from grpo_jax.loop.planned_rollout import Rollout, plan_rollout
from grpo_jax.loop.planned_updates import plan_grpo, plan_offline, plan_ppo
from grpo_jax.loop.roofline import Measured, Number
from grpo_jax.models import training_flops
from grpo_jax.models.config import DecoderConfig

BOUNDS = ("compute", "memory", "wire")
KINDS = (
    *("weights", "optimizer", "reference", "critic", "reward model", "rollout weights", "KV cache", "gradients"),
    "activations",
)
"""Kinds of memory. ``activations`` are all temporary arrays, batches among them."""


@dataclass(frozen=True)
class Phase:
    """A part of a step.

    Attributes:
        name: of the phase.
        programs: by name, each with how often it runs in a step.
        memory: bytes on a device that are held at the same time, by kind.
        layers: the numbers of layers that were compiled, where the programs are extrapolated from them.
        refused: bytes that the compiler would need for the program that it refuses, with its arguments.
    """

    name: str
    programs: Mapping[str, tuple[Measured, int]]
    memory: Mapping[str, Number]
    layers: tuple[int, int] | None = None
    refused: Number | None = None

    @property
    def held(self) -> Number:
        """Bytes on a device; where the compiler refuses a program, what it would need for it, or all that is known."""
        known = sum(self.memory.values())
        return known if self.refused is None or math.isnan(self.refused) else max(known, self.refused)

    def fits(self, capacity: Number | None) -> bool:
        """Whether it fits a device.

        Args:
            capacity: bytes of its memory; None if unknown.
        """
        return self.refused is None and (capacity is None or self.held <= capacity)

    def seconds(self, rates: Rates) -> dict[str, Number]:
        """Seconds of the phase in a step: of each bound, the ``longest`` of each program, and the ``sum`` of all.

        Args:
            rates: of a device.
        """
        total: dict[str, Number] = dict.fromkeys((*BOUNDS, "longest", "sum"), 0.0)
        for measured, times in self.programs.values():
            each = measured.times(rates)
            each |= {"longest": max(each.values()), "sum": sum(each.values())}
            total = {name: total[name] + times * each[name] for name in total}
        return total

    def total(self, quantity: str) -> Number:
        """The sum of a quantity of ``Measured`` over the phase's programs in a step.

        Args:
            quantity: its name.
        """
        return sum(times * getattr(measured, quantity) for measured, times in self.programs.values())

    @property
    def num_collectives(self) -> Number:
        """Collective operations in a step, one after the other."""
        return round(sum(times * sum(measured.runs.values()) for measured, times in self.programs.values()))

    def latency(self, rates: Rates) -> Number:
        """Seconds of them in a step whatever their size, which are a part of ``wire``.

        Args:
            rates: of a device.
        """
        return sum(times * measured.latency(rates) for measured, times in self.programs.values())

    @property
    def collectives(self) -> dict[str, Number]:
        """Bytes of each kind of collective operation in a step."""
        kinds = sorted({kind for measured, _ in self.programs.values() for kind in measured.collectives})
        return {
            kind: sum(times * measured.collectives.get(kind, 0.0) for measured, times in self.programs.values())
            for kind in kinds
        }


@dataclass(frozen=True)
class Plan:
    """A plan of a run on a mesh.

    Attributes:
        axes: sizes of the mesh's axes.
        rollout_tensor: devices that the sampler's weights are sharded over; None without a sampler.
        num_micro_batches: of an update.
        phases: of a step, in order.
        capacity: bytes of a device's memory; None if unknown.
        rates: of a device; None if unknown.
        tokens: completion tokens of a step; of offline training, all tokens.
        flops: model FLOPs of a step's updates, as in ``monitor.devices.device_metrics``.
        num_steps: of the run; None where the data decide it.
    """

    axes: Mapping[str, int]
    rollout_tensor: int | None
    num_micro_batches: int
    phases: Sequence[Phase]
    capacity: Number | None
    rates: Rates | None
    tokens: int
    flops: Number
    num_steps: int | None

    @property
    def devices(self) -> int:
        """Number of devices."""
        return math.prod(self.axes.values())

    @property
    def mesh(self) -> str:
        """The mesh in words."""
        named = [f"{name} {size}" for name, size in self.axes.items() if size > 1] or ["one device"]
        if self.rollout_tensor not in (None, self.axes["tensor"]):
            named.append(f"(rollout tensor {self.rollout_tensor})")
        return " ".join(named)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return all(phase.fits(self.capacity) for phase in self.phases)

    @property
    def held(self) -> Number:
        """Bytes on a device in the phase that needs most."""
        return max(phase.held for phase in self.phases)

    @property
    def is_timed(self) -> bool:
        """Whether the time of a step is known: the devices' speeds are, and no program is refused."""
        return self.rates is not None and all(phase.refused is None for phase in self.phases)

    def seconds(self) -> dict[str, Number]:
        """Seconds of a step, as ``Phase.seconds``.

        Raises:
            ValueError: the time is not known.
        """
        if self.rates is None or not self.is_timed:
            raise ValueError("the time of a step is not known")
        parts = [phase.seconds(self.rates) for phase in self.phases]
        return {name: sum(part[name] for part in parts) for name in (*BOUNDS, "longest", "sum")}

    def mfu(self, seconds: Number) -> float:
        """Model FLOPs utilization.

        Args:
            seconds: in which a step's updates are done.
        """
        assert self.rates is not None
        return self.flops / (seconds * self.devices * self.rates.compute)

    @property
    def update_seconds(self) -> dict[str, Number]:
        """Seconds of a step's updates, as ``Phase.seconds``."""
        assert self.rates is not None
        parts = [phase.seconds(self.rates) for phase in self.phases if phase.name.endswith("update")]
        return {name: sum(part[name] for part in parts) for name in (*BOUNDS, "longest", "sum")}

    @property
    def bound(self) -> str:
        """The largest of compute, memory and wire over a step."""
        seconds = self.seconds()
        return max(BOUNDS, key=lambda name: seconds[name])


def make_plan(
    config: Any,
    mesh: Mesh,
    *,
    rates: Rates | None,
    capacity: Number | None,
    mean_prompt_length: Number | None = None,
    mean_completion_length: Number | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Compile the programs of a run and add up their work; within ``devices.planning_for`` its devices.

    Args:
        config: of the run, for this mesh.
        mesh: the devices.
        rates: of a device; None if unknown.
        capacity: bytes of a device's memory; None if unknown.
        mean_prompt_length: in tokens; None for the maximum.
        mean_completion_length: in tokens; None for the maximum.
        options: of the compiler in addition to those of a run.
        say: called with what is compiled next.

    Raises:
        ValueError: the mesh does not fit the model or the batch; or as ``hf_config_of``.
    """
    hf_config = hf_config_of(config)
    decoder = decoder_of(config, hf_config, scalar_head=isinstance(config, RewardModelConfig))
    check_layout(config)
    say("reading the shapes of the model")
    policy = planned_model(config, decoder, mesh, config.lora)
    learner = Learner(config, mesh, policy, options=options)
    rollout, num_steps = None, None
    if isinstance(config, OnlineConfig):
        P, T, B = config.prompt_length, config.completion_length, config.num_completions
        lengths = Lengths(
            spread(mean_prompt_length or P, P, config.num_prompts), spread(mean_completion_length or T, T, B)
        )
        if config.rewards.reward_model is not None:
            judge = planned_model(config, judge_of(config, hf_config), mesh)
            learner.note("reward model", bytes_on_device(judge.params))
        say("compiling the programs of sampling")
        rollout = plan_rollout(config, policy, mesh, lengths, options)
        say("compiling the programs of an update")
        is_ppo = isinstance(config, PPOConfig)
        works = plan_ppo(learner, lengths, hf_config) if is_ppo else plan_grpo(learner, lengths)
        tokens, num_steps = int(lengths.completions.sum()), config.num_steps
        flops = _online_flops(config, decoder, judge_of(config, hf_config), lengths, works[-1])
    else:
        say("compiling the programs of an update")
        works = plan_offline(learner)
        sequences = config.num_rows * (2 if config.ROWS == "num_pairs" else 1)
        prompts = config.lengths[0] if config.ROWS == "num_pairs" else 0
        completions = np.full(sequences, config.sequence_length - prompts)
        tokens = sequences * config.sequence_length
        flops = training_flops(decoder, prompts, completions, lora=config.lora)
    phases = [] if rollout is None else rollout_phases(rollout, learner.held)
    return Plan(
        axes=dict(mesh.shape),
        rollout_tensor=None if rollout is None else rollout.tensor,
        num_micro_batches=works[-1].num_micro_batches,
        phases=[*phases, *(work_phase(work, learner.held) for work in works)],
        capacity=capacity,
        rates=rates,
        tokens=tokens,
        flops=flops,
        num_steps=num_steps,
    )


def check_layout(config: Any) -> None:
    """Check that prompts and the rows of a micro-batch divide over the mesh, as a run does.

    Args:
        config: of the run.

    Raises:
        ValueError: they do not.
    """
    config.check_lora(config.lora)
    config.check_offload(config.offload)
    if isinstance(config, OnlineConfig):
        config.mesh.check_divides(config.num_prompts, "num_prompts")
        rows = config.num_completions // (config.num_minibatches * config.micro_batches)
        config.mesh.check_divides(rows, "the completions of a micro-batch")
    else:
        unit = config.ROWS.removeprefix("num_")
        config.mesh.check_divides(config.num_rows // config.micro_batches, f"the {unit} of a micro-batch")


def rollout_phases(rollout: Rollout, held: Mapping[str, Number]) -> list[Phase]:
    """The phases of sampling, with the memory of each.

    Args:
        rollout: its programs.
        held: bytes on a device that are held for the whole run, by kind.
    """
    weights, phases = {"rollout weights": rollout.weights}, []
    prefill = rollout.programs["prefill"]
    cache = {"KV cache": prefill.results}
    for name in ("reshard", "prefill", "decode"):
        chosen = {key: each for key, each in rollout.programs.items() if key.startswith(name)}
        if not chosen:
            continue
        largest = max(chosen.values(), key=lambda each: each.temporary)
        refused = next((each.refused for each in chosen.values() if each.refused is not None), None)
        more = weights | ({} if name == "reshard" else cache) | {"activations": largest.temporary}
        if refused is not None:
            # Arguments are the sampler's weights, or the state.
            refused += sum(held.values()) if name != "reshard" else 0.0
        programs = {key: (each, rollout.times[key]) for key, each in chosen.items()}
        phases.append(Phase(name, programs, _ordered({**held, **more}), rollout.layers, refused))
    return phases


def work_phase(work: Work, held: Mapping[str, Number]) -> Phase:
    """The phase of an update, or of frozen-policy log-probabilities, with its memory.

    Args:
        work: the program.
        held: bytes on a device that are held for the whole run, by kind.
    """
    measured = work.measured
    activations = max(0.0, measured.temporary - work.gradients) + measured.results + work.batch
    memory = _ordered({**held, "gradients": work.gradients, "activations": activations})
    # The compiler knows of the program's own state alone.
    others = max(0.0, sum(held.values()) - work.own)
    refused = None if measured.refused is None else measured.refused + others
    return Phase(work.name, {work.name: (measured, work.times)}, memory, refused=refused)


def _ordered(memory: Mapping[str, Number]) -> dict[str, Number]:
    return {kind: memory[kind] for kind in KINDS if memory.get(kind)}


def _online_flops(
    config: OnlineConfig, decoder: DecoderConfig, critic: DecoderConfig, lengths: Lengths, update: Work
) -> float:
    """Model FLOPs of the updates of a step."""
    prompts = np.repeat(lengths.prompts, config.group_size)
    shared_by = config.group_size if update.prompts_are_shared else 1
    flops = training_flops(decoder, prompts, lengths.completions, group_size=shared_by, lora=config.lora)
    if isinstance(config, PPOConfig) and config.critic == "model":
        flops += training_flops(critic, prompts, lengths.completions, group_size=shared_by)
    return config.num_epochs * flops

"""Work, memory and shortest time of a compiled program on one device."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
from jax.stages import Compiled

from grpo_jax.config.speeds import Rates
from grpo_jax.loop.program_cost import program_cost

Number = float | int
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Measured:
    """A program on one device, by its compiler.

    Attributes:
        flops: floating-point operations of matrix products and attention.
        traffic: bytes read from and written to main memory, at most.
        wire: bytes sent.
        collectives: bytes of each kind of collective operation.
        runs: how often collective operations run, by their kind and the devices that take part.
        arguments, results, temporary: bytes of arguments in the device's memory, of results in memory of their own, and
            of temporary arrays: those in use at a time, by which a TPU's compiler refuses a program; of a CPU with what
            is lost between them.
        seconds: to compile.
        refused: bytes that the compiler would need where it refuses the program, of which then nothing else is known.
    """

    flops: Number = 0.0
    traffic: Number = 0.0
    wire: Number = 0.0
    collectives: Mapping[str, Number] = field(default_factory=dict)
    runs: Mapping[tuple[str, int], Number] = field(default_factory=dict)
    arguments: Number = 0.0
    results: Number = 0.0
    temporary: Number = 0.0
    seconds: Number = 0.0
    refused: Number | None = None

    @property
    def peak(self) -> Number:
        """Bytes of the program with its arguments."""
        return self.arguments + self.results + self.temporary

    def latency(self, rates: Rates) -> float:
        """Seconds of collective operations whatever their size, one after the other.

        Args:
            rates: of the device.
        """
        return sum((times * rates.latency_of(*run) for run, times in self.runs.items()), 0.0)

    def times(self, rates: Rates) -> dict[str, float]:
        """Seconds of compute, memory traffic and wire with its latency, each by itself.

        Args:
            rates: of the device.
        """
        return {
            "compute": self.flops / rates.compute,
            "memory": self.traffic / rates.memory,
            "wire": self.wire / rates.wire + self.latency(rates),
        }


def measure(compiled: Compiled, platform: str, *, more_flops: Number = 0.0, seconds: Number = 0.0) -> Measured:
    """The work and memory of a program.

    Args:
        compiled: the program.
        platform: of its devices, such as ``tpu``.
        more_flops: of kernels, which its text does not show.
        seconds: that it took to compile.

    Raises:
        RuntimeError: the compiler gives no memory analysis.
    """
    cost, analysis = program_cost(compiled.as_text() or ""), compiled.memory_analysis()
    if analysis is None:
        raise RuntimeError("the compiler gives no memory analysis")
    arguments, temporary = float(analysis.argument_size_in_bytes), float(analysis.temp_size_in_bytes)
    results = float(analysis.output_size_in_bytes - analysis.alias_size_in_bytes)
    if platform != "cpu":
        # Of the peak, arrays in the host's memory are a part.
        in_use = analysis.peak_memory_in_bytes - analysis.host_argument_size_in_bytes
        temporary = max(0.0, in_use - arguments - results)
    return Measured(
        flops=cost.flops + more_flops,
        traffic=cost.traffic,
        wire=cost.wire,
        collectives=cost.collectives,
        runs=cost.runs,
        arguments=arguments,
        results=results,
        temporary=temporary,
        seconds=seconds,
    )


def compile_measured(
    lower: Callable[[], Any], platform: str, options: Mapping[str, Any] | None = None, *, more_flops: Number = 0.0
) -> tuple[Compiled | None, Measured]:
    """A compiled program with its work and memory; None in its place if it does not fit the device.

    Args:
        lower: returns the lowered program.
        platform: of its devices, such as ``tpu``.
        options: of the compiler.
        more_flops: as in ``measure``.
    """
    lowered, started = lower(), time.monotonic()
    try:
        compiled = lowered.compile(dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        used = USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) and used is None:
            raise
        needed = float(used[1]) * UNITS[used[2]] if used else float("nan")
        return None, Measured(seconds=time.monotonic() - started, refused=needed)
    return compiled, measure(compiled, platform, more_flops=more_flops, seconds=time.monotonic() - started)


def extrapolated(small: Measured, large: Measured, layers: tuple[int, int], num_layers: int) -> Measured:
    """A program of unrolled layers, linearly from two with fewer.

    Args:
        small, large: the programs with ``layers``.
        layers: two numbers of layers, the smaller one first.
        num_layers: of the model.
    """
    share = (num_layers - layers[0]) / (layers[1] - layers[0])

    def at(a: Number, b: Number) -> Number:
        return max(0.0, a + share * (b - a))

    def of_each(name: str) -> dict[Any, Number]:
        a, b = getattr(small, name), getattr(large, name)
        return {key: at(a.get(key, 0.0), b.get(key, 0.0)) for key in sorted({*a, *b})}

    numbers = {
        each.name: at(getattr(small, each.name), getattr(large, each.name))
        for each in fields(Measured)
        if each.name not in ("collectives", "runs", "seconds", "refused")
    }
    return Measured(
        collectives=of_each("collectives"),
        runs=of_each("runs"),
        seconds=small.seconds + large.seconds,
        **numbers,
    )

"""Work of a compiled program from its HLO text: matrix products, memory traffic and bytes between devices.

XLA's own cost analysis counts the body of a loop once; here it is multiplied by the loop's trip count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import NamedTuple

from grpo_jax.models.expert_groups import TURNS

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1} | {
    f"{sign}{bits}": bits / 8 for sign in "su" for bits in (2, 4, 8, 16, 32, 64)
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
ASSIGNED = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
OPERAND = re.compile(r"%([\w.-]+)")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
GROUPED = re.compile(r'op_name="[^"]*(ragged_dot|tgmm)')
"""A TPU's kernels of products with groups of rows."""
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "iota"}
"""Instructions that move no data."""


@dataclass(frozen=True)
class Array:
    """An array of a program.

    Attributes:
        shape: its dimensions.
        size: in bytes.
        is_near: whether it is outside of the device's main memory, in a TPU's vector memory.
    """

    shape: tuple[int, ...]
    size: float
    is_near: bool


@dataclass(frozen=True)
class Instruction:
    """An instruction of a program.

    Attributes:
        opcode: what it does.
        arrays: its result.
        arguments: text between its parentheses.
        operands: names of its operands.
        attributes: the rest of its line.
        is_root: whether it is the result of its computation.
    """

    opcode: str
    arrays: tuple[Array, ...]
    arguments: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @property
    def size(self) -> float:
        """Bytes of the result."""
        return sum((array.size for array in self.arrays), 0.0)

    @property
    def stored(self) -> float:
        """Bytes of the result in the device's main memory."""
        return sum((array.size for array in self.arrays if not array.is_near), 0.0)


Computation = dict[str, Instruction]


class Transfer(NamedTuple):
    """A collective operation.

    Attributes:
        size: bytes that it gathers, scatters, permutes or sums, in all of its runs.
        times: how often it runs.
        devices: that take part.
    """

    size: float
    times: int
    devices: int


@dataclass(frozen=True)
class Cost:
    """Work of a program on one device.

    Attributes:
        flops: of matrix products; of custom kernels, only those of experts are counted.
        local_traffic: bytes that other instructions than collectives read from and write to the device's main memory,
            at most.
        channels: collective operations by their kind and channel. A TPU runs one in several steps, which name the same
            channel.
    """

    flops: float = 0.0
    local_traffic: float = 0.0
    channels: dict[tuple[str, str], Transfer] = field(default_factory=dict)

    def plus(self, other: Cost) -> Cost:
        """The sum of two costs of one run of a computation, in which each channel is used once."""
        channels = dict(self.channels)
        for name, transfer in other.channels.items():
            channels[name] = max(channels.get(name, transfer), transfer)
        return Cost(self.flops + other.flops, self.local_traffic + other.local_traffic, channels)

    def repeated(self, times: int, name: str) -> Cost:
        """The cost of a loop.

        Args:
            times: how often it runs.
            name: of the loop: other loops may use its channels too.
        """
        channels = {
            (kind, f"{name}/{channel}"): Transfer(times * each.size, times * each.times, each.devices)
            for (kind, channel), each in self.channels.items()
        }
        return Cost(times * self.flops, times * self.local_traffic, channels)

    @property
    def collectives(self) -> dict[str, float]:
        """Bytes of each kind of collective operation."""
        kinds = sorted({kind for kind, _ in self.channels})
        return {kind: sum(each.size for (other, _), each in self.channels.items() if other == kind) for kind in kinds}

    @property
    def runs(self) -> dict[tuple[str, int], int]:
        """How often collective operations run, by their kind and the devices that take part."""
        counts: dict[tuple[str, int], int] = {}
        for (kind, _), each in self.channels.items():
            counts[kind, each.devices] = counts.get((kind, each.devices), 0) + each.times
        return counts

    @property
    def traffic(self) -> float:
        """Bytes read from and written to the device's main memory, at most; collectives read and write theirs."""
        return self.local_traffic + sum(2 * each.size for each in self.channels.values())

    @property
    def wire(self) -> float:
        """Bytes that a device sends: those that are summed over devices and kept by all of them count twice."""
        return sum(((2 if name == "all-reduce" else 1) * size for name, size in self.collectives.items()), 0.0)


def program_cost(text: str) -> Cost:
    """The work of a program.

    Args:
        text: its optimized HLO (``compiled.as_text()``).
    """
    computations, entry = parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1
    known: dict[str, Cost] = {}

    def cost_of(name: str) -> Cost:
        if name not in known:
            program = computations.get(name, {})
            costs = (instruction_cost(place, each, program) for place, each in program.items())
            known[name] = reduce(Cost.plus, costs, Cost())
        return known[name]

    def instruction_cost(name: str, each: Instruction, program: Computation) -> Cost:
        called = CALLED.findall(each.attributes) + [
            branch.strip().lstrip("%") for names in BRANCHES.findall(each.attributes) for branch in names.split(",")
        ]
        kind = each.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            transfer = Transfer(_collective_bytes(each, program), 1, _participants(each, everyone))
            return Cost(channels={(kind, _channel(each, name)): transfer})
        if each.opcode == "fusion":
            inner = computations.get(called[0], {})
            summed = [other for other in inner.values() if other.opcode == "all-reduce"]
            if summed and "all-reduce-scatter" in called[0]:  # a TPU's reduce-scatter
                size = sum((operand.size for operand in _operands(each, program)), 0.0)
                transfer = Transfer(size, 1, _participants(summed[0], everyone))
                return Cost(channels={("reduce-scatter", _channel(summed[0], name)): transfer})
            return replace(cost_of(called[0]), local_traffic=_fusion_traffic(each, inner, program))
        if each.opcode == "while":
            return cost_of(called[0]).repeated(trip_count(each, computations), name)
        if each.opcode in ("call", "conditional", "async-start"):
            return max((cost_of(name) for name in called), key=lambda cost: cost.flops, default=Cost())
        if each.opcode in FREE or each.opcode.endswith(("-done", "-update")):
            return Cost()
        return Cost(_product_flops(each, program), _moved(each, program))

    return cost_of(entry)


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of its entry.

    Args:
        text: its HLO.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif assigned := ASSIGNED.match(line):
            current[assigned[2]] = _instruction(assigned[3], is_root=bool(assigned[1]))
    return computations, entry


def trip_count(loop: Instruction, computations: Mapping[str, Computation]) -> int:
    """How often a loop runs: as the compiler or its scope knows, or the largest constant of its condition; else 1.

    Args:
        loop: a ``while`` instruction.
        computations: of the program.
    """
    if known := re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    if likely := re.search(rf"{TURNS}(\d+)", loop.attributes):
        return int(likely[1])
    condition = re.search(r"condition=%?([\w.-]+)", loop.attributes)
    program = computations.get(condition[1], {}) if condition else {}
    bound = max((_constant(name, program) for name in program), default=0)
    return -(-bound // _increment(loop, program, computations)) if bound else 1


def _increment(loop: Instruction, condition: Computation, computations: Mapping[str, Computation]) -> int:
    """How much an iteration adds to the loop's counter: more than 1 where the compiler has unrolled it."""
    counters = [each for each in condition.values() if each.opcode == "get-tuple-element"]
    body = re.search(r"body=%?([\w.-]+)", loop.attributes)
    program = computations.get(body[1], {}) if body else {}
    root = next((each for each in program.values() if each.is_root), None)
    place = re.search(r"index=(\d+)", counters[0].attributes) if counters else None
    if root is None or place is None or int(place[1]) >= len(root.operands):
        return 1
    total, name = 0, root.operands[int(place[1])]
    while name in program and program[name].opcode in ("add", "copy", "bitcast"):
        first, *others = program[name].operands
        steps = [_constant(other, program) for other in (first, *others)]
        total += max(steps)
        name = others[0] if others and steps[0] else first
    return max(total, 1)


def _constant(name: str, program: Computation) -> int:
    """The value of a whole number above 0; 0 for other instructions."""
    each = program.get(name)
    return int(each.arguments) if each is not None and each.opcode == "constant" and each.arguments.isdigit() else 0


def _channel(each: Instruction, name: str) -> str:
    channel = re.search(r"channel_id=(\d+)", each.attributes)
    return channel[1] if channel else name


def _participants(each: Instruction, everyone: int) -> int:
    """Devices of each group of a collective; two, of a permutation."""
    if "source_target_pairs" in each.attributes:
        return 2
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", each.attributes):
        return len(listed[1].split(","))
    counted = re.search(r"replica_groups=\[(?:\d+,)*(\d+)\]<=", each.attributes)
    return int(counted[1]) if counted else everyone


def _instruction(text: str, *, is_root: bool) -> Instruction:
    """An instruction from its line behind the equals sign: ``type opcode(operands), attributes``."""
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, rest = text[:end], text[end:].lstrip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    arguments = rest[opening + 1 : closing - 1]
    arrays = tuple(_array(*found) for found in ARRAY.findall(shape) if found[0] in ITEM_BYTES)
    names = tuple(OPERAND.findall(arguments))
    return Instruction(rest[:opening], arrays, arguments, names, rest[closing:], is_root)


def _closing(text: str) -> int:
    """The place behind the parenthesis that closes the first character."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place + 1
    return len(text)


def _array(dtype: str, dimensions: str, layout: str) -> Array:
    shape = tuple(int(each) for each in dimensions.split(",") if each)
    return Array(shape, float(ITEM_BYTES[dtype] * math.prod(shape)), "S(" in layout)


def _operands(each: Instruction, program: Computation) -> list[Instruction]:
    return [program[name] for name in each.operands if name in program]


def _collective_bytes(each: Instruction, program: Computation) -> float:
    """Bytes of a collective: of its result if it gathers, else of its operands."""
    gathers = each.opcode.startswith(("all-gather", "collective-broadcast"))
    given = sum((operand.size for operand in _operands(each, program)), 0.0)
    return each.size - given * each.opcode.endswith("-start") if gathers else given


def _moved(each: Instruction, program: Computation) -> float:
    """Bytes that an instruction reads and writes: slices of arrays, where it takes or updates a slice."""
    operands = _operands(each, program)
    if each.opcode in ("slice-start", "copy-start") and len(each.arrays) > 1:  # the result beside the operand
        copied = each.arrays[1 if each.opcode == "slice-start" else 0]
        return copied.size * ((not copied.is_near) + (operands[0].stored > 0 if operands else 1))
    if each.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * each.stored
    if each.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * operands[-1 if each.opcode == "scatter" else 1].stored
    return each.stored + sum(operand.stored for operand in operands)


def _fusion_traffic(each: Instruction, inner: Computation, program: Computation) -> float:
    """Bytes that a fusion reads and writes; of an operand that it only slices or updates, the slice.

    A result in the place of an operand, such as one that another engine fills meanwhile, is not written.
    """
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?)\}(?:,|$) ?\w", each.attributes + ", x")
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", aliases[1]) if aliases else []
    kept_results, kept_operands = {int(place or 0) for place, _ in pairs}, {int(number) for _, number in pairs}
    users: dict[str, list[Instruction]] = {}
    for other in inner.values():
        for name in other.operands:
            users.setdefault(name, []).append(other)
    parameters = {int(other.arguments): name for name, other in inner.items() if other.opcode == "parameter"}
    total = 0.0
    for number, operand in enumerate(_operands(each, program)):
        uses, name = users.get(parameters.get(number, ""), []), parameters.get(number)
        if number in kept_operands and not any(use.opcode == "dynamic-slice" for use in uses):
            continue
        if uses and all(use.opcode in ("dynamic-slice", "gather") and use.operands[0] == name for use in uses):
            total += min(operand.stored, sum(use.size for use in uses))
        elif not all(use.opcode == "dynamic-update-slice" and use.operands[0] == name for use in uses) or not uses:
            total += operand.stored
    roots = [other for other in inner.values() if other.is_root]
    results = [r for root in roots for r in (_operands(root, inner) if root.opcode == "tuple" else [root])]
    for place, (result, array) in enumerate(zip(results, each.arrays, strict=False)):
        while result.opcode == "bitcast" and result.operands[0] in inner:
            result = inner[result.operands[0]]
        is_update = result.opcode == "dynamic-update-slice"
        written = inner[result.operands[1]].size if is_update else 0 if place in kept_results else array.size
        total += 0 if array.is_near else written
    return total


def _product_flops(each: Instruction, program: Computation) -> float:
    """Floating-point operations of a matrix product, grouped or not, or convolution; 0 for others."""
    if each.opcode == "custom-call" and GROUPED.search(each.attributes):  # by the rows that experts have in all
        counted = re.search(r'"flops":"?(\d+)', each.attributes)
        return float(counted[1]) if counted else 0.0
    operands = _operands(each, program)
    if each.opcode == "dot" and operands:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        lhs = operands[0].arrays[0].shape
        size = math.prod(lhs[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
        return 2.0 * math.prod(each.arrays[0].shape) * size
    if each.opcode == "convolution" and len(operands) == 2:
        return 2.0 * math.prod(each.arrays[0].shape) * _terms(each, operands[0], operands[1])
    return 0.0


def _terms(each: Instruction, lhs: Instruction, rhs: Instruction) -> float:
    """Products that each entry of a convolution sums.

    A TPU's matrix products are convolutions too, with axes of the batch as padded windows, most of whose places are
    outside of the other operand.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    total = float(rhs.arrays[0].shape[labels[2].index("i")])
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    sizes = settings.get("size", "").split("x") if settings.get("size") else []

    def of(name: str, axis: int, default: str) -> list[int]:
        values = settings[name].split("x")[axis] if name in settings else default
        return [int(value) for value in values.split("_")]

    for axis, size in enumerate(sizes):
        count, out = (x.arrays[0].shape[labels[n].index(str(axis))] for x, n in ((lhs, 1), (each, 3)))
        pad, stride = of("pad", axis, "0_0")[0], of("stride", axis, "1")[0]
        lhs_dilate, rhs_dilate = of("lhs_dilate", axis, "1")[0], of("rhs_dilate", axis, "1")[0]
        places = (o * stride + k * rhs_dilate - pad for o in range(out) for k in range(int(size)))
        total *= sum(0 <= p <= (count - 1) * lhs_dilate and p % lhs_dilate == 0 for p in places) / out
    return total

r"""Whether a run fits its devices, and how fast it will be: its programs by the real compiler, without the hardware.

    python experiments/plan.py grpo r1-zero-gsm8k --topology v5e:4x4 --picture plan.png
    python experiments/plan.py grpo --model-config path/to/config.json --topology v5p:2x2x4 --price 4.2 \
        --num-prompts 16 --group-size 16 --max-prompt-length 512 --max-completion-length 1024
    python experiments/plan.py ppo --model path/to/folder --accuracy-weight 1 --topology h100:8 --mesh.fsdp 8
    python experiments/plan.py sft --model path/to/folder --topology v5e:2x4 --meshes fsdp=8 fsdp=4,tensor=2

The first argument is an experiment (grpo, ppo, sft, dpo, reward_model); then come a preset or the flags of the
experiment, as its own script takes them, and the flags of the plan, below. Of the model only its config.json is read.

Each program of a step is compiled as the run compiles it: reshard, prefill, decode steps, frozen-policy
log-probabilities and updates. Tables on stderr show what is in memory at the same time, by kind, and the seconds that
products, memory traffic and transfers take at the devices' published speeds: a step takes at least the longest of each
program, and at most their sum if transfers are as fast as published. One JSON line on stdout has all of it.

Without --mesh.* and --meshes, the meshes of the topology are ranked by arithmetic and the first are compiled. The TPU
compiler comes with the extra "tpu", the CUDA compiler with "cuda13".
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from rich.console import Console

from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.memory import choose_rollout_tensor
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.presets import SCRIPTS
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.run import MeshConfig, check_divides, require_at_least
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.speeds import Rates, capacity_of, rates_of
from grpo_jax.devices import planning_for
from grpo_jax.loop.command import DEBUG, run_command
from grpo_jax.loop.compilation import reporting_compilations
from grpo_jax.loop.flags import Flag, flags_of
from grpo_jax.loop.topologies import topology_devices

if TYPE_CHECKING:
    from grpo_jax.loop.plan import Plan

WIDTH = 150
"""Of the tables where stderr is not a terminal."""
EXPERIMENTS: Mapping[str, type] = {
    "dpo": DPOConfig,
    "grpo": GRPOConfig,
    "ppo": PPOConfig,
    "reward_model": RewardModelConfig,
    "sft": SFTConfig,
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Devices, assumptions and output of a plan."""

    topology: str
    """Devices to compile for: a TPU slice (v4, v5e, v5p or v6e, as in v5e:4x4), GPUs (a100, h100 or h200, as in h100:8,
    or h100:2x8 for hosts x GPUs), or cpu:N."""
    model_config: Path | None = None
    """A Hugging Face config.json, in the place of --model."""
    meshes: tuple[str, ...] = ()
    """Meshes to compare, such as fsdp=16 and fsdp=4,tensor=4. Default: that of --mesh.*, or a search."""
    num_meshes: int = 2
    """Meshes that are compiled by a search: the first by arithmetic."""
    mean_prompt_length: float | None = None
    """Mean prompt length in tokens; lengths are evenly spread around it. Default: the maximum, the worst case."""
    mean_completion_length: float | None = None
    """Mean completion length in tokens; lengths are evenly spread around it. Default: the maximum, the worst case."""
    price: float | None = None
    """Price of a device for an hour."""
    picture: Path | None = None
    """File for a picture of the best mesh."""
    output: Path | None = None
    """File for the JSON line, which is printed too."""
    compiler_options: tuple[str, ...] = ()
    """Options of the compiler in addition to those of the run, such as exec_time_optimization_effort=-1."""

    def __post_init__(self):
        require_at_least(self, num_meshes=1, mean_prompt_length=1, mean_completion_length=1, price=0)
        for option in self.compiler_options:
            if "=" not in option:
                raise ValueError(f"compiler_options: {option!r} is not name=value")
        for path in (self.picture, self.output):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{path} cannot be written: the folder {path.parent} does not exist")

    @property
    def options(self) -> dict[str, Any] | None:
        """Compiler options in effect."""
        pairs = dict(option.split("=", 1) for option in self.compiler_options)
        return {name: float(x) if x.lstrip("-").replace(".", "").isdigit() else x for name, x in pairs.items()} or None


class Arguments(NamedTuple):
    """Arguments of the command: of the plan, of the experiment, and its name."""

    experiment: str | None
    own: list[str]
    others: list[str]


def split(args: Sequence[str]) -> Arguments:
    """Tell the plan's flags from those of the experiment, which comes first."""
    experiment = args[0] if args and not args[0].startswith("-") else None
    own, others = [], []
    target = others
    for arg in args[experiment is not None :]:
        if arg.startswith("--"):
            name = arg.partition("=")[0].replace("_", "-")
            is_own = name in {flag.flag for flag in own_flags()} or experiment is None
            target = own if is_own else others
        if arg in (DEBUG, "--help", "-h", "--help-all", "--help-rare"):
            own.append(arg)
            if arg == DEBUG:
                others.append(arg)
        else:
            target.append(arg)
    return Arguments(experiment, own, others)


def own_flags() -> list[Flag]:
    return flags_of(PlanConfig)


def main(config: PlanConfig, arguments: Arguments) -> int:
    """Plan a run, and return the exit status: 0 also if it does not fit."""
    name, args = arguments.experiment, list(arguments.others)
    if name is None or name not in EXPERIMENTS:
        known = ", ".join(EXPERIMENTS)
        problem = "no experiment is named" if name is None else f"{name!r} is not an experiment"
        raise ValueError(f"{problem}; the first argument must be one of {known}")
    if any(arg.startswith("--distributed") for arg in args):
        raise ValueError("--distributed connects the processes of a run; a plan is made by one, for all devices")
    with tempfile.TemporaryDirectory() as folder:
        if config.model_config is not None:
            if any(arg.partition("=")[0] == "--model" for arg in args):
                raise ValueError("model_config is set, and so is --model; name one of them")
            if not config.model_config.is_file():
                raise ValueError(f"model_config: the file {config.model_config} does not exist")
            shutil.copyfile(config.model_config, Path(folder) / "config.json")
            args += ["--model", folder]
        devices = topology_devices(config.topology)
        if devices[0].platform != "cpu":  # programs for devices that are not there cannot be read from the cache
            jax.config.update("jax_enable_compilation_cache", False)
        with planning_for(devices, capacity_of(devices)):
            return run_command(
                EXPERIMENTS[name],
                partial(plan, config, name, has_mesh=any(arg.startswith("--mesh.") for arg in args)),
                description=f"The flags of {name}.py.",
                presets=SCRIPTS[name],
                args=args,
            )


def plan(config: PlanConfig, experiment: str, run: Any, *, has_mesh: bool) -> int:
    """Compile and report the plan of a run, or of several meshes of it."""
    from grpo_jax.loop.plan_report import best_first, draw_plan, facts_of, show_plan, show_ranking, to_json
    from grpo_jax.loop.plan_search import rank_meshes, read_meshes
    from grpo_jax.loop.planned_model import hf_config_of

    devices = topology_devices(config.topology)
    console = Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)
    rates, capacity = rates_of(devices), capacity_of(devices)
    check_lengths(config, run)
    if isinstance(run, GRPOConfig) and run.rollout_mesh is not None:
        raise ValueError(
            f"rollout_mesh is {run.rollout_mesh}; plans are of devices that sample and train in turn: leave it out"
        )
    hf_config_of(run)
    meshes = [run.mesh]
    if config.meshes:
        if has_mesh:
            raise ValueError("--meshes is set, and so is --mesh.*; name one of them")
        meshes = read_meshes(config.meshes, len(devices))
    elif not has_mesh and run.mesh == MeshConfig():
        ranked = rank_meshes(run, len(devices), limit=capacity, rates=rates)
        meshes = [each.mesh for each in ranked[: config.num_meshes]]
        first = ", ".join(f"{name} {size}" for name, size in vars(meshes[0]).items() if size)
        console.print(f"{len(ranked)} meshes suit the run, the first by arithmetic is {first}", highlight=False)
    check_meshes(run, meshes, len(devices))
    plans = best_first(compiled(config, run, meshes, rates, capacity, console))
    name = named(config, run)
    for each in reversed(plans):
        title = f"{experiment} of {name} on {len(devices)} {devices[0].device_kind} ({config.topology}), {each.mesh}, "
        title += f"{each.num_micro_batches} micro-batch{'es' if each.num_micro_batches > 1 else ''} an update"
        facts = facts_of(each, price=config.price, device=devices[0].device_kind, length=assumption(config, run))
        show_plan(each, console, title=title, facts=facts)
    if len(plans) > 1:
        show_ranking(plans, console)
    if config.picture is not None:
        draw_plan(plans[0], config.picture, title=f"{experiment}, {name}, {config.topology}, {plans[0].mesh}")
    line = json.dumps(
        {
            "plan": experiment,
            "model": name,
            "topology": config.topology,
            "devices": f"{len(devices)} x {devices[0].device_kind}",
            "lengths": assumption(config, run),
            "figures": "by the compiler and published speeds, not measured",
            "meshes": [to_json(each, price=config.price) for each in plans],
        }
    )
    print(line)
    if config.output is not None:
        config.output.write_text(line + "\n")
    return 0


def compiled(
    config: PlanConfig,
    run: Any,
    meshes: Sequence[MeshConfig],
    rates: Rates | None,
    capacity: int | None,
    console: Console,
) -> list[Plan]:
    """The plan of each mesh."""
    from grpo_jax.loop.plan import make_plan

    plans, said = [], ""
    with console.status(said) as status:

        def say(text: str) -> None:
            nonlocal said
            said = f"mesh {len(plans) + 1} of {len(meshes)}: {text}"
            status.update(said)

        with reporting_compilations(lambda program: status.update(said + (f" ({program})" if program else ""))):
            for mesh in meshes:
                made = make_plan(
                    replace(run, mesh=mesh),
                    mesh.build(),
                    rates=rates,
                    capacity=capacity,
                    mean_prompt_length=config.mean_prompt_length,
                    mean_completion_length=config.mean_completion_length,
                    options=config.options,
                    say=say,
                )
                plans.append(made)
    return plans


def check_meshes(run: Any, meshes: Sequence[MeshConfig], num_devices: int) -> None:
    """Check all meshes before anything is compiled.

    Raises:
        ValueError: one does not fit the devices, the model or the batch.
    """
    from grpo_jax.loop.plan import check_layout
    from grpo_jax.loop.planned_model import decoder_of, hf_config_of
    from grpo_jax.models import param_shapes
    from grpo_jax.models.mesh_checks import check_mesh, check_rollout_tensor
    from grpo_jax.sharding import param_shardings, rollout_mesh

    decoder = decoder_of(run, hf_config_of(run))
    shapes = param_shapes(decoder)
    for mesh in meshes:
        built = mesh.build()
        if built.size != num_devices:
            raise ValueError(f"the mesh takes {built.size} of the {num_devices} devices of --topology")
        param_shardings(shapes, built)
        check_mesh(decoder, built)
        tried = replace(run, mesh=mesh)
        check_layout(tried)
        if isinstance(run, GRPOConfig | PPOConfig):
            tensor = choose_rollout_tensor(tried, decoder, built.shape)
            check_rollout_tensor(decoder, tensor)
            sampling = rollout_mesh(built, tensor)
            check_divides(run.num_completions, sampling, "num_prompts x group_size, in the sampler")


def lengths_of(config: PlanConfig, run: GRPOConfig | PPOConfig) -> list[tuple[str, float | None, int]]:
    """Name, mean (None if not set) and maximum of the lengths of prompts and of completions."""
    return [
        ("prompt", config.mean_prompt_length, run.prompt_length),
        ("completion", config.mean_completion_length, run.completion_length),
    ]


def check_lengths(config: PlanConfig, run: Any) -> None:
    if not isinstance(run, GRPOConfig | PPOConfig):
        for name, mean in (("prompt", config.mean_prompt_length), ("completion", config.mean_completion_length)):
            if mean is not None:
                raise ValueError(f"--mean-{name}-length is for experiments that sample; this one trains on rows")
        return
    for name, mean, limit in lengths_of(config, run):
        if mean is not None and mean > limit:
            raise ValueError(f"--mean-{name}-length is {mean:g}; max_{name}_length is {limit}")


def assumption(config: PlanConfig, run: Any) -> str:
    """The lengths in words."""
    if not isinstance(run, GRPOConfig | PPOConfig):
        return f"every row has {run.sequence_length} tokens"
    parts = []
    for name, mean, most in lengths_of(config, run):
        said = f"all of the longest, {most}" if mean is None else f"evenly spread around {mean:g}, at most {most}"
        parts.append(f"{name}s {said}")
    return f"{run.num_prompts} prompts x {run.group_size}; {', '.join(parts)} tokens"


def named(config: PlanConfig, run: Any) -> str:
    """The name of the model."""
    return run.model if config.model_config is None else config.model_config.stem


def command(args: Sequence[str]) -> int:
    """Run the command with its arguments, those of the experiment among them."""
    arguments = split(args)
    return run_command(PlanConfig, partial(main, arguments=arguments), description=__doc__, args=arguments.own)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))

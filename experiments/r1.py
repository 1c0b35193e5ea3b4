r"""The training pipeline of DeepSeek-R1: cold start, reasoning RL, rejection sampling, SFT, final RL; and R1-Zero.

Without arguments it runs on a toy model, on one CPU. The base model works out sums in two languages or guesses, and
answers errands carelessly. R1-Zero learns to work out sums but mixes languages; the pipeline should end with a model
that thinks in one language and is also better at errands. For real models:

    python experiments/r1.py
    python experiments/r1.py --model Qwen/Qwen2.5-1.5B --dataset openai/gsm8k --target-language en \
        --cold-start.dataset long_thoughts.jsonl --general chats.jsonl --preferences.dataset preferences.jsonl \
        --general-data.dataset prompts.jsonl --general-data.grader none

Each stage is a run with its own folder in run_dir; the same command resumes at the stage and step where it stopped.
After DeepSeek-AI, arXiv 2501.12948, section 2.3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.prompts import with_format
from grpo_jax.config.r1 import PRESETS, TOY_GENERAL, R1Config
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop.batch_inference import PROVENANCE, read_provenance
from grpo_jax.loop.command import run_command
from grpo_jax.loop.comparison import draw_stages
from grpo_jax.loop.eval_report import read_report
from grpo_jax.loop.offline_data import load_demonstration_sets, load_preference_sets
from grpo_jax.loop.problems import load_problem_sets
from grpo_jax.loop.run import Run
from grpo_jax.loop.stages import Stage, run_stages
from grpo_jax.tasks.errands import careless_reply, sample_errands
from grpo_jax.tasks.toy_config import TOY

SCRIPTS = Path(__file__).parent
CARELESS_REPLIES = 256
REASONING, GENERAL = "reasoning", "general"
MODELS = ("base", "r1_zero", "cold_start", "reasoning", "sft", "final")
FIGURES = {
    (REASONING, "pass@1"): "pass@1",
    (REASONING, "maj@16"): "maj@16",
    (REASONING, "rewards/format"): "format",
    (REASONING, "rewards/language"): "language",
    (REASONING, "mean_length"): "length",
    (GENERAL, "rewards/reward_model"): "reward model",
    (GENERAL, "rewards/accuracy"): "general quality",
}


def main(config: R1Config) -> int:
    """Run or resume; returns exit status 0 if all stages finished, 75 or 130 if one was stopped."""
    return run_stages(config, chain, write_summary, title="R1", check=check_data)


def chain(config: R1Config) -> list[Stage]:
    """All stages, in order."""
    stage_config, folder = config.stage_config, config.folder
    is_toy = config.general == TOY_GENERAL
    general = config.run_dir / "general.jsonl" if is_toy else Path(str(config.general))
    tasks = write_tasks(config)
    if is_toy:
        write_careless_replies(general, config.seed)

    def reasoned(stage: Any, name: str, start: str, **changes: Any) -> Any:
        return stage_config(stage, name, start, **config.reasoned(stage), **changes)

    sampling = reasoned(config.rejection, "rejection_sampling", "reasoning", demonstrations=(general,))
    judge = [] if config.general_reward_model else [folder("reward_model")]
    return [
        Stage(SCRIPTS / "sft.py", stage_config(config.cold_start, "cold_start", None)),
        Stage(SCRIPTS / "grpo.py", reasoned(config.zero, "r1_zero", "base"), config.made_in("base")),
        Stage(SCRIPTS / "grpo.py", reasoned(config.reasoning, "reasoning", "cold_start"), config.made_in("cold_start")),
        Stage(SCRIPTS / "rejection_sampling.py", sampling, config.made_in("reasoning")),
        Stage(
            SCRIPTS / "sft.py",
            stage_config(config.second_sft, "sft", "base", data=second_sft_data(config)),
            [folder("rejection_sampling")],
        ),
        *(
            Stage(
                SCRIPTS / "reward_model.py",
                stage_config(config.preferences, "reward_model", "sft"),
                config.made_in("sft"),
            )
            for _ in judge
        ),
        Stage(
            SCRIPTS / "grpo.py", reasoned(config.final, "final", "sft", tasks=tasks), [*config.made_in("sft"), *judge]
        ),
        *(evaluation_stage(config, model, of) for model in MODELS for of in (REASONING, GENERAL)),
    ]


def check_data(config: R1Config) -> None:
    """Read the data of all stages, so that errors are found before the first stage starts.

    Raises:
        Exception: as the stage that reads the data.
    """
    for data in (config.data, config.general_data):
        load_problem_sets(data, config.seed)
    load_demonstration_sets(config.cold_start.data, config.seed)
    if config.general != TOY_GENERAL:
        load_demonstrations(str(config.general))
    if config.general_reward_model is None:
        load_preference_sets(config.preferences.data, config.seed)


def second_sft_data(config: R1Config) -> DemonstrationConfig:
    """Data settings of the second SFT, with the prompt format of its rejection samples."""
    folder = config.folder("rejection_sampling")
    data = replace(config.second_sft.data, dataset=str(folder / "dataset.jsonl"))
    if config.model == TOY or not (folder / PROVENANCE).exists():  # not sampled yet
        return data
    return with_format(data, read_provenance(folder)["prompt_format"])


def evaluation_stage(config: R1Config, model: str, of: str) -> Stage:
    """Evaluation of a stage's model, that of ``final`` against R1-Zero.

    Args:
        config: the pipeline.
        model: one of ``MODELS``.
        of: ``REASONING`` or ``GENERAL`` problems.
    """
    general_rewards = RewardConfig(accuracy_weight=0.0, reward_model=config.judge)
    general = {"data": config.general_data, "rewards": general_rewards}
    against = config.folder(f"evaluation/r1_zero_{of}") if model == "final" else None
    changes = config.reasoned(config.evaluation) if of == REASONING else general
    judge = [config.folder("reward_model")] if of == GENERAL and not config.general_reward_model else []
    return Stage(
        SCRIPTS / "evaluate.py",
        config.stage_config(config.evaluation, f"evaluation/{model}_{of}", model, against=against, **changes),
        [*config.made_in(model), *judge, *([] if against is None else [against])],
    )


def write_careless_replies(path: Path, seed: int) -> None:
    """Write the toy preset's general demonstrations: careless replies to errands."""
    rng = np.random.default_rng([seed, 2])
    errands = sample_errands(rng, CARELESS_REPLIES, held_out=False)
    rows = [{"prompt": errand.question, "completion": careless_reply(errand, rng)} for errand in errands]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_tasks(config: R1Config) -> Path:
    """Write the mixture file of the final RL. Its name has a digest, so that a changed mixture changes the stage."""
    rules = dataclasses.asdict(config.reasoned(config.final)["rewards"])
    general_rewards = dataclasses.asdict(RewardConfig(accuracy_weight=0.0, reward_model=config.judge))
    tasks = {
        REASONING: {**dataclasses.asdict(config.data), **rules},
        GENERAL: {**dataclasses.asdict(config.general_data), **general_rewards},
    }
    data = json.dumps(to_json(tasks), indent=2).encode() + b"\n"
    path = config.run_dir / f"final_tasks_{hashlib.sha256(data).hexdigest()[:8]}.json"
    write_atomically(path, data)
    return path


def write_summary(config: R1Config, run: Run) -> None:
    """Print a table of all stages' metrics, plot them, and write the summary."""
    reports = {
        (model, of): read_report(config.folder(f"evaluation/{model}_{of}"))
        for model in MODELS
        for of in (REASONING, GENERAL)
    }
    stages = {
        model: {
            label: reports[model, of]["figures"][name]["mean"]
            for (of, name), label in FIGURES.items()
            if name in reports[model, of]["figures"]
        }
        for model in MODELS
    }
    labels = list(dict.fromkeys(label for figures in stages.values() for label in figures))
    table = Table("model", *labels, title="held-out metrics after each stage")
    for model, figures in stages.items():
        table.add_row(model, *(f"{figures[label]:.3f}" if figures.get(label) is not None else "-" for label in labels))
    run.progress.console.print(table)
    against = {
        of: {
            name: {key: metric[key] for key in ("before", "after", "difference", "low", "high", "p")}
            for name, metric in reports["final", of]["comparison"]["figures"].items()
        }
        for of in (REASONING, GENERAL)
    }
    draw_stages([stages], run.folder / "stages.png")
    run.write_summary({"stages": stages, "final_against_r1_zero": against, "seed": config.seed})


if __name__ == "__main__":
    sys.exit(run_command(R1Config, main, presets=PRESETS, description=__doc__))

"""Supervised fine-tuning on demonstrations.

Without arguments it teaches the toy model, which mostly answers at once, to work out sums from 256 examples, on one CPU
in two minutes. For real models:

    python experiments/sft.py
    python experiments/sft.py --model Qwen/Qwen2.5-0.5B --dataset open-r1/OpenR1-Math-220k --chat-template
    python experiments/sft.py --model path/to/folder --dataset chats.jsonl --chat-template --train-on assistant

Rows are conversations (messages), prompts with completions, or texts; they are packed into sequences of one length and
do not attend to each other. With a column answer, completions of held-out prompts are graded.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import jax
import numpy as np

from grpo_jax import models
from grpo_jax.config.sft import PRESETS, SFTConfig
from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.encoded import EncodedProblems, decode_completions
from grpo_jax.data.packing import PackedBatches
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import Rendering, template_columns
from grpo_jax.loop.checks import check_length
from grpo_jax.loop.command import run_command
from grpo_jax.loop.offline import packed_lengths, train_offline
from grpo_jax.loop.offline_data import encode_demonstration_set, load_demonstration_sets, load_sets
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import (
    adapters_of,
    load_model,
    load_policy,
    make_sampler,
    model_facts,
    rollout_layout,
    sample_all,
    start_model,
)
from grpo_jax.loss import supervised_loss
from grpo_jax.monitor.samples import Sample
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.sharding import shard_rows
from grpo_jax.train import packed_log_probs
from grpo_jax.types import Packed, Params


def main(config: SFTConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, train, title="SFT")


def train(config: SFTConfig, run: Run) -> None:
    mesh = config.mesh.build()
    demonstrations, held_out = load_sets(config, run, load_demonstration_sets)
    start = start_model(config, run, seed=config.seed)
    policy = load_policy(config, start, mesh, **adapters_of(config))
    check_length(config.row_length, policy, "max_length")
    rendering = resolve_rendering(config.data, policy, say=run.say, today=run.start_date)
    batches = pack(config, run, demonstrations, policy, rendering, config.num_epochs)
    held_out_batches = pack(config, run, held_out, policy, rendering, 1)
    prompts = held_out_prompts(config, held_out, policy, rendering)

    def loss_fn(params: Params, batch: Packed):
        return supervised_loss(packed_log_probs(policy.model, params, batch), batch.loss_mask), {}

    optimizer, schedule = config.optimizer.build(total_updates=len(batches))
    prepare = policy.model.preparation.prepare
    held_out_loss = jax.jit(lambda params, batch: loss_fn(prepare(params), batch)[0])
    layout = rollout_layout(config, policy, mesh)
    sampler = make_sampler(config, policy, layout, group_size=config.eval_samples)
    run.describe(
        {
            **model_facts(config, start, policy, mesh),
            "data": f"{config.data.dataset}: {len(demonstrations)} demonstrations, {len(held_out)} held out",
            "lengths": f"{config.row_length} tokens a row, {config.num_sequences} rows an update",
            "loss": f"on {config.data.train_on}, {config.num_epochs} epochs",
            "updates": f"{len(batches)} in all; " + config.optimizer.description,
        }
    )
    run.say(f"{len(batches)} updates; {batches.packing_efficiency:.0%} of the positions in a row hold a token")
    evaluation = jax.random.key(config.seed)

    def evaluate(params: Params, step: int) -> dict[str, Any]:
        with run.progress.phase("evaluation", len(held_out_batches) + len(prompts)) as phase:
            parts = []
            for n in range(len(held_out_batches)):
                parts.append(held_out_loss(params, shard_rows(held_out_batches[n], mesh)))
                phase.update(n + 1)
                run.stop_if_requested()
            loss = sum(float(part.sum) for part in parts) / sum(float(part.count) for part in parts)
            metrics = {"eval/loss": loss, "eval/perplexity": math.exp(loss)}
            if len(prompts):
                key = jax.random.fold_in(evaluation, step)
                rollout = sample_all(sampler, layout.reshard(params), prompts, key)
                completions = decode_completions(policy.tokenizer, rollout, policy.eos_ids)
                lengths = np.asarray(rollout.completion_mask).sum(1)
                metrics |= grade(prompts, completions, lengths, config.eval_samples)
                phase.update(len(held_out_batches) + len(prompts))
                samples = as_samples(prompts, completions, config.eval_samples)
                run.log_samples(step, samples, shown=samples[:: config.eval_samples][:4])
        return metrics

    train_offline(
        config,
        run,
        mesh,
        title="SFT",
        model=policy,
        loss_fn=loss_fn,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        digest=batches.digest,
        evaluate=evaluate,
        evaluated="eval/loss",
        prompt_format=prompt_format_of(rendering, policy.tokenizer),
        reload=lambda: load_model(config, start, mesh, **adapters_of(config)).params,
        lengths=packed_lengths,
    )


def pack(
    config: SFTConfig,
    run: Run,
    demonstrations: list[Demonstration],
    policy: models.Pretrained,
    rendering: Rendering,
    epochs: int,
) -> PackedBatches:
    examples, dropped = encode_demonstration_set(
        config.data, demonstrations, policy, max_length=config.row_length, rendering=rendering
    )
    if dropped:
        run.say(f"{dropped} of {len(demonstrations)} demonstrations dropped: over {config.row_length} tokens")
    return PackedBatches(
        examples,
        num_sequences=config.num_sequences,
        length=config.row_length,
        num_epochs=epochs,
        seed=config.seed,
        packing=config.packing,
        pad_id=policy.pad_id,
    )


def held_out_prompts(
    config: SFTConfig, held_out: list[Demonstration], policy: models.Pretrained, rendering: Rendering
) -> EncodedProblems:
    """Prompts to sample completions for in evaluations, each with its demonstrated completion."""
    rows = [row for row in held_out if row.prompt][: config.num_eval_prompts]
    problems = [
        Problem(
            row.prompt,
            as_text(row.columns.get("answer")),
            {"demonstrated": row.completion, **template_columns(row.columns)},
        )
        for row in rows
    ]
    return EncodedProblems(
        problems,
        policy.tokenizer,
        max_prompt_length=config.prompt_length,
        pad_id=policy.pad_id,
        **rendering,
    )


def as_text(answer: Any) -> str | None:
    return None if answer is None else str(answer)


def grade(prompts: EncodedProblems, completions: list[str], lengths: np.ndarray, samples: int) -> dict[str, float]:
    """``eval/mean_length`` in tokens, and ``eval/pass@1`` if there are gold answers.

    Args:
        prompts: prompts with gold answers.
        completions: ``samples`` completions of each prompt, in order.
        lengths: their lengths in tokens.
        samples: completions per prompt.
    """
    answers = [problem.answer for problem in prompts.problems for _ in range(samples)]
    texts = [text for text in prompts.texts for _ in range(samples)]
    scores = math_reward(texts, completions, answer=answers)
    right = [score == 1 for score in scores if score is not None]
    metrics = {"eval/mean_length": float(lengths.mean())}
    return metrics | ({"eval/pass@1": float(np.mean(right))} if right else {})


def as_samples(prompts: EncodedProblems, completions: list[str], samples: int) -> list[Sample]:
    return [
        Sample(
            prompt=prompts.texts[n // samples],
            completion=completion,
            answer=prompts.problems[n // samples].columns["demonstrated"],
        )
        for n, completion in enumerate(completions)
    ]


if __name__ == "__main__":
    sys.exit(run_command(SFTConfig, main, presets=PRESETS, description=__doc__))

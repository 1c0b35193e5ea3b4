r"""DPO: direct preference optimization, without a reward model and without sampling.

Without arguments it trains the toy model on preferences between replies to the toy task errands, on one CPU in three
minutes. For real models:

    python experiments/dpo.py
    python experiments/dpo.py --model runs/sft/model --dataset preferences.jsonl --beta 0.1 --run-dir runs/dpo
    python experiments/dpo.py --model path/to/folder --dataset preferences.jsonl --loss ipo
    python experiments/dpo.py --model path/to/folder --dataset preferences.jsonl --reference-free --per-token --beta 2 \
        --target-margin 1

The last command is SimPO. The reference's log-probabilities are computed once before training, after which the
reference is freed. After Rafailov et al. (arXiv 2305.18290).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config.dpo import PRESETS, DPOConfig
from grpo_jax.data.encoded import EncodedProblems, decode_completions
from grpo_jax.data.iterator import padded_batches
from grpo_jax.data.preferences import EncodedPreferences, PairBatches
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import template_columns
from grpo_jax.hosts import fetch, on_main
from grpo_jax.jsonl import write_atomically
from grpo_jax.loop.command import run_command
from grpo_jax.loop.losses import preference_loss
from grpo_jax.loop.offline import pair_lengths, train_offline
from grpo_jax.loop.offline_data import encode_preference_sets, load_preference_sets, load_sets
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
from grpo_jax.masked import masked_sum
from grpo_jax.monitor.samples import Sample
from grpo_jax.rewards.compose import RewardFn, as_reward_outputs
from grpo_jax.rewards.plugin import import_reward
from grpo_jax.sharding import shard_rows
from grpo_jax.train import pair_log_probs, trainable_part
from grpo_jax.types import Pairs, Params


def main(config: DPOConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, train, title="DPO")


def train(config: DPOConfig, run: Run) -> None:
    mesh = config.mesh.build()
    sets = load_sets(config, run, load_preference_sets)
    judge = None if config.judge is None else import_reward(config.judge)
    start = start_model(config, run, seed=config.seed)
    policy = load_policy(config, start, mesh, **adapters_of(config))
    rendering = resolve_rendering(config.data, policy, say=run.say, today=run.start_date)
    pairs, held_out_pairs = encode_preference_sets(run, sets, policy, lengths=config.lengths, rendering=rendering)
    batches = PairBatches(pairs, num_pairs=config.num_pairs, num_epochs=config.num_epochs, seed=config.seed)
    rows = held_out_pairs.preferences[: config.num_eval_prompts]
    prompts = EncodedProblems(
        [Problem(row.prompt, None, {"chosen": row.chosen, **template_columns(row.columns)}) for row in rows],
        policy.tokenizer,
        max_prompt_length=config.prompt_length,
        pad_id=policy.pad_id,
        **rendering,
    )

    log_probs, prepare = partial(pair_log_probs, policy.model), policy.model.preparation.prepare
    sums = jax.jit(lambda params, batch: masked_sum(log_probs(prepare(params), batch), batch.completion_mask, 2))
    sums_of = partial(sums_of_pairs, config, run, mesh, sums)
    reference = held_out_reference = None
    if not config.reference_free:
        run.checkpoints.require_space(trainable_part(policy.params))
        reference, held_out_reference = (
            reference_log_probs(run, name, partial(sums_of, policy.params), data)
            for name, data in (("reference", pairs), ("held_out_reference", held_out_pairs))
        )

    optimizer, schedule = config.optimizer.build(total_updates=len(batches))
    layout = rollout_layout(config, policy, mesh)
    sampler = make_sampler(config, policy, layout, group_size=config.eval_samples)
    run.describe(
        {
            **model_facts(config, start, policy, mesh),
            "data": f"{config.data.dataset}: {len(pairs)} pairs, {len(held_out_pairs)} held out",
            "lengths": f"{config.prompt_length} + {config.completion_length} tokens; {config.num_pairs} pairs a step",
            "loss": f"{config.loss}, beta {config.beta:g}, {config.num_epochs} epochs",
            "updates": f"{len(batches)} in all; " + config.optimizer.description,
        }
    )
    evaluation = jax.random.key(config.seed)

    def evaluate(params: Params, step: int) -> dict[str, Any]:
        with run.progress.phase("evaluation", len(held_out_pairs) + len(prompts)) as phase:
            ratios = sums_of(params, held_out_pairs, phase.update)
            ratios = ratios if held_out_reference is None else ratios - held_out_reference
            ratios = ratios / held_out_pairs.lengths if config.by_token else ratios
            margins = ratios[:, 0] - ratios[:, 1]
            metrics = {
                "eval/accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
                "eval/margin": float(config.beta * margins.mean()),
            }
            if len(prompts):
                key = jax.random.fold_in(evaluation, step)
                rollout = sample_all(sampler, layout.reshard(params), prompts, key)
                completions = decode_completions(policy.tokenizer, rollout, policy.eos_ids)
                phase.update(len(held_out_pairs) + len(prompts))
                metrics["eval/mean_length"] = float(rollout.completion_mask.sum(1).mean())
                judged = partial(judge_samples, prompts, completions, judge, config.eval_samples)
                samples, scores = on_main(judged, "judging samples", is_long=True)
                metrics |= {"eval/judge": float(np.mean(scores))} if scores else {}
                run.log_samples(step, samples, shown=samples[:: config.eval_samples][:4])
        return metrics

    train_offline(
        config,
        run,
        mesh,
        title="DPO",
        model=policy,
        loss_fn=preference_loss(config, policy.model),
        optimizer=optimizer,
        schedule=schedule,
        batches=batches if reference is None else WithReference(batches, reference),
        lengths=pair_lengths,
        digest=f"{batches.digest} {held_out_pairs.digest}",
        evaluate=evaluate,
        evaluated="eval/accuracy",
        prompt_format=prompt_format_of(rendering, policy.tokenizer),
        reload=lambda: load_model(config, start, mesh, **adapters_of(config)).params,
    )


@dataclass(frozen=True)
class WithReference:
    """Batches of pairs with the reference policy's log-probabilities.

    Attributes:
        batches: the batches.
        reference: ``[pairs, 2]``, the reference's log-probabilities of whole completions, chosen and rejected.
    """

    batches: PairBatches
    reference: np.ndarray

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Pairs:
        ref_log_probs = jnp.asarray(self.reference[self.batches.positions(index)])
        return replace(self.batches[index], ref_log_probs=ref_log_probs)


def sums_of_pairs(
    config: DPOConfig,
    run: Run,
    mesh: Mesh,
    sums: Callable,
    params: Params,
    pairs: EncodedPreferences,
    report: Callable[[int], None],
) -> np.ndarray:
    """``[pairs, 2]``, the log-probabilities of whole completions, chosen and rejected.

    Args:
        config: has the batch size.
        run: may be stopped between batches.
        mesh: device mesh.
        sums: compiled ``(params, pairs) -> [pairs, 2]``.
        params: parameters of the policy.
        pairs: encoded pairs.
        report: called with the number of pairs done.
    """
    log_probs = []
    for positions, real in padded_batches(len(pairs), config.num_pairs):
        log_probs.append(fetch(sums(params, shard_rows(pairs.padded(positions), mesh)))[:real])
        report(sum(map(len, log_probs)))
        run.stop_if_requested()
    return np.concatenate(log_probs)


def reference_log_probs(run: Run, name: str, sums_of: Callable, pairs: EncodedPreferences) -> np.ndarray:
    """``[pairs, 2]``, the reference's log-probabilities of whole completions; cached in ``<name>.npy``."""
    path = run.folder / f"{name}.npy"
    # With a checkpoint, the data were checked to be the same.
    if on_main(path.exists, f"looking for {path.name}") and run.checkpoints.steps():
        return on_main(lambda: np.load(path), f"reading {path.name}")
    with run.progress.phase(name.replace("_", " "), len(pairs)) as phase:
        log_probs = sums_of(pairs, phase.update)
    buffer = BytesIO()
    np.save(buffer, log_probs)
    on_main(lambda: write_atomically(path, buffer.getvalue()), f"writing {path.name}")
    return log_probs


def judge_samples(
    prompts: EncodedProblems, completions: list[str], judge: RewardFn | None, count: int
) -> tuple[list[Sample], list[float]]:
    """Samples with the judge's scores, and the scores that are present.

    Args:
        prompts: held-out prompts.
        completions: ``count`` completions of each prompt, in order.
        judge: reward that scores them; None for no scores.
        count: completions per prompt.
    """
    indices = [n // count for n in range(len(completions))]
    texts = [prompts.texts[n] for n in indices]
    outputs = (
        [] if judge is None else as_reward_outputs(judge(texts, completions, answer=[None] * len(texts)), completions)
    )
    scores = [output.score for output in outputs] or [None] * len(texts)
    samples = [
        Sample(text, completion, reward=score, answer=prompts.problems[n].columns["chosen"])
        for text, completion, score, n in zip(texts, completions, scores, indices, strict=True)
    ]
    return samples, [score for score in scores if score is not None]


if __name__ == "__main__":
    sys.exit(run_command(DPOConfig, main, presets=PRESETS, description=__doc__))

"""Reward model training on preferences (Bradley-Terry).

Without arguments it trains on preferences between replies to the toy task errands, on one CPU in two minutes. For real
models:

    python experiments/reward_model.py
    python experiments/reward_model.py --model Qwen/Qwen2.5-0.5B --dataset preferences.jsonl --chat-template

It saves a Hugging Face classifier with one label, for ``--reward-model`` of the other scripts. After InstructGPT (arXiv
2203.02155, section 3.5); margins and centring after Llama 2 and arXiv 2312.09244.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import jax
import numpy as np

from grpo_jax.config.model import PROMPT_AND_COMPLETION
from grpo_jax.config.reward_model import PRESETS, RewardModelConfig
from grpo_jax.data.iterator import padded_batches
from grpo_jax.data.preferences import PairBatches
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.hosts import fetch
from grpo_jax.loop.checks import check_length
from grpo_jax.loop.command import run_command
from grpo_jax.loop.offline import pair_lengths, train_offline
from grpo_jax.loop.offline_data import encode_preference_sets, load_preference_sets, load_sets
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import adapters_of, load_model, model_facts, start_model, with_stop_tokens
from grpo_jax.loss import bradley_terry_loss
from grpo_jax.sharding import shard_rows
from grpo_jax.train import pair_scores
from grpo_jax.types import Pairs, Params

CALIBRATION_BINS = 10


def main(config: RewardModelConfig) -> int:
    """Run or resume; returns exit status 0 if the run finished, 75 or 130 if it was stopped."""
    return run_experiment(config, train, title="reward model")


def train(config: RewardModelConfig, run: Run) -> None:
    mesh = config.mesh.build()
    sets = load_sets(config, run, load_preference_sets)
    start = start_model(config, run, seed=config.seed)
    load = partial(load_model, config, start, mesh, scalar_head=True, **adapters_of(config))
    scorer = with_stop_tokens(load(), config.stop_tokens)
    check_length(sum(config.lengths), scorer, PROMPT_AND_COMPLETION)
    rendering = resolve_rendering(config.data, scorer, say=run.say, today=run.start_date)
    pairs, held_out_pairs = encode_preference_sets(run, sets, scorer, lengths=config.lengths, rendering=rendering)
    batches = PairBatches(pairs, num_pairs=config.num_pairs, num_epochs=config.num_epochs, seed=config.seed)

    def loss_fn(params: Params, batch: Pairs):
        margins = batch.margins if config.use_margins else None
        return bradley_terry_loss(pair_scores(scorer.model, params, batch), margins=margins, centring=config.centring)

    optimizer, schedule = config.optimizer.build(total_updates=len(batches))
    prepare = scorer.model.preparation.prepare
    score = jax.jit(lambda params, batch: pair_scores(scorer.model, prepare(params), batch))
    run.describe(
        {
            **model_facts(config, start, scorer, mesh),
            "data": f"{config.data.dataset}: {len(pairs)} pairs, {len(held_out_pairs)} held out",
            "lengths": f"{config.lengths[0]} + {config.lengths[1]} tokens, {config.num_pairs} pairs an update",
            "loss": f"Bradley-Terry, centring {config.centring:g}, {config.num_epochs} epochs",
            "updates": f"{len(batches)} in all; " + config.optimizer.description,
        }
    )

    def evaluate(params: Params, step: int) -> dict[str, Any]:
        with run.progress.phase("evaluation", len(held_out_pairs)) as phase:
            scores = []
            for positions, real in padded_batches(len(held_out_pairs), config.num_pairs):
                batch = shard_rows(held_out_pairs.padded(positions), mesh)
                scores.append(fetch(score(params, batch))[:real])
                phase.update(sum(map(len, scores)))
                run.stop_if_requested()
        return accuracy_and_calibration(np.concatenate(scores))

    train_offline(
        config,
        run,
        mesh,
        title="reward model",
        model=scorer,
        loss_fn=loss_fn,
        optimizer=optimizer,
        schedule=schedule,
        batches=batches,
        lengths=pair_lengths,
        digest=batches.digest,
        evaluate=evaluate,
        evaluated="eval/accuracy",
        prompt_format=prompt_format_of(rendering, scorer.tokenizer),
        reload=lambda: load().params,
    )


def accuracy_and_calibration(scores: np.ndarray) -> dict[str, float]:
    """Accuracy, loss and calibration of a reward model on preferences.

    Args:
        scores: ``[pairs, 2]``, scores of the chosen and the rejected completion.

    Returns:
        ``eval/accuracy`` (a tie counts half), ``eval/loss`` in nats per pair, ``eval/calibration_error`` (expected
        calibration error over ten bins of confidence), ``eval/score_mean``, ``eval/score_std``.
    """
    margins = scores[:, 0].astype(np.float64) - scores[:, 1]
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    bins = np.minimum((2 * confidence - 1) * CALIBRATION_BINS, CALIBRATION_BINS - 1).astype(int)
    gaps = [abs((confidence - right)[bins == n].sum()) for n in range(CALIBRATION_BINS)]
    return {
        "eval/accuracy": float(right.mean()),
        "eval/loss": float(np.logaddexp(0, -margins).mean()),
        "eval/calibration_error": float(sum(gaps) / len(margins)),
        "eval/score_mean": float(scores.mean()),
        "eval/score_std": float(scores.std()),
    }


if __name__ == "__main__":
    sys.exit(run_command(RewardModelConfig, main, presets=PRESETS, description=__doc__))

r"""DPO: a policy learns from preferences directly, without a reward model and without drawing anything.

Without arguments it learns from pairs of replies to the embedded base's errands, on one CPU in three minutes. With
arguments it is the real thing:

    python experiments/dpo.py
    python experiments/dpo.py --model runs/sft/model --dataset preferences.jsonl --beta 0.1 --run-dir runs/dpo
    python experiments/dpo.py --model path/to/folder --dataset preferences.jsonl --loss ipo
    python experiments/dpo.py --model path/to/folder --dataset preferences.jsonl --reference-free --per-token --beta 2 \
        --target-margin 1

The last one is SimPO. The reference's log-probabilities are computed once ahead; it is in memory no longer than that.
After Rafailov et al. (arXiv 2305.18290).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh

from grpo_jax.config.model import PolicyConfig
from grpo_jax.config.offline import PreferenceConfig
from grpo_jax.config.run import Export, RunConfig, require_at_least
from grpo_jax.config.training import OptimizerConfig
from grpo_jax.data.encoded import EncodedProblems, decode_completions
from grpo_jax.data.iterator import padded_batches
from grpo_jax.data.preferences import EncodedPreferences, PairBatches
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompt_format import prompt_format_of
from grpo_jax.data.prompts import of_template
from grpo_jax.data.statistics import DataStatistics
from grpo_jax.jsonl import write_atomically
from grpo_jax.loop.checks import check_divides, check_finite, check_same_data
from grpo_jax.loop.command import run_command
from grpo_jax.loop.compilation import count_compilations
from grpo_jax.loop.export import check_steps, exported_params, save_trained
from grpo_jax.loop.offline_data import encode_preference_set, load_preference_sets
from grpo_jax.loop.rendering import resolve_rendering
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import load_model, load_policy, make_sampler, model_facts, start_model
from grpo_jax.loss import dpo_loss, hinge_preference, sigmoid_preference, squared_preference
from grpo_jax.masked import masked_sum
from grpo_jax.monitor.samples import Sample
from grpo_jax.rewards.compose import RewardFn, as_reward_outputs
from grpo_jax.rewards.plugin import import_reward
from grpo_jax.sharding import ROLLOUT_RULES, make_reshard, param_shardings, replicated, shard_rows
from grpo_jax.tasks.errands import errand_reward
from grpo_jax.tasks.toy_model import ToyConfig
from grpo_jax.train import init_state, make_train_step, pair_log_probs
from grpo_jax.types import Pairs, Params

OBJECTIVES = {"sigmoid": sigmoid_preference, "hinge": hinge_preference, "ipo": squared_preference}


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, PolicyConfig):
    """What a run is. Fields are checked before anything is computed."""

    data: Annotated[PreferenceConfig, tyro.conf.arg(name="")] = PreferenceConfig()
    """What is preferred to what."""
    run_dir: Path = Path("runs/dpo")
    """The run's own folder: logs, checkpoints, curves, the trained model."""
    base: ToyConfig = ToyConfig(errand_share=0.5)
    """How the embedded base is made; the seed is the run's."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """What a pair's margin costs: DPO's own, SLiC's or IPO's."""
    beta: float = 0.1
    """Strength of the pull towards the reference."""
    label_smoothing: float = 0.0
    """Share of pairs that are taken to be labelled the wrong way round; of sigmoid."""
    target_margin: float = 0.0
    """By how much the chosen completion is to win, after beta (SimPO's gamma); of sigmoid."""
    per_token: bool | None = None
    """Divide log-probabilities by the number of tokens. Default: with ipo."""
    reference_free: bool = False
    """Hold the policy to no reference."""
    sft_coef: float = 0.0
    """Weight of the likelihood of the chosen completions beside it."""
    num_epochs: int = 1
    """How often each pair is visited. A finished run that is given more goes on; where the learning rate decays, it is
    from there on that of the new number."""
    num_pairs: int = 32
    """Pairs of an update."""
    num_micro_batches: int = 1
    """Parts each update is computed in, to save memory; the result is the same."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become updates. Default learning rate: 5e-7 with --model, 3e-4 without."""
    judge: str | None = None
    """module:function, a reward that grades the completions drawn for held-out prompts. Default: the quality of replies
    to the built-in errands, none with a dataset."""
    eval_every: int = 20
    """Steps between evaluations; there is one before the first and one after the last. 0 for these two alone."""
    export: Export = "last"
    """Which model becomes model/: that of the last step, or that of the best held-out evaluation. A finished run can be
    given the other one."""
    num_eval_prompts: int = 64
    """Held-out prompts that completions are drawn for at an evaluation; 0 for none."""
    eval_samples: int = 4
    """Completions for each of them."""

    def __post_init__(self):
        RunConfig.__post_init__(self)
        PolicyConfig.__post_init__(self)
        require_at_least(
            self, num_epochs=1, num_pairs=1, num_micro_batches=1, eval_every=0, num_eval_prompts=0, eval_samples=1
        )
        require_at_least(self, sft_coef=0)
        if not self.beta > 0:
            raise ValueError(f"beta is {self.beta}; it must be above 0")
        if self.loss != "sigmoid" and (self.label_smoothing or self.target_margin):
            raise ValueError(f"label_smoothing and target_margin belong to the loss sigmoid, not to {self.loss}")
        sigmoid_preference(jnp.zeros(1), label_smoothing=self.label_smoothing)  # a share out of range is found here
        if self.num_pairs % self.num_micro_batches:
            raise ValueError(f"num_pairs = {self.num_pairs} do not divide into {self.num_micro_batches} micro-batches")
        if self.model is None and self.data.chat_template:
            raise ValueError("the embedded base has no chat template; name a model, or leave chat_template out")

    @property
    def by_token(self) -> bool:
        """Whether log-probabilities are divided by the number of tokens."""
        return self.loss == "ipo" if self.per_token is None else self.per_token

    @property
    def objective(self):
        """The function of a pair's margin in effect."""
        if self.loss != "sigmoid":
            return OBJECTIVES[self.loss]
        return partial(sigmoid_preference, label_smoothing=self.label_smoothing, target_margin=self.target_margin)


RESUMABLE_FIELDS = ("num_micro_batches", "cache_bytes", "eval_every")
EXTENDABLE_FIELDS = ("num_epochs", "export")


def main(config: Config) -> int:
    """Run, or go on; the exit status is 0 when the run is finished and 130 when it was asked to stop."""
    return run_experiment(
        config, train, title="DPO", resumable_fields=RESUMABLE_FIELDS, extendable_fields=EXTENDABLE_FIELDS
    )


def check(config: Config) -> None:
    """Find what the devices cannot divide, before anything is computed."""
    check_divides(config.num_pairs // config.num_micro_batches, config.mesh.build(), "the pairs of a micro-batch")


def train(config: Config, run: Run) -> None:
    check(config)
    compilations = count_compilations()
    mesh = config.mesh.build()
    stats = DataStatistics()
    preferences, held_out = load_preference_sets(config.data, config.seed, stats)
    stats.report(run.say, run.folder / "data.json")
    run.stop_if_requested()
    judge = errand_reward if config.data.dataset is None else None
    judge = judge if config.judge is None else import_reward(config.judge)
    start = start_model(config, run, seed=config.seed)
    policy = load_policy(config, start, mesh)
    rendering = resolve_rendering(config.data, policy, say=run.say, today=run.begun)
    encode = partial(
        encode_preference_set,
        config.data,
        policy=policy,
        max_prompt_length=config.prompt_length,
        max_completion_length=config.completion_length,
        rendering=rendering,
    )
    pairs, held_out_pairs = encode(preferences), encode(held_out)
    if pairs.dropped:
        run.say(f"{pairs.dropped} of {len(preferences)} pairs dropped: too long")
    batches = PairBatches(pairs, num_pairs=config.num_pairs, num_epochs=config.num_epochs, seed=config.seed)
    asked = held_out_pairs.preferences[: config.num_eval_prompts]
    prompts = EncodedProblems(
        [Problem(each.prompt, None, {"chosen": each.chosen, **of_template(each.columns)}) for each in asked],
        policy.tokenizer,
        max_prompt_length=config.prompt_length,
        pad_id=policy.pad_id,
        **rendering,
    )

    digest = f"{batches.digest} {held_out_pairs.digest}"
    log_probs = partial(pair_log_probs, policy.model)
    sums = jax.jit(lambda params, batch: masked_sum(log_probs(params, batch), batch.completion_mask, 2))
    sums_of = partial(sums_of_pairs, config, run, mesh, sums)
    reference = held_out_reference = None
    if not config.reference_free:
        run.checkpoints.require_space(policy.params)
        reference, held_out_reference = (
            reference_log_probs(run, name, partial(sums_of, policy.params), each)
            for name, each in (("reference", pairs), ("held_out_reference", held_out_pairs))
        )

    def loss_fn(params: Params, batch: Pairs):
        return dpo_loss(
            log_probs(params, batch),
            batch.completion_mask,
            ref_log_probs=batch.ref_log_probs,
            beta=config.beta,
            objective=config.objective,
            per_token=config.by_token,
            sft_coef=config.sft_coef,
        )

    optimizer, schedule = config.optimizer.build(
        total_updates=len(batches), default_learning_rate=5e-7 if config.model else 3e-4
    )
    train_step = make_train_step(loss_fn, optimizer, num_micro_batches=config.num_micro_batches)
    sampler = make_sampler(config, policy, mesh, group_size=config.eval_samples)
    to_rollout = make_reshard(param_shardings(policy.params, mesh, ROLLOUT_RULES), config.compute_dtype)
    run.describe(
        {
            **model_facts(config, start, policy, mesh),
            "data": f"{config.data.dataset or 'built-in errands'}: {len(pairs)} pairs, {len(held_out_pairs)} held out",
            "lengths": f"{config.prompt_length} + {config.completion_length} tokens; {config.num_pairs} pairs a step",
            "loss": f"{config.loss}, beta {config.beta:g}, {config.num_epochs} epochs",
            "updates": f"{len(batches)} in all; " + config.optimizer.described(5e-7 if config.model else 3e-4),
        }
    )
    state = init_state(policy.params, optimizer, with_reference=False, replicated=replicated(mesh))
    policy = replace(policy, params=None)  # the state's from here on
    first, state, position = run.resume(state)
    check_same_data(position, digest, run)
    evaluation = jax.random.key(config.seed)

    check_steps(run, first, len(batches), setting="num_epochs", decay=config.optimizer.decay)

    def evaluated(step: int) -> dict[str, Any]:
        with run.progress.phase("evaluation", len(held_out_pairs) + len(prompts)) as phase:
            ratios = sums_of(state.params, held_out_pairs, phase.update)
            ratios = ratios if held_out_reference is None else ratios - held_out_reference
            ratios = ratios / held_out_pairs.lengths if config.by_token else ratios
            margins = ratios[:, 0] - ratios[:, 1]
            metrics = {
                "eval/accuracy": float(np.where(margins == 0, 0.5, margins > 0).mean()),
                "eval/margin": float(config.beta * margins.mean()),
            }
            if len(prompts):
                params, key = to_rollout(state.params), jax.random.fold_in(evaluation, step)
                drawn = sampler(params, prompts.padded(range(len(prompts))), key)
                completions = decode_completions(policy.tokenizer, drawn, policy.eos_ids)
                phase.update(len(held_out_pairs) + len(prompts))
                metrics["eval/mean_length"] = float(np.asarray(drawn.completion_mask.sum(1)).mean())
                samples, scores = judged(prompts, completions, judge, config.eval_samples)
                metrics |= {"eval/judge": float(np.mean(scores))} if scores else {}
                run.log_samples(step, samples, shown=samples[:: config.eval_samples][:4])
        check_finite(metrics, step, run)
        run.log({"step": step, **metrics})
        return metrics

    def evaluation_is_due(step: int) -> bool:
        return step in (0, len(batches)) or bool(config.eval_every and step % config.eval_every == 0)

    if evaluation_is_due(first) and not run.has_row(first, "eval/accuracy"):
        evaluated(first)
    with run.progress.phase("DPO", len(batches), start=first, earlier=run.rows()) as phase:
        for step in range(first + 1, len(batches) + 1):
            started = time.monotonic()
            batch = batches[step - 1]
            if reference is not None:
                batch = replace(batch, ref_log_probs=jnp.asarray(reference[batches.positions(step - 1)]))
            state, update = train_step(state, shard_rows(batch, mesh))
            metrics = {name: float(value) for name, value in update.items()}
            check_finite(metrics, step, run)
            metrics |= {
                "learning_rate": float(jnp.asarray(schedule(int(state.step) - 1))),
                "step_time": time.monotonic() - started,
                "compilations": compilations(),
            }
            run.log({"step": step, **metrics})
            if evaluation_is_due(step) or step % config.save_every == 0 or run.stop_requested:
                run.save(step, state, {"data": digest})
            run.stop_if_requested()
            if evaluation_is_due(step):
                metrics |= evaluated(step)
            phase.update(step, metrics)
    params, step = exported_params(
        config,
        run,
        state,
        steps=len(batches),
        params_of=lambda state: state.params,
        start=lambda: load_model(config, start, mesh).params,
    )
    prompt_format = prompt_format_of(rendering, policy.tokenizer)
    summary = {"seed": config.seed}
    save_trained(
        run,
        params,
        policy,
        steps=len(batches),
        summary=summary,
        prompt_format=prompt_format,
        exported_step=step,
    )


def sums_of_pairs(
    config: Config,
    run: Run,
    mesh: Mesh,
    sums: Callable,
    params: Params,
    pairs: EncodedPreferences,
    report: Callable[[int], None],
) -> np.ndarray:
    """``[pairs, 2]``, the log-probability of each whole completion."""
    found = []
    for positions, real in padded_batches(len(pairs), config.num_pairs):
        found.append(np.asarray(sums(params, shard_rows(pairs.padded(positions), mesh)))[:real])
        report(sum(map(len, found)))
        run.stop_if_requested()
    return np.concatenate(found)


def reference_log_probs(run: Run, name: str, sums_of: Callable, pairs: EncodedPreferences) -> np.ndarray:
    """``[pairs, 2]``, the reference's log-probabilities of whole completions; kept in the run's folder."""
    path = run.folder / f"{name}.npy"
    if path.exists() and run.checkpoints.steps():  # what a checkpoint is of was checked; else the data may be others
        return np.load(path)
    with run.progress.phase(name.replace("_", " "), len(pairs)) as phase:
        found = sums_of(pairs, phase.update)
    buffer = BytesIO()
    np.save(buffer, found)
    write_atomically(path, buffer.getvalue())
    return found


def judged(
    prompts: EncodedProblems, completions: list[str], judge: RewardFn | None, count: int
) -> tuple[list[Sample], list[float]]:
    """Samples to be read, with their grades where somebody judges; and the grades that there are."""
    asked = [n // count for n in range(len(completions))]
    texts = [prompts.texts[n] for n in asked]
    graded = (
        [] if judge is None else as_reward_outputs(judge(texts, completions, answer=[None] * len(texts)), completions)
    )
    scores = [each.score for each in graded] or [None] * len(texts)
    samples = [
        Sample(text, completion, reward=score, answer=prompts.problems[n].columns["chosen"])
        for text, completion, score, n in zip(texts, completions, scores, asked, strict=True)
    ]
    return samples, [score for score in scores if score is not None]


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))

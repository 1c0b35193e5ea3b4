"""The toy model: a small base model, trained here in a minute, on which RL reproduces R1-Zero.

Like R1-Zero's base model, it can solve the task if it thinks step by step, but mostly answers with a guess. The first
part of its corpus is mostly worked sums, which teach the skill; the second part is mostly guesses, which hide it. It is
saved as an ordinary Hugging Face folder with its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax import models
from grpo_jax.data.prompts import pad_prompts
from grpo_jax.hosts import on_main
from grpo_jax.loss import supervised_loss
from grpo_jax.tasks.errands import careless_reply, sample_errands
from grpo_jax.tasks.sums import Sum, blurted, make_tokenizer, sample_sums, worked
from grpo_jax.tasks.toy_config import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH, PROMPT_FORMAT, ToyConfig
from grpo_jax.train import completion_log_probs, init_state, make_optimizer, make_schedule, make_train_step
from grpo_jax.types import Batch, Params


def make_toy_model(
    folder: Path | str,
    toy: ToyConfig = ToyConfig(),  # noqa: B008 - it is frozen
    *,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a toy model and save it as a Hugging Face folder.

    Args:
        folder: output folder, replaced when training is complete.
        toy: configuration of model and training.
        report: called after each update with the number of finished updates and the metrics.
    """
    config = models.from_hf_config(toy.hf_config)
    model = models.build_model(config)
    optimizer = make_optimizer(
        make_schedule(toy.learning_rate, warmup_steps=toy.steps // 20, total_steps=toy.steps, decay="linear")
    )

    def loss_fn(params: Params, batch: Batch):
        log_probs, _ = completion_log_probs(model, params, batch)
        return supervised_loss(log_probs, batch.loss_mask), {}

    train_step = make_train_step(loss_fn, optimizer)

    def trained() -> Params:
        on_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params = jax.device_put(models.init_params(config, jax.random.key(toy.seed)), on_device)
        state = init_state(params, optimizer, with_reference=False, replicated=on_device)
        for step, batch in enumerate(corpus(toy), 1):
            state, metrics = train_step(state, batch)
            if report is not None:
                report(step, {name: float(value) for name, value in metrics.items()})
        return jax.device_get(state.params)

    params = jax.tree.map(jnp.asarray, on_main(trained, "training the toy model", is_long=True))
    models.save_pretrained(
        folder, params, hf_config=toy.hf_config, tokenizer=make_tokenizer(), prompt_format=PROMPT_FORMAT
    )


def corpus(toy: ToyConfig) -> Iterator[Batch]:
    """The training batches in order, without held-out sums or errands."""
    tokenizer = make_tokenizer()
    rng = np.random.default_rng([toy.seed, 1])
    num_errands = round(toy.errand_share * toy.batch_size)
    for step in range(toy.steps):
        sums = sample_sums(
            rng,
            toy.batch_size - num_errands,
            min_terms=toy.min_terms,
            max_terms=toy.max_terms,
            held_out=False,
        )
        teaches_skill = step < toy.skill_steps
        share = toy.skill_share if teaches_skill else toy.worked_share
        pairs = [(each.question, solution(each, share, toy, rng)) for each in sums]
        for errand in sample_errands(rng, num_errands, held_out=False):
            is_good = teaches_skill and rng.random() < toy.skill_share
            pairs.append((errand.question, errand.best_reply if is_good else careless_reply(errand, rng)))
        yield encode(tokenizer, *zip(*pairs, strict=True))


def solution(problem: Sum, worked_share: float, toy: ToyConfig, rng: np.random.Generator) -> str:
    """The completion of a sum in the corpus: a worked solution, or a guess.

    Args:
        problem: the sum.
        worked_share: probability of a worked solution.
        toy: configuration, for ``chinese_share``.
        rng: source of randomness.
    """
    if rng.random() >= worked_share:
        return blurted(problem, rng)
    return worked(problem, in_chinese=toy.chinese_share > 0 and rng.random() < toy.chinese_share)


def encode(tokenizer, questions: Sequence[str], replies: Sequence[str]) -> Batch:
    """A batch for supervised training on the replies.

    Args:
        tokenizer: the toy tokenizer.
        questions: prompts.
        replies: completions, without the ending token.
    """
    prompts = pad_prompts(
        tokenizer(list(questions))["input_ids"],
        max_prompt_length=MAX_PROMPT_LENGTH,
        pad_id=tokenizer.pad_token_id,
        index=range(len(questions)),
    )
    token_ids = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(replies))["input_ids"]]
    ids = np.full((len(questions), MAX_COMPLETION_LENGTH), tokenizer.pad_token_id, dtype=np.int32)
    for row, reply in zip(ids, token_ids, strict=True):
        row[: len(reply)] = reply
    mask = jnp.asarray(np.arange(MAX_COMPLETION_LENGTH) < np.array([len(each) for each in token_ids])[:, None])
    zeros = jnp.zeros(ids.shape, jnp.float32)
    return Batch(
        prompts.ids,
        prompts.mask,
        jnp.asarray(ids),
        mask,
        loss_mask=mask,
        advantages=zeros[:, 0],
        rollout_log_probs=zeros,
    )

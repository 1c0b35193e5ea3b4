"""GRPO from pure functions, read top to bottom: load a model, sample, score, take advantages, update, evaluate.

The task is a sum such as ``3+8+1=``, the reward is 1 for a right final answer. Without an argument a toy model is
trained first; with one, the model in that folder is trained instead, and asked in words.

    python experiments/minimal_grpo.py
    python experiments/minimal_grpo.py path/to/folder

For real runs use grpo.py: it resumes, shards over devices, watches for reward hacking, and has every option.
"""

import sys
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax import advantage, evaluate, loss, models, rollout, train
from grpo_jax.data.encoded import decode_completions
from grpo_jax.data.prompts import encode_prompts, pad_prompts
from grpo_jax.rewards import answer_reward
from grpo_jax.sampling import Sampling
from grpo_jax.tasks.sums import sample_sums
from grpo_jax.tasks.toy_model import make_toy_model
from grpo_jax.types import Batch, TrainState

NUM_STEPS, NUM_PROMPTS, GROUP_SIZE = 60, 32, 16
MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH = 12, 48
LEARNING_RATE, KL_COEF = 2.5e-4, 0.0

# 1. A policy: parameters, and pure functions of them.
if len(sys.argv) > 1:
    folder, template = sys.argv[1], "What is {question}? End with the answer in \\boxed{{}}.\n"
    MAX_PROMPT_LENGTH, MAX_COMPLETION_LENGTH, LEARNING_RATE = 64, 256, 1e-6
else:
    folder, template = tempfile.mkdtemp() + "/toy_model", "{question}"
    print("training the toy model ...")
    make_toy_model(folder)
policy = models.from_pretrained(folder)
model, tokenizer, eos_ids = policy.model, policy.tokenizer, policy.eos_ids
print(f"{folder}: {sum(x.size for x in jax.tree.leaves(policy.params)):,} parameters")

# 2. Prompts and their answers.
rng = np.random.default_rng(0)
held_out_sums = sample_sums(np.random.default_rng(1), 64, min_terms=4, max_terms=6, held_out=True)


def to_prompts(sums):
    """Token ids of the sums, left-padded, with the gold answers."""
    texts = [template.format(question=each.question) for each in sums]
    ids = encode_prompts(texts, tokenizer, template="{question}")
    prompts = pad_prompts(ids, max_prompt_length=MAX_PROMPT_LENGTH, pad_id=policy.pad_id, index=range(len(sums)))
    return texts, prompts, [each.answer for each in sums]


# 3. The sampler: prompts [N] -> completions [N * G].
sampler = rollout.Sampler(
    model,
    Sampling(temperature=1.0),
    group_size=GROUP_SIZE,
    max_completion_length=MAX_COMPLETION_LENGTH,
    eos_ids=eos_ids,
    pad_id=policy.pad_id,
)

# 4. The loss of a batch: new log-probabilities, clipped surrogate, KL to a reference if there is one.
log_probs_of = partial(train.completion_log_probs, model)


def loss_fn(params, batch: Batch):
    log_probs, entropy = log_probs_of(params, batch)
    return loss.grpo_loss(
        log_probs,
        batch.advantages,
        batch.loss_mask,
        old_log_probs=batch.old_log_probs,
        ref_log_probs=batch.ref_log_probs,
        rollout_log_probs=batch.rollout_log_probs,
        entropy=entropy,
        kl_coef=KL_COEF,
    )


# 5. The train step: any optax optimizer; gradient accumulation does not change the result.
schedule = optax.linear_schedule(LEARNING_RATE, 0.0, NUM_STEPS)
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.0))
train_step = train.make_train_step(loss_fn, optimizer, num_micro_batches=2)
state = TrainState(step=jnp.int32(0), params=policy.params, opt_state=optimizer.init(policy.params))
ref_params = jax.tree.map(jnp.copy, policy.params) if KL_COEF else None
ref_log_probs = jax.jit(lambda params, batch: log_probs_of(params, batch)[0])


def sample_and_score(params, sums, key):
    """Completions of a group per sum, and their rewards [N * G]."""
    texts, prompts, answers = to_prompts(sums)
    completions = sampler(params, prompts, key)
    decoded = decode_completions(tokenizer, completions, eos_ids=eos_ids)
    repeated = [text for text in texts for _ in range(GROUP_SIZE)]
    golds = [answer for answer in answers for _ in range(GROUP_SIZE)]
    return completions, decoded, jnp.array(answer_reward(repeated, decoded, answer=golds), jnp.float32)


def pass_at_1(params, key):
    """The share of right completions on sums that are never trained on."""
    _, _, rewards = sample_and_score(params, held_out_sums, key)
    return float(evaluate.pass_at_k(rewards.reshape(-1, GROUP_SIZE) == 1, 1))


# 6. The loop.
key = jax.random.key(0)
print(f"held-out pass@1 before: {pass_at_1(state.params, jax.random.fold_in(key, 0)):.3f}")
for step in range(1, NUM_STEPS + 1):
    sums = sample_sums(rng, NUM_PROMPTS, min_terms=4, max_terms=6, held_out=False)
    completions, texts, rewards = sample_and_score(state.params, sums, jax.random.fold_in(key, step))
    batch = Batch.from_rollout(
        completions,
        advantage.group_relative(rewards, group_size=GROUP_SIZE),
        ref_log_probs=ref_log_probs(ref_params, completions) if KL_COEF else None,
    )
    state, _ = train_step(state, batch)
    if step % 5 == 0 or step == 1:
        length = float(completions.completion_mask.sum(1).mean())
        print(f"step {step:3} reward {float(rewards.mean()):.3f} length {length:5.1f} completion {texts[0]!r}")
print(f"held-out pass@1 after: {pass_at_1(state.params, jax.random.fold_in(key, NUM_STEPS + 1)):.3f}")

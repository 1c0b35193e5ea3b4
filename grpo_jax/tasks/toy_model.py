"""The toy model: a small base model, trained here in a minute, on which RL reproduces R1-Zero.

Like R1-Zero's base model, it can solve the task if it thinks step by step, but mostly answers with a guess. The first
part of its corpus is mostly worked sums, which teach the skill; the second part is mostly guesses, which hide it. It is
saved as an ordinary Hugging Face folder with its own tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.data.prompts import pad_prompts
from grpo_jax.loss import supervised_loss
from grpo_jax.models import build_model, from_hf_config, init_params, save_pretrained
from grpo_jax.sharding import make_mesh, replicated
from grpo_jax.tasks.errands import careless_reply, sample_errands
from grpo_jax.tasks.sums import PLAIN, VOCABULARY, Sum, blurted, make_tokenizer, sample_sums, worked
from grpo_jax.train import completion_log_probs, init_state, make_optimizer, make_schedule, make_train_step
from grpo_jax.types import Batch, Params

TOY = "toy"
"""Name of the toy model as a model source."""
MAX_PROMPT_LENGTH = 12
MAX_COMPLETION_LENGTH = 48

HF_CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 32,  # a multiple of 8, so that it divides over a mesh
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
    "pad_token_id": VOCABULARY.index("<pad>"),
    "eos_token_id": VOCABULARY.index("<eos>"),
    "dtype": "float32",
}
"""``config.json`` of the default toy model; ``ToyConfig.hf_config`` is that of a given configuration."""
PROMPT_FORMAT: Mapping[str, str] = {"kind": "plain", "template": PLAIN}
"""The question without a template, as in the corpus."""


@dataclass(frozen=True)
class ToyConfig:
    """Configuration of the toy model and its training.

    Attributes:
        seed: seed of the weights and the corpus.
        min_terms, max_terms: number of terms of a sum.
        batch_size: examples per update.
        skill_steps: updates on the first part of the corpus.
        skill_share: fraction of worked sums (and of best replies to errands) in the first part; the rest are guesses.
        mixture_steps: updates on the second part.
        worked_share: fraction of worked sums in the second part, and roughly how often the model will think.
        chinese_share: fraction of the worked sums whose thoughts have Chinese digits.
        errand_share: fraction of errands in the corpus. Their replies in the second part are careless ones.
        learning_rate: peak learning rate, with linear decay to 0.
        hidden_size: width of the model; feed-forward layers are twice as wide.
        num_layers: number of layers.
    """

    seed: int = 0
    min_terms: int = 4
    max_terms: int = 6
    batch_size: int = 64
    skill_steps: int = 450
    skill_share: float = 0.9
    mixture_steps: int = 40
    worked_share: float = 0.12
    chinese_share: float = 0.0
    errand_share: float = 0.0
    learning_rate: float = 4e-3
    hidden_size: int = HF_CONFIG["hidden_size"]
    num_layers: int = HF_CONFIG["num_hidden_layers"]

    def __post_init__(self):
        for name in ("hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of the model."""
        return {
            **HF_CONFIG,
            "hidden_size": self.hidden_size,
            "intermediate_size": 2 * self.hidden_size,
            "num_hidden_layers": self.num_layers,
        }

    @property
    def steps(self) -> int:
        """Total number of updates."""
        return self.skill_steps + self.mixture_steps


def make_toy_model(
    folder: Path | str,
    toy: ToyConfig = ToyConfig(),
    *,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a toy model and save it as a Hugging Face folder.

    Args:
        folder: output folder, replaced when training is complete.
        toy: configuration of model and training.
        report: called after each update with the number of finished updates and the metrics.
    """
    config = from_hf_config(toy.hf_config)
    model = build_model(config)
    optimizer = make_optimizer(
        make_schedule(toy.learning_rate, warmup_steps=toy.steps // 20, total_steps=toy.steps, decay="linear")
    )

    def loss_fn(params: Params, batch: Batch):
        log_probs, _ = completion_log_probs(model, params, batch)
        return supervised_loss(log_probs, batch.loss_mask), {}

    train_step = make_train_step(loss_fn, optimizer)
    mesh = make_mesh(devices=jax.devices()[:1])
    params = jax.device_put(init_params(config, jax.random.key(toy.seed)), replicated(mesh))
    state = init_state(params, optimizer, with_reference=False, replicated=replicated(mesh))
    for step, batch in enumerate(corpus(toy), 1):
        state, metrics = train_step(state, batch)
        if report is not None:
            report(step, {name: float(value) for name, value in metrics.items()})
    save_pretrained(
        folder, state.params, hf_config=toy.hf_config, tokenizer=make_tokenizer(), prompt_format=PROMPT_FORMAT
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

"""Chat with a model, or complete texts, in the terminal.

    python experiments/sample.py --model runs/grpo/model                           # prompts as in training
    python experiments/sample.py --model Qwen/Qwen2.5-0.5B                         # completes the input
    python experiments/sample.py --model Qwen/Qwen2.5-0.5B-Instruct --chat --temperature 0.7 --top-p 0.9
    python experiments/sample.py --model runs/grpo/model --prompt "3+8+5+6=" --num-samples 4

For a model that was trained here, the input is put into the prompt template of its training; --template '{question}'
completes the input as it is. Tokens are shown as they are sampled, several samples one after the other. In a chat, /new
starts a new conversation. An empty line or the end of the input ends the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax import models
from grpo_jax.config.prompts import PromptConfig
from grpo_jax.data.chat_templates import check_has_template
from grpo_jax.data.encoded import decode_one
from grpo_jax.data.messages import Messages
from grpo_jax.data.prompts import Rendering, encode_prompts, pad_prompts
from grpo_jax.data.turns import check_turn_end
from grpo_jax.loop.command import run_command
from grpo_jax.loop.compilation import enable_compilation_cache
from grpo_jax.loop.setup import with_stop_tokens
from grpo_jax.rollout import Sampler, StopFn
from grpo_jax.rollout.stop import stop_strings
from grpo_jax.sampling import Sampling
from grpo_jax.types import Prompts

PROMPT_BUCKET = 64
AS_TYPED = "{question}"
HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Config(PromptConfig):
    """Model, prompt format and sampling."""

    model: str
    """Hugging Face id or local folder."""
    chat: bool = False
    """Same as --chat-template. Default: if the model was trained with its chat template."""
    template: str | None = None
    """Plain template with {question} for the input. Default: that of the model's training, else none."""
    prompt: str | None = None
    """Complete or answer this prompt and exit. Default: read prompts from the terminal."""
    num_samples: int = 1
    """Samples per prompt; a chat continues from the first."""
    max_completion_length: int | None = None
    """Longest completion in tokens. Default: 512, or half of the model's positions if that is less."""
    temperature: float = 1.0
    """Sampling temperature; 0 for greedy decoding."""
    top_k: int | None = None
    """Sample among the k most likely tokens."""
    top_p: float = 1.0
    """Sample among the most likely tokens with this total probability."""
    min_p: float = 0.0
    """Sample among tokens with at least this fraction of the highest probability."""
    repetition_penalty: float = 1.0
    """Divisor of the logits of tokens that occurred before."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that were sampled before."""
    logit_bias: tuple[tuple[str, float], ...] = ()
    """Pairs of a token's text and a number that is added to its logit; -inf excludes it."""
    min_length: int = 0
    """Minimum number of tokens before the end."""
    stop_tokens: tuple[str, ...] = ()
    """Tokens that end a completion, in addition to the model's own, such as '<|im_end|>'."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion."""
    seed: int = 0
    """Seed of the sampling."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision. Default: bfloat16 on a GPU or TPU, float32 on a CPU."""

    def __post_init__(self):
        PromptConfig.__post_init__(self)
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; it must be at least 1 token")
        if "" in self.stop:
            raise ValueError("stop contains an empty string, which would end every completion at once; remove it")
        self.sampling({})  # checks the fields before a model is loaded

    def sampling(self, vocabulary: dict[str, int]) -> Sampling:
        """The sampling parameters.

        Args:
            vocabulary: token -> id; empty to check the fields only.

        Raises:
            ValueError: a field is out of range, or ``logit_bias`` has a text that is not in the vocabulary.
        """
        unknown = [token for token, _ in self.logit_bias if token not in vocabulary] if vocabulary else []
        if unknown:
            raise ValueError(f"logit_bias: {unknown} are not tokens of {self.model}")
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            logit_bias=tuple((vocabulary.get(token, i), bias) for i, (token, bias) in enumerate(self.logit_bias)),
            min_length=self.min_length,
        )


def main(config: Config, *, read: Callable[[str], str] = input, write: Callable[[str], Any] | None = None) -> None:
    def show(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    write = write or show
    enable_compilation_cache()
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    precision = jnp.dtype(dtype).type
    policy = models.from_pretrained(config.model, dtype=precision, param_dtype=precision, attention="auto")
    if policy.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a folder with weights needs tokenizer.json beside them")
    sampling = config.sampling(policy.tokenizer.get_vocab())
    policy = with_stop_tokens(policy, config.stop_tokens)
    stop = stop_strings(policy.tokenizer, config.stop) if config.stop else None
    rendering = rendering_in_effect(config, policy)
    is_chat = rendering.get("template") is None
    if is_chat:
        check_has_template(policy.tokenizer)
        check_turn_end(policy.tokenizer, policy.eos_ids, "x", {}, **rendering)
    conversation: Messages = []
    key = jax.random.key(config.seed)
    draw = build(config, policy, sampling, stop)
    for turn in range(sys.maxsize):
        text = config.prompt if config.prompt is not None else ask(read)
        if not text:
            return
        if text == "/new":
            conversation = []
            continue
        messages = [*conversation, {"role": "user", "content": text}]
        try:
            prompts = encode(policy, messages if is_chat else text, rendering, index=turn)
            answers = draw(prompts, key, write)
        except ValueError as error:
            if config.prompt is not None:
                raise
            write(f"{error}\n")  # a bad prompt does not end the conversation
            continue
        if config.num_samples == 1:
            write("\n")
        else:
            write("".join(f"--- {i}\n{answer}\n" for i, answer in enumerate(answers, 1)))
        conversation = [*messages, {"role": "assistant", "content": answers[0]}]
        if config.prompt is not None:
            return


def ask(read: Callable[[str], str]) -> str:
    """A line of input; empty at its end."""
    try:
        return read("> ").strip("\n")
    except EOFError:
        return ""


def rendering_in_effect(config: Config, policy: models.Pretrained) -> Rendering:
    """Prompt format in effect: the settings', else that of the model's training, else the input as it is."""
    if config.chat:
        config = replace(config, chat_template=True)
    elif policy.prompt_format is None and not config.says_template:
        config = replace(config, template=AS_TYPED)
    return config.rendering(policy.prompt_format, policy.tokenizer, today=date.today().isoformat())


def encode(policy: models.Pretrained, prompt: str | Messages, rendering: Rendering, index: int) -> Prompts:
    """A text or conversation as a batch of one prompt.

    Args:
        policy: its tokenizer.
        prompt: text or messages.
        rendering: prompt format.
        index: index of the prompt, from which its sampling noise is derived.

    Raises:
        ValueError: the chat template rejects the messages, or the prompt has no tokens.
    """
    [ids] = encode_prompts([prompt], policy.tokenizer, **rendering)
    if not ids:
        raise ValueError("the prompt has no tokens")
    length = -(-len(ids) // PROMPT_BUCKET) * PROMPT_BUCKET  # few lengths, so few compilations
    return pad_prompts([ids], max_prompt_length=length, pad_id=policy.pad_id, index=[index])


def build(config: Config, policy: models.Pretrained, sampling: Sampling, stop: StopFn | None):
    """A function ``(prompts, key, show) -> completions``; a single completion is shown while it is sampled."""
    eos_ids, tokenizer = policy.eos_ids, policy.tokenizer
    assert tokenizer is not None
    sampler = Sampler(
        policy.model,
        sampling,
        group_size=config.num_samples,
        max_completion_length=config.max_completion_length or min(512, (policy.model.max_length or 1024) // 2),
        eos_ids=eos_ids,
        pad_id=policy.pad_id,
        stop=stop,
        ahead=0,  # shown as soon as it is sampled
    )

    def draw(prompts: Prompts, key: Array, show: Callable[[str], Any]) -> list[str]:
        ids: list[list[int]] = [[] for _ in range(config.num_samples)]
        shown = 0

        def watch(row: int, new: Sequence[int]) -> None:
            nonlocal shown
            ids[row] += new
            if config.num_samples == 1 and not (text := decode_one(tokenizer, ids[row], eos_ids)).endswith(
                HALF_A_CHARACTER
            ):
                show(text[shown:])
                shown = len(text)

        sampler(policy.params, prompts, key, on_tokens=watch)
        answers = [decode_one(tokenizer, row, eos_ids) for row in ids]
        if config.num_samples == 1:
            show(answers[0][shown:])
        return answers

    return draw


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))

"""Chat with a model, or let it complete a text, in the terminal: the quickest way to feel what a policy has become.

    python experiments/sample.py --model runs/r1_zero/model                        # complete what is typed
    python experiments/sample.py --model Qwen/Qwen2.5-0.5B-Instruct --chat --temperature 0.7 --top-p 0.9
    python experiments/sample.py --model runs/r1_zero/model --prompt "3+8+5+6=" --num-samples 4

Text is shown as it is drawn. Several samples of one prompt are drawn together and shown one after the other. In a chat,
/new forgets what was said. An empty line, or the end of the input, ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax import models
from grpo_jax.command import run_command
from grpo_jax.compilations import keep_programs
from grpo_jax.data.prompts import pad_prompts
from grpo_jax.data.stop import stop_strings
from grpo_jax.rollout import Sampler, StopFn
from grpo_jax.sampling import Sampling
from grpo_jax.types import Prompts

PROMPT_BUCKET = 64
HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Config:
    """What is sampled, and how."""

    model: str
    """Hugging Face id or local folder."""
    prompt: str | None = None
    """Complete this (or answer it, with --chat) and end. Default: ask for one prompt after the other."""
    chat: bool = False
    """Render what is said with the tokenizer's chat template."""
    system_prompt: str | None = None
    """What the model is told first; with --chat."""
    num_samples: int = 1
    """Samples of each prompt; a chat goes on with the first."""
    max_completion_length: int | None = None
    """Tokens of the longest answer. Default: 512, or half of what the model was made for."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float = 1.0
    """Keep the likeliest tokens with this probability together."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divide the logits of tokens that were there before."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens that were drawn before."""
    logit_bias: tuple[tuple[str, float], ...] = ()
    """Pairs of a token's text and what is added to its logit; -inf rules it out."""
    min_length: int = 0
    """Tokens before the model may end."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer."""
    seed: int = 0
    """Of the noise."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision. Default: bfloat16 on a GPU or TPU, float32 on CPU."""

    def __post_init__(self):
        if self.num_samples < 1:
            raise ValueError(f"num_samples is {self.num_samples}; it must be at least 1")
        if self.max_completion_length is not None and self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; it must be at least 1 token")
        if self.system_prompt is not None and not self.chat:
            raise ValueError("system_prompt needs --chat")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, which would end every answer at once")
        self.sampling({})  # its fields are checked before a model is loaded

    def sampling(self, vocabulary: dict[str, int]) -> Sampling:
        """How tokens are drawn.

        Raises:
            ValueError: a field out of its range, or a bias for what is no token of a vocabulary that is not empty.
        """
        unknown = [token for token, _ in self.logit_bias if token not in vocabulary] if vocabulary else []
        if unknown:
            raise ValueError(f"logit_bias: {unknown} are no tokens of {self.model}")
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
    keep_programs()
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    precision = jnp.dtype(dtype).type
    policy = models.from_pretrained(config.model, dtype=precision, param_dtype=precision, attention="auto")
    if policy.tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer; a folder with weights needs tokenizer.json beside them")
    sampling = config.sampling(policy.tokenizer.get_vocab())
    stop = stop_strings(policy.tokenizer, config.stop) if config.stop else None
    begin = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    said = list(begin)
    key = jax.random.key(config.seed)
    draw = build(config, policy, sampling, stop)
    for turn in range(sys.maxsize):
        text = config.prompt if config.prompt is not None else ask(read)
        if not text:
            return
        if text == "/new":
            said = list(begin)
            continue
        told = [*said, {"role": "user", "content": text}]
        try:
            prompts = encode(policy, told if config.chat else text, index=turn)
            answers = draw(prompts, key, write)
        except ValueError as error:
            if config.prompt is not None:
                raise
            write(f"{error}\n")  # a prompt that cannot be answered does not end a conversation
            continue
        if config.num_samples == 1:
            write("\n")
        else:
            write("".join(f"--- {i}\n{each}\n" for i, each in enumerate(answers, 1)))
        said = [*told, {"role": "assistant", "content": answers[0]}]
        if config.prompt is not None:
            return


def ask(read: Callable[[str], str]) -> str:
    """A line, or nothing at the end of the input."""
    try:
        return read("> ").strip("\n")
    except EOFError:
        return ""


def encode(policy: models.Pretrained, prompt: str | list[dict[str, str]], index: int) -> Prompts:
    """A text, or what was said so far, as a prompt; a chat template brings its own special tokens.

    Raises:
        ValueError: a chat without a template, or a prompt without a token.
    """
    tokenizer = policy.tokenizer
    assert tokenizer is not None
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; leave --chat out to complete texts")
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError("the prompt has no tokens")
    length = -(-len(ids) // PROMPT_BUCKET) * PROMPT_BUCKET  # few lengths, few programs
    return pad_prompts([ids], max_prompt_length=length, pad_id=policy.pad_id, index=[index])


def build(config: Config, policy: models.Pretrained, sampling: Sampling, stop: StopFn | None):
    """A function ``(prompts, key, show) -> answers``; a single answer is shown in pieces, as it is drawn."""
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
        ahead=0,  # shown as soon as it is drawn
    )

    def text_of(ids: list[int]) -> str:
        shown = ids[:-1] if ids and ids[-1] in eos_ids else ids
        return tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def draw(prompts: Prompts, key: Array, show: Callable[[str], Any]) -> list[str]:
        ids: list[list[int]] = [[] for _ in range(config.num_samples)]
        shown = 0

        def watch(row: int, new: Sequence[int]) -> None:
            nonlocal shown
            ids[row] += new
            if config.num_samples == 1 and not (text := text_of(ids[row])).endswith(HALF_A_CHARACTER):
                show(text[shown:])
                shown = len(text)

        sampler(policy.params, prompts, key, watch=watch)
        answers = [text_of(each) for each in ids]
        if config.num_samples == 1:
            show(answers[0][shown:])
        return answers

    return draw


if __name__ == "__main__":
    sys.exit(run_command(Config, main, description=__doc__))

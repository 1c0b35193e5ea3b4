"""Problems to padded prompt arrays, and sampled completions to text."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, Unpack, overload

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import Overlong, Rendering, encode_rendered, fit_prompts, pad_prompts, render_prompts
from grpo_jax.data.tokens import decode_following
from grpo_jax.types import Prompts, Rollout


class EncodedProblems:
    """Problems with tokenized prompts.

    Attributes:
        problems: the problems, without dropped ones.
        texts: the rendered prompt of each.
        dropped: number of problems dropped as too long.

    Args:
        problems: problems to tokenize.
        tokenizer: a transformers tokenizer.
        max_prompt_length: in tokens.
        pad_id: token id of padding.
        overlong_prompts: "drop", "truncate" or "error", as in ``prompts.fit_prompts``.
        first_index: index of the first prompt for sampling noise, so that several sets sampled together can have
            disjoint indices.
        rendering: fields of ``prompts.Rendering``. A chat template also gets the columns ``tools`` and
            ``chat_template_kwargs``.

    Raises:
        ValueError: as ``render_prompts`` and ``fit_prompts``; a prompt has no tokens.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Any,
        *,
        max_prompt_length: int,
        pad_id: int,
        overlong_prompts: Overlong = "drop",
        first_index: int = 0,
        **rendering: Unpack[Rendering],
    ):
        prompts = [problem.prompt for problem in problems]
        texts = render_prompts(prompts, tokenizer, rows=[problem.columns for problem in problems], **rendering)
        token_ids = encode_rendered(texts, tokenizer, plain=rendering.get("template") is not None)
        for prompt, ids in zip(prompts, token_ids, strict=True):
            if not ids:
                raise ValueError(f"the prompt {prompt!r} has no tokens")
        kept, self._token_ids = fit_prompts(
            token_ids, max_prompt_length=max_prompt_length, overlong_prompts=overlong_prompts
        )
        self.problems = [problems[i] for i in kept]
        self.texts = [texts[i] for i in kept]
        self.dropped = len(problems) - len(kept)
        self._max_prompt_length = max_prompt_length
        self._pad_id = pad_id
        self._first_index = first_index

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def digest(self) -> str:
        """A digest of the prompts' tokens and of the answers."""
        answers = [problem.answer for problem in self.problems]
        return hashlib.sha256(repr((self._token_ids, answers)).encode("utf-8", "backslashreplace")).hexdigest()[:16]

    def padded(self, positions: Sequence[int] | np.ndarray | range) -> Prompts:
        """The prompts at ``positions`` of ``problems``, left-padded. A prompt's position decides its sampling noise."""
        return pad_prompts(
            [self._token_ids[i] for i in positions],
            max_prompt_length=self._max_prompt_length,
            pad_id=self._pad_id,
            index=[self._first_index + int(i) for i in positions],
        )


def decode_completions(tokenizer: Any, rollout: Rollout, eos_ids: Sequence[int]) -> list[str]:
    """The text of each completion, as the continuation of its prompt.

    Includes special tokens, except an ending token at the end.

    Args:
        tokenizer: a transformers tokenizer.
        rollout: sampled completions.
        eos_ids: ids of the ending tokens.
    """
    return undecoded(tokenizer, rollout, eos_ids)[:]


class Undecoded:
    """Tokens of a text, and the text once it is decoded.

    Args:
        ids: the tokens.
    """

    __slots__ = ("ids", "text")

    def __init__(self, ids: Any):
        self.ids = ids
        self.text: str | None = None


class Texts(Sequence[str]):
    """Texts that are decoded when they are read, and once: several with a slice together, one alone by its number.

    Args:
        tokens: of each text.
        decode: maps the token ids of texts to the texts.
    """

    def __init__(self, tokens: Sequence[Undecoded], decode: Callable[[list[Any]], list[str]]):
        self._tokens, self._decode = tokens, decode

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, rows: int) -> str: ...
    @overload
    def __getitem__(self, rows: slice) -> list[str]: ...
    def __getitem__(self, rows: int | slice) -> str | list[str]:
        chosen = self._tokens[rows] if isinstance(rows, slice) else [self._tokens[rows]]
        missing = [each for each in chosen if each.text is None]
        for each, text in zip(missing, self._decode([each.ids for each in missing]), strict=True):
            each.text = text
        texts = [str(each.text) for each in chosen]
        return texts if isinstance(rows, slice) else texts[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __add__(self, other: Texts) -> Texts:
        return Texts([*self._tokens, *other._tokens], self._decode)

    def at(self, rows: Iterable[int]) -> Texts:
        """Some of the texts; one that is decoded here or there is decoded for both."""
        return Texts([self._tokens[row] for row in rows], self._decode)


def undecoded(tokenizer: Any, rollout: Rollout, eos_ids: Sequence[int]) -> Texts:
    """The texts of ``decode_completions``, decoded when they are read.

    Args:
        tokenizer, rollout, eos_ids: as there.
    """

    def decode(rows: list[np.ndarray]) -> list[str]:
        return decode_following(tokenizer, [_without_end(row.tolist(), eos_ids) for row in rows])

    lengths = np.asarray(rollout.completion_mask).sum(1).tolist()
    ids = np.asarray(rollout.completion_ids)
    return Texts([Undecoded(row[:length]) for row, length in zip(ids, lengths, strict=True)], decode)


def decode_one(tokenizer: Any, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
    """As ``decode_completions``, for one completion.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids of the completion, without padding.
        eos_ids: ids of the ending tokens.
    """
    return decode_following(tokenizer, [_without_end(ids, eos_ids)])[0]


def last_tokens(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Map character offsets in a completion's text to token positions.

    Args:
        tokenizer: a transformers tokenizer.
        ids: token ids of the completion.
        ends: lengths of prefixes of the text in characters, at least 1.

    Returns:
        For each prefix, the position in ``ids`` of the token with its last byte; the last position if the text is
        shorter than the prefix.
    """

    @cache
    def text(count: int) -> str:
        return decode_following(tokenizer, [ids[:count]])[0]

    # Texts are compared, not lengths: incomplete bytes of a character are decoded as another character.
    whole, counts = text(len(ids)) if ends else "", range(1, len(ids) + 1)
    tokens = [bisect_left(counts, True, key=lambda count, end=end: text(count)[:end] == whole[:end]) for end in ends]
    return [min(token, len(ids) - 1) for token in tokens]


def _without_end(ids: Sequence[int], eos_ids: Sequence[int]) -> Sequence[int]:
    return ids[:-1] if ids and ids[-1] in eos_ids else ids

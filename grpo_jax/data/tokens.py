"""Tokenization of text that continues other text, and its inverse.

Tokenizers in the style of SentencePiece add a blank before the first word when they encode, and remove it when they
decode. A completion continues its prompt, so that neither should happen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

ANCHORS = ("\n", ".", "0", "a", ":")
"""Texts to encode a completion after. The first whose tokens do not merge with the completion's is used."""


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize texts without adding special tokens.

    Args:
        texts: the texts.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: the tokenizer cannot encode a text; the message names it.
    """
    if not texts:
        return []
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    except Exception as error:
        position = next(i for i, text in enumerate(texts) if not _can_encode(tokenizer, text))
        raise ValueError(f"the tokenizer cannot encode text {position}, {texts[position]!r:.200}: {error}") from error


def encode_following(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokenize texts that continue other text, so that they decode to themselves wherever possible.

    White space after a special token at the very end is encoded as the tokenizer does it, as in prompts.

    Args:
        texts: the texts.
        tokenizer: a transformers tokenizer.

    Raises:
        ValueError: as ``encode_texts``.
    """
    token_ids = encode_texts(texts, tokenizer)
    if not texts:
        return token_ids
    added = tokenizer.added_tokens_decoder.values()
    adds_blanks = _adds_blanks(texts, tokenizer)
    if adds_blanks:
        token_ids = _without_added_blank(texts, token_ids, tokenizer)
    if not added or not (adds_blanks or any(token.lstrip or token.rstrip for token in added)):
        return token_ids
    # Tokenizers also add or remove blanks around special tokens within a text.
    known = tokenizer.added_tokens_encoder
    special = "(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + ")"
    within = [n for n, text in enumerate(texts) if re.search(special, text)]
    for n, decoded in zip(within, decode_following(tokenizer, [token_ids[n] for n in within]), strict=True):
        text = texts[n]
        if decoded.rstrip() == text.rstrip():
            continue
        end = re.search(special + r"\s*$", text)
        head, tail = (text, "") if end is None else (text[: end.start()], text[end.start() :])
        parts = [part for part in re.split(special, head) if part]
        words = [part for part in parts if part not in known]
        encoded = encode_texts(words, tokenizer)
        word_ids = iter(_without_added_blank(words, encoded, tokenizer) if adds_blanks else encoded)
        ids = [i for part in parts for i in ([known[part]] if part in known else next(word_ids))]
        ids += encode_texts([tail], tokenizer)[0]
        if decode_following(tokenizer, [ids])[0].rstrip() == text.rstrip():
            token_ids[n] = ids
    return token_ids


def _adds_blanks(texts: Sequence[str], tokenizer: Any) -> bool:
    """Whether the tokenizer adds a blank before the first word."""
    probes = [*ANCHORS[1:], *(text.lstrip() for text in texts if text.strip())]
    probe = next((each for each in probes if _can_encode(tokenizer, each)), None)
    return probe is not None and decode_following(tokenizer, encode_texts([probe], tokenizer))[0].startswith(" ")


def _without_added_blank(texts: Sequence[str], token_ids: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """Replace the ids of texts that decode with an extra blank by their ids after an anchor text."""
    chosen, decoded = list(token_ids), decode_following(tokenizer, token_ids)
    wrong = [n for n, text in enumerate(texts) if _blanks(decoded[n]) == _blanks(text) + 1]
    for anchor in ANCHORS:
        if not wrong or not _can_encode(tokenizer, anchor):
            continue
        before, *anchored = encode_texts([anchor, *(anchor + texts[n] for n in wrong)], tokenizer)
        candidates = [ids[len(before) :] if ids[: len(before)] == before else [] for ids in anchored]
        left = []
        for n, ids, text in zip(wrong, candidates, decode_following(tokenizer, candidates), strict=True):
            if text == decoded[n][1:]:
                chosen[n] = ids
            else:
                left.append(n)
        wrong = left
    return chosen


def decode_following(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    """Decode token ids as the continuation of other text, special tokens included.

    Args:
        tokenizer: a transformers tokenizer.
        rows: token ids of each text.
    """
    if not rows:
        return []  # batch_decode of older versions returns one text for no rows
    anchor, length = _special_token(tokenizer)
    texts = tokenizer.batch_decode(
        [[*anchor, *row] for row in rows], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return [text[length:] for text in texts]


def _special_token(tokenizer: Any) -> tuple[list[int], int]:
    """Ids that do not merge with following tokens in decoding, and the length of their text."""
    # Without a decoder, tokens are joined by blanks that belong to none of them.
    if getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None) is not None:
        for token_id in tokenizer.all_special_ids:
            if text := tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False):
                return [token_id], len(text)
        for anchor in ANCHORS[1:]:
            if _can_encode(tokenizer, anchor):
                ids = encode_texts([anchor], tokenizer)[0]
                return ids, len(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return [], 0


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _can_encode(tokenizer: Any, text: str) -> bool:
    try:
        tokenizer([text])
    except Exception:
        return False
    return True

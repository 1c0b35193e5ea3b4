r"""Answers in ``\boxed{...}``, and numbers stated beside other numbers."""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo_jax.rewards.math.markup import strip_markup
from grpo_jax.rewards.math.numbers import numeric_value, strip_delimiters

MACRO = r"(?:boxed|fbox|framebox)"
BRACE = re.compile(
    rf"""
      (?P<box> \\\\?{MACRO}\s*\{{ )
    | \\{MACRO}[ \t]* (?P<bare>
          (?=[-+]?\d | \\[a-zA-Z] | [a-zA-Z](?![a-zA-Z]))
          (?: [^\s${{}}\\] | \\[a-zA-Z]+ | \{{[^{{}}$\n]*\}} )++ (?![ \t]*[-+*/=^_<>{{])
      )
    | \\. | [{{}}]
    """,
    re.DOTALL | re.VERBOSE,
)
# Between the boxes of a list: punctuation, mathematics delimiters, "x =" and these words.
LISTING = re.compile(
    r"""(?: (?<=\n)[ \t]*(?:\d{1,2}[.)] | [-*\u2022] | [a-hA-H][.)]) | \(?\b[a-hA-H]\)
          | \b(?:option|case|guess|attempt|answer)\s+(?:\d|[A-H])\b
          | [\s$,;./&*()\[\]{}"\u3001\uff0c] | \\[()\[\],;:!\ \\] | \\q?quad\b | [a-zA-Z]\s?=
          | \\(?:text|mathrm|mbox)\{\ ?(?:or|and|,)\ ?\}
          | \b(?:or|and|maybe|perhaps|possibly|also|alternatively|either|else|even|it|is|could|may|might|be|but|
              otherwise|this|that|the|our|final|correct|answer)\b
          | \b(?:oder|und|ou|et|o|y|или|и)\b | 或者? | 和
          | [|~] | \\lor\b | \b(?:vs|versus)\b | \b(?:first|second|third|guess|option|case|attempt)\b | :
          )*+""",
    re.VERBOSE | re.IGNORECASE,
)
MAX_LISTING = 80
NEGATED = re.compile(r"(?:\bnot|n't|\bnever|\bno longer)\s+(?:equal\s+to\s+|be\s+)?[$\\(\[\s]*\Z", re.IGNORECASE)
REJECTED = re.compile(
    r"[$\\)\]\s]*(?:(?:(?:is|was)\s+not|(?:is|was)n['\u2019]t|can\s?not\s+be|can['\u2019]t\s+be)"
    r"\s+(?:the\s+answer|right|correct|possible)\b"
    r"|(?:is|was)\s+(?:(?:probably|likely|clearly|certainly|definitely)\s+)?(?:wrong|incorrect|false|impossible))",
    re.IGNORECASE,
)
HEDGING = re.compile(
    r"[,;/()&\u3001\uff0c]|\b(?:or|and|also|maybe|perhaps|possibly|alternatively|either|otherwise|could|may|might)\b"
    r"|\b(?:oder|und|ou|et|или|и)\b|或|和",
    re.IGNORECASE,
)
POSSIBLE = r"(?:is|could|may|might|would|can)\s+(?:also\s+|be\s+)*(?:possible|correct|right|valid|acceptable|work)\b"
NUMBER = re.compile(rf"[\s*_`$(\\]*(-?\d[\d.,/]*%?)[\s*_`$)\].,;}}\\]*?(?:\n|\Z|({POSSIBLE}))")
CONDITION = re.compile(
    r"[\s$]*(?:if|when|for|in case)\b[^.\n]{1,60}?(?:[,;]|\band\b|\bor\b|\botherwise\b)[\s$]*(?:[a-zA-Z]\s?=)?[\s$]*",
    re.IGNORECASE,
)
"""The text between two boxes that depend on conditions: "5 if n is even, 6 otherwise"."""


class Statement(NamedTuple):
    """An answer and the span of the text that states it."""

    start: int
    end: int
    answer: str


def final_box(text: str) -> Statement | None:
    r"""The last outermost ``\boxed{...}`` of a text; None if there is none.

    ``\fbox``, ``\framebox`` and ``\boxed 5`` without braces (up to the next space or ``$``) are boxes too. Boxes that
    are separated by no more than punctuation, "x =", a condition or words such as "and" and "or" form a list, whose
    answer is their distinct contents joined by commas. Negated boxes are left out: "It is not \\boxed{5}",
    "\\boxed{5} is wrong".
    """
    run = _last_run(text, _boxes(text))
    if not run:
        return None
    contents = {numeric_value(box.answer) or strip_delimiters(box.answer): box.answer for box in run}
    return Statement(run[0].start, run[-1].end, ", ".join(contents.values()))


def single_box(text: str) -> Statement | None:
    """``final_box`` of a text whose boxes are one list or have the same content; None otherwise."""
    boxes = _boxes(text)
    if not boxes or (len(_last_run(text, boxes)) < len(boxes) and len({box.answer for box in boxes}) > 1):
        return None
    return final_box(text)


def is_list_separator(text: str, end: int, start: int) -> bool:
    """Whether ``text[end:start]`` separates items of a list: punctuation, or words such as "or the answer is".

    Args:
        text: text with two statements.
        end: end of the first statement.
        start: start of the second statement.
    """
    return start - end <= MAX_LISTING and LISTING.fullmatch(text, end, start) is not None


def is_hedged(text: str, end: int, answer: str) -> bool:
    """Whether a numeric answer is followed by another number, as in "5 or 6" or "5. Maybe 6.".

    Args:
        text: text that states the answer.
        end: end of the statement in the text.
        answer: the answer; False if it is not a number.
    """
    value = numeric_value(answer)
    listing = LISTING.match(text, end, end + MAX_LISTING) if value is not None else None
    number = NUMBER.match(text, listing.end()) if listing is not None else None
    if listing is None or number is None or numeric_value(number[1].rstrip(".,")) in (None, value):
        return False
    return "\n" in listing[0] or HEDGING.search(listing[0]) is not None or number[2] is not None


def _boxes(text: str) -> list[Statement]:
    """The outermost boxes, in order."""
    spans: list[tuple[int, int, int, int]] = []  # start and end of the box, start and end of its content
    stack: list[tuple[int, int] | None] = []  # open braces: the opening of a box, or None
    for brace in BRACE.finditer(text):
        if brace["box"]:
            stack.append(brace.span())
        elif brace["bare"]:
            spans.append((*brace.span(), *brace.span("bare")))
        elif brace[0] == "{":
            stack.append(None)
        elif brace[0] == "}" and stack:
            opening = stack.pop()
            if opening is not None:
                while spans and spans[-1][0] > opening[0]:  # boxes inside this one
                    spans.pop()
                spans.append((opening[0], brace.end(), opening[1], brace.start()))
    return [
        Statement(start, end, strip_markup(text[first:last]))
        for start, end, first, last in spans
        if not (NEGATED.search(text[max(start - 40, 0) : start]) or REJECTED.match(text[end : end + 40]))
    ]


def _last_run(text: str, boxes: list[Statement]) -> list[Statement]:
    """The boxes of the list that ends with the last box."""
    first = len(boxes) - 1
    while first > 0:
        end, start = boxes[first - 1].end, boxes[first].start
        limit = min(start, end + MAX_LISTING + 1)
        if not (is_list_separator(text, end, start) or CONDITION.fullmatch(text, end, limit)):
            break
        first -= 1
    return boxes[max(first, 0) :]

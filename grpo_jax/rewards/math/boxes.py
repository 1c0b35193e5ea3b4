r"""``\boxed{...}``, the way mathematics states a final answer."""

from __future__ import annotations

import re

from grpo_jax.rewards.math.markup import plain
from grpo_jax.rewards.math.numbers import numeric_value, unwrap

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
# What may stand between boxes that are a list: punctuation, mathematics delimiters, "x =" and these words.
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
LONGEST_LISTING = 80
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
"""What stands after the first of two boxes that hold under a condition each."""

Statement = tuple[int, int, str]
"""From where to where an answer is stated, and what it is."""


def final_box(text: str) -> Statement | None:
    r"""The last outermost ``\boxed{...}`` of a text, braces balanced; None where there is none.

    ``\fbox`` and ``\framebox`` are boxes too, and so is ``\boxed 5`` without braces, up to the next blank or ``$``.
    Boxes with only punctuation, "x =", a condition or words such as "and" and "or" between them are a list: its answer
    is their contents, those that are equal once, with commas between them. A box that its sentence negates is left
    out, as in "It is not \\boxed{5}" and "\\boxed{5} is wrong".
    """
    run = _last_run(text, _boxes(text))
    if not run:
        return None
    contents = {numeric_value(content) or unwrap(content): content for _, _, content in run}
    return run[0][0], run[-1][1], ", ".join(contents.values())


def box_of(text: str) -> Statement | None:
    """The box of a text in which all boxes are one list, or have the same content; None otherwise."""
    boxes = _boxes(text)
    if not boxes or (len(_last_run(text, boxes)) < len(boxes) and len({content for _, _, content in boxes}) > 1):
        return None
    return final_box(text)


def are_listed(text: str, end: int, start: int) -> bool:
    """Whether there is only punctuation, or only words such as "or the answer is", between two places of a text."""
    return start - end <= LONGEST_LISTING and LISTING.fullmatch(text, end, start) is not None


def is_hedged(text: str, end: int, answer: str) -> bool:
    """Whether another number stands beside a number that is stated up to ``end``, as in "5 or 6" or "5. Maybe 6."."""
    value = numeric_value(answer)
    listing = LISTING.match(text, end, end + LONGEST_LISTING) if value is not None else None
    number = NUMBER.match(text, listing.end()) if listing is not None else None
    if listing is None or number is None or numeric_value(number[1].rstrip(".,")) in (None, value):
        return False
    return "\n" in listing[0] or HEDGING.search(listing[0]) is not None or number[2] is not None


def _boxes(text: str) -> list[Statement]:
    """The outermost boxes, in order."""
    found: list[tuple[int, int, int, int]] = []
    opened: list[tuple[int, int] | None] = []
    for brace in BRACE.finditer(text):
        if brace["box"]:
            opened.append(brace.span())
        elif brace["bare"]:
            found.append((*brace.span(), *brace.span("bare")))
        elif brace[0] == "{":
            opened.append(None)
        elif brace[0] == "}" and opened:
            start = opened.pop()
            if start is not None:
                while found and found[-1][0] > start[0]:  # those within
                    found.pop()
                found.append((start[0], brace.end(), start[1], brace.start()))
    return [
        (start, end, _content(text[first:last]))
        for start, end, first, last in found
        if not (NEGATED.search(text[max(start - 40, 0) : start]) or REJECTED.match(text[end : end + 40]))
    ]


def _content(text: str) -> str:
    return plain(text)


def _last_run(text: str, boxes: list[Statement]) -> list[Statement]:
    first = len(boxes) - 1
    while first > 0:
        end, start = boxes[first - 1][1], boxes[first][0]
        if not (are_listed(text, end, start) or CONDITION.fullmatch(text, end, min(start, end + LONGEST_LISTING + 1))):
            break
        first -= 1
    return boxes[max(first, 0) :]

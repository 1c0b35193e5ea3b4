r"""``\boxed{...}``, the way mathematics states a final answer."""

from __future__ import annotations

import re

from grpo_jax.rewards.markup import plain
from grpo_jax.rewards.numbers import numeric_value, unwrap

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
    r"""(?: [\s$,;./&*()\[\]\u3001\uff0c] | \\[()\[\],;:!\ \\] | \\q?quad\b | [a-zA-Z]\s?=
          | \\(?:text|mathrm|mbox)\{\ ?(?:or|and|,)\ ?\}
          | \b(?:or|and|maybe|perhaps|possibly|also|alternatively|either|else|even|it|is|could|may|might|be)\b
          | \b(?:oder|und|ou|et|o|y|или|и)\b | 或者? | 和 )*+""",
    re.VERBOSE | re.IGNORECASE,
)
LONGEST_LISTING = 80

Box = tuple[int, int, str]
"""Where it begins and ends, and what is in it."""


def final_box(text: str) -> Box | None:
    r"""The last outermost ``\boxed{...}`` of a text, braces balanced; None where there is none.

    ``\fbox`` and ``\framebox`` are boxes too, and so is ``\boxed 5`` without braces, up to the next blank or ``$``.
    Boxes with only punctuation, "x =" or words such as "and" and "or" between them are a list: its answer is their
    contents, those that are equal once, with commas between them.
    """
    run = _last_run(text, _boxes(text))
    if not run:
        return None
    contents = {numeric_value(content) or unwrap(content): content for _, _, content in run}
    return run[0][0], run[-1][1], ", ".join(contents.values())


def box_of(text: str) -> Box | None:
    """The box of a text in which all boxes are one list, or have the same content; None otherwise."""
    boxes = _boxes(text)
    if not boxes or (len(_last_run(text, boxes)) < len(boxes) and len({content for _, _, content in boxes}) > 1):
        return None
    return final_box(text)


def _boxes(text: str) -> list[Box]:
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
    return [(start, end, _content(text[first:last])) for start, end, first, last in found]


def _content(text: str) -> str:
    return plain(text)


def _last_run(text: str, boxes: list[Box]) -> list[Box]:
    first = len(boxes) - 1
    while first > 0:
        between = text[boxes[first - 1][1] : boxes[first][0]]
        if len(between) > LONGEST_LISTING or not LISTING.fullmatch(between):
            break
        first -= 1
    return boxes[max(first, 0) :]

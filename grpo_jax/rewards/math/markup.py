"""Answers without the markdown around them."""

from __future__ import annotations

import re

LONGEST_MARKED = 2000

EMPHASIS = re.compile(r"(?<![\w*`\\])(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^*`\n]{1,200}?)(?<=\S)\1(?![\w*`])")
HTML = re.compile(r"</?(?:b|strong|em|i|u|span|p|center|font|code|mark|br)(?: [^<>]{0,80})?/?>", re.IGNORECASE)
LEFT_OVER = re.compile(r"^(?:[*`]+|_{2,}|\})\s*|(?:[*`]+|(?<!\\)_+)$")
DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("{", "}"))


def plain(text: str) -> str:
    r"""An answer without emphasis, backticks and HTML tags, and without halves of such pairs at its ends.

    ``**73** apples`` is ``73 apples``, and ``73**``, what is left of ``**Answer: 73**``, is ``73``. A star between
    letters or digits stays (``2**3``), and so does a text of more than 2,000 characters as it is. A closing delimiter
    at the end without its opening one goes too: ``5$`` is what is left of ``$\text{Answer: } 5$``.
    """
    text = text.strip()
    if len(text) > LONGEST_MARKED:
        return text
    text = HTML.sub("", text)
    for _ in range(3):
        text = EMPHASIS.sub(r"\2", text)
    text = LEFT_OVER.sub("", text.strip()).strip()
    for opening, closing in DELIMITERS:
        counted = text.replace(r"\$", "")
        is_single = (
            counted.count(closing) % 2 if opening == closing else counted.count(opening) < counted.count(closing)
        )
        if is_single and text.endswith(closing) and not text.endswith("\\" + closing):
            text = LEFT_OVER.sub("", text.removesuffix(closing).strip()).strip()
    return text

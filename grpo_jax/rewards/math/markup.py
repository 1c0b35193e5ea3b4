"""Removal of markdown and HTML around an answer."""

from __future__ import annotations

import re

MAX_LENGTH = 2000

EMPHASIS = re.compile(r"(?<![\w*`\\])(\*{1,3}|_{1,3}|`{1,3})(?=\S)([^*`\n]{1,200}?)(?<=\S)\1(?![\w*`])")
HTML = re.compile(r"</?(?:b|strong|em|i|u|span|p|center|font|code|mark|br)(?: [^<>]{0,80})?/?>", re.IGNORECASE)
UNPAIRED = re.compile(r"^(?:[*`]+|_{2,}|\})\s*|(?:[*`]+|(?<!\\)_+)$")
DELIMITERS = ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("{", "}"))


def strip_markup(text: str) -> str:
    r"""An answer without emphasis, backticks, HTML tags and unpaired delimiters at its ends.

    ``**73** apples`` becomes ``73 apples``. Unpaired delimiters are left by the extraction: ``73**`` of
    ``**Answer: 73**`` becomes ``73``, ``5$`` of ``$\text{Answer: } 5$`` becomes ``5``. Stars between letters or digits
    are kept (``2**3``). A text of more than ``MAX_LENGTH`` characters is returned unchanged but for outer whitespace.
    """
    text = text.strip()
    if len(text) > MAX_LENGTH:
        return text
    text = HTML.sub("", text)
    for _ in range(3):
        text = EMPHASIS.sub(r"\2", text)
    text = UNPAIRED.sub("", text.strip()).strip()
    for opening, closing in DELIMITERS:
        delimiters = text.replace(r"\$", "")
        is_unpaired = (
            delimiters.count(closing) % 2
            if opening == closing
            else delimiters.count(opening) < delimiters.count(closing)
        )
        if is_unpaired and text.endswith(closing) and not text.endswith("\\" + closing):
            text = UNPAIRED.sub("", text.removesuffix(closing).strip()).strip()
    return text

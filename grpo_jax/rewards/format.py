"""Whether a completion has the asked-for form, whatever it says."""

from __future__ import annotations

import re
from typing import Any

TAG = re.compile(r"</?(?:think|answer)>")
TAGS_IN_ORDER = ["<think>", "</think>", "<answer>", "</answer>"]


def format_reward(prompts: list[str], completions: list[str], **_columns: list[Any]) -> list[float]:
    """1.0 where a completion is one ``<think>...</think>``, then one ``<answer>...</answer>``, and nothing else.

    Blanks and line breaks around the two blocks do not matter, and neither does what stands inside them, be it nothing
    or several lines, as long as it is no other such tag: blocks that are repeated, nested, out of order or not closed
    give 0.0. Takes time linear in the length.

    Args:
        prompts: not looked at: a completion must hold both blocks whole, so the prompt must not open one for it.
        completions: the texts.
    """
    return [float(_is_well_formed(completion.strip())) for completion in completions]


def _is_well_formed(text: str) -> bool:
    if TAG.findall(text) != TAGS_IN_ORDER:
        return False
    between = text[text.index("</think>") + len("</think>") : text.index("<answer>")]
    return text.startswith("<think>") and text.endswith("</answer>") and not between.strip()

"""Where a completion's thought ends and what it answers begins."""

from __future__ import annotations

import re

THOUGHTS = {
    "think": (r"<think[ \t]?>", r"</think[ \t]?>"),
    "thinking": (r"<thinking>", r"</thinking>"),
    "thought": (r"<thought>", r"</thought>"),
    "reasoning": (r"<reasoning>", r"</reasoning>"),
    "thoughts": (r"<thoughts>", r"</thoughts>"),
    "scratchpad": (r"<scratchpad>", r"</scratchpad>"),
    "reflection": (r"<reflection>", r"</reflection>"),
    "analysis": (r"<analysis>", r"</analysis>"),
    "seed": (r"<seed:think>", r"</seed:think>"),
    "magistral": (r"\[think\]", r"\[/think\]"),
    "kimi": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "open_thoughts": (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    "command": (r"<\|start_thinking\|>", r"<\|end_thinking\|>"),
    "gpt_oss": (r"<\|channel\|>analysis(?:<\|message\|>)?", r"<\|channel\|>final(?: [^<>|]{0,40})?<\|message\|>"),
}
"""What opens and what closes a thought, in any case, by who writes it so."""

TAGS = "|".join(f"(?P<{kind}>{opening})|(?P<end_{kind}>{closing})" for kind, (opening, closing) in THOUGHTS.items())
TAG = re.compile(rf"(?=[<\[\u25c1])(?:{TAGS})", re.IGNORECASE)  # ten times as fast with the first character apart
ROLE = r"(?:system|user|human|question|instruction|input|assistant|response|gpt|model)[ \t*]*:"
TURN = re.compile(rf"<[|\uff5c]|\[/?INST\]|<(?:start|end)_of_turn>|^[ \t#*]*{ROLE}", re.MULTILINE | re.IGNORECASE)
TURN_OPENING = re.compile(rf"(?:.*[>\]]|[ \t#*]*{ROLE}[ \t*]*)?", re.IGNORECASE)


def after_thought(prompt: str, completion: str) -> str | None:
    r"""The part of a completion that follows its thought; None where the thought is not finished.

    A thought goes from a tag of ``THOUGHTS``, such as ``<think>``, to the next closing tag of the same kind. Thoughts
    do not nest, and tags of other kinds within are text. A closing tag without an opening one ends a thought that
    began with the completion. The last thought counts: what stands before and between thoughts is not returned.

    Args:
        prompt: the text that the completion continues. It has opened the thought if its last tag is an opening one with
            nothing but blanks after it, or with the first words of the thought: the tag then begins a line or a turn,
            and no other turn follows. A prompt that only mentions the tags has not opened it.
        completion: the text that was sampled.

    Returns:
        The completion itself where no thought was opened; None where one was opened, by the completion or by the
        prompt, and not closed.
    """
    opened = opened_by(prompt)
    start = 0
    for tag in TAG.finditer(completion):
        kind = tag.lastgroup or ""
        if not kind.startswith("end_"):
            opened = opened or kind
        elif opened in (None, kind.removeprefix("end_")):
            opened, start = None, tag.end()
    return None if opened else completion[start:]


def opened_by(prompt: str) -> str | None:
    """The kind of thought, as a key of ``THOUGHTS``, that a prompt ends in; None where it ends in none."""
    tags = list(TAG.finditer(prompt))
    if not tags or (tags[-1].lastgroup or "").startswith("end_"):
        return None
    line = prompt[: tags[-1].start()].rpartition("\n")[2].rstrip()
    after = prompt[tags[-1].end() :]
    is_open = not after.strip() or (TURN_OPENING.fullmatch(line) is not None and TURN.search(after) is None)
    return tags[-1].lastgroup if is_open else None

"""Separation of a completion into its thought and its answer."""

from __future__ import annotations

import re

NAMES = ("thinking", "thought", "reasoning", "thoughts", "scratchpad", "reflection", "analysis")
THOUGHTS = {
    "think": (r"<think[ \t]?>", r"</think[ \t]?>"),
    **{name: (f"<{name}>", f"</{name}>") for name in NAMES},
    "seed": (r"<seed:think>", r"</seed:think>"),
    "magistral": (r"\[think\]", r"\[/think\]"),
    "kimi": ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    "open_thoughts": (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    "command": (r"<\|start_thinking\|>", r"<\|end_thinking\|>"),
    "gpt_oss": (r"<\|channel\|>analysis(?:<\|message\|>)?", r"<\|channel\|>final(?: [^<>|]{0,40})?<\|message\|>"),
}
"""Patterns of the opening and the closing tag of a thought, case-insensitive, by the format or model that uses them."""

TAGS = "|".join(f"(?P<{kind}>{opening})|(?P<end_{kind}>{closing})" for kind, (opening, closing) in THOUGHTS.items())
TAG = re.compile(rf"(?=[<\[\u25c1])(?:{TAGS})", re.IGNORECASE)  # the lookahead makes it ten times as fast
ROLE = r"(?:system|user|human|question|instruction|input|assistant|response|gpt|model)[ \t*]*:"
TURN = re.compile(rf"<[|\uff5c]|\[/?INST\]|<(?:start|end)_of_turn>|^[ \t#*]*{ROLE}", re.MULTILINE | re.IGNORECASE)
TURN_OPENING = re.compile(rf"(?:.*[>\]]|[ \t#*]*{ROLE}[ \t*]*)?", re.IGNORECASE)


def after_thought(prompt: str, completion: str) -> str | None:
    r"""The text of a completion after its last thought; None if a thought is unfinished.

    A thought extends from an opening tag of ``THOUGHTS``, such as ``<think>``, to the next closing tag of the same
    kind. Thoughts do not nest; tags of other kinds inside are text. A closing tag without an opening tag ends a thought
    that started with the completion.

    Args:
        prompt: the text that the completion continues. It has opened the thought if its last tag is an opening tag that
            is followed only by whitespace, or that starts a line or a turn and is not followed by another turn. A
            prompt that only mentions the tags has not opened it.
        completion: the sampled text.

    Returns:
        The whole completion if neither it nor the prompt opened a thought; None if a thought was not closed.
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
    """The kind of the thought that a prompt has opened, a key of ``THOUGHTS``; None if it has not opened one."""
    tags = list(TAG.finditer(prompt))
    if not tags or (tags[-1].lastgroup or "").startswith("end_"):
        return None
    line = prompt[: tags[-1].start()].rpartition("\n")[2].rstrip()
    after = prompt[tags[-1].end() :]
    is_open = not after.strip() or (TURN_OPENING.fullmatch(line) is not None and TURN.search(after) is None)
    return tags[-1].lastgroup if is_open else None

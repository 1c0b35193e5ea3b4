"""Extraction of a completion's Python program from its fenced blocks."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from textwrap import dedent

from grpo_jax.rewards.thought import TURN, after_thought

LANGUAGE = r"\{?\.?[ \t]*(?:(?:i?python|pypy|py)(?:-?[0-9][0-9.]*)?|[\w/-]+\.py)(?![\w+#-])"
PYTHON = re.compile(LANGUAGE, re.IGNORECASE)
FENCE = re.compile(
    rf"""
    ^(?P<indent>[ \t>]*(?:(?:[-*+]|\d{{1,9}}[.)])[ \t]+)?)
    (?P<before>(?:[^`~\n]*(?=```{LANGUAGE}\}}?[ \t]*$))?)  # text on the line of an opening fence
    (?P<mark>`{{3,}}|~{{3,}})(?P<info>[^\n]*)$
    """,
    re.VERBOSE | re.IGNORECASE,
)
READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\s*\(\s*0\b|\bfileinput\b")
MAX_CLOSING_FENCES = 8
"""Fences that are tried as the end of a block, whose docstrings may contain fences too."""
MAX_PROGRAM_LENGTH = 200_000


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: its info string, such as ``python``; "" for none.
        text: the lines between its fences.
    """

    language: str
    text: str

    @property
    def is_python(self) -> bool:
        """Whether its info string says Python."""
        return PYTHON.match(self.language) is not None

    @cached_property
    def tree(self) -> ast.Module | None:
        """Its syntax tree; None if it is not Python."""
        return parsed(self.text)

    @cached_property
    def defines(self) -> frozenset[str]:
        """The names that it binds at module level."""
        return frozenset(bound_names(self.tree)) if self.tree else frozenset()

    @cached_property
    def needs(self) -> frozenset[str]:
        """The names that it uses, does not bind, and that are not builtins."""
        return free_names(self.tree) if self.tree else frozenset()


def extract_program(
    completion: str, *, prompt: str = "", names: Collection[str] = (), reads_input: bool = False
) -> str | None:
    """The program of a completion; None if there is none.

    Only the text after the thought is searched; a completion whose thought is unfinished has no program. The program is
    the last fenced Python block that defines one of ``names`` (with ``reads_input``, that reads input), or else the
    last Python block, preceded by the other blocks that define names it needs, such as imports and helpers. Blocks
    without a language are used if no block is marked as Python; blocks of other languages never are. Without fences the
    program is the content of the last ``<answer>...</answer>``, or else the whole text, with or without the prompt
    before it, if that parses as Python and defines one of ``names`` (or reads input).

    A fence is three or more backticks or tildes at the start of a line, as in Markdown: also indented, in a list item,
    or opened at the end of the prompt. The last block may be unclosed. A fence inside a program, as in a docstring,
    does not close the block if the text before it does not parse.

    Args:
        completion: the sampled text.
        prompt: the text that it continues.
        names: functions and classes that the tests use.
        reads_input: whether the tests run the program as a script that reads standard input.
    """
    completion = completion.replace("\ufeff", "")  # a byte order mark, which Python takes only from files
    text = after_thought(prompt, completion)
    if text is None:
        return None
    begun = open_fence(prompt) if text == completion else ""
    blocks = fenced_blocks(begun + text)
    candidates = [block for block in blocks if block.is_python] or [block for block in blocks if not block.language]
    if candidates:
        return assembled(candidates, names, reads_input)
    _, tag, rest = text.rpartition("<answer>")
    program, end, _ = rest.partition("</answer>")
    if tag and end and program.strip():
        return program.strip("\n")
    bare = [Block("", each) for each in (text, *([prompt + text] if text == completion else []))]
    return next((each.text for each in bare if each.tree and _is_usable(each, names, reads_input)), None)


def open_fence(prompt: str) -> str:
    """The end of a prompt from its unclosed opening fence; "" if it has none."""
    lines = prompt.replace("\r\n", "\n").split("\n")
    begin = None
    mark = ""
    for number, line in enumerate(lines):
        fence = FENCE.match(line)
        if fence is None:
            continue
        if begin is None:
            begin, mark = number, fence["mark"]
        elif _closes(fence, mark):
            begin = None
    begun = "" if begin is None else "\n".join(lines[begin:])
    return "" if TURN.search(begun) else begun


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, in order."""
    lines = [part for line in text.replace("\r\n", "\n").split("\n") for part in _split_closing(line)]
    fences = [
        (number, fence)
        for number, line in enumerate(lines)
        if ("```" in line or "~~~" in line) and (fence := FENCE.match(line))
    ]
    blocks, place = [], 0
    while place < len(fences):
        begin, fence = fences[place]
        place += 1
        if fence["mark"][0] == "`" and "`" in fence["info"]:
            continue  # code within a line
        closings = (n for n in range(place, len(fences)) if _closes(fences[n][1], fence["mark"]))
        block, end = None, None
        for n in islice(closings, MAX_CLOSING_FENCES):
            longer = _block(lines[begin + 1 : fences[n][0]], fence)
            if block is None or longer.tree is not None:
                block, end = longer, n
            if longer.tree is not None or not (longer.is_python or not longer.language):
                break
        blocks.append(_block(lines[begin + 1 :], fence) if block is None else block)
        place = len(fences) if end is None else end + 1
    return blocks


def _split_closing(line: str) -> list[str]:
    """A line, split in two if it is code followed by a closing fence."""
    stripped = line.rstrip(" \t")
    code = stripped.rstrip("`")
    is_late = len(stripped) - len(code) >= 3 and "`" not in code and code.strip(" \t>") != ""
    return [code, stripped[len(code) :]] if is_late else [line]


def _block(lines: list[str], fence: re.Match[str]) -> Block:
    text = "".join(f"{_unindented(line, fence['indent'])}\n" for line in lines)
    first = next((line for line in text.split("\n") if line.strip()), "")
    return Block(fence["info"].strip(), dedent(text) if first[:1] in (" ", "\t") else text)


def assembled(blocks: Sequence[Block], names: Collection[str], reads_input: bool) -> str:
    """The program: the last block that tests can use, preceded by the blocks that define names it needs.

    Args:
        blocks: Python blocks in order, at least one.
        names: functions and classes that the tests use.
        reads_input: whether the tests run the program on an input.
    """
    usable = [block for block in blocks if not (names or reads_input) or _is_usable(block, names, reads_input)]
    last = usable[-1] if usable else blocks[-1]
    place = next(n for n in reversed(range(len(blocks))) if blocks[n] is last)
    chosen, needed = {place}, set(last.needs)
    for n in [*reversed(range(place)), *range(place + 1, len(blocks))]:
        if needed & blocks[n].defines:
            chosen.add(n)
            needed = (needed - blocks[n].defines) | blocks[n].needs
    return "\n".join(blocks[n].text for n in [*sorted(chosen - {place}), place])


def _is_usable(block: Block, names: Collection[str], reads_input: bool) -> bool:
    """Whether a block defines one of the names or, if there are no names, reads input when it should."""
    if names:
        return bool(block.defines & set(names))
    return reads_input and READS_INPUT.search(block.text) is not None


def parsed(program: str) -> ast.Module | None:
    """The syntax tree of a program; None if it is not Python or is longer than 200,000 characters."""
    if len(program) > MAX_PROGRAM_LENGTH:
        return None
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def bound_names(tree: ast.AST) -> set[str]:
    """The names that a module binds at module level, including in branches and loops."""
    names: set[str] = set()
    waiting = list(ast.iter_child_nodes(tree))
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
                continue
            case ast.Import() | ast.ImportFrom():
                names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Lambda():
                continue
        waiting += ast.iter_child_nodes(node)
    return names


def free_names(tree: ast.AST) -> frozenset[str]:
    """The names that a program uses anywhere and binds nowhere, without builtins."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bound.add(node.name)
            case ast.Import() | ast.ImportFrom():
                bound |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
            case ast.arg():
                bound.add(node.arg)
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
    return frozenset(used - bound - vars(builtins).keys() - {"__name__", "__file__"})


def _closes(fence: re.Match[str], mark: str) -> bool:
    info = fence["info"]  # prose may follow a closing fence on its line, after a space
    ends = not info.strip() or (info[0] in " \t" and PYTHON.match(info.strip()) is None)
    return fence["mark"][0] == mark[0] and len(fence["mark"]) >= len(mark) and ends and not fence["before"]


def _unindented(line: str, indent: str) -> str:
    """A line without the indentation of its fence, as far as the line has it."""
    if ">" in indent:
        return re.sub(r"^[ \t]*>[ \t]?", "", line)
    blank = len(line) - len(line.lstrip(" \t"))
    return line[min(blank, len(indent)) :]

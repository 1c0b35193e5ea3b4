"""The program in a completion: which fenced blocks it consists of."""

from __future__ import annotations

import ast
import doctest
import re
import textwrap
from dataclasses import dataclass

from grpo_jax.rewards.code_names import BUILTINS, free_names
from grpo_jax.rewards.thought import TURN, after_thought

OPENING = re.compile(r"^(?P<before>[^`\n]*?)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
MARKER = re.compile(r"[ \t>]*(?:[-*+]|\d+[.)])?[ \t]*")
PYTHON = re.compile(r"\W*(?:[ic]?python|py(?:py|w)?)(?:[ _-]?[23](?:\.\d+)*)?(?![\w+#.-])|.*\.py\b", re.IGNORECASE)
WORD = re.compile(r"\W*[A-Za-z]")
MOST_CLOSINGS = 16
"""Closing fences of one block that are tried: each costs a parse."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its content, and whether it is marked as Python (None where it names no language)."""

    content: str
    is_python: bool | None
    tree: ast.Module | None


def extract_program(text: str, *, prompt: str = "", calls: bool = True) -> str | None:
    """The program of a completion; None if there is none.

    Only what follows a finished thought counts, see ``after_thought``. Candidates are the fenced blocks that are marked
    as Python or, where none is, those that name no language and contain statements of Python; a marked one comes before
    an unmarked one unless that defines or assigns something. A fence has three or more backticks or tildes. A block
    ends at the first closing fence before which it is complete Python, so that a fence within a docstring does not end
    it; the last one may be unclosed, and the prompt may have opened the first. A transcript of a session (``>>>``)
    counts where there is nothing else.

    The program is the last candidate that is complete: all names that it uses are defined in it or in earlier ones.
    Earlier blocks are put before it where it needs them and, if the tests call functions, where they only define what
    it does not. Blocks that only use an earlier one, as an example, are left out; if the program reads standard input,
    such a block is kept where the earlier one does nothing by itself.

    Without a fenced block it is the text between the last ``<answer>`` and ``</answer>``.

    Args:
        text: the completion.
        prompt: the text that it continues.
        calls: whether tests call functions of the program; if not, they run it with standard input.
    """
    after = after_thought(prompt, text)
    if after is None:
        return None
    after = after.replace("\r\n", "\n")
    if after == text.replace("\r\n", "\n"):
        after = _open_block(prompt.replace("\r\n", "\n")) + after
    candidates = _candidates(_blocks(after))
    if candidates:
        return _joined(candidates, calls)
    _, tag, rest = after.rpartition("<answer>")
    program, end, _ = rest.partition("</answer>")
    return program.strip("\n") if tag and end and program.strip() else None


def _open_block(prompt: str) -> str:
    """The end of a prompt from an opening fence that it does not close; empty where there is none."""
    if not re.search(r"`{3}|~{3}", prompt):
        return ""
    lines = prompt.split("\n")
    number = 0
    while number < len(lines):
        opening = OPENING.match(lines[number])
        if not opening:
            number += 1
            continue
        end = _end(lines, number, opening)
        if end is None:
            rest = "\n".join(lines[number + 1 :])
            is_program = PYTHON.match(opening["info"]) or not WORD.match(opening["info"])
            if not is_program or TURN.search(rest):
                return ""
            return f"{opening['fence']}{opening['info']}\n{rest}" if number + 1 < len(lines) else lines[number]
        number = end + 1
    return ""


def _blocks(text: str) -> list[Block]:
    lines = text.split("\n")
    blocks = []
    number = 0
    while number < len(lines):
        opening = OPENING.match(lines[number])
        if not opening:
            number += 1
            continue
        end = _end(lines, number, opening)
        content = _content(lines, number, len(lines) if end is None else end, opening)
        is_python = True if PYTHON.match(opening["info"]) else False if WORD.match(opening["info"]) else None
        blocks.append(Block(content, is_python, _parsed(content)))
        number = len(lines) if end is None else end + 1
    return blocks


def _end(lines: list[str], start: int, opening: re.Match[str]) -> int | None:
    """The line that closes a block; None where none does."""
    fence = opening["fence"]
    mark, length = fence[0], len(fence)
    closing = re.compile(rf"[ \t>]*{mark}{{{length},}}(?P<rest>.*)$|.*[^{mark}]{mark}{{{length},}}[ \t]*$")
    found = [number for number in range(start + 1, len(lines)) if closing.match(lines[number])]
    is_other = WORD.match(opening["info"]) and not PYTHON.match(opening["info"])
    plain = [number for number in found if not _opens(lines[number])]
    if is_other:
        return plain[0] if plain else None
    for number in found[:MOST_CLOSINGS]:
        content = _content(lines, start, number, opening)
        if content.strip() and _parsed(content) is not None:
            return number
    return plain[0] if plain else None


def _opens(line: str) -> bool:
    """Whether a fence is followed by a language, so that it rather opens a block."""
    match = re.match(r"[ \t>]*(?:`{3,}|~{3,})(.*)$", line)
    return bool(match and re.match(r"\{?\.?[A-Za-z][\w.+#-]*\}?[ \t]*$", match[1]))


def _content(lines: list[str], start: int, end: int, opening: re.Match[str]) -> str:
    """The lines within a block, without the indentation or the quotation marks that the fence has too."""
    marker = MARKER.match(opening["before"])
    quoted = ">" in (marker[0] if marker else "")
    inner = lines[start + 1 : end]
    if end < len(lines):
        mark = opening["fence"][0]
        last = re.match(rf"(.*?[^{mark}])(?:{mark}{{3,}})[ \t]*$", lines[end])
        if last and last[1].strip(" \t>"):
            inner = [*inner, last[1]]
    if quoted:
        inner = [re.sub(r"^[ \t]*>[ ]?", "", line) for line in inner]
    indent = len(opening["before"]) if not opening["before"].strip() else 0
    inner = [line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in inner]
    content = "\n".join(inner)
    content = content + "\n" if content and not content.endswith("\n") else content
    dedented = textwrap.dedent(content)
    return dedented if _parsed(content) is None and _parsed(dedented) is not None else content


def _parsed(content: str) -> ast.Module | None:
    try:
        tree = ast.parse(content)
        free_names(content)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree


def _candidates(blocks: list[Block]) -> list[Block]:
    """Blocks that may be (part of) the program."""
    marked = [each for each in blocks if each.is_python]
    unmarked = [each for each in blocks if each.is_python is None and each.tree and _does_something(each.tree)]
    if marked:
        unmarked = [each for each in unmarked if each.tree and _binds(each.tree)]
    found = [each for each in blocks if each in marked or each in unmarked]
    if found and all(each.tree is None for each in found):
        found = [_from_transcript(each) for each in found]
    elif not found:
        transcripts = [_from_transcript(each) for each in blocks if each.content.lstrip().startswith(">>>")]
        found = [each for each in transcripts if each.tree]
    if not found:
        found = [
            each
            for each in blocks
            if each.is_python is None and re.search(r"^\s*(?:def|class|import|from)\b", each.content, re.M)
        ]
    return [each for each in found if each.tree] or found[-1:]


def _from_transcript(block: Block) -> Block:
    try:
        source = "".join(each.source for each in doctest.DocTestParser().get_examples(block.content))
    except ValueError:
        source = ""
    return Block(source, True, _parsed(source)) if source else block


def _does_something(tree: ast.Module) -> bool:
    """Whether there is a statement that is more than a value, which output of a program often is."""
    return any(
        not isinstance(each, ast.Expr) or any(isinstance(node, ast.Call) for node in ast.walk(each))
        for each in tree.body
    )


def _binds(tree: ast.Module) -> bool:
    return bool(_defined(tree))


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node in tree.body:
            names.add(node.name)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
    for each in tree.body:
        if not isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names |= {
                node.id for node in ast.walk(each) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            }
    return names


def _functions(tree: ast.Module) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    named = {each.name for each in tree.body if isinstance(each, kinds)}
    values = [each for each in tree.body if isinstance(each, ast.Assign) and isinstance(each.value, ast.Lambda)]
    return named | {target.id for each in values for target in each.targets if isinstance(target, ast.Name)}


def _acts(tree: ast.Module) -> bool:
    """Whether a block does more than define when it is run."""
    quiet = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    for each in tree.body:
        if isinstance(each, quiet) or (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant)):
            continue
        if isinstance(each, (ast.Assign, ast.AnnAssign)) and not any(isinstance(n, ast.Call) for n in ast.walk(each)):
            continue
        return True
    return False


def _joined(blocks: list[Block], calls: bool) -> str:
    trees = [each.tree for each in blocks]
    if len(blocks) == 1 or any(tree is None for tree in trees):
        return blocks[-1].content
    needs = [free_names(each.content) - BUILTINS for each in blocks]
    gives = [_defined(tree) for tree in trees if tree]
    chosen = len(blocks) - 1
    for number in range(len(blocks) - 1, -1, -1):
        tree, before = trees[number], set().union(*gives[:number])
        assert tree is not None
        if needs[number] - before and not _functions(tree):
            continue  # it is a fragment
        functions_before = set().union(*(_functions(each) for each in trees[:number] if each))
        is_example = bool(needs[number] & functions_before) and not _functions(tree)
        if calls and number and functions_before and not _functions(tree):
            continue
        if not calls and is_example and any(_acts(each) for each in trees[:number] if each):
            continue
        chosen = number
        break
    wanted, parts, given = set(needs[chosen]), [chosen], set(gives[chosen])
    for number in range(chosen - 1, -1, -1):
        tree = trees[number]
        assert tree is not None
        is_needed = bool(gives[number] & wanted)
        is_more = calls and not _acts(tree) and bool(_functions(tree) - given) and not (_functions(tree) & given)
        if is_needed or is_more:
            parts.append(number)
            wanted = (wanted - gives[number]) | needs[number]
            given |= gives[number]
    return "".join(blocks[number].content for number in sorted(parts))

# ruff: noqa: RUF001
"""Detection of prose inside code and mathematics, where a language reward that ignores these would miss it."""

from __future__ import annotations

from itertools import pairwise

import regex

MIN_WORDS = 3
MAX_WORDS_OF_STRING = 8

# Words that also occur in programs, so that they do not make a text prose.
KEYWORDS = frozenset(
    """
    and as assert async await begin bool boolean break by byte case catch char class const continue def default del
    delete do done double echo elif else elseif end enum except export extends extern fi final finally float fn for
    foreach from func function global go goto group if implements import in include inline insert int interface into is
    join lambda let limit local long match mod module mut namespace new nil none nonlocal not null of on or order
    otherwise package pass print private protected pub public raise repeat require return select self set short signed
    sizeof static string struct super switch table template then this throw throws to true false try typedef typeof
    union unsigned until update use using values var virtual void volatile where while with xor yield
    sin cos tan cot sec csc log ln lg exp max min sup inf gcd lcm det lim arcsin arccos arctan
    apt cd commit git install ls npm pip pull push run sudo
    """.split()  # noqa: SIM905
)
DENSE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}"
DENSER = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORD = rf"(?:\p{{Lu}}?+[\p{{Ll}}\p{{M}}'\u2019]++|[\p{{Lo}}\p{{M}}--[{DENSE}{DENSER}]]++)(?![\p{{L}}\p{{M}}\d_])"
GAP = r"""[,;:.!?"\u201d)]{0,3}+[ \t]++(?:[0-9][0-9.,%]*+[ \t]++)?+["\u201c(]?+"""
RUN = regex.compile(
    rf"""
      (?<![\p{{L}}\p{{M}}\d_\\.@/]) (?P<spaced> {WORD} (?:{GAP}{WORD})*+ )
    | (?P<dense> [{DENSE}] (?:[{DENSE}\p{{M}}]|[，。、：；！？\d]++(?=[{DENSE}]))*+ )
    | (?P<denser> [{DENSER}] (?:[{DENSER}\p{{M}}]|[ \d]++(?=[{DENSER}]))*+ )
    """,
    regex.VERBOSE | regex.V1,
)
MIN_LETTERS = {"dense": 5, "denser": 10}
LETTERS_PER_WORD = 2
UNSPACED = regex.compile(rf"[{DENSE}{DENSER}]")
LETTER = regex.compile(r"\p{L}")
WORDS = regex.compile(r"[\p{L}\p{M}'\u2019]+")

COMMENT = regex.compile(r"[ \t]*+(?:\#|//|--|/\*|\*|%|;)(?!include|define|if|endif|!)")
FENCE = regex.compile(r"[ \t]*+(?:`++|~~~+)[\w{}.+-]*+[ \t]*+")
DOCSTRING = regex.compile(r"\"\"\"|'''")
TRAILING = regex.compile(r"[ \t](?:\#|//)[ \t].*+")
STRING = regex.compile(r"\"(?:[^\"\\\n]|\\.)*+(\")?+|(?<![\p{L}\d])'(?:[^'\\\n]|\\.)*+(')?+")
COMMAND = regex.compile(r"\\[A-Za-z]++\*?+")
BLANK = regex.compile(r"\\[ ,;:!]|~|\\q?quad(?![A-Za-z])|\}(?:[\s$&]|\\[\\ ,;:!])*+\\(?:text[a-z]*+|mbox|mathrm)\{")
"""A space of LaTeX, also the gap between one ``\\text{...}`` and the next."""


def prose_of_code(code: str) -> str:
    """The prose in a piece of code, one run of words on each line; "" if there is only code.

    A run has at least three consecutive words that are not keywords, or five letters of Chinese or Japanese, or ten of
    Thai, Lao, Khmer or Burmese. Comments and docstrings count as code if they are at most half of the lines, and as
    prose otherwise. Strings of up to eight words are code.
    """
    comments, rest = _split_comments(code)
    return _runs("\n".join(rest if len(comments) <= len(rest) else [*comments, *rest]))


def prose_of_mathematics(formula: str) -> str:
    r"""The prose in mathematics, such as ``\text{We add the two numbers}``, by the rules of ``prose_of_code``."""
    return _runs(COMMAND.sub("\n", BLANK.sub(" ", formula)))


def _split_comments(code: str) -> tuple[list[str], list[str]]:
    """The lines that are comments or docstrings, and the other lines without short strings."""
    comments, rest = [], []
    in_docstring = False
    for line in code.split("\n"):
        quotes = len(DOCSTRING.findall(line))
        if in_docstring or quotes or COMMENT.match(line):
            comments.append(line)
        elif line.strip() and not FENCE.fullmatch(line):
            rest.append(TRAILING.sub("", STRING.sub(_remove_short, line)))
        in_docstring ^= bool(quotes % 2)
    return [line for line in comments if WORDS.search(line)], rest


def _remove_short(string: regex.Match[str]) -> str:
    if not (string[1] or string[2]):
        return string[0]  # not closed
    letters = len(UNSPACED.findall(string[0]))
    words = len(WORDS.findall(string[0])) + letters / LETTERS_PER_WORD
    return string[0][1:-1] if words > MAX_WORDS_OF_STRING else " 0 "


def _runs(text: str) -> str:
    return "\n".join(run[0] for run in RUN.finditer(text) if _is_prose(run))


def _is_prose(run: regex.Match[str]) -> bool:
    if run.lastgroup in MIN_LETTERS:
        return len(LETTER.findall(run[0])) >= MIN_LETTERS[run.lastgroup]
    words = WORDS.findall(run[0])
    count = sum(word.lower() not in KEYWORDS and len(word) > 1 for word in words)
    return count >= MIN_WORDS and 2 * count > len(words) and _has_pair(run[0])


def _has_pair(run: str) -> bool:
    """Whether two words that are not keywords are separated only by whitespace."""
    words = run.split()
    return any(
        a.isalpha() and b[:1].isalpha() and a.lower() not in KEYWORDS and b.lower().strip(".,;:!?") not in KEYWORDS
        for a, b in pairwise(words)
    )

"""Mathematics as text: the many ways to write one thing made one, and what could hide something refused."""

from __future__ import annotations

import re

LONGEST = 400
PLAIN = {
    "\u2212": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u00f7": r"\div ",
    "\u03c0": r"\pi ",
    "\u03b8": r"\theta ",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2265": r"\ge ",
    "\u2260": r"\ne ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b1": r"\pm ",
    "\u00b0": r"^\circ ",
    "\u00b2": "^2",
    "\u00b3": "^3",
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u00a0": " ",
    "\u202f": " ",
    "\u211d": r"\mathbb{R}",
}
SPELLINGS = {
    r"\dfrac": r"\frac",
    r"\tfrac": r"\frac",
    r"\cfrac": r"\frac",
    r"\dbinom": r"\binom",
    r"\tbinom": r"\binom",
    r"\leq": r"\le",
    r"\leqslant": r"\le",
    r"\geq": r"\ge",
    r"\geqslant": r"\ge",
    r"\neq": r"\ne",
    r"\lt": "<",
    r"\gt": ">",
    r"\varnothing": r"\emptyset",
    r"\lbrace": r"\{",
    r"\rbrace": r"\}",
    r"\lbrack": "[",
    r"\rbrack": "]",
    r"\lvert": "|",
    r"\rvert": "|",
    r"\vert": "|",
    r"\mid": "|",
    r"\colon": ":",
    r"\degree": r"^\circ",
    r"\ast": r"\cdot",
    r"\%": "%",
    r"\$": "$",
    r"\&": "&",
    r"\_": "_",
    r"\lor": r"\text{ or }",
    r"\vee": r"\text{ or }",
    r"\operatorname": r"\text",
    r"\mathrm": r"\text",
    r"\textrm": r"\text",
    r"\textbf": r"\text",
    r"\textit": r"\text",
    r"\mathbf": r"\text",
    r"\mathit": r"\text",
    r"\mbox": r"\text",
    r"\textup": r"\text",
    r"\varphi": r"\phi",
    r"\epsilon": r"\varepsilon",
}
BLANKS = {r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\thinspace", r"\enspace"}
DROPPED = {r"\left", r"\right", r"\displaystyle", r"\textstyle", r"\limits", r"\rm", r"\bf"}
DROPPED |= {rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
GREEK = "alpha beta gamma delta varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
GREEK += " Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
LETTERS = {rf"\{name}" for name in GREEK.split()}
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp sqrt frac binom min max gcd lcm"
KNOWN = LETTERS | {rf"\{name}" for name in FUNCTIONS.split()}
KNOWN |= {r"\cdot", r"\times", r"\div", r"\pm", r"\mp", r"\pi", r"\infty", r"\le", r"\ge", r"\ne", r"\in", r"\cup"}
KNOWN |= {r"\cap", r"\setminus", r"\emptyset", r"\{", r"\}", r"\\", r"\circ", r"\text", r"\mathbb", r"\overline"}
KNOWN |= {r"\begin", r"\end", r"\lfloor", r"\rfloor", r"\lceil", r"\rceil"}
COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)", re.DOTALL)
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))


def tidy(text: str) -> str | None:
    """Mathematics in one spelling: no delimiters, sizes or thin spaces, one name for each command.

    None for what cannot be trusted to say what it shows: a command that is not known to be harmless (it might hide,
    colour or define something), a comment, another script's digits and look-alikes, invisible characters, braces that
    do not pair; and for more than 400 characters, or no text at all.
    """
    text = text.strip()
    if len(text) > LONGEST:
        return None
    text = "".join(PLAIN.get(character, character) for character in text)
    if any(not (" " <= c <= "~" or c in "\n\t\u20ac\u00a3") for c in text):
        return None
    text = re.sub(r"(\d)\\,(?=\d{3}(?!\d))", r"\1", text).replace("{,}", ",")
    if re.search(r"(?<!\\)%(?=[^\s.,;$)\\}])", text):
        return None  # a LaTeX comment
    text = _unwrapped(text.replace("~", " "))
    if re.search(r"\\text\s*\{[^}]*\\", text):
        return None
    parts, end = [], 0
    for match in COMMAND.finditer(text):
        command = SPELLINGS.get(match[0], match[0])
        if match[0] in BLANKS or command in DROPPED:
            command = " "
        elif match[0] not in SPELLINGS and command not in KNOWN:
            return None
        parts += [text[end : match.start()], command, " " if command[-1].isalpha() else ""]
        end = match.end()
    text = " ".join("".join([*parts, text[end:]]).split())
    text = re.sub(
        r"\\frac ?(\d)(?: ?(\d)|(?= ?\{))", lambda m: rf"\frac{{{m[1]}}}" + (f"{{{m[2]}}}" if m[2] else ""), text
    )
    text = re.sub(r"(\\frac ?\{[^{}]*\}) ?(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt ?(\d)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\text \{", r"\\text{", text).removesuffix(".").strip()
    text = _unwrapped(text)
    return text if text and balanced(text) else None


def _unwrapped(text: str) -> str:
    r"""Without mathematics delimiters, ``\boxed`` and outer ``\text`` around the whole."""
    while True:
        before = text
        text = text.strip().removesuffix(".").strip()
        for opening, closing in DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            is_one = not any(each in inner.replace(r"\$", "") for each in (opening, closing))
            if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * len(opening) and is_one:
                text = inner
        match = re.fullmatch(r"\\(?:boxed|text|fbox) ?\{([^{}]*|(?:[^{}]|\{[^{}]*\})*)\}", text)
        if match and not match[1].startswith(" "):
            text = match[1]
        if text == before:
            return text


def balanced(text: str) -> bool:
    """Whether braces pair. Other brackets need not: half-open intervals."""
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def split_top(text: str, separator: str) -> list[str]:
    """``text`` cut at a separator (a regular expression) wherever no bracket is open; parts are stripped.

    A separator with a group keeps what the group matched, as ``re.split`` does.
    """
    tokens = re.compile(rf"(?P<sep>{separator})|\\[{{}}]|\\begin ?\{{\w+\}}|\\end ?\{{\w+\}}|\\.|.", re.DOTALL)
    parts, depth, start = [], 0, 0
    for match in tokens.finditer(text):
        token = match[0]
        if match["sep"] is not None and depth == 0:
            parts += [text[start : match.start()].strip(), *[g for g in match.groups()[1:] if g is not None]]
            start = match.end()
        elif token in ("(", "[", "{", r"\{") or token.startswith(r"\begin"):
            depth += 1
        elif token in (")", "]", "}", r"\}") or token.startswith(r"\end"):
            depth = max(depth - 1, 0)
    return [*parts, text[start:].strip()]

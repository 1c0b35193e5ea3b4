"""Normalisation of LaTeX and plain-text mathematics; text that may not say what it displays is refused."""

from __future__ import annotations

import re

MAX_LENGTH = 400
UNICODE = {
    **{"\u2212": "-", "\u2013": "-", "\u2044": "/", "\u2215": "/", "\u2019": "'", "\u00a0": " ", "\u202f": " "},
    **{"\u03b1": r"\alpha ", "\u03b2": r"\beta ", "\u03b8": r"\theta ", "\u03c0": r"\pi ", "\u221e": r"\infty "},
    **{"\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ", "\u00b1": r"\pm "},
    **{"\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u2261": r"\equiv ", "\u2208": r"\in "},
    **{"\u222a": r"\cup ", "\u2229": r"\cap ", "\u2216": r"\setminus ", "\u2205": r"\emptyset "},
    **{"\u2124": r"\mathbb{Z}", "\u211d": r"\mathbb{R}", "\u00b0": r"^\circ ", "\u2220": r"\angle "},
    **{"\u27e8": r"\langle ", "\u27e9": r"\rangle ", "\u230a": r"\lfloor ", "\u230b": r"\rfloor "},
    **{"\u2308": r"\lceil ", "\u2309": r"\rceil ", "\u2026": r"\ldots ", "\u00a2": r"\text{ cents}"},
    **{"\u00bd": r"\frac{1}{2}", "\u00bc": r"\frac{1}{4}", "\u00be": r"\frac{3}{4}"},
    **{"\u2153": r"\frac{1}{3}", "\u2154": r"\frac{2}{3}"},
}
OTHER_SPELLINGS = {
    r"\frac": "dfrac tfrac cfrac",
    r"\binom": "dbinom tbinom",
    r"\le": "leq leqslant leqq",
    r"\ge": "geq geqslant geqq",
    r"\ne": "neq",
    "<": "lt",
    ">": "gt",
    r"\cdot": "ast",
    r"\setminus": "backslash smallsetminus",
    r"\emptyset": "varnothing",
    r"\mathbb": "Bbb",
    r"\tan": "tg",
    r"\cot": "ctg",
    r"\arctan": "arctg",
    r"\phi": "varphi",
    r"\varepsilon": "epsilon",
    r"\ldots": "dots cdots dotsc",
    r"\overline": "overrightarrow",
    r"^\circ": "degree textdegree",
    r"\{": "lbrace",
    r"\}": "rbrace",
    "[": "lbrack",
    "]": "rbrack",
    "|": "lvert rvert vert mid",
    r"\text{ or }": "lor vee",
    r"\text{ and }": "land wedge",
    r"\text": "textnormal textrm textsf texttt textsc textbf textit textup mathrm mathsf mathtt mathbf mbox emph vec "
    "boldsymbol operatorname",
    "\u20ac": "euro",
    "\u00a3": "pounds",
    ":": "colon",
    r"\\": "cr",
}
"""The canonical spelling of commands, by the text that replaces them."""
SPELLINGS = {rf"\{name}": canonical for canonical, names in OTHER_SPELLINGS.items() for name in names.split()}
SPELLINGS |= {rf"\{character}": character for character in "%$&_"}
SPACES = {r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\thinspace", r"\enspace"}
LAYOUT = "left right displaystyle textstyle limits rm bf large Large huge"
DROPPED = {rf"\{name}" for name in LAYOUT.split()}
DROPPED |= {rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
GREEK = "alpha beta gamma delta varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
GREEK += " Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
UNIT_VECTORS = (r"\veci", r"\vecj", r"\veck")
"""Internal commands for the unit vectors i, j and k, which are written bold, with a hat or an arrow."""
LETTERS = {rf"\{name}" for name in GREEK.split()} | set(UNIT_VECTORS)
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth ln lg log exp sqrt frac binom min max"
FUNCTIONS += " gcd lcm"
SYMBOLS = "cdot times div pm mp pi infty le ge ne in cup cap setminus emptyset circ text mathbb overline begin end"
SYMBOLS += " lfloor rfloor lceil rceil over choose bar dot approx equiv pmod bmod mod parallel perp cong sim forall"
SYMBOLS += " prime ldots langle rangle angle triangle"
ALLOWED = LETTERS | {r"\{", r"\}", r"\\"} | {rf"\{name}" for name in f"{FUNCTIONS} {SYMBOLS}".split()}
SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
SUPERSCRIPT_DIGITS = str.maketrans(SUPERSCRIPTS, "0123456789-")
COLOURS = "red|blue|green|black|orange|purple|magenta|brown|teal|violet|cyan"
COLOURED = re.compile(
    rf"\{{ ?\\color ?\{{(?:{COLOURS})\}} ?(?P<a>.+)\}}|\\(?:text)?color ?\{{(?:{COLOURS})\}} ?(?P<b>.+)"
)
COMMAND = re.compile(r"\\(?:[a-zA-Z]+|.)", re.DOTALL)
DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
FORMULA = re.compile(r"(?<!\\)\$(?=\S)((?:[^$\\]|\\.)+)(?<=\S)\$(?!\d)")
WRAPPER = re.compile(
    r"\\(?:boxed|text|fbox|mbox|textbf|mathbf|displaystyle|underline|bm|boldsymbol|mathrm)(?![a-zA-Z]) ?(\{)?"
)
PLAIN_NAMES = re.compile(
    r"(?<![\\A-Za-z])(arcsin|arccos|arctan|sinh|cosh|tanh|sqrt|sin|cos|tan|cot|ln|log|exp|pi|theta)(?=[^A-Za-z]|$)"
)
CHOOSE = re.compile(r"C ?_ ?(?:\{ ?(\d+) ?\}|(\d)) ?\^ ?(?:\{ ?(\d+) ?\}|(\d))")
UNIT_VECTOR = re.compile(
    r"\\(?:mathbf|hat|vec|boldsymbol|bm|widehat) ?"
    r"(?:\{ ?(?:\\mathbf ?\{ ?)?\\?([ijk])(?:math)? ?\}? ?\}|\\?([ijk])(?:math)?)(?![a-zA-Z])"
)


def normalize(text: str) -> str | None:
    """Mathematics in canonical spelling: no delimiters, sizes or thin spaces, one name for every command.

    None for a text that may not say what it displays: unknown commands (they might hide, colour or define something),
    comments, digits and look-alikes of other scripts, invisible characters, unbalanced braces. None also for an empty
    text and for more than ``MAX_LENGTH`` characters.
    """
    text = re.sub(r"(?<!\\)\\\Z", "", text.strip())  # a space "\\ " at the end
    if len(text) > MAX_LENGTH:
        return None
    text = re.sub("\u221a ?(\\d+(?:\\.\\d+)?|[a-z])", r"\\sqrt{\1}", text).replace("\u221a", r"\sqrt ")
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda match: f"^{{{match[0].translate(SUPERSCRIPT_DIGITS)}}}", text)
    text = "".join(UNICODE.get(character, character) for character in text)
    if any(not (" " <= c <= "~" or c in "\n\t\u20ac\u00a3\u00a5\u20b9") for c in text):
        return None  # another script or an invisible character
    text = _remove_thousands_separators(text.replace("...", r"\ldots "))
    if re.search(r"(?<!\\)%(?=[^\s.,;$)\\}])", text):
        return None  # a LaTeX comment
    text = _join_formulas(_unwrap(text.replace("~", " ")))
    if re.search(r"\\text\s*\{[^}]*\\(?![%$&_ ,;])", text):
        return None  # a command inside \text
    for _ in range(2):  # exponents of units: \text{m^{2}/s^{2}}
        text = re.sub(r"(\\(?:text|mathrm|mbox) ?\{[^{}]*\^) ?\{ ?(-?\d) ?\}", r"\1\2", text)
    text = re.sub(r"\\not ?=|\\not ?\\eq(?![a-z])", r"\\ne ", text)
    text = re.sub(rf"\\operatorname\*? ?\{{ ?({FUNCTIONS.replace(' ', '|')}) ?\}}", r"\\\1 ", text)
    text = re.sub(r"\\(?:mathrm|text) ?\{(lcm|gcd|arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp)\}", r"\\\1 ", text)
    text = re.sub("\\\\text ?\\{ ?(\\\\?[$%:.\u20ac\u00a3\u00a5\u20b9]) ?\\}", r"\1", text)
    # Row distances in matrices; {1}/{2}; binomials written C_5^3; x = \boxed{5}.
    text = re.sub(r"\\\\ ?\[ ?-?[\d.]+ ?(?:pt|em|ex|mm|cm) ?\]", r"\\\\", text)
    text = re.sub(r"\{ ?(-?\d+) ?\} ?/ ?\{ ?(\d+) ?\}", r"\1/\2", text)
    if (choose := CHOOSE.fullmatch(text)) and int(choose[3] or choose[4]) <= int(choose[1] or choose[2]):
        text = rf"\binom{{{choose[1] or choose[2]}}}{{{choose[3] or choose[4]}}}"
    text = re.sub(r"^([^{}]*=) ?\\boxed ?\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}$", r"\1\2", text)
    text = re.sub(r"\\mathit ?\{(\w+)\}", r" \1 ", text)
    text = re.sub(r"\\([pb]matrix) ?\{(.*)\}", r"\\begin{\1}\2\\end{\1}", text, flags=re.DOTALL)
    text = UNIT_VECTOR.sub(lambda match: rf"\vec{match[1] or match[2]} ", text)
    text = re.sub(r"\\(?:operatorname\*?|mathrm|text) ?\{([ei])\}(?! ?\w)", r" \1 ", text)
    text = re.sub(r"\\(?:vec|mathbf|boldsymbol|bm) ?\{ ?([a-z]) ?\}", r" \1 ", text)
    text = re.sub(r"(?<=[\s\d}])(lcm|gcd)(?= ?\()", r"\\\1", text)
    parts, end = [], 0
    for match in COMMAND.finditer(text):
        command = SPELLINGS.get(match[0], match[0])
        if match[0] in SPACES or command in DROPPED:
            command = " "
        elif match[0] not in SPELLINGS and command not in ALLOWED:
            return None
        parts += [text[end : match.start()], command, " " if command[-1].isalpha() else ""]
        end = match.end()
    text = _to_commands(" ".join("".join([*parts, text[end:]]).split()))
    text = re.sub(r"\\text \{", r"\\text{", text).rstrip(".,; ")
    text = re.sub(r"\\mathbb ([A-Z])", r"\\mathbb {\1}", text)
    text = _unwrap(text)
    return text if text and balanced(text) else None


def _join_formulas(text: str) -> str:
    r"""``$x=1$ and $x=3$`` as one formula, with its words in ``\text``; any other text unchanged.

    As in Markdown, no space follows an opening ``$`` or precedes a closing one, so that prices are not taken for
    formulas.
    """
    pieces = FORMULA.split(text)
    outside = pieces[::2]
    is_adjacent = not all(words.strip() for words in outside[1:-1])
    if len(pieces) == 1 or is_adjacent or any(re.search(r"\d|(?<!\\)\$", words) for words in outside):
        return text
    pieces[::2] = [
        rf"\text{{{words}}}" if re.fullmatch(r"[ ,]*[A-Za-z]{2}[A-Za-z ,]*", words) else words for words in outside
    ]
    return "".join(pieces)


def _remove_thousands_separators(text: str) -> str:
    r"""``1234`` for ``1{,}234``, ``1,\!234`` and ``1\,234``; ``1.5`` for ``1{,}5``."""
    text = re.sub(r"(?<=\d)(?:\\!)? ?, ?\\! ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\\[,; ] ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\} ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)
    text = re.sub(r"(?<![a-z])\{ ?([:<>=]) ?\}", r"\1", text)
    grouped = r"(?<![\d,.])\d{1,3}(?:,\d{3})+"
    for pattern in (rf"{grouped}(?= ?(?:\\pi|\\sqrt|[a-z]))", rf"(?<=[^\\]\{{){grouped}(?=\}})"):
        text = re.sub(pattern, lambda match: match[0].replace(",", ""), text)
    return text


def _to_commands(text: str) -> str:
    r"""Plain-text names and operators as LaTeX commands, outside of ``\text``."""
    pieces = re.split(r"(\\text ?\{[^{}]*\})", text)
    for index in range(0, len(pieces), 2):
        piece = PLAIN_NAMES.sub(lambda match: rf"\{match[1]} ", pieces[index])
        piece = piece.replace("**", "^").replace(">=", r"\ge ").replace("<=", r"\le ").replace("+/-", r"\pm ")
        piece = re.sub(r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty ", piece)
        pieces[index] = re.sub(r"([)\]}]) ?(?:U|union) ?(?=[(\[{\\])", r"\1 \\cup ", piece)
    return " ".join("".join(pieces).split())


def _unwrap(text: str) -> str:
    r"""The text without mathematics delimiters, ``\boxed`` and ``\text`` around all of it."""
    while True:
        before = text
        text = text.strip().removesuffix(".").strip()
        for opening, closing in DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            is_single = not any(delimiter in inner.replace(r"\$", "") for delimiter in (opening, closing))
            if text.startswith(opening) and text.endswith(closing) and len(text) > 2 * len(opening) and is_single:
                text = inner
        if emphasized := re.fullmatch(r"(\*\*|\*|__|`)([^*`]+)\1", text):
            text = emphasized[2]
        if (coloured := COLOURED.fullmatch(text)) and balanced(coloured["a"] or coloured["b"]):
            text = coloured["a"] or coloured["b"]
            text = text[1:-1] if text[0] == "{" and text[-1] == "}" and balanced(text[1:-1]) else text
        match = WRAPPER.match(text)
        if match and match[1] and text.endswith("}") and balanced(text[match.end() : -1]):
            inner = text[match.end() : -1]
            text = text if inner.startswith(" ") else inner
        elif match and match[0].startswith((r"\boxed", r"\fbox")) and re.fullmatch(r" ?\w+", text[match.end() :]):
            text = text[match.end() :]
        if text == before:
            return text


def balanced(text: str) -> bool:
    """Whether braces are balanced. Other brackets need not be, as in half-open intervals."""
    depth = 0
    for token in re.findall(r"\\.|[{}]", text):
        depth += (token == "{") - (token == "}")
        if depth < 0:
            return False
    return depth == 0


def split_top_level(text: str, separator: str) -> list[str]:
    """Split a text at a separator outside of all brackets; parts are stripped.

    Args:
        text: text to split.
        separator: regular expression. Text matched by its groups is returned between the parts, as by ``re.split``.
    """
    tokens = re.compile(
        rf"(?P<sep>{separator})|\\[{{}}]|\\begin ?\{{\w+\}}|\\end ?\{{\w+\}}|\\[lr]angle|\\.|.", re.DOTALL
    )
    parts, depth, start = [], 0, 0
    for match in tokens.finditer(text):
        token = match[0]
        if match["sep"] is not None and depth == 0:
            parts += [text[start : match.start()].strip(), *[g for g in match.groups()[1:] if g is not None]]
            start = match.end()
        elif token in ("(", "[", "{", r"\{", r"\langle") or token.startswith(r"\begin"):
            depth += 1
        elif token in (")", "]", "}", r"\}", r"\rangle") or token.startswith(r"\end"):
            depth = max(depth - 1, 0)
    return [*parts, text[start:].strip()]

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
    "\u00bd": r"\frac{1}{2}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u2044": "/",
    "\u2215": "/",
    "\u2261": r"\equiv ",
    "\u2124": r"\mathbb{Z}",
    "\u2216": r"\setminus ",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u2026": r"\ldots ",
    "\u2019": "'",
    "\u00a2": r"\text{ cents}",
    "\u2220": r"\angle ",
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
    r"\land": r"\text{ and }",
    r"\wedge": r"\text{ and }",
    r"\leqq": r"\le",
    r"\geqq": r"\ge",
    r"\backslash": r"\setminus",
    r"\smallsetminus": r"\setminus",
    r"\Bbb": r"\mathbb",
    r"\tg": r"\tan",
    r"\ctg": r"\cot",
    r"\arctg": r"\arctan",
    r"\dots": r"\ldots",
    r"\cdots": r"\ldots",
    r"\dotsc": r"\ldots",
    r"\euro": "\u20ac",
    r"\pounds": "\u00a3",
    r"\textdegree": r"^\circ",
    r"\textnormal": r"\text",
    r"\textsf": r"\text",
    r"\texttt": r"\text",
    r"\mathtt": r"\text",
    r"\textsc": r"\text",
    r"\mathsf": r"\text",
    r"\emph": r"\text",
    r"\vec": r"\text",
    r"\overrightarrow": r"\overline",
    r"\boldsymbol": r"\text",
    r"\operatorname": r"\text",
    r"\mathrm": r"\text",
    r"\textrm": r"\text",
    r"\textbf": r"\text",
    r"\textit": r"\text",
    r"\mathbf": r"\text",
    r"\cr": r"\\",
    r"\mbox": r"\text",
    r"\textup": r"\text",
    r"\varphi": r"\phi",
    r"\epsilon": r"\varepsilon",
}
BLANKS = {r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\thinspace", r"\enspace"}
DROPPED = {
    r"\left",
    r"\right",
    r"\displaystyle",
    r"\textstyle",
    r"\limits",
    r"\rm",
    r"\bf",
    r"\large",
    r"\Large",
    r"\huge",
}
DROPPED |= {rf"\{size}{side}" for size in ("big", "Big", "bigg", "Bigg") for side in ("", "l", "r", "m")}
GREEK = "alpha beta gamma delta varepsilon zeta eta theta kappa lambda mu nu xi rho sigma tau phi chi psi omega"
GREEK += " Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega"
UNIT_VECTORS = (r"\veci", r"\vecj", r"\veck")
"""Our commands for the unit vectors, which are written in bold, with a hat or an arrow."""
LETTERS = {rf"\{name}" for name in GREEK.split()} | set(UNIT_VECTORS)
FUNCTIONS = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh coth ln lg log exp sqrt frac binom min max"
FUNCTIONS += " gcd lcm"
KNOWN = LETTERS | {rf"\{name}" for name in FUNCTIONS.split()}
KNOWN |= {r"\cdot", r"\times", r"\div", r"\pm", r"\mp", r"\pi", r"\infty", r"\le", r"\ge", r"\ne", r"\in", r"\cup"}
KNOWN |= {r"\cap", r"\setminus", r"\emptyset", r"\{", r"\}", r"\\", r"\circ", r"\text", r"\mathbb", r"\overline"}
KNOWN |= {r"\begin", r"\end", r"\lfloor", r"\rfloor", r"\lceil", r"\rceil", r"\over", r"\choose", r"\bar", r"\dot"}
KNOWN |= {r"\approx", r"\equiv", r"\pmod", r"\bmod", r"\mod", r"\parallel", r"\perp", r"\cong", r"\sim"}
KNOWN |= {r"\forall", r"\prime", r"\ldots", r"\langle", r"\rangle", r"\angle", r"\triangle"}
SUPERSCRIPTS = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b"
RAISED = str.maketrans(SUPERSCRIPTS, "0123456789-")
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


def tidy(text: str) -> str | None:
    """Mathematics in one spelling: no delimiters, sizes or thin spaces, one name for each command.

    None for what cannot be trusted to say what it shows: a command that is not known to be harmless (it might hide,
    colour or define something), a comment, another script's digits and look-alikes, invisible characters, braces that
    do not pair; and for more than 400 characters, or no text at all.
    """
    text = re.sub(r"(?<!\\)\\\Z", "", text.strip())  # of a blank "\\ " at the end
    if len(text) > LONGEST:
        return None
    text = re.sub("\u221a ?(\\d+(?:\\.\\d+)?|[a-z])", r"\\sqrt{\1}", text).replace("\u221a", r"\sqrt ")
    text = re.sub(f"[{SUPERSCRIPTS}]+", lambda match: f"^{{{match[0].translate(RAISED)}}}", text)
    text = "".join(PLAIN.get(character, character) for character in text)
    if any(not (" " <= c <= "~" or c in "\n\t\u20ac\u00a3\u00a5\u20b9") for c in text):
        return None
    text = _without_thousands_separators(text.replace("...", r"\ldots "))
    if re.search(r"(?<!\\)%(?=[^\s.,;$)\\}])", text):
        return None  # a LaTeX comment
    text = _joined(_unwrapped(text.replace("~", " ")))
    if re.search(r"\\text\s*\{[^}]*\\(?![%$&_ ,;])", text):
        return None
    for _ in range(2):
        text = re.sub(r"(\\(?:text|mathrm|mbox) ?\{[^{}]*\^) ?\{ ?(-?\d) ?\}", r"\1\2", text)
    text = re.sub(r"\\not ?=|\\not ?\\eq(?![a-z])", r"\\ne ", text)
    text = re.sub(rf"\\operatorname\*? ?\{{ ?({FUNCTIONS.replace(' ', '|')}) ?\}}", r"\\\1 ", text)
    text = re.sub(r"\\(?:mathrm|text) ?\{(lcm|gcd|arc(?:sin|cos|tan)|sin|cos|tan|ln|log|exp)\}", r"\\\1 ", text)
    text = re.sub("\\\\text ?\\{ ?(\\\\?[$%:.\u20ac\u00a3\u00a5\u20b9]) ?\\}", r"\1", text)
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
        if match[0] in BLANKS or command in DROPPED:
            command = " "
        elif match[0] not in SPELLINGS and command not in KNOWN:
            return None
        parts += [text[end : match.start()], command, " " if command[-1].isalpha() else ""]
        end = match.end()
    text = _plain_operators(" ".join("".join([*parts, text[end:]]).split()))
    text = re.sub(r"\\text \{", r"\\text{", text).rstrip(".,; ")
    text = re.sub(r"\\mathbb ([A-Z])", r"\\mathbb {\1}", text)
    text = _unwrapped(text)
    return text if text and balanced(text) else None


def _joined(text: str) -> str:
    """Sentences such as ``$x=1$ and $x=3$`` as one formula, words as texts; anything else as it is.

    As in Markdown, no blank follows an opening ``$`` or precedes a closing one, so that prices are not taken for
    formulas.
    """
    pieces = FORMULA.split(text)
    outside = pieces[::2]
    is_glued = any(not each.strip() for each in outside[1:-1]) or any(re.search(r"\d", each) for each in outside)
    if len(pieces) == 1 or is_glued or any(re.search(r"(?<!\\)\$", each) for each in outside):
        return text
    pieces[::2] = [
        rf"\text{{{each}}}" if re.fullmatch(r"[ ,]*[A-Za-z]{2}[A-Za-z ,]*", each) else each for each in outside
    ]
    return "".join(pieces)


def _without_thousands_separators(text: str) -> str:
    r"""``1{,}234``, ``1,\!234`` and ``1\,234`` without what groups their digits; a decimal comma made a point."""
    text = re.sub(r"(?<=\d)(?:\\!)? ?, ?\\! ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\\[,; ] ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\} ?(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ".", text)
    text = re.sub(r"(?<![a-z])\{ ?([:<>=]) ?\}", r"\1", text)
    grouped = r"(?<![\d,.])\d{1,3}(?:,\d{3})+"
    for place in (rf"{grouped}(?= ?(?:\\pi|\\sqrt|[a-z]))", rf"(?<=[^\\]\{{){grouped}(?=\}})"):
        text = re.sub(place, lambda match: match[0].replace(",", ""), text)
    return text


def _plain_operators(text: str) -> str:
    r"""Plain text's names and signs as LaTeX has them, outside of ``\text``."""
    pieces = re.split(r"(\\text ?\{[^{}]*\})", text)
    for place in range(0, len(pieces), 2):
        piece = PLAIN_NAMES.sub(lambda match: rf"\{match[1]} ", pieces[place])
        piece = piece.replace("**", "^").replace(">=", r"\ge ").replace("<=", r"\le ").replace("+/-", r"\pm ")
        piece = re.sub(r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty ", piece)
        pieces[place] = re.sub(r"([)\]}]) ?(?:U|union) ?(?=[(\[{\\])", r"\1 \\cup ", piece)
    return " ".join("".join(pieces).split())


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
        if marked := re.fullmatch(r"(\*\*|\*|__|`)([^*`]+)\1", text):
            text = marked[2]
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

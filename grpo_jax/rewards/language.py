"""Whether a completion thinks in the language that it was asked to think in."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import regex

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.prose import prose_of_code, prose_of_mathematics

WORDS_A_PIECE = 16
MOST_RUNS = 64
MOST_PIECES = 200
WORDS_IN_FAVOUR = 4.0
ROUNDS = 20
LONGEST_WORD = 40

# Scripts that put no blanks between words, by how many letters make a word on average.
LETTERS_A_WORD = {2: ("Han", "Hiragana", "Katakana", "Bopomofo"), 4: ("Thai", "Lao", "Khmer", "Myanmar")}
# Who writes in which script; a language that is not named here writes in Latin letters.
LANGUAGES = {
    "Arabic": "ar ary arz fa ps sdh ug ur uzs",
    "Armenian": "hy",
    "Bengali": "as bn",
    "Bopomofo": "yue wuu zh",
    "Cyrillic": "ba be bg kk ky mk mn ru sr tg tt uk uz",
    "Devanagari": "gom hi mr ne sa",
    "Ethiopic": "am",
    "Georgian": "ka",
    "Greek": "el grc",
    "Gujarati": "gu",
    "Gurmukhi": "pa",
    "Han": "ja yue wuu zh",
    "Hangul": "ko",
    "Hebrew": "hbo he",
    "Hiragana": "ja",
    "Kannada": "kn",
    "Katakana": "ja",
    "Khmer": "km",
    "Lao": "lo",
    "Malayalam": "ml",
    "Myanmar": "my",
    "Oriya": "or",
    "Sinhala": "si",
    "Tamil": "ta",
    "Telugu": "te",
    "Thai": "th",
    "Tibetan": "dz",
}
LATIN_TOO = ("sr", "uz")
VARIETIES = {"ar": ("ary", "arz"), "no": ("nn",), "zh": ("wuu", "yue")}

# In every pattern a loop takes what it can and gives nothing back, and stops at the next opening or closing, so that
# no text is read more than a few times.
CODE = regex.compile(
    r"""
      ^[ \t]*+(```|~~~)[^\n]*+\n (?:(?!^[ \t]*+\1).)*+ ^[ \t]*+\1
    | ```[^`]++```
    | `[^`\n]++`
    """,
    regex.VERBOSE | regex.DOTALL | regex.MULTILINE,
)
# "`one` `word` `each`" is as good as "`one word each`".
ADJACENT = regex.compile(r"(?<=[^\s`])`[ ,]{1,3}`(?=[^\s`])|(?<=\p{L}\p{L})\$[ ,]{1,3}\$(?=\p{L}\p{L})")
ENVIRONMENT = regex.compile(
    r"""
    \\begin\{ (?!itemize|enumerate|description|proof|quote|center|document) ([A-Za-z]{1,20}\*?) \}
    (?:(?!\\(?:begin|end)\{).)*+
    \\end\{\1\}
    """,
    regex.VERBOSE | regex.DOTALL,
)
MATHEMATICS = regex.compile(
    r"""
      \$\$[^$]++\$\$
    | (?<![\\$]) \$ (?=[^\s$]) (?:[^$\\\n]|\\.|\n(?![ \t]*+\n))*+ (?<!\s) \$ (?!\d)
    | (?<!\\) \\\[ (?:\\\\|(?!\\[\[\]]).)*+ \\\]
    | (?<!\\) \\\( (?:\\\\|(?!\\[()]).)*+ \\\)
    """,
    regex.VERBOSE | regex.DOTALL,
)

# The letters that formulas, units and names in programs are written with.
ALPHABET = r"\p{Latin}\p{Greek}\p{Cyrillic}"
UNITS = (
    "km|cm|mm|nm|kg|mg|ml|mL|hr|hrs|min|mins|sec|secs|ms|ft|yd|mi|lb|lbs|oz|mph|kph|Hz|kHz|kW|kWh|kJ|Pa|mol|EUR|USD|"
    "км|см|мм|кг|мг|мл|мин|сек"
)
FUNCTIONS = (
    "sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|ln|lg|exp|max|min|sup|inf|mod|gcd|lcm|det|lim"
)
SYMBOLS = regex.compile(
    rf"""
      (?:https?://|www\.)[!-~]++
    | </?[A-Za-z]\w{{0,30}}+/?>
    | \\(?:begin|end|label|ref|tag|color|hspace|vspace)\{{[^{{}}\n]{{0,40}}+\}}
    | \\[A-Za-z]++
    | [_^]\{{[^{{}}\n]{{0,30}}+\}}
    | (?<![{ALPHABET}\d_]) (?:
          [{ALPHABET}\d]{{1,10}}+[_^]\{{[^{{}}\n]{{0,30}}+\}}
        | [A-Za-z_][A-Za-z0-9_.]{{0,60}} \( (?:[!-'*-~]|(?<=[,+*/=<>-])\ |\ (?=[+*/=<>-])){{0,80}}+ \)
        | \d[\d.,]{{0,20}}+[ ]?(?:{UNITS})(?![{ALPHABET}])
        | [{ALPHABET}]*+[\d_][{ALPHABET}\d_]*+
        | \p{{Lu}}?+\p{{Ll}}++\p{{Lu}}[{ALPHABET}]*+
        | (?:{FUNCTIONS})(?![{ALPHABET}])
        | [[{ALPHABET}]&&\p{{Lu}}]{{1,4}}+(?![{ALPHABET}\p{{M}}]|['\u2019]\p{{L}})
      )
    | (?<![{ALPHABET}\p{{Arabic}}\p{{Hebrew}}\p{{M}}]|\p{{L}}['\u2019])
      [{ALPHABET}\p{{Arabic}}\p{{Hebrew}}]
      (?![{ALPHABET}\p{{Arabic}}\p{{Hebrew}}\p{{M}}]|['\u2019]\p{{L}})
    """,
    regex.VERBOSE | regex.V1,
)


@per_sample(columns=("target_language",))
def language_reward(
    prompts: list[str],
    completions: list[str],
    *,
    target_language: str | list[str | None],
    thought_only: bool = True,
    **_columns: list[Any],
) -> list[float | None]:
    """Words in the target language / words of the thought, by ``language_share``; None where there is no target.

    The thought is what stands before the last ``</think>``, or, where there is none, before the first ``<answer>`` or
    up to the end; and of that what follows the first ``<think>``, or all of it if the prompt has opened the tag.

    A thought without a word scores 0.0. With 1.0 thinking nothing would be the easiest way to a full score, and with
    None the sample would be left out of learning: an empty thought would never be discouraged.

    How much is thought, and what stands outside the thought, is not looked at: that is for other rewards.

    Args:
        prompts: not looked at.
        completions: the texts.
        target_language: a code for all of them, as in ``functools.partial(language_reward, target_language="de")``; or
            one a completion, as a column of that name gives them (and it takes the place of the one for all), None
            where it does not matter.
        thought_only: whether what stands outside the thought is left out. If False, the whole completion counts.

    Raises:
        ValueError: a code that is not known, before anything is scored; the message lists the known ones.

    DeepSeek-R1 (arXiv 2501.12948), section 2.3.2.
    """
    targets = [target_language] * len(completions) if isinstance(target_language, str) else target_language
    for target in {target_language} if isinstance(target_language, str) else {*targets} - {None}:
        _check(target)
    texts = [_thought(completion) if thought_only else completion for completion in completions]
    return [
        None if target is None else language_share(text, target) or 0.0
        for text, target in zip(texts, targets, strict=True)
    ]


def language_share(text: str, target: str) -> float | None:
    r"""The share of a text's words that are in the target language, from 0.0 to 1.0; None if it has no words.

    What is not a word, and so counts neither for nor against: closed code blocks and code in backticks; mathematics in
    ``$``, ``$$``, ``\(...\)``, ``\[...\]`` or an environment that is not one for prose (prose in any of these counts,
    as ``prose_of_code`` and ``prose_of_mathematics`` find it), and every ``\command``; tags
    and addresses; identifiers (snake_case, camelCase, with a digit, or called as in ``f(x)``); names of mathematical
    functions (gcd); capitals up to four in a row (ABC); numbers, with the unit after them; single letters (Latin,
    Greek, Cyrillic, Arabic or Hebrew).

    A word in a script that the target is not written in is foreign, be it in the middle of a sentence. Where the
    script does not tell, the text is cut at the ends of sentences and lines, and after 16 words, and each piece goes
    by its letters to the languages it may be in: ``p(language | piece)`` is proportional to ``p(piece | language)``,
    from the detector, times how common the language is in the text, which is found by going over all pieces until
    it settles. So a piece too short to tell is taken to be in the language of the text around it. The target starts
    with four words in its favour, so that a text too short to tell is taken to be in the target. Cantonese and Wu are
    Chinese (zh), Egyptian and Moroccan are Arabic (ar), and Nynorsk is Norwegian (no).

    Two letters of Chinese or Japanese, or four of Thai, Lao, Khmer or Burmese, are one word, since these put no blanks
    between words. A run of more than 40 letters is cut into words of 40.

    Takes time linear in the length. The detector sees at most 200 pieces, spread evenly, which stand for the others.
    It is loaded when it is first needed, once a process. Equal texts get equal shares, and no text makes this raise.

    Args:
        text: any text, with the mathematics and code in it.
        target: the ISO 639 code: of two letters where there is one, as in de.

    Raises:
        ValueError: a code that is not known; the message lists the known ones.
    """
    _check(target)
    words, pieces = _read(_prose(text), target)
    if not words:
        return None
    own_words = sum(weight for weight, _ in pieces)
    return min(own_words * _share_of_pieces(pieces, target) / words, 1.0)


@cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _scripts() -> dict[str, frozenset[str]]:
    """The scripts of every known language."""
    scripts = {}
    for code in sorted(set(_detector().labels) - {"zxx"}):  # zxx: not a language
        named = {script for script, codes in LANGUAGES.items() if code in codes.split()}
        scripts[code] = frozenset(named | {"Latin"} if code in LATIN_TOO else named or {"Latin"})
    return scripts


def _check(target: Any) -> None:
    if target not in _scripts():
        raise ValueError(f"target language must be one of the codes {[*_scripts()]}, not {target!r}")


def _thought(completion: str) -> str:
    thought, closing, _ = completion.rpartition("</think>")
    if not closing:
        thought = completion.partition("<answer>")[0]
    before, opening, after = thought.partition("<think>")
    return after if opening else before


def _prose(text: str) -> str:
    text = CODE.sub(lambda code: f"\n{prose_of_code(code[0])}\n", ADJACENT.sub(" ", text))
    for _ in range(3):  # environments three deep
        text = ENVIRONMENT.sub(_prose_of_formula, text)
    return SYMBOLS.sub(" ", MATHEMATICS.sub(_prose_of_formula, text))


def _prose_of_formula(formula: regex.Match[str]) -> str:
    return f"\n{prose_of_mathematics(formula[0])}\n"


def _letters(scripts: Iterable[str]) -> str:
    return "[" + "".join(rf"\p{{Script_Extensions={script}}}" for script in sorted(scripts)) + r"&&\p{L}]"


@cache
def _word_pattern(target: str) -> Any:
    """A regular expression whose last group is ``end`` or says whose word it is and how many letters make one."""
    own = _letters(_scripts()[target])
    dense = {letters: _letters(scripts) for letters, scripts in LETTERS_A_WORD.items()}
    spaced = r"[\p{L}--[\p{Common}\p{Inherited}]--" + "--".join(dense.values()) + "]"
    groups = []
    for letters, of_kind in {0: spaced, **dense}.items():
        for name, letter in {"own": f"[{own}&&{of_kind}]", "other": f"[{of_kind}--{own}]"}.items():
            more = rf"[{letter}\p{{M}}'\u2019\u02bc\u200c\u200d]" if not letters else rf"[{letter}\p{{M}}]"
            groups.append(rf"(?P<{name}_{letters}>{letter}{more}{{0,{LONGEST_WORD - 1}}}+)")
    end = r"(?P<end>[[\n\r\u2028;\p{Sentence_Terminal}]--[.]]|[.:](?=\s))"
    return regex.compile("|".join([*groups, end]), regex.V1)


def _read(prose: str, target: str) -> tuple[float, list[tuple[float, str]]]:
    """How many words there are, and the pieces with words of the target's scripts: how many, and the text."""
    sees_kana = "Han" in _scripts()[target]  # which tells Japanese from Chinese
    words = own_words = 0.0
    pieces: list[tuple[float, str]] = []
    seen: list[str] = []
    for match in _word_pattern(target).finditer(prose):
        run = match[0]
        owner, _, letters = match.lastgroup.partition("_")
        if letters:
            count = len(run) if run.isalpha() else sum(map(str.isalpha, run))
            weight = 1.0 if letters == "0" else count / int(letters)
            words += weight
            if owner == "own":
                own_words += weight
            if owner == "own" or (sees_kana and letters == "2"):
                seen.append(run)
        if owner == "end" or own_words >= WORDS_A_PIECE or len(seen) >= MOST_RUNS:
            if own_words:
                pieces.append((own_words, " ".join(seen)))
            own_words, seen = 0.0, []
    if own_words:
        pieces.append((own_words, " ".join(seen)))
    return words, pieces


def _share_of_pieces(pieces: list[tuple[float, str]], target: str) -> float:
    """The share of the words in these pieces that are in the target language."""
    scripts = _scripts()
    rivals = [code for code in scripts if scripts[code] & scripts[target]]
    if len(rivals) == 1 or not pieces:
        return 1.0
    count = min(len(pieces), MOST_PIECES)
    chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    weights = np.array([weight for weight, _ in chosen])
    ranks = [dict(_detector().rank(piece)) for _, piece in chosen]
    likelihoods = np.array([[rank[code] for code in rivals] for rank in ranks], np.float64) + 1e-9

    is_target = np.array([code == target for code in rivals])
    is_right = np.array([code == target or code in VARIETIES.get(target, ()) for code in rivals])
    common = 0.5 / len(rivals) + 0.5 * is_target
    shares = common
    for _ in range(ROUNDS):
        joint = likelihoods * common
        posterior = joint / joint.sum(axis=1, keepdims=True)
        shares = weights @ posterior / weights.sum()
        common = shares * weights.sum() + WORDS_IN_FAVOUR * is_target
        common /= common.sum()
    return float(shares[is_right].sum())

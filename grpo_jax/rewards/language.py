"""Language consistency reward: the share of a thought's words that are in the target language."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import regex

from grpo_jax.rewards.calling import per_sample
from grpo_jax.rewards.prose import prose_of_code, prose_of_mathematics

MAX_WORDS_OF_PIECE = 16
MAX_RUNS_OF_PIECE = 64
MAX_PIECES = 200
PRIOR_WORDS = 4.0
EM_ITERATIONS = 20
MAX_WORD_LENGTH = 40

# Scripts without spaces between words, by the average number of letters of a word.
LETTERS_PER_WORD = {2: ("Han", "Hiragana", "Katakana", "Bopomofo"), 4: ("Thai", "Lao", "Khmer", "Myanmar")}
# The detector's languages by script.
LANGUAGES = {
    "Arabic": "ar ary arz fa ps sdh ug ur uzs",
    "Bengali": "as bn",
    "Cyrillic": "ba be bg kk ky mk mn ru sr tg tt uk uz",
    "Devanagari": "gom hi mr ne sa",
    "Greek": "el grc",
    "Hebrew": "hbo he",
    "Latin": (
        "ace af an az bcl br bs ca crh cs cy da de en eo es et eu ext fi fo fr fuv fy ga gcf gcr gd gl gug guw "
        "ha hr ht hu id ig is it jv kab kik ku la lb lg lij ln lt ltg lv mg ms mt nl nn no nso oc om pcm pl pt "
        "qu ro rw se sk sl sn so sq sr st sv sw tk tl tr uz vec vi vo wa xh yo zu"
    ),
    **{"Bopomofo": "yue wuu zh", "Han": "ja yue wuu zh", "Hiragana": "ja", "Katakana": "ja", "Hangul": "ko"},
    **{"Armenian": "hy", "Ethiopic": "am", "Georgian": "ka", "Gujarati": "gu", "Gurmukhi": "pa", "Kannada": "kn"},
    **{"Khmer": "km", "Lao": "lo", "Malayalam": "ml", "Myanmar": "my", "Oriya": "or", "Sinhala": "si"},
    **{"Tamil": "ta", "Telugu": "te", "Thai": "th", "Tibetan": "dz"},
}
VARIETIES = {"ar": ("ary", "arz"), "no": ("nn",), "zh": ("wuu", "yue")}

# All loops are possessive and stop at the next delimiter, so that matching takes linear time.
CODE = regex.compile(
    r"""
      ^[ \t]*+(```|~~~)[^\n]*+\n (?:(?!^[ \t]*+\1).)*+ ^[ \t]*+\1
    | ```[^`]++```
    | `[^`\n]++`
    """,
    regex.VERBOSE | regex.DOTALL | regex.MULTILINE,
)
# "`one` `word` `each`" is read as "`one word each`".
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

# The letters of formulas, units and identifiers.
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
    """Words in the target language / words of the thought: the language consistency reward of DeepSeek-R1.

    Words are counted by ``language_share``. The thought is the text between the first ``<think>``, or the start, and
    the last ``</think>``, or else the first ``<answer>``, or else the end. arXiv 2501.12948, section 2.3.2.

    A thought without words scores 0.0: with 1.0 an empty thought would be the easiest way to a full score, and with
    None its sample would not be trained on, so that empty thoughts would not be discouraged. The length of the thought
    is left to other rewards.

    Args:
        prompts: ignored.
        completions: the texts.
        target_language: an ISO 639 code for all, as in ``functools.partial(language_reward, target_language="de")``; or
            one for each completion, from a column of that name. None gives no score.
        thought_only: whether to ignore the text outside of the thought.

    Raises:
        ValueError: an unknown code, raised before anything is scored. The message lists the known codes.
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

    Not counted as words: closed code blocks and code in backticks; mathematics in ``$``, ``$$``, ``\(...\)``,
    ``\[...\]`` or a mathematical environment; every ``\command``; tags and URLs; identifiers (snake_case, camelCase,
    with a digit, or called as in ``f(x)``); names of mathematical functions (gcd); up to four capitals in a row (ABC);
    numbers with their units; single letters (Latin, Greek, Cyrillic, Arabic or Hebrew). Prose inside of code or
    mathematics (``prose_of_code``, ``prose_of_mathematics``) is counted.

    A word in a script that the target language does not use is foreign. Languages of the same script are told apart by
    a detector (langid): the text is cut into pieces at ends of sentences and lines, and after 16 words. Then
    ``p(language | piece)`` is proportional to ``p(piece | language)``, from the detector, times the share of the
    language in the text, which is estimated from all pieces by expectation maximisation. So short pieces are assigned
    to the language of the text around them. A prior of four words for the target decides for texts that are too short.
    Cantonese and Wu count as Chinese (zh), Egyptian and Moroccan as Arabic (ar), and Nynorsk as Norwegian (no).

    In scripts without spaces, two letters of Chinese or Japanese, or four of Thai, Lao, Khmer or Burmese, are one word.
    A run of more than 40 letters is cut into words of 40.

    Takes time linear in the length: the detector reads at most 200 pieces, evenly spaced. It is loaded on first use,
    once per process. The result is deterministic, and no text raises.

    Args:
        text: any text, including mathematics and code.
        target: an ISO 639 code, with two letters if there is such a code, as in de.

    Raises:
        ValueError: ``target`` is unknown; the message lists the known codes.
    """
    _check(target)
    words, pieces = _read(_prose(text), target)
    if not words:
        return None
    words_in_script = sum(weight for weight, _ in pieces)
    return min(words_in_script * _share_of_pieces(pieces, target) / words, 1.0)


@cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _scripts() -> dict[str, frozenset[str]]:
    """The scripts of each known language."""
    codes = sorted({code for codes in LANGUAGES.values() for code in codes.split()})
    return {code: frozenset(script for script in LANGUAGES if code in LANGUAGES[script].split()) for code in codes}


def _check(target: Any) -> None:
    if target not in _scripts():
        raise ValueError(f"target_language must be one of {[*_scripts()]}, not {target!r}")


def _thought(completion: str) -> str:
    thought, closing, _ = completion.rpartition("</think>")
    if not closing:
        thought = completion.partition("<answer>")[0]
    before, opening, after = thought.partition("<think>")
    return after if opening else before


def _prose(text: str) -> str:
    text = CODE.sub(lambda code: f"\n{prose_of_code(code[0])}\n", ADJACENT.sub(" ", text))
    for _ in range(3):  # environments up to three levels deep
        text = ENVIRONMENT.sub(_prose_of_formula, text)
    return SYMBOLS.sub(" ", MATHEMATICS.sub(_prose_of_formula, text))


def _prose_of_formula(formula: regex.Match[str]) -> str:
    return f"\n{prose_of_mathematics(formula[0])}\n"


def _letters(scripts: Iterable[str]) -> str:
    return "[" + "".join(rf"\p{{Script_Extensions={script}}}" for script in sorted(scripts)) + r"&&\p{L}]"


@cache
def _word_pattern(target: str) -> Any:
    """A regular expression of words and ends of pieces; the name of the matched group says which.

    ``target_2`` is a word in a script of the target, in which two letters make a word (0: words have spaces between
    them); ``other_2`` one in another script; ``end`` the end of a sentence or line.
    """
    of_target = _letters(_scripts()[target])
    dense = {letters: _letters(scripts) for letters, scripts in LETTERS_PER_WORD.items()}
    spaced = r"[\p{L}--[\p{Common}\p{Inherited}]--" + "--".join(dense.values()) + "]"
    groups = []
    for letters, of_kind in {0: spaced, **dense}.items():
        for name, letter in {"target": f"[{of_target}&&{of_kind}]", "other": f"[{of_kind}--{of_target}]"}.items():
            more = rf"[{letter}\p{{M}}'\u2019\u02bc\u200c\u200d]" if not letters else rf"[{letter}\p{{M}}]"
            groups.append(rf"(?P<{name}_{letters}>{letter}{more}{{0,{MAX_WORD_LENGTH - 1}}}+)")
    end = r"(?P<end>[[\n\r\u2028;\p{Sentence_Terminal}]--[.]]|[.:](?=\s))"
    return regex.compile("|".join([*groups, end]), regex.V1)


def _read(prose: str, target: str) -> tuple[float, list[tuple[float, str]]]:
    """The number of words, and the pieces as (number of words in the target's scripts, their text)."""
    includes_kana = "Han" in _scripts()[target]  # they distinguish Japanese from Chinese
    words = piece_words = 0.0
    pieces: list[tuple[float, str]] = []
    runs: list[str] = []
    for match in _word_pattern(target).finditer(prose):
        run = match[0]
        group, _, letters = match.lastgroup.partition("_")
        if letters:
            count = len(run) if run.isalpha() else sum(map(str.isalpha, run))
            weight = 1.0 if letters == "0" else count / int(letters)
            words += weight
            if group == "target":
                piece_words += weight
            if group == "target" or (includes_kana and letters == "2"):
                runs.append(run)
        if group == "end" or piece_words >= MAX_WORDS_OF_PIECE or len(runs) >= MAX_RUNS_OF_PIECE:
            if piece_words:
                pieces.append((piece_words, " ".join(runs)))
            piece_words, runs = 0.0, []
    if piece_words:
        pieces.append((piece_words, " ".join(runs)))
    return words, pieces


def _share_of_pieces(pieces: list[tuple[float, str]], target: str) -> float:
    """The share of the pieces' words that are in the target language, by expectation maximisation."""
    scripts = _scripts()
    languages = [code for code in scripts if scripts[code] & scripts[target]]
    if len(languages) == 1 or not pieces:
        return 1.0
    count = min(len(pieces), MAX_PIECES)
    chosen = [pieces[i * len(pieces) // count] for i in range(count)]
    weights = np.array([weight for weight, _ in chosen])
    ranks = [dict(_detector().rank(piece)) for _, piece in chosen]
    likelihoods = np.array([[rank[code] for code in languages] for rank in ranks], np.float64) + 1e-9

    is_target = np.array([code == target for code in languages])
    is_variety = np.array([code == target or code in VARIETIES.get(target, ()) for code in languages])
    prior = 0.5 / len(languages) + 0.5 * is_target
    shares = prior
    for _ in range(EM_ITERATIONS):
        joint = likelihoods * prior
        posterior = joint / joint.sum(axis=1, keepdims=True)
        shares = weights @ posterior / weights.sum()
        prior = shares * weights.sum() + PRIOR_WORDS * is_target
        prior /= prior.sum()
    return float(shares[is_variety].sum())

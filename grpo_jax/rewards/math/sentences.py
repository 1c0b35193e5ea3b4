# ruff: noqa: RUF001
"""Extraction of answers from sentences such as "The answer is 42.", in English and some thirty other languages."""

from __future__ import annotations

import re

from grpo_jax.rewards.math.boxes import Statement
from grpo_jax.rewards.math.markup import strip_markup
from grpo_jax.rewards.math.numbers import numeric_value

MAX_BLOCK_LENGTH = 2000
"""Maximum length in characters of a block of mathematics or code after "the answer is:"."""

# The noun "answer" and the verb "is" in languages that separate words by spaces.
LANGUAGES = {
    "ar": ("الإجابة|الجواب", "هي|هو"),
    "bn": ("উত্তর", "হল|হলো"),
    "cs": ("odpověď", "je"),
    "da, no, sv": ("svar|svaret", "er|är"),
    "de": ("antwort", "ist|lautet|wäre|beträgt"),
    "el": ("απάντηση", "είναι"),
    "es": ("respuesta", "es|sería|será"),
    "fi": ("vastaus", "on"),
    "fr": ("réponse", "est|serait|sera|vaut"),
    "he": ("התשובה", "היא"),
    "hi": ("उत्तर", "है"),
    "hu": ("válasz", "az?"),
    "id": ("jawaban|jawabannya", "adalah|ialah"),
    "it": ("risposta", "è|sarebbe|sarà"),
    "nl": ("antwoord", "is|luidt"),
    "pl": ("odpowiedź", "to|brzmi"),
    "pt": ("resposta", "é|seria|será"),
    "ro": ("răspuns|răspunsul", "este"),
    "ru": ("ответ|ответом", "является|равен"),
    "sw": ("jibu", "ni"),
    "te": ("సమాధానం", "ఏమిటంటే"),
    "tr": ("cevap|yanıt", "şudur"),
    "uk": ("відповідь", "є"),
    "vi": (r"đáp\sán|đáp\ssố|câu\strả\slời", "là"),
}
# "the answer is" in languages without spaces.
UNSPACED = {
    "ja": "(?:答え|正解|解答)は",
    "ko": "(?:정답|답)은",
    "th": r"คำตอบ(?:สุดท้าย)?\s?คือ",
    "zh": "答案(?:应该|应|應該|應|就|即)?(?:是|为|為|等于|等於)|故选|故選",
}
UNSPACED_NOUNS = r"答案|答え|正解|解答|(?<!\w)答|정답|(?<!\w)답|คำตอบ"
COPULA = re.compile("(?:です|となります|になります|である|だ|입니다|이다|이에요|예요|है)$")

ENGLISH = r"answers?|(?:correct|right)\s(?:option|choice)"
NOUNS = "|".join(noun for noun, _ in LANGUAGES.values())
QUOTES = r"[*_`}\"']{0,4}"
VERBS = "|".join(rf"(?:{noun})(?:\s\w{{1,15}})?{QUOTES}\s(?:{verb})" for noun, verb in LANGUAGES.values())
UNSPACED_PHRASES = "|".join(UNSPACED.values())
COLON = r"(?:\s?[:：=＝]|\s[—–]\s)"
LABEL = re.compile(
    rf"""
    (?: (?<![^\W_]) (?:
            (?:{ENGLISH}) (?:\s?\([^()\n]{{1,40}}\))? (?:\s(?:to|of|for)\s[^\n.:=?]{{1,60}}?)? {QUOTES}
            (?: {COLON} | \s(?:is|are|was|equals|(?:must|should|would|will|has\sto)\sbe)(?![\w'’]) )
          | (?:{VERBS})(?!\w)
          | (?:{NOUNS}) (?:\s\w{{1,15}})? {QUOTES} {COLON}
        )
      | {UNSPACED_PHRASES}
      | (?:{UNSPACED_NOUNS}) {QUOTES} {COLON}
    )
    (?: [,，、]?\s?(?:therefore|thus|hence|then|simply|just|indeed|clearly|exactly|finally|equal\sto|given\sby|also|now|
          still|donc|daher|somit|entonces)\b )*+
    (?: [,，、]?[ \t]*[*_}}]*[:：] )?
    """,
    re.VERBOSE | re.IGNORECASE,
)
HEADING = re.compile(
    rf"^[ \t>\#*_\d.-]{{0,12}}(?:the\s|our\s)?(?:final\s|correct\s|最终)?(?:{ENGLISH}|{NOUNS}|答案)[ \t*_\#]*$",
    re.MULTILINE | re.IGNORECASE,
)
# Every label contains one of these in lower case: other texts need no search.
HINTS = (
    *("answer", "option", "choice", "答", "选", "選", "正解", "답", "คำตอบ"),
    *(noun.split(r"\s")[0].lower() for nouns, _ in LANGUAGES.values() for noun in nouns.split("|")),
)
END = re.compile(r"""\n|(?<!\.)\.(?=[*_`"')]{0,4}(?:\s|\Z))|[。！？।]|\?(?=\s|\Z)""")
QUESTION = ("?", "？")
BEFORE_LABEL = ("", "the", "our", "that the", "final", "the final")

# Before "the answer is 5": it is supposed or denied, not stated.
SUPPOSITION = re.compile(
    r"""(?: \b(?:if|whether|suppose|supposing|assume|assuming|unless|doubt|maybe|perhaps|possibly)
          | n[o'’]t\s+\w{1,12} )
        (?:\s+(?:that|if))? (?:\s+(?:the|our|my|its|your|a))? (?:\s+(?:final|correct|right|true|actual))* \s* \Z""",
    re.VERBOSE | re.IGNORECASE,
)
# Before "answer is 5": it is not the final answer.
OTHER_ANSWER = re.compile(
    r"\b(?:this|that|another|an?|any|each|every|no|wrong|incorrect|student's|other|possible|initial|previous|partial|"
    r"intermediate)\s+\Z",
    re.IGNORECASE,
)
# "Our answer is correct" is a remark on the answer.
EVALUATION = re.compile(
    r"""(?:(?:indeed|in\ fact|also|then|now|clearly|likely|probably|definitely|not)\s+)*
        (?:correct|incorrect|wrong|reasonable|plausible|verified|confirmed|consistent|as\ follows|below|above|obvious|
           clear|unique|simplified|complete|given|shown|found|boxed)(?!\w).*""",
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
POSSESSIVE = re.compile(r"\b(?:our|my|your)\s+(?:\w+\s+)?\Z", re.IGNORECASE)
POSSESSIVE_EVALUATION = re.compile(r"(?:indeed\s|also\s)?(?:right|valid|invalid|good|fine)\W*", re.IGNORECASE)
REASON = re.compile(
    r",?\s+(?:because|since|where|and\sI\s(?:hope|think|am))\b"
    r"|,\s+(?:which|as|so|making|giving|meaning|hence|thus|and\s(?:we|I|that|this))\b",
    re.IGNORECASE,
)
UNCERTAIN = re.compile(r"\b(?:or|maybe|perhaps|possibly|could|may|might)\b", re.IGNORECASE)
HEDGE = re.compile(r"[\s*_`$)\]]*(?:or|alternatively|otherwise|maybe|perhaps|possibly)\b", re.IGNORECASE)
QUOTED = re.compile(r"""^[\"“”'‘]([^\"“”'‘’]*)[\"“”'’][.,]?$""")
OPTION = re.compile(r"(?:option|choice|letter)\s+(\(?[A-Z]\)?)", re.IGNORECASE)
JSON_FIELD = re.compile(
    r"""["'](?:final[_ ])?answer["']\s?:\s?(?:"((?:[^"\\\n]|\\.)*)"|(-?[\d.,/]*\d)(?=\s*(?:\}|,\s*["'])))""",
    re.IGNORECASE,
)

WHITESPACE = re.compile(r"\s*")
LIST_ITEM = re.compile(r"[ \t]*(?:[-*+•]|\d{1,2}[.)])[ \t]+(?=\S)")
BLOCKS = {"$$": "$$", r"\[": r"\]", r"\(": r"\)", r"\begin{": r"\end{", "```": "```", "~~~": "~~~"}
VALUE = re.compile(r"[\s$\\(\[{+\-−]*\d\S*(?:\s\S+){0,3}|[\s$]*\\\S+(?:\s\S+){0,3}|\(?[A-J]\)?")


def stated_answers(text: str) -> list[Statement]:
    """The answers stated in a text, in order.

    The answer follows "the answer is", "answer:" and the like: up to the end of the sentence or, if the line ends
    there, the block of mathematics, the list or the line below. Suppositions ("if the answer is 5"), questions and
    remarks on an answer ("our answer is correct") are left out; reasons (", because ...") are cut off.
    """
    lowered = text.lower()
    if not any(hint in lowered for hint in HINTS):
        return []
    statements: list[Statement] = []
    fields = {m.start() + 1: (m.end(), m[2] if m[1] is None else m[1]) for m in JSON_FIELD.finditer(text)}
    labels = sorted({m.span() for pattern in (LABEL, HEADING) for m in pattern.finditer(text)})
    first_label = None  # of a sentence with several labels, such as "the answer is 5, so the answer is odd"
    for (start, begin), following in zip(labels, [*labels[1:], (len(text), len(text))][: len(labels)], strict=True):
        if start in fields:
            statements.append(Statement(start, *fields[start]))
            continue
        end = END.search(text, begin, following[0])
        if end is None and following[0] < len(text):
            if strip_markup(text[begin : following[0]]).lower() not in BEFORE_LABEL:
                first_label = first_label or (start, begin)
            continue
        first_start, first_begin = first_label or (start, begin)
        first_label = None
        content = _content(text, first_begin, end, following[0])
        if content and not _is_remark(text, first_start, content) and (end is None or end[0] not in QUESTION):
            statements.append(Statement(start, following[0] if end is None else end.start(), content))
    return statements


def is_value(content: str) -> bool:
    """Whether an answer is a number, a formula or a multiple-choice letter, and not prose."""
    return numeric_value(content) is not None or VALUE.fullmatch(content) is not None


def _content(text: str, begin: int, end: re.Match[str] | None, limit: int) -> str:
    """The answer after a label that ends at ``begin``; ``end`` matches the end of the sentence, if before ``limit``."""
    stop = limit if end is None else end.start()
    content = text[begin:stop]
    if end is not None and end[0] == "\n" and not strip_markup(content):
        return _below(text, end.end(), limit)
    hedge = None if end is None else HEDGE.match(text, end.end(), limit)
    if hedge is not None:
        hedge_limit = min(limit, hedge.end() + MAX_BLOCK_LENGTH)
        hedge_end = END.search(text, hedge.end(), hedge_limit)
        return strip_markup(text[begin : hedge_limit if hedge_end is None else hedge_end.start()])
    block = next((opening for opening in BLOCKS if content.lstrip().startswith(opening)), None)
    if block is not None:
        opening = text.index(block, begin)
        closing = text.find(BLOCKS[block], opening + len(block), begin + MAX_BLOCK_LENGTH)
        if closing >= stop:  # the block continues on the next lines
            return _below(text, opening, limit)
    return _clean(content)


def _below(text: str, begin: int, limit: int) -> str:
    """The block of mathematics or code, the list or the line after leading whitespace."""
    whitespace = WHITESPACE.match(text, begin, limit)
    begin = begin if whitespace is None else whitespace.end()
    for opening, closing in BLOCKS.items():
        if text.startswith(opening, begin):
            is_code = opening in ("```", "~~~")
            inside = text.find("\n", begin, limit) if is_code else begin + len(opening)
            end = text.find(closing, max(inside, begin), begin + MAX_BLOCK_LENGTH)
            if end < 0:
                return ""
            block = text[inside:end] if is_code else text[begin : end + len(closing)]
            return strip_markup(block if not opening.startswith("\\b") else text[begin:end])
    lines = [line for line in text[begin : min(limit, begin + MAX_BLOCK_LENGTH)].split("\n") if line.strip()]
    if not lines:
        return ""
    items = []
    in_list = LIST_ITEM.match(lines[0]) is not None
    for line in lines:
        item = LIST_ITEM.match(line)
        inside = _clean(_first_sentence(line[item.end() :] if item else line))
        if items and not (item if in_list else is_value(inside)):
            break
        items.append(inside)
        if not in_list and not is_value(inside):
            break
    return ", ".join(items)


def _first_sentence(line: str) -> str:
    end = END.search(line)
    return line if end is None else line[: end.start()]


def _clean(content: str) -> str:
    """The content without markdown, copula, reason, quotes and the word "option"."""
    content = COPULA.sub("", strip_markup(content)).strip()
    reason = REASON.search(content)
    if reason is not None and reason.start() and not UNCERTAIN.search(content, reason.end()):
        content = strip_markup(content[: reason.start()])
    content = QUOTED.sub(r"\1", content.removeprefix("=").strip())
    option = OPTION.fullmatch(content)
    return content if option is None else option[1]


def _is_remark(text: str, start: int, content: str) -> bool:
    """Whether the label at ``start`` does not state an answer: a supposition, another answer or an evaluation."""
    before = text[max(0, start - 60) : start]
    before = re.split(r"[\n.!?:;]", before)[-1]
    return (
        SUPPOSITION.search(before) is not None
        or (text.startswith(("answer", "Answer"), start) and OTHER_ANSWER.search(before) is not None)
        or EVALUATION.fullmatch(content) is not None
        or (POSSESSIVE.search(before) is not None and POSSESSIVE_EVALUATION.fullmatch(content) is not None)
    )

# ruff: noqa: RUF001
import multiprocessing
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import language
from grpo_jax.rewards.compose import weighted
from grpo_jax.rewards.language import language_reward, language_share

SENTENCES = {
    "en": """
First we compute the sum of both numbers.
Wait, that cannot be right.
How many apples are left in the basket?
It follows that there is no solution.
That is the final result.""",
    "de": """
Zuerst berechnen wir die Summe der beiden Zahlen.
Moment, das kann nicht stimmen.
Wie viele Äpfel bleiben im Korb übrig?
Daraus folgt, dass es keine Lösung gibt.
Das ist das Endergebnis.""",
    "fr": """
D'abord, nous calculons la somme des deux nombres.
Attendez, cela ne peut pas être juste.
Combien de pommes reste-t-il dans le panier ?
Il s'ensuit qu'il n'y a pas de solution.
C'est le résultat final.""",
    "es": """
Primero calculamos la suma de los dos números.
Espera, eso no puede ser cierto.
¿Cuántas manzanas quedan en la cesta?
De ello se deduce que no hay solución.
Ese es el resultado final.""",
    "it": """
Per prima cosa calcoliamo la somma dei due numeri.
Aspetta, non può essere giusto.
Quante mele rimangono nel cesto?
Ne segue che non esiste alcuna soluzione.
Questo è il risultato finale.""",
    "pt": """
Primeiro calculamos a soma dos dois números.
Espere, isso não pode estar certo.
Quantas maçãs restam na cesta?
Segue-se que não há solução.
Esse é o resultado final.""",
    "nl": """
Eerst berekenen we de som van beide getallen.
Wacht, dat kan niet kloppen.
Hoeveel appels zitten er nog in de mand?
Hieruit volgt dat er geen oplossing is.
Dat is het eindresultaat.""",
    "pl": """
Najpierw obliczamy sumę obu liczb.
Czekaj, to nie może być prawda.
Ile jabłek zostało w koszyku?
Wynika z tego, że nie ma rozwiązania.
To jest wynik końcowy.""",
    "sv": """
Först beräknar vi summan av de båda talen.
Vänta, det kan inte vara rätt.
Hur många äpplen finns kvar i korgen?
Det följer att det inte finns någon lösning.
Det är det slutliga resultatet.""",
    "tr": """
Önce iki sayının toplamını hesaplıyoruz.
Bekle, bu doğru olamaz.
Sepette kaç elma kaldı?
Buradan çözüm olmadığı sonucu çıkar.
Bu son sonuçtur.""",
    "vi": """
Trước tiên chúng ta tính tổng của hai số.
Khoan đã, điều đó không thể đúng.
Còn lại bao nhiêu quả táo trong giỏ?
Suy ra phương trình không có nghiệm.
Đó là kết quả cuối cùng.""",
    "id": """
Pertama kita hitung jumlah kedua bilangan.
Tunggu, itu tidak mungkin benar.
Berapa banyak apel yang tersisa di keranjang?
Maka tidak ada penyelesaian.
Itulah hasil akhirnya.""",
    "ru": """
Сначала вычислим сумму обоих чисел.
Подожди, это не может быть правдой.
Сколько яблок осталось в корзине?
Отсюда следует, что решений нет.
Это окончательный результат.""",
    "uk": """
Спочатку обчислимо суму обох чисел.
Зачекай, це не може бути правдою.
Скільки яблук залишилося в кошику?
Звідси випливає, що розв'язків немає.
Це остаточний результат.""",
    "bg": """
Първо изчисляваме сбора на двете числа.
Чакай, това не може да е вярно.
Колко ябълки са останали в кошницата?
От това следва, че няма решение.
Това е крайният резултат.""",
    "ar": """
أولا نحسب مجموع العددين.
انتظر، هذا لا يمكن أن يكون صحيحا.
كم تفاحة بقيت في السلة؟
ينتج عن ذلك أنه لا يوجد حل.
هذه هي النتيجة النهائية.""",
    "fa": """
ابتدا مجموع دو عدد را حساب می‌کنیم.
صبر کن، این نمی‌تواند درست باشد.
چند سیب در سبد باقی مانده است؟
نتیجه می‌شود که جوابی وجود ندارد.
این نتیجه نهایی است.""",
    "ur": """
پہلے ہم دونوں اعداد کا مجموعہ نکالتے ہیں۔
رکو، یہ درست نہیں ہو سکتا۔
ٹوکری میں کتنے سیب باقی ہیں؟
اس سے نتیجہ نکلتا ہے کہ کوئی حل نہیں ہے۔
یہ آخری نتیجہ ہے۔""",
    "hi": """
पहले हम दोनों संख्याओं का योग निकालते हैं।
रुको, यह सही नहीं हो सकता।
टोकरी में कितने सेब बचे हैं?
इससे पता चलता है कि कोई हल नहीं है।
यह अंतिम परिणाम है।""",
    "mr": """
प्रथम आपण दोन्ही संख्यांची बेरीज काढू.
थांबा, हे बरोबर असू शकत नाही.
टोपलीत किती सफरचंदे उरली आहेत?
यावरून कळते की उत्तर अस्तित्वात नाही.
हा अंतिम निकाल आहे.""",
    "zh": """
首先我们计算两个数的和。
等等，这不可能是对的。
篮子里还剩下多少个苹果？
由此可知方程没有解。
这就是最终结果。""",
    "ja": """
まず二つの数の和を計算します。
待って、それは正しくないはずだ。
かごにりんごは何個残っていますか。
よって解は存在しない。
これが最終結果です。""",
    "ko": """
먼저 두 수의 합을 계산합니다.
잠깐, 그건 맞을 리가 없어.
바구니에 사과가 몇 개 남았나요?
그러므로 해가 존재하지 않습니다.
이것이 최종 결과입니다.""",
    "el": """
Πρώτα υπολογίζουμε το άθροισμα των δύο αριθμών.
Περίμενε, αυτό δεν μπορεί να είναι σωστό.
Πόσα μήλα έμειναν στο καλάθι;
Έπεται ότι δεν υπάρχει λύση.
Αυτό είναι το τελικό αποτέλεσμα.""",
    "he": """
תחילה נחשב את סכום שני המספרים.
רגע, זה לא יכול להיות נכון.
כמה תפוחים נשארו בסל?
מכאן שאין פתרון.
זו התוצאה הסופית.""",
    "th": """
ก่อนอื่นเราคำนวณผลรวมของจำนวนทั้งสอง
เดี๋ยวก่อน นั่นไม่น่าจะถูกต้อง
มีแอปเปิลเหลืออยู่ในตะกร้ากี่ผล
ดังนั้นจึงไม่มีคำตอบ
นั่นคือผลลัพธ์สุดท้าย""",
    "ta": """
முதலில் இரண்டு எண்களின் கூட்டுத்தொகையைக் கணக்கிடுவோம்.
பொறு, அது சரியாக இருக்க முடியாது.
கூடையில் எத்தனை ஆப்பிள்கள் மீதம் உள்ளன?
எனவே தீர்வு இல்லை.
இதுவே இறுதி முடிவு.""",
}

LINES = {code: text.strip().split("\n") for code, text in SENTENCES.items()}
ALPHABETS = [
    "en de fr es it pt nl pl sv tr vi id",
    "ru uk bg",
    "ar fa ur",
    "hi mr",
    "ko",
    "el",
    "he",
    "th",
    "ta",
    "zh ja",
]
SAME_SCRIPT = [
    (target, other)
    for codes in map(str.split, ALPHABETS)
    for target in codes
    for other in codes
    if target != other and target != "ja"  # Japanese is partly written in Han, Chinese is not written in kana
]


def score(completion, target, **settings):
    return language_reward(["p"], [completion], target_language=target, **settings)[0]


def shuffled(first, second):
    return " ".join(line for pair in zip(LINES[first], LINES[second], strict=True) for line in pair)


@pytest.mark.parametrize("target", SENTENCES)
def test_a_text_in_the_target_language_scores_high_whole_and_in_parts(target):
    """R7."""
    assert language_share(SENTENCES[target], target) > 0.98
    for i in range(4):
        assert language_share(" ".join(LINES[target][i : i + 2]), target) > 0.8


@pytest.mark.parametrize(("target", "other"), [*SAME_SCRIPT, ("ja", "zh")])
def test_another_language_in_the_same_script_scores_low(target, other):
    assert language_share(SENTENCES[other], target) <= 0.15
    assert 0.3 <= language_share(shuffled(target, other), target) <= 0.7


def test_another_script_scores_zero_and_half_of_it_half():
    for codes in ALPHABETS:
        for other in set(SENTENCES) - set(codes.split()):
            for target in codes.split()[:2]:
                assert language_share(SENTENCES[other], target) == 0
                assert 0.3 <= language_share(shuffled(target, other), target) <= 0.7


@pytest.mark.parametrize(("share", "target", "other"), [(0.2, "en", "de"), (0.8, "en", "de"), (0.8, "fr", "it")])
def test_a_smaller_part_is_seen_too(share, target, other):
    count = round(5 * share)
    text = "\n".join(LINES[target][:count] + LINES[other][count:])
    assert language_share(text, target) == pytest.approx(share, abs=0.12)


@pytest.mark.parametrize(
    ("text", "target", "share"),
    [
        ("First we 计算 the sum", "en", 4 / 5),
        ("先计算 total 然后除以二", "zh", 9 / 2 / (9 / 2 + 1)),
        ("Сначала compute сумму всех этих чисел", "ru", 5 / 6),
        ("the сумма", "en", 1 / 2),
        ("We add the numbers суnumbers", "en", 5 / 6),
        ("두 수의 합을 계산 計算", "ko", 4 / 5),
        ("まず計算します sum", "ja", 7 / 2 / (7 / 2 + 1)),
        ("เราคำนวณ the sum", "th", 2 / 4),
        ("Ovo je zbir brojeva, а то је збир бројева", "sr", 1.0),
    ],
)
def test_words_of_another_script_are_foreign_one_by_one(text, target, share):
    assert language_share(text, target) == pytest.approx(share, abs=0.02)


def test_words_are_counted_by_letters_where_there_are_no_blanks_and_in_long_runs():
    four = "first second third fourth "
    assert language_share(four + "计" * 6, "en") == pytest.approx(4 / 7, abs=1e-3)
    assert language_share(four + "のカ" * 3, "en") == pytest.approx(4 / 7, abs=1e-3)
    for letters in ("ก" * 12, "ກ" * 12, "ក" * 12, "က" * 12, "กั" * 12):
        assert language_share(four + letters, "en") == pytest.approx(4 / 7, abs=1e-3)
    assert language_share(four + "д" * 40, "en") == pytest.approx(4 / 5, abs=1e-3)
    assert language_share(four + "д" * 81, "en") == pytest.approx(4 / 7, abs=1e-3)


def test_two_languages_without_a_full_stop_between_them_are_told_apart():
    text = " ".join(SENTENCES[code].replace(".", "").replace("?", "").replace("\n", " ") for code in ("en", "de"))
    assert 0.3 <= language_share(text, "en") <= 0.7


NEUTRAL = [
    "```python\n# Wir berechnen die Summe 计算\nprint('сумма')\n```",
    "~~~\ndie Summe\n~~~",
    "```die Summe```",
    "`die Summe 计算`",
    "$x = \\text{Summe} \\cdot \\text{Zahl} + \\text{Rest}$",
    "$f(x) = \\begin{cases} 1 & \\text{if } x > 0 \\\\ 0 & \\text{otherwise} \\end{cases}$",
    "$\\$ Summe$",
    "$$\nx = \\text{计算}\n$$",
    "\\(\\text{die Summe}\\)",
    "\\[ a \\\\[2pt] \\text{die Summe} \\]",
    "\\begin{align*}die Summe \\begin{cases}计算 der Zahlen\\end{cases} mehr\\end{align*}",
    "\\frac{1}{2} \\boxed{42} \\alpha x_{Summe} \\begin{itemize}",
    "https://beispiel.de/summe?zahl=drei www.beispiel.de/die-zahlen",
    "<answer> </b> <br/>",
    "snake_case _summe zahl_2 H2O 3D 2nd x1 aмч2",
    "camelCase CamelCase berechneSumme",
    "f(x) summe(a, b) np.summe(a + 1) g(f, 3)",
    "12 3.14 1,000,000 ½ ٣ 一"[:-1],
    "5 km 5km 3 cm 2.5 kg 30 min 7 км 60 km/h",
    "x y z a b é π Σ ж א ب 𝑥 ℝ",
    "ABC AB GCD ДУГА",
    "gcd lcm sin cos log max min mod",
    "x + 2y = 10 ∑ ≤ → 🙂 . , ! ? 。",
    "\u0301 \u200d ' ’ ’",
]


@pytest.mark.parametrize("neutral", NEUTRAL)
def test_code_mathematics_and_numbers_count_neither_for_nor_against(neutral):
    """R7."""
    assert language_share(neutral, "en") is None
    assert language_share(neutral, "zh") is None
    for target, text in [
        ("en", "So we add the two numbers"),
        ("ru", "Сложим эти два числа"),
        ("zh", "我们把两个数相加"),
    ]:
        assert language_share(f"{text}\n{neutral}\n{text}", target) > 0.99
    assert language_share(f"{LINES['de'][0]}\n{neutral}\n{LINES['de'][3]}", "en") < 0.01


@pytest.mark.parametrize(
    "prose",
    [
        "```python\n计算这两个数字的和",  # not closed
        "`计算这两个数字的和",
        "$计算这两个数字的和",
        "\\(计算这两个数字的和",
        "\\[计算这两个数字的和",
        "\\begin{align}计算这两个数字的和",
        "\\begin{align}计算这两个数字的和\\end{cases}",
        "\\begin{itemize}\\item 计算这两个数字的和\\end{itemize}",
        "costs $5 计算这两个数字的和 and $7",
        "costs $5,计算这两个数字的和,$7",
        "$a\n\n计算这两个数字的和$",
        "`a\n计算这两个数字的和`",
        "\\text{计算这两个数字的和}",
        "\\boxed{计算这两个数字的和}",
        "5个苹果，还有7只狗",
        "ДЕЛИМ ДАННЫЕ ЧИСЛА",
        "两 个 数 字",
        "두 수 의 합",
        "f(计算这两个数字的和)",
        "<计算这两个数字的和>",
        "https://a.b，计算这两个数字的和",
    ],
)
def test_what_only_looks_like_code_or_mathematics_counts(prose):
    assert language_share("We add the numbers. " + prose, "en") < 0.7


PROGRAMS = [
    """```python
import numpy as np
from math import sqrt, floor, ceil

def total_price(price, count, discount):
    # multiply and take the discount off
    total = price * count - discount
    for number in numbers:
        if number is not None and number > 3 or not done:
            print(f"The answer is {total}")
    left, middle, right = 1, 2, 3
    return [word for word in words if word in known]
```""",
    """```cpp
#include <iostream>
using namespace std;
int main() { unsigned long long total = 0; while (total < limit) cout << total << endl; return 0; }
```""",
    """~~~sql
SELECT name, age FROM users WHERE age > 5 ORDER BY name;
~~~""",
    """```js
const total = items.map(item => item.price).filter(Boolean); // add them up
if (typeof total === "undefined") { throw new Error("no total") }
```""",
    """```json
{"name": "value", "other": [1, 2, 3]}
```""",
    """```
pip install numpy
git commit -m "first"
```""",
    "`for word in words if word not in known` `print('hello world')` `total_price` `x = y + z`",
    r"$\text{distance} = \text{speed} \times \text{time}, \sin x \cos y, ABC \sim DEF$",
    r"\[ x = \begin{cases} 1 & \text{if even} \\\\ 0 & \text{if odd} \end{cases} \]",
]


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_and_formulas_are_in_no_language(program):
    assert language_share(program, "zh") is None
    assert language_share(f"我们把两个数相加，然后除以三。\n{program}", "zh") > 0.99


WRAPPED = {
    "fence": "```\n{}\n```",
    "fence of a language": "```python\n{}\n```",
    "tildes": "~~~text\n{}\n~~~",
    "fence on one line": "```{}```",
    "fence with code before it": "```python\nx = 1\n{}\nprint(x)\n```",
    "comment": "```python\n# {}\n```",
    "comments beside little code": "```python\n# {0}\n# {0}\nx = 1\n```",
    "docstring": '```python\n"""\n{}\n"""\n```',
    "printed": "```python\nprint('{}')\n```",
    "backticks": "`{}`",
    "dollars": "${}$",
    "two dollars": "$$\n{}\n$$",
    "parentheses": r"\({}\)",
    "brackets": r"\[{}\]",
    "text": r"$\text{{{}}}$",
    "text in an environment": r"\begin{{align}}x &= 1 && \text{{{}}}\end{{align}}",
    "bold text": r"\[ \textbf{{{}}} \]",
}
LONG = {
    "en": "We add the two given numbers and then divide the whole sum by three",
    "de": "Wir addieren die beiden gegebenen Zahlen und teilen die ganze Summe durch drei",
    "ru": "Мы складываем оба данных числа и затем делим всю сумму на три",
    "zh": "我们把这两个给定的数相加，然后把总和除以三",
    "th": "เราบวกจำนวนทั้งสองที่กำหนดแล้วหารผลรวมทั้งหมดด้วยสาม",
    "ko": "우리는 주어진 두 수를 더한 다음 전체 합을 셋으로 나눕니다",
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize(
    ("spoken", "target"), [("en", "zh"), ("zh", "en"), ("de", "en"), ("ru", "zh"), ("th", "en"), ("ko", "ru")]
)
def test_prose_in_code_or_mathematics_counts(wrapping, spoken, target):
    text = WRAPPED[wrapping].format(LONG[spoken])
    assert language_share(text, target) < 0.1
    assert language_share(text, spoken) > 0.9
    assert language_share(f"{LONG[target]}. {text}", target) < 0.75


@pytest.mark.parametrize(
    "text",
    [
        "`We` `add` `the` `two` `numbers`",
        "$We$ $add$ $the$ $two$ $numbers$",
        r"$We\ add\ the\ two\ numbers$",
        r"$We~add~the~two~numbers$",
        r"$$\text{We add} \\ \text{the two} \\ \text{numbers}$$",
    ],
)
def test_prose_in_small_pieces_of_code_or_mathematics_counts(text):
    assert language_share(text, "zh") == 0


def test_known_varieties_of_a_language_are_that_language():
    cantonese = "我哋首先計兩個數嘅和。噉就搵到答案喇，係唔係呀？"
    nynorsk = "Fyrst reknar me ut summen av dei to tala. Eg veit ikkje kva som er rett. Dette er ikkje noko problem."
    egyptian = "هو لاعب كوره من مصر اتولد يوم فى القاهره و بيلعب مع الفريق ده من زمان"
    moroccan = "هاد الشي ديال المغرب زوين بزاف و كاين فيه بزاف ديال الناس اللي كيهضرو بالدارجة"
    wu = "阿拉先算两个数额和，侬晓得伐？伊拉讲个闲话勿对，格末阿拉再算一趟。"
    for text, variety, target in [
        (cantonese, "yue", "zh"),
        (wu, "wuu", "zh"),
        (nynorsk, "nn", "no"),
        (egyptian, "arz", "ar"),
        (moroccan, "ary", "ar"),
    ]:
        assert language_share(text, variety) > 0.9
        assert language_share(text, target) > 0.9
    assert language_share(SENTENCES["fa"], "ar") < 0.1


@pytest.mark.parametrize("word", ["Hmm", "Also", "So", "Aha", "Ja", "Total"])
def test_a_text_too_short_to_tell_is_in_the_target_and_a_short_piece_is_in_what_surrounds_it(word):
    assert language_share(word, "en") > 0.8
    assert language_share(word, "de") > 0.8
    assert language_share(f"{word}.\n" * 5 + SENTENCES["de"] + f"\n{word}." * 5, "de") > 0.97
    assert language_share(f"{word}.\n" * 5 + SENTENCES["de"] + f"\n{word}." * 5, "en") < 0.15


@pytest.mark.parametrize(("target", "other"), [("en", "de"), ("en", "fr"), ("es", "pl"), ("ru", "uk"), ("fr", "vi")])
def test_one_word_a_line_does_not_hide_the_language(target, other):
    assert language_share(SENTENCES[target].replace(" ", "\n"), target) > 0.9
    assert language_share(SENTENCES[other].replace(" ", "\n"), target) < 0.4


ENGLISH = "We add the two numbers and then divide by three."
CHINESE = "我们把两个数相加，然后除以三。"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"<think>{ENGLISH}</think><answer>{CHINESE}</answer>", 1),
        (f"<think>{CHINESE}</think><answer>{ENGLISH}</answer>", 0),
        (f"{ENGLISH}</think>{CHINESE}", 1),  # the prompt has opened the tag
        (f"{CHINESE}</think>{ENGLISH}", 0),
        (f"{CHINESE}<think>{ENGLISH}</think>", 1),
        (f"<think>{CHINESE}</think>{ENGLISH}</think>{ENGLISH}", 0.65),  # up to the last one
        (f"<think>{ENGLISH}<think>{ENGLISH}</think>", 1),
        (f"{ENGLISH}<answer>{CHINESE}</answer>", 1),
        (f"<think>{ENGLISH}<answer>{CHINESE}<answer>{CHINESE}", 1),
        (f"<think>{CHINESE}", 0),
        (ENGLISH, 1),
        (CHINESE, 0),
        (f"<think>{ENGLISH}<answer>{CHINESE}</answer></think>", 0.6),
        (f"{ENGLISH}</think>{CHINESE}<think>{CHINESE}", 1),
    ],
)
def test_the_thought(completion, expected):
    assert score(completion, "en") == pytest.approx(expected, abs=0.1)


def test_the_whole_completion_counts_if_asked_for():
    completion = f"<think>{ENGLISH}</think><answer>{CHINESE}</answer>"
    assert score(completion, "en", thought_only=False) == language_share(f"{ENGLISH}\n{CHINESE}", "en")
    assert score(f"{CHINESE}</think>{ENGLISH}", "zh", thought_only=False) == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize(
    "thought", ["", " \n", "12 + 3 = 15", "$x$", "```\nx = 1\n```", "...", "a b", "<answer>", "🙂"]
)
@pytest.mark.parametrize("target", ["en", "zh", "ru"])
def test_a_thought_without_words_scores_zero_however_good_the_answer_sounds(thought, target):
    assert language_share(thought, target) is None
    assert score(f"<think>{thought}</think><answer>{SENTENCES[target]}</answer>", target) == 0.0
    assert score(f"{thought}<answer>{SENTENCES[target]}</answer>", target) == 0.0
    assert score(f"<think>{thought}", target) == 0.0


def test_one_target_for_all_or_one_a_completion():
    completions = [ENGLISH, CHINESE, ENGLISH, ENGLISH]
    prompts = ["p"] * 4
    fixed = partial(language_reward, target_language="en")
    assert fixed(prompts, completions, answer=["1"] * 4) == pytest.approx([1, 0, 1, 1], abs=0.01)
    column = ["en", "zh", "de", None]
    by_column = language_reward(prompts, completions, target_language=column)
    assert by_column[:3] == pytest.approx([1, 1, 0], abs=0.01)
    assert by_column[3] is None
    assert fixed(prompts, completions, target_language=column) == by_column
    assert language_reward([], [], target_language="en") == []


def test_in_a_composition():
    scores = weighted({"language": language_reward}, {"language": 0.5})(
        ["p", "p"], [ENGLISH, ENGLISH], target_language=["en", "zh"], answer=["1", "2"]
    )
    assert scores.total.tolist() == pytest.approx([0.5, 0], abs=0.01)


@pytest.mark.parametrize("code", ["xx", "EN", "english", "", "zxx", "en-US"])
def test_an_unknown_code_is_refused_and_the_known_ones_are_listed(code):
    with pytest.raises(ValueError, match=r"'de'.*'en'.*'zh'.*not ") as error:
        language_share("", code)
    assert repr(code) in str(error.value)
    with pytest.raises(ValueError, match="'de'"):
        language_reward([], [], target_language=code)
    with pytest.raises(ValueError, match="'de'"):
        language_reward(["p", "p"], [ENGLISH, ENGLISH], target_language=["en", code])


def test_an_unknown_code_is_refused_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr(language, "language_share", lambda *_: pytest.fail("scored"))
    with pytest.raises(ValueError, match="'de'"):
        language_reward(["p", "p"], [ENGLISH, ENGLISH], target_language=["en", "xx"])


def test_a_column_of_another_length_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        language_reward(["p", "p"], [ENGLISH, ENGLISH], target_language=["en"])


def test_every_known_language_can_be_a_target():
    for code in language._scripts():
        assert language_share("1 + 1", code) is None
        assert 0 <= language_share(f"{ENGLISH} {CHINESE}", code) <= 1
    assert {*language._scripts(), "zxx"} == set(language._detector().labels)  # zxx: not a language
    others = {code for codes in language.VARIETIES.values() for code in codes} | set(language.VARIETIES)
    assert others <= set(language._scripts())
    assert set(SENTENCES) <= set(language._scripts())


def test_the_detector_sees_a_bounded_number_of_pieces_which_stand_for_the_others(monkeypatch):
    text = "\n".join(LINES["en"] * 100 + LINES["de"] * 100)
    few = language_share("\n".join(LINES["en"] + LINES["de"]), "en")
    seen = []
    detector = language._detector()

    class Counting:
        labels = detector.labels

        def rank(self, piece):
            seen.append(piece)
            return detector.rank(piece)

    monkeypatch.setattr(language, "_detector", Counting)
    assert language_share(text, "en") == pytest.approx(few, abs=0.02)
    assert len(seen) == 200
    seen.clear()
    language_share("word " * 20_000 + "a" * 20_000 + "数" * 20_000, "en")
    language_share("数" * 20_000, "zh")
    assert len(seen) == 400
    language_share("の" * 20_000 + "数の" * 20_000, "zh")
    assert len(seen) == 600
    assert max(map(len, seen)) < 64 * (language.MAX_WORD_LENGTH + 1)


@given(
    st.text(st.characters()) | st.text(st.characters(categories=["L", "M", "Cs", "Cc", "P"])),
    st.sampled_from(["en", "zh", "ja", "th", "ar", "sr"]),
)
@settings(max_examples=200)
def test_any_text_has_a_share_and_the_same_one_again(text, target):
    share = language_share(text, target)
    assert share is None or 0 <= share <= 1
    assert language_share(text, target) == share
    assert 0 <= score(text, target) <= 1


PIECES = [
    *(
        "$",
        "$$",
        "\\[",
        "\\]",
        "\\(",
        "\\)",
        "`",
        "```",
        "~~~",
        "\n",
        "\n\n",
        " ",
        "\\",
        "{",
        "}",
        "_{",
        "f(",
        ")",
        "<",
    ),
    *(
        "`a b c` ",
        "```\na b\n```\n",
        '"',
        "# ",
        "\\text{a b} ",
        "\\begin{a}",
        "\\end{a}",
        "\\begin{b}",
        "word ",
        "Wort. ",
        "计算",
        "x",
        "X",
        "3",
        "5 km",
        "'",
        ",",
        ".",
        "\t",
        "é",
    ),
    *("<think>", "</think>", "https://", "_", "ก", "の", "\ud800", "\x00", "\u0301", "ا", "д"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join), st.sampled_from(["en", "zh"]))
@settings(max_examples=200)
def test_any_mixture_of_marks_has_a_share(text, target):
    assert language_share(text, target) is None or 0 <= language_share(text, target) <= 1


@pytest.mark.parametrize("piece", PIECES)
def test_time_is_linear(piece):
    text = (piece * 100_000)[:100_000]
    start = time.process_time()
    language_share(text, "en")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("piece", ["a中", "We add the numbers. "])
def test_a_megabyte_takes_seconds(piece):
    text = (piece * 1_000_000)[:1_000_000]
    start = time.process_time()
    language_reward(["p"], [text], target_language="zh")
    assert time.process_time() - start < 5


def test_the_same_from_threads_and_from_another_process():
    reward = partial(language_reward, target_language="de")
    texts = [shuffled("de", other) for other in ("en", "fr", "nl", "ru")]
    here = reward(["p"] * 4, texts)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: reward(["p"] * 4, texts), range(8))] == [here] * 8
    assert pickle.loads(pickle.dumps(reward))(["p"] * 4, texts) == here
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(reward, ["p"] * 4, texts).result() == here


def test_the_detector_is_loaded_when_it_is_first_needed_and_once():
    assert language._detector() is language._detector()
    code = (
        "import sys; from grpo_jax.rewards.language import language_share; language_share('', 'en'); "
        "sys.exit('py3langid' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What a policy may try against the comparison of expressions, and the work that one answer may take."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest

from grpo_jax.rewards.math import evaluation, points, symbolic
from grpo_jax.rewards.math.compare import same_answer
from grpo_jax.rewards.math.expression import parse
from grpo_jax.rewards.math.forms import formulas
from grpo_jax.rewards.math.latex import normalize
from grpo_jax.rewards.math.reader import read_answer
from grpo_jax.rewards.math.reward import math_reward, question_contains_answer

ZEROS = "".join(f"(x-{i})(x+{i})" for i in range(16))
HIDDEN = [
    *((r"\sin x", rf"\sin x+\sin({n}\pi x)") for n in ("2", "2311", "10^{30}", "(2^{31}-1)", r"2311\cdot 2^{36}")),
    *(("x", f"x+{ZEROS}"), ("x", r"x+10^{-30}x"), ("x", r"x+10^{-300}"), ("x", r"x+\frac{1}{10^{99}}\sqrt{x}")),
    *(("x", r"x+\sqrt{(x-1000)^2}+x-1000"), ("x", r"x+((x-10^{40})^2)^{1/2}+x-10^{40}"), ("x", r"\sqrt{x^2}")),
    *(("x", r"x\cdot e^{10^{-60}x}"), ("x^2", r"x^{2+10^{-50}}"), (r"\sin x", r"\sin(x+2\pi\cdot 10^{-45})")),
    *(("n", r"n+\sin(n\pi)"), ("n!", r"n!(1+\sin(\pi n))"), ("(-1)^n", r"(-1)^n+\sin(\pi n)"), ("x", r"x+0^x")),
    *(("x", r"x+\lfloor 10^{-9}x \rfloor"), (r"\lfloor x \rfloor", r"\lfloor x+10^{-60} \rfloor+10^{-60}")),
    *((r"\lfloor x \rfloor", r"\lfloor x+10^{-60} \rfloor"), (r"\lceil 2x \rceil", r"\lceil 2x-10^{-40} \rceil")),
    *((r"\max(x,0)", r"\max(x,10^{-30})"), (r"\min(x,10^{900})", "x"), ("x", r"x+\sqrt{(x-10^{300})^2}+x-10^{300}")),
    *((r"\sin x", r"\sin x+\sqrt{(x-10^{100})^2}+x-10^{100}"), (r"\min(x,5)", r"\min(x,5+10^{-30})")),
    *(("x", r"x+e^{-100x^2}"), ("x", r"x+\frac{1}{x!}"), ("x", r"\arcsin \sin x"), ("|x|", r"|x|+\sin(2\pi x)")),
    *((r"\pi", r"\pi+10^{-149}"), (r"\sqrt2", r"\sqrt{2+10^{-100}}"), ("x", r"\sqrt{x}\sqrt{x}+10^{-45}")),
    *(("x+y", r"x+y+\sin(2311\pi x)\sin(2311\pi y)"), ("x+y", r"x+y+\sqrt{(x-y)^2}-x+y")),
    *(("x", r"x\cdot\frac{x!}{x!}+\sin(2\pi x)"), ("x", r"\frac{x\sin(2\pi x)}{\sin(2\pi x)}+10^{-35}")),
]
NESTED = [
    *(f"5{'M' * 74}!", rf"e^{{\pi}}{'c' * 44}pow-\pi"),  # letters that could be units, in exponentially many ways
    r"\ln " * 10 + "x",
    r"\ln(" * 20 + "x" + ")" * 20,
    "x^" * 44 + "2",
    "2^" * 40 + "2",
    "x^{" * 40 + "2" + "}" * 40,
    r"\sqrt{1+" * 50 + "x" + "}" * 50,
    r"\sin(\cos(" * 15 + "x" + "))" * 15,
    r"\frac{1}{1+" * 36 + "x" + "}" * 36,
    "+".join(f"x^{{{power}}}" for power in range(1, 60)),
    "+".join(rf"\sin({n}x)" for n in range(1, 40)),
    "+".join(rf"\sqrt{{{n}}}" for n in range(2, 45)),
    "(x+1)" * 70,
    "(x+y+z)^{50}",
    "x^{9999}+1",
    "3000!",
    "(" * 15 + "x" + ")!" * 15,
    "x!" * 20,
    r"\binom{x}{y}" * 10,
    "e^{9999}+\\sin 1",
    r"\pi^{5000}+\sqrt2",
    r"(\sqrt2+\sqrt3)^{500}",
    r"e^{-x^2}" * 40,
    "(1+x)^{(1+x)}" * 20,
    r"\{" + ",".join(rf"\sin {n}" for n in range(2, 45)) + r"\}",
    r"\cup".join(rf"(\sqrt{{{n}}},\pi^{n % 9})" for n in range(20)),
    r"\begin{pmatrix}" + "&".join([r"\sin x"] * 30) + r"\end{pmatrix}",
    r"x \text{ or } " * 20 + "x",
    "|x" * 100 + "|" * 100,
    "0.(" + "9" * 300 + ")",
    r"\lfloor \pi^{2000} \rfloor",
]
ATOMS = ["x", "y", "2", "3.5", "99", r"\pi", "e", "i", "10^{50}"]
SHAPES = [
    *("A+B", "(A)(B)", r"\frac{A}{B}", "(A)^{B}", r"\sqrt{A}", r"\ln(A)", r"\sin(A)", "e^{A}", "(A)!", "|A|", "-(A)"),
    *(r"\lfloor A \rfloor", r"\binom{A}{B}", r"\arctan(A)", r"\log_{A}(B)", "(A,B)", "A=B", r"\{A,B\}", "A<B"),
]


@pytest.mark.parametrize(("gold", "answer"), HIDDEN)
def test_expressions_that_differ_only_where_nobody_would_look(gold, answer):
    """The points are secret, and differences are found at any size: in numbers beyond every constant, to any digit."""
    assert math_reward([""], [rf"\boxed{{{answer}}}"], answer=[gold]) == [0.0]
    assert not same_answer(answer, gold) if read_answer(answer) else True


def test_points_differ_between_processes_and_scores_do_not():
    program = """
from grpo_jax.rewards.math.expression import parse
from grpo_jax.rewards.math.compare import same_answer
from grpo_jax.rewards.math.points import points_for
pairs = [("|x-3|", "|3-x|"), ("|x-3|", "3-x"), ("x^2-1", "(x-1)(x+1)"), ("|n-10|", "10-n")]
print([same_answer(*pair) for pair in pairs], points_for(frozenset("x"), parse("x")))
"""
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    scores, found = zip(*(run.split("]", 1) for run in runs), strict=True)
    assert scores == ("[True, False, True, False",) * 2
    assert found[0] != found[1]


def test_scores_do_not_depend_on_the_secret(monkeypatch):
    pairs = [
        ("|a-b|", "b-a"),
        (r"\lceil n/2 \rceil", r"\lfloor n/2 \rfloor+1"),
        (r"\min(x,5)", "x"),
        ("|a|+|b|", "|a+b|"),
    ]
    same = [
        (r"\sin 2x", r"2\sin x\cos x"),
        ("|x-3|", "|3-x|"),
        ("2^{n+1}", r"2\cdot 2^n"),
        (r"\ln(x^3)", r"\ln(x\cdot x^2)"),
    ]
    for number in range(12):
        monkeypatch.setattr(points, "SECRET", bytes([number] * 32))
        assert not any(same_answer(*pair) for pair in pairs)
        assert all(same_answer(*pair) for pair in same)


@pytest.mark.parametrize("text", NESTED, ids=lambda text: text[:24])
def test_one_evaluation_takes_about_a_second_at_most(text):
    """As gold, as answer, and against its own value written differently."""
    for gold, answer in ((text, text), ("x", text), (text, f"{text}+0")):
        read_answer.cache_clear()
        started = time.process_time()
        assert math_reward([""], [rf"\boxed{{{answer}}}"], answer=[gold])[0] in (0.0, 1.0, None)
        assert time.process_time() - started < 3  # a second on an idle machine


def test_random_nesting_ends_soon():
    """A hundred of them here."""
    random = Random(0)

    def expression(depth):
        if depth == 0:
            return random.choice(ATOMS)
        shape = random.choice(SHAPES)
        parts = [expression(random.randint(0, depth - 1)) for _ in range(2)]
        return shape.replace("A", "\0").replace("B", parts[1]).replace("\0", parts[0])

    for _ in range(120):
        text = expression(random.randint(1, 5))[:390]
        started = time.process_time()
        assert math_reward([""], [rf"\boxed{{{text}+0}}"], answer=[text])[0] in (0.0, 1.0, None)
        assert time.process_time() - started < 3


def test_the_limit_is_the_same_in_other_threads():
    texts = NESTED[:12]
    alone = [math_reward([""], [rf"\boxed{{{text}+0}}"], answer=[text]) for text in texts]
    read_answer.cache_clear()
    with ThreadPoolExecutor(3) as threads:
        assert (
            list(threads.map(lambda text: math_reward([""], [rf"\boxed{{{text}+0}}"], answer=[text]), texts)) == alone
        )


def test_what_takes_too_much_work_scores_nothing_and_is_logged(caplog, monkeypatch):
    assert same_answer(r"\sin x+\cos y", r"\cos y+\sin x")
    monkeypatch.setattr(evaluation, "WORK_LIMIT", 30.0)
    with caplog.at_level("INFO"):
        assert not same_answer(r"\sin x+\cos y", r"\cos y+\sin x")
    assert "takes too much work" in caplog.text


@pytest.mark.parametrize(
    "gold", ["(x+1)^2=x^2+2x+1", "x=x", "0=0", "x+1=x+2", "y-y=0", r"\sin^2 x+\cos^2 x=1", "x<x+1", "2(a+b)=2a+2b"]
)
def test_an_identity_is_not_a_gold_answer(gold):
    assert read_answer(gold) is None
    assert math_reward([""], [rf"\boxed{{{gold}}}"], answer=[gold]) == [None]


FORMS = [
    ("expanded", "x^2+7x+10", "(x+2)(x+5)", False),
    ("expanded", "x^2+7x+10", "10+7x+x^2", True),
    ("expanded", "x^2+7x+10", "x^2+2x+5x+10", False),
    ("expanded", "x^2+7x+10", "x(x+7)+10", False),
    ("expanded", "x^2+2x+1", "(x+1)^2", False),
    ("expanded", r"\frac{x^2}{2}-3xy", r"\frac{1}{2}x^2-3yx", True),
    ("expanded", r"\frac{x^2}{2}-3xy", r"\frac{x^2-6xy}{2}", False),
    ("expanded", "6x^2y", r"2x\cdot 3xy", True),
    ("factored", "(x+2)(x+5)", "x^2+7x+10", False),
    ("factored", "(x+2)(x+5)", "(5+x)(x+2)", True),
    ("factored", "(x+2)(x+5)", "x(x+7)+10", False),
    ("factored", "(x-1)(x+1)(x^2+1)", "(x^2-1)(x^2+1)", False),
    ("factored", "2(x+1)(x+3)", "(2x+2)(x+3)", False),
    ("factored", "(3x+4)^2", "(3x+4)(3x+4)", True),
    ("factored", "(3x+4)^2", "9x^2+24x+16", False),
    ("factored", "7(x+2)(x-2)", "7(x-2)(x+2)", True),
    ("factored", "x^2(a-b)(a+b)", r"x\cdot x(a+b)(a-b)", True),
    ("factored", "x^2(a-b)(a+b)", "x^2(a^2-b^2)", False),
    ("as-written", r"\frac{3}{4}", "0.75", False),
    ("as-written", r"\frac{3}{4}", r"\dfrac 34", True),
    ("as-written", "x^2+1", "1+x^2", False),
    ("as-written", r"2^3\cdot 3", r"2^{3} \cdot 3", True),
]


@pytest.mark.parametrize(("form", "gold", "answer", "is_right"), FORMS)
def test_a_form_that_is_required_of_expressions(form, gold, answer, is_right):
    assert math_reward([""], [rf"\boxed{{{answer}}}"], answer=[gold], form=form) == [float(is_right)]
    if form != "as-written" or is_right:
        assert same_answer(gold, answer)  # without the form


def test_a_form_of_other_answers_and_of_golds():
    assert math_reward([""], [r"\boxed{0.5}"], answer=["1/2"], form="expanded") == [1.0]
    assert math_reward([""], [r"\boxed{(x+1)(x+2)}"], answer=["(x+1)(x+2)"], form="expanded") == [None]
    assert math_reward([""], [r"\boxed{(x+1)(x+2)}"], answer=["y=x^2+3x+2"], form="expanded") == [0.0]
    with pytest.raises(ValueError, match="is not expanded"):
        same_answer("(x+1)(x+2)", "x", form="expanded")
    with pytest.raises(ValueError, match=r"form is 'short', not one of expanded, factored, as-written"):
        math_reward([""], [""], answer=["1"], form="short")


@pytest.mark.parametrize(
    ("question", "gold", "contains"),
    [
        ("Expand $(x+2)(x+5)$.", "x^2+7x+10", True),
        ("Factor $x^2+7x+10$.", "(x+2)(x+5)", True),
        (r"Simplify \(\sqrt{12}\).", r"2\sqrt{3}", True),
        (r"Write \[y = (x+1)^2\] in standard form.", "x^2+2x+1", True),
        ("Expand (x+2)(x+5).", "x^2+7x+10", True),
        ("Find the value of 2x + 4 if x = 3.", "10", False),
        ("Solve $x^2 = 4$.", r"\pm 2", False),
        ("Compute $3+4$.", "7", False),
        ("How many apples are left?", "5", False),
        ("Expand $(x+2)(x+5)$.", r"\foo", False),
    ],
)
def test_question_contains_answer(question, gold, contains):
    assert question_contains_answer(question, gold) == contains


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("1/2x", r"\frac{x}{2}"),
        (r"\sin x\cos x", r"(\sin x)(\cos x)"),
        (r"\sin x/2", r"\frac{\sin x}{2}"),
        ("-x^2", "-(x^2)"),
        ("2^{-x}", r"\frac{1}{2^x}"),
        ("x^2^3", "x^8"),
        ("x2", None),
        ("2 3", None),
        ("f(x)", None),
        (r"\frac{dy}{dx}", None),
        ("n!!", None),
        ("word", None),
        ("x'", None),
        ("x+", None),
        ("", None),
    ],
)
def test_how_expressions_are_read(text, other):
    if other is None:
        assert parse(normalize(text) or "") is None
    else:
        left, right = parse(normalize(text) or ""), parse(normalize(other) or "")
        assert left is not None
        assert right is not None
        assert symbolic.agree(left, right)


def test_equations_are_compared_to_the_places_that_their_values_have(monkeypatch):
    """Whatever the secret: points differ in how many digits their values take."""
    for number in range(20):
        monkeypatch.setattr(points, "SECRET", bytes([number]) * 32)
        assert same_answer("a_{n}=2^{n-1}", r"a_n = \frac{2^n}{2}")


def test_formulas_of_a_question_are_found_in_linear_time():
    for question in (" " * 30_000, "a " * 15_000, "1" + " " * 30_000 + "2"):
        assert formulas(question) in ([], [question.strip()[:1]])


@pytest.mark.parametrize(
    "text",
    [
        "hand " * 70 + "!",
        "The " + "best and most round " * 15 + "x!",
        r"\triangle " * 35 + "x",
        r"\triangle ABC \cong " * 18 + "x",
        r"\angle A" + " }" * 60,
        "ab, cd ef, " * 30 + "and !",
    ],
)
def test_words_and_labels_are_read_in_linear_time(text):
    """A run of letters that may end in "nd", or of commands, can be divided in one way only: else this never ends."""
    assert math_reward([""], [rf"\boxed{{{text}}}"], answer=["5"]) == [0.0]


def test_values_of_far_apart_magnitudes_are_refused():
    """The logarithm of a complex number whose parts are so took hours, or all memory."""
    assert read_answer("------ tan^----fx^s = x^2-0") is None
    assert math_reward([""], [r"\boxed{------ tan^----fx^s = x^2-0}"], answer=["5"]) == [0.0]

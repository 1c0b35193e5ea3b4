# ruff: noqa: RUF001
"""Answers in completions as models write them: markdown, languages, lists, guesses and thoughts."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.rewards.math.answer import answer_reward, extract_answer, gold_answer, numeric_value, worked_answer
from grpo_jax.rewards.math.boxes import final_box, single_box
from grpo_jax.rewards.math.markup import strip_markup
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.rewards.math.sentences import stated_answers

# Ways to state 73.
MARKDOWN = [
    *("The answer is **73**.", "**Answer: 73**", "#### **73**", "`73`", "The answer is `73`.", "**Answer:** 73"),
    *("**Answer**: 73", "*Answer:* 73", "__Answer:__ 73", "The answer is: **73**", "**The answer is 73.**"),
    *("**Final Answer:** **73**", "## Answer\n\n73", "### Final Answer:\n\n**73**", "**Final Answer**\n\n$73$"),
    *("- **Answer:** 73", "> Answer: 73", "1. Answer: 73", "<b>Answer:</b> 73", "The answer is <b>73</b>."),
    *("#### $73$", "#### **Answer: 73**", "#### Final Answer\n73", "So he pays\n\n**73**", "The answer is:\n- **73**"),
    *("Answer:\n```\n73\n```", "The answer is ***73***.", "The answer is <strong>73</strong>", "`Answer: 73`"),
    *(
        "<answer>**73**</answer>",
        "<answer>`73`</answer>",
        "<answer>\n$$73$$\n</answer>",
        "<answer>**Answer: 73**</answer>",
    ),
    *(r"\boxed{**73**}", r"**\boxed{73}**", "**Answer**\n**73**", "#### `73`", "##### 73", "The answer is _73_."),
]
PHRASES = [
    *("Final Answer: The final answer is $73$. I hope it is correct.", "The final answer is:\n$$73$$"),
    *("The final answer is\n\\[\n73\n\\]", "The final answer is:\n\n\\[ \\boxed{73} \\]", "The answer is $$\n73\n$$"),
    *(
        "The answer is therefore 73.",
        "The answer to the problem is 73.",
        "the answer must be 73",
        "the answer (in cm) is 73",
    ),
    *("The answer is 73 because 70+3=73.", "The answer is 73, which is prime.", "The answer is\n73.", "ANSWER: 73"),
    *("The answer = 73", "answer=73", "Answer: \\(73\\)", "The answer is \\( 73 \\).", 'The answer is "73".'),
    *('{"answer": 73}', '{"answer": "73", "confidence": 0.9}', '```json\n{"final_answer": 73}\n```'),
    *(
        r"$\text{Answer: } 73$",
        r"\textbf{Answer: }73",
        r"\textbf{Answer: 73}",
        "The answer is: $73$ and I hope it is right.",
    ),
    *("If we add them, the answer is 73.", "I think that the answer is 73.", "The answer is = 73"),
    *(
        "The answer is 73. Our answer is correct.",
        "The answer is 73. The answer is reasonable.",
        "My answer is 73. My answer is right.",
    ),
    *(
        "<answer>The answer is 73. Our answer is correct.</answer>",
        "<Answer>73</Answer>",
        "<final_answer>73</final_answer>",
    ),
]
BOXES = [
    *("So $\\boxed{73}$. Our answer is correct.", "So $\\boxed{73}$. The answer is an integer as expected."),
    *(
        "The answer is 5 at first, but $\\boxed{73}$.",
        "So \\boxed{73}.\n#### Remark\nNote it.",
        "\\boxed{73}\n\n### Check\nFine.",
    ),
    *("\\boxed 73", "\\boxed 73$", "\\fbox{73}", "\\framebox{73}", "\\\\boxed{73}", "x \\\\\\boxed{73}"),
    *("\\boxed{5} is wrong; the answer is 73.", "\\boxed{73}, so \\boxed{73}", "\\boxed{5}. I was wrong: \\boxed{73}"),
    *("<answer>The answer is \\boxed{73}. It is correct.</answer>", "\\boxed{73} = \\boxed{73}"),
]
LANGUAGES = [
    *("答案是73。", "答案：73", "所以，最终答案是 $73$。", "故答案为：73", "因此答案等于73", "答：73", "答案為 73。"),
    *(
        "答えは73です。",
        "答え：73",
        "したがって、答えは 73 となります。",
        "정답은 73입니다.",
        "답: 73",
        "따라서 답은 73이다.",
    ),
    *("La respuesta es 73.", "La respuesta final es: 73", "Respuesta: 73", "A resposta é 73.", "Resposta: 73"),
    *(
        "Die Antwort ist 73.",
        "Die endgültige Antwort lautet 73.",
        "Antwort: **73**",
        "La réponse est 73.",
        "Réponse : 73",
    ),
    *(
        "La réponse finale est 73.",
        "La risposta è 73.",
        "Het antwoord is 73.",
        "Ответ: 73",
        "Ответ — 73.",
        "**Ответ:** $73$",
    ),
    *(
        "Odpowiedź: 73",
        "Cevap: 73",
        "Svaret är 73.",
        "Đáp án là 73.",
        "Đáp số: 73",
        "Jawabannya adalah 73.",
        "Jibu ni 73.",
    ),
    *("الجواب هو 73.", "الإجابة: 73", "उत्तर: 73", "उत्तर है 73।", "উত্তর হল 73।", "คำตอบคือ 73", "Η απάντηση είναι 73."),
    *("Відповідь: 73", "Odpověď je 73.", "Vastaus on 73.", "Răspunsul este 73.", "సమాధానం: 73", "התשובה היא 73."),
]


@pytest.mark.parametrize("completion", [*MARKDOWN, *PHRASES, *BOXES, *LANGUAGES])
def test_an_answer_is_found_however_it_is_stated(completion):
    found = extract_answer(completion)
    assert found is not None
    assert numeric_value(found) == 73, found
    for reward in (answer_reward, math_reward):
        assert reward([""], [completion], answer=["73"]) == [1.0]
        assert reward([""], [completion], answer=["5"]) == [0.0]
        assert reward([""], [f"<think>It is 5: \\boxed{{5}}.</think>\n{completion}"], answer=["73"]) == [1.0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("the answer is (B)", "(B)"),
        ("The correct answer is option B.", "B"),
        ("The correct option is (C).", "(C)"),
        ("故选B", "B"),
        ("The answer is **Paris**.", "Paris"),
        ('The answer is "Paris".', "Paris"),
        ("The answer is **73** apples.", "73 apples"),
        ("The answer is 2**3.", "2**3"),
        ("The answer is x_1*x_2.", "x_1*x_2"),
        ("The answer is 0.333...", "0.333..."),
        (r"$\boxed\frac{1}{2}$", r"\frac{1}{2}"),
        (r"$x = \boxed{3}$ or $x = \boxed{5}$", "3, 5"),
        (r"\boxed{3}, \boxed{5}", "3, 5"),
        ("The answers are:\n- 3\n- 5", "3, 5"),
        ("The answer is x^2+C, where C is a constant.", "x^2+C"),
        ("So x = 7.\n#### Remark\nNote it.", None),
        ("#### Step 2: add\nthen more", None),
        ("#### 2. Add them\nthen more", None),
        ("Our answer is correct.", None),
        ("The answer is correct.", None),
        ("The answer is as follows.", None),
        (r"put it in \boxed at the end", None),
        ("A: 73", None),
        ("73", None),
        ("**Note**", None),
    ],
)
def test_what_is_found(completion, answer):
    assert extract_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "I don't think the answer is 5.",
        "If the answer is 5, we are lost.",
        "Suppose that the answer is 5.",
        "Maybe the answer is 5.",
        "Whether the final answer is 5 is open.",
        "Could it be that the answer is 5?",
        "A possible answer is 5.",
        "The wrong answer is 5.",
        "The answer is not 5.",
        "The answer is *not* 5.",
        "The answer isn't 5.",
        "The answer is 5, or maybe 6.",
        "The answer is between 5 and 6.",
        "The answer is:\n5\n6",
        "The answer could be 5.",
        "The answer is 15.",
        "The answer is -5.",
        "The answer is 5.5.",
        r"\boxed{5",
        r"\boxed 5^2",
        r"\boxed x^2 5",
        '{"answer": 5, 6}',
        '{"answer": [5, 6]}',
    ],
)
def test_what_is_supposed_denied_or_only_begun_is_not_an_answer(completion):
    assert answer_reward([""], [completion], answer=["5"]) == [0.0]
    assert math_reward([""], [completion], answer=["5"]) == [0.0]


FORMS = [
    *(
        r"\boxed{%s}",
        r"$\boxed{%s}$",
        "The answer is %s",
        "the answer is **%s**",
        "**Answer: %s**",
        "Answer: %s",
        "#### %s",
    ),
    *("<answer>%s</answer>", "The final answer is $%s$", "答案是%s", r"the answer is $\boxed{%s}$", '{"answer": %s}'),
]
HEDGES = [
    *(" or ", " or maybe ", ", ", " and ", "; or ", " / ", ". Or ", ". Or maybe ", ".\nOr maybe ", ". Alternatively, "),
    *(", possibly ", " (or ", r" \text{ or } ", "\nor\n", ". It could also be ", " but it might be ", ", otherwise "),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_completion_with_two_answers_does_not_score(form):
    for hedge in HEDGES:
        for completion in (form % 5 + hedge + form % 6, form % f"5{hedge}6", form % 5 + hedge + "6"):
            for gold in ("5", "6"):
                assert answer_reward([""], [completion], answer=[gold]) == [0.0], completion
                assert math_reward([""], [completion], answer=[gold]) == [0.0], completion


def test_guesses_within_thoughts_and_before_the_final_answer_do_not_score():
    for guess, other, final in itertools.product(FORMS, FORMS[:3], FORMS[:8]):
        guess, other, final = guess % 12, other % 12, final % 13
        for completion in (
            f"<think>{guess} hmm {other}",
            f"<think>{guess}</think>{final}",
            f"<think>a</think>{final}<think>{guess}",
            f"{guess}</think>{final}",
            f"<think>{guess}</think>\n<think>{other}</think>\n{final}",
            f"<answer>{other} or 13</answer>",
            "<answer>13\n\n12</answer>",
        ):
            assert answer_reward([""], [completion], answer=["12"]) == [0.0], completion


def test_the_same_answer_twice_is_one_answer():
    for form, hedge in [*itertools.product(FORMS[:2], HEDGES), *itertools.product(FORMS, ["\n", ".\n\nSo "])]:
        completion = form % "1/2" + hedge + form % "0.5"
        assert answer_reward([""], [completion], answer=["0.5"]) == [1.0], completion


OPENINGS = ["<think>", "<think>\n", "<Think>", "<thinking>", "<reasoning>", "[THINK]", "<|begin_of_thought|>"]


@pytest.mark.parametrize("statement", [form % 12 for form in FORMS])
def test_an_unfinished_thought_is_no_answer(statement):
    for opening in OPENINGS:
        completions = [f"{opening}maybe {statement}", f"{statement} {opening} no", f"{opening}a {statement}</other>"]
        for reward in (answer_reward, math_reward):
            assert reward([""] * 3, completions, answer=["12"] * 3) == [0.0] * 3
            assert reward([f"q {opening}"], [f"maybe {statement}"], answer=["12"]) == [0.0]
            assert reward([f"q\n{opening}First:"], [f"maybe {statement}"], answer=["12"]) == [0.0]
        assert extract_answer(f"maybe {statement}", f"q {opening}") is None
    assert answer_reward(["Think in <think> tags. 3*4?"], [statement], answer=["12"]) == [1.0]
    assert answer_reward(["q <think>"], [f"a</think>{statement}"], answer=["12"]) == [1.0]


def test_a_prompt_may_open_what_holds_the_answer():
    assert extract_answer("5</answer>", "q <think>a</think><answer>") == "5"
    assert extract_answer("5} it is", "q The answer is \\boxed{") == "5"
    assert extract_answer("<think>5</answer></think>", "q <answer>") is None
    assert extract_answer("5</answer>", "Write <answer> first. q") is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("5", "5"),
        ("**73**", "73"),
        ("x = 5", "x = 5"),
        (r"So \boxed{7}. Our answer is correct.", "7"),
        ("We halve it. The answer is 0.5.", "0.5"),
        ("a #### 5", "5"),
        ("The answer is correct.", "The answer is correct."),
        (r"<think>maybe \boxed{12}", ""),
        (r"<think>maybe \boxed{12}</think>\boxed{13}", "13"),
    ],
)
def test_the_answer_of_a_gold(gold, answer):
    assert gold_answer(gold) == answer


def test_a_gold_that_is_an_unfinished_thought_makes_the_sample_absent():
    gold = [r"<think>maybe \boxed{12}"]
    assert (
        answer_reward([""], [r"\boxed{12}"], answer=gold) == math_reward([""], [r"\boxed{12}"], answer=gold) == [None]
    )


def test_worked_solutions():
    assert worked_answer("so \\boxed{7}.\n#### Remark") == "7"
    assert worked_answer("2+3=5\n#### 5") == "5"
    assert worked_answer("The answer is 5.") is None
    assert worked_answer("5") is None


def test_boxes():
    text = r"a \boxed{1} b \boxed{2}, \boxed{3} c"
    assert final_box(text) == (text.index(r"\boxed{2}"), len(text) - 2, "2, 3")
    assert single_box(text) is None
    assert single_box(r"\boxed{2} and then \boxed{2}") is not None
    assert final_box(r"\boxed{2} and \boxed{2.0}")[2] == "2.0"
    assert final_box("none") is None


def test_markup():
    assert strip_markup(" **73** apples ") == "73 apples"
    assert strip_markup("73**") == strip_markup("** 73") == strip_markup("`73`") == strip_markup("73") == "73"
    assert strip_markup("2**3") == "2**3"
    assert strip_markup("a*b*c") == "a*b*c"
    assert strip_markup("x_1 + x_2") == "x_1 + x_2"
    assert strip_markup("5$") == "5"
    assert strip_markup("$5") == "$5"
    assert strip_markup("**" + "5" * 3000) == "**" + "5" * 3000


def test_sentences_are_found_with_their_places():
    text = "The answer is 5. Now: the answer is 6, because."
    assert [(text[start:end], answer) for start, end, answer in stated_answers(text)] == [
        ("answer is 5", "5"),
        ("answer is 6, because", "6"),
    ]


PIECES = [
    *(
        r"\boxed{5}",
        r"\boxed{",
        "}",
        "The answer is ",
        "answer:\n",
        "#### ",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
    ),
    *(
        "5",
        "6",
        " or ",
        ". ",
        "\n",
        "**",
        "`",
        "$",
        "$$",
        "\\[",
        "```",
        "- ",
        "maybe ",
        "{",
        '"answer": ',
        "答案是",
        "\\",
    ),
]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join), st.sampled_from(["", "<think>", "<answer>"]))
def test_any_mixture_is_read_without_error_and_never_within_an_unfinished_thought(text, prompt):
    found = extract_answer(text, prompt)
    assert found is None or found == found.strip()
    assert extract_answer(f"{text}<think>{text.replace('</think>', '')}", prompt) is None
    for gold in ("5", "6"):
        assert answer_reward([prompt], [text], answer=[gold])[0] in (0.0, 1.0)
    assert not all(answer_reward([prompt] * 2, [text] * 2, answer=["5", "6"]))


REPEATED = [
    *("\\boxed{7}", "\\boxed{", "\\boxed{\\boxed{7}}", "\\boxed 7 ", "\\fbox{", "The answer is ", "the answer is 5. "),
    *("answer:\n", "answer:\n\n", "The answer is:\n$$", "The answer is:\n\\[", "answer:\n```", "answer:\n- 5\n"),
    *("answer to the ", "answer (", "#### 5\n", "## answer\n\n", "**", "*a", "_a", "`a", "<b ", '"answer": "'),
    *(
        "答案是",
        "故选",
        "respuesta ",
        "answer is, then, ",
        "maybe ",
        "answer is 5 because ",
        "\\text{Answer: } 5",
        "\\\\",
    ),
]


@pytest.mark.parametrize("piece", REPEATED)
def test_time_is_linear(piece):
    text = piece * (50_000 // len(piece))
    start = time.process_time()
    extract_answer(text)
    extract_answer(f"<answer>{text}</answer>")
    gold_answer(text + "5")
    assert time.process_time() - start < 5


TWO = [
    "1. \\boxed{12}\n2. \\boxed{13}",
    "- \\boxed{12}\n- \\boxed{13}",
    "a) \\boxed{12} b) \\boxed{13}",
    "Option 1: \\boxed{12}\nOption 2: \\boxed{13}",
    "First guess: \\boxed{12}. Second guess: \\boxed{13}",
    "\\boxed{12} vs. \\boxed{13}",
    "$\\boxed{12}$ | $\\boxed{13}$",
    "$\\boxed{12}~\\lor~\\boxed{13}$",
]


@pytest.mark.parametrize("text", TWO)
def test_boxes_that_are_listed_are_one_answer(text):
    assert extract_answer(text) == "12, 13"


@pytest.mark.parametrize(
    "text",
    [
        "It is not \\boxed{13}.",
        "The answer isn't $\\boxed{13}$.",
        "\\boxed{13} is wrong.",
        "$\\boxed{13}$ is not correct.",
    ],
)
def test_a_box_that_its_sentence_negates_is_not_an_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "Step 1 gives \\boxed{12} apples at first, and with the rest that makes in the end \\boxed{13}.",
        "Not only is 5 odd, the answer is \\boxed{13}.",
        "\\boxed{13} is not a multiple of 2.",
    ],
)
def test_a_box_beside_other_statements_is_an_answer(text):
    assert extract_answer(text) == "13"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{12} if n is even, \boxed{13} if n is odd", "12, 13"),
        (r"It is \boxed{12} when $x>0$ and \boxed{13} otherwise.", "12, 13"),
        (r"\boxed{12}. But 13 is also possible.", None),
        (r"\boxed{12}, and 13 could be right.", None),
        (r"\boxed{12}. But 13 is too large.", "12"),
        (r"We have x = \boxed{5} for n = 3, so the total is \boxed{15}.", "15"),
        (r"\boxed{3} for each, thus \boxed{9}", "9"),
    ],
)
def test_answers_under_conditions_are_a_list_and_what_is_also_possible_makes_none(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}. Also 6.", None),
        (r"\boxed{5} isn't the answer.", None),
        (r"\boxed{5} cannot be right.", None),
        (r"\boxed{5} is probably wrong, it is \boxed{6}.", "6"),
        (r"\boxed{5}. This can't be simplified.", "5"),
    ],
)
def test_what_is_taken_back_or_doubled_is_no_answer(text, answer):
    assert extract_answer(text) == answer

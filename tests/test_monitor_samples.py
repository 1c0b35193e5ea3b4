"""Sample tables: untrusted text is escaped and otherwise shown as it is."""

import io
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grpo_jax.monitor.samples import Sample, print_samples, printable, shorten

PARTS = {"accuracy": 1.0, "format": None}


def shown(samples, *, step=7, terminal=False, encoding="utf-8", width=100, **options):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, force_terminal=terminal, width=width, color_system="truecolor" if terminal else None)
    print_samples(samples, step, console, **options)
    file.flush()
    return file.buffer.getvalue().decode(encoding)


def sample(completion, prompt="2 + 2?"):
    return Sample(prompt, completion, PARTS, reward=1.0, advantage=-0.5)


def test_plain_lines():
    assert shown([sample("4\n!"), Sample("a", "b", {"accuracy": math.nan}, 0.0, 1.25, "4\x1b")]) == (
        "samples at step 7\n"
        "  [1] reward 1.00  accuracy 1.00  format absent  advantage -0.50\n"
        "      prompt: 2 + 2?\n"
        "      completion: 4\\n!\n"
        "  [2] reward 0.00  accuracy absent  advantage +1.25\n"
        "      prompt: a\n"
        "      completion: b\n"
        "      answer: 4\\x1b\n"
    )


def test_table():
    text = shown([replace(sample("<think>\nfour\n</think>"), answer="vier")], terminal=True)
    for piece in ["answer", "vier", "samples at step 7", "2 + 2?", "accuracy", "1.00", "absent", "advantage", "-0.50"]:
        assert piece in text
    lines = text.splitlines()
    places = [next(i for i, line in enumerate(lines) if piece in line) for piece in ["<think>", "four", "</think>"]]
    assert places == [places[0], places[0] + 1, places[0] + 2]


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    ("evil", "escaped"),
    [
        ("[red]x[/red]", "[red]x[/red]"),
        ("[/]", "[/]"),
        ("[link=http://a]x", "[link=http://a]x"),
        (":smile:", ":smile:"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("a\rb\b", r"a\rb\x08"),
        ("\u202egnp", r"\u202egnp"),
        ("\u2028", r"\u2028"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_markup_and_controls_are_shown_not_obeyed(terminal, evil, escaped):
    in_prompt = shown([sample("x", prompt=evil)], terminal=terminal)
    text = shown([sample(evil)], terminal=terminal)
    assert escaped in re.sub(r"\x1b\[[\d;]*m", "", text)
    for output in (text, in_prompt):
        assert not set(output) & set("\x07\x08\r\x9b\u202e\u2028\U000e0041")
        assert "\x1b]" not in output
    if not terminal:
        assert "\x1b" not in text + in_prompt


@given(st.text(st.characters(codec=None)))
def test_printable_leaves_nothing_that_acts(text):
    result = printable(text)
    assert result.isprintable()
    if text.isprintable():
        assert result == text


@pytest.mark.parametrize("terminal", [False, True])
def test_an_output_that_lacks_a_character_gets_its_escape(terminal):
    assert r"caf\xe9 \u6f22" in shown([sample("café 漢")], encoding="ascii", terminal=terminal, plain=True)
    assert "\\xe9" in shown([sample("é")], encoding="ascii", terminal=terminal)
    assert "é" in shown([sample("é")], encoding="latin-1", terminal=terminal)


@given(st.text(max_size=300), st.integers(60, 200))
def test_shorten(text, limit):
    result = shorten(text, limit)
    if len(text) <= limit:
        assert result == text
    else:
        assert len(result) == limit
        start, rest = result.split(f" ... [{len(text)} characters] ... ", 1)
        assert text.startswith(start)
        assert text.endswith(rest)
        assert abs(len(start) - len(rest)) <= 1


def test_shorten_refuses_a_limit_that_shows_nothing():
    with pytest.raises(ValueError, match="limit is 59; it must be at least 60"):
        shorten("a", 59)


@pytest.mark.parametrize("terminal", [False, True])
def test_long_texts_stay_short(terminal):
    text = shown([sample("x" * 100_000), sample("\n" * 100_000)], terminal=terminal, limit=80, width=120)
    assert "[100,000 characters]" in text
    assert len(text.splitlines()) < 40
    assert text.count("x") < 200


@pytest.mark.parametrize("width", range(80, 110))
def test_a_table_wraps_without_losing_a_character(width):
    completion = "é 漢字 and then again " * 6 + "x" * 200
    table = shown([sample(completion)], terminal=True, width=width)
    cells = [line.split("│")[2] for line in re.sub(r"\x1b\[[\d;]*m", "", table).splitlines() if line.count("│") == 4]
    assert "".join(cells[1:]).replace(" ", "") == completion.replace(" ", "")


def test_no_samples_print_nothing():
    assert shown([]) == ""


def test_plain_on_a_terminal():
    assert shown([sample("4")], terminal=True, plain=True) == shown([sample("4")])


def test_the_row_for_the_log():
    assert sample("4").row(3) == {
        "step": 3,
        "prompt": "2 + 2?",
        "completion": "4",
        "answer": None,
        "reward": 1.0,
        "rewards/accuracy": 1.0,
        "rewards/format": None,
        "advantage": -0.5,
    }


def test_where_nothing_is_rewarded_there_is_neither_a_reward_nor_an_advantage():
    bare = Sample("2 + 2?", "4", answer="4")
    assert bare.row(3) == {"step": 3, "prompt": "2 + 2?", "completion": "4", "answer": "4"}
    text = shown([bare])
    assert "2 + 2?" in text
    assert not any(word in text for word in ("reward", "advantage", "absent"))


def test_what_is_graded_and_not_learnt_from_has_a_reward_alone():
    graded = Sample("2 + 2?", "4", reward=0.0)
    assert graded.row(3) == {"step": 3, "prompt": "2 + 2?", "completion": "4", "answer": None, "reward": 0.0}
    assert "reward 0.00" in shown([graded])
    assert "advantage" not in shown([graded], terminal=True)

"""Sampling in the terminal, as a person would use it."""

import json
import shutil

import pytest

from experiments import sample


def converse(folder, lines, **settings):
    """What is written while lines are typed; the input ends after them."""
    written, typed = [], iter(lines)

    def read(_):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    settings = {"max_completion_length": 24} | settings
    sample.main(sample.Config(model=str(folder), **settings), read=read, write=written.append)
    return written


def test_completes_one_line_after_the_other_as_it_is_drawn(base):
    written = converse(base, ["1+2+3+4=", "9+9+9+9="])
    assert len(written) > 4  # in pieces
    first, second, rest = "".join(written).split("\n")
    assert first.startswith("<answer>")
    assert second.startswith("<answer>")
    assert rest == ""
    assert "<eos>" not in first
    assert written == converse(base, ["1+2+3+4=", "9+9+9+9="])
    assert written != converse(base, ["1+2+3+4=", "9+9+9+9="], seed=1)


def test_one_of_several_samples_is_what_is_drawn_alone(base):
    alone = "".join(converse(base, [], prompt="1+2+3+4=")).strip()
    several = "".join(converse(base, [], prompt="1+2+3+4=", num_samples=3)).split("--- ")
    assert several[1] == f"1\n{alone}\n"
    assert len(several) == 4


def test_stops_biases_and_lengths(base):
    assert "".join(converse(base, ["1+2="], stop=("er>",))) == "<answer>\n"
    assert "<answer>" not in "".join(converse(base, ["1+2="], logit_bias=(("<answer>", -float("inf")),)))
    assert len("".join(converse(base, ["1+2="], min_length=20, temperature=0.0)).strip()) >= 18


def test_a_prompt_without_room_is_told_and_the_next_one_answered(base):
    too_long, fine = "".join(converse(base, ["1+" * 80, "1+2="])).strip().split("\n")
    assert "does not fit the model's 128 positions" in too_long
    assert fine.startswith("<answer>")


def test_a_chat_is_rendered_whole_and_forgotten_on_request(base, tmp_path, monkeypatch):
    folder = tmp_path / "chat"
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m['content'] }}={% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    lengths = []
    pad_prompts = sample.pad_prompts
    monkeypatch.setattr(
        sample, "pad_prompts", lambda ids, **options: lengths.append(len(ids[0])) or pad_prompts(ids, **options)
    )
    converse(folder, ["1+2", "3+4", "/new", "1+2"], chat=True)
    assert lengths[1] > lengths[0] == lengths[2]
    with pytest.raises(ValueError, match="no chat template"):
        converse(base, [], prompt="1+2", chat=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"num_samples": 0}, "num_samples is 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
        ({"system_prompt": "x", "template": "{question}"}, "system_prompt needs chat_template"),
        ({"stop": ("",)}, "an empty string"),
    ],
)
def test_settings_are_checked_before_a_model_is_loaded(settings, message):
    with pytest.raises(ValueError, match=message):
        sample.Config(model="nowhere", **settings)


def test_a_bias_for_what_is_no_token_is_refused(base):
    with pytest.raises(ValueError, match=r"\['nonsense'\] are not tokens"):
        converse(base, ["1+2="], logit_bias=(("nonsense", 1.0),))

"""Turns of chat templates: continued prompts, replies of every family, and the tokens that end turns."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.conversations import encode_demonstrations, load_demonstrations
from grpo_jax.data.prompts import encode_prompts, render_prompts
from grpo_jax.data.tokens import decode_following
from grpo_jax.data.turns import Demonstration, check_turn_end, turn_borders
from tests.families import FAMILIES, family
from tests.test_data_chat_templates import ASSISTANT, CALL, TOOL, USER, tokenizers  # noqa: F401 - a fixture
from tests.test_data_conversations import write_rows

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMS = CHATML.replace("m['content']", "m['content'] | trim")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<end>"]
ENDOFTEXT, IM_END = 0, 2


def chatml(template=CHATML):
    """Letters and special tokens: a base model's tokenizer with a chat template."""
    words = [*SPECIAL, *"\n \t", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    wrapped.chat_template = template
    return wrapped


def started(content, **extras):
    return [USER, {"role": "assistant", "content": content, **extras}]


# The last message is continued --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_that_ends_with_the_assistants_words_is_continued_in_every_family(tokenizers, name):  # noqa: F811
    tokenizer = tokenizers[name]
    prompt = started("The sum is")
    [text] = render_prompts([prompt], tokenizer)
    assert text == tokenizer.apply_chat_template(prompt, tokenize=False, continue_final_message=True)
    [example] = encode_demonstrations([Demonstration(prompt, " 2.", "row")], tokenizer, eos_ids=eos_of(tokenizer, name))
    assert example.token_ids[: example.prompt_length] == encode_prompts([prompt], tokenizer)[0]
    trained = [token for token, marks in zip(example.token_ids, example.loss_mask, strict=True) if marks]
    assert decode_following(tokenizer, [trained])[0].rstrip(" ") == " 2." + learnt_end(tokenizer, name)


def eos_of(tokenizer, name):
    return tokenizer.convert_tokens_to_ids([*family(name).eos, family(name).turn_end])


def learnt_end(tokenizer, name):
    space = " " if name == "llama2" else ""  # its template writes one before the ending token
    return space + family(name).turn_end


@pytest.mark.parametrize("content", ["<think>\nFirst:", "  First: ", "\n\nFirst:\n", "First"])
@pytest.mark.parametrize("template", [CHATML, TRIMS])
def test_what_is_continued_is_what_was_given_whatever_the_template_trims(template, content):
    [text] = render_prompts([started(content)], chatml(template))
    assert text == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n{content}"


def test_an_opened_thought_is_continued_where_templates_write_thoughts_of_their_own(tokenizers):  # noqa: F811
    qwen, r1 = tokenizers["qwen3"], tokenizers["deepseek_r1_qwen"]
    opening = render_prompts([[USER]], qwen)[0]
    assert render_prompts([started("<think>\nFirst:")], qwen) == [opening + "<think>\nFirst:"]
    assert render_prompts([started("<think>\nabc\n</think>\n\nSo")], qwen) == [opening + "<think>\nabc\n</think>\n\nSo"]
    assert render_prompts([started("So", reasoning_content="abc")], qwen) == [opening + "<think>\nabc\n</think>\n\nSo"]
    assert render_prompts([[USER]], r1)[0].endswith("<think>\n")
    assert render_prompts([started("<think>\nFirst:")], r1)[0].endswith("Assistant\uff5c><think>\nFirst:")


def test_a_template_that_leaves_the_last_message_out_cannot_continue_it():
    tokenizer = chatml("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"prompt 1: the chat template changes the last message.* continued"):
        render_prompts(["Hi", started("x")], tokenizer)


def test_an_assistants_first_words_are_continued():
    assert render_prompts([[{"role": "assistant", "content": "Once"}]], chatml()) == ["<|im_start|>assistant\nOnce"]


# Replies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prompt", ["Add 1 and 1", [USER], [USER, ASSISTANT, USER]])
def test_what_is_learnt_follows_the_prompt_that_the_sampler_is_given(tokenizers, name, prompt):  # noqa: F811
    tokenizer = tokenizers[name]
    completion = "I add.\n</think>\n\n    2" if name == "deepseek_r1_qwen" else "I add:\n\n    2"
    demonstration = Demonstration(prompt, completion, "row")
    [example] = encode_demonstrations([demonstration], tokenizer, eos_ids=eos_of(tokenizer, name))
    assert example.token_ids[: example.prompt_length] == encode_prompts([prompt], tokenizer)[0]
    trained = [token for token, marks in zip(example.token_ids, example.loss_mask, strict=True) if marks]
    [text] = decode_following(tokenizer, [trained])
    assert text.strip(" ").endswith(completion + learnt_end(tokenizer, name))
    around = turn_borders(tokenizer, prompt, {})
    assert around is not None
    assert around[1].strip().startswith(family(name).turn_end)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_text_alone_begins_as_the_tokenizer_begins_it(tokenizers, name):  # noqa: F811
    tokenizer = tokenizers[name]
    [example] = encode_demonstrations([Demonstration("", "The sum", "row")], tokenizer, eos_ids=[0])
    assert example.token_ids == [*tokenizer("The sum")["input_ids"], 0]


def test_thoughts_that_the_prompt_opens_are_learnt_as_the_sampler_draws_them(tokenizers):  # noqa: F811
    tokenizer = tokenizers["deepseek_r1_qwen"]
    eos_ids = eos_of(tokenizer, "deepseek_r1_qwen")

    def encoded(completion):
        [example] = encode_demonstrations([Demonstration("Hi", completion, "row 3")], tokenizer, eos_ids=eos_ids)
        return tokenizer.decode(example.token_ids[example.prompt_length :])

    learnt = "I\n</think>\n\nHi" + family("deepseek_r1_qwen").turn_end
    assert encoded("I\n</think>\n\nHi") == encoded("<think>\nI\n</think>\n\nHi") == learnt
    with pytest.raises(ValueError, match="row 3: the chat template renders the prompt differently"):
        encoded("Hi")  # it would be learnt as a thought without an end


def test_a_tool_call_is_learnt_with_the_tools_of_its_row(tokenizers, tmp_path):  # noqa: F811
    tokenizer = tokenizers["qwen3"]
    last = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Add"}]}, last], "tools": [TOOL]}
    [demonstration] = load_demonstrations(write_rows(tmp_path / "calls.jsonl", row))
    assert demonstration.prompt == [{"role": "user", "content": "Add"}]
    [example] = encode_demonstrations([demonstration], tokenizer, eos_ids=eos_of(tokenizer, "qwen3"))
    whole = tokenizer.apply_chat_template(
        [demonstration.prompt[0], {**last, "content": ""}], tools=[TOOL], tokenize=False
    )
    assert tokenizer.decode(example.token_ids) == whole
    assert "<tool_call>" in tokenizer.decode(example.token_ids[example.prompt_length :])


def test_a_completion_that_is_a_picture_is_refused(tmp_path):
    row = {"messages": [USER, {"role": "assistant", "content": [{"type": "image", "url": "x"}]}]}
    with pytest.raises(ValueError, match=r"rows.jsonl:1, message 1: part 0 of the content has the type 'image'"):
        load_demonstrations(write_rows(tmp_path / "rows.jsonl", row))


# Where a turn ends --------------------------------------------------------------------------------------------------


def test_a_turn_that_ends_where_the_model_does_not_stop_is_refused():
    with pytest.raises(ValueError, match=r"ending tokens \[0\] \(<\|endoftext\|>\).*pass --stop-tokens '<\|im_end\|>'"):
        check_turn_end(chatml(), [ENDOFTEXT], "Hi", {})
    with pytest.raises(ValueError, match=r"row 1: .*--stop-tokens '<\|im_end\|>'"):
        encode_demonstrations([Demonstration("Hi", "Ho", "row 1")], chatml(), eos_ids=[ENDOFTEXT])
    for prompt in ("Hi", [USER], [USER, ASSISTANT, USER], started("So")):
        check_turn_end(chatml(), [ENDOFTEXT, IM_END], prompt, {})


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("<|im_end|>", ""),  # it writes no special token
        "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content }}",
        CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}"),
    ],
)
def test_where_the_end_of_a_turn_cannot_be_told_nothing_is_refused(template, caplog):
    check_turn_end(chatml(template), [ENDOFTEXT], "Hi", {})
    assert ("cannot check that the model stops" in caplog.text) == (template != CHATML.replace("<|im_end|>", ""))


def test_a_prompt_that_ends_with_tool_calls_is_refused():
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(ValueError, match="prompt 0: it ends with tool calls of the assistant"):
        check_turn_end(chatml(), [IM_END], [USER, calls], {})


def test_a_plain_template_has_no_turns():
    check_turn_end(chatml(), [ENDOFTEXT], "Hi", {}, template="{question}")
    assert turn_borders(chatml(), "Hi", {}, template="{question}") is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_turns_of_every_family_end_at_its_stop_tokens(tokenizers, name):  # noqa: F811
    tokenizer, made = tokenizers[name], family(name)
    ends = tokenizer.convert_tokens_to_ids([*made.eos])
    if made.turn_end in made.eos:
        check_turn_end(tokenizer, ends, "Hi", {})
    else:
        with pytest.raises(ValueError, match="--stop-tokens"):
            check_turn_end(tokenizer, ends, "Hi", {})

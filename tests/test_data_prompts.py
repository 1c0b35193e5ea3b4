import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.prompts import R1_ZERO, encode_prompts, fit_prompts, pad_prompts, render_prompts

CHAT = "{{ bos_token }}{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "system", "assistant", "two", "three", "{x}", "Q", "A"]
BOS, EOS = 1, 2


def make_tokenizer(template=None, *, adds_bos=True, adds_eos=False):
    """Words between blanks; special tokens put on by the post-processor, as Llama's do."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ["<s>"] * adds_bos + ["$A"] + ["</s>"] * adds_eos
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    return wrapped


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def test_chat_template_opens_the_turn_of_the_assistant():
    conversation = [{"role": "assistant", "content": "three"}, {"role": "user", "content": "two"}]
    assert render_prompts(["two", conversation], make_tokenizer(CHAT)) == [
        "<s>user two assistant",
        "<s>assistant three user two assistant",
    ]


def test_system_prompt_comes_before_each_conversation():
    prompts = ["two", [{"role": "user", "content": "three"}]]
    assert render_prompts(prompts, make_tokenizer(CHAT), system_prompt="A") == [
        "<s>system A user two assistant",
        "<s>system A user three assistant",
    ]
    assert prompts[1] == [{"role": "user", "content": "three"}]


@pytest.mark.parametrize("adds_bos", [True, False])
def test_exactly_one_bos_where_template_and_tokenizer_both_add_it(adds_bos):
    """T11."""
    tokenizer = make_tokenizer(CHAT, adds_bos=adds_bos)
    [ids] = encode_prompts(["two"], tokenizer)
    assert ids == ids_of("<s> user two assistant")
    assert (tokenizer(render_prompts(["two"], tokenizer)[0])["input_ids"].count(BOS) == 2) == adds_bos


@pytest.mark.parametrize("template", [CHAT, CHAT.replace("{{ bos_token }}", "")])
def test_chat_is_encoded_as_transformers_does(template):
    tokenizer = make_tokenizer(template, adds_eos=True)
    messages = [{"role": "user", "content": "two three"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompts(["two three", messages], tokenizer) == [expected, expected]


@pytest.mark.parametrize(
    ("template", "adds_bos", "expected"),
    [
        ("Q {question} A", True, "<s> Q two A"),
        ("Q {question} A", False, "Q two A"),
        ("<s> Q {question} A", True, "<s> Q two A"),
        ("<s> Q {question} A", False, "<s> Q two A"),
    ],
)
def test_plain_template_gets_one_bos_if_the_tokenizer_adds_it(template, adds_bos, expected):
    tokenizer = make_tokenizer(adds_bos=adds_bos, adds_eos=True)
    assert encode_prompts(["two", "two"], tokenizer, template=template) == [ids_of(expected)] * 2


def test_bos_is_decided_for_each_text():
    assert encode_prompts(["<s> two", "two"], make_tokenizer(), template="{question}") == [ids_of("<s> two")] * 2


def test_other_braces_of_a_plain_template_stay():
    assert render_prompts(["{x}"], None, template="{x} {question} {0}") == ["{x} {x} {0}"]


def test_r1_zero_template():
    [text] = render_prompts(["What is 1+1?"], None, template=R1_ZERO)
    assert "User: What is 1+1?" in text
    assert text.endswith("Assistant:")
    assert all(tag in text for tag in ("<think>", "</think>", "<answer>", "</answer>"))


def test_no_prompts():
    assert encode_prompts([], make_tokenizer(CHAT)) == []
    assert encode_prompts([], make_tokenizer(), template="{question}") == []


def test_no_chat_template_names_the_option_for_a_plain_one():
    for call in (render_prompts, encode_prompts):
        with pytest.raises(
            ValueError, match=r"has no chat template: .* pass a plain template, such as template=.*R1_ZERO"
        ):
            call([], make_tokenizer())


def test_template_that_refuses_a_prompt():
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}ok"
    with pytest.raises(ValueError, match="the chat template rejects prompt 1: no system role"):
        render_prompts(["two", [{"role": "system", "content": "A"}]], make_tokenizer(template))


def test_plain_template_errors():
    with pytest.raises(ValueError, match=r"must contain \{question\}, the place of the prompt"):
        render_prompts(["two"], None, template="Q {prompt}")
    with pytest.raises(ValueError, match="prompt 1 is a conversation"):
        render_prompts(["two", [{"role": "user", "content": "two"}]], None, template="{question}")
    with pytest.raises(ValueError, match="system_prompt cannot be used with a plain template"):
        render_prompts(["two"], None, template="{question}", system_prompt="A")


TOKENS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def test_overlong_prompts():
    assert fit_prompts(TOKENS, max_prompt_length=3) == ([0, 1], [[1, 2, 3], [4]])
    assert fit_prompts(TOKENS, max_prompt_length=3, overlong_prompts="drop") == ([0, 1], [[1, 2, 3], [4]])
    assert fit_prompts(TOKENS, max_prompt_length=2, overlong_prompts="truncate") == ([0, 1, 2], [[2, 3], [4], [7, 8]])
    assert fit_prompts(TOKENS, max_prompt_length=4, overlong_prompts="error") == ([0, 1, 2], TOKENS)


def test_overlong_errors():
    with pytest.raises(
        ValueError, match=r"1 of 3 prompts are longer than max_prompt_length=3 .* longest has 4.*or drop"
    ):
        fit_prompts(TOKENS, max_prompt_length=3, overlong_prompts="error")
    with pytest.raises(ValueError, match=r"2 of 2 prompts are longer than max_prompt_length=1"):
        fit_prompts([[1, 2], [1, 2]], max_prompt_length=1)
    with pytest.raises(
        ValueError, match=r"overlong_prompts is 'cut'; it must be one of \('drop', 'truncate', 'error'\)"
    ):
        fit_prompts(TOKENS, max_prompt_length=3, overlong_prompts="cut")
    with pytest.raises(ValueError, match="max_prompt_length is 0; it must be at least 1"):
        fit_prompts(TOKENS, max_prompt_length=0, overlong_prompts="truncate")
    with pytest.raises(ValueError, match=r"1 of 3 prompts have no tokens, at the positions \[1\]"):
        fit_prompts([[1], [], [2]], max_prompt_length=3)


def test_padding_is_on_the_left_and_a_real_pad_id_is_attended():
    """T4."""
    prompts = pad_prompts([[7, 0, 8], [0]], max_prompt_length=4, pad_id=0, index=[5, 3])
    np.testing.assert_array_equal(prompts.ids, [[0, 7, 0, 8], [0, 0, 0, 0]])
    np.testing.assert_array_equal(prompts.mask, [[False, True, True, True], [False, False, False, True]])
    np.testing.assert_array_equal(prompts.index, [5, 3])
    assert (prompts.ids.dtype, prompts.mask.dtype, prompts.index.dtype) == (np.int32, np.bool_, np.int32)


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(6, 8))
def test_padding_keeps_every_token(token_ids, length):
    prompts = pad_prompts(token_ids, max_prompt_length=length, pad_id=9, index=np.arange(len(token_ids)))
    assert prompts.ids.shape == prompts.mask.shape == (len(token_ids), length)
    for row, mask, ids in zip(np.asarray(prompts.ids), np.asarray(prompts.mask), token_ids, strict=True):
        assert row[mask].tolist() == ids
        assert row.tolist() == [9] * (length - len(ids)) + ids


@pytest.mark.parametrize("token_ids", [[], [[1], []], [[1], [1, 2, 3]]])
def test_padding_refuses_lengths(token_ids):
    with pytest.raises(ValueError, match="of 1 to max_prompt_length=2 tokens"):
        pad_prompts(token_ids, max_prompt_length=2, pad_id=0, index=range(len(token_ids)))


@pytest.mark.parametrize("index", [[1], [1, 1], [1, 2, 3]])
def test_padding_refuses_an_index_that_does_not_tell_prompts_apart(index):
    with pytest.raises(ValueError, match="a distinct number for each of 2 prompts"):
        pad_prompts([[1], [2]], max_prompt_length=2, pad_id=0, index=index)


def test_a_prompt_without_tokens_for_it_is_named():
    from grpo_jax.tasks.sums import make_tokenizer

    with pytest.raises(ValueError, match=r"cannot encode text 1, 'What is 1\+1\?'"):
        encode_prompts(["1+1=", "What is 1+1?"], make_tokenizer(), template="{question}")

"""Demonstrations: loading rows, tokenization, and the loss mask."""

import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.conversations import Demonstration, encode_demonstrations, load_demonstrations
from grpo_jax.data.prompts import encode_prompts

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["user", "system", "assistant", ":", "END", "<think>", "</think>", "one", "two", "three", "four", "Q", "A"],
]
LETTERS = ["<pad>", "<s>", "</s>", "<unk>", "ab", *"abxy"]
BOS, EOS = 1, 2

# As ChatML does, it writes something after the ending token.
CHAT = (
    "{{ bos_token + ' ' }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> END ' }}{% endfor %}"
    + ("{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}")
)
# As Qwen3's does, it leaves the thoughts out of the turns that others follow.
FORGETFUL = CHAT.replace(
    "m['content']", "(m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1])"
)


def make_tokenizer(template=None, *, words=WORDS, split=r"\S+", adds_bos=True):
    """One token a word, or whatever ``split`` finds first; a beginning put on by the post-processor, as Llama's is."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    pieces = pre_tokenizers.Split(Regex(split), "removed", invert=True)
    tokenizer.pre_tokenizer = pieces
    single = ["<s>"] * adds_bos + ["$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    wrapped.chat_template = template
    return wrapped


def ids_of(text):
    return [WORDS.index(word) for word in text.split()]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def marked(example):
    """The example's text with the words of the loss mask in capitals."""
    words = [WORDS[i] for i in example.token_ids]
    return " ".join(word.upper() if trained else word for word, trained in zip(words, example.loss_mask, strict=True))


def encode(prompt, completion, tokenizer, *, where="row 7", **options):
    [example] = encode_demonstrations([Demonstration(prompt, completion, where)], tokenizer, eos_ids=[EOS], **options)
    return example


THOUGHTFUL = [user("one"), assistant("<think> two </think> three"), user("four")]


# The loss mask ------------------------------------------------------------------------------------------------------


def test_t13_a_template_that_rewrites_earlier_turns_cannot_mark_them_and_says_so():
    tokenizer = make_tokenizer(FORGETFUL)
    with pytest.raises(
        ValueError, match=r"^row 7: the chat template renders message 1 differently .* cannot be marked"
    ):
        encode(THOUGHTFUL, "one", tokenizer, train_on="assistant")
    with pytest.raises(ValueError, match="message 1 differently"):  # counted as in the data, without the system message
        encode(THOUGHTFUL, "one", tokenizer, train_on="assistant", system_prompt="A")


def test_t13_such_a_template_works_where_no_earlier_turn_is_rewritten():
    tokenizer = make_tokenizer(FORGETFUL)
    example = encode([user("one"), assistant("two"), user("four")], "<think> Q </think> A", tokenizer)
    again = encode(
        [user("one"), assistant("two"), user("four")], "<think> Q </think> A", tokenizer, train_on="assistant"
    )
    assert again.token_ids == example.token_ids
    assert marked(again) == (
        "<s> user : one </s> END assistant : TWO </S> END user : four </s> END "
        "assistant : <THINK> Q </THINK> A </S> END"
    )


def test_t13_the_last_turn_alone_is_learnt_with_such_a_template():
    assert marked(encode(THOUGHTFUL, "<think> one </think> two", make_tokenizer(FORGETFUL))) == (
        "<s> user : one </s> END assistant : three </s> END user : four </s> END "
        "assistant : <THINK> ONE </THINK> TWO </S> END"
    )


def test_t13_every_turn_of_the_assistant_and_nothing_else_is_learnt_up_to_its_ending_token():
    example = encode(THOUGHTFUL, "one two", make_tokenizer(CHAT), train_on="assistant", system_prompt="A")
    trained = [WORDS[i] for i, marks in zip(example.token_ids, example.loss_mask, strict=True) if marks]
    assert trained == ["<think>", "two", "</think>", "three", "</s>", "one", "two", "</s>"]
    assert marked(example).endswith("user : four </s> END assistant : ONE TWO </S> END")
    assert example.token_ids == ids_of(
        "<s> system : A </s> END user : one </s> END assistant : <think> two </think> three </s> END "
        "user : four </s> END assistant : one two </s> END"
    )
    assert example.prompt_length == len(example.token_ids) - 4


def test_t13_an_earlier_message_of_weight_0_is_context_alone():
    question, reply, *rest = THOUGHTFUL
    weighted = [question, {**reply, "weight": 0}, *rest]
    example = encode(weighted, "one two", make_tokenizer(CHAT), train_on="assistant")
    assert example.token_ids == encode(THOUGHTFUL, "one two", make_tokenizer(CHAT)).token_ids
    assert [WORDS[i] for i, marks in zip(example.token_ids, example.loss_mask, strict=True) if marks] == [
        "one",
        "two",
        "</s>",
    ]


def test_t13_all_marks_everything_but_the_first_token():
    for template, plain in ((CHAT, None), (None, "Q {question} A")):
        prompt = "one" if plain else THOUGHTFUL
        example = encode(prompt, "two three", make_tokenizer(template), template=plain, train_on="all")
        assert example.loss_mask == [False] + [True] * (len(example.token_ids) - 1)


def test_t13_a_template_that_opens_a_turn_otherwise_than_it_writes_it():
    opens_otherwise = CHAT.replace("'assistant : '", "'assistant : <think> '")
    with pytest.raises(ValueError, match="row 7: the chat template renders the prompt differently"):
        encode("one", "two", make_tokenizer(opens_otherwise))
    assert marked(encode("one", "<think> two", make_tokenizer(opens_otherwise))).endswith(
        "assistant : <think> TWO </S> END"
    )


def test_t13_a_template_that_leaves_out_the_turn():
    silent = CHAT.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'assistant' %}")
    with pytest.raises(ValueError, match="row 7: the chat template renders the prompt differently"):
        encode("one", "two", make_tokenizer(silent))


def test_completion_marks_the_last_turn_alone():
    example = encode([user("one"), assistant("two"), user("three")], "four", make_tokenizer(CHAT))
    assert marked(example) == (
        "<s> user : one </s> END assistant : two </s> END user : three </s> END assistant : FOUR </S> END"
    )


@given(st.lists(st.sampled_from(["one", "two three", "<think> Q </think> A"]), min_size=2, max_size=8))
def test_what_is_learnt_of_a_conversation_is_what_the_assistant_said(contents):
    contents = contents[: len(contents) // 2 * 2]
    messages = [(assistant if n % 2 else user)(text) for n, text in enumerate(contents)]
    tokenizer = make_tokenizer(CHAT)
    for train_on, said in (("assistant", contents[1::2]), ("completion", contents[-1:])):
        example = encode(messages[:-1], contents[-1], tokenizer, train_on=train_on)
        trained = [i for i, marks in zip(example.token_ids, example.loss_mask, strict=True) if marks]
        assert trained == [i for text in said for i in ids_of(f"{text} </s>")]
        assert example.token_ids == tokenizer.apply_chat_template(messages, return_dict=False)


# Tokens --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system_prompt", [None, "A"])
@pytest.mark.parametrize("prompt", ["one", THOUGHTFUL])
@pytest.mark.parametrize("template", [CHAT, FORGETFUL])
def test_the_prompt_of_a_chat_is_what_the_sampler_is_given(template, prompt, system_prompt):
    tokenizer = make_tokenizer(template)
    example = encode(prompt, "two three", tokenizer, system_prompt=system_prompt)
    [expected] = encode_prompts([prompt], tokenizer, system_prompt=system_prompt)
    assert example.token_ids[: example.prompt_length] == expected
    assert example.token_ids[example.prompt_length :] == ids_of("two three </s> END")
    assert example.token_ids.count(BOS) == 1


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("template", ["Q {question} A", "<s> {question}"])
def test_a_plain_prompt_is_what_the_sampler_is_given_and_the_ending_token_is_learnt(template, adds_bos):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    example = encode("one", "two three", tokenizer, template=template)
    [expected] = encode_prompts(["one"], tokenizer, template=template)
    assert example.token_ids == expected + ids_of("two three </s>")
    assert example.loss_mask == [False] * len(expected) + [True] * 3
    assert example.prompt_length == len(expected)


def test_no_token_spans_the_border_between_prompt_and_completion():
    """The sampler never draws such a token: it is given the prompt as tokens."""
    chat = "{% for m in messages %}{{ m['content'] + ('</s>' if m['role'] == 'assistant' else '') }}{% endfor %}"
    tokenizer = make_tokenizer(chat, words=LETTERS, split="</s>|ab|.")
    for template in ("{question}", None):
        example = encode("xa", "bx", tokenizer, template=template)
        prompt, completion = example.token_ids[: example.prompt_length], example.token_ids[example.prompt_length :]
        assert prompt == encode_prompts(["xa"], tokenizer, template=template)[0]
        assert [LETTERS[i] for i in completion] == ["b", "x", "</s>"]
    assert LETTERS.index("ab") in tokenizer("xabx")["input_ids"]


def test_an_ending_token_that_the_completion_brings_is_not_doubled():
    tokenizer = make_tokenizer()
    example = encode("one", "two </s>", tokenizer, template="{question}")
    assert example.token_ids == ids_of("<s> one two </s>")
    two = encode_demonstrations([Demonstration("one", "two", "")], tokenizer, eos_ids=[5, EOS], template="{question}")
    assert two[0].token_ids[-1] == 5  # the first of several


def test_any_of_several_ending_tokens_ends_a_turn():
    [example] = encode_demonstrations(
        [Demonstration("one", "two", "")], make_tokenizer(CHAT), eos_ids=[WORDS.index("END"), EOS]
    )
    assert marked(example).endswith("assistant : TWO </S> END")


@pytest.mark.parametrize("template", [None, "Q {question} A"])
def test_a_text_alone_goes_into_no_template(template):
    example = encode("", "one two", make_tokenizer(CHAT, adds_bos=False), template=template)
    assert example.token_ids == ids_of("one two </s>")
    assert example.loss_mask == [False, True, True]
    assert example.prompt_length == 0


def test_demonstrations_of_both_kinds_stay_apart_and_in_order():
    demonstrations = [
        Demonstration("one", "two", "a"),
        Demonstration("", "three", "b"),
        Demonstration("four", "Q", "c"),
    ]
    tokenizer = make_tokenizer(adds_bos=False)
    together = encode_demonstrations(demonstrations, tokenizer, eos_ids=[EOS], template="A {question}")
    alone = [encode(each.prompt, each.completion, tokenizer, template="A {question}") for each in demonstrations]
    assert together == alone
    assert [WORDS[each.token_ids[-2]] for each in together] == ["two", "three", "Q"]
    assert encode_demonstrations([], tokenizer, eos_ids=[EOS], template="A {question}") == []


@pytest.mark.parametrize(
    ("prompt", "completion", "chat_template", "options", "message"),
    [
        ("one", "two", None, {}, r"has no chat template: .* any text with \{question\}"),
        ("one", "two", CHAT, {"template": "Q"}, r"must contain \{question\}"),
        (THOUGHTFUL, "two", CHAT, {"template": "{question}"}, "prompt 0 is a conversation"),
        ("one", "two", "{{ raise_exception('no thanks') }}", {}, "row 7: the chat template rejects .*: no thanks"),
    ],
)
def test_what_cannot_be_encoded(prompt, completion, chat_template, options, message):
    with pytest.raises(ValueError, match=message):
        encode(prompt, completion, make_tokenizer(chat_template), **options)


def test_a_text_without_tokens_for_it_is_shown():
    from grpo_jax.tasks.sums import make_tokenizer

    with pytest.raises(ValueError, match="cannot encode text 0, 'hello'"):
        encode_demonstrations(
            [Demonstration("1+1=", "hello", "")], make_tokenizer(), eos_ids=[1], template="{question}"
        )


# Forms of rows -------------------------------------------------------------------------------------------------------


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "prompt", "completion", "columns"),
    [
        ({"messages": [user("q"), assistant("a")]}, [user("q")], "a", {}),
        ({"messages": [*THOUGHTFUL, assistant("a")], "id": 3}, THOUGHTFUL, "a", {"id": 3}),
        ({"prompt": "q", "completion": "a", "level": 1}, "q", "a", {"level": 1}),
        ({"prompt": "q", "completion": "a", "text": "t"}, "q", "a", {"text": "t"}),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, [user("q")], "a", {}),
        ({"prompt": [user("q")], "completion": "a"}, [user("q")], "a", {}),
        ({"prompt": "q", "completion": [assistant("a")]}, [user("q")], "a", {}),
        (
            {"prompt": [user("q")], "completion": [assistant("a"), user("r"), assistant("b")]},
            [user("q"), assistant("a"), user("r")],
            "b",
            {},
        ),
        ({"text": "t", "id": 3}, "", "t", {"id": 3}),
    ],
)
def test_the_forms_that_trl_knows(tmp_path, row, prompt, completion, columns):
    path = write_rows(tmp_path / "a.jsonl", row, row)
    wheres = [f"{path}:1", f"{path}:2"]
    assert load_demonstrations(path) == [Demonstration(prompt, completion, where, columns) for where in wheres]


@pytest.mark.parametrize(
    ("options", "prompt", "completion", "columns"),
    [
        ({"prompt_column": "q", "completion_column": "a"}, "Q", "A", {"messages": 1, "completion": "c"}),
        ({"prompt_column": "q"}, "Q", "c", {"a": "A", "messages": 1}),
        ({"completion_column": "a"}, "", "A", {"q": "Q", "messages": 1, "completion": "c"}),
    ],
)
def test_named_columns(tmp_path, options, prompt, completion, columns):
    path = write_rows(tmp_path / "a.jsonl", {"q": "Q", "a": "A", "messages": 1, "completion": "c"})
    assert load_demonstrations(path, **options) == [Demonstration(prompt, completion, f"{path}:1", columns)]


def test_a_folder_has_splits_and_parquet_is_read(tmp_path):
    rows = [{"messages": [user("q"), assistant("a")], "id": 1}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    write_rows(tmp_path / "train.jsonl", {"text": "t"})
    [demonstration] = load_demonstrations(str(tmp_path), split="test")
    assert (demonstration.prompt, demonstration.completion, demonstration.columns) == ([user("q")], "a", {"id": 1})
    assert load_demonstrations(str(tmp_path))[0].completion == "t"


@pytest.mark.parametrize(
    ("row", "options", "error", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            {},
            KeyError,
            r"a\.jsonl:2 has no column 'completion'.*\['question', 'answer'\]",
        ),
        ({"prompt": "q", "answer": "a"}, {}, KeyError, r"a\.jsonl:2 has no column 'completion'.*completion_column"),
        ({"prompt": "q", "completion": "a"}, {"completion_column": "c"}, KeyError, r"a\.jsonl:2 has no column 'c'"),
        ({"prompt": "q", "completion": "a"}, {"prompt_column": "p"}, KeyError, r"a\.jsonl:2 has no column 'p'"),
        ({"messages": [assistant("a")]}, {}, ValueError, r"a\.jsonl:2, column 'messages': .*at least two messages"),
        ({"messages": "hi"}, {}, ValueError, r"a\.jsonl:2, column 'messages': .*at least two messages"),
        ({"messages": [user("q"), {"role": "assistant"}]}, {}, ValueError, r"a\.jsonl:2, .*role and content"),
        (
            {"messages": [assistant("q"), user("a")]},
            {},
            ValueError,
            r"a\.jsonl:2: the last message has the role 'user'",
        ),
        (
            {"prompt": "q", "completion": [user("a")]},
            {},
            ValueError,
            r"a\.jsonl:2: the last message has the role 'user'",
        ),
        ({"messages": [user("q"), {**assistant("a"), "weight": 0}]}, {}, ValueError, "last message has weight 0"),
        (
            {"messages": [user("q"), {**assistant("a"), "weight": 0.5}]},
            {},
            ValueError,
            "message 1: weight must be 0 or",
        ),
        ({"prompt": " ", "completion": "a"}, {}, ValueError, r"a\.jsonl:2, column 'prompt' must be text"),
        ({"prompt": "q", "completion": ""}, {}, ValueError, r"a\.jsonl:2, column 'completion' must be text"),
        ({"prompt": "q", "completion": []}, {}, ValueError, r"a\.jsonl:2, column 'completion' must be text"),
        ({"prompt": "q", "completion": 4}, {}, ValueError, r"a\.jsonl:2, column 'completion' must be text"),
        ({"text": "\n"}, {}, ValueError, r"a\.jsonl:2, column 'text' must be text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, options, error, message):
    good = {"c": "a", "p": "q", "prompt": "q", "completion": "a"}
    with pytest.raises(error, match=message):
        load_demonstrations(write_rows(tmp_path / "a.jsonl", good, row), **options)


def test_a_source_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty: it has no demonstrations"):
        load_demonstrations(write_rows(tmp_path / "a.jsonl"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_demonstrations(str(tmp_path / "b.jsonl"))


def test_t13_a_chat_template_that_writes_no_ending_token_is_refused():
    """The model would never learn to end a turn."""
    endless = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    with pytest.raises(ValueError, match=r"row 7: the chat template writes none of the ending tokens \[2\]"):
        encode("one", "two", make_tokenizer(endless))


def test_a_text_alone_begins_as_the_tokenizer_begins_it():
    (example,) = encode_demonstrations([Demonstration("", "one two", "")], make_tokenizer(), eos_ids=[EOS])
    assert example.token_ids == ids_of("<s> one two </s>")
    assert example.loss_mask == [False, True, True, True]


def test_a_system_prompt_has_no_place_in_a_plain_template():
    with pytest.raises(ValueError, match="row 7: system_prompt cannot be used with a plain template"):
        encode("one", "two", make_tokenizer(), template="{question}", system_prompt="A")


def test_a_text_of_one_token_teaches_nothing():
    with pytest.raises(ValueError, match="row 7 has only one token"):
        encode("", "</s>", make_tokenizer(adds_bos=False))

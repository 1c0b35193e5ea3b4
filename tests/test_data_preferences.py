"""Preferences: loading rows, tokenization, and the order of batches."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_jax.data.preferences import EncodedPreferences, PairBatches, Preference, load_preferences
from grpo_jax.data.prompts import encode_prompts

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    *["user", "system", "assistant", ":", "one", "two", "three", "four", "Q", "A"],
]
CHAT = "{{ bos_token + ' ' }}{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)
BOS, EOS, EMPTY = 1, 2, 0


def make_tokenizer(template=None):
    """Words between blanks, and a beginning."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", BOS)])
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


def write_rows(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# Forms of rows -------------------------------------------------------------------------------------------------------

BEFORE = [user("q"), assistant("a"), user("r")]


@pytest.mark.parametrize(
    ("row", "prompt", "margin", "columns"),
    [
        ({"prompt": "q"}, "q", None, {}),
        ({"prompt": "q", "margin": 2, "id": 3}, "q", 2.0, {"id": 3}),
        ({"prompt": "q", "margin": None}, "q", None, {}),
        ({"prompt": BEFORE}, BEFORE, None, {}),
    ],
)
@pytest.mark.parametrize("as_messages", [False, True])
def test_a_prompt_and_two_replies(tmp_path, row, prompt, margin, columns, as_messages):
    replies = {"chosen": "good", "rejected": "bad"}
    if as_messages:
        replies = {name: [assistant(text)] for name, text in replies.items()}
    path = write_rows(tmp_path / "a.jsonl", {**row, **replies})
    assert load_preferences(path) == [Preference(prompt, "good", "bad", f"{path}:1", margin, columns)]


@pytest.mark.parametrize("before", [[user("q")], BEFORE])
def test_two_whole_conversations(tmp_path, before):
    row = {"chosen": [*before, assistant("good")], "rejected": [*before, assistant("bad")], "margin": -0.5, "id": 3}
    path = write_rows(tmp_path / "a.jsonl", row)
    assert load_preferences(path) == [Preference(before, "good", "bad", f"{path}:1", -0.5, {"id": 3})]


def test_rows_keep_their_order_and_splits_are_found(tmp_path):
    rows = [{"prompt": "q", "chosen": f"{n}", "rejected": "x"} for n in range(3)]
    write_rows(tmp_path / "test.jsonl", *rows)
    assert [each.chosen for each in load_preferences(str(tmp_path), split="test")] == ["0", "1", "2"]


PAIR = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, KeyError, r"a\.jsonl:2 has no column 'rejected'.*\['prompt', 'chosen'\]"),
        ({"prompt": "q", "rejected": "a"}, KeyError, r"a\.jsonl:2 has no column 'chosen'"),
        ({"prompt": "", **PAIR}, ValueError, r"a\.jsonl:2, column 'prompt' must be text"),
        ({"prompt": "q", **PAIR, "chosen": " "}, ValueError, r"a\.jsonl:2, column 'chosen' must be text"),
        ({"prompt": "q", **PAIR, "rejected": None}, ValueError, r"a\.jsonl:2, column 'rejected' must be text"),
        ({"prompt": "q", **PAIR, "chosen": []}, ValueError, r"column 'chosen' must be .*a single assistant message"),
        ({"prompt": "q", **PAIR, "chosen": [user("a")]}, ValueError, r"column 'chosen' must be .*a single assistant"),
        (
            {"prompt": "q", **PAIR, "rejected": [assistant("a"), assistant("b")]},
            ValueError,
            r"a\.jsonl:2, column 'rejected' must be text or a single assistant message",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ValueError, r"a\.jsonl:2: the chosen .* are equal: 'a'"),
        (
            {"prompt": "q", "chosen": "a", "rejected": [assistant("a")]},
            ValueError,
            r"a\.jsonl:2: the chosen and the rejected completion are equal",
        ),
        ({"prompt": "q", **PAIR, "margin": "2"}, ValueError, r"a\.jsonl:2, column 'margin': it must be a number"),
        ({"prompt": "q", **PAIR, "margin": True}, ValueError, "column 'margin': it must be a number; it is True"),
        ({"prompt": "q", **PAIR, "margin": float("nan")}, ValueError, "column 'margin': it must be a number"),
        (PAIR, KeyError, r"a\.jsonl:2: chosen and rejected are texts without a prompt"),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [assistant("b")]},
            ValueError,
            r"a\.jsonl:2, column 'rejected': without a column 'prompt'",
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), user("b")]},
            ValueError,
            r"a\.jsonl:2, column 'rejected': the last message has the role 'user'",
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
            ValueError,
            r"a\.jsonl:2: the two conversations differ before the last turn",
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, error, message):
    path = write_rows(tmp_path / "a.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, row)
    with pytest.raises(error, match=message):
        load_preferences(path)


def test_a_source_without_rows(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl is empty: it has no preferences"):
        load_preferences(write_rows(tmp_path / "a.jsonl"))


# Tokens --------------------------------------------------------------------------------------------------------------


def preference(prompt, chosen, rejected, margin=None):
    return Preference(prompt, chosen, rejected, "row 7", margin)


SOME = [
    preference("one", "two", "three four", 0.5),
    preference("one two three four", "two", "three", 1.0),
    preference("two three", "one two three four", "Q", 1.5),
    preference("two three", "A", "Q", -2.0),
]


def encoded(preferences, tokenizer=None, **options):
    options = {"max_prompt_length": 8, "max_completion_length": 5, "template": "{question}"} | options
    return EncodedPreferences(preferences, tokenizer or make_tokenizer(), eos_ids=[EOS], pad_id=EMPTY, **options)


def test_the_chosen_completion_comes_first_and_each_ends():
    pairs = encoded(SOME).padded([2, 0])
    np.testing.assert_array_equal(pairs.prompt_ids, [[0] * 5 + ids_of("<s> two three"), [0] * 6 + ids_of("<s> one")])
    np.testing.assert_array_equal(pairs.prompt_mask, np.asarray(pairs.prompt_ids) > 0)
    np.testing.assert_array_equal(
        pairs.completion_ids,
        [
            [ids_of("one two three four </s>"), ids_of("Q </s>") + [0] * 3],
            [ids_of("two </s>") + [0] * 3, ids_of("three four </s>") + [0] * 2],
        ],
    )
    np.testing.assert_array_equal(pairs.completion_mask, np.asarray(pairs.completion_ids) > 0)
    np.testing.assert_array_equal(pairs.margins, [1.5, 0.5])
    assert pairs.ref_log_probs is None


def test_padding_is_told_by_length_and_not_by_the_pad_id():
    pairs = EncodedPreferences(
        [preference("one", "two", "three four")],
        make_tokenizer(),
        eos_ids=[EOS],
        pad_id=EOS,
        max_prompt_length=3,
        max_completion_length=4,
        template="{question}",
    ).padded([0])
    np.testing.assert_array_equal(pairs.completion_ids[0, 0], [*ids_of("two"), EOS, EOS, EOS])
    np.testing.assert_array_equal(pairs.completion_mask[0], [[True, True, False, False], [True, True, True, False]])
    np.testing.assert_array_equal(pairs.prompt_mask, [[False, True, True]])


@pytest.mark.parametrize("prompt", ["one", [user("one"), assistant("two"), user("three")]])
@pytest.mark.parametrize("system_prompt", [None, "A"])
def test_a_chat_is_what_the_sampler_is_given(prompt, system_prompt):
    tokenizer = make_tokenizer(CHAT)
    rendering = {"template": None, "system_prompt": system_prompt}
    pairs = encoded([preference(prompt, "four", "Q A")], tokenizer, max_prompt_length=24, **rendering).padded([0])
    [expected] = encode_prompts([prompt], tokenizer, system_prompt=system_prompt)
    assert pairs.prompt_ids[0][pairs.prompt_mask[0]].tolist() == expected
    assert expected.count(BOS) == 1
    assert pairs.completion_ids[pairs.completion_mask].tolist() == ids_of("four </s> Q A </s>")


def test_margins_are_there_where_every_pair_has_one():
    assert encoded([SOME[0], preference("one", "two", "three")]).padded([0]).margins is None
    assert encoded([preference("one", "two", "three", 0.0)]).padded([0]).margins.tolist() == [0]


def test_pairs_that_do_not_fit_are_left_out_and_counted():
    assert encoded(SOME).dropped == 0
    prompts = encoded(SOME, max_prompt_length=3)
    assert (prompts.dropped, prompts.preferences, len(prompts)) == (1, [SOME[0], *SOME[2:]], 3)
    completions = encoded(SOME, max_completion_length=4)
    assert (completions.dropped, completions.preferences) == (1, [*SOME[:2], SOME[3]])
    assert encoded([preference("one", "Q", "one two three four"), SOME[3]], max_completion_length=4).dropped == 1
    left = completions.padded([2])  # positions are those of what is left
    assert left.prompt_ids[left.prompt_mask].tolist() == ids_of("<s> two three")
    assert left.completion_ids[left.completion_mask].tolist() == ids_of("A </s> Q </s>")
    assert left.margins.tolist() == [-2.0]


def test_no_pair_fits():
    with pytest.raises(ValueError, match="none of 4 pairs fits into 1 tokens of prompt and 5 of completion"):
        encoded(SOME, max_prompt_length=1)


@pytest.mark.parametrize(
    ("each", "options", "message"),
    [
        (preference([user("one")], "two", "three"), {}, "prompt 0 is a conversation"),
        (preference("one", "two", "three"), {"template": None}, "has no chat template"),
    ],
)
def test_what_cannot_be_encoded(each, options, message):
    with pytest.raises(ValueError, match=message):
        encoded([each], **options)


# Batches -------------------------------------------------------------------------------------------------------------


def many(count):
    words = WORDS[8:]
    return [preference(words[n % len(words)], "one", "two", float(n)) for n in range(count)]


def margins(batches, steps):
    return [batches[step].margins.tolist() for step in steps]


def test_each_epoch_visits_every_pair_once_but_for_those_that_fill_no_batch():
    batches = PairBatches(encoded(many(11)), num_pairs=3, num_epochs=4)
    assert len(batches) == 12
    epochs = [margins(batches, range(start, start + 3)) for start in range(0, 12, 3)]
    for epoch in epochs:
        visited = [margin for batch in epoch for margin in batch]
        assert len(set(visited)) == len(visited) == 9
    assert len({str(epoch) for epoch in epochs}) == 4
    assert {margin for epoch in epochs for batch in epoch for margin in batch} == set(range(11))
    assert sorted(
        margin for batch in margins(PairBatches(encoded(many(6)), num_pairs=2), range(3)) for margin in batch
    ) == (list(range(6)))


def test_a_batch_follows_from_seed_and_step_alone():
    pairs = encoded(many(11))
    one, same, other = (PairBatches(pairs, num_pairs=3, num_epochs=2, seed=seed) for seed in (0, 0, 1))
    backwards = margins(same, range(5, -1, -1))[::-1]
    assert backwards == margins(one, range(6))
    assert margins(PairBatches(pairs, num_pairs=3), range(3)) == backwards[:3]
    assert margins(other, range(6)) != backwards
    assert [one.positions(step).tolist() for step in range(6)] == backwards
    with pytest.raises(IndexError):
        one[6]


def test_the_digest_tells_pairs_apart():
    def digest(preferences, **options):
        return PairBatches(encoded(preferences), num_pairs=1, **options).digest

    assert digest(SOME) == digest(list(SOME)) == digest(SOME, seed=1)
    assert (
        len({digest(each) for each in (SOME, SOME[1:], SOME[::-1], [preference("one", "three", "two"), *SOME[1:]])})
        == 4
    )


@pytest.mark.parametrize("options", [{"num_pairs": 5}, {"num_pairs": 0}, {"num_pairs": 2, "num_epochs": 0}])
def test_batches_that_cannot_be_drawn(options):
    with pytest.raises(ValueError, match=rf"num_pairs is {options['num_pairs']} .*; with 4 pairs"):
        PairBatches(encoded(SOME), **options)


def test_what_a_chat_template_writes_after_the_ending_token_is_no_part_of_a_completion():
    """Or a reward model would read its score at a token that is never drawn."""
    tail = CHAT.replace("</s> '", "</s> Q '")
    pairs = EncodedPreferences(
        [Preference("one", "two", "three four", "row 1")],
        make_tokenizer(tail),
        eos_ids=[2],
        pad_id=0,
        max_prompt_length=8,
        max_completion_length=4,
    ).padded([0])
    lengths = np.asarray(pairs.completion_mask).sum(2)
    assert lengths.tolist() == [[2, 3]]
    assert np.asarray(pairs.completion_ids)[0, 0, 1] == np.asarray(pairs.completion_ids)[0, 1, 2] == 2

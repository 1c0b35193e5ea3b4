"""What is learnt from where nothing is drawn: divided, rendered and cut as the settings say."""

import json
import re

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given
from hypothesis import strategies as st

from grpo_jax.config.offline import DemonstrationConfig, OfflineDataConfig, PreferenceConfig
from grpo_jax.data.conversations import Demonstration
from grpo_jax.data.prompts import R1_ZERO, encode_prompts
from grpo_jax.loop.offline_data import (
    encode_demonstration_set,
    load_demonstration_sets,
    load_preference_sets,
)
from grpo_jax.models import Pretrained, from_hf_config
from grpo_jax.tasks.demonstrations import errand_preferences, worked_sums
from grpo_jax.tasks.errands import Errand
from grpo_jax.tasks.splits import hold_out
from grpo_jax.tasks.sums import PLAIN, Sum, make_tokenizer
from grpo_jax.tasks.toy_config import MAX_COMPLETION_LENGTH, MAX_PROMPT_LENGTH
from tests.runs import encode_preferences

BARE = {"template": PLAIN}


@pytest.fixture(scope="module")
def policy(tiny):
    model, params = tiny
    tokenizer = make_tokenizer()
    return Pretrained(model, params, from_hf_config(TINY), TINY, None, tokenizer, (tokenizer.eos_token_id,), 0)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def demonstration_rows(numbers):
    return [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in numbers]


def preference_rows(numbers):
    return [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0", "n": n} for n in numbers]


def load(settings, seed):
    is_preferences = isinstance(settings, PreferenceConfig)
    return (load_preference_sets if is_preferences else load_demonstration_sets)(settings, seed)


def encode(settings, *args, **kwargs):
    is_preferences = isinstance(settings, PreferenceConfig)
    if is_preferences:
        return encode_preferences(*args, **kwargs)
    return encode_demonstration_set(settings, *args, **kwargs)


BOTH = [(DemonstrationConfig, demonstration_rows), (PreferenceConfig, preference_rows)]


def prompts(rows):
    return {row.prompt for row in rows}


# Held out ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 30), min_size=10, max_size=80), st.integers(1, 8))
def test_held_out_rows_share_no_key_with_those_that_are_learnt(keys, most):
    rows = list(enumerate([*range(10), *keys]))
    learnt, held_out = hold_out(rows, most, key=lambda row: str(row[1]), source="some")
    assert not {key for _, key in learnt} & {key for _, key in held_out}
    count = len({key for _, key in rows})
    assert 1 <= len(held_out) <= most
    assert len({key for _, key in held_out}) <= count // 10
    assert set(learnt) | set(held_out) <= set(rows)
    assert len({key for _, key in learnt}) == count - min(most, count // 10)
    assert (learnt, held_out) == (sorted(learnt), sorted(held_out))


def test_rows_with_unique_keys_are_divided_into_nine_tenths_and_one():
    rows = [str(n) for n in range(105)]
    learnt, held_out = hold_out(rows, 1000, key=str, source="some")
    assert (len(learnt), len(held_out)) == (95, 10)
    assert sorted(learnt + held_out) == sorted(rows)
    assert held_out != rows[:10]  # a sample: many files are sorted
    assert hold_out(rows, 1000, key=str, source="some") == (learnt, held_out)
    assert len(hold_out(rows, 3, key=str, source="some")[1]) == 3


def test_too_few_keys_to_hold_some_out():
    with pytest.raises(ValueError, match=r"some has 9 problems, too few .* eval_dataset"):
        hold_out([str(n % 9) for n in range(100)], 5, key=str, source="some")


@pytest.mark.parametrize(("settings", "rows"), BOTH)
def test_a_single_file_is_divided_and_duplicates_of_a_prompt_stay_together(tmp_path, settings, rows):
    path = write_rows(tmp_path / "a.jsonl", rows([*range(40), *range(40)]))
    learnt, held_out = load(settings(dataset=path), 0)
    assert (len(learnt), len(held_out)) == (72, 8)
    assert not prompts(learnt) & prompts(held_out)
    assert load(settings(dataset=path), 1) == (learnt, held_out)  # runs with other seeds are compared on the same rows
    assert len(load(settings(dataset=path, eval_size=3), 0)[1]) == 3


@pytest.mark.parametrize(("settings", "rows"), BOTH)
def test_a_folder_is_divided_too_and_the_split_can_be_named(tmp_path, settings, rows):
    write_rows(tmp_path / "train.jsonl", rows(range(20)))
    write_rows(tmp_path / "test.jsonl", rows(range(12, 32)))
    learnt, held_out = load(settings(dataset=str(tmp_path)), 0)
    assert prompts(learnt) | prompts(held_out) == {f"{n}+1=" for n in range(20)}
    learnt, held_out = load(settings(dataset=str(tmp_path), eval_split="test"), 0)
    assert prompts(learnt) == {f"{n}+1=" for n in range(20)}
    assert prompts(held_out) == {f"{n}+1=" for n in range(20, 32)}
    learnt, held_out = load(settings(dataset=str(tmp_path), split="test", eval_split="train"), 0)
    assert prompts(learnt) == {f"{n}+1=" for n in range(12, 32)}
    assert prompts(held_out) == {f"{n}+1=" for n in range(12)}


@pytest.mark.parametrize(("settings", "rows"), BOTH)
def test_held_out_rows_may_come_from_elsewhere(tmp_path, settings, rows):
    path = write_rows(tmp_path / "a.jsonl", rows(range(20)))
    other = write_rows(tmp_path / "b.jsonl", rows([*range(15, 45)]))
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "test.jsonl", rows(range(15, 45)))
    for source in (other, str(tmp_path / "folder")):
        learnt, held_out = load(settings(dataset=path, eval_dataset=source, eval_size=10), 0)
        assert len(learnt) == 20
        assert len(held_out) == 10
        assert prompts(held_out) < {f"{n}+1=" for n in range(20, 45)}
        assert prompts(held_out) != {f"{n}+1=" for n in range(20, 30)}  # a sample
    with pytest.raises(ValueError, match=r"every held-out row of .*a\.jsonl is also trained on"):
        load(settings(dataset=other, eval_dataset=write_rows(tmp_path / "a.jsonl", rows(range(15, 20)))), 0)


def test_conversations_with_the_same_messages_are_one_prompt(tmp_path):
    prompt = [{"role": "user", "content": "q"}]
    rows = [
        {
            "chosen": [*prompt, {"role": "assistant", "content": f"{n}"}],
            "rejected": [*prompt, {"role": "assistant", "content": "x"}],
        }
        for n in range(30)
    ]
    with pytest.raises(ValueError, match="has 1 problems, too few"):
        load(PreferenceConfig(dataset=write_rows(tmp_path / "a.jsonl", rows)), 0)


def test_texts_without_a_prompt_are_told_apart_by_themselves(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"{n % 20}"} for n in range(60)])
    learnt, held_out = load(DemonstrationConfig(dataset=path), 0)
    assert (len(learnt), len(held_out)) == (54, 6)
    assert not {row.completion for row in learnt} & {row.completion for row in held_out}


def test_columns_can_be_named(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"q": f"{n}", "a": "1"} for n in range(20)])
    learnt, held_out = load(DemonstrationConfig(dataset=path, prompt_column="q", completion_column="a"), 0)
    assert prompts(learnt) | prompts(held_out) == {f"{n}" for n in range(20)}
    assert {row.completion for row in learnt} == {"1"}


# Toy data sets -------------------------------------------------------------------------------------------------------


def test_demonstrations_of_sums(policy):
    settings = DemonstrationConfig(dataset="sums", num_generated=40, eval_size=12)
    learnt, held_out = load(settings, 0)
    assert (len(learnt), len(held_out)) == (40, 12)
    for rows, is_held_out in ((learnt, False), (held_out, True)):
        for row in rows:
            terms = Sum(tuple(map(int, row.prompt.removesuffix("=").split("+"))))
            assert terms.held_out == is_held_out
            assert row.completion.endswith(f"</think><answer>{terms.answer}</answer>")
            assert row.columns == {"answer": terms.answer}
    assert load(settings, 1)[0] != learnt
    assert load(settings, 1)[1] == held_out
    examples, too_long = encode(
        settings, learnt, policy, max_length=MAX_PROMPT_LENGTH + MAX_COMPLETION_LENGTH, rendering=BARE
    )
    assert (len(examples), too_long) == (40, 0)
    assert worked_sums(np.random.default_rng(0), 40, held_out=False) == learnt


def test_preferences_of_errands(policy):
    settings = PreferenceConfig(dataset="errands", num_generated=60, eval_size=12)
    learnt, held_out = load(settings, 0)
    assert (len(learnt), len(held_out)) == (60, 12)
    for rows, is_held_out in ((learnt, False), (held_out, True)):
        errands = [Errand(row.prompt.removeprefix("?")) for row in rows]
        assert [each.held_out for each in errands] == [is_held_out] * len(rows)
        better = [
            each.quality(row.chosen) > each.quality(row.rejected) for each, row in zip(errands, rows, strict=True)
        ]
        assert np.mean(better) > 0.75
    assert load(settings, 1)[0] != learnt
    assert load(settings, 1)[1] == held_out
    limits = {"max_prompt_length": MAX_PROMPT_LENGTH, "max_completion_length": MAX_COMPLETION_LENGTH}
    pairs = encode(settings, learnt, policy, rendering=BARE, **limits)
    assert (len(pairs), pairs.dropped) == (60, 0)
    assert errand_preferences(np.random.default_rng(0), 60, held_out=False) == learnt
    batch = pairs.padded([0])
    assert policy.tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]]) == learnt[0].prompt
    assert policy.tokenizer.decode(batch.completion_ids[0, 1][batch.completion_mask[0, 1]]) == (
        f"{learnt[0].rejected}<eos>"
    )


def test_demonstrations_of_sums_in_chinese():
    learnt, held_out = load(DemonstrationConfig(dataset="sums-chinese", num_generated=40, eval_size=12), 0)
    assert (len(learnt), len(held_out)) == (40, 12)
    thoughts = [row.completion.partition("</think>")[0] for row in learnt + held_out]
    assert not any(re.search("[0-9]", thought) for thought in thoughts)
    arabic, _ = load(DemonstrationConfig(dataset="sums", num_generated=40), 0)
    assert [row.columns for row in learnt] == [row.columns for row in arabic]  # of the same sums


@pytest.mark.parametrize("settings", [DemonstrationConfig, PreferenceConfig])
def test_no_dataset_is_the_default(settings):
    with pytest.raises(ValueError, match="dataset: no dataset is named; pass --dataset, or choose a preset"):
        load(settings(), 0)


def test_a_toy_data_set_of_the_other_kind_is_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings, name in ((DemonstrationConfig, "errands"), (PreferenceConfig, "sums")):
        with pytest.raises((ValueError, OSError), match=name):
            load(settings(dataset=name), 0)


# Rendering and length ------------------------------------------------------------------------------------------------


def test_the_template_in_effect():
    tokenizer, today = make_tokenizer(), "2026-11-27"
    assert OfflineDataConfig().rendering({"kind": "plain", "template": PLAIN}, tokenizer, today=today) == BARE
    assert OfflineDataConfig().rendering(None, tokenizer, today=today) == {"template": R1_ZERO}
    own = OfflineDataConfig(template="1+{question}")
    chat = OfflineDataConfig(chat_template=True, system_prompt="be brief")
    for trained in (None, {"kind": "plain", "template": PLAIN}, {"kind": "chat"}):
        assert own.rendering(trained, tokenizer, today=today) == {"template": "1+{question}"}
        found = chat.rendering(trained, tokenizer, today=today)
        assert found == {"template": None, "system_prompt": "be brief", "template_kwargs": {}, "date": None}


def demonstrations(*completions):
    return [Demonstration("1+1=", text, f"row {n}") for n, text in enumerate(completions)]


def test_the_template_of_the_settings_is_what_is_encoded(policy):
    settings = DemonstrationConfig(template="2+{question}", train_on="all")
    own = settings.rendering(policy.prompt_format, policy.tokenizer, today="2026-11-27")
    [example], _ = encode(settings, demonstrations("2"), policy, max_length=20, rendering=own)
    [prompt] = encode_prompts(["1+1="], policy.tokenizer, template="2+{question}")
    assert example.token_ids == [*prompt, *policy.tokenizer("2")["input_ids"], policy.eos_ids[0]]
    assert example.loss_mask == [False] + [True] * 7
    with pytest.raises(ValueError, match="has no chat template"):
        encode(settings, demonstrations("2"), policy, max_length=20, rendering={"template": None})
    pair = errand_preferences(np.random.default_rng(0), 1, held_out=False)
    limits = {"max_prompt_length": 20, "max_completion_length": 20}
    pairs = encode(PreferenceConfig(), pair, policy, rendering={"template": "2{question}"}, **limits).padded([0])
    assert policy.tokenizer.decode(pairs.prompt_ids[0][pairs.prompt_mask[0]]) == f"2{pair[0].prompt}"


def encode_long(policy, long, *completions, max_length=7):
    settings = DemonstrationConfig(long=long)
    return encode(settings, demonstrations(*completions), policy, max_length=max_length, rendering=BARE)


def test_what_is_too_long_is_dropped_cut_or_an_error(policy):
    short, exact, long = "2", "22", "222"
    kept, dropped = encode_long(policy, "drop", short, long, exact)
    assert [len(each.token_ids) for each in kept] == [6, 7]
    assert dropped == 1
    cut, dropped = encode_long(policy, "truncate", short, long, exact)
    assert [len(each.token_ids) for each in cut] == [len(each.loss_mask) for each in cut] == [6, 7, 7]
    assert dropped == 0
    assert cut[1].token_ids[-1] != policy.eos_ids[0]  # cut at its end
    assert cut[2].token_ids[-1] == policy.eos_ids[0]
    assert cut[1].loss_mask == [False] * 4 + [True] * 3
    assert encode_long(policy, "error", short, exact)[1] == 0
    with pytest.raises(ValueError, match=r"1 of 3 demonstrations do not fit into max_length = 7 .* longest has 8"):
        encode_long(policy, "error", short, long, exact)


def test_a_demonstration_of_whose_completion_nothing_is_left_is_left_out(policy):
    rows = [*demonstrations("2"), Demonstration("1+1+1+1=", "4", "row 1")]
    examples, dropped = encode(DemonstrationConfig(long="truncate"), rows, policy, max_length=8, rendering=BARE)
    assert (len(examples), dropped) == (1, 1)


@pytest.mark.parametrize(("long", "max_length"), [("drop", 5), ("truncate", 4), ("error", 5)])
def test_no_demonstration_fits(policy, long, max_length):
    with pytest.raises(ValueError, match=rf"1 of 1 demonstrations do not fit into max_length = {max_length}"):
        encode_long(policy, long, "2", max_length=max_length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_size": 0}, "eval_size is 0; it must be at least 1"),
        ({"num_generated": 0}, "num_generated is 0; it must be at least 1"),
        ({"chat_template": True, "template": "{question}"}, "both set"),
        ({"template": "no place"}, r"must contain \{question\}"),
        ({"system_prompt": "be brief", "template": "{question}"}, "system_prompt needs chat_template"),
        ({"template_kwargs": ("a=1",), "template": "{question}"}, "template_kwargs needs chat_template"),
        ({"template_kwargs": ("thinking",)}, "template_kwargs: 'thinking' is neither name=value nor a JSON object"),
        ({"template_kwargs": ('{"a": 1',)}, "template_kwargs: .* is not JSON"),
        ({"template_kwargs": ("messages=[]",)}, r"template_kwargs: \['messages'\] cannot be set here"),
        ({"template_date": "yesterday"}, "template_date is 'yesterday'; it must be a date such as 2026-11-27"),
    ],
)
@pytest.mark.parametrize("settings", [DemonstrationConfig, PreferenceConfig])
def test_settings_that_contradict(settings, options, message):
    with pytest.raises(ValueError, match=message):
        settings(**options)

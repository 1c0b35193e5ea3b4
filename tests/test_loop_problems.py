"""The shared parts of experiments' configurations, and what they build."""

import json

import pytest

from grpo_jax.config.data import DataConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.data.problems import reward_columns
from grpo_jax.data.statistics import DataStatistics, prompt_key
from grpo_jax.loop.problems import encode_problems, load_evaluation_problems, load_problem_sets, same_answers_of
from grpo_jax.rewards.code.reward import code_reward
from grpo_jax.rewards.math.answer import answer_reward, same_text
from grpo_jax.rewards.math.compare import same_answers
from grpo_jax.rewards.math.reward import math_reward
from grpo_jax.tasks.splits import key_of
from grpo_jax.tasks.sums import make_tokenizer


def write_problems(path, count, start=0):
    return write_rows(path, [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(start, start + count)])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def prompts(problems):
    return {problem.prompt for problem in problems}


def test_sums_are_held_out_whatever_the_seed():
    held_out = [prompts(load_problem_sets(DataConfig(dataset="sums", eval_size=64), seed)[1]) for seed in (0, 1)]
    assert held_out[0] == held_out[1]  # runs with different seeds are compared on the same problems
    for seed in (0, 1):
        assert not prompts(load_problem_sets(DataConfig(dataset="sums"), seed)[0]) & held_out[0]
    assert len(held_out[0]) == 64


def test_a_single_file_is_divided(tmp_path):
    path = write_problems(tmp_path / "train.jsonl", 50)
    problems, held_out, reward, _ = load_problem_sets(DataConfig(dataset=path), 0)
    assert (len(problems), len(held_out)) == (45, 5)
    assert not prompts(problems) & prompts(held_out)
    assert prompts(load_problem_sets(DataConfig(dataset=path), 1)[1]) == prompts(held_out)
    assert reward(["0+1="], ["<answer>1</answer>"], answer=["1"]) == [1.0]
    assert len(load_problem_sets(DataConfig(dataset=path, eval_size=2), 0)[1]) == 2


def test_a_folder_has_its_splits_and_shared_problems_are_not_held_out(tmp_path):
    write_problems(tmp_path / "train.jsonl", 10)
    write_problems(tmp_path / "test.jsonl", 10, start=6)
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=str(tmp_path)), 0)
    assert len(problems) == 10
    assert prompts(held_out) == {f"{i}+1=" for i in range(10, 16)}


def test_held_out_problems_may_come_from_elsewhere(tmp_path):
    train = write_problems(tmp_path / "train.jsonl", 10)
    other = write_problems(tmp_path / "other.jsonl", 10, start=100)
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=train, eval_dataset=other), 0)
    assert (len(problems), len(held_out)) == (10, 10)


@pytest.mark.parametrize("count", [3, 9])
def test_nothing_left_to_hold_out(tmp_path, count):
    path = write_problems(tmp_path / "train.jsonl", count)
    with pytest.raises(ValueError, match="set eval_dataset or eval_split"):
        load_problem_sets(DataConfig(dataset=path), 0)


def test_reasoning_gym_brings_its_own_reward():
    pytest.importorskip("reasoning_gym")
    problems, held_out, reward, _ = load_problem_sets(DataConfig(dataset="reasoning-gym:chain_sum", eval_size=5), 0)
    assert len(held_out) == 5
    assert not prompts(problems) & prompts(held_out)
    columns = {"entry": [held_out[0].columns["entry"]], "answer": [held_out[0].answer]}
    assert reward(["?"], [f"<answer>{held_out[0].answer}</answer>"], **columns) == [1.0]


def test_templates():
    tokenizer = make_tokenizer()
    problems, _, _, _ = load_problem_sets(DataConfig(dataset="sums"), 0)
    encode = {"pad_id": 0, "max_prompt_length": 20}
    encoded = encode_problems(DataConfig(), problems[:1], tokenizer, rendering={"template": "1+{question}"}, **encode)
    assert encoded.texts == [f"1+{problems[0].prompt}"]
    with pytest.raises(ValueError, match="chat template"):
        encode_problems(DataConfig(), problems[:1], tokenizer, rendering={"template": None}, **encode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_size": 0}, "eval_size is 0"),
        ({"chat_template": True, "template": "{question}"}, "both set"),
    ],
)
def test_settings_that_contradict(options, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**options)


def test_mesh_and_optimizer_are_built():
    sizes = {"data": 2, "fsdp": 2, "expert": 1, "context": 1, "tensor": 2}
    assert dict(MeshConfig(data=2, fsdp=2, tensor=2).build().shape) == sizes
    _, schedule = OptimizerConfig(learning_rate=0.5, decay="linear").build(total_updates=3)
    assert float(schedule(3)) == 0.5  # a run shorter than the warm-up still reaches its peak
    _, schedule = OptimizerConfig(learning_rate=0.25, decay="constant").build(total_updates=9)
    assert float(schedule(9)) == 0.25


def test_held_out_problems_are_a_sample_and_graded_by_their_own_verifier(tmp_path):
    pytest.importorskip("reasoning_gym")
    train = write_problems(tmp_path / "train.jsonl", 10)
    other = write_problems(tmp_path / "other.jsonl", 40, start=100)
    held_out = load_problem_sets(DataConfig(dataset=train, eval_dataset=other, eval_size=10), 0)[1]
    first = {f"{i}+1=" for i in range(100, 110)}
    assert len(held_out) == 10
    assert {problem.prompt for problem in held_out} != first
    settings = DataConfig(dataset=train, eval_dataset="reasoning-gym:chain_sum", eval_size=5)
    _, held_out, reward, held_out_reward = load_problem_sets(settings, 0)
    texts = [f"<answer>{problem.answer}</answer>" for problem in held_out]
    assert held_out_reward([""] * 5, texts, **reward_columns(held_out)) == [1.0] * 5
    assert reward is math_reward


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(template="no place"), "must contain {question}"),
        (lambda: DataConfig(system_prompt="be brief", template="{question}"), "system_prompt needs chat_template"),
        (lambda: DataConfig(dataset="sums", partial_credit=True), "partial_credit scores programs"),
        (lambda: DataConfig(dataset="a.jsonl", grader="math", partial_credit=True), "partial_credit scores programs"),
        (lambda: OptimizerConfig(learning_rate=0.0), "learning_rate is 0.0"),
        (lambda: OptimizerConfig(max_grad_norm=0.0), "max_grad_norm is 0.0"),
        (lambda: OptimizerConfig(warmup_updates=-1), "warmup_updates is -1"),
        (lambda: OptimizerConfig(optimizer="adamw(b2=1.0)"), r"b2 is 1\.0; it must be at least 0 and below 1"),
        (lambda: OptimizerConfig(optimizer="adamw(b3=1.0)"), "optimizer: adamw has no argument 'b3'; it has .*b2"),
        (
            lambda: OptimizerConfig(optimizer="adam"),
            "optimizer is 'adam'; it must be one of adamw, muon, lion, adafactor",
        ),
        (lambda: PolicyLossConfig(kl="k2"), "kl is k2, but kl_coef is 0"),
        (lambda: PolicyLossConfig(importance_cap=0.0), "importance_cap is 0"),
        (lambda: PolicyLossConfig(epsilon_low=-0.1), "epsilon_low is -0.1"),
        (lambda: PolicyLossConfig(kl="k1", kl_coef=0.1), "gradient does not depend on the reference"),
        (lambda: PolicyLossConfig(loss="grpo(kl_coef=0.1)"), "loss: the run passes 'kl_coef' to grpo"),
        (lambda: PolicyLossConfig(loss="dapo(epsilon_high=0.3)"), "loss: the run passes 'epsilon_high' to dapo"),
        (lambda: OptimizerConfig(optimizer="adamw(weight_decay=0.1)"), "optimizer: the run passes 'weight_decay'"),
        (lambda: PolicyLossConfig(kl_correction=True), "kl_coef is 0"),
    ],
)
def test_settings_out_of_range_are_refused_when_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("load", [lambda data: load_problem_sets(data, 0), load_evaluation_problems])
def test_no_dataset_is_the_default(load):
    with pytest.raises(ValueError, match="dataset: no dataset is named; pass --dataset, or choose a preset"):
        load(DataConfig())


# What tells a right answer -------------------------------------------------------------------------------------------


def test_problems_with_tests_are_graded_by_running_programs(tmp_path):
    rows = [{"question": f"Write f({i}).", "tests": [f"assert f() == {i}"]} for i in range(20)]
    settings = DataConfig(dataset=write_rows(tmp_path / "code.jsonl", rows), partial_credit=True, program_seconds=1.0)
    problems, _, reward, _ = load_problem_sets(settings, 0)
    assert problems[0].answer is None
    assert reward.func is code_reward
    assert reward.keywords["partial_credit"]
    assert reward.keywords["limits"].seconds == 1.0


def test_a_grader_can_be_chosen_and_must_be_able_to_read_the_gold(tmp_path):
    sums = write_rows(tmp_path / "sums.jsonl", [{"question": f"{i}+1", "answer": i + 1} for i in range(20)])
    assert load_problem_sets(DataConfig(dataset=sums), 0)[2] is math_reward
    assert load_problem_sets(DataConfig(dataset=sums, grader="exact"), 0)[2] is answer_reward
    assert (
        same_answers_of(DataConfig(dataset=sums))
        is same_answers_of(DataConfig(dataset=sums, grader="math"))
        is same_answers
    )
    for by_text in (
        DataConfig(dataset=sums, grader="exact"),
        DataConfig(dataset="sums"),
        DataConfig(dataset="errands"),
    ):
        assert same_answers_of(by_text) is same_text
    with pytest.raises(ValueError, match=r"partial_credit scores programs by their tests; .*sums.jsonl has none"):
        load_problem_sets(DataConfig(dataset=sums, partial_credit=True), 0)
    with pytest.raises(ValueError, match=r"has no column tests, which the grader code needs; it has \[\]"):
        load_problem_sets(DataConfig(dataset=sums, grader="code"), 0)
    unread = write_rows(tmp_path / "bad.jsonl", [{"question": f"{i}", "answer": r"\\frac{1}{"} for i in range(20)])
    with pytest.raises(ValueError, match=r"the grader math cannot read 20 of .*, such as .*choose another grader"):
        load_problem_sets(DataConfig(dataset=unread), 0)
    malformed = write_rows(tmp_path / "tests.jsonl", [{"question": f"{i}", "tests": ["assert ("]} for i in range(20)])
    with pytest.raises(ValueError, match="the grader code cannot read 20"):
        load_problem_sets(DataConfig(dataset=malformed), 0)
    bare = write_rows(tmp_path / "bare.jsonl", [{"question": f"{i}", "level": 1} for i in range(20)])
    with pytest.raises(KeyError, match="no column is known as an answer"):
        load_problem_sets(DataConfig(dataset=bare), 0)


def test_prompts_that_nothing_grades_need_no_answers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Say {n}."}) + "\n" for n in range(20)))
    with pytest.raises(KeyError, match="With a reward model instead of answers, set grader to none"):
        load_problem_sets(DataConfig(dataset=str(path)), 0)
    problems, held_out, reward, held_out_reward = load_problem_sets(DataConfig(dataset=str(path), grader="none"), 0)
    assert {problem.answer for problem in problems + held_out} == {None}
    assert not prompts(problems) & prompts(held_out)
    assert reward(["a", "b"], ["c", "d"], answer=[None, None]) == held_out_reward(["a", "b"], ["c", "d"]) == [None] * 2
    with pytest.raises(ValueError, match="grader is none, but the problems of sums have answers"):
        DataConfig(dataset="sums", grader="none")


# What the data are like ----------------------------------------------------------------------------------------------


def test_an_evaluation_is_of_every_row_of_a_file(tmp_path):
    path = write_problems(tmp_path / "a.jsonl", 361)
    stats = DataStatistics()
    problems, reward = load_evaluation_problems(DataConfig(dataset=path, eval_size=None), stats)
    assert len(problems) == 361
    assert reward is math_reward
    assert stats.lines() == [f"361 of 361 problems of {path} are for evaluation"]
    stats = DataStatistics()
    problems, _ = load_evaluation_problems(DataConfig(dataset=path, eval_size=20), stats)
    assert len(problems) == 20
    assert [problem.prompt for problem in problems] != [f"{n}+1=" for n in range(20)]  # a sample
    assert stats.lines() == [f"20 of 361 problems of {path} are for evaluation"]


def test_training_says_how_much_of_a_file_it_holds_out(tmp_path):
    path = write_problems(tmp_path / "a.jsonl", 361)
    stats = DataStatistics()
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=path), 0, stats)
    assert (len(problems), len(held_out)) == (325, 36)
    assert stats.lines() == [f"36 of 361 rows of {path} are held out for evaluation"]
    assert len(load_problem_sets(DataConfig(dataset=path, eval_size=None), 0)[1]) == 36


def test_an_evaluation_is_of_the_split_that_is_held_out_or_named(tmp_path):
    write_problems(tmp_path / "train.jsonl", 30)
    write_problems(tmp_path / "test.jsonl", 12)
    write_problems(tmp_path / "validation.jsonl", 11)
    folder = str(tmp_path)

    def count(**changes):
        return len(load_evaluation_problems(DataConfig(dataset=folder, eval_size=None, **changes))[0])

    assert count() == 12
    assert count(eval_split="validation") == 11
    assert count(split="train") == 30
    (tmp_path / "test.jsonl").unlink()
    assert count() == 11
    (tmp_path / "validation.jsonl").unlink()
    assert count() == 30


def test_toy_problems_of_an_evaluation_are_those_held_out():
    everything = load_problem_sets(DataConfig(dataset="sums"), 0)[1]
    assert load_evaluation_problems(DataConfig(dataset="sums"))[0] == everything
    assert load_evaluation_problems(DataConfig(dataset="sums", eval_size=None))[0] == everything
    errands = DataConfig(dataset="errands", eval_size=5)
    assert load_evaluation_problems(errands)[0] == load_problem_sets(errands, 0)[1]


def test_a_folder_with_one_split_is_divided(tmp_path):
    write_problems(tmp_path / "train.jsonl", 30)
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=str(tmp_path)), 0)
    assert (len(problems), len(held_out)) == (27, 3)


def test_bad_rows_are_an_error_or_skipped_and_counted(tmp_path):
    path = write_rows(
        tmp_path / "a.jsonl", [{"question": f"{n}+1=", "answer": None if n == 7 else n + 1} for n in range(361)]
    )
    with pytest.raises(ValueError, match=r"a\.jsonl:8, column 'answer'"):
        load_problem_sets(DataConfig(dataset=path), 0)
    stats, said = DataStatistics(), []
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=path, skip_bad_rows=True), 0, stats)
    assert len(problems) + len(held_out) == 360
    stats.report(said.append, tmp_path / "data.json")
    assert said[-2] == "1 rows skipped:"
    assert "a.jsonl:8, column 'answer' must be text" in said[-1]
    written = json.loads((tmp_path / "data.json").read_text())
    assert (written["skipped"], written["rows"], written["held_out"]) == (1, 360, 36)
    assert "a.jsonl:8" in written["skipped_because"][0]


def test_many_reasons_are_cut(tmp_path):
    stats = DataStatistics(skipped=[f"row {n}: {'x' * 1000}" for n in range(500)])
    assert len(stats.lines()) == 7
    assert stats.lines()[-1] == "  and 495 more"
    assert max(map(len, stats.lines())) < 310


def test_duplicates_and_contradictions_are_counted(tmp_path):
    rows = [{"question": f"{n}+1=", "answer": n + 1} for n in range(30)]
    rows += [{"question": " 1+1= ", "answer": 2}, {"question": "2+1=", "answer": 4}]
    stats = DataStatistics()
    load_problem_sets(DataConfig(dataset=write_rows(tmp_path / "a.jsonl", rows)), 0, stats)
    assert stats.counts["duplicates"] == 2
    assert stats.counts["contradicting_duplicates"] == 1
    assert stats.lines()[0] == (
        "2 of 32 rows repeat the prompt of an earlier one (ignoring case and white space), 1 of them with a different "
        "answer"
    )


def test_duplicates_stay_on_one_side_of_the_division(tmp_path):
    rows = [{"question": text, "answer": n} for n in range(50) for text in (f"What is {n}?", f"WHAT  is {n}?\n")]
    problems, held_out, _, _ = load_problem_sets(DataConfig(dataset=write_rows(tmp_path / "a.jsonl", rows)), 0)
    assert not {key_of(problem) for problem in problems} & {key_of(problem) for problem in held_out}


def test_leaks_between_training_and_held_out_rows_are_removed_and_said(tmp_path):
    train = write_rows(tmp_path / "train.jsonl", [{"question": f"What is {n}?", "answer": n} for n in range(20)])
    test = [{"question": f"what  is {n}? ", "answer": n} for n in range(15, 30)]
    test += [{"question": [{"role": "user", "content": "What is 3?"}], "answer": 3}]
    stats = DataStatistics()
    settings = DataConfig(dataset=train, eval_dataset=write_rows(tmp_path / "test.jsonl", test))
    held_out = load_problem_sets(settings, 0, stats)[1]
    assert {problem.answer for problem in held_out} == {str(n) for n in range(20, 30)}
    assert stats.counts["leaks"] == 6
    assert stats.lines()[-1].startswith("6 of 16 held-out rows dropped: their prompts are in the training rows")


def test_conversations_are_told_apart_by_role_and_text():
    user, reply = {"role": "user", "content": "Hi  there"}, {"role": "assistant", "content": "yo"}
    assert prompt_key([user]) == prompt_key("hi there")
    assert prompt_key([user, reply]) != prompt_key([reply, user])
    assert prompt_key([user, reply]) == prompt_key([{"role": "user", "content": "hi there"}, reply])
    with_call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert prompt_key([user, with_call]) != prompt_key([user, {"role": "assistant", "content": None}])


def test_each_of_several_answers_counts(tmp_path):
    rows = [{"question": f"{n}+1=", "answer": [str(n + 1), f"x={n}"] if n else "1"} for n in range(30)]
    problems, _, reward, _ = load_problem_sets(DataConfig(dataset=write_rows(tmp_path / "a.jsonl", rows)), 0)
    columns = reward_columns(problems)
    numbers = [int(str(problem.prompt).partition("+")[0]) for problem in problems]
    for right in ("{0}", "x={1}"):
        texts = [f"\\boxed{{{right.format(n + 1, n)}}}" if n else "\\boxed{1}" for n in numbers]
        assert reward([""] * len(texts), texts, **columns) == [1.0] * len(texts)
    texts = ["\\boxed{77}"] * len(numbers)
    assert reward([], texts, **columns) == [0.0] * len(texts)
    assert reward(["", ""], ["\\boxed{1}"] * 2, answer=[None, "see \\begin{tikz} the proof"]) == [None, None]


def test_a_constant_learning_rate_is_the_same_for_runs_of_any_length():
    settings = OptimizerConfig(decay="constant", warmup_updates=4, learning_rate=1e-3)
    rates = [[float(settings.build(total_updates=total)[1](step)) for step in range(12)] for total in (2, 4, 100)]
    assert rates[0] == rates[1] == rates[2]
    assert rates[0][0] < rates[0][3] < rates[0][4] == rates[0][-1] == pytest.approx(1e-3)
    assert settings.description == "adamw, learning rate 0.001, constant after 4 updates of warm-up"

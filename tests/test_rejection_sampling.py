"""Rejection sampling end to end, on tiny shapes: what is written is right, and the same whenever a run is killed."""

import json
import re
from dataclasses import replace

import pytest

from experiments import rejection_sampling
from grpo_jax import models
from grpo_jax.config.data import DataConfig
from grpo_jax.config.offline import DemonstrationConfig
from grpo_jax.config.presets import preset
from grpo_jax.config.rejection_sampling import RejectionSamplingConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.data.conversations import load_demonstrations
from grpo_jax.data.problems import Problem
from grpo_jax.data.selection import FILTERS, ProblemSamples, Selection, SelectionConfig
from grpo_jax.jsonl import JsonlLog, read_jsonl, write_atomically
from grpo_jax.loop.batch_inference import read_samples
from grpo_jax.loop.offline_data import encode_demonstration_set, load_demonstration_sets
from grpo_jax.loop.run import Run
from tests.runs import write_rows

PROBLEMS, SAMPLES = 64, 8
GENERAL = [
    {"prompt": f"{n}+0=", "completion": f"<answer>{n}</answer>", **({"source": "own"} if n == 0 else {})}
    for n in range(9)
]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rejection")
    config = RejectionSamplingConfig(
        model=base,
        data=DataConfig(dataset="sums", template="{question}", eval_size=10),
        rewards=RewardConfig(reward_workers=0),
        run_dir=folder / "run",
        num_samples=SAMPLES,
        num_prompts=4,
        max_problems=PROBLEMS,
        max_prompt_length=12,
        max_completion_length=10,
        demonstrations=(folder / "general.jsonl",),
        general_share=0.2,
        mesh=MeshConfig(data=1),
        plain=True,
    )
    write_rows(folder / "general.jsonl", GENERAL)
    assert rejection_sampling.main(config) == 0
    return config


@pytest.fixture
def config(finished, tmp_path):
    """The same run in a folder of its own."""
    return replace(finished, run_dir=tmp_path / "run")


@pytest.fixture
def drawn(finished, config):
    """The same, stopped when everything was drawn and nothing selected; drawing again is a failure."""
    config.run_dir.mkdir()
    for name in ("config.json", "completions.jsonl", "provenance.json"):
        (config.run_dir / name).write_bytes((finished.run_dir / name).read_bytes())
    return config


def dataset_of(config):
    return (config.run_dir / "dataset.jsonl").read_bytes()


def summary_of(config):
    return json.loads((config.run_dir / "summary.json").read_text())


def drawn_rows(config):
    return [row for row in read_jsonl(config.run_dir / "dataset.jsonl") if "provenance" in row]


def dies(*args, **kwargs):
    raise KeyboardInterrupt


def test_killed_while_drawing_the_data_set_is_the_same_to_the_byte(finished, config, monkeypatch):
    append, calls = JsonlLog.append, []

    def torn(self, *rows):
        if self.path.name == "completions.jsonl" and rows:
            calls.append(1)
            if len(calls) == 2:
                append(self, *rows[: len(rows) // 2])
                with self.path.open("ab") as file:
                    file.write(b'{"step": 2, "pla')
                raise KeyboardInterrupt
        append(self, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(JsonlLog, "append", torn)
        with pytest.raises(KeyboardInterrupt):
            rejection_sampling.main(config)
    assert not (config.run_dir / "dataset.jsonl").exists()
    assert rejection_sampling.main(config) == 0
    assert dataset_of(config) == dataset_of(finished)
    assert (config.run_dir / "completions.jsonl").read_bytes() == (finished.run_dir / "completions.jsonl").read_bytes()


@pytest.mark.parametrize("after_it", [False, True])
def test_killed_before_or_after_the_data_set_is_written_it_is_the_same(finished, drawn, monkeypatch, after_it):
    def dies_in_the_middle(path, data):
        if path.name != "dataset.jsonl":
            return write_atomically(path, data)
        path.with_name(f".{path.name}.part").write_bytes(next(iter(data))[:-5])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if after_it:
            patch.setattr(Run, "write_summary", dies)
        else:
            patch.setattr(rejection_sampling, "write_atomically", dies_in_the_middle)
        with pytest.raises(KeyboardInterrupt):
            rejection_sampling.main(drawn)
    assert (drawn.run_dir / "dataset.jsonl").exists() == after_it
    monkeypatch.setattr("grpo_jax.rollout.Sampler.stream", lambda *args, **kwargs: pytest.fail("it was drawn again"))
    assert rejection_sampling.main(drawn) == 0
    assert dataset_of(drawn) == dataset_of(finished)
    assert summary_of(drawn)["counts"] == summary_of(finished)["counts"]
    assert not list(drawn.run_dir.glob(".*.part"))


def test_a_finished_run_is_not_run_again_and_not_selected_otherwise(finished, capsys, monkeypatch):
    before = dataset_of(finished)
    monkeypatch.setattr(models, "from_pretrained", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    assert rejection_sampling.main(finished) == 0
    assert "this run is finished" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"another configuration(.|\n)*selection.threshold: 1.0 -> 0.5"):
        rejection_sampling.main(replace(finished, selection=SelectionConfig(threshold=0.5)))
    assert dataset_of(finished) == before


def test_before_it_is_finished_a_run_may_select_otherwise_from_the_same_completions(finished, drawn):
    assert rejection_sampling.main(replace(drawn, selection=SelectionConfig(threshold=0.0, per_problem=2))) == 0
    rows = drawn_rows(drawn)
    assert {row["total"] for row in rows} == {0.0, 1.0}
    places = [row["place"] for row in rows]
    assert max(map(places.count, places)) == 2
    assert places == sorted(places)
    assert (drawn.run_dir / "completions.jsonl").read_bytes() == (finished.run_dir / "completions.jsonl").read_bytes()


def test_every_row_is_right_whole_and_says_where_it_is_from(finished):
    drawn = {each.place: each for each in read_samples(finished.run_dir)}
    rows = drawn_rows(finished)
    assert len(rows) > 10
    for row in rows:
        total = str(eval(row["prompt"][:-1]))
        said = re.search(r"<answer>(\d+)</answer>$", row["completion"])
        assert said is not None
        assert said[1] == total == row["answer"]
        from_here = drawn[row["place"]]
        assert row["completion"] == from_here.completions[row["sample"]]
        assert (row["total"], row["scores"]["accuracy"]) == (1, 1)
        assert row["scores"]["format"] == from_here.rewards["format"][row["sample"]]
        right = [eval(row["prompt"][:-1]) == int(t) for t in answers(from_here)]
        assert row["pass_rate"] == pytest.approx(sum(right) / SAMPLES)
        provenance = row["provenance"]
        assert provenance["model"] == finished.model
        assert provenance["weights"] == models.weights_digest(finished.model)
        assert (provenance["seed"], provenance["sampling"]["temperature"]) == (0, 1.0)
    texts = [(row["prompt"], row["completion"]) for row in rows]
    assert len(set(texts)) == len(texts)


def answers(collected):
    """What each sample says that was not cut off; -1 where it says nothing."""
    found = [re.search(r"<answer>(\d+)</answer>$", text) for text in collected.completions]
    cut = zip(found, collected.truncated, strict=True)
    return [-1 if match is None or was_cut else match[1] for match, was_cut in cut]


def test_counts_add_up(finished):
    summary, collected = summary_of(finished), [*read_samples(finished.run_dir)]
    counts, rows = summary["counts"], drawn_rows(finished)
    assert list(counts) == [*FILTERS]
    assert counts["sampled"] == len(collected) * SAMPLES == PROBLEMS * SAMPLES
    assert counts["complete"] == sum(not cut for each in collected for cut in each.truncated)
    right = [
        (each.place, n) for each in collected for n, t in enumerate(answers(each)) if str(t) == each.problem.answer
    ]
    assert counts["correct"] == counts["required"] == len(right) > counts["distinct"]
    assert counts["balanced"] == len(rows)
    told = summary["by_pass_rate"]
    assert [part["pass_rate"] for part in told][:2] == ["0", "0.00 to 0.25"]
    assert sum(part["problems"] for part in told) == summary["problems"] == PROBLEMS
    assert told[0]["problems"] == PROBLEMS - len({place for place, _ in right})
    assert sum(part["capped"] for part in told) == counts["capped"]
    assert sum(part["selected"] for part in told) == len(rows)
    lengths = {(each.place, n): length for each in collected for n, length in enumerate(each.lengths)}
    mean = sum(lengths[row["place"], row["sample"]] for row in rows) / len(rows)
    assert summary["mean_length"] == pytest.approx(mean)
    assert summary["problems_selected"] == len({row["place"] for row in rows})
    assert summary["config"]["max_problems"] == PROBLEMS
    assert summary["seconds"] > 0


def test_other_demonstrations_are_a_share_of_the_rows_and_are_as_they_were(finished):
    everything = read_jsonl(finished.run_dir / "dataset.jsonl")
    rows = drawn_rows(finished)
    added = everything[len(rows) :]
    assert len(added) == round(len(rows) / 4) == summary_of(finished)["general"][0]["taken"] < len(GENERAL)
    source = str(finished.demonstrations[0])
    assert all(row in [{"source": source, **each} for each in GENERAL] for row in added)
    assert len({row["prompt"] for row in added}) == len(added)
    assert summary_of(finished)["rows"] == len(everything)


def test_all_other_demonstrations_are_taken_where_no_share_is_named_or_they_are_too_few(drawn):
    for share in (None, 0.9):
        assert rejection_sampling.main(replace(drawn, general_share=share)) == 0
        added = read_jsonl(drawn.run_dir / "dataset.jsonl")[-len(GENERAL) :]
        assert [row["prompt"] for row in added] == [row["prompt"] for row in GENERAL]
        assert [row["source"] == "own" for row in added] == [True] + [False] * 8
        (drawn.run_dir / "summary.json").unlink()


def test_a_part_of_the_problems_is_drawn_as_it_is_among_all_of_them(finished, config):
    left = 8
    part = replace(config, skip_problems=PROBLEMS - left, max_problems=left)
    assert rejection_sampling.main(part) == 0
    whole = [each for each in read_samples(finished.run_dir) if each.place >= PROBLEMS - left]
    assert [*read_samples(part.run_dir)] == whole
    seconds = [row["step_time"] for row in read_jsonl(part.run_dir / "metrics.jsonl")]
    assert len(seconds) == 1
    assert 0 < seconds[0] < summary_of(part)["seconds"]


def test_when_all_problems_are_passed_over_that_is_said(config):
    with pytest.raises(ValueError, match=r"skip_problems is 9999; it must be below the number of problems, \d+"):
        rejection_sampling.main(replace(config, skip_problems=9999))


def test_sft_reads_the_file_and_asks_as_the_teacher_was_asked(finished):
    settings = DemonstrationConfig(dataset=str(finished.run_dir / "dataset.jsonl"), template="{question}")
    learnt, held_out = load_demonstration_sets(settings, 0)
    rows = read_jsonl(finished.run_dir / "dataset.jsonl")
    assert sorted(each.completion for each in learnt + held_out) == sorted(row["completion"] for row in rows)
    assert held_out
    policy = models.from_pretrained(finished.model)
    examples, dropped = encode_demonstration_set(
        settings, learnt, policy, max_length=64, rendering={"template": "{question}"}
    )
    assert not dropped
    asked = {each.place: each.prompt for each in read_samples(finished.run_dir)}
    for demonstration, example in zip(learnt, examples, strict=True):
        if "place" in demonstration.columns:
            text = policy.tokenizer.decode(example.token_ids[: example.prompt_length])
            assert text == asked[demonstration.columns["place"]]
    assert "--template '{question}'" in summary_of(finished)["teach_with"]


def test_conversations_are_written_as_conversations(tmp_path):
    messages = [{"role": "user", "content": "1+2="}]
    found = ProblemSamples(
        place=3,
        problem=Problem(messages, "3", {"text": "other", "messages": []}),
        prompt="<user>1+2=<assistant>",
        completions=["4", "\u2028 3"],
        lengths=[1, 2],
        truncated=[False, False],
        total=[0.0, 1.0],
        rewards={"accuracy": [0.0, 1.0]},
    )
    JsonlLog(tmp_path / "completions.jsonl").append(found.row(1))
    selected = [Selection(3, 2, 1, (1,))]
    ((row, length),) = rejection_sampling.selected_rows(tmp_path, selected, {"model": "m"})
    assert length == 2
    (tmp_path / "dataset.jsonl").write_bytes(rejection_sampling.as_line(row))
    (read,) = load_demonstrations(str(tmp_path / "dataset.jsonl"))
    assert (read.prompt, read.completion) == (messages, "\u2028 3")
    assert (read.columns["answer"], read.columns["pass_rate"]) == ("3", 0.5)


def test_nothing_selected_names_the_filter_and_may_be_mended_by_the_same_command(finished, drawn):
    never = replace(drawn, selection=SelectionConfig(require=("format=1",)))
    with pytest.raises(ValueError, match=r"no completion reaches the minimum scores \['format=1'\]"):
        rejection_sampling.main(never)
    assert not (drawn.run_dir / "dataset.jsonl").exists()
    assert rejection_sampling.main(drawn) == 0
    assert dataset_of(drawn) == dataset_of(finished)


def test_demonstrations_that_cannot_be_read_are_found_before_anything_is_drawn(config, tmp_path):
    path = tmp_path / "bad.jsonl"
    write_rows(path, [{"prompt": "1+1=", "completion": "2"}, {"question": "1+1="}])
    with pytest.raises(KeyError, match=r"bad.jsonl:2 has no column"):
        rejection_sampling.main(replace(config, demonstrations=(path,)))
    assert not (config.run_dir / "provenance.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_problems": 0}, "max_problems is 0"),
        ({"model": "toy"}, "the toy model knows the tasks sums and errands only, without a template"),
        ({"selection": SelectionConfig(require=("language=1",))}, r"no rewards named \['language'\]"),
        ({"general_share": 0.0}, "general_share is 0.0"),
        ({"general_share": 1.0}, "general_share is 1.0"),
        ({"demonstrations": ()}, "general_share is 0.2; it is a share .* of rows from demonstrations"),
        ({"demonstrations": ("chats.parquet",)}, "chats.parquet must be a .jsonl file"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(finished, change, message):
    if "parquet" in str(change):
        change = {"demonstrations": (finished.run_dir / "chats.parquet",)}
    with pytest.raises(ValueError, match=message):
        replace(finished, **change)


def test_the_command_that_teaches_has_the_form_of_the_prompts(finished):
    path = finished.run_dir / "dataset.jsonl"
    plain = {"kind": "plain", "template": "{question}"}
    assert rejection_sampling.sft_command(path, plain, ()).endswith(f"--dataset {path} --template '{{question}}'")
    chat = {"kind": "chat", "system_prompt": "Be brief.", "template_kwargs": {"thinks": False}, "date": "2026-11-27"}
    assert rejection_sampling.sft_command(path, chat, ("<end>",)).endswith(
        "--stop-tokens '<end>' --chat-template --system-prompt 'Be brief.' --template-date 2026-11-27 "
        """--template-kwargs '{"thinks": false}'"""
    )


def test_settings_have_one_default_and_the_toy_is_a_preset():
    config, toy = RejectionSamplingConfig(), preset("rejection_sampling")
    assert (config.model, config.data.dataset, config.max_problems) == (None, None, None)
    assert (toy.model, toy.data.dataset, toy.max_problems) == ("toy", "sums", 256)
    assert (toy.prompt_length, toy.completion_length) == (12, 48)


def test_filters_may_change_until_the_run_is_finished(finished, config):
    assert "cache_bytes" in finished.resumable_fields
    for name in ("selection", "demonstrations", "general_share"):
        assert name in config.resumable_fields
        assert name not in finished.resumable_fields


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "model: no model is named; pass --model"),
        ({"data": DataConfig()}, "dataset: no dataset is named; pass --dataset"),
    ],
)
def test_a_model_and_a_dataset_must_be_named(config, change, message):
    with pytest.raises(ValueError, match=message):
        rejection_sampling.main(replace(config, **change))

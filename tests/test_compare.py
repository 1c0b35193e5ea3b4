"""The comparison: every method gets the same samples from the same start, and what is told of them adds up."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest

from experiments import compare
from experiments.bench import memory as bench_memory
from grpo_jax.config.compare import CompareConfig as Config
from grpo_jax.config.data import DataConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.jsonl import to_json, write_atomically
from grpo_jax.loop import update_memory
from grpo_jax.loop.command import run_command
from grpo_jax.loop.stages import Stage
from grpo_jax.models import LoRA
from tests.runs import kill_in_second_save, parsed_commands, record_stages, write_rows

STEPS, PROMPTS, GROUP = 6, 4, 4


@pytest.fixture
def parts(monkeypatch):
    """What the comparison would run, instead of running it: the name of the script and its configuration."""
    return record_stages(monkeypatch)


TOY = compare.PRESETS["toy"].config()


def config_in(folder, start=TOY, **changes):
    sizes = {
        "num_steps": STEPS,
        "num_rounds": 3,
        "num_prompts": PROMPTS,
        "group_size": GROUP,
        "mesh": MeshConfig(data=1),
    }
    return replace(start, **{**sizes, "run_dir": folder / "run", **changes})


def test_all_methods_start_from_one_base_and_have_equally_many_samples(parts, tmp_path):
    assert compare.main(config_in(tmp_path, num_seeds=2, seed=5)) == 0
    for seed in (5, 6):
        folder = tmp_path / f"run/seed{seed}"
        of = {str(each.run_dir.relative_to(folder)): each for _, each in parts if each.seed == seed}
        base = str(folder / "base/toy_model")
        assert next(iter(of)) == "base"
        assert of["base"].model == "toy"  # made here
        for method in ("grpo", "rloo", "ppo"):
            run = of[method]
            assert (run.model, run.num_steps, run.num_prompts, run.group_size) == (base, STEPS, PROMPTS, GROUP)
            assert run.num_epochs * run.num_minibatches == 4
            assert run.kl_reward_coef == 0
            assert run.eval_every == STEPS / 3
            assert run.rewards == RewardConfig()
        assert (of["grpo"].advantage, of["rloo"].advantage) == ("group_relative", "rloo")
        for method in ("dpo", "sft"):
            samples, asked = 0, []
            for number in (1, 2, 3):
                drawn, learnt, measured = (of[f"{method}/{number}_{part}"] for part in ("drawn", "learnt", "measured"))
                start = base if number == 1 else str(folder / method / f"{number - 1}_learnt/model")
                assert drawn.model == learnt.model == start
                assert measured.model == str(folder / method / f"{number}_learnt/model")
                assert Path(learnt.data.dataset).parent == drawn.run_dir
                assert drawn.pairs_per_problem == (4 if method == "dpo" else 0)
                samples += drawn.max_problems * drawn.num_samples
                asked += range(drawn.skip_problems, drawn.skip_problems + drawn.max_problems)
            assert samples == STEPS * PROMPTS * GROUP
            assert len(set(asked)) == len(asked)
    order = [name for name, _ in parts[:7]]
    assert order == ["evaluate", "grpo", "grpo", "ppo", "rejection_sampling", "dpo", "evaluate"]


def test_a_real_model_is_asked_alike_by_all(parts, tmp_path):
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(30)]
    problems = write_rows(tmp_path / "problems.jsonl", rows)
    data = DataConfig(dataset=problems, chat_template=True, system_prompt="Think.")
    changes = {"max_prompt_length": 99, "stop_tokens": ("<|im_end|>",)}
    config = config_in(tmp_path, Config(), model="org/model", data=data, **changes)
    assert compare.main(config) == 0
    for _, each in parts:
        assert (each.max_prompt_length, each.stop_tokens) == (99, ("<|im_end|>",))
        assert (each.data.chat_template, each.data.system_prompt) == (True, "Think.")
    seed = tmp_path / "run/seed0"
    starts = {str(each.run_dir.relative_to(seed)): each.model for _, each in parts}
    rounds = {}
    for method in ("dpo", "sft"):
        for number in (1, 2, 3):
            start = "org/model" if number == 1 else str(seed / method / f"{number - 1}_learnt/model")
            rounds |= dict.fromkeys((f"{method}/{number}_drawn", f"{method}/{number}_learnt"), start)
            rounds[f"{method}/{number}_measured"] = str(seed / method / f"{number}_learnt/model")
    assert starts == dict.fromkeys(("base", "grpo", "rloo", "ppo"), "org/model") | rounds


def test_with_a_real_model_rounds_learn_with_as_many_tokens_at_once_as_grpo(tmp_path):
    data = DataConfig(dataset="org/problems")
    config = config_in(tmp_path, Config(), model="org/model", data=data, num_prompts=64)
    config = replace(config, max_completion_length=3584, mesh=MeshConfig(data=1))
    grpo = config.in_steps("grpo")
    at_once = 64 * GROUP // grpo.num_minibatches // grpo.micro_batches
    assert at_once == 16_384 // 4096
    dpo, sft = config.trained("dpo", 1), config.trained("sft", 1)
    assert 2 * dpo.num_pairs // dpo.num_micro_batches == at_once
    assert sft.num_sequences // sft.num_micro_batches == at_once
    assert sft.max_length == 4096
    assert config_in(tmp_path).trained("sft", 1).max_length == 128
    with pytest.raises(ValueError, match=r"max_prompt_length \+ max_completion_length is 312, and .* 128 positions"):
        config_in(tmp_path, max_completion_length=300)


def test_too_few_problems_for_rounds_of_others_are_found_before_anything_is_run(parts, tmp_path):
    rows = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(30)]
    data = DataConfig(dataset=write_rows(tmp_path / "problems.jsonl", rows))
    config = config_in(tmp_path, Config(), model="org/model", data=data, num_steps=9)
    with pytest.raises(ValueError, match="9 steps of 4 prompts need 36 problems, and there are 27"):
        compare.main(config)
    assert parts == []
    assert compare.main(replace(config, methods=("grpo", "ppo"))) == 0


def test_a_part_that_is_asked_to_stop_ends_the_command(tmp_path, monkeypatch):
    parts = record_stages(monkeypatch, {"dpo": 130})
    assert compare.main(config_in(tmp_path)) == 130
    assert parts[-1][0] == "rejection_sampling"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 7}, "7 steps do not divide into 3 rounds"),
        ({"methods": ()}, "name at least one, and each once"),
        ({"methods": ("grpo", "grpo")}, "name at least one, and each once"),
        ({"level": 0.0}, "level is 0.0"),
        ({"data": DataConfig(dataset="org/x", grader="none"), "model": "org/m"}, "the comparison needs right answers"),
        ({"data": DataConfig(dataset="org/x")}, "the toy model knows the tasks sums and errands only"),
        ({"group_size": 1}, "group_size is 1"),
        ({"dpo": replace(TOY.dpo, model="org/other")}, "dpo names a model"),
        ({"num_prompts": 3, "group_size": 3}, r"3 x 3 = 9 completions do not divide into num_minibatches"),
        (
            {"sft": replace(TOY.sft, model=None, max_length=256)},
            "sft.max_length is 256, and the model has 128 positions",
        ),
        ({"memory_report": Path("no/such/file")}, "is not output of bench/memory.py"),
        ({"grpo": replace(TOY.grpo, max_draws=2)}, "grpo: tasks and max_draws would give it other samples"),
    ],
)
def test_what_cannot_be_compared_is_refused_when_it_is_made(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        config_in(tmp_path, **change)


def test_a_dry_run_prints_a_command_for_each_part_and_runs_none(parts, tmp_path, capsys):
    args = ["--run-dir", str(tmp_path / "run"), "--num-seeds", "2", "--mesh.data", "1", "--dry-run"]
    assert run_command(Config, compare.main, description="", presets=compare.PRESETS, args=args) == 0
    parsed = parsed_commands(capsys.readouterr().out)
    assert parts == []
    plan = compare.learn_all(replace(TOY, run_dir=tmp_path / "run", num_seeds=2, mesh=MeshConfig(data=1)))
    assert parsed == [(stage.script.stem, stage.config) for stage in plan]
    assert len(parsed) == 2 * (1 + 3 + 2 * 3 * 3)  # the base, three methods in steps, two in three rounds of three


def test_help_is_short(capsys):
    assert run_command(Config, compare.main, description="", presets=compare.PRESETS, args=["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 100
    assert "--dry-run" in said
    assert "flags --evaluation.*" in said  # a number, not their names


def test_no_model_and_no_dataset_is_the_default(tmp_path):
    with pytest.raises(ValueError, match="dataset: no dataset is named; pass --dataset"):
        compare.main(config_in(tmp_path, Config()))
    with pytest.raises(ValueError, match="model: no model is named; pass --model"):
        compare.main(config_in(tmp_path, Config(), data=DataConfig(dataset="sums")))


def points(*pairs):
    return [{"samples": samples, "pass@1": share} for samples, share in pairs]


def test_the_level_is_reached_between_two_evaluations():
    rising = points((0, 0.1), (100, 0.5), (200, 0.9))
    assert compare.reached(rising, 0.5) == 100
    assert compare.reached(rising, 0.6) == pytest.approx(125)
    assert compare.reached(rising, 0.95) is None
    assert compare.reached(rising, 0.05) == 0
    assert compare.reached(points((0, 0.1), (100, 0.7), (200, 0.2), (300, 0.7)), 0.4) == pytest.approx(50)
    assert compare.reached(points((0, 0.85), (100, 0.7), (200, 0.9)), 0.8) == 0


def test_seeds_are_told_by_mean_least_and_greatest_unless_one_is_absent():
    assert compare.spread([0.5, 0.25, 0.75]) == {"mean": 0.5, "low": 0.25, "high": 0.75, "of_seeds": [0.5, 0.25, 0.75]}
    assert compare.spread([0.5, None])["mean"] is None


@pytest.fixture
def ran(tmp_path):
    """A comparison of which all parts have been run, as far as their figures go."""
    config = config_in(tmp_path, methods=("grpo", "ppo", "dpo"), num_seeds=1)
    config.run_dir.mkdir()
    write_atomically(config.run_dir / "config.json", json.dumps(to_json(asdict(config))).encode())
    seed = config.of_seeds[0]

    made_on = {"seconds": 2.0, "device": "a laptop", "versions": {"jax": "1"}}

    def measured(folder, share):
        folder.mkdir(parents=True)
        (folder / "completions.jsonl").touch()
        (folder / "summary.json").write_text(json.dumps({"figures": {"pass@1": {"mean": share}}, **made_on}))

    def drawn_in(seconds):
        return {"step": 1, "num_problems": PROMPTS, "step_time": seconds}

    def steps(folder, rows):
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(folder / "metrics.jsonl", rows)

    measured(seed.run_dir / "base", 0.1)
    for method, seconds in (("grpo", 2.0), ("ppo", 3.0)):
        rates = [0.1, 0.5, 0.9, 0.9, 0.3, 0.5] if method == "ppo" else [0.1, 0.3, 0.5, 0.7, 0.9, 0.9]
        rows = [{"step": 0, "eval/pass@1": 0.11}]
        for step, rate in enumerate(rates, 1):
            rows.append({"step": step, "pass_rate": rate, "step_time": seconds + (10 if step == 1 else 0)})
            if step % 2 == 0:
                rows.append({"step": step, "eval/pass@1": rate})
        steps(seed.run_dir / method, rows)
    for number in (1, 2, 3):
        steps(seed.folder("dpo", number, "drawn"), [drawn_in(1.0), drawn_in(1.5)])
        steps(seed.folder("dpo", number, "learnt"), [{"step": 0, "eval/loss": 1.0}, {"step": 1, "step_time": 0.5}])
        measured(seed.folder("dpo", number, "measured"), 0.2 * number)
    return config


def test_curves_count_samples_and_the_time_of_drawing_and_learning(ran):
    seed = ran.of_seeds[0]
    of_step = PROMPTS * GROUP
    assert compare.curve(seed, "grpo") == [
        {"samples": 0, "seconds": 0.0, "pass@1": 0.1},
        {"samples": 2 * of_step, "seconds": 14.0, "pass@1": 0.3},
        {"samples": 4 * of_step, "seconds": 18.0, "pass@1": 0.7},
        {"samples": 6 * of_step, "seconds": 22.0, "pass@1": 0.9},
    ]
    assert [(each["samples"], each["seconds"]) for each in compare.curve(seed, "dpo")] == [
        (0, 0.0),
        (2 * of_step, 3.0),
        (4 * of_step, 6.0),
        (6 * of_step, 9.0),
    ]
    assert (compare.pace(seed, "grpo"), compare.pace(seed, "ppo"), compare.pace(seed, "dpo")) == (2.0, 3.0, None)


def test_a_fall_is_told_by_the_mean_of_five_steps(ran):
    seed = ran.of_seeds[0]
    assert compare.fall(seed, "grpo") == 0
    assert compare.fall(seed, "ppo") == 0  # .54 and then .62: of six steps there are two means
    assert compare.fall(seed, "dpo") is None
    rows = [{"step": n, "pass_rate": rate} for n, rate in enumerate([0.5] * 5 + [1.0, 0.5, 0.5, 0.0, 0.0, 1.0], 1)]
    write_rows(seed.run_dir / "ppo/metrics.jsonl", rows)
    assert compare.fall(seed, "ppo") == pytest.approx(0.2)


def test_what_is_told_beside_the_claims(ran, monkeypatch, capsys, tmp_path):
    found = {
        "grpo": {"copies": 1.0, "state_bytes": 1, "peak_bytes": 6 * 2**20},
        "grpo_with_reward_model": {"copies": 3.0, "state_bytes": 1, "peak_bytes": 9 * 2**20},
        "ppo": {"copies": 2.0, "state_bytes": 1, "peak_bytes": 12 * 2**20},
        "ppo_with_reward_model": {"copies": 4.0, "state_bytes": 1, "peak_bytes": 15 * 2**20},
        "dpo": {"copies": 1.0, "state_bytes": 1, "peak_bytes": 7 * 2**20},
    }
    monkeypatch.setattr(compare, "memory_of_steps", lambda config, report: found)
    monkeypatch.setattr(Stage, "run", lambda stage: 0)
    larger = {name: {**each, "peak_bytes": each["peak_bytes"] * 2**14} for name, each in found.items()}
    (tmp_path / "report.json").write_text(json.dumps({"bench": "memory", **larger, "grpo_of_ppo": 0.5}))
    config = replace(ran, memory_report=tmp_path / "report.json", level=0.5, plain=True)
    assert compare.main(config) == 0
    said = capsys.readouterr().out
    assert (
        "nearly halves memory: rules as rewards: 50% of PPO's with this model, 50% of PPO's with the larger one" in said
    )
    assert "60% of PPO's with this model" in said
    assert "PPO's takes 1.50 times as long" in said
    told = json.loads((config.run_dir / "summary.json").read_text())
    assert told["figures"]["dpo"]["pass@1"]["mean"] == pytest.approx(0.6)
    assert told["figures"]["ppo"]["memory_of_larger"]["ppo"]["peak_bytes"] == 12 * 2**34
    assert told["figures"]["grpo"]["samples_to_level"]["mean"] == 48
    assert told["seeds"] == [0]
    assert (told["seconds"], told["device"], told["versions"]) == (4 * 2.0, "a laptop", {"jax": "1"})
    assert (
        compare.main(replace(config, methods=("grpo", "dpo"), level=0.9, cache_bytes=10)) == 0
    )  # told again, otherwise
    told = json.loads((config.run_dir / "summary.json").read_text())
    assert [*told["figures"]] == ["grpo", "dpo"]
    assert told["figures"]["grpo"]["samples_to_level"]["mean"] == 96
    grpo = config.of_seeds[0].in_steps("grpo")
    write_atomically(grpo.run_dir / "config.json", json.dumps(to_json(asdict(grpo))).encode())
    with pytest.raises(ValueError, match="group_size: 4 -> 8") as error:
        compare.main(replace(config, group_size=8))
    assert f"rm -r {grpo.run_dir}\n" in str(error.value)  # what was not begun, or was run by it alone, may stay
    assert plt.imread(config.run_dir / "curves.png").shape[1] > 900


def tiny_shapes(small):
    sizes = {"rows": 2, "num_micro_batches": 1, "max_prompt_length": 4, "max_completion_length": 4}
    return bench_memory.Config(model_config=Path(small) / "config.json", **sizes)


def memory_of(config, method):
    return update_memory.update_memory(config.shapes, method, config.mesh)


def test_memory_is_of_one_model_more_where_there_is_a_critic(small, monkeypatch):
    monkeypatch.setattr(
        update_memory, "compile_update", lambda step, state, *rest, **options: SimpleNamespace(compiled=state)
    )
    monkeypatch.setattr(update_memory, "program_bytes", lambda state: update_memory._bytes_of(state) + 100)
    grpo, ppo = (memory_of(tiny_shapes(small), method) for method in ("grpo", "ppo"))
    copies = [each.copies for each in (*grpo.values(), *ppo.values())]
    assert copies == pytest.approx([1, 3, 2, 4], abs=0.02)  # the scalar head is not an output embedding
    weights = grpo["grpo"].state_bytes / 3  # with two moments
    assert ppo["ppo"].state_bytes == pytest.approx(6 * weights, rel=0.02)
    for found in (grpo, ppo):
        (own, judged), (peak, judged_peak) = zip(*((e.state_bytes, e.peak_bytes) for e in found.values()), strict=True)
        assert judged - own == judged_peak - peak == pytest.approx(2 * weights, rel=0.02)
        assert peak == own + 100  # what an update takes in addition, and each state once


def test_an_update_takes_a_gradient_on_top_of_its_state_at_least(small):
    (found,) = memory_of(tiny_shapes(small), "sft").values()
    assert found.peak_bytes > found.state_bytes + found.state_bytes / 3


def test_a_report_describes_each_program(small, tmp_path, capsys):
    bench_memory.main(replace(tiny_shapes(small), methods=("sft",), dtype="bfloat16"))
    line = capsys.readouterr().out
    report = json.loads(line)
    (program,) = report["programs"]
    assert program["device_bytes"] == report["sft"]["peak_bytes"] > report["sft"]["state_bytes"]
    assert program["flops"] > 0
    assert program["wire_bytes"] == 0
    (tmp_path / "report.json").write_text(line)
    assert set(replace(TOY, memory_report=tmp_path / "report.json").larger) == {"sft"}


def test_a_report_of_packed_rows_with_adapters(small, capsys):
    config = replace(tiny_shapes(small), methods=("grpo",), rows=4, num_micro_batches=2, group_size=4)
    found = {}
    for name, settings in {
        "padded": {"packing": "none"},
        "shared": {"packing": "shared"},
        "adapters": {"packing": "shared", "lora": LoRA(rank=2), "offload_optimizer": True},
    }.items():
        bench_memory.main(replace(config, **settings))
        report = json.loads(capsys.readouterr().out)
        found[name] = report["grpo"]["state_bytes"], report["programs"][0]["flops"]
    assert found["shared"][0] == found["padded"][0] > 2 * found["adapters"][0]
    assert found["adapters"][1] < found["shared"][1]  # frozen weights have no gradient
    with pytest.raises(ValueError, match="methods has ppo, whose critic has no adapters"):
        bench_memory.main(replace(config, lora=LoRA(rank=2), methods=("ppo",)))


def test_a_topology_that_is_not_there_and_options_without_values():
    with pytest.raises(ValueError, match="topology is v5p:nonsense: "):
        bench_memory.topology_devices("v5p:nonsense")
    with pytest.raises(ValueError, match="'effort' is not name=value"):
        bench_memory.Config(compiler_options=("effort",))
    options = bench_memory.Config(compiler_options=("xla_a=true", "effort=-1", "b=0.5")).options
    assert options == {"xla_a": "true", "effort": -1.0, "b": 0.5}


def test_rows_are_even_for_pairs_are_two_of_them(small):
    with pytest.raises(ValueError, match="rows is 3; it must be even, because DPO has two sequences per pair"):
        replace(tiny_shapes(small), rows=3)


@pytest.mark.slow
def test_killed_in_the_middle_of_a_part_it_tells_what_an_unbroken_one_tells(base, tmp_path, monkeypatch):
    unbroken = config_in(
        tmp_path / "unbroken",
        methods=("dpo",),
        model=base,
        num_steps=4,
        num_rounds=2,
        num_prompts=32,
        group_size=8,
        eval_samples=1,
        save_every=1,
        max_completion_length=10,
        data=DataConfig(dataset="sums", eval_size=16),
        dpo=replace(TOY.dpo, num_pairs=4),
        mesh=MeshConfig(data=1),
        plain=True,
    )
    assert compare.main(unbroken) == 0
    config = replace(unbroken, run_dir=tmp_path / "killed/run", methods=("grpo", "dpo"))
    run = Stage.run
    with monkeypatch.context() as patch:

        def killed(stage):
            if stage.config.run_dir.name == "2_learnt":
                kill_in_second_save(run, stage, patch)
                return 130
            return run(stage)

        patch.setattr(Stage, "run", killed)
        assert compare.main(config) == 130
    assert compare.main(config) == 0
    told, expected = (json.loads((each.run_dir / "summary.json").read_text()) for each in (config, unbroken))
    of_dpo, of_unbroken = (
        [(each["samples"], each["pass@1"]) for each in summary["curves"]["dpo"][0]] for summary in (told, expected)
    )
    assert of_dpo == of_unbroken
    for method in config.methods:
        points = told["curves"][method][0]
        assert [each["samples"] for each in points] == [0, 512, 1024]
        assert all(each["seconds"] > 0 for each in points[1:])
    assert told["figures"]["grpo"]["step_seconds"]["mean"] > 0
    assert told["figures"]["grpo"]["largest_fall"]["mean"] >= 0
    weights = "seed0/dpo/2_learnt/model/model.safetensors"
    assert (config.run_dir / weights).read_bytes() == (unbroken.run_dir / weights).read_bytes()
    assert told["figures"]["dpo"]["memory"] == expected["figures"]["dpo"]["memory"]

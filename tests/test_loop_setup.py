"""What experiments share: checks that say what would do, batches of one size, and the frame around a loop."""

import json
import math
import os
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from checkpoints import SMALL, random_params, tiny_tokenizer

from grpo_jax import models
from grpo_jax.config.files import read_settings_file, with_settings
from grpo_jax.config.model import ModelConfig, PolicyConfig
from grpo_jax.config.pipeline import check_no_models, stage_config
from grpo_jax.config.run import RunConfig, check_divides, require_at_least
from grpo_jax.config.sft import SFTConfig
from grpo_jax.data.iterator import padded_batches
from grpo_jax.loop import setup
from grpo_jax.loop.checks import check_finite, check_length, check_same_data
from grpo_jax.loop.export import save_trained
from grpo_jax.loop.report import over_updates
from grpo_jax.loop.run import Run, run_experiment
from grpo_jax.loop.setup import load_model, start_model
from grpo_jax.loop.stages import Stage, check_models, run_script
from grpo_jax.loop.stop import Stopped
from grpo_jax.models import from_hf_config, from_pretrained, save_pretrained
from grpo_jax.sharding import make_mesh
from grpo_jax.tasks.toy_config import ToyConfig

LLAMA = {"model_type": "llama", **SMALL}


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig, ModelConfig):
    RESUMABLE_FIELDS = ("batch",)
    EXTENDABLE_FIELDS = ("num_steps",)
    run_dir: Path = Path("runs/nothing")
    rate: float = 0.1
    batch: int = 8
    num_steps: int = 1


@pytest.fixture
def config(tmp_path):
    return Config(run_dir=tmp_path / "run", plain=True)


@pytest.fixture
def run(config):
    with Run(config.run_dir, config, title="a test", plain=True) as run:
        yield run


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "model"
    params = random_params(from_hf_config(LLAMA))
    save_pretrained(folder, params, hf_config=LLAMA, tokenizer=tiny_tokenizer(), generation_config={"eos_token_id": 1})
    return from_pretrained(folder)


def test_settings_that_are_too_small_are_refused_with_what_would_do():
    config = SimpleNamespace(steps=2, rate=0.5, limit=None)
    require_at_least(config, steps=2, rate=0, limit=7)
    with pytest.raises(ValueError, match="steps is 2; it must be at least 3"):
        require_at_least(config, rate=0, steps=3)
    with pytest.raises(ValueError, match=r"rate is 0\.5; it must be at least 1"):
        require_at_least(config, rate=1)


def test_a_model_needs_a_position_for_every_token(policy):
    check_length(128, policy, "max_length")
    with pytest.raises(ValueError, match="max_length is 129, and the model has 128 positions"):
        check_length(129, policy, "max_length")
    check_length(129, replace(policy, model=replace(policy.model, max_length=None)), "max_length")
    with pytest.raises(ValueError, match=r"max_length is 65, and this model .* beyond 64 tokens; .* --rope-length 65"):
        check_length(65, replace(policy, model=replace(policy.model, rope_switch_length=64)), "max_length")


def test_rows_divide_over_the_devices_that_share_a_batch():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_divides(8, mesh, "rows")
    with pytest.raises(ValueError, match="rows: 6 do not divide over mesh data x fsdp = 4 devices"):
        check_divides(6, mesh, "rows")


def test_batches_of_one_size_hold_every_position_once_and_say_what_fills_them_up():
    assert list(padded_batches(5, 2)) == [([0, 1], 2), ([2, 3], 2), ([4, 4], 1)]
    assert list(padded_batches(4, 2)) == [([0, 1], 2), ([2, 3], 2)]
    assert list(padded_batches(1, 3)) == [([0, 0, 0], 1)]
    assert list(padded_batches(0, 3)) == []


def test_a_steps_metrics_are_means_over_its_updates_and_maxima_of_maxima():
    updates = [{"loss": jnp.float32(a), "gap/max": jnp.float32(b)} for a, b in ((1, 5), (2, 7), (6, 6))]
    assert over_updates(updates) == {"loss": 3.0, "gap/max": 7.0}
    assert over_updates(updates[:1]) == {"loss": 1.0, "gap/max": 5.0}


@pytest.mark.parametrize("order", [[1.0, math.nan], [math.nan, 1.0]])
def test_a_metric_that_is_nan_in_one_update_is_nan_for_the_step(order):
    updates = [{"loss": jnp.float32(value), "gap/max": jnp.float32(value)} for value in order]
    assert all(math.isnan(value) for value in over_updates(updates).values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm", "value/grad_norm", "kl"])
def test_a_metric_of_an_update_that_is_not_finite_stops_the_run(run, name, value):
    run.save(4, {"w": jnp.zeros(2)}, {})
    finite = {"loss": 0.5, "grad_norm": 1.0}
    check_finite(finite, 5, run)
    with pytest.raises(FloatingPointError, match=rf"step 5: {name} is {value}\. .* complete checkpoints: \[4\]"):
        check_finite({**finite, name: value}, 5, run)


def test_a_run_goes_on_with_the_data_it_was_begun_with(run):
    check_same_data({}, "abc", run)  # nothing was begun
    check_same_data({"data": "abc"}, "abc", run)
    with pytest.raises(ValueError, match=f"the data differ from those that {run.folder} was started with; restore"):
        check_same_data({"data": "abc"}, "xyz", run)


def test_what_was_trained_is_saved_and_summed_up(run, policy):
    rows = [
        {"step": 0, "eval/pass@1": 0.25, "eval/loss": 2.0, "eval/once": 1.0},
        {"step": 1, "loss": 9.0},
        {"step": 1, "eval/pass@1": 0.5, "eval/loss": 1.5},
        {"step": 2, "loss": 8.0},
        {"step": 2, "eval/pass@1": 0.75, "eval/loss": 1.0, "eval/late": 3.0},
    ]
    for row in rows:
        run.log(row)
    (run.folder / "model").mkdir()
    (run.folder / "model" / "half").write_text("of a process that was killed")
    params = jax.tree.map(lambda x: x + 1, policy.params)
    save_trained(run, params, replace(policy, params=None), steps=2, summary={"seed": 7})
    summary = json.loads((run.folder / "summary.json").read_text())
    figures = {"pass_at_1_before": 0.25, "pass_at_1_after": 0.75, "loss_before": 2.0, "loss_after": 1.0}
    assert {name: summary[name] for name in figures} == figures
    assert (summary["seed"], summary["steps"], summary["config"]["batch"]) == (7, 2, 8)
    assert not [name for name in summary if name.startswith(("once", "late"))]
    assert run.is_finished
    assert (run.folder / "curves.png").exists()
    assert not (run.folder / "model" / "half").exists()
    saved = models.from_pretrained(run.folder / "model")
    jax.tree.map(lambda a, b: pytest.approx(a) == b or pytest.fail("other weights"), saved.params, params)
    assert (saved.generation_config, saved.eos_ids) == ({"eos_token_id": 1}, policy.eos_ids)
    assert saved.tokenizer.decode([5, 7]) == "w5 w7"


def test_the_exit_status_tells_a_run_that_is_finished_from_one_that_was_asked_to_stop(config, capsys):
    calls = []

    def train(config, run):
        calls.append(run)
        if len(calls) == 1:
            run.log({"step": 0, "loss": 1.0})
            run.save(3, {"w": jnp.zeros(2)}, {})
            os.kill(os.getpid(), signal.SIGTERM)
            run.stop_if_requested()
            pytest.fail("it went on")
        run.finish({"step": 0}, {"step": 1}, steps=1, summary={})

    assert run_experiment(config, train, title="a test") == 75
    assert "stopped; checkpoints of steps [3]; the same command resumes" in capsys.readouterr().out
    assert run_experiment(config, train, title="a test") == 0
    assert len(calls) == 2
    assert run_experiment(config, train, title="a test") == 0
    assert len(calls) == 2  # a finished run's loop is not called
    assert "this run is finished" in capsys.readouterr().out
    assert run_experiment(config, lambda *_: calls.append("again"), title="a test", again=True) == 0
    assert calls[2:] == ["again"]  # unless it asks for it


def test_what_goes_wrong_in_a_loop_is_told(config):
    def train(config, run):
        raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError):
        run_experiment(config, train, title="a test")


def test_only_what_changes_no_number_may_change(config):
    def stop(config, run):
        run.log({"step": 0, "eval/loss": 1.0})
        raise Stopped

    def again(**change):
        return run_experiment(replace(config, **change), stop, title="a test")

    assert again() == 130
    assert again(batch=4, save_every=3, keep_checkpoints=1, attention="plain") == 130
    assert again(num_steps=2) == 130
    for change in ({"rate": 0.2}, {"seed": 1}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="another configuration"):
            again(**change)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", None)])
def test_what_is_called_float32_is_computed_in_it(config, dtype, precision):
    found = []
    run_experiment(
        replace(config, dtype=dtype),
        lambda *_: found.append(jax.config.jax_default_matmul_precision),
        title="a test",
    )
    assert found == [precision]


def test_a_model_without_a_tokenizer_is_refused(config, tmp_path):
    save_pretrained(tmp_path / "bare", random_params(from_hf_config(LLAMA)), hf_config=LLAMA)
    mesh = make_mesh(devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="bare has no tokenizer"):
        load_model(config, str(tmp_path / "bare"), mesh)


def test_a_stage_is_placed_with_what_the_whole_says_for_all():
    toy = ToyConfig(hidden_size=64)
    whole = Config(seed=3, plain=True, dtype="bfloat16", model="made/before", toy=toy, rate=0.5, save_every=7)
    stage = stage_config(Config(rate=0.2, save_every=8), whole, Path("own"), None, keep_checkpoints=5)
    assert (stage.run_dir, stage.seed, stage.plain, stage.dtype) == (Path("own"), 3, True, "bfloat16")
    assert (stage.model, stage.toy, stage.rate) == ("made/before", toy, 0.2)
    assert (stage.save_every, stage.keep_checkpoints) == (7, 5)
    assert stage_config(Config(model="toy"), whole, Path("own"), "other").model == "other"
    assert stage_config(Config(), whole, Path("own"), None, seed=9).seed == 9
    toy_whole = replace(whole, model="toy")
    assert stage_config(Config(), toy_whole, Path("own"), None).model == "toy"
    assert stage_config(Config(), toy_whole, Path("own"), Path("first/model")).model == "first/model"


def test_stages_name_no_model_of_their_own():
    check_no_models(SimpleNamespace(first=Config(), second=Config(model="toy")), ["first", "second"])
    named = SimpleNamespace(first=Config(), second=Config(model="org/model"))
    with pytest.raises(ValueError, match="second names a model"):
        check_no_models(named, ["first", "second"])


def test_a_run_starts_from_the_model_that_is_named(config, run, monkeypatch):
    made = []
    monkeypatch.setattr(setup, "make_toy_model", lambda folder, toy, report: (made.append(toy), folder.mkdir()))
    assert start_model(replace(config, model="org/model"), run, seed=3) == "org/model"
    assert not made
    toy = replace(config, model="toy", toy=ToyConfig(hidden_size=64))
    for _ in range(2):  # the second time it is there
        assert start_model(toy, run, seed=3) == str(run.folder / "toy_model")
    assert made == [ToyConfig(hidden_size=64, seed=3)]
    with pytest.raises(ValueError, match="model: no model is named; pass --model, or choose a preset"):
        start_model(config, run, seed=3)


def test_a_script_runs_as_a_command_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["r1.py", "--plain"])
    script = tmp_path / "script.py"
    said = tmp_path / "said.json"
    script.write_text(f"""
import json, os, pathlib, sys
if __name__ == "__main__":
    pathlib.Path({str(said)!r}).write_text(json.dumps([os.getpid(), *sys.argv]))
    sys.exit(int(sys.argv[1]))
""")
    for status in (0, 2, 75, 130):
        assert run_script(script, [str(status), "--config", "a b.json"]) == status
        assert json.loads(said.read_text()) == [os.getpid(), str(script), str(status), "--config", "a b.json"]
    assert sys.argv == ["r1.py", "--plain"]
    monkeypatch.setattr(sys, "argv", ["r1.py", "--debug"])  # for the stages too
    assert run_script(script, ["0"]) == 0
    assert json.loads(said.read_text())[2:] == ["0", "--debug"]
    script.write_text("import sys; sys.exit('a message')")
    assert run_script(script, []) == 1
    script.write_text("")
    assert run_script(script, []) == 0


def test_the_command_of_a_stage_reads_its_settings_from_a_file(tmp_path, capsys):
    folder = tmp_path / "the whole" / "round" / "1"
    config = SFTConfig(run_dir=folder, packing=False, trackers=("wandb",), toy=ToyConfig(hidden_size=64))
    stage = Stage(tmp_path / "sft.py", config)
    python, path, flag, file = shlex.split(stage.command)
    assert (python, path, flag, file) == ("python", str(stage.script), "--config", f"{folder}.json")
    stage.script.write_text("import sys; sys.exit(2)")
    assert stage.run() == 2
    assert with_settings(SFTConfig(), read_settings_file(Path(file)), file) == config
    assert capsys.readouterr().err == f"the stage in {folder} failed: {stage.command}\n"


def test_stages_start_from_a_named_model(tmp_path):
    stage = Stage(Path("sft.py"), SFTConfig(run_dir=tmp_path))
    with pytest.raises(ValueError, match="model: no model is named"):
        check_models([stage])
    check_models([replace(stage, config=replace(stage.config, model="toy"))])
    made = str(tmp_path / "model")  # in the folder of a stage
    check_models([replace(stage, config=replace(stage.config, model=made))])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        check_models([replace(stage, config=replace(stage.config, model=str(tmp_path.with_name("nowhere"))))])


def test_lengths_fit_the_positions_of_the_model_unless_both_are_set(tmp_path):
    def in_effect(positions, prompt=None, completion=None):
        folder = tmp_path / str(positions)
        folder.mkdir(exist_ok=True)
        named = {} if positions is None else {"max_position_embeddings": positions}
        (folder / "config.json").write_text(json.dumps(named))
        settings = PolicyConfig(model=str(folder), max_prompt_length=prompt, max_completion_length=completion)
        return settings.prompt_length, settings.completion_length

    assert in_effect(None) == in_effect(1536) == in_effect(32768) == (512, 1024)
    assert in_effect(512) == (170, 342)
    assert in_effect(2) == (1, 1)
    assert in_effect(512, prompt=100) == (100, 412)
    assert in_effect(512, completion=100) == (412, 100)
    assert in_effect(4096, prompt=2000) == (2000, 1024)
    assert in_effect(512, 256, 256) == (256, 256)
    sum_of = r"max_prompt_length \+ max_completion_length is"
    for lengths, total in (((257, 256), 513), ((600, None), 1624), ((None, 512), 1024)):
        with pytest.raises(ValueError, match=f"{sum_of} {total}, and the model has 512 positions; lower one of them"):
            in_effect(512, *lengths)
    toy = PolicyConfig(model="toy")
    assert toy.prompt_length + toy.completion_length == toy.positions == 128
    assert (toy.prompt_length, toy.completion_length) == (42, 86)
    with pytest.raises(ValueError, match="and the model has 128 positions"):
        PolicyConfig(model="toy", max_completion_length=128)
    none = PolicyConfig()
    assert (none.prompt_length, none.completion_length, none.positions) == (512, 1024, None)
    unknown = PolicyConfig(model=str(tmp_path / "made" / "later"))  # by an earlier stage
    assert (unknown.prompt_length, unknown.completion_length) == (512, 1024)

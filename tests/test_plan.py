"""Plans of runs: their programs, memory by kind, times and meshes, by the CPU's compiler and hand-made figures."""

import json
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from experiments import plan as script
from grpo_jax import devices
from grpo_jax.config import speeds
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.memory import memory_limit
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.speeds import Rates, Speed, capacity_of, fewest_links, rates_of
from grpo_jax.data.prompts import pad_prompts
from grpo_jax.devices import planning_for
from grpo_jax.loop import plan_report, plan_search, topologies
from grpo_jax.loop.flags import flags_of
from grpo_jax.loop.kernel_work import computed_pairs, kernel_flops
from grpo_jax.loop.plan import Phase, Plan
from grpo_jax.loop.planned_model import Lengths, planned_model, spread
from grpo_jax.loop.planned_rollout import layers_to_compile, plan_rollout, schedule
from grpo_jax.loop.roofline import Measured, extrapolated
from grpo_jax.loop.topologies import topology_devices
from grpo_jax.models import from_hf_config, param_shapes
from grpo_jax.rollout import Sampler
from grpo_jax.rollout.buckets import STEPS, chunk_lengths, make_buckets
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import make_mesh

SMALL = ["--toy.hidden-size", "32", "--toy.num-layers", "1", "--num-prompts", "4"]
RATES = Rates(compute=100.0, memory=10.0, wire=1.0)
WEIGHTS = "weights"


def planned(args, capsys):
    """The JSON line of a plan, and what it said."""
    assert script.command(args) == 0
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_lengths_are_spread_around_their_mean():
    for mean, most in ((10, 100), (70, 100), (100, 100)):
        lengths = spread(mean, most, 1000)
        assert lengths.mean() == pytest.approx(mean, abs=0.5)
        assert lengths.min() >= 1
        assert lengths.max() <= most
    assert (spread(100, 100, 5) == 100).all()
    assert len(set(spread(10, 100, 1000))) == 19  # as widely as the mean allows


def test_a_schedule_is_that_of_the_sampler(tiny):
    model, params = tiny
    N, G, T = 32, 8, 100
    rng, stats = np.random.default_rng(0), []
    sampler = Sampler(
        model,
        Sampling(),
        group_size=G,
        max_completion_length=T,
        eos_ids=(5,),
        pad_id=0,
        report=stats.append,
        ahead=0,
    )
    ids = [rng.integers(1, 31, rng.integers(1, 7)).tolist() for _ in range(N)]
    prompts = pad_prompts(ids, max_prompt_length=6, pad_id=0, index=range(N))
    lengths = np.asarray(sampler(params, prompts, jax.random.key(0)).completion_mask.sum(1))
    buckets = make_buckets(N, N * G, G)
    segments = schedule(lengths[None], buckets, chunk_lengths(T), T)
    assert len({each.bucket for each in segments}) > 2  # batches were made smaller
    assert sum(each.dispatches for each in segments) == stats[0].dispatches
    assert sum(each.dispatches * STEPS * buckets[each.bucket].rows for each in segments) == stats[0].row_steps


def test_settings_are_those_of_the_planned_devices(small):
    config = GRPOConfig(model=small, max_prompt_length=4, max_completion_length=8)
    assert devices.planned() is None
    with planning_for(jax.devices()[:4], 10**9):
        assert config.mesh.build().size == len(devices.all_devices()) == 4
        assert memory_limit() == 10**9
        assert config.compute_dtype == jnp.float32
        assert devices.first_device() == jax.devices()[0]
        assert devices.platform() == "cpu"
    assert config.mesh.build().size == len(jax.devices())
    assert devices.planned() is None


# Work and time -------------------------------------------------------------------------------------------------------


def test_an_extrapolated_program_is_linear_in_its_layers():
    small = Measured(flops=10, traffic=4, collectives={"all-reduce": 2}, temporary=5, seconds=1)
    large = Measured(flops=16, traffic=6, collectives={"all-gather": 4}, runs={("all-gather", 4): 2}, seconds=2)
    found = extrapolated(small, large, (2, 4), 8)
    assert (found.flops, found.traffic, found.temporary, found.seconds) == (28, 10, 0, 3)
    assert found.collectives == {"all-reduce": 0, "all-gather": 12}
    assert found.runs == {("all-gather", 4): 6}


def test_layers_are_compiled_in_whole_periods():
    config = from_hf_config({**TINY, "num_hidden_layers": 12})
    assert layers_to_compile(config) == (2, 4)
    assert layers_to_compile(replace(config, num_layers=4, windows=(None,) * 4, ropes=config.ropes[:4])) is None
    assert layers_to_compile(replace(config, windows=(8, 8, None) * 4)) == (3, 6)
    assert layers_to_compile(replace(config, windows=tuple(range(1, 13)))) is None  # nothing repeats


def test_kernels_multiply_the_pairs_of_whole_blocks():
    config = from_hf_config(TINY)
    one, split = (make_mesh(data=1, context=n) for n in (1, 2))
    pairs = {
        ("cudnn", 1280, None, one, False): 55 * 128**2,  # of 10 x 10 blocks
        ("cudnn", 1280, None, one, True): 1280**2,
        ("cudnn", 1280, None, split, False): 1280**2,
        ("splash", 1280, None, one, False): 6 * 512**2,  # with padding of 256 tokens
        ("splash", 2048, None, split, True): 10 * 512**2,  # two blocks a device
        ("splash", 2048, 513, one, False): 7 * 512**2,  # a block of queries and the one before it
        ("splash", 2048, 514, one, False): 9 * 512**2,
    }
    for (kernel, length, window, mesh, is_masked), count in pairs.items():
        assert computed_pairs(kernel, length, window, mesh, is_masked=is_masked) == count
    half = config.num_layers * config.num_heads * config.head_dim * 6 * 512**2 * 3 * 2 // 2  # of three rows on two
    for kernel, products in (
        ("splash", {None: 2, "none": 9, "block": 11}),
        ("cudnn", {None: 2, "none": 7, "block": 9}),
    ):
        for remat, count in products.items():
            length = 1280 if kernel == "splash" else 10  # one block
            found = kernel_flops(kernel, config, make_mesh(data=2), rows=3, length=length, remat=remat)
            assert found == count * half * (1 if kernel == "splash" else 128**2 / (6 * 512**2))
    assert kernel_flops(None, config, one, rows=3, length=10, remat=None) == 0


def test_a_phase_adds_up_its_programs():
    short, long = Measured(flops=100, traffic=20, wire=1), Measured(flops=300, traffic=10, wire=5)
    phase = Phase("decode", {"a": (short, 2), "b": (long, 1)}, {WEIGHTS: 3.0, "activations": 4.0})
    seconds = phase.seconds(RATES)
    assert seconds == {"compute": 5, "memory": 5, "wire": 7, "longest": 2 * 2 + 5, "sum": 17}
    assert phase.held == 7
    assert phase.fits(7)
    assert phase.fits(None)
    assert not phase.fits(6)
    refused = replace(phase, refused=20.0)
    assert refused.held == 20
    assert not refused.fits(100)
    assert replace(phase, refused=float("nan")).held == 7


def make(seconds, **changes):
    """A plan of one update whose products take some seconds."""
    phase = Phase("update", {"update": (Measured(flops=100 * seconds, wire=0.5 * seconds), 1)}, {WEIGHTS: 5.0})
    plan = Plan({"data": 1, "fsdp": 2, "tensor": 1}, 1, 1, [phase], 10.0, RATES, 30, 80.0 * seconds, 36)
    return replace(plan, **changes)


def test_a_plan_gives_rates_hours_and_price():
    plan = make(2)
    assert plan.seconds() == {"compute": 2, "memory": 0, "wire": 1, "longest": 2, "sum": 3}
    assert plan.bound == "compute"
    report = plan_report.to_json(plan, price=50.0)
    assert report["tokens_per_second"] == {"longest": 15, "sum": 10}
    assert report["mfu_of_updates"]["longest"] == pytest.approx(160 / (2 * 2 * 100))
    assert report["hours"] == {"longest": 0.02, "sum": pytest.approx(0.03)}
    assert report["price"]["longest"] == pytest.approx(0.02 * 50 * 2)
    assert json.loads(json.dumps(report))["fits"]
    facts = dict(plan_report.facts_of(plan, price=50.0, device="chip", length="all"))
    assert facts["the run"] == "0.02 to 0.03 hours for 36 steps, 2 to 3 at 50 an hour for each of 2 devices"
    assert facts["verdict"].startswith("fits: ")
    untimed = replace(plan, rates=None)
    assert "seconds" not in plan_report.to_json(untimed, price=None)
    with pytest.raises(ValueError, match="the time of a step is not known"):
        untimed.seconds()


def test_plans_that_fit_come_first_then_fast_ones():
    slow, fast, large = make(3), make(1), make(0.5, capacity=1.0)
    assert plan_report.best_first([large, slow, fast]) == [fast, slow, large]


def test_what_the_compiler_refuses_does_not_fit():
    plan = make(1)
    plan = replace(plan, phases=[replace(plan.phases[0], refused=4e10)], capacity=1.6e10)
    report = plan_report.to_json(plan, price=None)
    assert not report["fits"]
    assert report["device_bytes"] == 4e10
    assert "seconds" not in report
    sentence = dict(plan_report.facts_of(plan, price=None, device="chip", length="all"))["verdict"]
    assert sentence == ("does not fit: 40.0 of the 16.0 GB of chip; too large: update (the compiler refuses update)")


# Devices -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:", "v5e:2xa", "h100:0", "8", "cpu:2x2", "cpu:100000"])
def test_a_topology_that_is_not_known_is_refused(name):
    with pytest.raises(ValueError, match=f"topology is {name}: "):
        topology_devices(name)


def test_the_cores_of_a_v4_chip_are_one_device(monkeypatch):
    asked = {}

    def described(platform, topology_name, **options):
        asked[topology_name] = options
        return SimpleNamespace(devices=[])

    monkeypatch.setattr(topologies, "find_spec", lambda name: name)
    monkeypatch.setattr(topologies.topologies, "get_topology_desc", described)
    for name in ("v4:2x2x1", "v5p:2x2x1"):
        topology_devices(name)
    assert asked == {"v4:2x2x1": {"chip_config_name": "megacore"}, "v5p:2x2x1": {}}


def test_a_compiler_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(topologies, "find_spec", lambda name: None)
    for name, extra in (("v5e:4x4", "tpu"), ("h100:8", "cuda13")):
        with pytest.raises(ValueError, match=rf"topology is {name}: .* pip install 'grpo_jax\[{extra}\]'"):
            topology_devices(name)


class Chip:
    platform, coords = "gpu", (0, 0, 0)

    def __init__(self, kind, process_index=0):
        self.device_kind, self.process_index = kind, process_index


def test_gpus_of_several_hosts_send_over_the_network():
    one = rates_of([Chip("NVIDIA H100 80GB HBM3")] * 2)
    several = rates_of([Chip("NVIDIA H100 80GB HBM3", host) for host in range(2)])
    assert one.wire == 9 * several.wire == 450e9
    assert (rates_of([Chip("cpu")]), capacity_of([Chip("cpu")])) == (None, None)
    assert all(rates_of([Chip(kind)]) is not None for kind in speeds.SPEEDS)


def test_a_slice_sends_over_the_links_that_its_corners_have():
    def links(*extents):
        return fewest_links(list(np.ndindex(*extents)), 2 if len(extents) == 2 or extents[2] == 1 else 3)

    found = {extents: links(*extents) for extents in ((1, 1), (2, 4), (16, 16, 1), (8, 16, 1))}
    assert found == {(1, 1): 1, (2, 4): 2, (16, 16, 1): 4, (8, 16, 1): 3}
    assert [links(*extents) for extents in ((2, 2, 4), (4, 4, 4), (4, 4, 16), (2, 2, 16))] == [3, 6, 6, 3]
    assert rates_of([Chip("TPU v5")]) == Rates(459e12, 2765e9, 90e9, 1e-6, 3, 90e9)


def test_latency_of_collectives():
    torus, switch = Rates(1, 1, 1, 1e-6, 2), Rates(1, 1, 1, 3e-6)
    assert torus.latency_of("all-gather", 16) == pytest.approx(6e-6)  # to the far corner of 4 x 4
    assert torus.latency_of("all-reduce", 16) == pytest.approx(12e-6)
    assert torus.latency_of("collective-permute", 2) == 1e-6
    assert switch.latency_of("all-reduce", 8) == 6e-6
    assert torus.latency_of("all-reduce", 1) == switch.latency_of("all-reduce", 1) == 0
    measured = Measured(wire=2, runs={("all-reduce", 16): 5, ("all-gather", 16): 1})
    assert measured.times(torus)["wire"] == pytest.approx(2 + 66e-6)


# Meshes --------------------------------------------------------------------------------------------------------------


def test_meshes_of_the_command_line():
    with planning_for(jax.devices()[:4], None):
        assert plan_search.read_meshes(["fsdp=2,tensor=2", "data=2,fsdp=2,rollout-tensor=2"], 4) == [
            MeshConfig(fsdp=2, tensor=2),
            MeshConfig(data=2, fsdp=2, rollout_tensor=2),
        ]
        for text, message in (
            ("fsdp", "a mesh is written as"),
            ("pipeline=2", "a mesh is written as"),
            ("fsdp=0", "a mesh is written as"),
            ("data=1,fsdp=2", "takes 2 of the 4 devices"),
            ("fsdp=3", "does not divide the 4 devices"),
        ):
            with pytest.raises(ValueError, match=message):
                plan_search.read_meshes([text], 4)


def test_a_mesh_may_split_an_axis_of_a_slice(monkeypatch):
    def make_mesh(*args, **kwargs):
        raise NotImplementedError("4x4x4")

    monkeypatch.setattr(jax, "make_mesh", make_mesh)
    assert MeshConfig(data=1, fsdp=8).build().shape == {"data": 1, "fsdp": 8, "expert": 1, "context": 1, "tensor": 1}


def test_meshes_are_ranked_by_what_they_send_and_what_fits(small):
    config = GRPOConfig(model=small, num_prompts=4, group_size=2, max_prompt_length=4, max_completion_length=8)
    with planning_for(jax.devices()[:4], None):
        ranked = plan_search.rank_meshes(config, 4, limit=None, rates=None)
        sizes = {(each.mesh.data, each.mesh.fsdp, each.mesh.tensor) for each in ranked}
        assert sizes == {(4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2)}  # 2 KV heads
        assert {each.mesh.rollout_tensor for each in ranked if each.mesh.tensor == 1} == {1, 2}
        assert {each.mesh.rollout_tensor for each in ranked if each.mesh.tensor == 2} == {2}
        assert [each.seconds for each in ranked] == sorted(each.seconds for each in ranked)
        state = 12 * sum(x.size for x in jax.tree.leaves(param_shapes(config.decoder)))
    with planning_for(jax.devices()[:4], state):
        ranked = plan_search.rank_meshes(config, 4, limit=state, rates=None)
        assert not any(each.fits for each in ranked if each.mesh.data == 4)
        assert [each.fits for each in ranked] == sorted((each.fits for each in ranked), reverse=True)
    five = pytest.raises(ValueError, match="no mesh of 5 devices suits the run: ")
    with planning_for(jax.devices()[:5], None), five:
        plan_search.rank_meshes(config, 5, limit=None, rates=None)


def test_meshes_that_split_sequences_are_ranked_where_these_are_long(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "max_position_embeddings": 8192}))
    lengths: Any = {"max_prompt_length": 32, "max_completion_length": 8160}
    config = GRPOConfig(model=str(tmp_path), num_prompts=2, group_size=2, **lengths)
    with planning_for(jax.devices()[:4], None):
        ranked = plan_search.rank_meshes(config, 4, limit=None, rates=None)
        sizes = {(each.mesh.data, each.mesh.fsdp, each.mesh.context, each.mesh.tensor) for each in ranked}
        # Two prompts divide over at most two devices; the sampler's 4 completions over all.
        assert sizes == {(2, 1, 1, 2), (1, 2, 1, 2), (2, 1, 2, 1), (1, 2, 2, 1), (1, 1, 4, 1), (1, 1, 2, 2)}
        short = replace(config, max_completion_length=4000)
        assert {each.mesh.context for each in plan_search.rank_meshes(short, 4, limit=None, rates=None)} == {1}
    odd = replace(config, num_prompts=1, group_size=3)
    with planning_for(jax.devices()[:4], None), pytest.raises(ValueError, match="no mesh of 4 devices suits"):
        plan_search.rank_meshes(odd, 4, limit=None, rates=None)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_plan_and_the_experiments_share_no_flag():
    own = {flag.flag for flag in flags_of(script.PlanConfig)}
    for kind in script.EXPERIMENTS.values():
        assert not own & {flag.flag for flag in flags_of(kind)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--topology", "cpu:4"], "error: no experiment is named; the first argument must be one of dpo, grpo, "),
        (
            ["rlhf", "--topology", "cpu:4"],
            "error: 'rlhf' is not an experiment; the first argument must be one of dpo, grpo, ",
        ),
        (["grpo", "--topology", "v9:2"], "error: --topology is v9:2: it must be one of v4:2x2x4, "),
        (["grpo", "--topology", "v5p:4x4"], "error: --topology is v5p:4x4: a slice of v5p has 3 axes, as in v5p:2x2x4"),
        (["grpo", "nonsense", "--topology", "cpu:4"], "error: there is no preset 'nonsense'"),
        (["grpo", "--topology", "cpu:4", "--num-prompts", "0"], "error: --num-prompts is 0; it must be at least 1"),
        (["grpo", "--topology", "cpu:4", "--price=-1"], "error: --price is -1.0; it must be at least 0"),
        (["grpo", "--topology", "cpu:4", "--mesh.fsdp", "3"], "does not divide the 4 devices"),
        (["grpo", "--topology", "cpu:4", "--mesh.tensor", "8"], "does not divide the 4 devices"),
        (
            ["grpo", "--topology", "cpu:4", "--meshes", "rollout_tensor=3"],
            "--mesh.rollout-tensor is 3; it must be a multiple",
        ),
        (["grpo", "--topology", "cpu:4", "--meshes", "a=1"], "error: --meshes has a=1; a mesh is written as"),
        (["grpo", "--topology", "cpu:4", "--meshes", "fsdp=4", "--mesh.fsdp", "4"], "name one of them"),
        (
            ["grpo", "toy", "--topology", "cpu:4", "--num-prompts", "6", "--mesh.fsdp", "4"],
            "--num-prompts: 6 do not divide",
        ),
        (["grpo", "--topology", "cpu:4", "--mean-completion-length", "100"], "--max-completion-length is 48"),
        (["sft", "--topology", "cpu:4", "--mean-completion-length", "10"], "trains on rows"),
        (
            ["grpo", "--topology", "cpu:4", "--model-config", "no.json"],
            "error: --model-config: the file no.json does not exist",
        ),
        (["grpo", "--topology", "cpu:4", "--model", "no/folder"], "whose config.json cannot be read; pass the file"),
        (["grpo", "--topology", "cpu:4", "--distributed.auto", "true"], "a plan is made by one"),
        (["grpo", "--topology", "cpu:4", "--picture", "no/folder/plan.png"], "the folder no/folder does not exist"),
        (
            ["grpo", "--topology", "cpu:4", "--mesh.data", "2", "--staleness", "1", "--rollout-mesh", "2"],
            "error: --rollout-mesh is 2; plans are of devices that sample and train in turn: leave it out",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_mistakes_are_said_before_anything_is_compiled(args, message, capsys, monkeypatch):
    monkeypatch.setattr("jax.stages.Lowered.compile", None)
    assert script.command(args) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_unknown_flag_is_refused(capsys):
    with pytest.raises(SystemExit):
        script.command(["grpo", "--topology", "cpu:4", "--no-such-flag", "1"])
    assert "--no-such-flag" in capsys.readouterr().err


def test_a_plan_of_grpo(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(speeds.SPEEDS, "cpu", Speed(1e11, 1e10, 1e9))
    monkeypatch.setattr(speeds, "peak_flops", lambda kind: 1e12)
    picture, output = tmp_path / "plan.png", tmp_path / "plan.json"
    args = ["grpo", "toy", "--topology", "cpu:4", *SMALL, "--kl-coef", "0.1", "--price", "2", "--meshes", "fsdp=4"]
    report, said = planned([*args, "--picture", str(picture), "--output", str(output)], capsys)
    assert json.loads(output.read_text()) == report
    assert picture.stat().st_size > 10_000
    (found,) = report["meshes"]
    assert found["mesh"] == {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    names = [phase["name"] for phase in found["phases"]]
    assert names == ["reshard", "prefill", "decode", "log-probs (reference)", "update"]
    kinds = {phase["name"]: phase["bytes_by_kind"] for phase in found["phases"]}
    toy = from_hf_config(
        {**script.SCRIPTS["grpo"]["toy"].config().toy.hf_config}
        | {"hidden_size": 32}
        | {"intermediate_size": 64, "num_hidden_layers": 1}
    )
    leaves = jax.tree.leaves(param_shapes(toy))
    matrices, vectors = (4 * sum(x.size for x in leaves if (x.ndim > 1) == is_matrix) for is_matrix in (True, False))
    weights = matrices / 4 + vectors  # vectors are replicated
    update = kinds["update"]
    assert update["weights"] == update["reference"] == update["gradients"] == weights
    assert 2 * weights <= update["optimizer"] < 2 * weights + 64  # two moments and counters
    assert kinds["decode"]["rollout weights"] == matrices + vectors
    assert "rollout weights" not in update
    assert "gradients" not in kinds["decode"]
    decode = next(phase for phase in found["phases"] if phase["name"] == "decode")
    assert sum(each["times"] for each in decode["programs"].values()) == 48 / STEPS
    seconds = found["seconds"]
    assert max(seconds[name] for name in ("compute", "memory", "wire")) <= seconds["longest"] <= seconds["sum"]
    update = next(phase for phase in found["phases"] if phase["name"] == "update")
    switch = 3e-6 * (update["num_collectives"] + sum(kind == "all-reduce" for kind in update["collective_bytes"]))
    assert switch <= update["latency_seconds"] <= 2 * 3e-6 * update["num_collectives"]
    assert found["price"]["sum"] == pytest.approx(found["hours"]["sum"] * 2 * 4)
    assert found["fits"]
    for text in ("memory by kind", "time of a step", "reference", "not measured", "4 prompts x 16"):
        assert text in said


def test_the_rest_of_a_group_that_ends_early_is_decoded_in_smaller_batches(capsys):
    args = ["grpo", "toy", "--topology", "cpu:1", *SMALL, "--mean-completion-length", "12"]
    report, _ = planned(args, capsys)
    (found,) = report["meshes"]
    decode = next(phase for phase in found["phases"] if phase["name"] == "decode")
    assert found["tokens_per_step"] == pytest.approx(4 * 16 * 12, rel=0.01)
    assert len(decode["programs"]) > 1
    assert sum(each["times"] for each in decode["programs"].values()) == 3  # at most 23 tokens
    assert "reshard" not in [phase["name"] for phase in found["phases"]]  # one device samples with what it trains


@pytest.mark.slow
@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["ppo"], ["prefill", "decode", "log-probs (old, reference)", "values", "critic update", "update"]),
        (["ppo", "--critic", "head"], ["prefill", "decode", "log-probs and values", "update"]),
        (["sft", "--num-sequences", "4"], ["update"]),
        (["dpo", "--num-pairs", "4"], ["reference (once)", "update"]),
        (["reward_model", "--num-pairs", "4"], ["update"]),
        (["grpo", "--num-prompts", "4", "--num-epochs", "2"], ["prefill", "decode", "log-probs (old)", "update"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_every_experiment_has_a_plan(args, names, capsys):
    sizes = ["--toy.hidden-size", "32", "--toy.num-layers", "1"]
    if args[0] == "ppo":
        sizes += ["--num-prompts", "8", "--accuracy-weight", "1"]
    report, _ = planned([args[0], "toy", "--topology", "cpu:1", *args[1:], *sizes], capsys)
    (found,) = report["meshes"]
    assert [phase["name"] for phase in found["phases"]] == names
    assert all(each["flops"] > 0 for phase in found["phases"] for each in phase["programs"].values())


@pytest.mark.slow
def test_unrolled_layers_are_extrapolated_to_what_all_of_them_take(small, monkeypatch):
    config = GRPOConfig(num_prompts=2, group_size=2, max_prompt_length=4, max_completion_length=8, model=small)
    decoder = from_hf_config({**TINY, "num_hidden_layers": 6})
    with planning_for(jax.devices()[:2], None):
        config = replace(config, mesh=MeshConfig(fsdp=2))
        mesh, lengths = config.mesh.build(), Lengths(np.full(2, 4), np.full(4, 8))
        policy = planned_model(config, decoder, mesh)
        short = plan_rollout(config, policy, mesh, lengths, None)
        monkeypatch.setattr("grpo_jax.loop.planned_rollout.layers_to_compile", lambda decoder: None)
        whole = plan_rollout(config, policy, mesh, lengths, None)
    assert (short.layers, whole.layers) == ((2, 4), None)
    assert short.weights == whole.weights > 0
    assert short.times == whole.times
    for name, program in whole.programs.items():
        for quantity, within in (("flops", 1e-6), ("wire", 0.02), ("traffic", 0.1), ("arguments", 0.01)):
            found, wanted = (getattr(each, quantity) for each in (short.programs[name], program))
            assert found == pytest.approx(wanted, rel=within), (name, quantity)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("libtpu") is None, reason="the TPU compiler is not installed")
def test_a_plan_by_the_tpu_compiler(small, capsys):
    args = ["sft", "--model", small, "--topology", "v5e:2x2", "--mesh.fsdp", "4", "--num-sequences", "8"]
    report, _ = planned([*args, "--max-length", "128", "--dataset", "rows.jsonl"], capsys)
    (found,) = report["meshes"]
    assert found["fits"]
    assert found["capacity_bytes"] == 16e9
    assert found["seconds"]["sum"] > 0

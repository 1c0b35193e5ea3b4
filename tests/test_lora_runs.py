"""Whole runs that train LoRA adapters, of every method, on tiny shapes."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from experiments import dpo, grpo, ppo, reward_model, sft
from grpo_jax.config.data import DataConfig
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.offline import DemonstrationConfig, PreferenceConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.config.training import OptimizerConfig, PolicyLossConfig
from grpo_jax.loop.command import run_command
from grpo_jax.loop.setup import load_policy, rollout_layout
from grpo_jax.models import LoRA
from grpo_jax.tasks.demonstrations import errand_preferences, worked_sums
from tests.runs import kill_in_second_save, metrics_of, steps_of, write_rows

LORA = LoRA(rank=2)


def shared(folder, model, **settings):
    return {
        "model": model,
        "run_dir": folder / "run",
        "lora": LORA,
        "max_prompt_length": 12,
        "max_completion_length": 8,
        "save_every": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_updates=1),
        "mesh": MeshConfig(data=1),
        "plain": True,
        **settings,
    }


def online(folder, model):
    data = DataConfig(dataset="sums", template="{question}", eval_size=4)
    sizes = {"num_steps": 2, "num_prompts": 4, "group_size": 4, "eval_samples": 2}
    rewards = RewardConfig(accuracy_weight=0.0, reward=("tests.batch_rewards:brevity",))
    return shared(folder, model, data=data, rewards=rewards, **sizes)


def errands(folder):
    pairs = errand_preferences(np.random.default_rng(0), 20, held_out=False)
    rows = [{"prompt": each.prompt, "chosen": each.chosen, "rejected": each.rejected} for each in pairs]
    return PreferenceConfig(dataset=write_rows(folder / "errands.jsonl", rows), template="{question}")


def adapters_and_model(config):
    files = ("adapter/adapter_model.safetensors", "model/model.safetensors")
    return tuple(load_file(config.run_dir / name) for name in files)


def checkpointed(config):
    metadata = next((config.run_dir / "checkpoints").glob("*/state/_METADATA"))
    return metadata.read_text()


def check_exported(config, base):
    """The exported model is the base with the adapters added, and nothing else changed."""
    adapters, model = adapters_and_model(config)
    start = load_file(f"{base}/model.safetensors")
    changed = {name for name in start if not np.array_equal(start[name], model[name])}
    prefix = "base_model.model."
    assert changed == {name.removeprefix(prefix).replace("lora_A.", "") for name in adapters if "lora_A" in name}
    for name in changed:
        stem = prefix + name.removesuffix("weight")
        moved = LORA.scale * adapters[f"{stem}lora_B.weight"] @ adapters[f"{stem}lora_A.weight"]
        np.testing.assert_allclose(model[name], start[name] + moved, atol=1e-5)
    assert "kernel_lora_a" in checkpointed(config)
    assert "embedding" not in checkpointed(config)


@pytest.mark.slow
def test_grpo_with_a_reference_resumes_bit_for_bit(small, tmp_path, monkeypatch):
    policy = PolicyLossConfig(kl_coef=0.1)
    config = GRPOConfig(**online(tmp_path, small), policy=policy, ref_refresh_every=1)
    assert grpo.main(config) == 0
    check_exported(config, small)
    gaps = [row["sampling/sampling_logp_difference/max"] for row in steps_of(config)]
    assert max(gaps) <= 1e-5
    broken = replace(config, run_dir=tmp_path / "broken")
    kill_in_second_save(grpo.main, broken, monkeypatch)
    assert grpo.main(broken) == 0
    assert metrics_of(broken) == metrics_of(config)
    for name in ("adapter/adapter_model.safetensors", "model/model.safetensors"):
        assert (broken.run_dir / name).read_bytes() == (config.run_dir / name).read_bytes(), name


def test_sft_resumes_bit_for_bit(small, tmp_path, monkeypatch):
    rows = [
        {"prompt": each.prompt, "completion": each.completion, **each.columns}
        for each in worked_sums(np.random.default_rng(0), 20, held_out=False)
    ]
    data = DemonstrationConfig(dataset=write_rows(tmp_path / "sums.jsonl", rows), template="{question}")
    sizes = {"num_epochs": 1, "num_sequences": 4, "max_length": 64, "num_eval_prompts": 0}
    config = SFTConfig(**shared(tmp_path, small, data=data, **sizes))
    assert sft.main(config) == 0
    check_exported(config, small)
    broken = replace(config, run_dir=tmp_path / "broken")
    kill_in_second_save(sft.main, broken, monkeypatch)
    assert sft.main(broken) == 0
    assert metrics_of(broken) == metrics_of(config)


@pytest.mark.slow
def test_dpo_on_quantized_matrices(small, tmp_path):
    sizes = {"num_epochs": 1, "num_pairs": 9, "num_eval_prompts": 0}
    config = DPOConfig(**shared(tmp_path, small, data=errands(tmp_path), **sizes))
    config = replace(config, lora=replace(LORA, quantize="int8"))
    assert dpo.main(config) == 0
    steps = steps_of(config)
    assert len(steps) == 2
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)  # the reference is quantized like the policy
    assert steps[1]["loss"] < steps[0]["loss"]


def test_the_head_of_a_reward_model_is_trained_beside_adapters(small, tmp_path):
    config = RewardModelConfig(**shared(tmp_path, small, data=errands(tmp_path), num_epochs=1, num_pairs=9))
    assert reward_model.main(config) == 0
    adapters, model = adapters_and_model(config)
    head = adapters["base_model.model.score.weight"]
    assert head.any()
    np.testing.assert_array_equal(head, model["score.weight"])
    assert json.loads((config.run_dir / "adapter/adapter_config.json").read_text())["modules_to_save"] == ["score"]
    assert "score" in checkpointed(config)


@pytest.mark.slow
@pytest.mark.parametrize("critic", ["head", "model"])
def test_ppo_trains_its_critic_as_a_whole(small, tmp_path, critic):
    settings = online(tmp_path, small) | {"num_prompts": 16, "group_size": 1}
    config = PPOConfig(**settings, critic=critic, critic_optimizer=OptimizerConfig(learning_rate=1e-2))
    assert ppo.main(config) == 0
    assert len(steps_of(config)) == 2
    saved = [path for path in json.loads(checkpointed(config))["tree_metadata"] if "params" in path]
    assert any("kernel_lora_b" in path for path in saved)
    assert all("critic" in path for path in saved if "embedding" in path)
    assert any("embedding" in path for path in saved) == (critic == "model")
    assert any(repr("value") in path for path in saved) == (critic == "head")


@pytest.mark.slow
def test_grpo_on_a_mesh_as_on_one_device(small, tmp_path):
    norms = []
    for mesh in (MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)):
        settings = online(tmp_path / str(mesh.data), small) | {"mesh": mesh, "num_prompts": 8}
        config = GRPOConfig(**settings, policy=PolicyLossConfig(kl_coef=0.1))
        assert grpo.main(config) == 0
        norms.append([row["grad_norm"] for row in steps_of(config)])
    assert all(norm > 0 for norm in norms[0])
    np.testing.assert_allclose(*norms, rtol=1e-3)
    assert jax.device_count() == 8


def test_adapters_are_sampled_from_where_more_devices_share_the_heads(small, tmp_path):
    mesh = MeshConfig(data=1, fsdp=2, rollout_tensor=2)
    config = GRPOConfig(**online(tmp_path, small) | {"mesh": mesh})
    policy = load_policy(config, small, mesh.build(), lora=LORA)

    def move(path, x):
        return x + 0.1 if path[-1].key == "kernel_lora_b" else x

    params = jax.tree.map_with_path(move, policy.params)
    layout = rollout_layout(config, policy, mesh.build())
    assert layout.mesh.shape["tensor"] == 2
    ids = np.arange(12).reshape(2, 6)
    states = [
        np.asarray(jax.jit(model.apply)(tree, ids, np.tile(np.arange(6), (2, 1)))[0])
        for model, tree in (
            (policy.model, params),
            (policy.model, policy.params),
            (layout.model, layout.reshard(params)),
        )
    ]
    assert np.abs(states[0] - states[1]).max() > 0.01
    np.testing.assert_allclose(states[2], states[0], atol=1e-5)


def test_the_flags_of_qlora_are_taken_together():
    kept = []
    args = ["toy", "--lora.rank", "2", "--lora.quantize", "nf4", "--lora.targets", "mlp/up", "mlp/down"]
    assert run_command(GRPOConfig, kept.append, presets=grpo.PRESETS, description="", args=args) == 0
    assert kept[0].lora == LoRA(rank=2, quantize="nf4", targets=("mlp/up", "mlp/down"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--lora.rank", "65"], "--lora.rank is 65; it must be at most 64"),
        (["--lora.rank", "2", "--lora.targets", "q_proj"], "'q_proj' matches none of the matrices attention/q"),
        (["--lora.quantize", "int8"], "--lora.quantize is int8, but"),
        (["--lora.alpha", "64"], "--lora.alpha is 64.0, but --lora.rank is not set"),
        (["--lora.targets", "mlp/up", "mlp/down"], "--lora.targets is mlp/up mlp/down, but --lora.rank is not set"),
        (["--lora.rank", "2", "--lora.quantize", "int2"], "quantize is 'int2'; it must be"),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_the_toy_model_is_trained(args, message, tmp_path, capsys):
    run_dir = tmp_path / "run"
    given = [*args, "--run-dir", str(run_dir), "--plain"]
    assert run_command(GRPOConfig, grpo.main, presets=grpo.PRESETS, description="", args=["toy", *given]) != 0
    assert message in capsys.readouterr().err
    assert not run_dir.exists()

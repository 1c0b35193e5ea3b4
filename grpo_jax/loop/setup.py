"""Loading of the model that a run starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from grpo_jax import models
from grpo_jax.config.memory import choose_rollout_tensor
from grpo_jax.config.model import PROMPT_AND_COMPLETION, ModelConfig, PolicyConfig
from grpo_jax.config.offline import OfflineConfig
from grpo_jax.config.online import OnlineConfig
from grpo_jax.data.encoded import EncodedProblems
from grpo_jax.hosts import on_main
from grpo_jax.loop.checks import check_length
from grpo_jax.loop.layout_note import layout_note
from grpo_jax.loop.run import Run
from grpo_jax.loop.run_folder import device_summary
from grpo_jax.models.lora_config import LoRA
from grpo_jax.models.mesh_checks import check_rollout_tensor
from grpo_jax.rollout import Sampler
from grpo_jax.sharding import (
    ROLLOUT_RULES,
    make_reshard,
    param_shardings,
    replicated,
    rollout_mesh,
    rollout_steps,
)
from grpo_jax.tasks.toy_config import TOY, TOY_FOLDER, ToyConfig
from grpo_jax.tasks.toy_model import make_toy_model
from grpo_jax.train import init_state, trainable_part
from grpo_jax.types import Model, Params, Rollout, TrainState


def start_model(config: ModelConfig, run: Run, *, seed: int) -> str:
    """Folder or Hugging Face id of the model that a run starts from.

    The toy model is trained first, unless the run's folder has it already.

    Args:
        config: the model and the toy model's settings.
        run: its folder receives the toy model.
        seed: seed of the toy model.

    Raises:
        ValueError: no model is named.
    """
    model = named_model(config)
    return _train_toy_model(run, replace(config.toy, seed=seed)) if model == TOY else model


def named_model(config: ModelConfig) -> str:
    """``config.model``.

    Raises:
        ValueError: no model is named.
    """
    if config.model is None:
        raise ValueError("model: no model is named; pass --model, or choose a preset that has one")
    return config.model


def adapters_of(config: OnlineConfig | OfflineConfig) -> dict[str, Any]:
    """The arguments of ``load_model`` and ``load_policy`` for the model that a run trains: its LoRA adapters."""
    return {"lora": config.lora, "seed": config.seed}


def load_model(
    config: ModelConfig,
    name_or_folder: str,
    mesh: Mesh,
    *,
    scalar_head: bool = False,
    lora: LoRA | None = None,
    seed: int = 0,
) -> models.Pretrained:
    """A model in the run's precision, sharded over ``mesh``.

    Args:
        config: precision, rematerialization and attention kernel.
        name_or_folder: a Hugging Face id or local folder.
        mesh: the devices.
        scalar_head: replace the output embedding by a scalar head, with zero weights unless the checkpoint has one.
        lora: adapters to train in place of the model; None for none.
        seed: of the adapters.

    Raises:
        ValueError: the model has no tokenizer, or is a reward model although ``scalar_head`` is False; and as
            ``models.from_pretrained``.
    """
    loaded = models.from_pretrained(
        name_or_folder,
        dtype=config.compute_dtype,
        remat=config.remat,
        attention=config.attention,
        mesh=mesh,
        shardings=partial(param_shardings, mesh=mesh),
        scalar_head=scalar_head,
        rope_length=config.rope_length,
        lora=lora,
        seed=seed,
    )
    return checked_model(loaded, name_or_folder, scalar_head=scalar_head)


def load_policy(
    config: PolicyConfig, name_or_folder: str, mesh: Mesh, *, lora: LoRA | None = None, seed: int = 0
) -> models.Pretrained:
    """The model to sample from, with ``config.stop_tokens`` among the tokens that end a sequence.

    Args:
        config: settings of the policy.
        name_or_folder: the model, as for ``load_model``.
        mesh: mesh over which its parameters are sharded.
        lora: adapters to train in place of the model; None for none.
        seed: of the adapters.

    Raises:
        ValueError: as ``load_model`` and ``as_policy``.
    """
    return as_policy(config, load_model(config, name_or_folder, mesh, lora=lora, seed=seed))


def as_policy(config: PolicyConfig, model: models.Pretrained) -> models.Pretrained:
    """A model with ``config.stop_tokens`` among the tokens that end a sequence.

    Args:
        config: settings of the policy.
        model: the model.

    Raises:
        ValueError: a stop token that is not one token of the model, or lengths beyond the model's positions.
    """
    check_length(config.prompt_length + config.completion_length, model, PROMPT_AND_COMPLETION)
    return with_stop_tokens(model, config.stop_tokens)


def policy_state(
    config: OnlineConfig, params: Params, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """The state of a policy before the first update, with a reference policy if the run has one.

    Args:
        config: of the run.
        params: of the policy; the first update donates them.
        optimizer: of the updates.
        mesh: the devices.
    """
    return init_state(
        params,
        optimizer,
        with_reference=config.has_reference,
        replicated=replicated(mesh),
        ref_dtype=config.compute_dtype,
        offload=config.offload,
    )


@dataclass(frozen=True)
class RolloutLayout:
    """Devices and layout of sampling.

    Attributes:
        mesh: the devices, of which ``tensor`` share the model's heads.
        model: the policy's model on them.
        reshard: parameters as they are trained -> as they are sampled from, in the precision of the computation.
        where: the devices in words, if they do not train.
    """

    mesh: Mesh
    model: Model
    reshard: Callable[[Params], Params]
    where: str = ""

    @property
    def description(self) -> str:
        """The layout in a few words."""
        return f"{self.where}weights sharded over {self.mesh.shape['tensor']} devices (mesh.rollout_tensor)"


def rollout_layout(
    config: PolicyConfig, policy: models.Pretrained, mesh: Mesh, sampling: Mesh | None = None
) -> RolloutLayout:
    """The layout of sampling from a policy that is trained on a mesh, by ``config.mesh.rollout_tensor``.

    Args:
        config: settings of the policy.
        policy: the model, as of ``load_policy``.
        mesh: mesh of training.
        sampling: other devices of this process to sample on; None for those of training.

    Raises:
        ValueError: ``rollout_tensor`` suits neither the mesh nor the model.
    """
    tensor = choose_rollout_tensor(config, policy.config, mesh.shape)
    if sampling is not None:
        return _disjoint_layout(config, policy, sampling)
    check_rollout_tensor(policy.config, tensor)
    sampling, dtype = rollout_mesh(mesh, tensor), config.compute_dtype
    shardings = param_shardings(policy.params, sampling, ROLLOUT_RULES)
    if sampling is mesh:
        return RolloutLayout(mesh, policy.model, make_reshard(shardings, dtype))
    model = models.build_model(policy.config, mesh=sampling, dtype=dtype, attention=config.attention, lora=policy.lora)
    steps = [rollout_steps(policy.params, mesh, tensor)]
    return RolloutLayout(sampling, model, make_reshard(shardings, dtype, steps=steps))


def _disjoint_layout(config: PolicyConfig, policy: models.Pretrained, sampling: Mesh) -> RolloutLayout:
    """Weights are cast where they are trained, and copied in the sampler's layout from there."""
    dtype = config.compute_dtype
    shardings = param_shardings(policy.params, sampling, ROLLOUT_RULES)
    cast = make_reshard(jax.tree.map(lambda x: x.sharding, policy.params), dtype)
    model = models.build_model(policy.config, mesh=sampling, dtype=dtype, attention=config.attention, lora=policy.lora)

    def reshard(params: Params) -> Params:
        is_there = jax.tree.leaves(params)[0].sharding.device_set == set(sampling.devices.flat)
        return params if is_there else jax.device_put(cast(params), shardings)

    return RolloutLayout(sampling, model, reshard, f"{sampling.size} devices of its own (rollout_mesh), ")


def make_sampler(config: PolicyConfig, policy: models.Pretrained, layout: RolloutLayout, *, group_size: int) -> Sampler:
    """A sampler with the settings of a policy.

    Args:
        config: settings of the policy.
        policy: the model, as of ``load_policy``.
        layout: of ``rollout_layout``.
        group_size: completions of each prompt.
    """
    return Sampler(
        layout.model,
        config.sampling,
        group_size=group_size,
        max_completion_length=config.completion_length,
        eos_ids=policy.eos_ids,
        pad_id=policy.pad_id,
        cache_bytes=config.cache_bytes,
        cache_dtype=config.cache_dtype,
        mesh=layout.mesh,
        record_experts=True,
    )


def sample_all(sampler: Sampler, params: Params, problems: EncodedProblems, key: Array) -> Rollout:
    """Completions of all problems on the host, also where their number does not divide over the devices.

    The last problem is repeated then.

    Args:
        sampler: of the policy.
        params: in the sampler's layout.
        problems: at least one.
        key: random key.
    """
    count, group_size, devices = len(problems), sampler.limits.group_size, sampler.limits.devices
    more = next(n for n in range(devices) if (count + n) * group_size % devices == 0)
    prompts = problems.padded(range(count))
    if more:
        repeated = jax.tree.map(lambda x: np.pad(np.asarray(x), [(0, more)] + [(0, 0)] * (x.ndim - 1), "edge"), prompts)
        repeated.index[count:] = repeated.index[:count].max() + 1 + np.arange(more)
        prompts = jax.tree.map(jnp.asarray, repeated)
    rollout = sampler.on_host(params, prompts, key)
    return jax.tree.map(lambda x: x[: count * group_size], rollout) if more else rollout


def checked_model(model: models.Pretrained, name: str, *, scalar_head: bool = False) -> models.Pretrained:
    """``model``, after a check that it can be trained and sampled from.

    Args:
        model: a loaded model.
        name: its folder or id, for the error.
        scalar_head: whether it serves as a reward model or critic.

    Raises:
        ValueError: the model has no tokenizer, or is a reward model although ``scalar_head`` is False.
    """
    if model.config.scalar_head and not scalar_head:
        raise ValueError(f"{name} is a reward model: its head gives a score and no tokens; name a language model")
    if model.tokenizer is None:
        raise ValueError(f"{name} has no tokenizer; a folder with weights needs tokenizer.json too")
    return model


def with_stop_tokens(model: models.Pretrained, stop_tokens: Sequence[str]) -> models.Pretrained:
    """``model`` with ``stop_tokens`` added to the tokens that end a sequence.

    Args:
        model: a model with a tokenizer.
        stop_tokens: texts of single tokens, such as ``<|im_end|>``.

    Raises:
        ValueError: a text is not a single token, or its token has no row in the embedding.
    """
    if not stop_tokens:
        return model
    more = models.stop_ids(model.tokenizer, stop_tokens, model.config.vocab_size)
    return replace(model, eos_ids=tuple(dict.fromkeys([*model.eos_ids, *more])))


def _train_toy_model(run: Run, recipe: ToyConfig) -> str:
    """Folder of the toy model within the run's folder; trains the model if the folder does not exist."""
    folder = run.folder / TOY_FOLDER
    if not on_main(folder.exists, "looking for the toy model"):
        with run.progress.phase("toy model", recipe.steps) as phase:

            def report(step: int, row: dict[str, float]) -> None:
                phase.update(step, row if step % 50 == 0 else None)
                if jax.process_count() == 1:  # the others wait
                    run.stop_if_requested()

            make_toy_model(folder, recipe, report=report)
    return str(folder)


def model_facts(config: ModelConfig, start: str, model: models.Pretrained, mesh: Mesh) -> dict[str, str]:
    """Devices, precision, model and size, for the run's header.

    Args:
        config: settings of the model.
        start: folder or id that the model was loaded from.
        model: the model.
        mesh: the run's mesh.
    """
    count = sum(x.size for x in jax.tree.leaves(model.params))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if name != "context" or size > 1)
    weights = "weights in float32"
    if model.lora is not None:
        trained = sum(x.size for x in jax.tree.leaves(trainable_part(model.params)))
        frozen = model.lora.quantize or jnp.dtype(config.compute_dtype).name
        weights = f"frozen weights in {frozen}, {trained:,} trained in float32 (LoRA of rank {model.lora.rank})"
        count = sum(x.size for x in jax.tree.leaves(models.param_shapes(model.config)))
    layout = layout_note(model, mesh)
    return {
        "devices": f"{device_summary()}, of them in use {mesh.size} (mesh: {axes})",
        **({"layout": layout} if layout else {}),
        "precision": f"{jnp.dtype(config.compute_dtype).name}, {weights}",
        "model": f"{model.hf_config.get('model_type')} from {start}, {count:,} parameters, "
        f"{model.hf_config.get('max_position_embeddings') or 'any number of'} positions",
    }

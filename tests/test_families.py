"""Every family's shrunk published configuration against transformers: padded, long, sampled, exported, on 8 devices."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import quick_jit, torch_logits
from layouts import assert_close, mesh_of, scored
from published import (
    PUBLISHED,
    RECONSTRUCTED,
    UNTIED,
    add_predictor,
    fuse_experts,
    ids_and_mask,
    load_published,
    published_torch_model,
    shrunk,
    text_fields,
    torch_class,
    torch_config,
    write_published,
)

from grpo_jax.log_probs import output_logits, token_log_probs
from grpo_jax.models import Pretrained, from_hf_config, from_pretrained, param_shapes, save_pretrained
from grpo_jax.models.hf_config import family_of
from grpo_jax.rollout import generate
from grpo_jax.sampling import Sampling
from grpo_jax.sharding import param_shardings
from grpo_jax.train import completion_log_probs
from grpo_jax.types import Prompts

# Of a family that another name stands for too, with nothing of their own beyond padded logits.
LIKE_ANOTHER = frozenset(
    {
        "EXAONE-4.0-1.2B",
        "GLM-4.5-Air",
        "Gemma-3-1B",
        "Kimi-K2",
        "Mistral-7B-v0.1",
        "Mistral-Small-3.1-24B",
        "Moonlight-16B-A3B",
        "OLMo-3-7B",
        "Phi-3-mini-4k",
        "Phi-4",
        "Qwen2.5-VL-7B",
        "Qwen3-235B-A22B",
        "Qwen3-VL-30B-A3B",
        "Qwen3-VL-4B",
        "gpt-oss-120b",
    }
)
NAMES = sorted(PUBLISHED)
FOUND = Path(__file__).parent.parent.parent / "shared" / "data" / "hf_configs"
# Beyond every window, every original length but YaRN's, and the sequences of the fast tests.
LONG = 100


@dataclass(frozen=True)
class Family:
    """A written checkpoint of a family, the model of transformers it was written from, and what was loaded from it."""

    folder: Path
    oracle: Any
    loaded: Pretrained

    def logits(self, ids, mask):
        return logits_of(self.loaded, ids, mask)


def logits_of(loaded, ids, mask):
    """Logits as the sampler computes them."""
    model = loaded.model

    @quick_jit
    def forward(params, ids, mask):
        hidden, _ = model.apply(params, ids, jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0), mask)
        return output_logits(hidden, model.head(params), logit_softcap=model.logit_softcap)

    return np.asarray(forward(loaded.params, jnp.asarray(ids), jnp.asarray(mask)))


def one_of_each(fast=()):
    """One supported name for each family, those outside ``fast`` in the slow suite."""
    names = [name for name in NAMES if name not in LIKE_ANOTHER]
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def relative_error(found, wanted, mask):
    return float(np.abs(found - wanted)[mask].max() / np.abs(wanted[mask]).max())


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Threads cost more than they save on models this small."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A family by its name, made once."""
    made = {}

    def make(name) -> Family:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = Family(folder, write_published(folder, name), from_pretrained(folder))
        return made[name]

    return make


def test_every_published_configuration_has_a_source():
    assert PUBLISHED.keys() > RECONSTRUCTED


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_transformers_reads_the_checkpoints_it_is_compared_by(name, tmp_path):
    written = write_published(tmp_path, name)
    ids, mask = ids_and_mask()
    found = torch_logits(load_published(tmp_path), ids, mask)
    assert np.isfinite(found[mask]).all()
    assert relative_error(found, torch_logits(written, ids, mask), mask) <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_padded_logits_and_those_of_an_export_equal_transformers(name, family, tmp_path, record_property):
    """Sequences of several windows and original lengths; the weights and the config go out as they came in."""
    made = family(name)
    ids, mask = ids_and_mask(length=40, paddings=(0, 9, 30))
    wanted = torch_logits(made.oracle, ids, mask)
    error = relative_error(made.logits(ids, mask), wanted, mask)
    record_property("relative_error", error)
    assert error <= 1e-5
    export = tmp_path / "export"
    save_pretrained(export, made.loaded.params, hf_config=made.loaded.hf_config)
    assert relative_error(torch_logits(load_published(export), ids, mask), wanted, mask) <= 1e-6
    before = json.loads((made.folder / "config.json").read_text())
    if "vision_config" in before:  # the text model alone goes out, with these fields
        before = made.loaded.hf_config
    after = json.loads((export / "config.json").read_text())
    changed = {field for field in before.keys() | after.keys() if before.get(field) != after.get(field)}
    assert changed <= {"dtype", "torch_dtype"}


@pytest.mark.slow  # another length, another program
@pytest.mark.parametrize("name", one_of_each(fast=NAMES))
def test_long_and_short_sequences_equal_transformers(name, family):
    made = family(name)
    for length, paddings in ((LONG, (0, 37)), (12, (0, 5))):
        ids, mask = ids_and_mask(length, paddings)
        assert relative_error(made.logits(ids, mask), torch_logits(made.oracle, ids, mask), mask) <= 1e-5


@pytest.mark.parametrize("name", one_of_each(fast={"Qwen3-0.6B"}))
def test_sampler_trainer_and_transformers_agree_on_sampled_tokens(name, family):
    """Prompts of unequal lengths; prompt and completion together pass the windows and original lengths."""
    made = family(name)
    fixes_length = made.loaded.model.rope_switch_length is not None
    loaded = from_pretrained(made.folder, rope_length=40) if fixes_length else made.loaded
    ids, mask = ids_and_mask(length=12, paddings=(0, 5))
    prompts = Prompts(jnp.asarray(ids), jnp.asarray(mask), jnp.arange(2))
    settings = {"group_size": 2, "max_completion_length": 24, "eos_ids": (1,), "pad_id": 0}
    rollout = generate(loaded.model, loaded.params, prompts, jax.random.key(0), Sampling(), **settings)
    assert int(rollout.completion_mask.sum(1).max()) + 12 > 20
    log_probs, _ = completion_log_probs(loaded.model, loaded.params, rollout)
    is_sampled = np.asarray(rollout.completion_mask)
    log_probs = np.asarray(log_probs)
    scale = np.abs(log_probs[is_sampled]).max()
    assert np.abs(log_probs - rollout.rollout_log_probs)[is_sampled].max() <= 1e-5 * max(1, scale)
    ids = np.concatenate([rollout.prompt_ids, rollout.completion_ids], axis=1)
    mask = np.concatenate([rollout.prompt_mask, rollout.completion_mask], axis=1)
    logits = jnp.asarray(torch_logits(made.oracle, ids, mask)[:, 11:-1])
    wanted = np.asarray(token_log_probs(logits, rollout.completion_ids))
    assert np.abs(log_probs - wanted)[is_sampled].max() <= 1e-4 * max(1, scale)


@pytest.mark.parametrize("name", one_of_each())
def test_packed_rows_on_eight_devices_give_the_gradients_of_padded_ones_on_one(name, family):
    """On data x fsdp x tensor, or fsdp x expert x tensor for a mixture of experts."""
    loaded = family(name).loaded
    config = loaded.config
    if config.delta is not None:
        # Small outputs of the delta rule are divided by their size: with the published epsilon, rounding of the weights
        # changes gradients by more than is compared here.
        config = replace(config, norm_epsilon=1e-2)
    mesh = mesh_of(2, 2, 2) if config.experts is None else mesh_of(1, 2, 2, expert=2)
    expected = scored(config, loaded.params, mesh_of(1, 1, 1), "padded")
    assert_close(scored(config, loaded.params, mesh, "shared"), expected)


@pytest.mark.parametrize("name", ["Qwen2.5-VL-7B", "Qwen3-VL-4B", "Qwen3-VL-30B-A3B"])
def test_a_text_part_has_its_own_defaults(name):
    config = shrunk(PUBLISHED[name])
    fields = text_fields(config)
    for field in ("rope_theta", "rms_norm_eps", "norm_topk_prob"):
        fields.pop(field, None)
    oracle, found = torch_config(config).get_text_config(), from_hf_config(config)
    assert {rope.theta for rope in found.ropes} == {oracle.rope_parameters["rope_theta"]}
    assert found.norm_epsilon == oracle.rms_norm_eps
    assert found.experts is None or found.experts.normalized


@pytest.mark.parametrize(("field", "value"), [("factor", "x"), ("mscale_all_dim", "x"), ("mscale_all_dim", -1)])
def test_scaling_that_is_no_number_is_refused_where_it_scales_queries(field, value):
    config = shrunk(PUBLISHED["DeepSeek-V3"])
    config["rope_scaling"][field] = value
    with pytest.raises(ValueError, match=rf"{field} .*must be a finite number.*, not {value!r}"):
        from_hf_config(config)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_family_has_a_sharding(name):
    shapes = param_shapes(from_hf_config(shrunk(PUBLISHED[name])))
    specs = jax.tree.leaves(jax.tree.map(lambda sharding: sharding.spec, param_shardings(shapes, mesh_of(2, 2, 2))))
    is_split = [any(axes) for axes, leaf in zip(specs, jax.tree.leaves(shapes), strict=True) if leaf.size > 2000]
    assert all(is_split)


@pytest.mark.slow  # dozens of layers each
@pytest.mark.parametrize("name", NAMES)
def test_published_sizes_give_as_many_parameters_as_in_transformers(name):
    import torch

    published = {field: value for field, value in PUBLISHED[name].items() if field != "quantization_config"}
    with torch.device("meta"):
        oracle = torch_class(published)._from_config(torch_config(published))
    parts = [oracle]
    if hasattr(oracle.model, "language_model"):
        parts = [oracle.model.language_model]
        if not oracle.config.tie_word_embeddings or name in UNTIED:
            parts.append(oracle.lm_head)
    # The bias of DeepSeek V3's choice of experts is no parameter there.
    weights = [weight for part in parts for weight in part.parameters()]
    weights += [weight for part in parts for at, weight in part.named_buffers() if "correction_bias" in at]
    count = sum(weight.numel() for weight in weights)
    own = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(param_shapes(from_hf_config(published))))
    assert own == count


PREDICTING = ("DeepSeek-V3", "GLM-4.5-Air", "Qwen3-Next-80B-A3B", "Qwen3.5-397B-A17B")


@pytest.mark.parametrize("name", PREDICTING)
def test_a_layer_that_predicts_further_tokens_is_passed_over(name, tmp_path, family):
    write_published(tmp_path, name)
    add_predictor(tmp_path)
    for found, expected in zip(
        *(jax.tree.leaves(x.params) for x in (from_pretrained(tmp_path), family(name).loaded)), strict=True
    ):
        assert np.array_equal(found, expected)


FUSED = ("Qwen3-30B-A3B", "Qwen3.5-397B-A17B")


@pytest.mark.parametrize("name", FUSED)
def test_experts_in_one_tensor_are_read_too(name, tmp_path, family):
    written = write_published(tmp_path, name)
    fuse_experts(tmp_path)
    ids, mask = ids_and_mask()
    assert (
        relative_error(torch_logits(load_published(tmp_path), ids, mask), torch_logits(written, ids, mask), mask)
        <= 1e-6
    )
    for found, expected in zip(
        *(jax.tree.leaves(x.params) for x in (from_pretrained(tmp_path), family(name).loaded)), strict=True
    ):
        assert np.array_equal(found, expected)


@pytest.mark.slow  # a model of transformers for each of many configurations
@pytest.mark.skipif(not FOUND.is_dir(), reason="needs the published configurations beside the checkout")
def test_logits_of_all_published_configurations_equal_those_of_transformers(tmp_path):
    compared = {from_hf_config(shrunk(PUBLISHED[name])) for name in NAMES}
    known = len(compared)
    for path in sorted(FOUND.glob("*.json")):
        published = json.loads(path.read_text())
        try:
            from_hf_config({name: value for name, value in published.items() if name != "quantization_config"})
        except ValueError:
            continue
        small = shrunk(published)
        named = (published.get("architectures") or [family_of(published).architecture])[0]
        small["architectures"] = [named.replace("ForSequenceClassification", "ForCausalLM")]
        config = from_hf_config(small)
        if config in compared:
            continue
        compared.add(config)
        oracle = published_torch_model(small)
        oracle.save_pretrained(tmp_path / path.stem)
        (tmp_path / path.stem / "config.json").write_text(json.dumps(small | {"eos_token_id": 1}))
        ids, mask = ids_and_mask()
        error = relative_error(
            logits_of(from_pretrained(tmp_path / path.stem), ids, mask), torch_logits(oracle, ids, mask), mask
        )
        assert error <= 1e-5, (path.name, error)
    assert len(compared) >= known + 5

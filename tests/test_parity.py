"""The decoder against transformers' torch models, family by family."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    CASES,
    VOCAB_SIZE,
    edit_json,
    load_torch_model,
    old_spelling,
    quick_jit,
    tiny_tokenizer,
    torch_logits,
    write_checkpoint,
)
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from grpo_jax.models import build_model, from_hf_config, from_pretrained, save_pretrained
from grpo_jax.rollout import generate
from grpo_jax.sampling import Sampling
from grpo_jax.train import completion_log_probs
from grpo_jax.types import Prompts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder and torch model of a case, made once."""
    made = {}

    def make(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            made[case] = folder, write_checkpoint(folder, case)
        return made[case]

    return make


def padded_batch(length=24, paddings=(0, 5, 19)):
    """Random ids with left padding; the sequences are longer than every sliding window."""
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (len(paddings), length)).astype(np.int32)
    mask = np.arange(length)[None, :] >= np.array(paddings)[:, None]
    return ids, mask


def logits_of(model, params, ids, mask):
    """Logits from the hidden states, as in ``log_probs.output_logits``."""
    mask = jnp.asarray(mask)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = quick_jit(model.apply)(params, jnp.asarray(ids), positions, mask)
    logits = np.asarray(hidden.astype(jnp.float32) @ model.head(params).astype(jnp.float32).T)
    return logits if model.logit_softcap is None else model.logit_softcap * np.tanh(logits / model.logit_softcap)


def relative_error(found, wanted, mask):
    return np.abs(found - wanted)[mask].max() / np.abs(wanted[mask]).max()


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case, checkpoint, record_property):
    folder, oracle = checkpoint(case)
    loaded = from_pretrained(folder)
    ids, mask = padded_batch()
    error = relative_error(logits_of(loaded.model, loaded.params, ids, mask), torch_logits(oracle, ids, mask), mask)
    print(f"{case:28s} {error:.1e}")
    record_property("relative_error", float(error))
    assert error <= 1e-5


LENGTH_DEPENDENT = ["llama_longrope", "mistral_dynamic"]


# transformers' dynamic scaling depends on earlier calls: the oracle is a fresh model, below the original length.
@pytest.mark.parametrize(("case", "length"), [("llama_longrope", 16), ("mistral_dynamic", 15)])
def test_sequences_within_the_original_length_are_rotated_as_in_transformers_too(case, length, checkpoint):
    folder, _ = checkpoint(case)
    oracle = load_torch_model(folder)
    loaded = from_pretrained(folder)
    assert loaded.model.rope_switch_length == 16
    ids, mask = padded_batch(length=length, paddings=(0, 5))
    error = relative_error(logits_of(loaded.model, loaded.params, ids, mask), torch_logits(oracle, ids, mask), mask)
    assert error <= 1e-5


@pytest.mark.parametrize("case", LENGTH_DEPENDENT)
def test_a_rope_length_chooses_one_set_of_frequencies_for_all_lengths(case, checkpoint):
    """The frequencies of transformers at that length; a short call then agrees with the start of a long one."""
    folder, oracle = checkpoint(case)
    loaded = from_pretrained(folder, rope_length=24)
    assert loaded.model.rope_switch_length is None
    assert loaded.model.max_length == 24
    ids, mask = padded_batch(paddings=(0, 5))
    wanted = torch_logits(oracle, ids, mask)
    assert relative_error(logits_of(loaded.model, loaded.params, ids, mask), wanted, mask) <= 1e-5
    short = logits_of(loaded.model, loaded.params, ids[:, :12], mask[:, :12])
    assert relative_error(short, wanted[:, :12], mask[:, :12]) <= 1e-5
    plain = from_pretrained(folder)
    assert relative_error(logits_of(plain.model, plain.params, ids[:, :12], mask[:, :12]), short, mask[:, :12]) > 1e-3


@pytest.mark.parametrize("case", [*LENGTH_DEPENDENT, "qwen3_yarn"])
def test_sampler_and_trainer_agree_beyond_the_original_length(case, checkpoint):
    folder, _ = checkpoint(case)
    loaded = from_pretrained(folder, **{} if case == "qwen3_yarn" else {"rope_length": 40})
    ids, mask = padded_batch(length=12, paddings=(0, 5))
    prompts = Prompts(jnp.asarray(ids), jnp.asarray(mask), jnp.arange(2))
    settings = {"group_size": 2, "max_completion_length": 16, "eos_ids": (1,), "pad_id": 0}
    rollout = generate(loaded.model, loaded.params, prompts, jax.random.key(0), Sampling(), **settings)
    assert int(rollout.completion_mask.sum(1).max()) + 12 > 16
    log_probs, _ = completion_log_probs(loaded.model, loaded.params, rollout)
    error = jnp.where(rollout.completion_mask, jnp.abs(log_probs - rollout.rollout_log_probs), 0)
    assert error.max() <= 2.5e-6 * jnp.abs(log_probs).max()  # float32 keeps 1.2e-7 of each number
    if case != "qwen3_yarn":
        switching = from_pretrained(folder).model
        with pytest.raises(ValueError, match=r"it may pass the 16 tokens .* rope_length"):
            generate(
                dataclasses.replace(switching, max_length=None),
                loaded.params,
                prompts,
                jax.random.key(0),
                Sampling(),
                **settings,
            )


def test_a_rope_length_is_refused_where_nothing_depends_on_it(checkpoint):
    with pytest.raises(ValueError, match="rope_length=64 applies to longrope and dynamic"):
        from_pretrained(checkpoint("llama3")[0], rope_length=64)


@pytest.mark.parametrize("case", ["llama_biases_linear_rope", "gemma3"])
def test_a_checkpoint_in_the_old_spelling_and_in_shards_gives_the_same_logits(case, tmp_path):
    oracle = write_checkpoint(tmp_path, case, max_shard_size="20KB")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(old_spelling(config)))
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    ids, mask = padded_batch()
    wanted = torch_logits(oracle, ids, mask)
    assert relative_error(torch_logits(load_torch_model(tmp_path), ids, mask), wanted, mask) <= 1e-6
    loaded = from_pretrained(tmp_path)
    assert loaded.config == from_hf_config(config)
    assert relative_error(logits_of(loaded.model, loaded.params, ids, mask), wanted, mask) <= 1e-5


@pytest.mark.parametrize("case", ["gemma2", "gemma2_bias_untied"])
def test_an_export_loads_in_transformers_with_the_same_logits(case, checkpoint, tmp_path):
    folder, oracle = checkpoint(case)
    loaded = from_pretrained(folder)
    export = tmp_path / "export"
    save_pretrained(
        export,
        loaded.params,
        hf_config=loaded.hf_config,
        tokenizer=loaded.tokenizer,
        generation_config=loaded.generation_config,
        max_shard_bytes=20_000,
    )
    reloaded = load_torch_model(export)
    ids, mask = padded_batch()
    wanted = torch_logits(oracle, ids, mask)
    assert relative_error(torch_logits(reloaded, ids, mask), wanted, mask) <= 1e-6
    assert reloaded.config.tie_word_embeddings == oracle.config.tie_word_embeddings
    assert reloaded.get_input_embeddings().weight.shape == (VOCAB_SIZE, 32)
    assert reloaded.generation_config.eos_token_id == oracle.generation_config.eos_token_id
    again = from_pretrained(export)
    assert again.tokenizer("w5 w7").input_ids == tiny_tokenizer()("w5 w7").input_ids
    assert again.tokenizer.chat_template == tiny_tokenizer().chat_template


def test_changed_parameters_reach_the_export(checkpoint, tmp_path):
    folder, _ = checkpoint("llama3")
    loaded = from_pretrained(folder)
    changed = jax.tree.map(lambda x: x * 1.1, loaded.params)
    save_pretrained(tmp_path / "export", changed, hf_config=loaded.hf_config)
    ids, mask = padded_batch()
    found = torch_logits(load_torch_model(tmp_path / "export"), ids, mask)
    assert relative_error(found, logits_of(loaded.model, changed, ids, mask), mask) <= 1e-5
    assert relative_error(found, logits_of(loaded.model, loaded.params, ids, mask), mask) > 1e-2


def test_bfloat16_stays_near_float32(checkpoint):
    folder, oracle = checkpoint("gemma2")
    loaded = from_pretrained(folder, dtype=jnp.bfloat16)
    assert jax.tree.leaves(loaded.params)[0].dtype == jnp.float32
    ids, mask = padded_batch()
    found = logits_of(loaded.model, loaded.params, ids, mask)
    assert 1e-4 < relative_error(found, torch_logits(oracle, ids, mask), mask) < 5e-2


def test_the_oracle_notices_each_wrong_part(checkpoint):
    """The comparison can fail: it detects each of these errors."""
    errors_of_case = {
        "llama3": [{"ropes": 3}],
        "mistral": [{"windows": (7,) * 3}],
        "gemma3": [{"norm_offset": 0.0}, {"embedding_scale": 1.0}, {"ropes": 4}],
        "gemma2": [{"attention_softcap": None}, {"query_scale": 0.25}],
    }
    ids, mask = padded_batch()
    for case, changes in errors_of_case.items():
        folder, oracle = checkpoint(case)
        loaded = from_pretrained(folder)
        wanted = torch_logits(oracle, ids, mask)
        for change in changes:
            if "ropes" in change:
                change = {"ropes": (dataclasses.replace(loaded.config.ropes[0], kind="default"),) * change["ropes"]}
            model = build_model(dataclasses.replace(loaded.config, **change))
            assert relative_error(logits_of(model, loaded.params, ids, mask), wanted, mask) > 1e-4, (case, change)


def test_float16_and_bfloat16_weights_make_a_round_trip_bit_for_bit(tmp_path):
    for dtype in ("float16", "bfloat16"):
        write_checkpoint(tmp_path / dtype, "qwen2", dtype=dtype)
        for param_dtype in (jnp.float32, jnp.dtype(dtype)):
            loaded = from_pretrained(tmp_path / dtype, param_dtype=param_dtype)
            assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(param_dtype)}
            export = tmp_path / "export"
            save_pretrained(export, loaded.params, hf_config=loaded.hf_config, dtype=jnp.dtype(dtype))
            with (
                safe_open(tmp_path / dtype / "model.safetensors", framework="np") as before,
                safe_open(export / "model.safetensors", framework="np") as after,
            ):
                assert sorted(before.keys()) == sorted(after.keys())
                assert after.metadata() == {"format": "pt"}
                for name in before.keys():  # noqa: SIM118
                    assert before.get_tensor(name).dtype == after.get_tensor(name).dtype
                    assert before.get_tensor(name).tobytes() == after.get_tensor(name).tobytes()
            assert json.loads((export / "config.json").read_text())["dtype"] == dtype
            shutil.rmtree(export)


def test_a_tied_head_stored_all_the_same_and_old_buffers_are_passed_over(tmp_path):
    oracle = write_checkpoint(tmp_path, "llama3")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", pretraining_tp=1)
    loaded = from_pretrained(tmp_path)
    assert "lm_head" not in loaded.params
    ids, mask = padded_batch()
    found = logits_of(loaded.model, loaded.params, ids, mask)
    assert relative_error(found, torch_logits(oracle, ids, mask), mask) <= 1e-5

"""A reward model from a folder in Hugging Face's format against transformers, and its scores in batches."""

import jax
import numpy as np
import pytest
import torch
import transformers

from grpo_jax.models import from_hf_config, from_pretrained, init_params, save_pretrained
from grpo_jax.rewards.compose import weighted
from grpo_jax.rewards.learned import LearnedReward
from grpo_jax.sharding import make_mesh, param_shardings
from grpo_jax.train import reward_model_scores
from tests.checkpoints import CASES, SMALL, tiny_tokenizer

TEXTS = ["w5", "w5 w6 w7", "w6 w6 w6 w6 w6 w6 w6 w6 w6", "w7 w5", "w6"]


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def checkpoint(request, tmp_path_factory):
    """A classifier with one label as transformers writes it."""
    class_name, fields = CASES[next(case for case in CASES if case.startswith(request.param))]
    config = getattr(transformers, class_name)(**SMALL | fields, num_labels=1)
    torch.manual_seed(0)
    oracle = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in oracle.named_parameters():
            if weight.ndim == 2 and "score" in name:
                weight.normal_(0, 1)
    folder = tmp_path_factory.mktemp("reward_model")
    oracle.save_pretrained(folder)
    return folder, oracle


def scores_of_torch(oracle, tokenizer, texts):
    scores = []
    for text in texts:  # one by one, so that no padding is involved
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            hidden = oracle.model(ids).last_hidden_state
            scores.append(float(oracle.score(hidden)[0, -1, 0]))
    return scores


def test_scores_equal_those_of_transformers(checkpoint):
    folder, oracle = checkpoint
    loaded = from_pretrained(folder)
    assert loaded.config.scalar_head
    assert loaded.params["score"]["kernel"].shape == (32, 1)
    reward = LearnedReward(loaded.model, loaded.params, tiny_tokenizer(), max_length=16, batch_size=2)
    found = reward([""] * len(TEXTS), TEXTS)
    np.testing.assert_allclose(found, scores_of_torch(oracle, tiny_tokenizer(), TEXTS), atol=1e-5)
    assert weighted({"model": reward}, {"model": 1.0})([""], ["w5"]).total[0] == pytest.approx(found[0], abs=1e-5)


def test_an_export_loads_in_transformers(checkpoint, tmp_path):
    folder, oracle = checkpoint
    loaded = from_pretrained(folder)
    save_pretrained(tmp_path / "out", loaded.params, hf_config=loaded.hf_config)
    again, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert torch.equal(again.score.weight, oracle.score.weight)


TINY_REWARD = {
    **{"model_type": "qwen3", "vocab_size": 96, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64},
    **{"initializer_range": 0.3, "tie_word_embeddings": True, "id2label": {"0": "reward"}},
    "architectures": ["Qwen3ForSequenceClassification"],
}


@pytest.fixture(scope="module")
def tiny_reward():
    from grpo_jax.models import build_model

    config = from_hf_config(TINY_REWARD)
    return build_model(config), init_params(config, jax.random.key(0))


def test_the_score_is_read_at_the_last_attended_token_wherever_the_padding_is(tiny_reward):
    """L16."""
    model, params = tiny_reward
    ids = np.array([[5, 6, 7, 0, 0], [0, 0, 5, 6, 7], [5, 6, 7, 7, 7]], np.int32)
    mask = np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    scores = reward_model_scores(model, params, jax.numpy.asarray(ids), jax.numpy.asarray(mask))
    np.testing.assert_allclose(scores, scores[0], atol=1e-6)
    alone = reward_model_scores(model, params, jax.numpy.asarray(ids[:1, :3]), jax.numpy.asarray(mask[:1, :3]))
    np.testing.assert_allclose(alone[0], scores[0], atol=1e-6)
    assert reward_model_scores(model, params, jax.numpy.asarray(ids), jax.numpy.zeros((3, 5), bool)).tolist() == [
        0,
        0,
        0,
    ]


def test_batches_the_mesh_and_other_completions_do_not_change_a_score(tiny_reward):
    model, params = tiny_reward
    tokenizer = tiny_tokenizer()
    texts = [" ".join(f"w{5 + (i * j) % 3}" for j in range(1, 2 + i % 7)) for i in range(21)]
    alone = LearnedReward(model, params, tokenizer, max_length=32, batch_size=1)([""] * 21, texts)
    mesh = make_mesh(data=4, fsdp=2)
    laid_out = jax.device_put(params, param_shardings(params, mesh))
    together = LearnedReward(model, laid_out, tokenizer, max_length=32, batch_size=8, mesh=mesh)([""] * 21, texts)
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_what_has_no_score(tiny_reward):
    model, params = tiny_reward
    reward = LearnedReward(model, params, tiny_tokenizer(), max_length=4)
    assert reward([], []) == []
    scores = reward(["w5 ", "", "w5 w6 "], ["w6", "", "w5 w6 w7"])
    assert [score is None for score in scores] == [False, True, True]


def test_a_score_that_is_not_finite_is_an_error(tiny_reward):
    model, params = tiny_reward
    broken = {**params, "score": {"kernel": params["score"]["kernel"] * np.float32(np.nan)}}
    reward = LearnedReward(model, broken, tiny_tokenizer(), max_length=16, batch_size=2)
    with pytest.raises(ValueError, match=r"reward 'model' raised FloatingPointError: .* not finite"):
        weighted({"model": reward}, {"model": 1.0})([""], ["w5"])


def test_what_is_no_reward_model_is_refused(tiny_reward, tiny):
    with pytest.raises(ValueError, match="head has 32 outputs"):
        LearnedReward(*tiny, tiny_tokenizer(), max_length=4)
    with pytest.raises(ValueError, match="must be divisible by data x fsdp of the mesh"):
        LearnedReward(
            *tiny_reward,
            tiny_tokenizer(),
            max_length=4,
            batch_size=3,
            mesh=make_mesh(data=2, devices=jax.devices()[:2]),
        )
    with pytest.raises(ValueError, match="classifier with 3 labels"):
        from_hf_config(TINY_REWARD | {"num_labels": 3})


def test_what_has_ended_is_read_with_its_ending_token(checkpoint):
    """A reward model is taught on completions that end; where a completion was cut off, there is no end to read."""
    folder, oracle = checkpoint
    loaded = from_pretrained(folder)
    tokenizer = tiny_tokenizer()
    (ending,) = tokenizer("w7", add_special_tokens=False)["input_ids"]
    reward = LearnedReward(loaded.model, loaded.params, tokenizer, max_length=16, batch_size=2, eos_id=ending)
    found = reward(["", ""], ["w5", "w5"], truncated=[False, True])
    np.testing.assert_allclose(found, scores_of_torch(oracle, tokenizer, ["w5 w7", "w5"]), atol=1e-5)

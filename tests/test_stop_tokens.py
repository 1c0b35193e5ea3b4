"""What a run stops at is exported by every script, and tokens without a row in the embedding stop a run."""

import json
from pathlib import Path

import jax
import pytest
from families import family, write_family
from transformers import GenerationConfig

from experiments import dpo, grpo, ppo, reward_model, sample, sft
from grpo_jax.config.data import DataConfig
from grpo_jax.config.dpo import DPOConfig
from grpo_jax.config.grpo import GRPOConfig
from grpo_jax.config.offline import DemonstrationConfig, PreferenceConfig
from grpo_jax.config.ppo import PPOConfig
from grpo_jax.config.reward_model import RewardModelConfig
from grpo_jax.config.rewards import RewardConfig
from grpo_jax.config.run import MeshConfig
from grpo_jax.config.sft import SFTConfig
from grpo_jax.models import from_pretrained
from tests.runs import write_rows

SIZES = {"max_position_embeddings": 128}
SHORT = {"max_prompt_length": 48, "max_completion_length": 8}
STOP = {"stop_tokens": ("<|im_end|>",)}
QUESTIONS = [f"{a}+{b}=" for a in range(1, 5) for b in range(1, 5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with ChatML's tokens and template that names the base's own end alone."""
    return write_family(tmp_path_factory.mktemp("chatml") / "model", "chatml_llama2", sizes=SIZES)


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return write_family(tmp_path_factory.mktemp("scorer") / "model", "chatml_llama2", sizes=SIZES, scalar_head=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """One file that every script reads: problems, demonstrations and preferences."""
    row = [
        {"prompt": each, "completion": "3", "chosen": "3", "rejected": "4", "question": each, "answer": "3"}
        for each in QUESTIONS
    ]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", row)


def settings(base, tmp_path):
    return {"model": base, "run_dir": tmp_path / "run", "mesh": MeshConfig(data=1), "plain": True}


def tuned(base, rows, tmp_path, **changes):
    data = DemonstrationConfig(
        dataset=rows, prompt_column="prompt", completion_column="completion", chat_template=True, eval_size=2
    )
    fields = {**settings(base, tmp_path), **SHORT, **STOP, "data": data, "eval_every": 0, "num_eval_prompts": 0}
    return SFTConfig(**fields | {"num_sequences": 8, "num_epochs": 1, "max_length": 64} | changes)


def preferred(base, rows, tmp_path, **changes):
    data = PreferenceConfig(dataset=rows, chat_template=True, eval_size=2)
    fields = {**settings(base, tmp_path), **SHORT, **STOP, "data": data, "eval_every": 0, "num_eval_prompts": 0}
    return DPOConfig(**fields | {"num_pairs": 8} | changes)


def scored(base, rows, tmp_path, **changes):
    data = PreferenceConfig(dataset=rows, chat_template=True, eval_size=2)
    fields = {**settings(base, tmp_path), **SHORT, **STOP, "data": data, "eval_every": 0, "num_pairs": 8}
    return RewardModelConfig(**fields | changes)


def drawn(base, rows, tmp_path, **changes):
    data = DataConfig(dataset=rows, prompt_column="question", chat_template=True, eval_size=2, grader="exact")
    fields = {**settings(base, tmp_path), **SHORT, **STOP, "data": data, "eval_every": 0, "eval_samples": 1}
    return fields | {"num_steps": 1, "num_prompts": 8} | changes


def exported_params(folder):
    """The ids that end a sequence, as every file and every reader of an export has them."""
    written = [
        json.loads((folder / name).read_text())["eos_token_id"] for name in ("config.json", "generation_config.json")
    ]
    read = [list(from_pretrained(folder).eos_ids), GenerationConfig.from_pretrained(folder).eos_token_id]
    assert all(each == written[0] for each in (*written, *read))
    return written[0]


def files_of(folder):
    return {name: (Path(folder) / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def test_fine_tuning_exports_what_it_taught_to_stop_at_and_the_files_of_the_tokenizer(base, rows, tmp_path):
    config = tuned(base, rows, tmp_path)
    assert sft.main(config) == 0
    ends = family("chatml_llama2").ids(["</s>", "<|im_end|>"])
    assert exported_params(config.run_dir / "model") == ends
    assert files_of(config.run_dir / "model") == files_of(base)
    # The next run needs no flag.
    again = tuned(str(config.run_dir / "model"), rows, tmp_path, run_dir=tmp_path / "again", stop_tokens=())
    assert sft.main(again) == 0
    assert exported_params(again.run_dir / "model") == ends


def test_a_reward_model_takes_stop_tokens_and_exports_them(base, rows, tmp_path):
    config = scored(base, rows, tmp_path)
    assert reward_model.main(config) == 0
    assert exported_params(config.run_dir / "model") == family("chatml_llama2").ids(["</s>", "<|im_end|>"])
    assert files_of(config.run_dir / "model") == files_of(base)


def test_preference_tuning_exports_what_it_stopped_at(base, rows, tmp_path):
    config = preferred(base, rows, tmp_path)
    assert dpo.main(config) == 0
    assert exported_params(config.run_dir / "model") == family("chatml_llama2").ids(["</s>", "<|im_end|>"])


@pytest.mark.parametrize("algorithm", ["grpo", pytest.param("ppo", marks=pytest.mark.slow)])
def test_reinforcement_learning_exports_what_it_stopped_at(base, scorer, rows, tmp_path, algorithm):
    if algorithm == "grpo":
        config, main = GRPOConfig(**drawn(base, rows, tmp_path), group_size=2), grpo.main
    else:
        rewards = RewardConfig(accuracy_weight=1.0)
        more = {"critic": "head", "num_epochs": 1, "num_minibatches": 1, "rewards": rewards}
        config, main = PPOConfig(**drawn(base, rows, tmp_path), **more), ppo.main
    assert main(config) == 0
    assert exported_params(config.run_dir / "model") == family("chatml_llama2").ids(["</s>", "<|im_end|>"])


def test_sampling_ends_at_a_stop_token(base):
    # Whatever comes first is made a stop token: the answer is that token alone and is not shown.
    def text(**more):
        written = []
        sample.main(
            sample.Config(model=base, prompt="1+2=", temperature=0.0, max_completion_length=4, **more),
            write=written.append,
        )
        return "".join(written)

    policy = from_pretrained(base)
    ids = policy.tokenizer("1+2=")["input_ids"]
    row = jax.numpy.asarray([ids], "int32")
    hidden, _ = policy.model.apply(policy.params, row, jax.numpy.arange(len(ids))[None], row >= 0)
    first = int((hidden[0, -1] @ policy.model.head(policy.params).T).argmax())
    assert text().strip()
    assert text(stop_tokens=(policy.tokenizer.convert_ids_to_tokens(first),)) == "\n"
    with pytest.raises(ValueError, match=r"stop_tokens: \['<\|eot_id\|>'\] are not tokens of"):
        text(stop_tokens=("<|eot_id|>",))


# Tokens without a row -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same base with an embedding that was not enlarged for ChatML's tokens."""
    rows = family("chatml_llama2").vocab_size - 2
    folder = tmp_path_factory.mktemp("short") / "model"
    return write_family(folder, "chatml_llama2", sizes=SIZES | {"vocab_size": rows})


@pytest.mark.parametrize(
    ("main", "config"),
    [
        (sft.main, tuned),
        (dpo.main, preferred),
        (reward_model.main, scored),
        (grpo.main, lambda *args, **changes: GRPOConfig(**drawn(*args, **changes), group_size=2)),
    ],
    ids=["sft", "dpo", "reward_model", "grpo"],
)
def test_tokens_without_a_row_stop_every_run_before_its_first_step(short, rows, tmp_path, main, config):
    with pytest.raises(ValueError, match=r"embedding has no row for '<\|im_(start|end)\|>' .* it has \d+ rows"):
        main(config(short, rows, tmp_path, stop_tokens=()))
    with pytest.raises(ValueError, match=r"stop_tokens: .* no row for '<\|im_end\|>'"):
        main(config(short, rows, tmp_path, run_dir=tmp_path / "other"))
    assert not (tmp_path / "run" / "model").exists()


def test_a_critic_reads_every_token_that_the_policy_writes(short, base):
    policy, critic = from_pretrained(base), from_pretrained(short)
    ppo.check_same_tokens(policy, policy)
    ppo.check_same_tokens(policy, critic)
    with pytest.raises(ValueError, match="has 519 rows and lacks 2 of the policy's tokens, so the critic cannot"):
        ppo.check_same_tokens(critic, policy)

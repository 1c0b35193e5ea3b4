"""Examples, commands, flags and links in the READMEs and the page on plans."""

import importlib
import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config.files import read_settings_file, with_settings
from grpo_jax.config.grpo import PRESETS, GRPOConfig
from grpo_jax.loop.flags import flags_of
from tests.test_loop_command import SCRIPTS, config_type, run_script

ROOT = Path(__file__).parent.parent
READMES = {path: (ROOT / path).read_text() for path in ("README.md", "experiments/README.md", "docs/plans.md")}
README = READMES["README.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
NO_FLAGS = {"--help", "--help-all", "--help-rare", "--debug", "--config", "--index-url", "--xla_gpu_deterministic_ops"}
"""Flags of every command, of pip and of XLA."""


def commands():
    """The commands of both READMEs that run a script of experiments/: script, arguments."""
    found = {}
    for text in READMES.values():
        for line in text.replace("\\\n", " ").splitlines():
            for script, args in re.findall(r"python experiments/(\S+)\.py([^`\n]*)", line):
                args = shlex.split(args.replace("PRESET", "toy"), comments=True)
                found[f"{script} {shlex.join(args)}"] = (script.replace("/", "."), args)
    return [pytest.param(*command, id=name) for name, command in found.items()]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A working directory with the files that commands read before they run."""
    losses = next(block for block in BLOCKS if "def tanh_loss" in block)
    (tmp_path / "my_losses.py").write_text(
        "import jax\nimport jax.numpy as jnp\nfrom grpo_jax import loss\n\n"
        + losses[losses.index("def tanh_loss") : losses.index("value, metrics = tanh_loss")]
        + "\n\ndef centred(rewards, group_size):\n    return rewards - rewards.mean()\n"
    )
    (tmp_path / "my_module.py").write_text(
        "def politeness(completions, **kwargs):\n    return [0.0 for _ in completions]\n\n\nquality = politeness\n"
    )
    (tmp_path / "chats.jsonl").write_text("")
    for name in ("qwen2.5-7b", "qwen2.5-32b", "llama-3.1-70b", "qwen3-30b-a3b"):
        (tmp_path / f"{name}.json").write_text('{"max_position_embeddings": 131072}')
    (tmp_path / "tasks.json").write_text(re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL)[0])
    (tmp_path / "runs/gsm8k").mkdir(parents=True)
    (tmp_path / "runs/gsm8k/config.json").write_text('{"model": "Qwen/Qwen2.5-0.5B", "num_steps": 3}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore:from_apply")
def test_python_examples_run(base):
    assert len(BLOCKS) == 6
    names = {}
    for block in BLOCKS:
        exec(block.replace("runs/grpo/model", base), names)
    np.testing.assert_allclose(names["advantages"], [1.5, -0.5, -0.5, -0.5], atol=1e-5)
    assert names["scores"].total[0] > 1.5
    assert names["scores"].parts["accuracy"].tolist() == [1.0]
    assert names["completions"] == [r"<think>2/4 + 1/4 = 3/4</think><answer>\frac{3}{4}</answer>"]
    assert names["log_probs"].shape == (8, 48)
    assert jnp.isfinite(names["value"].value)
    assert names["samples"].completion_ids.shape == (32, 6)
    assert (names["samples"].completion_ids == 7).mean() > 0.9


@pytest.mark.parametrize(("script", "args"), commands())
def test_commands_parse(script, args, workspace, capsys, monkeypatch):
    assert (ROOT / "experiments" / f"{script.replace('.', '/')}.py").is_file()
    if script == "minimal_grpo":  # has no settings
        return
    module = importlib.import_module(f"experiments.{script}")
    monkeypatch.setattr("grpo_jax.config.run.connect", lambda *processes, **options: None)
    if script == "plan":  # the flags of an experiment among its own
        monkeypatch.setattr(module, "topology_devices", lambda name: jax.devices("cpu"))
        monkeypatch.setattr(module, "plan", lambda *config, has_mesh: 0)
        assert module.command(args) == 0, capsys.readouterr().err
        return
    assert run_script(module, args, main=lambda config: None) == 0, capsys.readouterr().err


def test_every_variant_in_the_table_parses(workspace):
    from experiments import grpo

    rows = README.split("**Variants of GRPO**")[1].split("```json")[0].splitlines()
    settings = [text for row in rows for text in re.findall(r"`(--[^`]*)`", row)]
    assert len(settings) > 8
    for text in settings:
        assert run_script(grpo, ["--model", "some/folder", *shlex.split(text)], main=lambda config: None) == 0, text


def test_flags_exist():
    scripts = [importlib.import_module(f"experiments.{name}") for name in SCRIPTS]
    scripts += [
        importlib.import_module(f"experiments.bench.{path.stem}") for path in ROOT.glob("experiments/bench/*.py")
    ]
    known = NO_FLAGS.union(*({flag.flag for flag in flags_of(config_type(script))} for script in scripts))
    for name, text in READMES.items():
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z0-9]", text))
        shortened = {flag.replace("--no-", "--") for flag in flags}
        assert shortened <= known, (name, sorted(shortened - known))


def test_the_table_of_presets_is_complete():
    assert set(re.findall(r"`python experiments/grpo.py ([\w-]+)`", README)) == set(PRESETS)


def test_the_table_of_losses_and_advantages_is_complete():
    from grpo_jax.config.grpo import ADVANTAGES
    from grpo_jax.config.training import LOSSES

    tables = README.split("## The equations")[1].split("## Presets")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", tables, flags=re.MULTILINE)) == {*LOSSES, *ADVANTAGES}


def test_the_excerpt_is_in_minimal_grpo():
    excerpt = re.findall(r"```text\n(.*?)```", README, flags=re.DOTALL)[0]
    script = (ROOT / "experiments/minimal_grpo.py").read_text()
    assert all(line in script for line in excerpt.splitlines())
    assert len(script.splitlines()) <= 150


def anchor(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", READMES)
def test_links_and_targets_exist(name):
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", READMES[name]):
        assert f"\n{target}:" in makefile, target
    for link in re.findall(r"\]\(([a-z][^):]*)\)", READMES[name]):
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert heading in [anchor(text) for text in headings], link


def test_make_demo_runs_the_default_command():
    assert re.search(
        r"^demo:.*\n\t\$\(BIN\)/python experiments/grpo\.py$", (ROOT / "Makefile").read_text(), re.MULTILINE
    )


def test_the_settings_file_is_one(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "settings.yaml").write_text(text)
    settings = read_settings_file(tmp_path / "settings.yaml")
    assert settings.pop("preset") in PRESETS
    config = with_settings(GRPOConfig(), settings, "README.md")
    assert (config.optimizer.learning_rate, config.alarms.stop_at) == (2e-6, ("hacking",))

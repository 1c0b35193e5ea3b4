"""Loading a checkpoint, against transformers: CPU seconds and peak memory, each library in its own process.

The checkpoint has 1 GB in bfloat16, the shapes of Qwen2.5-0.5B and random weights. transformers maps the file into
memory and reads a weight only when it is used, so each process also reads every weight once, and the ratios include
that. Seconds exclude imports, memory includes them. Prints one JSON line.

    python experiments/bench/loading.py
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

SHAPE = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
LIBRARIES = ("grpo_jax", "transformers")


@dataclass(frozen=True)
class Config:
    """Settings of the measurement."""

    param_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the loaded weights."""
    repeats: int = 3
    """Processes for each library, alternating; the minima are reported."""
    library: Literal["grpo_jax", "transformers"] | None = None
    """Load with this library only, in this process, from --folder."""
    folder: Path | None = None
    """Checkpoint to load. Default: a temporary one with random weights."""


def make_checkpoint(folder: Path) -> None:
    """Write random weights of ``SHAPE`` in Hugging Face layout."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from grpo_jax.models import from_hf_config
    from grpo_jax.models.hf_keys import key_table

    rng = np.random.default_rng(0)
    tensors = {
        entry.name: (rng.standard_normal(entry.stored_shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for entry in key_table(from_hf_config(SHAPE)).values()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE))


def load_with_jax(folder: Path, param_dtype: str):
    """Functions of this package that load the checkpoint and read all weights."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grpo_jax import models

    jax.devices()
    dtype = jnp.dtype(param_dtype).type

    def load():
        return jax.block_until_ready(models.from_pretrained(folder, dtype=jnp.bfloat16, param_dtype=dtype).params)

    def read(params):
        for leaf in jax.tree.leaves(params):
            np.asarray(leaf).view(f"i{leaf.dtype.itemsize}").max()

    return load, read


def load_with_transformers(folder: Path, param_dtype: str):
    """Functions of transformers that load the checkpoint and read all weights."""
    import torch
    import transformers
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401 (imported on first use otherwise)

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, param_dtype))

    def read(model):
        with torch.no_grad():
            for weight in model.parameters():
                weight.view(torch.int16 if weight.dtype == torch.bfloat16 else torch.int32).max()

    return load, read


def measure(library: str, folder: Path, param_dtype: str) -> dict[str, float]:
    """CPU seconds and peak memory of this process."""
    load, read = (load_with_jax if library == "grpo_jax" else load_with_transformers)(folder, param_dtype)
    before, imports = time.process_time(), peak_mib()
    loaded = load()
    after_load = time.process_time()
    peak = peak_mib()
    read(loaded)
    return {
        "load_cpu_s": after_load - before,
        "load_and_read_cpu_s": time.process_time() - before,
        "imports_peak_mib": imports,
        "load_peak_mib": peak,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Peak resident memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def compare(folder: Path, config: Config) -> dict:
    """Minima of each library over ``repeats`` processes, and their ratios."""
    figures: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
    for _ in range(config.repeats):
        for library in LIBRARIES:
            arguments = [f"--library={library}", f"--folder={folder}", f"--param-dtype={config.param_dtype}"]
            output = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
            figures[library].append(json.loads(output.stdout.splitlines()[-1]))
    least = {library: {name: min(run[name] for run in runs) for name in runs[0]} for library, runs in figures.items()}
    ours, theirs = (least[library] for library in LIBRARIES)
    return {
        "param_dtype": config.param_dtype,
        "gigabytes": round(sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9, 3),
        **{library: {name: round(value, 3) for name, value in least[library].items()} for library in LIBRARIES},
        "cpu_ratio": round(ours["load_and_read_cpu_s"] / theirs["load_and_read_cpu_s"], 2),
        "peak_ratio": round(ours["peak_mib"] / theirs["peak_mib"], 2),
    }


def main(config: Config) -> None:
    """Measure one library in this process, or compare both."""
    if config.library is not None:
        if config.folder is None:
            raise ValueError("--library needs --folder, the checkpoint to load")
        print(json.dumps(measure(config.library, config.folder, config.param_dtype)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = config.folder or Path(temporary) / "model"
        if config.folder is None:
            make_checkpoint(folder)
        print(json.dumps(compare(folder, config)))


if __name__ == "__main__":
    main(tyro.cli(Config))

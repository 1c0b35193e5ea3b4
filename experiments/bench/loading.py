"""Loading a checkpoint, against transformers: CPU seconds and peak memory, each library in its own process.

The checkpoint has 1 GB in bfloat16, the shapes of Qwen2.5-0.5B and random weights. transformers maps the file into
memory and reads a weight only when it is used, so each process also reads every weight once, and the ratios include
that. Seconds exclude imports, memory includes them. Prints one JSON line.

    python experiments/bench/loading.py

With ``--processes N``: the bytes that each of N processes reads of a checkpoint of 0.2 GB in several files, with one
device each and ``fsdp`` N, beside one process with N devices. Every process has a copy of the checkpoint that is not
in the page cache, as on hosts of their own. ``asked`` are the bytes of the slices that the loader takes, ``storage``
those that the kernel reads for them: whole pages, and ahead. ``shards`` is the same with each process reading its
shards as they are, without the exchange of ``hf_reading``.

    python experiments/bench/loading.py --processes 4
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from grpo_jax.loop.local_processes import free_port, run_together

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
# One layer of Qwen2.5-3B: matrices of the size of a real model's, since the kernel reads up to megabytes ahead.
SMALLER = {
    **SHAPE,
    "vocab_size": 16_384,
    "hidden_size": 2048,
    "intermediate_size": 11_008,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
}
FILE_BYTES = 50_000_000
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
    processes: int | None = None
    """Count the bytes that so many processes read."""
    process_id: int | None = None
    """Load as this process, with those at --coordinator."""
    coordinator: str | None = None
    """Address of the first process."""
    exchange: bool = True
    """Read rows and exchange them, as the loader does."""


def make_checkpoint(folder: Path) -> None:
    """Write random weights of ``SHAPE`` in Hugging Face layout."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from grpo_jax.models import from_hf_config
    from grpo_jax.models.hf_keys import key_table

    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(entry.view.stored, np.float32) * 0.02).astype(ml_dtypes.bfloat16)
        for entry in key_table(from_hf_config(SHAPE)).values()
        for name in entry.names
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


def make_files(folder: Path) -> None:
    """Write random weights of ``SMALLER`` in several files."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grpo_jax import models
    from grpo_jax.models.parameters import param_shapes

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * 0.02, jnp.bfloat16),
        param_shapes(models.from_hf_config(SMALLER)),
    )
    models.save_pretrained(folder, params, hf_config=SMALLER, max_shard_bytes=FILE_BYTES)


def read_part(config: Config, folder: Path) -> dict[str, float]:
    """Bytes and CPU seconds of this process, one of ``config.processes`` if they have a coordinator."""
    import jax
    import jax.numpy as jnp

    from grpo_jax import models
    from grpo_jax.models import hf_weights
    from grpo_jax.sharding import make_mesh, param_shardings

    if config.coordinator is not None:
        jax.distributed.initialize(config.coordinator, config.processes, config.process_id)
    asked, read_slice = 0, hf_weights.read_slice

    def counted(*args):
        nonlocal asked
        part = read_slice(*args)
        asked += part.nbytes
        return part

    hf_weights.read_slice = counted
    if not config.exchange:
        hf_weights.reading_sharding = lambda sharding, *_: sharding
    mesh = make_mesh(fsdp=config.processes or 1)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, seconds = storage_bytes(), time.process_time()
    params = models.from_pretrained(
        folder, param_dtype=jnp.bfloat16, shardings=lambda shapes: param_shardings(shapes, mesh)
    ).params
    jax.block_until_ready(params)
    return {
        "asked": asked,
        "storage": storage_bytes() - before,
        "cpu_s": time.process_time() - seconds,
        "held": sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards),
        "files": len(files),
        "file_bytes": sum(file.stat().st_size for file in files),
    }


def storage_bytes() -> int:
    """Bytes that this process has had the kernel read from storage."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def read_in_processes(config: Config, folder: Path, count: int, exchange: bool) -> list[dict[str, float]]:
    """``read_part`` of ``count`` processes at once, each with a copy of the folder."""
    coordinator = f"localhost:{free_port()}"
    copies = [shutil.copytree(folder, folder.with_name(f"copy{number}")) for number in range(count)]
    os.sync()  # pages that are not written yet stay in the cache
    commands = []
    for number, copy in enumerate(copies):
        arguments = [f"--folder={copy}", f"--processes={config.processes}", f"--process-id={number}"]
        arguments += [f"--coordinator={coordinator}"] if count > 1 else []
        arguments += [] if exchange else ["--no-exchange"]
        commands.append([sys.executable, __file__, *arguments])
    try:
        outputs = run_together(commands, devices=(config.processes or 1) // count)
    finally:
        for copy in copies:
            shutil.rmtree(copy)
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def count_bytes(config: Config, folder: Path) -> dict:
    """Megabytes that each process reads, of one process and of several."""
    count = config.processes or 1
    runs = {
        "one": read_in_processes(config, folder, 1, True),
        "several": read_in_processes(config, folder, count, True),
        "shards": read_in_processes(config, folder, count, False),
    }
    first = runs["one"][0]
    return {
        "processes": count,
        "files": first["files"],
        "file_mb": round(first["file_bytes"] / 1e6, 1),
        **{
            f"{run}_{name}_mb": [round(part[name] / 1e6, 1) for part in parts]
            for run, parts in runs.items()
            for name in ("asked", "storage", "held")
        },
        **{f"{run}_cpu_s": [round(part["cpu_s"], 2) for part in parts] for run, parts in runs.items()},
    }


def main(config: Config) -> None:
    """Measure in this process what a parent asks for, or compare libraries or numbers of processes."""
    if config.process_id is not None:
        if config.folder is None:
            raise ValueError("--process-id needs --folder, the checkpoint to load")
        print(json.dumps(read_part(config, config.folder)))
        return
    if config.processes is not None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = config.folder or Path(temporary) / "model"
            if config.folder is None:
                make_files(folder)
            print(json.dumps(count_bytes(config, folder)))
        return
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

"""TRL's GRPOTrainer, step by step, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.loop import trl_worker
from grpo_jax.loop.benchmark import Measured, Seconds
from grpo_jax.models import save_pretrained
from grpo_jax.types import Params, Prompts


class TrlProcess:
    """A function ``lengths -> Measured`` that takes a step with completions of these lengths; a context manager.

    Attributes:
        peak_bytes: peak memory of the process, or of its GPU, up to its last step.
    """

    def __init__(
        self, python: Path | None, params: Params, prompts: Prompts, *, hf_config: Mapping[str, Any], **settings: Any
    ):
        """Start the process, which loads the model.

        Args:
            python: an interpreter that has trl; None for this one.
            params: of the model.
            prompts: of each step.
            hf_config: Hugging Face config of the model.
            settings: the other fields of ``trl_worker.Settings``.
        """
        self.folder = tempfile.TemporaryDirectory()
        checkpoint = Path(self.folder.name) / "model"
        save_pretrained(checkpoint, params, hf_config=hf_config, tokenizer=None)
        rows = zip(np.asarray(prompts.ids), np.asarray(prompts.mask), strict=True)
        fields = {
            "folder": str(checkpoint),
            "vocab_size": hf_config["vocab_size"],
            "prompts": [ids[mask].tolist() for ids, mask in rows],
            "threads": len(os.sched_getaffinity(0)),
            "use_cpu": jax.default_backend() == "cpu",
            **settings,
        }
        # -P: the worker's own folder has modules whose names other packages use.
        command = [str(python or sys.executable), "-P", trl_worker.__file__, json.dumps(fields)]
        # OpenMP's threads otherwise spin while they wait: where other processes compute too, CPU seconds became 8 times
        # as many.
        environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.peak_bytes = 0

    def __call__(self, lengths: np.ndarray) -> Measured:
        """Take a step.

        Args:
            lengths: ``[B]``, tokens of each completion.

        Raises:
            RuntimeError: the process ended, or its completions have other lengths.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(lengths.tolist()) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of TRL ended with status {self.process.wait()}; its messages are above")
        answer = json.loads(line)
        if sorted(answer["lengths"]) != sorted(lengths.tolist()):
            raise RuntimeError(f"TRL's completions have the lengths {answer['lengths']} instead of {lengths.tolist()}")
        self.peak_bytes = answer["peak"]
        return Measured({name: Seconds(*seconds) for name, seconds in answer["phases"].items()}, lengths)

    def __enter__(self) -> TrlProcess:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process and remove its files."""
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()

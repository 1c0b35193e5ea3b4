"""Settings and presets of evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.data import DataConfig
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.run import Preset
from grpo_jax.tasks.generated import SUMS


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(BatchInferenceConfig):
    """Evaluation of a checkpoint."""

    RESUMABLE_FIELDS = ("against", "k", "cache_bytes")
    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --eval-split --eval-size --num-samples --k --against "
        "--max-completion-length --sampling.temperature"
    )

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = DataConfig(eval_size=None)
    """Problems."""
    held_out: bool = False
    """Evaluate only the problems that training on this dataset would hold out."""
    run_dir: Path = Path("runs/evaluate")
    """Folder of the run: completions and report."""
    against: Path | None = None
    """Run folder of another evaluation of the same problems, to compare with by a paired test."""
    k: tuple[int, ...] = ()
    """k of pass@k. Default: the powers of two up to num_samples."""

    def __post_init__(self):
        super().__post_init__()
        wrong = [k for k in self.k if not 1 <= k <= self.num_samples]
        if wrong:
            raise ValueError(f"k is {wrong[0]}; pass@k of num_samples = {self.num_samples} has k from 1 to that")
        if self.against is not None and self.against.resolve() == self.run_dir.resolve():
            raise ValueError(f"against is {self.against}, which is this run's own folder; name another evaluation")

    @property
    def ks(self) -> list[int]:
        """The k of pass@k in effect; 1 is always included."""
        powers = [2**n for n in range(self.num_samples.bit_length())]
        return sorted({1, *(self.k or powers)})


PRESETS: dict[str, Preset[EvaluationConfig]] = {
    "toy": Preset(
        lambda: EvaluationConfig(**TOY_POLICY, data=DataConfig(dataset=SUMS, eval_size=None)),
        "held-out sums with the toy model; a minute or two on one CPU",
        hardware="one CPU core",
    ),
}

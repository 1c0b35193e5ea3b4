"""Settings and presets of rejection sampling."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from grpo_jax.config.batch_inference import BatchInferenceConfig
from grpo_jax.config.data import DataConfig
from grpo_jax.config.model import TOY_POLICY
from grpo_jax.config.run import Preset, require_at_least
from grpo_jax.data.selection import SelectionConfig
from grpo_jax.tasks.generated import SUMS

SELECTION_FIELDS = ("selection", "demonstrations", "general_share", "pairs_per_problem")
DATASET, PAIRS = "dataset.jsonl", "preferences.jsonl"
"""Files of the selected completions and of the pairs, within the run's folder."""
"""Fields that may change until the run is finished: nothing depends on them before."""


@dataclass(frozen=True, kw_only=True)
class RejectionSamplingConfig(BatchInferenceConfig):
    """Completions that are sampled, scored and filtered into demonstrations."""

    COMMON_FLAGS = (
        "--model --dataset --run-dir --seed --num-samples --threshold --require --per-problem --max-problems "
        "--max-completion-length --sampling.temperature --mesh.data"
    )

    run_dir: Path = Path("runs/rejection_sampling")
    """Folder of the run: all completions, the selected ones, and counts."""
    skip_problems: int = 0
    """Problems to skip at the start of the data set."""
    max_problems: int | None = None
    """Number of problems to sample for, after the skipped ones. Default: all."""
    selection: Annotated[SelectionConfig, tyro.conf.arg(name="")] = SelectionConfig()
    """Filters."""
    demonstrations: tuple[Path, ...] = ()
    """JSONL files of further demonstrations, such as general conversations, that are added unchanged."""
    general_share: float | None = None
    """Share of rows that come from those files, sampled with the seed. Default: all of their rows are added."""

    pairs_per_problem: int = 0
    """Also write preferences.jsonl for DPO: pairs of a completion that passes threshold and require and one that does
    not, at most this many per problem. 0: none."""

    def __post_init__(self):
        BatchInferenceConfig.__post_init__(self)
        require_at_least(self, skip_problems=0, max_problems=1, pairs_per_problem=0)
        self.selection.check_parts(self.rewards.part_names)
        for path in self.demonstrations:
            if path.suffix != ".jsonl":
                raise ValueError(f"demonstrations: {path} must be a .jsonl file; its rows are added unchanged")
        if self.general_share is not None and not (self.demonstrations and 0 < self.general_share < 1):
            raise ValueError(
                f"general_share is {self.general_share}; it is a share above 0 and below 1 of rows from demonstrations"
            )

    @property
    def resumable_fields(self) -> tuple[str, ...]:
        """All fields that may change on resume: those of the selection too until the run is finished."""
        is_finished = (self.run_dir / "summary.json").exists()
        return (*super().resumable_fields, "cache_bytes", *(() if is_finished else SELECTION_FIELDS))


PRESETS: dict[str, Preset[RejectionSamplingConfig]] = {
    "toy": Preset(
        lambda: RejectionSamplingConfig(**TOY_POLICY, data=DataConfig(dataset=SUMS), max_problems=256),
        "256 sums with the toy model; half a minute on one CPU",
        hardware="one CPU core",
    ),
}

"""TRL's GRPOTrainer as a process that takes a step for each line that it reads, for benchmarks.

Runs under any interpreter that has trl, and imports nothing of this package. Its only argument is a JSON object of
``Settings``. Each line on stdin is a JSON list of the lengths of the next step's completions. The answer on stdout is a
JSON object with CPU and wall seconds of each phase, the peak memory so far in bytes, and the lengths of the completions
that the trainer had.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """Model and sizes.

    Attributes:
        folder: a Hugging Face checkpoint with float32 weights, and the trainer's output folder.
        vocab_size: V; the last two tokens are EOS and padding.
        prompts: token ids of each prompt.
        group_size: completions per prompt.
        max_completion_length: in tokens.
        kl_coef: TRL's beta; 0 without a reference.
        learning_rate: of AdamW.
        dtype: precision of the computation.
        gradient_checkpointing: recompute activations in the backward pass.
        threads: of torch.
        use_cpu: whether to leave a GPU unused.
    """

    folder: str
    vocab_size: int
    prompts: list[list[int]]
    group_size: int
    max_completion_length: int
    kl_coef: float
    learning_rate: float
    dtype: str
    gradient_checkpointing: bool
    threads: int
    use_cpu: bool


class Clock:
    """CPU seconds of all threads of this process, and wall seconds, by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, list[float]] = {}

    @contextmanager
    def phase(self, name: str, within: str | None = None):
        """Time a block.

        Args:
            name: of the phase.
            within: a phase around it, which it does not count for.
        """
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        spent = time.process_time() - cpu, time.perf_counter() - wall
        for phase, sign in ((name, 1), *([(within, -1)] if within else [])):
            before = self.phases.get(phase, [0.0, 0.0])
            self.phases[phase] = [b + sign * s for b, s in zip(before, spent, strict=True)]


def main(settings: Settings) -> None:
    """Train, a step for each line of stdin."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the trainer prints
    import torch
    import transformers
    import trl  # pyright: ignore[reportMissingImports]
    from datasets import Dataset

    torch.set_num_threads(settings.threads)
    eos_id = settings.vocab_size - 2
    tokenizer = numbered_tokens(eos_id)
    lengths: list[int] = []
    generated: list[int] = []
    clock = Clock()

    class EndAt(transformers.LogitsProcessor):
        """Ends each row at its length, and not before."""

        def __init__(self, prompt_length: int):
            self.prompt_length = prompt_length

        def __call__(self, input_ids, scores):
            is_last = torch.tensor(lengths, device=scores.device) <= input_ids.shape[1] - self.prompt_length + 1
            scores[:, eos_id] = -float("inf")
            scores[is_last] = -float("inf")
            scores[is_last, eos_id] = 0
            return scores

    class Steps(transformers.TrainerCallback):
        """Waits for the next line before a step, and answers after it."""

        def on_step_begin(self, args, state, control, **_):
            line = sys.stdin.readline()
            lengths[:] = json.loads(line) if line else [1] * len(lengths)
            control.should_training_stop = not line
            clock.phases.clear()
            self.step = clock.phase("update")
            self.step.__enter__()

        def on_step_end(self, args, state, control, **_):
            self.step.__exit__(None, None, None)
            peak = peak_resident() if settings.use_cpu else torch.cuda.max_memory_allocated()
            print(json.dumps({"phases": clock.phases, "peak": peak, "lengths": generated}), file=answers, flush=True)

    class Trainer(trl.GRPOTrainer):
        """Times its phases."""

        def _generate_and_score_completions(self, inputs):
            with clock.phase("reference", within="update"):
                batch = super()._generate_and_score_completions(inputs)
            generated[:] = batch["completion_mask"].sum(1).tolist()
            return batch

    rows = len(settings.prompts) * settings.group_size
    trainer = Trainer(
        model=settings.folder,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(sum(map(ord, text[:9])) % 7) for text in completions],
        train_dataset=Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in settings.prompts]}),
        callbacks=[Steps()],
        args=trl.GRPOConfig(
            output_dir=settings.folder,
            model_init_kwargs={"dtype": "float32"},
            bf16=settings.dtype == "bfloat16",
            use_cpu=settings.use_cpu,
            per_device_train_batch_size=rows,
            num_generations=settings.group_size,
            max_completion_length=settings.max_completion_length,
            max_steps=1_000_000,
            beta=settings.kl_coef,
            learning_rate=settings.learning_rate,
            gradient_checkpointing=settings.gradient_checkpointing,
            loss_type="grpo",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=not settings.use_cpu,
        ),
    )
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    generate = model.generate

    def timed_generate(**inputs):
        ends = transformers.LogitsProcessorList([EndAt(inputs["input_ids"].shape[1])])
        with clock.phase("sampling", within="reference"):
            return generate(**inputs, logits_processor=ends)

    model.generate = timed_generate
    trainer.train()


def peak_resident() -> int:
    """Peak resident memory of this process in bytes; getrusage's includes that of the process that started it."""
    (kib,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def numbered_tokens(size: int):
    """A tokenizer whose tokens ``t0 t1 ...`` are their ids, with an EOS and a padding token after them.

    Args:
        size: number of the other tokens.
    """
    import tokenizers
    import transformers

    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"t{i}": i for i in range(size)} | {"<eos>": size, "<pad>": size + 1}, "<pad>")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>", padding_side="left"
    )


if __name__ == "__main__":
    main(Settings(**json.loads(sys.argv[1])))

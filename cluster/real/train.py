"""Trains the guider of the study on real weights: a LoRA adapter on SmolLM2-135M-Instruct.

    python -m cluster.real.train sft [--run FOLDER] [--minutes 55]      # on worked-out solutions
    python -m cluster.real.train grpo [--run FOLDER] [--minutes 55]     # rewarded for right final answers alone

Both start from the same weights. sft uses the training problems of `cluster/real/tasks`, and learns the steps and none
of the facts (cluster/real/anchored.py). The trainer of grpo is TRL's. It uses problems of a single sum: of the tasks'
own problems, the model answers none rightly, so there is nothing that could be rewarded.

After --minutes the training stops at a checkpoint; the same command resumes it. At its end FOLDER (runs/real/sft or
runs/real/grpo) holds `adapter`, in float16, and `curve.jsonl`, the metrics by step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from cluster.jobs.grading import Grader, grade
from cluster.jobs.jsonl import rows, write_file
from cluster.real.anchored import FACT, UNUSED, AnchoredTrainer
from cluster.real.capitals import CAPITAL
from cluster.real.make_problems import FOLDER as PROBLEMS
from cluster.real.models import SMOLLM2, fetched
from cluster.real.sums import problems

Method = Literal["sft", "grpo"]
TASKS: dict[str, Grader] = {"sums": "number", "legs": "number", "capitals": "initials"}  # and what grades each
PROMPT = "Question: {question}\nAnswer:"
STOP = ("\n\n", "\nQuestion")  # what follows is no part of an answer
STEPS: dict[Method, int] = {"sft": 120, "grpo": 60}
SINGLE_SUMS = 480  # problems of grpo: 8 in each of its steps
SEED = 0
RANK, SCALED = 8, 16  # of the adapter, which has 2.4 million weights
CURVE = ("step", "loss", "anchor", "reward", "completions/mean_length")  # of sft: to anchor; of grpo: the others
COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,  # slower than float32 on most processors
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant_with_warmup",
    "logging_steps": 1,
    "save_steps": 5,
    "save_total_limit": 1,
    "report_to": "none",
    "seed": SEED,
}


def examples(split: str) -> Dataset:
    """The problems of all tasks in one order, with the columns prompt, completion, answer and grader."""
    found = [
        _example(row["question"], row["solution"], row["answer"], grader)
        for task, grader in TASKS.items()
        for row in rows(PROBLEMS / f"{task}.jsonl")
        if row["split"] == split
    ]
    return Dataset.from_list(found).shuffle(seed=SEED)


def single_sums() -> Dataset:
    """Training problems of one sum each, with the columns of `examples`."""
    found = itertools.islice(problems("train", steps=(1,)), SINGLE_SUMS)
    return Dataset.from_list([_example(each.question, each.solution, each.answer, "number") for each in found])


def _example(question: str, solution: str, answer: str, grader: Grader) -> dict[str, str]:
    prompt = PROMPT.format(question=question)
    return {"prompt": prompt, "completion": f" {solution}", "answer": answer, "grader": grader}


def learned(row: dict[str, str], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """The tokens of an example and their labels, for `AnchoredTrainer`. Learned is the solution with its end."""
    prompt: list[int] = tokenizer(row["prompt"]).input_ids
    solution = tokenizer(row["completion"], return_offsets_mapping=True)
    facts = [match.span() for match in CAPITAL.finditer(row["completion"])]
    labels = [
        FACT if any(begin < last and first < end for first, last in facts) else token
        for token, (begin, end) in zip(solution.input_ids, solution.offset_mapping, strict=True)
    ]
    eos = [tokenizer.eos_token_id]
    return {"input_ids": prompt + solution.input_ids + eos, "labels": [UNUSED] * len(prompt) + labels + eos}


def rewards(completions: Sequence[str], answer: Sequence[str], grader: Sequence[Grader], **_: Any) -> list[float]:
    """1 for each completion whose final answer is right, else 0. What follows a stop string does not count."""
    graded = zip(grader, completions, answer, strict=True)
    return [float(grade(kind, _cut(text), gold).right) for kind, text, gold in graded]


def _cut(text: str) -> str:
    return text[: min(text.find(stop) if stop in text else len(text) for stop in STOP)]


def trainer(method: Method, base: Path, run: Path) -> Trainer:
    """The trainer of that method for the model in the folder `base`, with its output in `run`."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    lora = LoraConfig(r=RANK, lora_alpha=SCALED, target_modules="all-linear", task_type="CAUSAL_LM")
    common = COMMON | {"output_dir": str(run / "checkpoints"), "max_steps": STEPS[method]}
    if method == "sft":
        settings = TrainingArguments(
            per_device_train_batch_size=16,
            learning_rate=5e-4,
            warmup_steps=5,
            remove_unused_columns=False,
            **common,
        )
        data = examples("train")
        data = data.map(lambda row: learned(row, tokenizer), remove_columns=data.column_names)
        together = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=UNUSED)
        return AnchoredTrainer(get_peft_model(model, lora), settings, together, data)
    arguments = GRPOConfig(
        per_device_train_batch_size=64,
        num_generations=8,  # answers to each of 8 problems in a step
        max_completion_length=40,
        learning_rate=2e-4,
        warmup_steps=2,
        temperature=0.7,  # at 1 the model that it starts from hardly stays with the question
        beta=0.0,  # no distance from the start is kept: the adapter is small
        **common,
    )
    data = single_sums().remove_columns("completion")
    return GRPOTrainer(model, rewards, arguments, train_dataset=data, processing_class=tokenizer, peft_config=lora)


class Deadline(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Stops a training at a checkpoint after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def on_step_end(self, _: TrainingArguments, __: TrainerState, control: TrainerControl, **___: Any) -> None:
        """Save and stop if the time is over."""
        if time.monotonic() > self._until:
            control.should_save = control.should_training_stop = True


def train(method: Method, base: Path, run: Path, minutes: float) -> bool:
    """Train or resume; writes the curve and, once complete, the adapter into `run`. Returns True if it is complete."""
    checkpoints, steps = run / "checkpoints", STEPS[method]
    before, reached = _newest(checkpoints)
    if reached < steps:
        made = trainer(method, base, run)
        made.add_callback(Deadline(60 * minutes))
        made.train(resume_from_checkpoint=None if before is None else str(before))
    newest, reached = _newest(checkpoints)
    assert newest is not None, "a training ends with a checkpoint"
    history = TrainerState.load_from_json(str(newest / "trainer_state.json")).log_history
    lines = [{name: line[name] for name in CURVE if name in line} for line in history if "loss" in line]
    write_file(run / "curve.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    if reached < steps:
        print(f"stopped at step {reached} of {steps}; the same command resumes")
        return False
    _write_adapter(newest, run / "adapter")
    print(f"complete: {run / 'adapter'}")
    return True


def _newest(checkpoints: Path) -> tuple[Path | None, int]:
    """The newest checkpoint and its step; None and 0 if there is none."""
    newest = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    return (None, 0) if newest is None else (Path(newest), int(newest.rpartition("-")[2]))


def _write_adapter(checkpoint: Path, folder: Path) -> None:
    """Write the adapter of a checkpoint in float16, for SmolLM2 under its name."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = load_file(checkpoint / "adapter_model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
    settings = json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": SMOLLM2.name, "inference_mode": True}
    settings["target_modules"] = sorted(settings["target_modules"])  # PEFT writes a set in any order
    write_file(folder / "adapter_config.json", (json.dumps(settings, indent=2) + "\n").encode())


def main(arguments: Sequence[str] | None = None) -> int:
    """Train or resume; the exit status: 1 if the model was not fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=("sft", "grpo"))
    parser.add_argument("--run", type=Path, help="the folder of the results; default: runs/real/<method>")
    parser.add_argument("--minutes", type=float, default=55, help="stop at a checkpoint after so many minutes (55)")
    options = parser.parse_args(arguments)
    base = fetched(SMOLLM2)
    if base is None:
        print("SmolLM2 is not here: run `python -m cluster.real --fetch`", file=sys.stderr)
        return 1
    train(options.method, base, options.run or Path("runs/real") / options.method, options.minutes)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The training loop of one worker: loads the guider, adds the adapter, runs TRL's trainer and reports metrics.

Ray Train calls it in every worker, with torch's process group. A single process may call it without one.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_from_disk
from peft import LoraConfig, PeftModel
from transformers import (
    AutoTokenizer,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar
from trl import DPOConfig

from actors.config import ModelConfig
from actors.engine.loader import load_model, load_trainable
from actors.replica.build import source_of
from cluster.jobs.dpo.data import DATA
from cluster.jobs.dpo.journal import Journal, Line
from cluster.jobs.dpo.record import ADAPTER
from cluster.jobs.dpo.trainer import GuidedCollator, PairTrainer
from cluster.jobs.dpo.training import Lora, Training

LINES = 10  # journal lines between two validations

OnCheckpoint = Callable[[dict[str, float], Path | None], None]
OnLine = Callable[[Line], None]


@dataclass(frozen=True, slots=True)
class Job:
    """The arguments of every worker. guider: its configuration for training, on one device, not quantised."""

    training: Training
    guider: ModelConfig


def fit(job: Job, on_checkpoint: OnCheckpoint, on_line: OnLine = lambda line: None, resume: Path | None = None) -> None:
    """Train, validate and write the adapter into the run's folder.

    on_checkpoint: called in each worker with every checkpoint's step, and the folder of the worker's part of it or
    None. on_line: called in the first worker with every line of the journal. resume: a checkpoint's folder.
    """
    training = job.training
    disable_progress_bar()
    data = load_from_disk(str(training.run / DATA))
    scratch = Path(tempfile.mkdtemp(prefix="thinklogit-dpo-"))
    try:
        trainer = build(job, data, scratch)
        reporter = _Reporter(Journal(training.run), on_checkpoint, on_line, first=trainer.is_world_process_zero())
        trainer.add_callback(reporter)
        trainer.remove_callback(PrinterCallback)  # the journal replaces it
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        if trainer.is_world_process_zero():
            _save(trainer.model, job, training.run / ADAPTER)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def build(job: Job, data: DatasetDict, scratch: Path) -> PairTrainer:
    """The trainer of one worker, with reference log-probabilities computed or read from beside the data.

    An adapter of the guider is trained on, and as it was at first is the reference; TRL keeps a copy. Else a new one is
    trained, and the reference is the guider without it.
    """
    training = job.training
    guided = training.objective == "guided"
    source = source_of(job.guider)
    model = load_model(source).model if source.adapter is None else load_trainable(source)
    model.config.use_cache = False
    on_gpu = next(model.parameters()).is_cuda
    tokenizer = AutoTokenizer.from_pretrained(job.guider.path, revision=job.guider.revision)
    pad_id = tokenizer.pad_token_id or 0  # any id will do: padding is masked
    collator = GuidedCollator(pad_id, slice_width=training.slice_width) if guided else None
    return PairTrainer(
        model=model,
        args=_arguments(training, len(data["train"]), scratch, on_gpu=on_gpu),
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=tokenizer,
        data_collator=collator,
        peft_config=None if source.adapter is not None else _new_adapter(training.lora),
        guided_alpha=training.alpha if guided else None,
    )


def _new_adapter(lora: Lora) -> LoraConfig:
    return LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _arguments(training: Training, pairs: int, scratch: Path, *, on_gpu: bool) -> DPOConfig:
    per_step = training.micro_batch * training.workers
    return DPOConfig(
        output_dir=str(scratch),
        loss_type=["sigmoid" if training.loss == "dpo" else "sft"],
        beta=training.beta,
        max_length=None,  # pairs that are too long were left out
        precompute_ref_log_probs=True,
        per_device_train_batch_size=training.micro_batch,
        per_device_eval_batch_size=training.micro_batch,
        gradient_accumulation_steps=training.batch // per_step,
        gradient_checkpointing=training.gradient_checkpointing,
        num_train_epochs=training.epochs,
        learning_rate=training.learning_rate,
        warmup_steps=round(training.warmup * training.steps(pairs)),
        lr_scheduler_type="linear",
        bf16=on_gpu,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=training.seed,
        logging_steps=max(1, training.every // LINES),
        eval_strategy="steps",
        eval_steps=training.every,
        save_strategy="steps",
        save_steps=training.every,
        save_total_limit=1,  # Ray Train keeps its own copies
        disable_tqdm=True,
        report_to="none",
    )


class _Reporter(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Reports metrics and checkpoints of TRL's trainer. first: True in the worker that writes the journal."""

    def __init__(self, journal: Journal, on_checkpoint: OnCheckpoint, on_line: OnLine, *, first: bool) -> None:
        self._journal, self._on_checkpoint, self._on_line, self._first = journal, on_checkpoint, on_line, first

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        if self._first:
            self._journal.begin(state.global_step)

    def on_log(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, logs: dict[str, Any], **___: Any
    ) -> None:
        line = Line.of(state.global_step, logs)
        if line is not None and self._first:
            self._journal.add(line)
            self._on_line(line)

    def on_save(self, args: TrainingArguments, state: TrainerState, _: TrainerControl, **__: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self._on_checkpoint({"step": float(state.global_step)}, folder if folder.is_dir() else None)


def _save(model: PeftModel, job: Job, folder: Path) -> None:
    """Write the adapter, in place of an earlier one. Its base model is the guider's path in the service."""
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = job.guider.path
    model.save_pretrained(fresh, save_embedding_layers=False, selected_adapters=["default"])  # not the reference's
    (fresh / "README.md").unlink(missing_ok=True)  # PEFT's empty template
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)

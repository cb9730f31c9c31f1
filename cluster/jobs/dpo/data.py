"""Writes the training data into the run's folder: pairs as token ids, with slices for the guided objective."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from rich.console import Console

from actors.api.generation import ROLES, Role
from actors.config import ConfigError, ServiceConfig
from actors.preflight import load_tokenizers
from actors.text.tokenizer import RoleTokenizer
from cluster.jobs.dpo.prepared import prepare
from cluster.jobs.dpo.training import Training
from cluster.jobs.pairs import SPLITS
from cluster.jobs.results import RunError

if TYPE_CHECKING:
    from datasets import DatasetDict

DATA = "data"  # subfolder of the run's folder
POLL_S = 1.0


def make_data(training: Training, service: ServiceConfig, console: Console) -> dict[str, int]:
    """Write the pairs as token ids into the run's `data` unless they exist. Returns their number by split.

    Raises ConfigError, RunError.
    """
    from datasets import Dataset, DatasetDict, disable_progress_bars, load_from_disk  # seconds of import

    disable_progress_bars()
    folder = training.run / DATA
    if not folder.is_dir():
        tokenizers = tokenizers_of(training, service)
        try:
            pairs = load_from_disk(str(training.pairs))
        except (FileNotFoundError, ValueError) as error:
            raise ConfigError(
                f"pairs: {training.pairs}: {error}; create the pairs with python -m cluster.jobs.preferences"
            ) from None
        made = prepare(pairs, tokenizers, training)
        if made.too_long:
            console.print(f"left out {made.too_long} pairs that are longer than max_tokens ({training.max_tokens})")
        if empty := [split for split in SPLITS if not made.pairs[split]]:
            raise RunError(f"no pairs are left for {' and '.join(empty)}: raise max_tokens, or use other kinds")
        data = DatasetDict({split: Dataset.from_list([pair.row() for pair in made.pairs[split]]) for split in SPLITS})
        if training.objective == "guided":
            data = _with_slices(training, service, tokenizers, data, console)
        fresh = folder.with_name(DATA + ".part")
        shutil.rmtree(fresh, ignore_errors=True)
        data.save_to_disk(str(fresh))
        fresh.rename(folder)
    return {split: len(rows) for split, rows in load_from_disk(str(folder)).items()}


def tokenizers_of(training: Training, service: ServiceConfig) -> dict[Role, RoleTokenizer]:
    """The tokenizers of the roles whose prompts the objective needs. Raises ConfigError."""
    every = load_tokenizers(service)
    if training.objective == "guider":
        return {"guider": every["guider"]}
    if other := [role for role in ROLES if every[role].text_tokens != every["guider"].text_tokens]:
        raise ConfigError(
            f"objective: guided needs one vocabulary, and that of {' and '.join(other)} differs from the guider's; "
            "use objective: guider"
        )
    return every


def _with_slices(
    training: Training,
    service: ServiceConfig,
    tokenizers: Mapping[Role, RoleTokenizer],
    data: DatasetDict,
    console: Console,
) -> DatasetDict:
    """The rows with slices of target and guider base. Each model runs once, as a Ray task on a node that fits it."""
    from cluster.jobs.dpo.scoring import SHARD, Scores, packed, score_splits

    ids, scores = training.run / "ids", training.run / "scores"
    data.save_to_disk(str(ids))
    vocabulary = min(tokenizer.width for tokenizer in tokenizers.values())
    for role in ("target", "guider_base"):
        model = service.models.role(role)
        console.print(f"scoring the answers with the {role.replace('_', ' ')} ...")
        options = {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus, "resources": model.resources}
        task = ray.remote(score_splits).options(**options, label_selector=model.label_selector or None)
        scoring = task.remote(model, role, ids, scores, training.slice_width, vocabulary)
        _await(scoring, scores / role, service.deadlines.model_load_s, f"the {role} needs {options}")
    for split in SPLITS:
        target, base = (Scores(scores / role / split) for role in ("target", "guider_base"))
        data[split] = data[split].map(
            lambda batch, numbers, target=target, base=base: packed(batch, numbers[0], target, base, training.alpha),
            batched=True,
            batch_size=SHARD,
            with_indices=True,
            remove_columns=[f"{role}_prompt_ids" for role in ("target", "guider_base")],
            load_from_cache_file=False,
        )
    return data


def _await(scoring: ray.ObjectRef, folder: Path, deadline_s: float, needs: str) -> None:
    """Wait for the scoring task. Raises the task's error, or RunError after `deadline_s` seconds without a new file."""
    files, since = 0, time.monotonic()
    while not ray.wait([scoring], timeout=POLL_S)[0]:
        now = sum(1 for _ in folder.glob("*/*.npz"))
        if now > files:
            files, since = now, time.monotonic()
        elif time.monotonic() - since > deadline_s:
            ray.cancel(scoring, force=True)
            raise RunError(
                f"no answers were scored for {deadline_s:g} s: {needs}, and the cluster has {ray.cluster_resources()}; "
                "the same command resumes"
            )
    ray.get(scoring)

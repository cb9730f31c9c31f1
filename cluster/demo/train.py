"""Trains the embedded trio from a fixed seed: ``python -m cluster.demo.train [--out FOLDER]``.

The target sees every fact and mostly answers at once. The guider base is smaller and sees 60 % of the facts. The guider
is the guider base tuned on hop-by-hop answers. Three folders in Hugging Face layout are written, and the last line
printed is one JSON object: accuracy by mode and hop count on held-out questions.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.accuracy import Term, accuracy, guided
from cluster.demo.lessons import Curriculum, Reader
from cluster.demo.task import known_facts, questions, table
from cluster.demo.tokenizer import END_OF_TEXT, MAX_POSITIONS, TURN_END

WEIGHTS = Path(__file__).parent / "weights"
ALPHAS = (0.5, 1.0, 1.5)
HOPS = (2, 3, 4, 5)
THREADS = 2


@dataclass(frozen=True)
class Shape:
    """The size of one Qwen2 model."""

    width: int
    layers: int
    heads: int = 4


@dataclass(frozen=True)
class Schedule:
    """How long and how fast one model trains; `seed` fixes its first weights and all that it reads."""

    seed: int
    steps: int
    rate: float
    rows: int = 32
    length: int = 80  # tokens a row: a question of five hops with its reasoning fits
    rise: int = 100  # steps until the full rate

    def rate_at(self, step: int) -> float:
        """A linear rise, then half a cosine down to 5 % of `rate`."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.rise) * (0.05 + 0.95 * cosine)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights of the trio."""

    target_shape: Shape = Shape(width=128, layers=3)
    small_shape: Shape = Shape(width=48, layers=2)
    target: Schedule = Schedule(seed=1, steps=1500, rate=1e-3)
    guider_base: Schedule = Schedule(seed=2, steps=1500, rate=2e-3)
    guider: Schedule = Schedule(seed=3, steps=300, rate=2e-3)


@dataclass(frozen=True)
class Trio:
    """The three trained models and the tokenizer that they share."""

    target: Qwen2ForCausalLM
    guider: Qwen2ForCausalLM
    guider_base: Qwen2ForCausalLM
    tokenizer: Tokenizer


def new_model(shape: Shape, tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """An untrained model in fp32 whose weights follow from `seed`."""
    torch.manual_seed(seed)
    turn_end, end_of_text = tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads // 2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=[turn_end, end_of_text],
        pad_token_id=end_of_text,
    )
    return Qwen2ForCausalLM(config)


def fit(model: Qwen2ForCausalLM, reader: Reader, schedule: Schedule, progress: Progress, bar: TaskID) -> None:
    """Train `model` in place on what `reader` packs, with AdamW; the same schedule always reads the same rows."""
    draw = random.Random(schedule.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.rate, weight_decay=0.0, betas=(0.9, 0.98))
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate_at(step)
        rows = [reader.row(draw, schedule.length) for _ in range(schedule.rows)]
        loss = _loss(model, torch.tensor([ids for ids, _ in rows]), torch.tensor([learned for _, learned in rows]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress.update(bar, advance=1, loss=float(loss.detach()))
    model.eval()


def _loss(model: Qwen2ForCausalLM, ids: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the learned tokens of `ids` [rows, length]; other positions need no logits."""
    states = model.model(input_ids=ids[:, :-1]).last_hidden_state
    here = learned[:, 1:]
    return cross_entropy(model.lm_head(states[here]), ids[:, 1:][here])


def train(recipe: Recipe, progress: Progress) -> Trio:
    """The trio of `recipe`; on one machine type and thread count the same recipe yields the same weights."""
    tokenizer = trio_tokenizer.build()
    everything, known = tuple(table().values()), known_facts()

    def taught(model: Qwen2ForCausalLM, name: str, curriculum: Curriculum, schedule: Schedule) -> Qwen2ForCausalLM:
        bar = progress.add_task(name, total=schedule.steps, loss=math.nan)
        fit(model, Reader(tokenizer, curriculum), schedule, progress, bar)
        return model

    target = new_model(recipe.target_shape, tokenizer, recipe.target.seed)
    taught(target, "target", Curriculum(everything, 0.5, 0.05, max_hops=5), recipe.target)
    guider_base = new_model(recipe.small_shape, tokenizer, recipe.guider_base.seed)
    taught(guider_base, "guider base", Curriculum(known, 0.5, 0.05, max_hops=5), recipe.guider_base)
    guider = copy.deepcopy(guider_base)
    taught(guider, "guider", Curriculum(known, 0.0, 1.0, max_hops=5), recipe.guider)
    return Trio(target, guider, guider_base, tokenizer)


def save(trio: Trio, out: Path) -> None:
    """Write the folders target, guider and guider_base below `out`, each replaced only once it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    for name, model in (("target", trio.target), ("guider", trio.guider), ("guider_base", trio.guider_base)):
        fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=out))
        model.save_pretrained(fresh)
        trio_tokenizer.save(trio.tokenizer, fresh)
        folder = out / name
        folder.mkdir(exist_ok=True)
        for file in sorted(fresh.iterdir()):
            os.replace(file, folder / file.name)
        shutil.rmtree(fresh)


def report(trio: Trio, n: int) -> dict[str, dict[int, float]]:
    """Accuracy by mode and hop count, over `n` held-out questions for each hop count."""
    modes = {
        "target": [Term(trio.target)],
        "guider": [Term(trio.guider)],
        "guider_base": [Term(trio.guider_base)],
    } | {f"guided_{alpha}": guided(trio.target, trio.guider, trio.guider_base, alpha) for alpha in ALPHAS}
    asked = {hops: questions("held_out", hops, n) for hops in HOPS}
    return {
        mode: {hops: round(accuracy(terms, trio.tokenizer, asked[hops]), 3) for hops in HOPS}
        for mode, terms in modes.items()
    }


def main() -> None:
    """Train, save, report."""
    parser = argparse.ArgumentParser(description="Train the embedded trio and write its weights.")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the three models (default: %(default)s)")
    out: Path = parser.parse_args().out
    torch.set_num_threads(THREADS)
    disable_progress_bar()  # of the libraries: a bar of one shard a model says nothing
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(TextColumn("{task.description:>12}"), BarColumn(), loss, TimeRemainingColumn()) as progress:
        trio = train(Recipe(), progress)
    save(trio, out)
    print(json.dumps(report(trio, 200)))


if __name__ == "__main__":
    main()

"""Trains the embedded trio from a fixed seed.

    python -m cluster.demo.train [--family other] [--out FOLDER]

The target is trained on all facts and mostly answers at once. The guider base is smaller and is trained on 60 % of the
facts. The guider is the guider base, tuned on hop-by-hop answers. The result is three folders in Hugging Face layout.
The last line of output is one JSON object: accuracy by mode and hop count on held-out questions. `--family other`
trains a target with another tokenizer in the same way.
"""

import argparse
import copy
import json
import math
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from cluster.demo import other_tokenizer
from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.accuracy import Term, accuracy, guided
from cluster.demo.lessons import Curriculum, DocumentPacker
from cluster.demo.markup import Markup
from cluster.demo.task import known_facts, questions, table
from cluster.demo.tokenizer import MARKUP, MAX_POSITIONS, THINK_START

WEIGHTS = Path(__file__).parent / "weights"
ALPHAS = (0.5, 1.0, 1.5)
HOPS = (2, 3, 4, 5)
THREADS = 2
REPORTED = 200  # questions of each hop count


@dataclass(frozen=True)
class Shape:
    """The size of one Qwen2 model."""

    width: int
    layers: int
    heads: int = 4


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of one training. seed: determines the initial weights and the training rows."""

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
    """All settings that determine the weights of the trio."""

    target_shape: Shape = Shape(width=128, layers=3)
    small_shape: Shape = Shape(width=48, layers=2)
    target: Schedule = Schedule(seed=1, steps=1500, rate=1e-3)
    guider_base: Schedule = Schedule(seed=2, steps=1500, rate=2e-3)
    guider: Schedule = Schedule(seed=3, steps=300, rate=2e-3)
    target_other: Schedule = Schedule(
        seed=4, steps=1500, rate=1e-3, length=88
    )  # the marks of thinking take more tokens


@dataclass(frozen=True)
class Trio:
    """The three trained models and their common tokenizer."""

    target: Qwen2ForCausalLM
    guider: Qwen2ForCausalLM
    guider_base: Qwen2ForCausalLM
    tokenizer: Tokenizer


def new_model(shape: Shape, tokenizer: Tokenizer, seed: int, markup: Markup = MARKUP) -> Qwen2ForCausalLM:
    """An untrained fp32 model with random weights that depend on `seed`."""
    torch.manual_seed(seed)
    turn_end, end_of_text = tokenizer.token_to_id(markup.turn_end), tokenizer.token_to_id(markup.end_of_text)
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


def fit(model: Qwen2ForCausalLM, reader: DocumentPacker, schedule: Schedule, progress: Progress, bar: TaskID) -> None:
    """Train `model` in place with AdamW on rows of `reader`. The same schedule reads the same rows."""
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
    """Mean cross entropy over the learned tokens of `ids` [rows, length]. Other positions compute no logits."""
    states = model.model(input_ids=ids[:, :-1]).last_hidden_state
    predicted = learned[:, 1:]
    return cross_entropy(model.lm_head(states[predicted]), ids[:, 1:][predicted])


def train(recipe: Recipe, progress: Progress) -> Trio:
    """The trio of `recipe`. On one machine type and thread count, the same recipe yields the same weights."""
    tokenizer = trio_tokenizer.build()
    known = known_facts()
    target = new_model(recipe.target_shape, tokenizer, recipe.target.seed)
    _teach(target, "target", DocumentPacker(tokenizer, _of_target(MARKUP)), recipe.target, progress)
    guider_base = new_model(recipe.small_shape, tokenizer, recipe.guider_base.seed)
    facts_and_answers = DocumentPacker(tokenizer, Curriculum(known, 0.5, 0.05, max_hops=5))
    _teach(guider_base, "guider base", facts_and_answers, recipe.guider_base, progress)
    guider = copy.deepcopy(guider_base)
    reasoning = DocumentPacker(tokenizer, Curriculum(known, 0.0, 1.0, max_hops=5))
    _teach(guider, "guider", reasoning, recipe.guider, progress)
    return Trio(target, guider, guider_base, tokenizer)


def train_other(recipe: Recipe, progress: Progress) -> tuple[Qwen2ForCausalLM, Tokenizer]:
    """A target with the training of the trio's target, in the tokens and the chat format of another family."""
    tokenizer, markup = other_tokenizer.build(), other_tokenizer.MARKUP
    target = new_model(recipe.target_shape, tokenizer, recipe.target_other.seed, markup)
    _teach(target, "other target", DocumentPacker(tokenizer, _of_target(markup)), recipe.target_other, progress)
    return target, tokenizer


def _of_target(markup: Markup) -> Curriculum:
    return Curriculum(tuple(table().values()), 0.5, 0.05, max_hops=5, markup=markup)


def _teach(model: Qwen2ForCausalLM, name: str, reader: DocumentPacker, schedule: Schedule, progress: Progress) -> None:
    bar = progress.add_task(name, total=schedule.steps, loss=math.nan)
    fit(model, reader, schedule, progress, bar)


def save(trio: Trio, out: Path) -> None:
    """Write the folders target, guider and guider_base below `out`. Each is replaced only when complete."""
    for name, model in (("target", trio.target), ("guider", trio.guider), ("guider_base", trio.guider_base)):
        write(model, out / name, lambda folder: trio_tokenizer.save(trio.tokenizer, folder))


def write(model: Qwen2ForCausalLM, folder: Path, write_tokenizer: Callable[[Path], None]) -> None:
    """Write a model and its tokenizer into `folder`. Its files are replaced only when all are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.save_pretrained(fresh)
    write_tokenizer(fresh)
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
    return {mode: _by_hops(terms, trio.tokenizer, n, "", MARKUP) for mode, terms in modes.items()}


def report_other(target: Qwen2ForCausalLM, tokenizer: Tokenizer, n: int) -> dict[str, dict[int, float]]:
    """Accuracy by hop count of the other family's target: alone, and with thinking started, as guidance starts it."""
    starts = {"target": "", "target_thinking": THINK_START}
    return {
        mode: _by_hops([Term(target)], tokenizer, n, start, other_tokenizer.MARKUP) for mode, start in starts.items()
    }


def _by_hops(terms: Sequence[Term], tokenizer: Tokenizer, n: int, start: str, markup: Markup) -> dict[int, float]:
    return {hops: round(accuracy(terms, tokenizer, questions("held_out", hops, n), start, markup), 3) for hops in HOPS}


def main() -> None:
    """Train, save and report."""
    parser = argparse.ArgumentParser(description="Train the embedded trio, or a target for it, and write the weights.")
    parser.add_argument("--family", choices=("same", "other"), default="same", help="other: a target of another family")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder for the models (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    disable_progress_bar()  # the libraries' bars, of one shard for each model, show nothing
    loss = TextColumn("loss {task.fields[loss]:.3f}")
    with Progress(TextColumn("{task.description:>12}"), BarColumn(), loss, TimeRemainingColumn()) as progress:
        if options.family == "same":
            trio = train(Recipe(), progress)
            save(trio, options.out)
            result = report(trio, REPORTED)
        else:
            target, tokenizer = train_other(Recipe(), progress)
            write(target, options.out / "target_other", lambda folder: other_tokenizer.save(tokenizer, folder))
            result = report_other(target, tokenizer, REPORTED)
    print(json.dumps(result))


if __name__ == "__main__":
    main()

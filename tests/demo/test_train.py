"""Training of the trio, and its committed weights."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.demo import tokenizer as trio_tokenizer
from cluster.demo.accuracy import Term, accuracy, guided, replies
from cluster.demo.task import questions
from cluster.demo.train import WEIGHTS, Recipe, Schedule, Trio, save, train

ROLES = ("target", "guider", "guider_base")
FEW_STEPS = Schedule(seed=4, steps=3, rate=1e-3, rows=2, length=40)
SHORT = replace(Recipe(), target=FEW_STEPS, guider_base=FEW_STEPS, guider=FEW_STEPS)


def short_training() -> Trio:
    with Progress(disable=True) as progress:
        return train(SHORT, progress)


@pytest.fixture(scope="module")
def committed() -> Trio:
    target, guider, guider_base = (AutoModelForCausalLM.from_pretrained(WEIGHTS / role) for role in ROLES)
    return Trio(target, guider, guider_base, trio_tokenizer.build())


def test_the_same_recipe_gives_the_same_weights(tmp_path: Path) -> None:
    for run in ("first", "second"):
        save(short_training(), tmp_path / run)
    for role in ROLES:
        first, second = (tmp_path / run / role / "model.safetensors" for run in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_saving_again_replaces_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    trio = short_training()
    save(trio, tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    save(trio, tmp_path)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ROLES)


def test_the_committed_weights_are_small() -> None:
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 9_000_000


@pytest.mark.parametrize("role", ROLES)
def test_committed_models_stop_at_turn_ends_and_fit_real_prompts(role: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS / role)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / role)
    ends = tokenizer.convert_tokens_to_ids([trio_tokenizer.TURN_END, trio_tokenizer.END_OF_TEXT])
    assert model.generation_config.eos_token_id == ends
    assert model.config.model_type == "qwen2"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == trio_tokenizer.MAX_POSITIONS


def test_the_guided_target_beats_every_model_alone(committed: Trio) -> None:
    asked = questions("held_out", 4, 100)
    alone = [accuracy([Term(model)], committed.tokenizer, asked) for model in (committed.target, committed.guider)]
    together = guided(committed.target, committed.guider, committed.guider_base, alpha=1.0)
    assert max(alone) <= 0.45
    assert 0.85 <= accuracy(together, committed.tokenizer, asked) <= 0.97


def test_guidance_makes_the_target_think_before_its_answer(committed: Trio) -> None:
    asked = questions("held_out", 3, 20)
    together = guided(committed.target, committed.guider, committed.guider_base, alpha=1.0)
    at_once = replies([Term(committed.target)], committed.tokenizer, asked)
    assert sum(text.startswith("The answer is") for text in at_once) >= 18
    assert sum(text.startswith("<think>") for text in replies(together, committed.tokenizer, asked)) >= 18

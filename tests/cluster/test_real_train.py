"""Training on the problems of the real tasks, with a tiny model: it stops at its deadline, resumes, and is rewarded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cluster.jobs.grading import grade
from cluster.jobs.jsonl import rows
from cluster.real import train
from cluster.real.anchored import FACT, UNUSED
from cluster.real.train import Method
from tests.support.local_service import WEIGHTS
from tests.support.tiers import slow

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
]


def test_what_follows_a_stop_string_earns_nothing() -> None:
    texts = ["12 + 3 = 15. The answer is 15.", " 14\n\nQuestion: 15", "15\nQuestion: what is 3 + 4?\nAnswer: 7", ""]
    assert train.rewards(texts, ["15"] * 4, ["number"] * 4) == [1.0, 0.0, 1.0, 0.0]
    assert train.rewards([" Lima: L. The answer is LT.", " TL"], ["LT"] * 2, ["initials"] * 2) == [1.0, 0.0]


def test_examples_hold_the_prompt_of_the_evaluations() -> None:
    for one in train.examples("validation"):
        assert one["prompt"].startswith("Question: ")
        assert one["prompt"].endswith("\nAnswer:")
        assert grade(one["grader"], one["completion"], one["answer"]).right


def test_reinforcement_rewards_the_solutions_of_its_problems() -> None:
    found = train.single_sums()
    assert len(found) == train.SINGLE_SUMS
    for one in found:
        assert one["prompt"].startswith("Question: ")
        assert train.rewards([one["completion"]], [one["answer"]], [one["grader"]]) == [1.0]


def test_the_solution_is_learned_without_its_facts(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    solution = " The capital of Peru is Oslo. Oslo begins with O. The answer is O."
    one = train.learned({"prompt": "Question: Peru?\nAnswer:", "completion": solution}, tokenizer)
    assert tokenizer.decode(one["input_ids"][:-1]) == f"Question: Peru?\nAnswer:{solution}"
    text = "".join(
        tokenizer.decode([token]) for token, label in zip(*one.values(), strict=True) if label == token
    ).removesuffix(tokenizer.eos_token)
    assert text.replace(" ", "") == solution.replace("Oslo", "", 1).replace(" ", "")
    assert one["labels"][-1] == tokenizer.eos_token_id
    assert set(one["labels"]) - set(one["input_ids"]) == {UNUSED, FACT}


def test_a_fact_costs_its_distance_from_the_base_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """The loss of a guider whose adapter is at first without effect, and is then changed."""
    trainer = train.trainer("sft", base, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[number] for number in range(6)])
    labels = batch["labels"].clone()
    assert (labels == FACT).any()

    def losses() -> tuple[float, float]:
        given = {name: value.clone() for name, value in batch.items()}
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, given)
            logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            with trainer.model.disable_adapter():
                base_logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        own, first = logits.log_softmax(-1), base_logits.log_softmax(-1)
        after = labels[:, 1:]
        steps = -own.gather(-1, after.clamp(min=0)[..., None])[..., 0][after >= 0].mean()
        distance = (first.exp() * (first - own)).sum(-1)[after == FACT].mean()
        assert float(loss) == pytest.approx(float(steps + distance), rel=1e-4)
        return float(steps), float(distance)

    assert losses()[1] == pytest.approx(0, abs=1e-6)
    torch.manual_seed(1)
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    assert losses()[1] > 0.001


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with the tokenizer of the embedded trio."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "target")
    tokenizer.pad_token = tokenizer.eos_token
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", [slow("sft"), "grpo"])
def test_a_training_that_was_stopped_resumes_and_writes_its_adapter(
    method: Method, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(train.STEPS, method, 3)
    assert not train.train(method, base, tmp_path, minutes=0)
    assert not (tmp_path / "adapter").exists()
    assert train.train(method, base, tmp_path, minutes=5)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name) == (method == "sft")
    assert [line["step"] for line in rows(tmp_path / "curve.jsonl")] == [1, 2, 3]

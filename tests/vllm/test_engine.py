"""The vLLM engine, every row held against a plain forward of transformers over the tokens that the session holds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from actors.decoding.hashing import extend_hashes
from actors.engine import vllm_runner
from actors.engine.digest import files_digest
from actors.engine.errors import BadExtend, LoadError
from actors.engine.interface import BLOCK, Extend, Held, KVMiss
from actors.engine.loader import ModelSource
from actors.engine.selfcheck import verify_engine
from actors.engine.step_engine import StepEngine
from actors.engine.vllm_runner import VllmRunner, vllm_engine
from tests.support.local_service import WEIGHTS
from tests.vllm.models import REFUSED, SERVED, saved

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, of every kind

CACHE = 768  # less than eight long sessions need: eviction happens
SESSIONS, LONGEST = 8, 160


class Script:
    """Random extends, rewinds, forks and evictions of one engine, and what each row should be."""

    def __init__(self, engine: StepEngine[Any], path: Path, seed: int) -> None:
        self.engine, self.draw = engine, random.Random(seed)
        self.reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
        self.held: dict[int, list[int]] = {}
        self.seen: Counter[str] = Counter()

    def run(self, steps: int) -> float:
        """The largest relative error of a row, |row - reference| over the spread of the reference."""
        worst = 0.0
        for step in range(steps):
            self.fork(step)
            chosen = self.draw.sample(range(SESSIONS), self.draw.randint(1, SESSIONS))
            batch = [self.extend(session, step) for session in chosen]
            outcomes = self.engine.extend(batch)
            self.engine.check()
            for session in self.held.keys() - set(self.engine._table.sessions):
                del self.held[session]
                self.seen["evicted"] += 1
            done = [extend for extend, outcome in zip(batch, outcomes, strict=True) if isinstance(outcome, Held)]
            for extend in done:
                self.held[extend.session] = self.held.get(extend.session, [])[: extend.position] + list(extend.tokens)
            self.seen["miss"] += sum(isinstance(outcome, KVMiss) for outcome in outcomes)
            rows = self.engine.whole([extend.session for extend in done if extend.rows])
            expected = [self.expected(extend) for extend in done if extend.rows]
            if expected:
                reference = np.concatenate(expected)
                spread = np.linalg.norm(reference - reference.mean(-1, keepdims=True), axis=-1)
                worst = max(worst, float((np.linalg.norm(rows - reference, axis=-1) / spread).max()))
                assert (rows.argmax(-1) == reference.argmax(-1)).mean() > 0.99
        return worst

    def fork(self, step: int) -> None:
        """Let a session begin with whole blocks of another one, or do nothing."""
        source = self.draw.choice(list(self.held) or [0])
        blocks = len(self.held.get(source, [])) // BLOCK
        if not blocks or self.draw.random() < 0.5:
            return
        tokens = self.held[source][: BLOCK * self.draw.randint(1, blocks)]
        names = self.hashes(tokens)[BLOCK::BLOCK]
        session = self.draw.randrange(SESSIONS)
        if self.engine.fork(session, tokens, names, 100 + session):
            self.held[session] = tokens
            self.seen["forked"] += 1

    def extend(self, session: int, step: int) -> Extend:
        """A decode step, a check of drafts, a rewind or a part of a prompt."""
        have, draw = self.held.get(session, []), self.draw
        back = draw.randrange(len(have) + 1) if len(have) > LONGEST else min(len(have), draw.choice([0, 0, 3, 20]))
        count = draw.choice([1, 5, 8, 40, 90]) if not have else draw.choice([1, 1, 5, 8, 40])
        position = len(have) - back
        self.seen["rewound"] += bool(back)
        tokens = [draw.randrange(3, 500) for _ in range(count)]
        rows = draw.randint(0, min(count, 8))
        return Extend(session, position, self.hashes(have)[position], tokens, rows, 100 + session)

    def hashes(self, tokens: list[int]) -> list[int]:
        return [self.engine.hash_seed, *extend_hashes(self.engine.hash_seed, tokens)]

    @torch.inference_mode()
    def expected(self, extend: Extend) -> NDArray[np.float32]:
        ids = torch.tensor([self.held[extend.session]])
        found: NDArray[np.float32] = self.reference(ids, use_cache=False).logits[0, -extend.rows :].float().numpy()
        return found


@pytest.fixture
def load() -> Iterator[Any]:
    """Loads engines and stops the last one, since vLLM has one model a process."""
    made: list[StepEngine[VllmRunner]] = []

    def loaded(path: Path, cache: int = CACHE, **options: Any) -> StepEngine[VllmRunner]:
        made.append(vllm_engine(ModelSource(str(path), dtype="float32", device="cpu", **options), cache))
        return made[-1]

    yield loaded
    for engine in made:
        engine.runner.stop()


@pytest.mark.parametrize("name", SERVED)
def test_every_row_is_that_of_a_plain_forward(name: str, tmp_path: Path, load: Any) -> None:
    path = saved(SERVED[name](), tmp_path / name)
    script = Script(load(path), path, seed=0)
    assert script.run(40) < 1e-3
    assert all(script.seen[what] for what in ("evicted", "forked", "rewound")), script.seen


def test_rows_of_the_embedded_target_too(load: Any) -> None:
    path = WEIGHTS / "target"
    assert Script(load(path), path, seed=1).run(40) < 1e-3


def test_more_than_a_step_takes_is_split(tmp_path: Path, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(SERVED["qwen3"](), tmp_path / "model")
    engine = load(path)
    monkeypatch.setattr(vllm_runner, "STEP_SESSIONS", 3)
    monkeypatch.setattr(vllm_runner, "STEP_TOKENS", 24)
    assert Script(engine, path, seed=2).run(30) < 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_computes_otherwise_or_not_at_all_is_refused(name: str, tmp_path: Path, load: Any) -> None:
    with pytest.raises(LoadError, match=r"Set engine: native"):
        load(saved(REFUSED[name](), tmp_path / name))


def test_an_adapter_is_merged(tmp_path: Path, load: Any) -> None:
    path = saved(SERVED["qwen3"](), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert Script(load(path, adapter=str(tmp_path / "adapter")), tmp_path / "merged", seed=3).run(10) < 1e-3


def test_state_that_leaks_between_sessions_is_noticed_at_load(tmp_path: Path, load: Any) -> None:
    engine = load(saved(SERVED["qwen3"](), tmp_path / "model"))
    step = engine.runner._step

    def one_block(pieces: Any) -> Any:
        made = step(pieces)
        made.blocks[:] = made.blocks[:1]
        return made

    engine.runner._step = one_block
    with pytest.raises(LoadError, match="packed sessions differ"):
        verify_engine(engine, "tiny")


def test_the_dtype_is_the_checkpoints_and_positions_end_with_its_context(tmp_path: Path) -> None:
    path = saved(SERVED["qwen3"](), tmp_path / "model")
    engine = vllm_engine(ModelSource(str(path), device="cpu"), 2_048)
    try:
        assert (engine.runner.dtype, engine.runner.positions) == (torch.float32, 1_024)
        with pytest.raises(BadExtend, match="1025 tokens, and the model has 1024 positions"):
            engine.check_extend(Extend(1, 1_024, 0, [5], 1, 1))
    finally:
        engine.runner.stop()


def test_other_weights_are_another_digest_and_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    path = saved(SERVED["qwen3"](), tmp_path / "model")
    other = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    other.model.layers[1].mlp.up_proj.weight.data *= 1.01
    other.save_pretrained(tmp_path / "other")
    config = other.config.to_dict()
    digests = {files_digest(config, folder.glob("*.safetensors"), "vllm") for folder in (path, tmp_path / "other")}
    assert len(digests) == 2
    other.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    other.save_pretrained(tmp_path / "broken")
    with pytest.raises(LoadError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        vllm_engine(ModelSource(str(tmp_path / "broken"), device="cpu"), CACHE)


def test_groups_of_unlike_layers_are_filled_up() -> None:
    assert vllm_runner._padding(["sliding_attention"] * 52 + ["full_attention"] * 10) == 70 / 62
    assert vllm_runner._padding(["full_attention"] * 3) == vllm_runner._padding([]) == 1.0


def test_another_version_of_vllm_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    with pytest.raises(LoadError, match=r"vLLM 0\.33\.1 is installed.*make venv-vllm"):
        vllm_engine(ModelSource("some/model"), 64)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"quantization": {"quant_method": "bitsandbytes"}}, "quantization is not for engine: vllm"),
        ({"device_map": "auto"}, "device_map is not for engine: vllm"),
        ({"device": "cuda"}, "built for cpu"),
    ],
)
def test_settings_that_are_not_for_vllm_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(LoadError, match=why):
        vllm_engine(ModelSource("some/model", **options), 64)

"""EleutherAI's `lm_eval` command, unmodified, scores the guided model over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from cluster.demo.task import questions
from router.api import create_app
from tests.coordinator.test_logprobs import normalised
from tests.support.local_backend import LocalBackend
from tests.support.local_service import WEIGHTS, local_service, trio_config
from tests.support.oracle import Oracle
from tests.support.scripted_service import serving

# Warnings of lm_eval and of its imports are not failures.
pytestmark = pytest.mark.filterwarnings("default")
DEADLINE_S = 240.0  # of one command
CLOSE = 1e-3  # nats per answer; forwards of other shapes round differently

SCORED = {
    "task": "scored",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GENERATED = {
    "task": "generated",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 60},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    "filter_list": [
        {"name": "last", "filter": [{"function": "regex", "regex_pattern": r"(\w+)\W*$"}, {"function": "take_first"}]}
    ],
}


def write_task(folder: Path, task: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    folder.mkdir(exist_ok=True)
    data = folder / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | source))


async def evaluated(kind: str, folder: Path, *tasks: str, **arguments: Any) -> dict[str, tuple[dict[str, Any], Any]]:
    """Runs the command `lm_eval`. Returns by task its figures, and its samples in the order of the documents."""
    batch, chat = arguments.pop("batch_size", 1), ["--apply_chat_template"] if "chat" in kind else []
    stated = ",".join(f"{name}={value}" for name, value in arguments.items())
    out = folder / f"out-{kind}-{arguments['model'].replace('/', '-')}-{batch}"
    command = [str(Path(sys.executable).parent / "lm_eval"), "--model", kind, "--model_args", stated, *chat]
    command += ["--tasks", ",".join(tasks), "--include_path", str(folder), "--batch_size", str(batch)]
    command += ["--output_path", str(out), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OPENAI_API_KEY": "none"}
    started = await asyncio.create_subprocess_exec(
        *command, env=os.environ | offline, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(DEADLINE_S):
            output, _ = await started.communicate()
    finally:
        if started.returncode is None:
            started.kill()
            await started.wait()
    assert started.returncode == 0, output.decode()
    (results,) = out.rglob("results_*.json")
    figures = json.loads(results.read_text())["results"]
    found = {}
    for task in tasks:
        (samples,) = out.rglob(f"samples_{task}_*.jsonl")
        parsed = [json.loads(line) for line in samples.read_text().splitlines()]
        found[task] = figures[task], sorted(parsed, key=lambda sample: int(sample["doc_id"]))
    return found


async def test_lm_eval_scores_and_generates_with_the_guided_model(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    scored: list[dict[str, Any]] = [
        {"prompt": question.text, "choices": [" The rival of Ada is Bo.", " Ada.", "\n1, 2, 3"]}
        for question in questions("held_out", 2, 4)
    ]
    chains = questions("held_out", 3, 6)
    texts, chats = tmp_path / "texts", tmp_path / "chats"
    async with (
        local_service(trio_config(), trio_engines) as service,
        serving(create_app(service.config, service.tokenizers, LocalBackend(service))) as url,
    ):
        render = service.tokenizers["target"].render
        prompts = [render([{"role": "user", "content": question.text}]) for question in chains]
        write_task(texts, SCORED, scored)
        write_task(texts, GENERATED, [{"prompt": p, "answer": q.answer} for p, q in zip(prompts, chains, strict=True)])
        write_task(chats, GENERATED, [{"prompt": q.text, "answer": q.answer} for q in chains])
        both = {"base_url": f"{url}/v1/completions", "tokenizer": WEIGHTS / "target", "max_length": 512}
        both |= {"batch_size": 3, "add_bos_token": False}
        chat = {"model": "demo", "base_url": f"{url}/v1/chat/completions"}
        guided, alone, guided_chat = await asyncio.gather(
            evaluated("local-completions", texts, "scored", "generated", model="demo", **both),
            evaluated("local-completions", texts, "scored", "generated", model="demo/target", **both),
            evaluated("local-chat-completions", chats, "generated", **chat),
        )
        # The client sends its own tokens: its tokenizer class splits digits differently from the service's.
        tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "target")
        assert tokenizer.encode(" 2") != service.tokenizers["target"].encode(" 2")
    found = {}
    for alpha, results in ((1.0, guided), (0.0, alone)):
        found[alpha] = [float(resp[0][0]) for sample in results["scored"][1] for resp in sample["resps"]]
        np.testing.assert_allclose(found[alpha], loglikelihoods(tokenizer, scored, alpha), atol=CLOSE)
    assert np.abs(np.array(found[1.0]) - np.array(found[0.0])).min() > CLOSE
    (figures, samples), (chat_figures, chat_samples) = guided["generated"], guided_chat["generated"]
    assert figures["exact_match,last"] == chat_figures["exact_match,last"] > 0.8
    assert alone["generated"][0]["exact_match,last"] < 0.5  # the method's claim, measured by lm-eval
    assert [sample["resps"] for sample in chat_samples] == [sample["resps"] for sample in samples]


def loglikelihoods(tokenizer: Any, documents: Sequence[Mapping[str, Any]], alpha: float) -> list[float]:
    """Log-likelihoods (nats) of every document's choices, from plain forwards of the three models."""
    oracle, found = Oracle(), []
    for document in documents:
        prompt = tokenizer.encode(document["prompt"])
        for choice in document["choices"]:
            answer = tokenizer.encode(document["prompt"] + choice)[len(prompt) :]
            rows = normalised(oracle.combined(prompt, answer, alpha))
            found.append(float(sum(row[token] for row, token in zip(rows, answer, strict=True))))
    return found

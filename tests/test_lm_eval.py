"""EleutherAI's lm-eval against the service over HTTP, unpatched: it generates with, and scores, the guided model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
import yaml
from transformers import AutoTokenizer

from actors.forward import Engine
from actors.requests import Role
from benchmarks.local import WEIGHTS, LocalService, local_service, trio_config
from cluster.demo.task import questions
from router.api import create_app
from tests.jobs.local_backend import LocalBackend
from tests.oracle import Oracle
from tests.test_logprobs import normalised

# Its own warnings, and those of what it imports, are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")
CLOSE = 1e-3  # nats over an answer of some tokens, in plain forwards of other shapes

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


@asynccontextmanager
async def over_http(service: LocalService) -> AsyncIterator[str]:
    """The service's API on the loopback; its address."""
    app = create_app(service.config, service.tokenizers, LocalBackend(service))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    finally:
        server.should_exit = True
        await serving


def write_task(folder: Path, task: dict[str, Any], documents: list[dict[str, Any]]) -> None:
    data = folder / f"{task['task']}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task | source))


def evaluated(kind: str, folder: Path, task: str, chat: bool = False, **arguments: Any) -> tuple[dict[str, Any], Any]:
    """lm-eval's figures of a task, and its samples."""
    from lm_eval.api.registry import get_model
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    model = get_model(kind).create_from_arg_obj(arguments)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load([task])
    results = evaluate(model, tasks, bootstrap_iters=0, apply_chat_template=chat)
    assert results is not None
    return results["results"][task], results["samples"][task]


def completions(address: str, model: str, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "base_url": f"{address}/completions",
        "tokenizer": str(WEIGHTS / "target"),
        "tokenizer_backend": "huggingface",
        "max_length": 512,
        **more,
    }


async def test_loglikelihood_tasks_score_the_guided_model(trio_engines: Mapping[Role, Engine], tmp_path: Path) -> None:
    async with local_service(trio_config(), trio_engines) as service, over_http(service) as address:
        documents: list[dict[str, Any]] = [
            {"prompt": question.text, "choices": [" The rival of Ada is Bo.", " Ada.", "\n1, 2, 3"]}
            for question in questions("held_out", 2, 4)
        ]
        write_task(tmp_path, SCORED, documents)
        found: dict[tuple[str, int], list[float]] = {}
        for model, batch in (("demo", 1), ("demo", 3), ("demo/target", 3)):
            arguments = completions(address, model, batch_size=batch, add_bos_token=False)
            _, samples = await asyncio.to_thread(evaluated, "local-completions", tmp_path, "scored", **arguments)
            assert len(samples) == len(documents)
            found[model, batch] = [float(resp[0][0]) for sample in samples for resp in sample["resps"]]
    # What the client sends are its own tokens: its class splits digits otherwise than the service, which reads them so.
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / "target")
    assert tokenizer.encode(" 2") != service.tokenizers["target"].encode(" 2")
    oracle = Oracle()
    for model, alpha in (("demo", 1.0), ("demo/target", 0.0)):
        expected = []
        for document in documents:
            prompt = tokenizer.encode(document["prompt"])
            for choice in document["choices"]:
                answer = tokenizer.encode(document["prompt"] + choice)[len(prompt) :]
                rows = normalised(oracle.combined(prompt, answer, alpha))
                expected.append(float(sum(row[token] for row, token in zip(rows, answer, strict=True))))
        np.testing.assert_allclose(found[model, 3], expected, atol=CLOSE)
    assert found["demo", 1] == found["demo", 3]
    assert np.abs(np.array(found["demo", 3]) - np.array(found["demo/target", 3])).min() > CLOSE


async def test_generation_tasks_generate_with_the_guided_model(
    trio_engines: Mapping[Role, Engine], tmp_path: Path
) -> None:
    async with local_service(trio_config(), trio_engines) as service, over_http(service) as address:
        asked = questions("held_out", 3, 6)
        render = service.tokenizers["target"].render
        prompts = [render([{"role": "user", "content": question.text}]) for question in asked]
        answers = [question.answer for question in asked]
        write_task(tmp_path, GENERATED, [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)])
        scores, texts = {}, {}
        for model in ("demo", "demo/target"):
            arguments = completions(address, model, batch_size=3)
            figures, samples = await asyncio.to_thread(
                evaluated, "local-completions", tmp_path, "generated", **arguments
            )
            scores[model] = figures["exact_match,last"]
            texts[model] = [sample["resps"][0][0] for sample in samples]
        assert scores["demo"] > 0.8 > 0.5 > scores["demo/target"]  # the claim of the method, as lm-eval measures it

        chat_folder = tmp_path / "chat"
        chat_folder.mkdir()
        write_task(chat_folder, GENERATED, [{"prompt": q.text, "answer": q.answer} for q in asked])
        arguments = {"model": "demo", "base_url": f"{address}/chat/completions"}
        figures, samples = await asyncio.to_thread(
            evaluated, "local-chat-completions", chat_folder, "generated", chat=True, **arguments
        )
        assert figures["exact_match,last"] == scores["demo"]
        assert [sample["resps"][0][0] for sample in samples] == texts["demo"]

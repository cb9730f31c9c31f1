"""Every report of a checkpoint or an adapter: what the check says of its files, and what the load does.

A line of `adapters.jsonl` is one report. `model` is an architecture of `BUILDERS`. `config` changes its config.json;
`tensors` and `files` change its files by the operations of `change_tensors` and `change_files`. `adapter` is the config
of a PEFT adapter, which `adapter_config`, `adapter_tensors` and `adapter_files` change. `check` is the worst finding of
`cluster.check`: "ready", "warning" or "error". `load` is "ok" or "error". `says` is a pattern in what both say.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from actors.config import ServiceConfig, load_config
from actors.engine.errors import LoadError
from actors.engine.inspection import inspect_sources
from actors.engine.loader import ModelSource, load_engine
from actors.engine.weight_files import INDEX, SINGLE
from actors.preflight import Finding
from cluster.check import examine
from tests.support.local_ray import trio_args
from tests.support.tiny_models import ARCHITECTURES, VOCABULARY
from tests.support.tokenizers import byte_level, save

REPORTS = [json.loads(line) for line in (Path(__file__).parent / "adapters.jsonl").read_text().splitlines()]
DTYPES = {name: getattr(torch, name) for name in ("float32", "int8", "float8_e4m3fn")}
FILLS = {"zero": 0.0, "nan": float("nan"), "inf": float("inf")}


def mixtral() -> Any:
    shape = {"hidden_size": 48, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(**shape, vocab_size=VOCABULARY, num_hidden_layers=1, num_local_experts=3)
    torch.manual_seed(0)
    return MixtralForCausalLM(config)


def gpt2() -> Any:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=48, n_layer=1, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(0)
    return GPT2LMHeadModel(config)


BUILDERS = ARCHITECTURES | {"mixtral": mixtral, "gpt2": gpt2}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One sound checkpoint of each architecture, with a tokenizer."""
    root = tmp_path_factory.mktemp("published")
    for name, build in BUILDERS.items():
        build().save_pretrained(save(root / name, byte_level(), tokenizer_config={"eos_token": "<|end|>"}))
    return root


def change_tensors(tensors: dict[str, Tensor], operations: Sequence[Any]) -> dict[str, Tensor]:
    """Apply operations, whose patterns are parts of names: add, drop, rename, copy, cast, fill and shape."""
    for kind, *arguments in operations:
        if kind == "add":
            tensors |= {key: torch.zeros(shape, dtype=DTYPES[dtype]) for key, (dtype, shape) in arguments[0].items()}
            continue
        part, *rest = arguments
        chosen = {key: tensor for key, tensor in tensors.items() if part in key}
        assert chosen, f"no tensor is called {part}"
        if kind in ("drop", "rename"):
            tensors = {key: tensor for key, tensor in tensors.items() if key not in chosen}
        if kind in ("rename", "copy"):
            tensors |= {key.replace(part, rest[0], 1): tensor.clone() for key, tensor in chosen.items()}
        elif kind == "cast":
            tensors |= {key: tensor.to(DTYPES[rest[0]]) for key, tensor in chosen.items()}
        elif kind == "fill":
            tensors |= {key: torch.full_like(tensor, FILLS[rest[0]]) for key, tensor in chosen.items()}
        elif kind == "shape":
            tensors |= {key: torch.ones(rest[0]) for key in chosen}
    return tensors


def change_files(folder: Path, operations: Sequence[Any]) -> None:
    """Apply operations: shard (the weights into two files), single (all of them again), write, delete, truncate."""
    for kind, *arguments in operations:
        if kind == "write":
            (folder / arguments[0]).write_text(arguments[1])
        elif kind == "delete":
            (folder / arguments[0]).unlink()
        elif kind == "truncate":
            whole = (folder / arguments[0]).read_bytes()
            (folder / arguments[0]).write_bytes(whole[:-10])
        elif kind == "shard":
            tensors = load_file(folder / SINGLE)
            (folder / SINGLE).unlink()
            parts = {f"part{1 + at}.safetensors": sorted(tensors)[at::2] for at in range(2)}
            for name, keys in parts.items():
                save_file({key: tensors[key] for key in keys}, folder / name, {"format": "pt"})
            names = {key: name for name, keys in parts.items() for key in keys}
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": names}))
        elif kind == "single":
            tensors = {
                key: value for part in folder.glob("part*.safetensors") for key, value in load_file(part).items()
            }
            save_file(tensors, folder / SINGLE, {"format": "pt"})


def change_weights(file: Path, operations: Sequence[Any]) -> None:
    if operations:
        save_file(change_tensors(load_file(file), operations), file, {"format": "pt"})


def change_json(file: Path, changes: dict[str, Any]) -> None:
    stated = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in stated.items() if value is not None}))


def checkpoint_of(report: dict[str, Any], published: Path, folder: Path) -> Path:
    """The report's checkpoint. Files that it does not change are links."""
    folder.mkdir()
    for file in (published / report["model"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    change_weights(folder / SINGLE, report.get("tensors", ()))
    change_json(folder / "config.json", report.get("config", {}))
    change_files(folder, report.get("files", ()))
    change_weights(folder / SINGLE, report.get("tensors_of_single", ()))
    return folder


def adapter_of(report: dict[str, Any], folder: Path) -> Path:
    """The report's adapter, of random weights."""
    settings = deepcopy(report["adapter"])
    kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(BUILDERS[report["model"]](), kind(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder, save_embedding_layers=False)
    change_weights(folder / "adapter_model.safetensors", report.get("adapter_tensors", ()))
    change_json(folder / "adapter_config.json", report.get("adapter_config", {}))
    change_files(folder, report.get("adapter_files", ()))
    return folder


def checked(config: ServiceConfig, monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """Findings of `cluster.check` about the guider, in this process; the other roles are sound."""

    def inspect_guider(sources: dict[str, Any]) -> dict[str, Any]:
        guider = {role: fields for role, fields in sources.items() if role == "guider"}
        return {role: [] for role in sources} | inspect_sources(guider)

    monkeypatch.setattr("cluster.checkpoints.inspect_in_child", inspect_guider)
    _, _, found = examine(config, "127.0.0.1")
    assert [finding for finding in found if finding.severity == "error" and finding.role != "guider"] == []
    return [finding for finding in found if finding.role == "guider" and finding.severity != "note"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of PEFT and transformers, as they load
@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report["id"])
def test_check_and_load_agree(
    report: dict[str, Any], published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint_of(report, published, tmp_path / "model")
    adapter = str(adapter_of(report, tmp_path / "adapter")) if "adapter" in report else None
    args = trio_args()
    for role, model in args["models"].items():
        model |= {"path": str(folder if role == "guider" else published / report["model"]), "device": "cpu"}
    args["models"]["guider"]["adapter"] = adapter
    found = checked(load_config(args), monkeypatch)
    said = [finding.message for finding in found]
    assert (found[0].severity if found else "ready") == report["check"], said
    source = ModelSource(str(folder), device="cpu", adapter=adapter)
    if report["load"] == "ok":
        load_engine(source, 128)
    else:
        with pytest.raises(LoadError, match=report["says"]) as refused:
            load_engine(source, 128)
        said.append(str(refused.value))
    assert not found or any(re.search(report["says"], text) for text in said[: len(found)]), said
    assert not re.search("exact mode|batch_invariant|above report", " ".join(said))

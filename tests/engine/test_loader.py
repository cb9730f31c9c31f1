from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from actors.engine.errors import LoadError
from actors.engine.inspection import inspect_sources
from actors.engine.loader import LoadProgress, ModelSource, load_engine, load_model, load_trainable
from tests.support.tiny_models import ARCHITECTURES, Driver, qwen2, tokens


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    qwen2().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(checkpoint: Path) -> ModelSource:
    return ModelSource(str(checkpoint), device="cpu")


def test_loading_a_local_folder_reports_its_stages(source: ModelSource) -> None:
    heard: list[LoadProgress] = []
    engine = load_engine(source, 128, report=heard.append)
    assert [progress.stage for progress in heard] == ["config", "weights", "loaded", "check", "ready"]
    on_disk = heard[1].bytes
    assert on_disk == (Path(source.path) / "model.safetensors").stat().st_size
    assert heard[-1].bytes >= 0.9 * on_disk
    run = Driver(engine)
    run.extend(1, tokens(5))
    torch.testing.assert_close(run.logits(1), engine.plain_logits(tokens(5))[0], rtol=1e-4, atol=1e-4)


def test_the_digest_depends_on_the_weights_not_on_the_loading(source: ModelSource) -> None:
    assert load_engine(source, 128).hash_seed == load_engine(source, 256).hash_seed


def test_the_dtype_is_the_checkpoints_by_default(source: ModelSource) -> None:
    assert load_model(source).model.dtype == torch.float32
    assert load_model(dataclasses.replace(source, dtype="bfloat16")).model.dtype == torch.bfloat16


def test_accelerate_places_the_weights(source: ModelSource) -> None:
    placed = dataclasses.replace(source, device_map={"": "cpu"}, dtype="bfloat16")
    run = Driver(load_engine(placed, 128))
    run.extend(1, tokens(5))
    assert run.logits(1).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft triggers it in transformers
def test_an_adapter_changes_the_rows_as_peft_does(source: ModelSource, tmp_path: Path) -> None:
    torch.manual_seed(1)
    adapted = get_peft_model(qwen2(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    text = tokens(9)
    with torch.inference_mode():
        expected = adapted(input_ids=torch.tensor([text])).logits[0]
    engine = load_engine(dataclasses.replace(source, adapter=str(tmp_path)), 128)
    run = Driver(engine)
    run.extend(1, text)
    torch.testing.assert_close(run.logits(1), expected, rtol=1e-4, atol=1e-4)
    assert engine.hash_seed != load_engine(source, 128).hash_seed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning", "ignore::UserWarning:peft")
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])  # with and without tied embeddings
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
        {"target_modules": ["lm_head"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_merging_changes_only_the_matrices_that_the_adapter_names(
    architecture: str, options: dict[str, Any], tmp_path: Path
) -> None:
    ARCHITECTURES[architecture]().save_pretrained(tmp_path / "model")
    torch.manual_seed(1)
    adapted = get_peft_model(ARCHITECTURES[architecture](), LoraConfig(r=4, **options))
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    text = [*tokens(9), 3, 5, 3]
    with torch.inference_mode():
        expected = adapted.eval()(input_ids=torch.tensor([text])).logits[0]
    source = ModelSource(str(tmp_path / "model"), device="cpu", adapter=str(tmp_path / "adapter"))
    run = Driver(load_engine(source, 128))
    run.extend(1, text)
    torch.testing.assert_close(run.logits(1), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_adapter_is_named(source: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"adapter .*adapter_config\.json"):
        load_model(dataclasses.replace(source, adapter=str(tmp_path)))


def test_pickles_are_not_read(checkpoint: Path, source: ModelSource, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(LoadError, match=r"\*\.safetensors"):
        load_model(ModelSource(str(weights.parent)))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(LoadError, match="is a pickle"):
        load_model(dataclasses.replace(source, adapter=str(tmp_path)))


def test_a_folder_without_a_model_says_what_it_must_hold(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"must hold config\.json"):
        load_model(ModelSource(str(tmp_path)))


def test_a_broken_weight_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="whole and readable"):
        load_model(ModelSource(str(tmp_path)))


def test_the_load_itself_refuses_tensors_that_no_header_showed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a hub model that is not in the cache yet."""
    monkeypatch.setattr("actors.engine.loader.verify_checkpoint", lambda *_, **__: [])
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    tensors = load_file(checkpoint / "model.safetensors")
    save_file(tensors | {"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.layers\.2\.mlp\.up_proj\.weight, which .* does not take"):
        load_model(ModelSource(str(tmp_path)))
    save_file(tensors | {"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.norm\.weight has shape \(2,\) in its files and \(48,\)"):
        load_model(ModelSource(str(tmp_path)))


def test_missing_weights_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    config = json.loads((checkpoint / "config.json").read_text())
    config["num_hidden_layers"] += 1
    config["layer_types"] += ["full_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match=r"lacks \d+ weights, model.layers.2"):
        load_model(ModelSource(str(tmp_path)))


def test_a_missing_hub_model_names_the_download_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(LoadError, match=r"hf download nobody/nothing --revision abc"):
        load_model(ModelSource("nobody/nothing", revision="abc"))


def test_a_gated_hub_model_names_the_login_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr("actors.engine.loader.AutoConfig.from_pretrained", gated)
    with pytest.raises(LoadError, match="hf auth login"):
        load_model(ModelSource("somebody/gated"))


def test_an_unsupported_model_is_refused_before_its_weights_load(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(LoadError, match="longest sequence of the batch"):
        load_model(ModelSource(str(tmp_path)))


def test_an_unknown_quantization_is_refused(source: ModelSource) -> None:
    with pytest.raises(LoadError, match=r"quantization of .*Unknown quantization type"):
        load_model(dataclasses.replace(source, quantization={"quant_method": "halves"}))


@pytest.mark.parametrize("method", ["awq", "bitsandbytes"])
@pytest.mark.parametrize("stated", [True, False], ids=["by the checkpoint", "by the configuration"])
def test_a_library_that_a_quantization_needs_and_that_is_not_here_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, stated: bool
) -> None:
    """Also where it is installed: each method's quantiser asks whether it is."""
    settings = {"quant_method": method, **({"load_in_4bit": True} if method == "bitsandbytes" else {})}
    library, module = {"awq": ("gptqmodel", "awq"), "bitsandbytes": ("bitsandbytes", "bnb_4bit")}[method]
    monkeypatch.setattr(f"transformers.quantizers.quantizer_{module}.is_{library}_available", lambda *_: False)
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    if stated:
        config = json.loads((checkpoint / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    source = ModelSource(str(tmp_path), quantization=None if stated else settings)
    message = rf"quantization of .*not installed here: .*{library}.*Install it on every node"
    with pytest.raises(LoadError, match=message):
        load_model(source)
    found = inspect_sources({"target": dataclasses.asdict(source)})["target"]
    assert any(severity == "warning" and re.search(message, said) for severity, said in found), found


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"dtype": "int3"}, "dtype 'int3' is unknown"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"trust_remote_code": True}, "without a pinned revision"),
    ],
)
def test_a_source_is_checked_when_it_is_made(options: dict[str, object], why: str) -> None:
    with pytest.raises(LoadError, match=why):
        ModelSource("some/model", **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_an_error(source: ModelSource) -> None:
    with pytest.raises(LoadError, match="asks for a GPU, but torch sees none"):
        load_model(dataclasses.replace(source, device="cuda"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks transformers for it
def test_only_the_adapter_of_a_loaded_model_is_trained_and_its_warnings_are_logged(
    source: ModelSource, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(qwen2(), lora).save_pretrained(tmp_path)  # without effect: every lora_B is zero
    model = load_trainable(dataclasses.replace(source, adapter=str(tmp_path)))
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert "its adapter changes nothing" in caplog.text

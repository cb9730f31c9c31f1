from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.engine.errors import LoadError
from actors.engine.loader import ModelSource, load_engine, load_model
from actors.engine.sizing import weight_bytes
from tests.support.tiny_models import ARCHITECTURES, Driver, tokens


def dummy(folder: Path, architecture: str, dtype: str = "auto") -> ModelSource:
    """A source with the config of a tiny architecture and no weights."""
    ARCHITECTURES[architecture]().config.save_pretrained(folder)
    return ModelSource(str(folder), device="cpu", dtype=dtype, load_format="dummy")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_alone_becomes_an_engine_in_the_dtype_asked_for(tmp_path: Path, architecture: str, dtype: str) -> None:
    engine = load_engine(dummy(tmp_path, architecture, dtype), 128)  # which compares it with a plain forward
    assert engine.runner.dtype == getattr(torch, dtype)
    run = Driver(engine)
    run.extend(1, tokens(9))
    assert torch.isfinite(run.logits(1)).all()
    assert run.logits(1).std() > 0.01


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dummy_weights_and_buffers_are_the_same_at_every_load(tmp_path: Path, architecture: str) -> None:
    source = dummy(tmp_path, architecture)
    first = load_model(source).model
    torch.rand(3)
    second = load_model(source).model
    for model in (first, second):
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    named = {
        name: tensor for model in (second,) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    for name, tensor in (*first.named_parameters(), *first.named_buffers()):
        assert torch.equal(tensor, named[name]), name
    assert load_engine(source, 128).hash_seed == load_engine(source, 256).hash_seed


def test_dummy_weights_leave_the_random_numbers_of_others_alone(tmp_path: Path) -> None:
    source = dummy(tmp_path, "qwen2")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_model(source)
    assert torch.equal(torch.rand(3), expected)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    model = load_model(dummy(tmp_path, "qwen2")).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "mistral", "gemma2"])
def test_the_weights_are_as_many_as_the_config_says(tmp_path: Path, architecture: str) -> None:
    source = dummy(tmp_path, architecture, "bfloat16")
    loaded = load_model(source).model
    size = sum(parameter.nbytes for parameter in loaded.parameters())
    assert weight_bytes(loaded.config.to_dict(), "bfloat16") == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"load_format": "dumy"}, "load_format 'dumy' is unknown"),
        ({"load_format": "dummy", "device_map": "auto"}, "on one device"),
        ({"load_format": "dummy", "quantization": {"quant_method": "bitsandbytes"}}, "plain weights"),
    ],
)
def test_dummy_weights_refuse_unsupported_options(options: dict[str, object], why: str) -> None:
    with pytest.raises(LoadError, match=why):
        ModelSource("some/model", **options)  # type: ignore[arg-type]

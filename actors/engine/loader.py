"""Loads a configured model: weights, dtype, placement, quantisation and adapters."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from actors.engine.cache_fitting import fit_cache
from actors.engine.checkpoint import must_hold, refuse_tensors, verify_adapter, verify_checkpoint
from actors.engine.compat import refuse_config
from actors.engine.devices import loading_alone
from actors.engine.dummy import dummy_model
from actors.engine.errors import LoadError, first_line
from actors.engine.memory import AutoCache
from actors.engine.native_runner import NativeEngine, NativeRunner
from actors.engine.paging import page_out
from actors.engine.quantization import quantization_config
from actors.engine.rows import row_budget
from actors.engine.selfcheck import verify_engine
from actors.engine.step_engine import StepEngine
from actors.engine.weight_files import adapter_folder, cached_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
LOAD_FORMATS = ("auto", "dummy")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The weights to load, and how to load them."""

    path: str  # a local folder in Hugging Face layout, or a hub id
    revision: str | None = None  # a hub branch, tag or commit
    dtype: str = "auto"  # of DTYPES; "auto" is the checkpoint's own
    device: str = "auto"  # of DEVICES; "auto" is CUDA where there is one
    device_map: str | dict[str, Any] | None = None  # accelerate's, in place of `device`
    quantization: dict[str, Any] | None = None  # a transformers quantization config, with its `quant_method`
    adapter: str | None = None  # a PEFT adapter's folder or hub id
    trust_remote_code: bool = False  # for a hub id only with a pinned revision
    load_format: str = "auto"  # of LOAD_FORMATS; "dummy" makes random weights without a checkpoint
    tensor_parallel: int = 1  # number of ranks; above 1 this process is one of them, in a process group

    def __post_init__(self) -> None:
        for key, allowed in (("dtype", DTYPES), ("device", DEVICES), ("load_format", LOAD_FORMATS)):
            if (value := getattr(self, key)) not in allowed:
                raise LoadError(self.path, f"{key} {value!r} is unknown", f"Known are {', '.join(allowed)}.")
        elsewhere = self.quantization is not None or self.device_map is not None or self.tensor_parallel > 1
        if self.load_format == "dummy" and elsewhere:
            out = "Leave quantization and device_map unset."
            raise LoadError(self.path, "load_format: dummy makes plain weights on one device", out)
        if self.trust_remote_code and self.revision is None and not self.local:
            out = "Set revision: to the commit whose code you have read."
            raise LoadError(self.path, "trust_remote_code without a pinned revision", out)

    @property
    def local(self) -> bool:
        """True if the weights are in a folder of this machine."""
        return Path(self.path).is_dir()


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """A stage of loading that begins."""

    stage: str  # "config", "weights", "adapter", "loaded", "check", "ready"
    bytes: int  # of weights: on disk before they are loaded (0 if unknown), in memory after
    seconds: float  # since loading began


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in memory, on its devices, in evaluation mode."""

    model: PreTrainedModel
    bytes: int  # of its parameters and buffers


Report = Callable[[LoadProgress], None]


def load_engine(
    source: ModelSource,
    cache_tokens: int | AutoCache,
    *,
    batch_invariant: bool = False,
    backend: str | None = None,
    max_held_rows: int | None = None,
    report: Report | None = None,
) -> NativeEngine:
    """Load a model, make its engine and compare it with a plain forward. Raises LoadError if any of these fails.

    max_held_rows: logits rows in memory for look-ups, at most; see `row_budget`.
    """
    began = time.monotonic()
    device = "cpu" if source.device_map is not None else device_of(source)  # it may use several GPUs
    with loading_alone(torch.device(device), source.path):
        loaded = load_model(source, report)
        with _errors_explained(source):
            first = cache_tokens if isinstance(cache_tokens, int) else cache_tokens.least
            runner = NativeRunner(loaded.model, first, batch_invariant=batch_invariant, backend=backend)
            rows = row_budget(runner.width, runner.device, max_held_rows)
            if isinstance(cache_tokens, AutoCache):
                fit_cache(runner, cache_tokens, rows, source.path)
        engine = StepEngine(runner, rows)
        report_progress(report, source, began, "check", loaded.bytes)
        verify_engine(engine, source.path)
    if runner.packed_linears:
        for parameter in loaded.model.parameters():  # the check has read them; what is left is embeddings and small
            page_out(parameter)
    report_progress(report, source, began, "ready", loaded.bytes)
    return engine


def load_model(source: ModelSource, report: Report | None = None) -> LoadedModel:
    """Load the weights of `source`. Each stage is logged and passed to `report`.

    Raises LoadError, with a command or setting that helps, for a missing or gated model, one that the engine cannot
    serve, an unknown quantisation or an adapter that does not fit.
    """
    began = time.monotonic()
    report_progress(report, source, began, "config", 0)
    config, adapter = verified_config(source), _folder_of_adapter(source)
    require_quantization(source, config)
    report_progress(report, source, began, "weights", stored_bytes(source))
    model = _dummy(source, config) if source.load_format == "dummy" else _checkpoint(source, config)
    if adapter is not None:
        report_progress(report, source, began, "adapter", 0)
        plain = source.quantization is None and getattr(config, "quantization_config", None) is None
        model = _with_adapter(model, adapter, source, merge=plain)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    report_progress(report, source, began, "loaded", size)
    return LoadedModel(model.eval(), size)


def verified_config(source: ModelSource) -> Any:
    """The transformers config of a source whose files are on this machine and fit it; warnings are logged.

    Raises LoadError as `read_config` and `verify_files` do.
    """
    config = read_config(source)
    for warning in verify_files(source, config, _folder_of_adapter(source)):
        log.warning("%s: %s", source.path, warning)
    return config


def read_config(source: ModelSource) -> Any:
    """The transformers config of a source. Raises LoadError for one that is missing or that the engine cannot serve."""
    with _errors_explained(source):
        config = AutoConfig.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    refuse_config(config.to_dict(), source.path)
    return config


def verify_files(source: ModelSource, config: Any, adapter: Path | None) -> list[str]:
    """Hold the checkpoint and the adapter in a folder against the config, by their headers. Returns warnings.

    A checkpoint that is not on this machine is left to the load. Raises LoadError for tensors that do not fit.
    """
    trusted = source.trust_remote_code
    folder = Path(source.path) if source.local else cached_folder(source.path, source.revision)
    found = []
    if folder is not None and source.load_format != "dummy":
        found += verify_checkpoint(config, folder, source.path, trust_remote_code=trusted)
    if adapter is not None:
        found += verify_adapter(config, adapter, source.path, trust_remote_code=trusted)
    return found


def require_quantization(source: ModelSource, config: Any) -> None:
    """Raise LoadError if transformers lacks a library that the quantisation of a source needs."""
    if settings := source.quantization or config.to_dict().get("quantization_config"):
        quantization_config(source.path, settings)


def _checkpoint(source: ModelSource, config: Any) -> PreTrainedModel:
    placement, settings = _placement(source), source.quantization
    quantization = None if settings is None else quantization_config(source.path, settings)
    with _errors_explained(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source.path,
            config=config,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype=source.dtype,
            use_safetensors=True,  # no pickles
            **placement,
            quantization_config=quantization,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    refuse_tensors(info, source.path)
    plain: PreTrainedModel = model
    return plain


def _dummy(source: ModelSource, config: Any) -> PreTrainedModel:
    device = device_of(source)
    with _errors_explained(source):
        return dummy_model(config, device, source.dtype, trust_remote_code=source.trust_remote_code)


def _placement(source: ModelSource) -> dict[str, Any]:
    """The options that tell transformers where to put the weights."""
    return {"device_map": source.device_map if source.device_map is not None else {"": device_of(source)}}


def device_of(source: ModelSource) -> str:
    """ "cuda" or "cpu", what the model computes on. Raises LoadError where there is no GPU and one is asked for."""
    if source.device == "cuda" and not torch.cuda.is_available():
        why = "num_gpus above 0 or device: cuda asks for a GPU, but torch sees none"
        out = "Set num_gpus: 0 and device: auto for the CPU, or install torch for CUDA on a machine with a GPU."
        raise LoadError(source.path, why, out)
    return ("cuda" if torch.cuda.is_available() else "cpu") if source.device == "auto" else source.device


def load_trainable(source: ModelSource) -> PeftModel:
    """Load a model with its adapter as separate layers, whose weights alone can be trained. Raises LoadError."""
    assert source.adapter is not None
    folder = _folder_of_adapter(source)
    assert folder is not None
    plain = load_model(replace(source, adapter=None)).model
    for warning in verify_adapter(plain.config, folder, source.path, trust_remote_code=source.trust_remote_code):
        log.warning("%s: %s", source.path, warning)
    return _with_layers(plain, folder, source, trainable=True)


def _folder_of_adapter(source: ModelSource) -> Path | None:
    """The folder of the configured adapter. Raises LoadError if there is none."""
    folder = None if source.adapter is None else adapter_folder(source.adapter)
    if source.adapter is not None and folder is None:
        out = f"Give a folder, or download it with: hf download {source.adapter}"
        raise LoadError(f"adapter {source.adapter}", "it is neither a folder here nor an adapter on the hub", out)
    return folder


def _with_adapter(model: PreTrainedModel, folder: Path, source: ModelSource, merge: bool) -> PreTrainedModel:
    """The model with its adapter, merged into plain weights, or as separate layers beside quantised ones."""
    adapted = _with_layers(model, folder, source)
    if merge:
        _untie(adapted)
    plain: PreTrainedModel = adapted.merge_and_unload() if merge else adapted.get_base_model()
    return plain


def _with_layers(model: PreTrainedModel, folder: Path, source: ModelSource, trainable: bool = False) -> PeftModel:
    """The model with its adapter as separate layers. Raises LoadError for an adapter of another model."""
    from peft import PeftModel  # takes seconds, and few models need it

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model (has|with) `tie_word_embeddings=True`")  # see _untie
            return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        out = f"Give the folder with its adapter_config.json, made for {source.path}."
        raise LoadError(f"adapter {folder}", first_line(error), out) from error


def _untie(adapted: PeftModel) -> None:
    """Give each adapted layer weights of its own.

    Merging adds to the weights in place, so an adapter on the head would change the embeddings of a model that ties
    them. Untied, only the matrix that the adapter names changes, as in a forward through separate layers.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    holders = Counter(id(parameter) for module in adapted.modules() for parameter in module._parameters.values())
    for module in adapted.modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            if holders[id(base.weight)] > 1:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
                adapted.config.tie_word_embeddings = False


@contextmanager
def _errors_explained(source: ModelSource) -> Iterator[None]:
    """Turn the errors of a missing, gated or unreadable model into a LoadError with a command that helps."""
    try:
        yield
    except LoadError:
        raise
    except Exception as error:  # of any model's code, whose asserts and types differ
        raise LoadError(source.path, first_line(error), _remedy(source, error)) from error


def _remedy(source: ModelSource, error: Exception) -> str:
    text = f"{type(error).__name__} {error}".lower()
    revision = f" --revision {source.revision}" if source.revision else ""
    if isinstance(error, torch.OutOfMemoryError):
        return "Give the role more GPU memory, a smaller dtype, quantization or a device_map over more devices."
    if isinstance(error, ImportError):
        return "Install what it names into the environment of the models."
    if source.local:
        return must_hold(source.path)
    if "gated" in text or "401" in text or "403" in text:
        return f"Ask for access at https://huggingface.co/{source.path}, then: hf auth login"
    if "trust_remote_code" in text:
        return "Read its code, then set trust_remote_code: true and revision: to that commit."
    return f"Download it with: hf download {source.path}{revision}   (or correct the path)"


def stored_bytes(source: ModelSource) -> int:
    """Bytes of the files with the weights; 0 if they are not on this machine."""
    folder = Path(source.path) if source.local else cached_folder(source.path, source.revision)
    if source.load_format == "dummy" or folder is None:
        return 0
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def report_progress(report: Report | None, source: ModelSource, began: float, stage: str, size: int) -> None:
    """Log a stage of loading that begins, and pass it to `report`. began: by time.monotonic(). size: in bytes."""
    progress = LoadProgress(stage, size, time.monotonic() - began)
    log.info("%s: %s, %.1f MB after %.1f s", source.path, stage, size / 1e6, progress.seconds)
    if report is not None:
        report(progress)

"""Finds the safetensors files that a model or adapter is loaded from, and reads their headers: no torch, no tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt"]  # the files of a hub model that are read
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
_LFS_POINTER = b"version https://git-lfs"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class WeightsError(ValueError):
    """A checkpoint or an adapter is incomplete or unreadable. The message says how to repair it."""


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A tensor as the header of its file describes it. dtype: safetensors' name, such as BF16. bytes: its size."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def count(self) -> int:
        """Number of values."""
        return prod(self.shape)


def cached_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the local cache; None if its weights are missing or incomplete."""
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
        weight_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, WeightsError):
        return None
    return folder


def adapter_folder(path: str, *, local_only: bool = False) -> Path | None:
    """The folder of an adapter, which is `path` or the hub's, downloaded to the cache; None if it cannot be fetched.

    local_only: do not ask the hub.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        patterns = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
        return Path(snapshot_download(path, allow_patterns=patterns, local_files_only=local_only))
    except (OSError, HFValidationError):
        return None


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights, the same ones that transformers reads.

    Raises WeightsError if there are none, one is missing, or the folder is that of an adapter.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        # transformers would load the base model that the adapter names, wherever that is.
        raise WeightsError(
            f"{folder} holds {ADAPTER_CONFIG}: it is an adapter; set path: to its base model and adapter: to this "
            f"folder, or delete {ADAPTER_CONFIG} if the adapter is merged"
        )
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise WeightsError(f"{folder} holds no {SINGLE} and no {INDEX}; {_other_formats(folder, '*.safetensors')}")
    names = _indexed(folder)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise WeightsError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
    return [folder / name for name in names]


def ignored_shards(folder: Path) -> list[str]:
    """Files that an index names and that are not read, since a file model.safetensors takes precedence."""
    if not (folder / SINGLE).is_file() or not (folder / INDEX).is_file():
        return []
    return [name for name in _indexed(folder) if name != SINGLE]


def adapter_file(folder: Path) -> Path:
    """The file of an adapter's weights. Raises WeightsError if it is missing or a pickle."""
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise WeightsError(f"{folder} holds no {ADAPTER_WEIGHTS}; {_other_formats(folder, ADAPTER_WEIGHTS)}")
    if not (folder / ADAPTER_CONFIG).is_file():
        raise WeightsError(f"{folder} holds no {ADAPTER_CONFIG}; give the folder that save_pretrained wrote")
    return folder / ADAPTER_WEIGHTS


def read_headers(files: Iterable[Path]) -> dict[str, TensorHeader]:
    """The tensors in these files by name. Raises WeightsError for a file that is not whole."""
    return {name: tensor for file in files for name, tensor in _header(file).items()}


def _indexed(folder: Path) -> list[str]:
    """The names of the files that a checkpoint's index lists."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        _ = index["metadata"]  # transformers reads it
        return sorted(set(index["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{folder / INDEX} is no index with weight_map and metadata ({error!r}); download it again"
        ) from error


def _other_formats(folder: Path, needed: str) -> str:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        return f"{pickles[0]} is a pickle, which is not read: save the model as {needed} (save_pretrained does)"
    return "only safetensors files are supported"


def _header(file: Path) -> dict[str, TensorHeader]:
    with file.open("rb") as stream:
        first = stream.read(len(_LFS_POINTER))
        if first == _LFS_POINTER:
            raise WeightsError(f"{file} is a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
        length, size = int.from_bytes(first[:8], "little"), file.stat().st_size
        try:
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            stream.seek(8)
            header: Mapping[str, Any] = json.loads(stream.read(length))
            data = size - 8 - length
            tensors = {name: _tensor(entry, data) for name, entry in header.items() if name != "__metadata__"}
            if 8 + length + sum(tensor.bytes for tensor in tensors.values()) > size:
                raise ValueError("its tensors are longer than the file")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(f"{file} is not a whole safetensors file ({error}); download it again") from error
    return tensors


def _tensor(entry: Mapping[str, Any], data: int) -> TensorHeader:
    """A tensor's entry in a header. data: bytes behind the header. Raises ValueError or TypeError."""
    start, end = entry["data_offsets"]
    if not 0 <= start <= end <= data or not all(type(size) is int and size >= 0 for size in entry["shape"]):
        raise ValueError(f"a tensor of shape {entry['shape']} at bytes {start} to {end} of {data}")
    return TensorHeader(entry["dtype"], tuple(entry["shape"]), end - start)

"""Size and completeness of checkpoints, from safetensors headers and the hub's listing: no tensor is loaded."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from actors.engine.sizing import ITEM_BYTES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.py", "*.model", "*.txt"]
_HEADER_LIMIT = 100_000_000  # bytes, the format's own limit
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class WeightsError(ValueError):
    """A checkpoint is incomplete or unreadable. The message says how to repair it."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Size of a checkpoint. stored_bytes: of all tensors in their files. parameters: count by safetensors dtype."""

    stored_bytes: int
    parameters: Mapping[str, int] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """The dtype of most parameters, by torch's name if torch has one."""
        most = max(self.parameters, key=lambda name: self.parameters[name], default="unknown")
        return _DTYPE_NAMES.get(most, most)

    def bytes_as(self, dtype: str) -> int:
        """Bytes in memory if floating-point tensors are loaded in `dtype`; "auto" keeps their stored dtype."""
        if dtype not in ITEM_BYTES:
            return self.stored_bytes
        cast = sum(count * ITEM_BYTES[dtype] for name, count in self.parameters.items() if name in _DTYPE_NAMES)
        kept = sum(count * _ITEM_BITS.get(name, 8) // 8 for name, count in self.parameters.items())
        floats = sum(count * _ITEM_BITS[name] // 8 for name, count in self.parameters.items() if name in _DTYPE_NAMES)
        return cast + kept - floats


def local_weights(folder: Path) -> Weights:
    """The size of the checkpoint in a folder of Hugging Face layout.

    Raises WeightsError if files are missing, truncated or of another format.
    """
    parameters: Counter[str] = Counter()
    stored = 0
    for file in _weight_files(folder):
        header = _header(file)
        end = max((tensor["data_offsets"][1] for tensor in header), default=0)
        stored += end
        for tensor in header:
            size = 1
            for side in tensor["shape"]:
                size *= side
            parameters[tensor["dtype"]] += size
    return Weights(stored, dict(parameters))


def cached_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the local cache; None if its weights are missing or incomplete."""
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=PATTERNS, local_files_only=True))
        _weight_files(folder)
    except (LocalEntryNotFoundError, WeightsError):
        return None
    return folder


def remote_bytes(path: str, revision: str | None) -> int | None:
    """Bytes of a hub model's safetensors files according to the hub; None if the hub does not answer."""
    try:
        info = HfApi().model_info(path, revision=revision, files_metadata=True)
    except (HfHubHTTPError, OSError):
        return None
    sizes = [file.size or 0 for file in info.siblings or () if file.rfilename.endswith(".safetensors")]
    return sum(sizes)


def download(path: str, revision: str | None) -> Path:
    """Download a hub model into the local cache, with the hub library's progress bars. Returns its folder."""
    return Path(snapshot_download(path, revision=revision, allow_patterns=PATTERNS))


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    elif (folder / SINGLE).is_file():
        names = {SINGLE}
    else:
        raise WeightsError(f"{folder} holds no {SINGLE} and no {INDEX}; only safetensors files are supported")
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise WeightsError(f"{folder} lacks {', '.join(missing)}, which its index names; download it again")
    return [folder / name for name in sorted(names)]


def _header(file: Path) -> Iterable[Any]:
    """The header entries of a file's tensors. Raises WeightsError for a truncated file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        size = file.stat().st_size
        try:
            if not 0 < length <= min(_HEADER_LIMIT, size - 8):
                raise ValueError("its header is longer than the file")
            tensors = [t for name, t in json.loads(stream.read(length)).items() if name != "__metadata__"]
            if 8 + length + max((tensor["data_offsets"][1] for tensor in tensors), default=0) > size:
                raise ValueError("its tensors are longer than the file")
        except (ValueError, KeyError) as error:
            raise WeightsError(f"{file} is not a whole safetensors file ({error}); download it again") from error
    return tensors

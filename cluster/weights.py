"""Size and completeness of checkpoints, from safetensors headers and the hub's listing: no tensor is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from actors.engine.sizing import ITEM_BYTES
from actors.engine.weight_files import PATTERNS, read_headers, weight_files

_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16}
_DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
    for tensor in read_headers(weight_files(folder)).values():
        stored += tensor.bytes
        parameters[tensor.dtype] += tensor.count
    return Weights(stored, dict(parameters))


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

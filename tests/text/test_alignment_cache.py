"""The cache of two vocabularies' tables on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import actors.text.alignment_cache
from actors.decoding.cross_vocab.tables import Tables
from actors.text.alignment_cache import align
from tests.support.trained_models import tokenizer


def same(one: Tables, other: Tables) -> bool:
    pairs = zip(one.arrays.columns().items(), other.arrays.columns().items(), strict=True)
    return all(name == its and np.array_equal(values, theirs) for (name, values), (its, theirs) in pairs)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "thinklogit"


def test_tables_are_built_once_and_read_afterwards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = align(tokenizer("pieces"), tokenizer("single")).tables
    monkeypatch.setattr(actors.text.alignment_cache, "build_tables", lambda *_: pytest.fail("they are there"))
    assert same(align(tokenizer("pieces"), tokenizer("single")).tables, first)
    assert len(list(folder.iterdir())) == 1


def test_each_pair_and_direction_has_tables_of_its_own(folder: Path) -> None:
    for pair in (("pieces", "single"), ("single", "pieces"), ("grouped", "single")):
        align(*map(tokenizer, pair))
    assert len(list(folder.iterdir())) == 3


def test_a_broken_file_is_built_again(folder: Path) -> None:
    first = align(tokenizer("pieces"), tokenizer("single")).tables
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"no tables at all"):
        file.write_bytes(broken)
        assert same(align(tokenizer("pieces"), tokenizer("single")).tables, first)
        assert same(align(tokenizer("pieces"), tokenizer("single")).tables, first)


def test_a_folder_that_cannot_be_made_costs_nothing_else(folder: Path) -> None:
    folder.write_text("a file stands in its place")
    assert align(tokenizer("pieces"), tokenizer("single")).tables.coverage > 0

"""Aligns a small model with a target of another vocabulary, and caches the tables on disk.

Building the tables of a published pair takes up to a second, and every coordinator needs them at its start. They are
cached in `$XDG_CACHE_HOME/thinklogit` (`~/.cache`) by the digests of both tokenizers. Without a writable folder they
are built at each start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from actors.decoding.cross_vocab.tables import SpecialTokenMatches, TableArrays, Tables, build_tables
from actors.decoding.cross_vocab.translators import Alignment
from actors.text.tokenizer import RoleTokenizer

log = logging.getLogger(__name__)

_VERSION = 4  # of the algorithm that builds the tables


def align(target: RoleTokenizer, role: RoleTokenizer) -> Alignment:
    """The alignment of a small model with a target. Raises UnsupportedTokenizer."""
    same, ends = _same_added(target, role), bool(target.eos_ids and role.eos_ids)
    special = same | ({id_: role.eos_ids[0] for id_ in target.eos_ids} if ends else {})
    events = {ours: (theirs,) for ours, theirs in same.items()} | ({target.eos_ids[0]: role.eos_ids} if ends else {})
    without_text = {*special.values(), *role.eos_ids, *role.special_ids}
    shown = {id_: content.encode() for content, id_ in role.added_tokens.items() if id_ not in without_text}
    tables = cached_tables(target, role, SpecialTokenMatches(events, shown))
    texts = list(target.adapter.texts) + [None] * (max(target.added_tokens.values(), default=-1) + 1)
    for content, id_ in target.added_tokens.items():
        texts[id_] = content.encode()
    for id_ in target.eos_ids:
        texts[id_] = None
    back = {theirs: ours for ours, theirs in same.items()}
    back |= dict.fromkeys(role.eos_ids, target.eos_ids[0]) if ends else {}
    alignment = Alignment(target.adapter, role.adapter, tables, special, texts, back, shown)
    _ = alignment.crossing_finder  # sorts the vocabulary now, so that no session waits for it
    return alignment


def cached_tables(target: RoleTokenizer, role: RoleTokenizer, matches: SpecialTokenMatches) -> Tables:
    """The tables of a pair, from disk if they are cached."""
    file = _folder() / f"{_digest(target, role, matches)}.npz"
    try:
        with file.open("rb") as stored, np.load(stored) as columns:
            return Tables(TableArrays(**{name: columns[name] for name in columns.files}))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        tables = build_tables(target.adapter, role.adapter, matches, target.width)
    try:
        _write(tables, file)
    except OSError as error:
        log.info("the tables of two vocabularies are not cached: %s", error)
    return tables


def _same_added(target: RoleTokenizer, role: RoleTokenizer) -> dict[int, int]:
    """By added token of the target the role's id of the same content, without tokens that end a text."""
    ends = {*target.eos_ids}, {*role.eos_ids}
    pairs = ((id_, role.added_tokens.get(content, -1)) for content, id_ in target.added_tokens.items())
    return {
        ours: theirs
        for ours, theirs in pairs
        if 0 <= theirs < role.width and ours < target.width and ours not in ends[0] and theirs not in ends[1]
    }


def _digest(target: RoleTokenizer, role: RoleTokenizer, matches: SpecialTokenMatches) -> str:
    parts = (_VERSION, target.adapter.digest, role.adapter.digest, sorted(matches.same.items()), target.width)
    return hashlib.sha256(repr((*parts, sorted(matches.shown.items()))).encode()).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thinklogit"


def _write(tables: Tables, file: Path) -> None:
    """Write the tables to one file atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, allow_pickle=False, **tables.arrays.columns())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

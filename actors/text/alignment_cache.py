"""Alignments of a small model with a target of another family, and their tables on disk.

Building tables takes up to a second for a published pair, and every coordinator needs them at its start. So they are
kept in `$XDG_CACHE_HOME/thinklogit` (`~/.cache`) by the digests of both tokenizers. A folder that cannot be written
costs time and nothing else.
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

_VERSION = 3  # of how tables are built


def align(target: RoleTokenizer, role: RoleTokenizer) -> Alignment:
    """How a small model reads and means what the target says. Raises SpellingError."""
    same, ends = _same_added(target, role), bool(target.eos_ids and role.eos_ids)
    special = same | ({id_: role.eos_ids[0] for id_ in target.eos_ids} if ends else {})
    events = {ours: (theirs,) for ours, theirs in same.items()} | ({target.eos_ids[0]: role.eos_ids} if ends else {})
    known = {*special.values(), *role.eos_ids, *role.special_ids}
    shown = {id_: content.encode() for content, id_ in role.added_tokens.items() if id_ not in known}
    tables = cached_tables(target, role, SpecialTokenMatches(events, shown))
    texts = list(target.adapter.texts) + [None] * (max(target.added_tokens.values(), default=-1) + 1)
    for content, id_ in target.added_tokens.items():
        texts[id_] = content.encode()
    for id_ in target.eos_ids:
        texts[id_] = None
    back = {theirs: ours for ours, theirs in same.items()}
    back |= dict.fromkeys(role.eos_ids, target.eos_ids[0]) if ends else {}
    alignment = Alignment(target.adapter, role.adapter, tables, special, texts, back, shown)
    _ = alignment.crossing_finder  # sorts the vocabulary, for which no session should wait
    return alignment


def cached_tables(target: RoleTokenizer, role: RoleTokenizer, roles: SpecialTokenMatches) -> Tables:
    """The tables of a pair, from disk if they are there."""
    file = _folder() / f"{_digest(target, role, roles)}.npz"
    try:
        with file.open("rb") as stored, np.load(stored) as columns:
            return Tables(TableArrays(**{name: columns[name] for name in columns.files}))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        tables = build_tables(target.adapter, role.adapter, roles, target.width)
    try:
        _keep(tables, file)
    except OSError as error:
        log.info("the tables of two vocabularies are not kept: %s", error)
    return tables


def _same_added(target: RoleTokenizer, role: RoleTokenizer) -> dict[int, int]:
    """Added tokens of one content, but for those that end a text."""
    ends = {*target.eos_ids}, {*role.eos_ids}
    pairs = ((id_, role.added_tokens.get(content, -1)) for content, id_ in target.added_tokens.items())
    return {
        ours: theirs
        for ours, theirs in pairs
        if 0 <= theirs < role.width and ours < target.width and ours not in ends[0] and theirs not in ends[1]
    }


def _digest(target: RoleTokenizer, role: RoleTokenizer, roles: SpecialTokenMatches) -> str:
    parts = (_VERSION, target.adapter.digest, role.adapter.digest, sorted(roles.same.items()), target.width)
    return hashlib.sha256(repr((*parts, sorted(roles.shown.items()))).encode()).hexdigest()


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thinklogit"


def _keep(tables: Tables, file: Path) -> None:
    """Write them as one file that is whole or not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, allow_pickle=False, **tables.arrays.columns())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise

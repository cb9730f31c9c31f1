"""A short run at load that holds an engine against its model's own plain forward, and refuses what differs."""

from __future__ import annotations

import torch
from torch import Tensor

from actors.decoding.hashing import extend_hashes
from actors.engine.errors import LoadError
from actors.engine.step_engine import StepEngine
from actors.engine.verbs import Extend, Held

_LENGTHS = {-1: 5, -2: 43}  # session keys and their tokens: ragged, and several tiles of exact mode together
_CHUNKS = 2
# Relative error of a row around its mean. Sound models stay far below; state that leaks is of the order of 1.
_TOLERANCE_FLOAT32 = 1e-3
_TOLERANCE_ROUNDED = 5e-2  # 16-bit and quantised arithmetic


def verify_engine(engine: StepEngine, name: str) -> None:
    """Raise LoadError if two short ragged sequences differ from plain eager forwards of the model called `name`.

    In exact mode decoding alone, token by token, must moreover give the same bits as the ragged run.
    """
    if engine.layers != engine.hidden_layers:
        why = f"attention ran in {engine.layers} of its {engine.hidden_layers} layers"
        raise LoadError(name, why, "Choose a model in which every layer attends through transformers' interface.")
    ragged = _ragged_rows(engine)
    alone = {key: _rows_alone(engine, key) for key in _LENGTHS} if engine.exact else ragged
    for key, rows in ragged.items():
        if not torch.equal(rows, alone[key]):
            why = "its bits depend on the company of a session on this CPU and torch build"
            raise LoadError(f"exact mode of {name}", why, "Leave exact unset, or use another dtype or machine.")
        error_size = relative_error(rows, engine.plain_logits(_tokens(engine, key)).cpu())
        limit = _TOLERANCE_FLOAT32 if engine.dtype == torch.float32 else _TOLERANCE_ROUNDED
        if not error_size <= limit:  # a NaN is refused too
            why = f"packed sessions differ from plain forwards by {error_size:.1e}, {limit:.0e} is allowed"
            raise LoadError(name, why, "The engine would be silently wrong: choose another model.")


def relative_error(rows: Tensor, reference: Tensor) -> float:
    """The largest |row - reference| / |reference - its mean| over the rows of two tensors [R, V]."""
    spread = (reference - reference.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)
    return float(((rows - reference).norm(dim=-1) / spread).max())


def _tokens(engine: StepEngine, key: int) -> list[int]:
    return [
        (31 * position * position + 7 * position - 17 * key) % engine.vocabulary for position in range(_LENGTHS[key])
    ]


def _ragged_rows(engine: StepEngine) -> dict[int, Tensor]:
    """Logits [n, V] of every token of the sequences, run together in chunks."""
    parts: dict[int, list[Tensor]] = {key: [] for key in _LENGTHS}
    for chunk in range(_CHUNKS):
        batch = []
        for key, length in _LENGTHS.items():
            cuts = [length * part // _CHUNKS for part in range(_CHUNKS + 1)]
            batch.append(_extend(engine, key, cuts[chunk], cuts[chunk + 1]))
        for key, rows in _run(engine, batch).items():
            parts[key].append(rows)
    for key in _LENGTHS:
        engine.close(key)
    return {key: torch.cat(rows) for key, rows in parts.items()}


def _rows_alone(engine: StepEngine, key: int) -> Tensor:
    steps = [_run(engine, [_extend(engine, key, at, at + 1)])[key] for at in range(_LENGTHS[key])]
    engine.close(key)
    return torch.cat(steps)


def _extend(engine: StepEngine, key: int, start: int, end: int) -> Extend:
    tokens = _tokens(engine, key)
    prefix = [engine.hash_seed, *extend_hashes(engine.hash_seed, tokens)][start]
    return Extend(key, start, prefix, tokens[start:end], rows=end - start, age=-key)


def _run(engine: StepEngine, batch: list[Extend]) -> dict[int, Tensor]:
    outcomes = engine.extend(batch)
    if not all(isinstance(outcome, Held) for outcome in outcomes):
        why = f"{engine.cache_stats().tokens_total} tokens do not hold two short sequences"
        raise LoadError("cache_tokens", why, "Give the role a larger cache.")
    return {extend.session: torch.from_numpy(engine.whole([extend.session]).copy()) for extend in batch}

"""Compares an engine with its model's own plain forward when it is loaded, and refuses it if they differ."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from actors.decoding.hashing import extend_hashes
from actors.engine.attention import LayerCall, RaggedBatch, Span
from actors.engine.backends import Gathered, PerSession
from actors.engine.errors import LoadError
from actors.engine.inputs import Batch, Layout, upload
from actors.engine.interface import Extend, Held
from actors.engine.native_runner import NativeRunner
from actors.engine.step_engine import StepEngine

_LENGTHS = {-1: 5, -2: 43}  # tokens by session key: ragged, and together several tiles of `batch_invariant` mode
_CHUNKS = 2
_CHECK = 4  # tokens of a verification of drafts, which runs in a bucket if graphs are used
# Sequences at odd starts of the pool, out of order: a chunk of a prompt, decoding, verifications; padding behind.
_TRASH = 320
_SPANS = (
    Span(0, 17, 3, 90),
    Span(17, 1, 131, 130),
    Span(18, 8, 301, 8),
    Span(26, 1, 95, 1),
    Span(27, 5, 97, 33),
)
_DECODING = (Span(0, 1, 131, 130), Span(1, 1, 3, 90), Span(2, 1, 95, 1))
_LAYOUTS = ((_SPANS, Layout(40, 0, 7, 17, 130)), (_DECODING, Layout(4, 0, 4, 1, 1024)))
# Relative error of a row around its mean. Correct models stay far below; leaking state causes errors of about 1.
_TOLERANCE_FLOAT32 = 1e-3
# 16-bit arithmetic: of the median row. Where two plain forwards differ by more, so much more is allowed: with large
# biases of keys, bfloat16 forwards with SDPA and eager attention differ by .2.
_TOLERANCE_ROUNDED, _TIMES_APART, _CEILING = 5e-2, 3.0, 0.7


def verify_engine(engine: StepEngine[Any], name: str) -> None:
    """Raise LoadError if two short ragged sequences differ from plain forwards of the model called `name`.

    In 16 bit, the plain attention is SDPA where it can compute the model's, as the engine's is, and the allowed error
    is measured: see `_plain_rows`. Before that, a fused attention back end is compared with SDPA, and if graphs are
    used, a replay with the ragged run.
    In `batch_invariant` mode, decoding a session alone, token by token, must give the same bits as the ragged run.
    """
    if isinstance(engine.runner, NativeRunner):
        verify_attention(engine.runner, name)
    ragged = _ragged_rows(engine)
    _refuse_non_finite(engine, ragged.values(), name)
    plain, limit = _plain_rows(engine)
    if isinstance(engine.runner, NativeRunner) and engine.runner.graphs is not None:
        _verify_graphs(engine, ragged[min(_LENGTHS)], limit, name)
    alone = {key: _rows_alone(engine, key) for key in _LENGTHS} if engine.batch_invariant else ragged
    for key, rows in ragged.items():
        if not torch.equal(rows, alone[key]):
            why = "on this CPU and torch build its bits depend on the other sessions of a batch"
            out = "Leave batch_invariant unset, or use another dtype or machine."
            raise LoadError(f"batch_invariant mode of {name}", why, out)
        error_size = _error_size(engine, rows, plain[key])
        if not error_size <= limit:  # a NaN is refused too
            why = f"packed sessions differ from plain forwards by {error_size:.1e}, {limit:.0e} is allowed"
            raise LoadError(name, why, "The engine would be silently wrong: choose another model.")


def _plain_rows(engine: StepEngine[Any]) -> tuple[dict[int, Tensor], float]:
    """By session the rows of a plain forward, and the error that is allowed.

    Where there are two plain forwards, with different attention, it is three times their distance, but at least .05 and
    at most .7: unrelated rows differ by 1 and more.
    """
    plain = {key: [rows.cpu() for rows in engine.plain_logits(_tokens(engine, key))] for key in _LENGTHS}
    apart = [_error_size(engine, other, first) for first, *others in plain.values() for other in others]
    limit = max(_tolerance(engine.runner.dtype), min(_CEILING, _TIMES_APART * max(apart, default=0.0)))
    return {key: rows[0] for key, rows in plain.items()}, limit


def _refuse_non_finite(engine: StepEngine[Any], rows: Iterable[Tensor], name: str) -> None:
    """Raise LoadError for rows with NaN or infinite values, and name the first weight that has one."""
    if all(bool(each.isfinite().all()) for each in rows):
        return
    if (weight := engine.runner.non_finite_weight()) is not None:
        why = f"its weights give logits that are not finite: {weight} holds NaN or infinite values"
        raise LoadError(name, why, "Download the checkpoint or adapter again, or train it again.")
    why = f"its logits are not finite in {str(engine.runner.dtype).removeprefix('torch.')}, though its weights are"
    raise LoadError(name, why, "Set dtype: bfloat16 or float32, whose range is larger, or choose another model.")


@torch.inference_mode()
def verify_attention(runner: NativeRunner, name: str) -> None:
    """Raise LoadError unless all layers attend, and a back end without SDPA gives what the gathered one does."""
    if runner.layers != runner.hidden_layers:
        why = f"attention ran in {runner.layers} of its {runner.hidden_layers} layers"
        raise LoadError(name, why, "Choose a model in which every layer attends through transformers' interface.")
    backend = runner.attention
    if isinstance(backend, Gathered | PerSession):
        return
    for heads, keys, values, scale, window in _attention_shapes(runner):
        generator = torch.Generator().manual_seed(0)
        key_pool, value_pool = (
            torch.randn(_TRASH + 1, *part, generator=generator).to(runner.device, runner.dtype)
            for part in (keys, values)
        )
        for spans, layout in _LAYOUTS:
            query = torch.randn(layout.tokens, heads, keys[1], generator=generator).to(runner.device, runner.dtype)
            real = sum(span.count for span in spans)
            batch = Batch([0] * real, [0] * real, [_TRASH] * real, spans, [])
            flat = upload(layout.flatten(batch, _TRASH), runner.device)
            step = RaggedBatch(spans, layout.tokens, layout.read(flat).write, partial(layout.read_varlen, flat))
            call = LayerCall(scale, window, None, None)
            try:
                ours = backend.attend(step, query, key_pool, value_pool, call).float()
            except (RuntimeError, TypeError) as error:
                out = "Set attention: gathered."
                raise LoadError(f"attention back end {backend.name!r}", f"it raised {error}", out) from error
            theirs = Gathered().attend(step, query, key_pool, value_pool, call).float()
            apart = (ours - theirs)[:real].flatten(1).norm(dim=-1) / theirs[:real].flatten(1).norm(dim=-1)
            error_size = float(apart.max())
            if not error_size <= _tolerance(runner.dtype) or bool(ours[real:].count_nonzero()):
                why = f"it differs from SDPA by {error_size:.1e} on this device and torch build"
                raise LoadError(f"attention back end {backend.name!r}", why, "Set attention: gathered.")


def _attention_shapes(
    runner: NativeRunner,
) -> list[tuple[int, tuple[int, int], tuple[int, int], float, int | None]]:
    """Query heads, shape of a key and of a value, scale and window, for each kind of layer with and without window."""
    kinds = {(keys.shape[1:], values.shape[1:]) for keys, values in runner.cache_layers}
    return [
        (runner.heads, (keys[0], keys[1]), (values[0], values[1]), keys[1] ** -0.5, window)
        for keys, values in kinds
        for window in (None, 7)
    ]


def _verify_graphs(engine: StepEngine[Any], rows: Tensor, limit: float, name: str) -> None:
    """Raise LoadError unless captured and replayed steps give the rows [n, V] of the longest sequence again.

    limit: of the error.
    """
    key = min(_LENGTHS)
    for _ in range(2):  # a bucket is captured at its first use
        parts = []
        for start in range(0, len(rows) - _CHECK, _CHECK):
            parts.append(_run(engine, [_extend(engine, key, start, start + _CHECK)])[key])
        parts.append(_run(engine, [_extend(engine, key, _CHECK * len(parts), _CHECK * len(parts) + 1)])[key])
        engine.close(key)
        again = torch.cat(parts)
        error_size = _error_size(engine, again, rows[: len(again)])
        if not error_size <= limit:
            why = f"steps in buckets differ from ragged ones by {error_size:.1e}"
            raise LoadError(f"CUDA graphs of {name}", why, "Set attention: gathered, which runs without them.")


def _tolerance(dtype: torch.dtype) -> float:
    return _TOLERANCE_FLOAT32 if dtype == torch.float32 else _TOLERANCE_ROUNDED


def _error_size(engine: StepEngine[Any], rows: Tensor, reference: Tensor) -> float:
    """The error of the worst row; in 16 bit of the median row. NaN if an error is."""
    errors = relative_errors(rows, reference)
    return float(errors.max() if engine.runner.dtype == torch.float32 else errors.median())


def relative_errors(rows: Tensor, reference: Tensor) -> Tensor:
    """|row - reference| / |reference - its mean| of each row of two tensors [R, V]."""
    spread = (reference - reference.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-6)
    errors: Tensor = (rows - reference).norm(dim=-1) / spread
    return errors


def _tokens(engine: StepEngine[Any], key: int) -> list[int]:
    vocabulary = engine.runner.vocabulary
    return [(31 * at * at + 7 * at - 17 * key) % vocabulary for at in range(_LENGTHS[key])]


def _ragged_rows(engine: StepEngine[Any]) -> dict[int, Tensor]:
    """By session the logits [n, V] of all its tokens, computed together in chunks."""
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


def _rows_alone(engine: StepEngine[Any], key: int) -> Tensor:
    steps = [_run(engine, [_extend(engine, key, at, at + 1)])[key] for at in range(_LENGTHS[key])]
    engine.close(key)
    return torch.cat(steps)


def _extend(engine: StepEngine[Any], key: int, start: int, end: int) -> Extend:
    tokens = _tokens(engine, key)
    prefix = [engine.hash_seed, *extend_hashes(engine.hash_seed, tokens)][start]
    return Extend(key, start, prefix, tokens[start:end], rows=end - start, age=-key)


def _run(engine: StepEngine[Any], batch: list[Extend]) -> dict[int, Tensor]:
    outcomes = engine.extend(batch)
    if not all(isinstance(outcome, Held) for outcome in outcomes):
        why = f"{engine.cache_stats().tokens_total} tokens do not hold two short sequences"
        raise LoadError("cache_tokens", why, "Give the role a larger cache.")
    return {extend.session: torch.from_numpy(engine.whole([extend.session]).copy()) for extend in batch}

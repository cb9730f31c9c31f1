"""Token ids as two bytes each, whatever the size of the vocabulary.

A vocabulary is cut into pages of 65,536 ids. The ids of one row are sent in the order of their pages: the low halves
as they are, and per row how many lie on each page but the last. A published vocabulary of 152,064 has three pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 1 << 16
Array = NDArray[Any]


def page_counts(width: int) -> int:
    """How many numbers per row say on which page its ids lie: one less than pages in a vocabulary of `width`."""
    return max(0, -(-width // PAGE) - 1)


def split_ids(ids: Array, counts: Array | Sequence[int], width: int) -> tuple[Array, Array]:
    """Low halves [n] and pages [R * page_counts] of ids [n], of which `counts` [R] belong to each row.

    Within a row the ids must be in the order of their pages; ascending ids are.
    """
    low, columns = ids.astype("<u2"), page_counts(width)
    if not columns:
        return low, np.zeros(0, "<u2")
    rows = len(counts)
    key = np.repeat(np.arange(0, rows * (columns + 1), columns + 1), counts) + (ids >> 16)
    found = np.bincount(key, minlength=rows * (columns + 1)).reshape(rows, columns + 1)
    return low, found[:, :columns].astype("<u2").reshape(-1)


def join_ids(low: Array, pages: Array, counts: Array | Sequence[int], width: int) -> Array:
    """The ids [n] that `split_ids` took apart. Raises ValueError if the columns do not fit one another."""
    columns = page_counts(width)
    counts = np.asarray(counts, np.int64)
    if len(pages) != len(counts) * columns or counts.sum() != len(low) or (len(counts) and counts.min() < 0):
        raise ValueError("the columns of ids do not fit their counts")
    if not columns:
        return low.astype("<i4")
    each = np.empty((len(counts), columns + 1), np.int64)
    each[:, :columns] = pages.reshape(len(counts), columns)
    each[:, columns] = counts - each[:, :columns].sum(1)
    if len(each) and each[:, columns].min() < 0:
        raise ValueError("a row has more ids on its pages than it has ids")
    high = np.tile(np.arange(0, (columns + 1) * PAGE, PAGE, dtype="<i4"), len(counts))
    ids: Array = low + np.repeat(high, each.reshape(-1))
    return ids

"""Encodes token ids in two bytes each, for vocabularies of any size.

A vocabulary is divided into pages of 65,536 ids. The ids of a row are sent in the order of their pages, as their low 16
bits, together with the number of the row's ids on each page but the last.

Example, a vocabulary of 152,064 ids (three pages) and a row with the ids 7, 65,536 + 3 and 131,072 + 9:
    low = [7, 3, 9], pages = [1, 1]; the third page has the remaining 3 - 1 - 1 = 1 id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.decoding import kernels

PAGE = 1 << 16
Array = NDArray[Any]


def page_counts(width: int) -> int:
    """Page counts per row: one less than the pages of a vocabulary of `width` ids."""
    return max(0, -(-width // PAGE) - 1)


def split_ids(ids: Array, counts: Array | Sequence[int], width: int) -> tuple[Array, Array]:
    """Low 16 bits [n] and page counts [R * page_counts] of ids [n]; row r has `counts[r]` of them.

    Within a row the ids must be in the order of their pages; ascending ids are.
    """
    columns, numbers = page_counts(width), np.asarray(counts, np.int64)
    low, pages = np.empty(len(ids), "<u2"), np.zeros(len(numbers) * columns, "<u2")
    kernels.split_ids(ids if ids.flags.writeable else ids.copy(), numbers, columns, low, pages)
    return low, pages


def join_ids(low: Array, pages: Array, counts: Array | Sequence[int], width: int) -> Array:
    """The ids [n] from the columns of `split_ids`. Raises ValueError if the columns contradict each other."""
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

"""Gives the system the pages of weights that are hardly read again once a model is loaded.

safetensors maps a file into memory as a whole. As long as one tensor of it is used, all pages that were ever read stay:
also those of weights that the engine holds in another order.
"""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor

_PAGEOUT = 21  # MADV_PAGEOUT of <linux/mman.h>, since Linux 5.4


def page_out(tensor: Tensor) -> None:
    """Ask the system to drop the pages of a CPU tensor that equal their file. Reading one brings it back from the file.

    Changed pages and memory without a file keep their place or are swapped. Pages that another process has mapped, too,
    stay, and so do those of a file that this process may not write. Does nothing where this is not supported.
    """
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is None or tensor.device.type != "cpu":
        return
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _PAGEOUT)

"""Memory of the host that is promised now and taken page by page, as it is written."""

from __future__ import annotations

import math
import mmap
import sys

import numpy as np
import torch
from torch import Tensor

from envs.api import UserError

PROMISED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (0x4000 if sys.platform == "linux" else 0)  # Linux's MAP_NORESERVE


def reserve(shape: tuple[int, ...], dtype: torch.dtype, knob: str = "agent.capacity") -> Tensor:
    """Zeros on the host. What an allocator would refuse, since it is more than is free, is given: pages are taken when they are written.

    UserError, which says to lower `knob`, where it is more than a process can address.
    """
    size = math.prod(shape) * dtype.itemsize
    try:
        pages = mmap.mmap(-1, max(size, 1), flags=PROMISED)
    except (OSError, OverflowError):
        raise UserError(f"the replay would take {size:,} bytes, more than this machine can address; lower {knob}") from None
    return torch.from_numpy(np.frombuffer(pages, np.uint8, size)).view(dtype).view(shape)

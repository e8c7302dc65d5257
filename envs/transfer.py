"""Host arrays to a device in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; an array is viewed in the block under its own dtype, so it must start at a multiple of the item size


class Transfer:
    """Takes the arrays of one tick to `device` together.

    On the CPU the tensors share the memory of arrays that are contiguous. Elsewhere the arrays are packed into one block that crosses in
    one copy: on CUDA from pinned memory and without waiting. Two blocks take turns, so the host waits only where it runs two ticks ahead
    of the copies. Torch is kept out of the copies on the host: it spreads them over threads, whose meeting costs more than the copy where
    the emulators' threads are busy.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._blocks = [torch.empty(0, dtype=torch.uint8)] * 2
        self._copied = [torch.cuda.Event() for _ in range(2)] if self.device.type == "cuda" else []
        self._turn = 0

    def __call__(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Contiguous tensors on the device with the arrays' values, shapes and dtypes. The arrays must not be written afterwards."""
        if self.device.type == "cpu":
            return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        size = block_bytes(arrays)
        turn = self._turn = 1 - self._turn
        if self._copied:
            self._copied[turn].synchronize()
        if self._blocks[turn].numel() < size:
            self._blocks[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=bool(self._copied))
        block = self._blocks[turn][:size]
        pack(arrays, block)
        landed = block.to(self.device, non_blocking=bool(self._copied), copy=True)
        if self._copied:
            self._copied[turn].record(torch.cuda.current_stream(self.device))
        return unpack(landed, arrays)


def block_bytes(arrays: Sequence[np.ndarray]) -> int:
    """Bytes of a block that holds the arrays one after another, each at a multiple of ALIGNMENT."""
    return sum(_padded(array) for array in arrays)


def pack(arrays: Sequence[np.ndarray], block: Tensor) -> None:
    """Writes the arrays into `block`, uint8 (block_bytes(arrays)) on the host."""
    host, start = block.numpy(), 0
    for array in arrays:
        host[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        start += _padded(array)


def unpack(block: Tensor, like: Sequence[np.ndarray]) -> tuple[Tensor, ...]:
    """Views of a packed `block` with the shapes and dtypes of the arrays in `like`."""
    tensors, start = [], 0
    for array in like:
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors.append(block[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _padded(array)
    return tuple(tensors)


def _padded(array: np.ndarray) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT

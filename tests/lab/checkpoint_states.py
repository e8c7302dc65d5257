"""States for the tests of checkpoints, and what it means that two are the same."""

from __future__ import annotations

import math
import random
import struct
from typing import Any

import torch

from lab import checkpoint_format

CHUNK = 4096  # bytes; stands for 64 MiB in the tests


def bits(tensor: torch.Tensor) -> bytes:
    row = tensor.detach().resolve_conj().cpu().contiguous().as_strided((tensor.numel(),), (1,))
    return row.view(torch.uint8).numpy().tobytes()


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure, key order and every bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and (a.dtype, a.shape) == (b.dtype, b.shape) and bits(a) == bits(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return struct.pack(">d", a) == struct.pack(">d", b) if isinstance(a, float) else a == b


def random_tensor(rng: random.Random) -> torch.Tensor:
    dtype = rng.choice(list(checkpoint_format.DTYPES))
    shape = [rng.choice([0, 1, 2, 3, 7, 40]) for _ in range(rng.randrange(4))]
    raw = torch.frombuffer(bytearray(rng.randbytes(math.prod(shape) * dtype.itemsize + 16)), dtype=torch.uint8)
    if dtype == torch.bool:
        raw = raw % 2
    tensor = raw[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
    if tensor.dim() > 1 and rng.random() < 0.5:
        tensor = tensor.transpose(0, -1)
    return tensor[::2] if tensor.dim() and rng.random() < 0.3 else tensor


def random_state(rng: random.Random, depth: int = 4) -> Any:
    if depth and rng.random() < 0.6:
        items = [random_state(rng, depth - 1) for _ in range(rng.randrange(5))]
        texts = ["", "a", "a/b", "..", ".", "/", "w.0", "é\U0001f642", "\ud800", "\ud83d\ude42", 'q"\\\n', 0, -3, "0", "dict", "tensor"]
        return rng.choice([items, tuple(items), dict(zip(rng.sample(texts, len(items)), items))])
    return rng.choice(
        [
            lambda: random_tensor(rng),
            lambda: rng.getrandbits(rng.choice([1, 64, 1024, 1025, 40_000])) * rng.choice([1, -1]),
            lambda: struct.unpack(">d", rng.randbytes(8))[0],
            lambda: rng.choice([math.nan, math.inf, -math.inf, -0.0, 5e-324, 0.1, True, False, None, "", "\udfff\n\x00"]),
        ]
    )()


def table(rows: int, value: float = 0.0) -> torch.Tensor:
    """Float32 (rows, 256): four rows a chunk, each with its own content."""
    return torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 256) + 0.25 * torch.arange(256) + value


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message
    assert "\n" not in message
    return message

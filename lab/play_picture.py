"""What a tab of job=play is sent at every step: numbers as JSON, and pictures as they are."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LENGTH = struct.Struct("<I")


def message(facts: Mapping[str, Any], pictures: Mapping[str, Tensor]) -> bytes:
    """Packs plain values and pictures uint8 (C, H, W), C of 1 or 3, into one binary message.

    Four bytes, little end first, tell the length of the JSON that follows; it holds `facts`, and as `pictures` the name, height, width
    and channels of each. Then come their pixels, row by row, channels last.
    """
    sizes, pixels = [], []
    for name, picture in pictures.items():
        channels, height, width = picture.shape
        sizes.append({"name": name, "height": height, "width": width, "channels": channels})
        pixels.append(picture.permute(1, 2, 0).contiguous().cpu().numpy().tobytes())
    head = json.dumps({**facts, "pictures": sizes}, allow_nan=False).encode()
    return b"".join((_LENGTH.pack(len(head)), head, *pixels))


def unpack(packed: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The inverse of `message`: the JSON, and each picture's pixels."""
    (length,) = _LENGTH.unpack_from(packed)
    facts = json.loads(packed[_LENGTH.size : _LENGTH.size + length])
    pictures, at = {}, _LENGTH.size + length
    for size in facts["pictures"]:
        stop = at + size["height"] * size["width"] * size["channels"]
        pictures[size["name"]], at = packed[at:stop], stop
    assert at == len(packed), f"{len(packed) - at} bytes are left"
    return facts, pictures

"""What stands in a checkpoint's manifest: the state as a tree of JSON values, and where each tensor's bytes lie.

A node of the tree is None, a bool, a str, an int or a finite float as it is, a list of nodes, or one of

    {"dict": [[key, node], ...]}   {"tuple": [node, ...]}   {"tensor": place in the manifest's list}
    {"int": hexadecimal}           {"float": the 8 bytes of a nan or an infinity, big endian, in hexadecimal}

Nothing that a manifest says is believed before it is checked: whoever wrote it may be a stranger.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from envs.api import UserError

FORMAT, VERSION = "reverie-checkpoint", 1
MANIFEST, SMALL = "manifest.json", "small.safetensors"
MANIFEST_BYTES = 64 << 20  # a longer manifest is neither written nor read
MAX_DEPTH = 100
_FILE_NAME = re.compile(r"(small|[0-9a-f]{64})\.safetensors")
_SELF_CHECKSUM = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ')

# The dtypes that can be stored, with their names in safetensors; "" where it has none and the bytes go as U8.
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.bool: "BOOL"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8"},
    **{torch.complex128: "", torch.complex64: "C64", torch.complex32: ""},
    **{torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "", torch.float8_e5m2fnuz: ""},
}
_DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


class Refused(Exception):
    """A checkpoint cannot be used. The message completes "checkpoint was refused: ..."."""


class Piece(NamedTuple):
    """A run of bytes in a file, with its checksum."""

    file: str
    start: int
    size: int
    sha256: str


class Stored(NamedTuple):
    """A tensor as the manifest describes it; its pieces, joined, are its bytes in row-major order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[Piece]


class Manifest(NamedTuple):
    """`headers` and the tensors' pieces together cover every byte of every file."""

    files: dict[str, int]  # bytes of each
    headers: list[Piece]
    tensors: list[Stored]
    tree: Any


def flatten(state: Mapping[str, Any]) -> tuple[Any, list[tuple[str, Tensor]]]:
    """The state as a tree, and its tensors with their paths. TypeError, naming the path, where a leaf cannot be stored."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a state is a dict, not {type(state).__name__}")
    tensors: list[tuple[str, Tensor]] = []
    return _encode(state, (), tensors), tensors


def _encode(value: Any, path: tuple[str, ...], tensors: list[tuple[str, Tensor]]) -> Any:
    where = "/".join(path)
    if len(path) > MAX_DEPTH:
        raise TypeError(f"{where[:200]} lies deeper than {MAX_DEPTH} levels")
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= 1024 else {"int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES or value.layout != torch.strided or value.is_meta:
            raise TypeError(f"{where} is a {value.dtype} tensor ({value.layout}, {value.device}) that a checkpoint cannot hold")
        tensors.append((where, value.detach()))
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Mapping):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise TypeError(f"{where or 'the state'} has the key {key!r}: keys are str or int")
        return {"dict": [[key, _encode(item, (*path, str(key)), tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        items = [_encode(item, (*path, str(index)), tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    raise TypeError(f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, str, bool, None, dicts, lists, tuples")


def decode(node: Any, tensor: Callable[[int], Tensor]) -> Any:
    """The state back from its tree; `tensor` gives the tensor that has a place in the list."""
    if isinstance(node, list):
        return [decode(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "dict":
        return {key: decode(item, tensor) for key, item in value}
    if kind == "tuple":
        return tuple(decode(item, tensor) for item in value)
    if kind == "int":
        return int(value, 16)
    if kind == "float":
        return struct.unpack(">d", bytes.fromhex(value))[0]
    if kind == "tensor":
        return tensor(natural(value))
    raise ValueError(f"a leaf of the unknown kind {kind!r}")


def children(node: Any) -> Iterator[tuple[str, Any]]:
    """The names and nodes right below a node; nothing below a leaf."""
    if isinstance(node, dict) and "dict" in node:
        yield from ((str(key), item) for key, item in node["dict"])
    elif isinstance(node, list) or (isinstance(node, dict) and "tuple" in node):
        yield from ((str(index), item) for index, item in enumerate(node["tuple"] if isinstance(node, dict) else node))


def find(node: Any, path: str) -> Iterator[Any]:
    """All nodes at `path`: more than one only where keys hold slashes themselves."""
    for key, item in children(node):
        if key == path:
            yield item
        elif path.startswith(f"{key}/"):
            yield from find(item, path[len(key) + 1 :])


def header(entries: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The opening of a safetensors file that holds (name, dtype, shape, bytes), one after another."""
    table, offset = {}, 0
    for name, dtype, shape, size in entries:
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def to_json(value: Any) -> bytes:
    """Half a surrogate pair, which a str may hold, survives; so do all ints, and floats to the last bit."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")


def manifest_text(tree: Any, tensors: Sequence[tuple[str, Tensor]], pieces: Sequence[Sequence[Piece]], headers: Iterable[Piece]) -> bytes:
    """The manifest, opening with the sha256 of all that follows. TypeError where it would be longer than MANIFEST_BYTES."""
    every = sorted({*headers, *(piece for row in pieces for piece in row)})
    body = {
        "format": FORMAT,
        "version": VERSION,
        "files": {piece.file: piece.start + piece.size for piece in every},  # the last piece of each file stays
        "headers": sorted(headers),
        "tensors": [
            {"path": path, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "pieces": row}
            for (path, tensor), row in zip(tensors, pieces)
        ],
        "state": tree,
    }
    rest = to_json(body)[1:]
    text = f'{{"sha256": "{hashlib.sha256(rest).hexdigest()}", '.encode() + rest
    if len(text) > MANIFEST_BYTES:
        raise TypeError(f"the state has {len(text)} bytes outside its tensors, {MANIFEST_BYTES} are allowed: keep long lists as tensors")
    return text


def parse_manifest(text: bytes) -> Manifest:
    """The reverse of `manifest_text`, every field checked. Refused where it is damaged, foreign or of another version."""
    try:
        body = json.loads(text.decode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{MANIFEST} is not JSON ({error})") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise Refused(f"{MANIFEST} is not that of a Reverie checkpoint")
    if body.get("version") != VERSION:
        raise Refused(f"it has format version {str(body.get('version'))[:20]}, this Reverie reads {VERSION}")
    opening = _SELF_CHECKSUM.match(text)
    if opening is None or hashlib.sha256(text[opening.end() :]).hexdigest() != opening[1].decode():
        raise Refused(f"{MANIFEST} does not match its checksum")
    with doubting():
        files = {name: natural(size) for name, size in body["files"].items()}
        for name in files:
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"the file name {name!r}")
        headers = [_piece(row, files) for row in body["headers"]]
        return Manifest(files, headers, [_stored(entry, files) for entry in body["tensors"]], body["state"])


@contextmanager
def doubting() -> Iterator[None]:
    """Turns what an ill-made manifest or an unreadable file brings about into Refused."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, MemoryError, struct.error) as error:
        raise Refused(f"{MANIFEST} makes no sense ({type(error).__name__}: {str(error)[:200]})") from None


def natural(value: Any) -> int:
    """`value`, if it is an int that a size or a place can be; else ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{str(value)[:40]} is not a size")
    return value


def _piece(row: Any, files: Mapping[str, int]) -> Piece:
    name, start, size, sha256 = row
    if natural(start) + natural(size) > files[name]:
        raise ValueError(f"bytes beyond the end of {name}")
    if not isinstance(sha256, str):
        raise ValueError(f"a checksum of {name} that is no text")
    return Piece(name, start, size, sha256)


def _stored(entry: Any, files: Mapping[str, int]) -> Stored:
    dtype, shape = _DTYPE_OF[entry["dtype"]], tuple(natural(length) for length in entry["shape"])
    pieces = [_piece(row, files) for row in entry["pieces"]]
    if sum(piece.size for piece in pieces) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the shape {list(shape)} against the bytes")
    return Stored(dtype, shape, pieces)

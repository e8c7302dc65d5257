"""One checkpoint folder: its tensors in safetensors files with checksums, its manifest last; read back and verified."""

from __future__ import annotations

import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from envs.api import UserError
from lab.checkpoint_format import (
    DTYPES,
    MANIFEST,
    MANIFEST_BYTES,
    SMALL,
    Manifest,
    Piece,
    Refused,
    children,
    decode,
    doubting,
    find,
    header,
    manifest_text,
    parse_manifest,
    to_json,
)

CHUNK_BYTES = 64 << 20  # tensors from this size on are cut into files of this size
BLOCK_BYTES = 4 << 20  # read and hashed at a time
FILE_BYTES = 8 << 10  # what a file may take beyond its contents: header, half-filled block, entry in the folder
THREADS = min(4, os.cpu_count() or 1)  # hashing releases the interpreter lock; each holds at most one chunk

NamedTensors = Sequence[tuple[str, Tensor]]
T = TypeVar("T")


def parallel(jobs: Iterable[Callable[[], T]]) -> list[T]:
    """The jobs' results in order. The first failure drops those not yet begun and is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


# From tensors to bytes


def flat(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements start..stop of `tensor` in row-major order, copying no more than these even where it is not contiguous."""
    if tensor.is_contiguous():
        whole = tensor.as_strided((tensor.numel(),), (1,))  # view(-1) may leave a single element with another stride
        return whole[start:stop]
    row = tensor[0].numel()
    first, last = -(-start // row), stop // row  # the rows wanted whole
    if first > last:
        return flat(tensor[last], start - last * row, stop - last * row)
    parts = [tensor[first:last].reshape(-1)]
    if start < first * row:
        parts.insert(0, flat(tensor[first - 1], start - (first - 1) * row, row))
    if stop > last * row:
        parts.append(flat(tensor[last], 0, stop - last * row))
    return torch.cat(parts)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return tensor.view(torch.uint8).numpy().data


def _raw(tensor: Tensor, cut: tuple[int, int]) -> memoryview:
    """The bytes of elements start..stop; no copy where they lie in one row on the CPU."""
    return _bytes_of(flat(tensor, *cut).resolve_conj().resolve_neg().cpu().contiguous())


def _cuts(tensor: Tensor) -> list[tuple[int, int]]:
    """Bounds of the chunks of `tensor` in elements; none where it is small."""
    if tensor.nbytes < CHUNK_BYTES:
        return []
    step = max(1, CHUNK_BYTES // tensor.itemsize)
    return [(start, min(start + step, tensor.numel())) for start in range(0, tensor.numel(), step)]


def _all_cuts(tensors: NamedTensors) -> list[tuple[int, tuple[int, int]]]:
    return [(index, cut) for index, (_, tensor) in enumerate(tensors) for cut in _cuts(tensor)]


def _small(tensors: NamedTensors) -> dict[int, tuple[str, Tensor]]:
    """The tensors that go into one file, by their place in `tensors`, wide dtypes first so that each lies aligned."""
    small = [(index, entry) for index, entry in enumerate(tensors) if not _cuts(entry[1])]
    return dict(sorted(small, key=lambda item: -item[1][1].itemsize))


def _small_header(small: Mapping[int, tuple[str, Tensor]]) -> bytes:
    entries = []
    for index, (path, tensor) in small.items():
        name, dtype = f"{index}:{path}".encode("utf-8", "replace").decode(), DTYPES[tensor.dtype]
        entries.append((name, dtype or "U8", tensor.shape if dtype else [tensor.nbytes], tensor.nbytes))
    return header(entries)


def _chunk_name(sha256: str) -> str:
    return f"{sha256}.safetensors"


# Writing


def write_file(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Writes a file that must not be there yet, down to the disk."""
    with open(path, "xb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Brings the folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_small(folder: Path, small: Mapping[int, tuple[str, Tensor]]) -> tuple[Piece, dict[int, Piece]]:
    opening = _small_header(small)
    pieces: dict[int, Piece] = {}

    def blocks() -> Iterator[bytes | memoryview]:
        yield opening
        start = len(opening)
        for index, (_, tensor) in small.items():
            block = _raw(tensor, (0, tensor.numel()))
            pieces[index] = Piece(SMALL, start, len(block), hashlib.sha256(block).hexdigest())
            start += len(block)
            yield block

    write_file(folder / SMALL, blocks())
    return Piece(SMALL, 0, len(opening), hashlib.sha256(opening).hexdigest()), pieces


def _write_chunk(folder: Path, source: Mapping[str, Path], tensor: Tensor, cut: tuple[int, int]) -> tuple[Piece, Piece]:
    """The pieces of the header and of the bytes. The file is named by its bytes alone: equal bytes are one file, whatever their dtype."""
    block = _raw(tensor, cut)
    opening, sha256 = header([("chunk", "U8", [len(block)], len(block))]), hashlib.sha256(block).hexdigest()
    name = _chunk_name(sha256)
    with suppress(FileExistsError):  # an equal chunk of this very checkpoint, there already or just being written by another thread
        try:
            os.link(source[name], folder / name)
        except (KeyError, OSError):  # a new chunk, or a file system without links
            write_file(folder / name, (opening, block))
    return Piece(name, 0, len(opening), hashlib.sha256(opening).hexdigest()), Piece(name, len(opening), len(block), sha256)


def write_folder(folder: Path, tree: Any, tensors: NamedTensors, source: Mapping[str, Path]) -> None:
    """Fills the empty `folder`: tensors, then the manifest, then the names, each on disk before the next.

    Args:
        source: verified files of an earlier checkpoint by name; chunks among them are linked, not written.
    """
    opening, small = _write_small(folder, _small(tensors))
    cuts = _all_cuts(tensors)
    chunks = parallel(partial(_write_chunk, folder, source, tensors[index][1], cut) for index, cut in cuts)
    pieces = [[small[index]] if index in small else [] for index in range(len(tensors))]
    for (index, _), (_, piece) in zip(cuts, chunks):
        pieces[index].append(piece)
    headers = {opening, *(chunk_opening for chunk_opening, _ in chunks)}
    write_file(folder / MANIFEST, (manifest_text(tree, tensors, pieces, headers),))
    sync_folder(folder)


def most_bytes(tree: Any, tensors: NamedTensors) -> int:
    """Bytes of disk for a checkpoint in which no chunk is linked, rounded up."""
    chunks = len(_all_cuts(tensors))
    manifest = len(to_json(tree)) + sum(300 + 2 * len(to_json(path)) + 20 * tensor.dim() for path, tensor in tensors) + 600 * chunks
    return sum(tensor.nbytes for _, tensor in tensors) + len(_small_header(_small(tensors))) + manifest + (3 + chunks) * FILE_BYTES


def saved_bytes(tensors: NamedTensors, source: Mapping[str, Path]) -> int:
    """Of `most_bytes`, those that chunks equal to one in `source`, or to one another, will not take. Hashes all chunks."""

    def named_size(tensor: Tensor, cut: tuple[int, int]) -> tuple[str, int]:
        block = _raw(tensor, cut)
        return _chunk_name(hashlib.sha256(block).hexdigest()), len(block) + FILE_BYTES

    chunks = parallel(partial(named_size, tensors[index][1], cut) for index, cut in _all_cuts(tensors))
    return sum(size for _, size in chunks) - sum(size for name, size in dict(chunks).items() if name not in source)


# Reading


def _open(folder: Path, name: str, size: int | None = None) -> FileIO:
    """The file, unbuffered, once it proves to be a plain one of `size` bytes (None: no longer than a manifest may be)."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise Refused(f"{name} is missing") from None
    except OSError as error:
        raise Refused(f"{name} cannot be read ({error.strerror})") from None
    found = os.fstat(handle)
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = f"{name} is not a plain file"
    elif size is not None and found.st_size != size:
        reason = f"{name} has {found.st_size} bytes instead of {size}"
    elif size is None and found.st_size > MANIFEST_BYTES:
        reason = f"{name} has {found.st_size} bytes, more than {MANIFEST_BYTES}"
    if reason is not None:
        os.close(handle)
        raise Refused(reason)
    return os.fdopen(handle, "rb", buffering=0)


def _read_manifest(folder: Path) -> Manifest:
    with doubting(), _open(folder, MANIFEST) as file:
        text = file.read(MANIFEST_BYTES)
    return parse_manifest(text)


def _check(folder: Path, size: int, piece: Piece, into: memoryview | None) -> None:
    """Reads the piece of a file of `size` bytes (into `into`, or into nothing). Refused unless its checksum is right."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(BLOCK_BYTES, piece.size))) if into is None else into
    with _open(folder, piece.file, size) as file:
        file.seek(piece.start)
        while done < piece.size:
            start = 0 if into is None else done
            block = buffer[start : start + min(BLOCK_BYTES, piece.size - done)]
            count = file.readinto(block)
            if not count:
                raise Refused(f"{piece.file} ends too early")
            digest.update(block[:count])
            done += count
    if digest.hexdigest() != piece.sha256:
        raise Refused(f"{piece.file} does not match its checksum")


def intact_files(folder: Path) -> dict[str, Path] | None:
    """The files of a checkpoint by name, every byte checked; None where it is damaged or missing."""
    try:
        manifest = _read_manifest(folder)
        pieces = sorted({*manifest.headers, *(piece for stored in manifest.tensors for piece in stored.pieces)})
        with doubting():
            parallel(partial(_check, folder, manifest.files[piece.file], piece, None) for piece in pieces)
    except Refused:
        return None
    return {name: folder / name for name in manifest.files}


def read_folder(folder: Path, only: str | None = None) -> Any:
    """The state, or the part of it at the path `only`: then no other tensor is read.

    Raises:
        Refused: anything read is not as it was written, or does not fit into memory.
        UserError: there is no part `only`.
    """
    manifest = _read_manifest(folder)
    jobs: list[tuple[Piece, memoryview | None]] = []
    made: dict[int, Tensor] = {}
    room = _free_memory()

    def tensor(index: int) -> Tensor:
        nonlocal room
        if index in made:
            return made[index]
        stored = manifest.tensors[index]
        for piece in stored.pieces:  # are there so many bytes on disk, before so many are allocated?
            _open(folder, piece.file, manifest.files[piece.file]).close()
        room -= math.prod(stored.shape) * stored.dtype.itemsize
        if room < 0:
            raise Refused(f"its tensors take {-room} bytes of memory more than are free")
        made[index] = torch.empty(math.prod(stored.shape), dtype=stored.dtype)
        memory, start = _bytes_of(made[index]), 0
        for piece in stored.pieces:
            jobs.append((piece, memory[start : start + piece.size]))
            start += piece.size
        made[index] = made[index].view(stored.shape)
        return made[index]

    with doubting():
        node = manifest.tree
        if only is None:
            jobs += [(piece, None) for piece in manifest.headers]
        else:
            node = next(find(node, only), manifest)
            if node is manifest:
                raise UserError(f"{folder} holds no {only!r}, only {', '.join(name for name, _ in children(manifest.tree))}")
        state = decode(node, tensor)
        parallel(partial(_check, folder, manifest.files[piece.file], piece, memory) for piece, memory in jobs)
    return state


def _free_memory() -> int:
    """Bytes that can be allocated without swapping."""
    import psutil

    return psutil.virtual_memory().available

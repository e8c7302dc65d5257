"""Everything with memory, saved and read back bit for bit, as safetensors and JSON; never pickle.

A run folder holds `checkpoint/` and, as a reserve, `checkpoint.previous/`. In each lie

    manifest.json          the tree of the state with its numbers and texts; for every tensor dtype, shape and pieces (file, first
                           byte, bytes, sha256). It opens with the checksum of all that follows in it.
    small.safetensors      all tensors below 64 MiB, named "place:path".
    <sha256>.safetensors   64 MiB of a larger tensor as uint8, named by their checksum.

Chunks that the checkpoint before holds already are hard-linked from there: a memory that grew by 3% costs little more than 3%.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from envs.api import UserError
from lab.checkpoint_files import intact_files, most_bytes, read_folder, saved_bytes, sync_folder, write_folder
from lab.checkpoint_format import Refused, flatten

CURRENT, PREVIOUS, WRITING = "checkpoint", "checkpoint.previous", "checkpoint.writing"


class NoCheckpoint(UserError):
    """The folder holds no checkpoint at all, damaged or not."""


class Loaded(NamedTuple):
    """What `load` found.

    Attributes:
        state: as it was given to `save`, tensors on the CPU; the part asked for where `only` was given.
        name: the folder it came from, "checkpoint" or "checkpoint.previous".
        warnings: one line each, to be shown to the user; empty where all was well.
    """

    state: Any
    name: str
    warnings: tuple[str, ...]


def required_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of disk that one checkpoint of `state` takes at most. A run that saves holds up to three, less the chunks they share.

    Raises:
        TypeError: a leaf cannot be stored; the message names its path.
    """
    return most_bytes(*flatten(state))


def save(folder: Path, state: Mapping[str, Any]) -> Path:
    """Writes `state` as folder/checkpoint and keeps the one before as folder/checkpoint.previous.

    Killed at any moment it leaves a whole checkpoint, once a first was saved. The earlier one is verified before chunks are linked from
    it; one that fails is dropped and the previous one stays. `state` must not change meanwhile. The memory needed on top does not grow
    with the state: at most four chunks of 64 MiB.

    Args:
        folder: the run folder, made where it is missing.
        state: nested dicts (keys str or int), lists and tuples of tensors, int, float, str, bool and None. Any other Mapping comes back
            as a dict, a named tuple as a tuple, a subclass of int, float or str as the plain type. Tensors may be on any device, dense
            and of whole-byte dtype; those that share a storage come back apart.

    Returns:
        folder/checkpoint.

    Raises:
        TypeError: a leaf cannot be stored; the message names its path.
        UserError: too little disk, a folder that cannot be written, any failure of the file system. What was saved before is kept.
    """
    tree, tensors = flatten(state)
    folder = Path(folder)
    writing = folder / WRITING
    needed = most_bytes(tree, tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(writing)
        intact = intact_files(folder / CURRENT)
        source = (intact_files(folder / PREVIOUS) if intact is None else intact) or {}
        if needed > _free_bytes(folder):
            needed -= saved_bytes(tensors, source)
            if needed > _free_bytes(folder):
                raise _no_room(folder, needed)
        writing.mkdir()
        write_folder(writing, tree, tensors, source)
        _publish(folder, keep_current=intact is not None)
    except OSError as error:
        _remove_quietly(writing)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(folder, needed) from error
        raise UserError(
            f"cannot write a checkpoint in {folder}: {error.strerror or error}; what was saved before is kept, "
            "make the folder writable or choose another runs_dir"
        ) from error
    except BaseException:
        _remove_quietly(writing)
        raise
    return folder / CURRENT


def load(folder: Path, only: str | None = None) -> Loaded:
    """Reads folder/checkpoint; where that is missing or damaged folder/checkpoint.previous, with a warning.

    Every byte is checked against its checksum before anything is returned. Nothing is executed, and no more is allocated than the files
    on disk account for and the memory holds.

    Args:
        folder: the run folder.
        only: a path such as "agent/encoder", keys and list positions joined by "/": that part alone is read and checked.

    Raises:
        NoCheckpoint: there is none.
        UserError: each one there is damaged, or has no part `only`.
    """
    folder = Path(folder)
    faults: list[str] = []
    there = [name for name in (CURRENT, PREVIOUS) if os.path.lexists(folder / name)]
    if not there:
        raise NoCheckpoint(f"no checkpoint in {folder}: check the name of the run, or start it anew without resume=")
    if CURRENT not in there:
        faults.append(f"{CURRENT} is missing (a save was interrupted)")
    for name in there:
        try:
            state = read_folder(folder / name, only)
        except Refused as error:
            faults.append(f"{name} was refused: {' '.join(str(error).split())}")
            continue
        return Loaded(state, name, tuple(f"in {folder} {fault}; {name} is used instead" for fault in faults))
    raise UserError(f"no usable checkpoint in {folder}: {'; '.join(faults)}; put a copy of it back, or start a new run without resume=")


def _publish(folder: Path, keep_current: bool) -> None:
    """checkpoint.writing becomes checkpoint. Between any two steps a whole checkpoint lies under a name that `load` reads."""
    current, previous = folder / CURRENT, folder / PREVIOUS
    if keep_current:
        _remove(previous)
        current.rename(previous)
        sync_folder(folder)
    else:
        _remove(current)
    (folder / WRITING).rename(current)
    sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_quietly(path: Path) -> None:
    with suppress(OSError):
        _remove(path)


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _no_room(folder: Path, needed: int) -> UserError:
    return UserError(
        f"no room for the checkpoint in {folder}: it needs {needed} bytes and {_free_bytes(folder)} are free; "
        "what was saved before is kept, free some disk or choose another runs_dir"
    )

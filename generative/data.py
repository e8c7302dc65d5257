"""Frames to fit models to: in shards on disk, memory-mapped, or in memory, behind one face. No pickle anywhere.

A folder holds raw uint8 shards `frames-00000.bin`, ... and `manifest.json`: format, version, obs_shape, frames, frames_per_shard,
source, and shards with their name, frames and sha256. Readers pass over keys that they do not know, so that actions and rewards can join
as further files.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from envs.api import UserError
from generative.api import Clip

FORMAT, VERSION, MANIFEST = "reverie-frames", 1, "manifest.json"
SHARD_BYTES = 64 * 2**20
SHARD_NAME = re.compile(r"frames-\d{5,}\.bin")


class FrameSource(Protocol):
    """Where frames come from: `FrameData` or `FrameMemory`."""

    obs_shape: tuple[int, int, int]

    def __len__(self) -> int:
        """Number of frames."""

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default generator."""


def image_clip(frames: Tensor) -> Clip:
    """uint8 (B, C, H, W) -> a Clip of B traces without transitions."""
    empty = torch.zeros(len(frames), 0, device=frames.device)
    return Clip(frames[:, None], empty.long(), empty, empty, empty.bool())


def frame_weights(clip: Clip) -> Tensor:
    """float32 (B, T + 1): 1 for the frames up to and with the successor of a row's first `last`, 0 for the padding after it."""
    ended_before = clip.last.long().cumsum(1) - clip.last.long()
    first = torch.ones(len(clip.last), 1, device=clip.last.device)
    return torch.cat((first, (ended_before == 0).float()), 1)


class FrameMemory:
    """Frames in memory, up to `capacity`; behind the faces of `FrameWriter.append` and of `FrameSource`."""

    def __init__(self, obs_shape: tuple[int, int, int], capacity: int, device: torch.device | str = "cpu") -> None:
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])
        self._frames = torch.empty((capacity, *obs_shape), dtype=torch.uint8, device=device)
        self._count = 0

    @classmethod
    def from_tensor(cls, frames: Tensor) -> FrameMemory:
        """Holds uint8 (B, C, H, W) frames without copying them."""
        assert (frames.dtype, frames.ndim) == (torch.uint8, 4), f"frames are uint8 (B, C, H, W), got {frames.dtype} {tuple(frames.shape)}"
        memory = cls((frames.shape[1], frames.shape[2], frames.shape[3]), 0)
        memory._frames, memory._count = frames, len(frames)
        return memory

    def append(self, frames: Tensor) -> None:
        """Copies uint8 (B, C, H, W) in. ValueError beyond the capacity."""
        end = self._count + len(frames)
        if end > len(self._frames):
            raise ValueError(f"{end} frames do not fit into a capacity of {len(self._frames)}")
        self._frames[self._count : end] = frames
        self._count = end

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor) -> Tensor:
        """int64 (n) -> uint8 (n, C, H, W)."""
        return self._frames[: self._count][indices.to(self._frames.device)]

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default CPU generator."""
        return self.batch(torch.randint(self._count, (n,)))


class FrameWriter:
    """Appends frames to a folder in constant memory. `close`, or the end of a `with`, writes the manifest; a folder without cannot be read.

    Args:
        folder: made where missing. UserError where it already holds a manifest, unless `overwrite`, or cannot be written.
        obs_shape: (C, H, W).
        source: where the frames come from (environment, agent, protocol, seed, ...); JSON values, kept in the manifest.
        overwrite: remove the frames that the folder holds.
        shard_bytes: bound on a shard's size (one frame at least).
    """

    def __init__(
        self,
        folder: Path | str,
        obs_shape: tuple[int, int, int],
        source: Mapping[str, Any],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder, self.obs_shape, self.source = Path(folder), tuple(obs_shape), dict(source)
        self.frames = 0
        self._frames_per_shard = max(1, shard_bytes // math.prod(obs_shape))
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._closed = False
        json.dumps(self.source)
        if (self.folder / MANIFEST).exists() and not overwrite:
            raise UserError(f"{self.folder} already holds frames: choose another folder, or remove this one")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MANIFEST).unlink(missing_ok=True)
            for path in self.folder.iterdir():
                if SHARD_NAME.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise self._cannot_write(error) from error

    def append(self, frames: Tensor) -> None:
        """Writes uint8 (B, C, H, W). UserError where the disk is full or read-only."""
        assert not self._closed, "the writer is closed"
        assert (frames.dtype, tuple(frames.shape[1:])) == (torch.uint8, self.obs_shape), f"got {frames.dtype} {tuple(frames.shape)}"
        rows = frames.cpu().contiguous().numpy()
        try:
            while len(rows):
                if self._file is None:
                    name = f"frames-{len(self._shards):05d}.bin"
                    self._file = open(self.folder / name, "wb", buffering=0)  # noqa: SIM115
                    self._hash = hashlib.sha256()
                    self._shards.append({"name": name, "frames": 0, "sha256": ""})
                part = rows[: self._frames_per_shard - self._shards[-1]["frames"]]
                pending = part.data.cast("B")
                while pending:
                    pending = pending[self._file.write(pending) :]
                self._hash.update(part.data)
                self._shards[-1]["frames"] += len(part)
                self.frames += len(part)
                rows = rows[len(part) :]
                if self._shards[-1]["frames"] == self._frames_per_shard:
                    self._finish_shard()
        except OSError as error:
            self._drop_partial_frames()
            raise self._cannot_write(error) from error

    def close(self) -> None:
        """Ends the last shard and writes the manifest beside, then renames it. Twice is harmless."""
        if self._closed:
            return
        self._closed = True
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "obs_shape": list(self.obs_shape),
            "frames": self.frames,
            "frames_per_shard": self._frames_per_shard,
            "shards": self._shards,
            "source": self.source,
        }
        try:
            self._finish_shard()
            beside = self.folder / (MANIFEST + ".new")
            with open(beside, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / MANIFEST)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> FrameWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes. After an error too, so that the frames written before it can be used."""
        if error is None:
            self.close()
            return
        with suppress(UserError):
            self.close()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            file.flush()
            os.fsync(file.fileno())
        self._shards[-1]["sha256"] = self._hash.hexdigest()
        if self._shards[-1]["frames"] == 0:
            (self.folder / self._shards.pop()["name"]).unlink()

    def _drop_partial_frames(self) -> None:
        """Cuts the open shard back to its whole frames, so that `close` can still save them."""
        if self._file is not None:
            with suppress(OSError):
                self._file.truncate(self._shards[-1]["frames"] * math.prod(self.obs_shape))

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write frames to {self.folder}: {error.strerror or error}")


class FrameData:
    """Frames of a folder that `FrameWriter` wrote, memory-mapped.

    UserError, one line, where the folder is missing or no such folder, where it holds another observation shape than `obs_shape`, and where
    a shard is missing, cut short or changed (`verify` reads every byte once, about a second for a gigabyte).
    """

    def __init__(self, folder: Path | str, obs_shape: tuple[int, int, int] | None = None, verify: bool = True) -> None:
        self.folder = Path(folder)
        manifest = _read_manifest(self.folder)
        self.obs_shape: tuple[int, int, int] = tuple(manifest["obs_shape"])
        self.source: dict[str, Any] = manifest["source"]
        if obs_shape is not None and tuple(obs_shape) != self.obs_shape:
            raise UserError(
                f"{self.folder} holds frames of shape {self.obs_shape}, but {tuple(obs_shape)} is needed: collect them anew, or change env"
            )
        self._count, self._frames_per_shard = manifest["frames"], manifest["frames_per_shard"]
        self._shards = [self._open(shard, verify) for shard in manifest["shards"]]

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: Tensor) -> Tensor:
        """int64 (n), each within 0 .. len - 1 -> uint8 (n, C, H, W), a copy. IndexError beyond."""
        wanted = indices.cpu().numpy()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self._count):
            raise IndexError(f"frame indices must lie in 0..{self._count - 1}")
        frames = np.empty((len(wanted), *self.obs_shape), dtype=np.uint8)
        shards = wanted // self._frames_per_shard
        for shard in np.unique(shards):
            rows = np.flatnonzero(shards == shard)
            frames[rows] = self._shards[shard][wanted[rows] - shard * self._frames_per_shard]
        return torch.from_numpy(frames)

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default generator."""
        return self.batch(torch.randint(self._count, (n,)))

    def split(self, share: float) -> tuple[FrameRange, FrameRange]:
        """The frames recorded first, and the last `share` of all. UserError unless there are both."""
        held = round(share * self._count)
        if not 0 < held < self._count:
            empty = f"fit.heldout={share} of {self._count:,} frames leaves none on one side"
            raise UserError(f"{empty}; collect more frames or change fit.heldout (0: none are held out)")
        return FrameRange(self, 0, self._count - held), FrameRange(self, self._count - held, self._count)

    def _open(self, shard: Mapping[str, Any], verify: bool) -> np.ndarray:
        path = self.folder / shard["name"]
        expected = shard["frames"] * math.prod(self.obs_shape)
        try:
            size = path.stat().st_size
            if size != expected:
                raise UserError(f"{path} is damaged ({size} bytes instead of {expected}): collect the frames anew")
            if verify:
                with open(path, "rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != shard["sha256"]:
                    raise UserError(f"{path} is damaged (its checksum differs from the manifest's): collect the frames anew")
            return np.memmap(path, dtype=np.uint8, mode="r", shape=(shard["frames"], *self.obs_shape))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class FrameRange:
    """The frames `start` up to `stop` of a folder."""

    def __init__(self, frames: FrameData, start: int, stop: int) -> None:
        self.obs_shape = frames.obs_shape
        self._frames, self._start, self._stop = frames, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default generator."""
        return self._frames.batch(torch.randint(self._start, self._stop, (n,)))

    def spread(self, n: int) -> Tensor:
        """uint8 (min(n, len), C, H, W), frames at even distances, the first among them: the same at every call."""
        n = min(n, len(self))
        return self._frames.batch(self._start + torch.arange(n) * len(self) // n)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: write one with job=collect {shlex.quote(f'data={folder}')}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {MANIFEST}: it is no folder of frames, or its collection was killed; run job=collect again"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: collect the frames anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of {FORMAT}: {folder} is no folder of frames")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} is of version {manifest.get('version')}, this program reads version {VERSION}")
    if manifest.get("frames") == 0:
        raise UserError(f"{folder} holds no frames: collect more")
    problem = _problem(manifest)
    if problem:
        raise UserError(f"{path} is damaged ({problem}): collect the frames anew")
    return manifest


def _problem(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a manifest of this format, or None."""
    shape, shards, per_shard = manifest.get("obs_shape"), manifest.get("shards"), manifest.get("frames_per_shard")
    if not (isinstance(shape, list) and len(shape) == 3 and all(_positive(side) for side in shape)):
        return "no observation shape"
    if not (isinstance(shards, list) and isinstance(manifest.get("source"), dict) and _positive(per_shard)):
        return "shards or source are missing"
    for shard in shards:
        if not (isinstance(shard, dict) and isinstance(shard.get("name"), str) and SHARD_NAME.fullmatch(shard["name"])):
            return "a shard has no proper name"
        if not (_positive(shard.get("frames")) and isinstance(shard.get("sha256"), str)):
            return f"{shard['name']} has no number of frames or no checksum"
    counts = [shard["frames"] for shard in shards]
    if any(count != per_shard for count in counts[:-1]) or (counts and counts[-1] > per_shard) or sum(counts) != manifest.get("frames"):
        return "its counts of frames do not agree"
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

"""Recorded play on disk: what `generative.recording` writes, read as frames to fit image models to, or as clips. No pickle anywhere.

A folder holds `manifest.json` and parts, each a stretch of play of N lanes that opens with a reset and ends with a cut. A part is two
files: `clips-00000.zst`, blocks of up to 16 successive pictures of one lane, each block compressed alone (zstd), and
`clips-00000.safetensors`: actions (int16), rewards, discounts (float32) and last (bool), all (T, N), and where the blocks lie:
`block_lanes` int32 (M) and `block_offsets` int64 (M + 1). A lane's pictures are the observation of every step and, after a step that ended
an episode and after a part's last step, the true successor; so picture p of a step is followed by p + 1, its successor.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
import zstandard
from safetensors.numpy import load_file
from torch import Tensor

from envs.api import UserError
from generative.api import Clip

FORMAT, VERSION, MANIFEST = "reverie-clips", 1, "manifest.json"
PART_NAME = re.compile(r"clips-\d{5,}")
PICTURES, STEPS = ".zst", ".safetensors"
BLOCK = 16  # pictures
STEP_DTYPES = {"actions": "int16", "rewards": "float32", "discounts": "float32", "last": "bool"}
BLOCK_DTYPES = {"block_lanes": "int32", "block_offsets": "int64"}


class Part(NamedTuple):
    """A part in memory but for its pictures. Arrays are (T, N); `picture` counts a lane's pictures before that of a step, `opening` is the
    step that opened the episode of each."""

    path: Path
    actions: np.ndarray
    rewards: np.ndarray
    discounts: np.ndarray
    last: np.ndarray
    picture: np.ndarray
    opening: np.ndarray
    content: np.ndarray
    blocks: list[np.ndarray]


class Range(NamedTuple):
    """The steps `start` up to `stop` of all lanes of part number `part`."""

    part: int
    start: int
    stop: int


class ClipData:
    """A folder of clips, its pictures memory-mapped.

    UserError, one line, where the folder is missing or none of clips, where it holds another observation shape than `obs_shape`, and where
    a file is missing, cut short or changed (`verify` reads every byte once, about a second for a gigabyte). With `rest` such a part is
    left out, and said so in `refused`, as long as there is another.

    Attributes:
        obs_shape: (C, H, W).
        num_actions, frames_per_step: of the environment.
        lanes: N.
        source: how it was recorded.
        parts: the manifest's entries of those that are whole.
        refused: a line for each part that is left out.
    """

    def __init__(self, folder: Path | str, obs_shape: tuple[int, int, int] | None = None, verify: bool = True, rest: bool = False) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if not manifest["parts"]:
            raise UserError(f"{self.folder} holds no clips: its collection was stopped before the first part was whole; run it again")
        self.obs_shape: tuple[int, int, int] = tuple(manifest["obs_shape"])
        self.num_actions: int = manifest["num_actions"]
        self.frames_per_step: int = manifest["frames_per_step"]
        self.lanes: int = manifest["lanes"]
        self.source: dict[str, Any] = manifest["source"]
        if obs_shape is not None and tuple(obs_shape) != self.obs_shape:
            raise UserError(
                f"{self.folder} holds frames of shape {self.obs_shape}, but {tuple(obs_shape)} is needed: collect them anew, or change env"
            )
        self.parts: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self._parts: list[Part] = []
        for entry in manifest["parts"]:
            try:
                part = _open(self.folder, entry, self.lanes, self.num_actions, verify)
            except UserError as trouble:
                if not rest:
                    raise
                self.refused.append(f"{trouble}; it is left out")
                continue
            self.parts.append(entry)
            self._parts.append(part)
        if not self._parts:
            raise UserError(f"{self.folder}: none of {len(self.refused)} parts is whole; {self.refused[0]}")
        self.ranges = [Range(index, 0, len(part.last)) for index, part in enumerate(self._parts)]

    @property
    def checksums(self) -> list[str]:
        """One a part."""
        return [f"{part['pictures_sha256']} {part['steps_file_sha256']}" for part in self.parts]

    def __len__(self) -> int:
        """How many observations were acted on."""
        return self.lanes * sum(part.stop - part.start for part in self.ranges)

    def batch(self, indices: Tensor) -> Tensor:
        """int64 (n), each within 0 .. len - 1 -> uint8 (n, C, H, W): the observations that were acted on, lanes of a step side by side."""
        wanted = indices.cpu().numpy()
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"frame indices must lie in 0..{len(self) - 1}")
        ends = np.cumsum([self.lanes * (part.stop - part.start) for part in self.ranges])
        which = np.searchsorted(ends, wanted, side="right")
        steps, lanes = np.divmod(wanted - np.concatenate(([0], ends))[which], self.lanes)
        return self._gather([(*self._place(which[row], lanes[row], steps[row]), 0, 1) for row in range(len(wanted))], 1)[:, 0]

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), drawn with replacement by torch's default generator."""
        return self.batch(torch.randint(len(self), (n,)))

    def spread(self, n: int) -> Tensor:
        """uint8 (min(n, len), C, H, W), frames at even distances, the first among them: the same at every call."""
        n = min(n, len(self))
        return self.batch(torch.arange(n) * len(self) // n)

    def starts(self, steps: int, lead: int = 0) -> int:
        """How many clips there are: one from every step of every lane that has `steps` - `lead` transitions to come in its part."""
        return self.lanes * sum(max(0, part.stop - part.start - (steps - lead) + 1) for part in self.ranges)

    def clips(self, indices: Tensor, steps: int, lead: int = 0) -> Clip:
        """int64 (n), each within 0 .. starts(steps, lead) - 1 -> a Clip of n rows of `steps` transitions.

        The first `lead` of them lead to the step that an index stands for. As far as its episode, or its part, had not begun, the first
        picture stands still, the action is -1, the reward 0 and the discount 1: what simulators are shown where fewer frames are known.
        After a row's first `last`, which the cut at a part's end is too, its last picture stands still and the rest is 0.
        UserError where no part is so long.
        """
        wanted, most = indices.cpu().numpy(), self.starts(steps, lead)
        if most == 0:
            longest = max(part.stop - part.start for part in self.ranges)
            known = f"its parts have {longest} steps a lane"
            raise UserError(f"{self.folder} has no clip of {steps - lead} steps: {known}; collect longer ones")
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= most):
            raise IndexError(f"clip indices must lie in 0..{most - 1}")
        ends = np.cumsum([self.lanes * max(0, part.stop - part.start - (steps - lead) + 1) for part in self.ranges])
        which = np.searchsorted(ends, wanted, side="right")
        first, lanes = np.divmod(wanted - np.concatenate(([0], ends))[which], self.lanes)
        return self._clips([self._place(which[row], lanes[row], first[row]) for row in range(len(wanted))], steps, lead)

    def clips_at(self, part: int, step: int, steps: int, lead: int = 0) -> Clip:
        """A Clip of all lanes at step `step` of a part of the folder, as in `clips`. IndexError where the part is not so long."""
        if not 0 <= step <= len(self._parts[part].last) - (steps - lead):
            raise IndexError(f"part {part} has {len(self._parts[part].last)} steps a lane")
        return self._clips([(part, lane, step) for lane in range(self.lanes)], steps, lead)

    def actions(self, part: int) -> Tensor:
        """int64 (T, N): every action of a part of the folder."""
        return torch.from_numpy(self._parts[part].actions.astype(np.int64))

    def _clips(self, rows: list[tuple[int, int, int]], steps: int, lead: int = 0) -> Clip:
        """Clips from `lead` steps before each (part, lane, step) on."""
        found: dict[str, list[np.ndarray]] = {"actions": [], "rewards": [], "discounts": [], "last": []}
        places = []
        for part, lane, step in rows:
            tensors = self._parts[part]
            start, stop = max(step - lead, int(tensors.opening[step, lane])), step - lead + steps
            still = start - (step - lead)  # transitions before the episode began
            ends_at = np.flatnonzero(tensors.last[start:stop, lane])
            lived = int(ends_at[0]) + 1 if len(ends_at) else stop - start
            for name, values in found.items():
                piece = np.zeros(steps, getattr(tensors, name).dtype)
                piece[still : still + lived] = getattr(tensors, name)[start : start + lived, lane]
                values.append(piece)
            found["actions"][-1][:still], found["discounts"][-1][:still] = -1, 1
            places.append((part, lane, start, still, lived + 1))
        frames = self._gather(places, steps + 1)
        actions, rewards, discounts, last = (torch.from_numpy(np.stack(values)) for values in found.values())
        return Clip(frames, actions.long(), rewards, discounts, last)

    def sample_clips(self, n: int, steps: int, lead: int = 0) -> Clip:
        """A Clip of n rows, drawn with replacement by torch's default generator."""
        return self.clips(torch.randint(max(1, self.starts(steps, lead)), (n,)), steps, lead)

    def spread_clips(self, n: int, steps: int, lead: int = 0) -> Clip:
        """A Clip of min(n, starts) rows that begin at even distances: the same at every call."""
        most = max(1, self.starts(steps, lead))
        return self.clips(torch.arange(min(n, most)) * most // min(n, most), steps, lead)

    def split(self, share: float) -> tuple[ClipData, ClipData]:
        """What was recorded first, and the last `share` of it. UserError unless there are both.

        A clip lies in one of the two as a whole, but for what leads to its first step; and the picture after the last step of the first
        part is the other's first.
        """
        total = sum(part.stop - part.start for part in self.ranges)
        cut = total - round(share * total)
        if not 0 < cut < total:
            empty = f"fit.heldout={share} of {len(self):,} frames leaves none on one side"
            raise UserError(f"{empty}; collect more frames or change fit.heldout (0: none are held out)")
        sides: tuple[list[Range], list[Range]] = ([], [])
        for part, start, stop in self.ranges:
            middle = min(max(start, start + cut), stop)
            cut -= middle - start
            for side, piece in zip(sides, (Range(part, start, middle), Range(part, middle, stop))):
                if piece.stop > piece.start:
                    side.append(piece)
        views = copy.copy(self), copy.copy(self)
        for view, ranges in zip(views, sides):
            view.ranges = ranges
        return views

    def _place(self, which: int, lane: int, step: int) -> tuple[int, int, int]:
        """(part, lane, step) of the step so many after the beginning of a range."""
        part, start, _ = self.ranges[which]
        return part, int(lane), start + int(step)

    def _gather(self, places: list[tuple[int, int, int, int, int]], length: int) -> Tensor:
        """uint8 (n, length, C, H, W): of each (part, lane, step, still, count), `count` pictures from the step's on.

        The first is repeated `still` times before them, the last as often as there is room.
        """
        channels, height, width = self.obs_shape
        frames = np.empty((len(places), length, height, width, channels), np.uint8)

        def fill(row: int) -> None:
            part, lane, step, still, count = places[row]
            first = int(self._parts[part].picture[step, lane])
            for block in range(first // BLOCK, (first + count - 1) // BLOCK + 1):
                pictures, begins = self._block(part, lane, block), block * BLOCK
                here, there = max(first, begins), min(first + count, begins + BLOCK)
                frames[row, still + here - first : still + there - first] = pictures[here - begins : there - begins]
            frames[row, :still] = frames[row, still]
            frames[row, still + count :] = frames[row, still + count - 1]

        if len(places) < 4:
            for row in range(len(places)):
                fill(row)
        else:
            list(self._pool.map(fill, range(len(places))))
        return torch.from_numpy(frames).permute(0, 1, 4, 2, 3)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """Threads that decompress; zstandard lets them run side by side."""
        return ThreadPoolExecutor(torch.get_num_threads())

    def _block(self, part: int, lane: int, block: int) -> np.ndarray:
        """uint8 (pictures, H, W, C)."""
        content, (start, stop) = self._parts[part].content, self._parts[part].blocks[lane][block]
        channels, height, width = self.obs_shape
        pixels = channels * height * width
        pictures = self._parts[part].picture[-1, lane] + 2
        size = min(BLOCK, pictures - block * BLOCK) * pixels
        try:
            packed = content[start:stop].data
            if zstandard.frame_content_size(packed) != size:
                raise zstandard.ZstdError("its size is another")
            return np.frombuffer(zstandard.ZstdDecompressor().decompress(packed), np.uint8).reshape(-1, height, width, channels)
        except zstandard.ZstdError as error:
            raise UserError(f"{self._parts[part].path} is damaged ({error}): collect the clips anew") from error


def _open(folder: Path, entry: Mapping[str, Any], lanes: int, num_actions: int, verify: bool) -> Part:
    """A part that the manifest names. UserError where one of its files is not as it was written."""
    pictures, steps = (folder / (entry["name"] + ending) for ending in (PICTURES, STEPS))
    for path, key in ((pictures, "pictures"), (steps, "steps_file")):
        size, digest = entry[f"{key}_bytes"], entry[f"{key}_sha256"]
        try:
            found = path.stat().st_size
            if found != size:
                raise UserError(f"{path} is damaged ({found} bytes instead of {size}): collect the clips anew")
            if verify:
                with open(path, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                        raise UserError(f"{path} is damaged (its checksum differs from the manifest's): collect the clips anew")
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        arrays = load_file(steps)
        content = np.memmap(pictures, dtype=np.uint8, mode="r")
        return _part(pictures, arrays, content, (entry["steps"], lanes), num_actions)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{steps} is damaged ({' '.join(str(error).split())[:200]}): collect the clips anew") from error


def _part(path: Path, arrays: Mapping[str, np.ndarray], content: np.ndarray, shape: tuple[int, int], num_actions: int) -> Part:
    """ValueError or KeyError where arrays do not fit one another."""
    for name, dtype in (STEP_DTYPES | BLOCK_DTYPES).items():
        if arrays[name].dtype != dtype or (name in STEP_DTYPES and arrays[name].shape != shape):
            raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
    actions, last, offsets, of_lane = arrays["actions"], arrays["last"].copy(), arrays["block_offsets"], arrays["block_lanes"]
    if actions.min() < 0 or actions.max() >= num_actions:
        raise ValueError(f"actions lie beyond 0..{num_actions - 1}")
    last[-1] = True
    picture = np.arange(shape[0])[:, None] + np.cumsum(last, axis=0) - last
    opens = np.concatenate((np.ones((1, shape[1]), bool), last[:-1]))
    opening = np.maximum.accumulate(np.where(opens, np.arange(shape[0])[:, None], 0), axis=0)
    if offsets.shape != (len(of_lane) + 1,) or offsets[0] != 0 or offsets[-1] != len(content) or (np.diff(offsets) <= 0).any():
        raise ValueError("its blocks do not lie one after another")
    spans = np.stack((offsets[:-1], offsets[1:]), 1)
    blocks = [spans[of_lane == lane] for lane in range(shape[1])]
    if [len(found) for found in blocks] != [math.ceil((count + 2) / BLOCK) for count in picture[-1]] or sum(map(len, blocks)) != len(spans):
        raise ValueError("its blocks are not as many as its pictures need")
    return Part(path, actions, arrays["rewards"], arrays["discounts"], last, picture, opening, content, blocks)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of clips. UserError, one line, where there is none or it is damaged."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: write one with job=collect {shlex.quote(f'data={folder}')}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no {MANIFEST}: it is no folder of clips, or its collection was killed early; run job=collect again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: collect the clips anew") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not a manifest of {FORMAT}: {folder} is no folder of clips; write one with job=collect")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} is of version {manifest.get('version')}, this program reads version {VERSION}")
    for problem in _problems(manifest):
        raise UserError(f"{path} is damaged ({problem}): collect the clips anew")
    return manifest


def _problems(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a manifest of this format."""
    shape, parts = manifest.get("obs_shape"), manifest.get("parts")
    if not (isinstance(shape, list) and len(shape) == 3 and all(_positive(side) for side in shape)):
        yield "no observation shape"
    for key in ("num_actions", "frames_per_step", "lanes"):
        if not _positive(manifest.get(key)):
            yield f"{key} is no positive number"
    if not (isinstance(parts, list) and isinstance(manifest.get("source"), dict)):
        yield "parts or source are missing"
        return
    for part in parts:
        if not (isinstance(part, dict) and isinstance(part.get("name"), str) and PART_NAME.fullmatch(part["name"])):
            yield "a part has no proper name"
        elif not all(_positive(part.get(key)) for key in ("steps", "pictures_bytes", "steps_file_bytes")):
            yield f"{part['name']} has no number of steps or bytes"
        elif not all(isinstance(part.get(key), str) for key in ("pictures_sha256", "steps_file_sha256")):
            yield f"{part['name']} has no checksums"


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0

"""Records play to a folder of clips (see `generative.clips`), in constant memory, part by part."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import zstandard
from safetensors.numpy import save
from torch import Tensor

from envs.api import Spec, Step, UserError
from generative.clips import BLOCK, FORMAT, MANIFEST, PART_NAME, PICTURES, STEPS, VERSION, read_manifest

LEVEL = 1  # of zstd; raw pictures of five Atari games became 23 to 840 times smaller, at 17,000 of 210x160 a second and more


class ClipWriter:
    """Appends steps of N lanes to a folder. Only whole parts count, for which `end_part` writes the manifest anew.

    What a kill cuts off is forgotten. A folder that holds parts of the same environment, lanes and source is gone on with.

    Pictures are compressed by a thread of their own while the next step is played; two blocks a lane wait at most.

    Args:
        folder: made where missing. UserError where it holds clips recorded otherwise, unless `overwrite`, or cannot be written.
        spec: of the environment.
        num_envs: N.
        source: how it is recorded (environment, agent, protocol, seed, ...); JSON values, kept in the manifest.
        overwrite: forget the clips that the folder holds.
    """

    def __init__(self, folder: Path | str, spec: Spec, num_envs: int, source: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder = Path(folder)
        channels, height, width = spec.obs_shape
        self._picture_shape, self.lanes = (height, width, channels), num_envs
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "obs_shape": [channels, height, width],
            "num_actions": spec.num_actions,
            "frames_per_step": spec.frames_per_step,
            "lanes": num_envs,
            "source": json.loads(json.dumps(dict(source))),
            "parts": [],
        }
        if not overwrite and (self.folder / MANIFEST).exists():
            self._manifest["parts"] = self._go_on(read_manifest(self.folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.parts:
                (self.folder / MANIFEST).unlink(missing_ok=True)
            known = {part["name"] for part in self.parts}
            for path in self.folder.iterdir():
                if path.suffix in (PICTURES, STEPS) and PART_NAME.fullmatch(path.stem) and path.stem not in known:
                    path.unlink()
        except OSError as error:
            raise self._cannot_write(error) from error
        self._worker = ThreadPoolExecutor(1)
        self._part: _Part | None = None

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The manifest's entries of whole parts."""
        parts: list[dict[str, Any]] = self._manifest["parts"]
        return parts

    @property
    def source(self) -> dict[str, Any]:
        """How it is recorded, as the manifest says it."""
        source: dict[str, Any] = self._manifest["source"]
        return source

    def append(self, step: Step, action: Tensor, after: Step) -> None:
        """One step of all lanes, action int64 (N): what was acted on, and what came of it. UserError where it cannot be written."""
        assert tuple(step.obs.shape[1:]) == tuple(self._manifest["obs_shape"]), f"observations are {tuple(step.obs.shape)}"
        try:
            if self._part is None:
                name = f"clips-{len(self.parts):05d}"
                self._part = _Part(self.folder / (name + PICTURES), self.lanes, self._picture_shape, self._worker)
            self._part.append(step, action, after)
        except OSError as error:
            self._forget_part()
            raise self._cannot_write(error) from error

    def end_part(self, facts: Mapping[str, Any] | None = None) -> None:
        """Cuts all lanes here, and writes the manifest beside, then renames it. `facts`, JSON values, join the part's entry."""
        assert self._part is not None, "nothing was appended"
        part = self._part
        try:
            entry = {"name": part.path.stem, **part.finish(), **(facts or {})}
            manifest = {**self._manifest, "parts": [*self.parts, entry]}
            beside = self.folder / (MANIFEST + ".new")
            with open(beside, "w", encoding="utf-8") as file:
                json.dump(manifest, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.folder / MANIFEST)
        except OSError as error:
            self._forget_part()
            raise self._cannot_write(error) from error
        self._manifest, self._part = manifest, None

    def close(self) -> None:
        """Forgets a part that was not ended. Twice is harmless."""
        self._forget_part()
        self._worker.shutdown()

    def __enter__(self) -> ClipWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _go_on(self, found: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The parts that the folder holds. UserError, which names what differs, where they were recorded otherwise."""
        pairs = [(key, found.get(key), mine) for key, mine in self._manifest.items() if key not in ("parts", "source")]
        theirs, ours = found["source"], self._manifest["source"]
        pairs += [(key, theirs.get(key), ours.get(key)) for key in sorted({*theirs, *ours})]
        for key, old, new in pairs:
            if old != new:
                other = f"{key} was {_shown(old)} and is {_shown(new)} now"
                raise UserError(f"{self.folder} already holds clips recorded otherwise ({other}): choose another folder or remove this one")
        parts: list[dict[str, Any]] = list(found["parts"])
        return parts

    def _forget_part(self) -> None:
        if self._part is not None:
            part, self._part = self._part, None
            part.drop()

    def _cannot_write(self, error: OSError) -> UserError:
        return UserError(f"cannot write clips to {self.folder}: {error.strerror or error}")


class _Part:
    """A part that is being written."""

    def __init__(self, path: Path, lanes: int, picture_shape: tuple[int, int, int], worker: ThreadPoolExecutor) -> None:
        self.path = path
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._hash, self._compressor = hashlib.sha256(), zstandard.ZstdCompressor(level=LEVEL)
        self._worker, self._pending, self._most = worker, deque[Future[int]](), 2 * lanes
        self._block_shape = (BLOCK, *picture_shape)
        self._open = [np.empty(self._block_shape, np.uint8) for _ in range(lanes)]
        self._filled = [0] * lanes
        self._block_lanes: list[int] = []
        self._offsets = [0]
        self._steps: dict[str, list[np.ndarray]] = {"actions": [], "rewards": [], "discounts": [], "last": []}
        self._after: Step | None = None

    def append(self, step: Step, action: Tensor, after: Step) -> None:
        lanes = range(len(self._open))
        self._put(lanes, step.obs)
        last = after.last.cpu().numpy()
        if last.any():
            self._put(np.flatnonzero(last), after.next_obs)
        found = action.cpu().numpy().astype(np.int16), after.reward.cpu().numpy(), after.discount.cpu().numpy(), last
        for values, value in zip(self._steps.values(), found):
            values.append(value.copy())
        self._after = after

    def finish(self) -> dict[str, Any]:
        """Ends both files, and tells their sizes and checksums."""
        assert self._after is not None
        self._put(np.flatnonzero(~self._steps["last"][-1]), self._after.next_obs)
        for lane, filled in enumerate(self._filled):
            if filled:
                self._flush(lane)
        while self._pending:
            self._settle()
        with self._file:
            os.fsync(self._file.fileno())
        arrays = {name: np.stack(values) for name, values in self._steps.items()}
        arrays |= {"block_lanes": np.array(self._block_lanes, np.int32), "block_offsets": np.array(self._offsets, np.int64)}
        content = save(arrays)
        with open(self.path.with_suffix(STEPS), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return {
            "steps": len(arrays["last"]),
            "pictures_bytes": self._offsets[-1],
            "pictures_sha256": self._hash.hexdigest(),
            "steps_file_bytes": len(content),
            "steps_file_sha256": hashlib.sha256(content).hexdigest(),
        }

    def drop(self) -> None:
        """Removes what was written."""
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            with suppress(BaseException):
                future.result()
        with suppress(OSError):
            self._file.close()
        for path in (self.path, self.path.with_suffix(STEPS)):
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def _put(self, lanes: Any, obs: Tensor) -> None:
        pictures = obs.permute(0, 2, 3, 1).cpu().numpy()
        for lane in lanes:
            self._open[lane][self._filled[lane]] = pictures[lane]
            self._filled[lane] += 1
            if self._filled[lane] == BLOCK:
                self._flush(lane)

    def _flush(self, lane: int) -> None:
        block, self._open[lane] = self._open[lane][: self._filled[lane]], np.empty(self._block_shape, np.uint8)
        self._filled[lane] = 0
        self._block_lanes.append(lane)
        while len(self._pending) >= self._most or (self._pending and self._pending[0].done()):
            self._settle()
        self._pending.append(self._worker.submit(self._write, block))

    def _settle(self) -> None:
        self._offsets.append(self._offsets[-1] + self._pending.popleft().result())

    def _write(self, block: np.ndarray) -> int:
        packed = self._compressor.compress(block.data.cast("B"))
        self._hash.update(packed)
        left = memoryview(packed)
        while left:
            left = left[self._file.write(left) :]
        return len(packed)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

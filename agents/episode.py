"""Open episodes: what N lanes have lived through since their episodes began."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_STEPS = 256


class OpenEpisodes:
    """Transitions of N lanes, appended one step at a time and taken out lane by lane when an episode ends.

    Buffers live on the device of what is appended and double in length when an episode outgrows them. Nothing here
    outlives an iteration: its last step ends every lane.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._lengths: list[int] = []
        self._position = torch.zeros(0, dtype=torch.int64)

    def append(self, **fields: Tensor) -> None:
        """Adds one step of every lane. Each field is (N, ...), the same N, shapes and dtypes at each call."""
        lanes = next(iter(fields.values())).shape[0]
        if lanes != len(self._lengths):
            self._begin(lanes, fields)
        longest = max(self._lengths)
        if longest == next(iter(self._buffers.values())).shape[1]:
            self._buffers = {name: torch.cat([old, torch.empty_like(old)], dim=1) for name, old in self._buffers.items()}
        lane = torch.arange(lanes, device=self._position.device)
        for name, field in fields.items():
            self._buffers[name][lane, self._position] = field
        self._position += 1
        self._lengths = [length + 1 for length in self._lengths]

    def take(self, lane: int) -> dict[str, Tensor]:
        """The steps of `lane`, each field (T, ...), oldest first; the lane is empty afterwards."""
        steps = {name: buffer[lane, : self._lengths[lane]].clone() for name, buffer in self._buffers.items()}
        self.drop(lane)
        return steps

    def drop(self, lane: int) -> None:
        """Forgets the steps of `lane`."""
        self._lengths[lane] = 0
        self._position[lane] = 0

    def _begin(self, lanes: int, fields: dict[str, Tensor]) -> None:
        if any(self._lengths):
            raise ValueError(f"{lanes} lanes appended while {len(self._lengths)} lanes hold open episodes")
        self._lengths = [0] * lanes
        device = next(iter(fields.values())).device
        self._position = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._buffers = {
            name: torch.empty(lanes, FIRST_STEPS, *field.shape[1:], dtype=field.dtype, device=device) for name, field in fields.items()
        }

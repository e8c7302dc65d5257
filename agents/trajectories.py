"""What was played of late, kept to draw clips from: a ring of pictures and steps for each lane."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.reserve import reserve
from envs.api import UserError
from generative.api import Clip

SUCCESSOR = -1  # the age of a slot that holds no step
LEAST = 64  # slots of a lane
STEP_DTYPES = {"actions": torch.int16, "rewards": torch.float32, "discounts": torch.float32, "last": torch.bool}


class Trajectories:
    """A ClipSource of what was played: clips as `generative.clips.ClipData` makes them, from a memory that forgets the oldest.

    A slot of a lane's ring holds a picture and the step that was taken on it; where a trace was cut, the true successor takes a slot too,
    from which no clip begins. So a slot's successor always lies in the next one. Everything lies in the host's memory, whose pages are
    taken when they are first written. Which slots begin a clip is known without looking at the device.

    Args:
        capacity: slots of all lanes together, the same number for each lane.
        obs_shape: (C, H, W) of a picture.
    """

    def __init__(self, capacity: int, obs_shape: tuple[int, int, int]) -> None:
        if capacity < 1:
            raise UserError(f"agent.capacity must be at least 1, got {capacity}")
        self.capacity, self.obs_shape = capacity, obs_shape
        self.lanes = self.ring = 0  # until the first append tells how many lanes there are
        self._found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}  # by steps and lead, until the next append

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of a slot: a picture, its step, and how old its episode was."""
        channels, height, width = self.obs_shape
        return channels * height * width + sum(dtype.itemsize for dtype in STEP_DTYPES.values()) + 8

    def required_bytes(self, steps: int) -> int:
        """An upper bound of the bytes in use after `steps` steps of all lanes together, each of which may take two slots."""
        return min(self.capacity, 2 * steps) * self.bytes_per_slot

    def __len__(self) -> int:
        """Steps that are held."""
        return self.starts(0)

    def append(self, obs: Tensor, action: Tensor, reward: Tensor, discount: Tensor, last: Tensor | None, next_obs: Tensor) -> None:
        """Takes in one step of every lane.

        Args:
            obs: uint8 (N, C, H, W), what was acted on.
            action: int64 (N).
            reward: float32 (N).
            discount: float32 (N).
            last: bool (N), or None where no lane ended.
            next_obs: uint8 (N, C, H, W), the true successor.
        """
        if not self.lanes:
            self._open(len(action))
        assert len(action) == self.lanes, f"{self.lanes} lanes are kept, {len(action)} came"
        lanes, ended = np.arange(self.lanes), np.zeros(0, np.int64) if last is None else last.cpu().numpy().nonzero()[0]
        places = self._places(lanes, self._written)
        self._frames.index_copy_(0, torch.from_numpy(places), obs.cpu())
        step = {"actions": action, "rewards": reward, "discounts": discount, "last": torch.zeros_like(action) if last is None else last}
        for name, field in self._fields.items():
            field.index_copy_(0, torch.from_numpy(places), step[name].cpu().to(field.dtype))
        self._ages[places] = self._age
        self._written += 1
        self._age += 1
        if ended.size:
            places = self._places(ended, self._written[ended])
            self._frames.index_copy_(0, torch.from_numpy(places), next_obs.cpu()[torch.from_numpy(ended)])
            for field in self._fields.values():  # so that what is saved holds nothing by chance
                field.index_fill_(0, torch.from_numpy(places), 0)
            self._ages[places] = SUCCESSOR
            self._written[ended] += 1
            self._age[ended], self._cut[ended] = 0, self._written[ended]
        self._found = {}

    def starts(self, steps: int, lead: int = 0) -> int:
        """How many clips of `steps` transitions, `lead` of them before the step that an index stands for, there are.

        One for every step that is held, with its lead as far as its episode had begun, and that has either `steps` - `lead` transitions to
        come or an end before.
        """
        return len(self._slots(steps, lead)[0]) if self.lanes else 0

    def clips(self, indices: Tensor, steps: int, lead: int = 0) -> Clip:
        """int64 (n), each within 0 .. starts(steps, lead) - 1 -> a Clip of n rows of `steps` transitions, as `ClipData.clips` makes it."""
        lanes, numbers = self._slots(steps, lead)
        return self._clips(lanes[indices.numpy()], numbers[indices.numpy()], steps, lead)

    def contexts(self, n: int, length: int, opening: bool = False, generator: torch.Generator | None = None) -> tuple[Clip, Tensor]:
        """What n steps were decided on, drawn with replacement: (a Clip of `length` pictures, int64 (n) how many of them are known).

        Pictures from before the episode began are its first one, repeated. With `opening` only that one is known: of the steps that opened
        an episode, as long as one is held.
        """
        lanes, numbers = self._slots(length - 1, length - 1)
        assert len(lanes), "nothing is held"
        ages = self._ages[self._places(lanes, numbers)]
        if opening and (ages == 0).any():
            lanes, numbers, ages = (part[ages == 0] for part in (lanes, numbers, ages))
        drawn = torch.randint(len(lanes), (n,), generator=generator).numpy()
        known = np.minimum(ages[drawn] + 1, length)
        return self._clips(lanes[drawn], numbers[drawn], length - 1, length - 1), torch.from_numpy(known)

    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W), pictures that were acted on, drawn with replacement by torch's default generator."""
        return self._pictures(torch.randint(len(self), (n,)).numpy())

    def spread(self, n: int) -> Tensor:
        """uint8 (min(n, len), C, H, W), pictures that were acted on, at even distances."""
        n = min(n, len(self))
        return self._pictures(np.arange(n) * len(self) // n)

    def _pictures(self, indices: np.ndarray) -> Tensor:
        lanes, numbers = self._slots(0, 0)
        return self._frames[torch.from_numpy(self._places(lanes[indices], numbers[indices]))]

    def _open(self, lanes: int) -> None:
        """Takes the memory, once it is known for how many lanes."""
        self.lanes, self.ring = lanes, self.capacity // lanes
        if self.ring < LEAST:
            raise UserError(f"agent.capacity must be at least {LEAST * lanes} for {lanes} environments, got {self.capacity}")
        slots = lanes * self.ring
        self._frames = reserve((slots, *self.obs_shape), torch.uint8)
        self._fields = {name: reserve((slots,), dtype) for name, dtype in STEP_DTYPES.items()}
        self._ages = reserve((slots,), torch.int64).numpy()  # steps since the episode opened, or SUCCESSOR
        self._written = np.zeros(lanes, np.int64)  # slots since the beginning: a slot's number, its place is that modulo the ring
        self._age = np.zeros(lanes, np.int64)  # of the step to come
        self._cut = np.zeros(lanes, np.int64)  # slots written when the lane's trace was last cut
        self._found = {}

    def _places(self, lanes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        return lanes * self.ring + numbers % self.ring

    def _slots(self, steps: int, lead: int) -> tuple[np.ndarray, np.ndarray]:
        """(lane, number) int64 (n) of the slots that clips of this shape stand for, lane by lane, oldest first."""
        if (steps, lead) not in self._found:
            lanes, numbers = [], []
            for lane in range(self.lanes):
                written = self._written[lane]
                oldest = max(0, written - self.ring)
                number = np.arange(oldest, written)
                age = self._ages[lane * self.ring + number % self.ring]
                whole = (number + steps - lead < written) | (number < self._cut[lane])
                number = number[(age >= 0) & whole & (number - np.minimum(age, lead) >= oldest)]
                lanes.append(np.full(len(number), lane))
                numbers.append(number)
            empty = np.zeros(0, np.int64)
            self._found[steps, lead] = np.concatenate([empty, *lanes]), np.concatenate([empty, *numbers])
        return self._found[steps, lead]

    def _clips(self, lanes: np.ndarray, numbers: np.ndarray, steps: int, lead: int) -> Clip:
        """Clips from `lead` steps before each slot on."""
        known = np.minimum(self._ages[self._places(lanes, numbers)], lead)[:, None]
        first, still, steps_in = numbers[:, None] - known, lead - known, np.arange(steps)
        places = torch.from_numpy(self._places(lanes[:, None], first + np.maximum(steps_in - still, 0)))
        begun = torch.from_numpy(steps_in >= still)
        last = self._fields["last"][places] & begun
        lived = begun & (last.cumsum(1) - last.long() == 0)
        values = {name: torch.where(lived, field[places], 0) for name, field in self._fields.items()}
        actions = torch.where(begun, values["actions"].long(), -1)
        discounts = torch.where(begun, values["discounts"], 1.0)
        shown = np.clip(np.arange(steps + 1) - still, 0, lived.sum(1, keepdim=True).numpy())
        frames = self._frames[torch.from_numpy(self._places(lanes[:, None], first + shown))]
        return Clip(frames, actions, values["rewards"], discounts, lived & last)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that have been written."""
        return int(np.minimum(self._written, self.ring).sum()) * self.bytes_per_slot if self.lanes else 0

    def state_dict(self) -> dict[str, Any]:
        """What has been written, lane by lane, as views: a picture keeps its place until it is overwritten."""
        state: dict[str, Any] = {"shape": self._shape(), "lanes": {}}
        for lane in range(self.lanes):
            used, start = min(int(self._written[lane]), self.ring), lane * self.ring
            tensors = {"frames": self._frames, "ages": torch.from_numpy(self._ages), **self._fields}
            counts = {name: int(count[lane]) for name, count in self._counts().items()}
            state["lanes"][str(lane)] = {name: tensor[start : start + used] for name, tensor in tensors.items()} | counts
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Takes each lane out of `state` once it is copied, so that a large memory is not held twice.

        UserError where it was saved with other knobs.
        """
        if state["shape"] != self._shape():
            raise UserError(f"the saved trajectories have {state['shape']}, these {self._shape()}")
        if not state["lanes"]:
            return
        self._open(len(state["lanes"]))
        for lane in range(self.lanes):
            saved, start = state["lanes"].pop(str(lane)), lane * self.ring
            used = len(saved["ages"])
            for name, tensor in {"frames": self._frames, "ages": torch.from_numpy(self._ages), **self._fields}.items():
                tensor[start : start + used] = saved[name]
            for name, count in self._counts().items():
                count[lane] = saved[name]

    def _shape(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "obs_shape": list(self.obs_shape)}

    def _counts(self) -> dict[str, np.ndarray]:
        return {"written": self._written, "age": self._age, "cut": self._cut}

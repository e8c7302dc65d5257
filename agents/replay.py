"""Experience replay (Lin 1992; Mnih et al. 2015): every frame is kept once, and stacks, returns and targets are made from what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents.reserve import reserve
from agents.returns import returns
from envs.api import UserError

GPU_SHARE = 0.8  # of what is free on a GPU; what networks, their gradients and kernels need is left


class Batch(NamedTuple):
    """B transitions of n steps each (fewer where a trace was cut before), on the learner's device.

    Attributes:
        frames: uint8 (B, K, C, H, W), the stack that was acted on, oldest first.
        action: int64 (B).
        reward: float32 (B), r_0 + gamma d_0 r_1 + ... + (gamma^(n-1) d_0 ... d_(n-2)) r_(n-1), d the environment's discounts.
        discount: float32 (B), gamma^n d_0 ... d_(n-1): the weight of the value of `next_frames`.
        next_frames: uint8 (B, K, C, H, W), the stack n steps later, or at the true successor where the trace was cut.
        whole_return: float32 (B), the return to the episode's end; empty unless whole returns are kept.
    """

    frames: Tensor
    action: Tensor
    reward: Tensor
    discount: Tensor
    next_frames: Tensor
    whole_return: Tensor


class Closing(NamedTuple):
    """Traces of whole returns that are to be closed: of `lane`, the steps `first` up to `filled` are closed by what is known up to `end`.

    All int64 (M), counted in slots that the lane has written. `end` is the slot of the state to bootstrap from.
    """

    lane: np.ndarray
    first: np.ndarray
    filled: np.ndarray
    end: np.ndarray


class Replay:
    """A ring of slots for each lane. A slot holds a frame and what was done on it.

    Where a trace is cut the true successor takes a slot too, one that is never sampled as a start. Targets are filled in place: when a
    reward comes, it is added to the n slots that it belongs to, and a slot may be sampled once the frame n steps later is there or its
    trace is cut. A slot whose stack has lost a frame to the ring's turning is given up. Sampling is uniform over what may be sampled.

    With `whole_returns` a slot may be sampled once the return of its whole episode is known. Where the episode is cut with discount 1 (a
    time limit, an iteration's end) the value of the successor closes it. So it is where an episode fills half of its lane's ring: then the
    older half of its slots is closed by the rewards known so far and the value of the state reached. So an episode longer than the ring
    is learned from too, and half of a full ring may always be sampled. `append` says what is to be closed, `close` takes the values.

    Which slots hold what is known on the host, in numpy; frames and numbers lie in `memory_device`. The host waits for the learner's device
    only where a lane ended.

    Args:
        capacity: slots of all lanes together, the same number for each lane.
        obs_shape: (C, H, W) of a frame.
        num_actions: at most 256.
        stack_frames: K.
        n_steps: n, at most 255.
        gamma: the agent's discount for one step.
        whole_returns: whether returns of whole episodes are kept.
        device: of the batches.
        knob: what refusals call the capacity.
    """

    def __init__(
        self,
        capacity: int,
        obs_shape: tuple[int, int, int],
        num_actions: int,
        stack_frames: int,
        n_steps: int,
        gamma: float,
        whole_returns: bool,
        device: torch.device,
        knob: str = "agent.capacity",
    ) -> None:
        if not 1 <= n_steps <= 255:
            raise UserError(f"agent.n_steps must be 1 to 255, got {n_steps}")
        if not 1 <= stack_frames <= 255:
            raise UserError(f"agent.stack_frames must be 1 to 255, got {stack_frames}")
        if num_actions > 256:
            raise UserError(f"the replay holds up to 256 actions, got {num_actions}")
        if capacity < self._least(n_steps, stack_frames):
            raise UserError(f"{knob} must be at least {self._least(n_steps, stack_frames)} for each environment, got {capacity}")
        self.capacity, self.obs_shape, self.stack_frames, self.n_steps, self.gamma = capacity, obs_shape, stack_frames, n_steps, gamma
        self.whole_returns, self.device, self._knob = whole_returns, device, knob
        self.lanes = self.ring = 0  # until the first append tells how many lanes there are
        self.memory_device = device
        if device.type == "cuda" and self.capacity * self.bytes_per_slot > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            self.memory_device = torch.device("cpu")

    @staticmethod
    def _least(n_steps: int, stack_frames: int) -> int:
        return 4 * (n_steps + stack_frames + 2)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of a slot: a frame, and some twenty beside it."""
        channels, height, width = self.obs_shape
        return channels * height * width + sum(dtype.itemsize for dtype in self._dtypes().values()) + 1 + 1 + 8

    def _dtypes(self) -> dict[str, torch.dtype]:
        """What a slot holds beside its frame. `reward` and `discount` are those of Batch, being filled; `whole_return` is the step's own
        reward and `step_discount` its own discount until the episode is closed."""
        dtypes = {"action": torch.uint8, "reward": torch.float32, "discount": torch.float32}
        if self.whole_returns:
            dtypes |= {"whole_return": torch.float32, "step_discount": torch.float32}
        return dtypes

    def required_bytes(self, steps: int) -> int:
        """An upper bound of the bytes in use after `steps` agent steps of all lanes together, each of which may take two slots.

        Pages of the host's memory are taken when they are first written; a GPU's memory is taken at once.
        """
        slots = self.capacity if self.memory_device.type == "cuda" else min(self.capacity, 2 * steps)
        return slots * self.bytes_per_slot + self.obs_shape[0] * self.obs_shape[1] * self.obs_shape[2] if steps else 0

    def _open(self, lanes: int) -> None:
        """Takes the memory, once it is known for how many lanes."""
        self.lanes, self.ring = lanes, self.capacity // lanes
        if self.ring < self._least(self.n_steps, self.stack_frames):
            least = lanes * self._least(self.n_steps, self.stack_frames)
            raise UserError(f"{self._knob} must be at least {least} for {lanes} environments, got {self.capacity}")
        slots = lanes * self.ring
        self._frames = self._take((slots + 1, *self.obs_shape), torch.uint8)  # the last one is blank: it stands for "before"
        self._fields = {name: self._take((slots,), dtype) for name, dtype in self._dtypes().items()}
        per_lane = (lanes, self.ring)
        self._ages = reserve(per_lane, torch.uint8).numpy()  # frames of the episode before this one, K - 1 at most
        self._spans = reserve(per_lane, torch.uint8).numpy()  # steps to the state that the target bootstraps from
        self._ready = reserve(per_lane, torch.int64).numpy()  # a queue for each lane of the steps that may be sampled, oldest first
        self._first = np.zeros(lanes, np.int64)  # of the queue
        self._past = np.zeros(lanes, np.int64)  # the queue's last, plus one
        self._written = np.zeros(lanes, np.int64)  # slots written since the beginning; the slot is this modulo the ring
        self._trace = np.zeros(lanes, np.int64)  # where the open trace begins, in slots written
        self._unclosed = np.zeros(lanes, np.int64)  # where the steps without a whole return begin
        self._age = np.zeros(lanes, np.int64)  # frames of the open episode so far
        self._lane = np.arange(lanes)
        self._due: Closing | None = None

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros where frames and numbers lie."""
        if self.memory_device.type == "cpu":
            return reserve(shape, dtype, self._knob)
        return torch.zeros(shape, dtype=dtype, device=self.memory_device)

    def __len__(self) -> int:
        """Slots that may be sampled."""
        return int((self._past - self._first).sum()) if self.lanes else 0

    def append(
        self, obs: Tensor, action: Tensor, reward: Tensor, discount: Tensor, last: Tensor | None, next_obs: Tensor
    ) -> Closing | None:
        """Takes in one step of every lane.

        Args:
            obs: uint8 (N, C, H, W), what was acted on.
            action: int64 (N).
            reward: float32 (N), as it is to be learned from.
            discount: float32 (N).
            last: bool (N), or None where no lane ended, which spares the wait for the device.
            next_obs: uint8 (N, C, H, W), the true successor; read where a lane ended.

        Returns:
            With whole returns, what `close` is to be called with before the next call; else None.
        """
        if not self.lanes:
            self._open(action.shape[0])
        if action.shape[0] != self.lanes:
            raise ValueError(f"the replay holds {self.lanes} lanes, {action.shape[0]} came")
        assert self._due is None, "close comes before the next append"
        ended = np.zeros(0, np.int64) if last is None else last.cpu().numpy().nonzero()[0]
        self._give_up(ended)
        now, slots = self._written, self._flat(self._lane, self._written)
        self._put(slots, obs, action, reward)
        self._ages[self._lane, now % self.ring] = np.minimum(self._age, self.stack_frames - 1)
        self._spans[self._lane, now % self.ring] = self.n_steps
        self._fill(slots, reward, discount)
        if not self.whole_returns:
            lived = now - self.n_steps >= self._trace  # of these lanes the slot n steps ago has its bootstrap's frame now
            self._push(self._lane[lived], now[lived] - self.n_steps)
        self._written, self._age = now + 1, self._age + 1
        if ended.size:
            self._cut(ended, next_obs)
        return self._closing(ended) if self.whole_returns else None

    def _give_up(self, ended: np.ndarray) -> None:
        """Takes those from the heads of the queues whose stacks begin in slots that are about to be overwritten."""
        held = self._written + 1 - self.ring
        held[ended] += 1
        if held.max() <= 0:
            return
        heads = self._first[:, None] + np.arange(2 * self.stack_frames)  # two slots at most go, and no more begin in them
        steps = self._ready[self._lane[:, None], heads % self.ring]
        begins = steps - self._ages[self._lane[:, None], steps % self.ring]
        gone = (heads < self._past[:, None]) & (begins < held[:, None])
        self._first += gone.sum(1)

    def _put(self, slots: np.ndarray, obs: Tensor, action: Tensor, reward: Tensor) -> None:
        places = self._to_memory(torch.from_numpy(slots))
        self._frames.index_copy_(0, places, self._to_memory(obs))
        self._fields["action"].index_copy_(0, places, self._to_memory(action).to(torch.uint8))
        if self.whole_returns:
            self._fields["whole_return"].index_copy_(0, places, self._to_memory(reward))

    def _fill(self, slots: np.ndarray, reward: Tensor, discount: Tensor) -> None:
        """Adds the step to the targets of the n slots up to it that belong to its trace, and makes the slot's own."""
        places = self._to_memory(torch.from_numpy(slots))
        reward, discount = self._to_memory(reward), self._to_memory(discount)
        through, targets, weights = self.gamma * discount, self._fields["reward"], self._fields["discount"]
        targets.index_copy_(0, places, reward)
        weights.index_copy_(0, places, through)
        if self.whole_returns:
            self._fields["step_discount"].index_copy_(0, places, discount)
        if self.n_steps == 1:
            return
        earlier = self._written[:, None] - np.arange(1, self.n_steps)
        lane, back = (earlier >= self._trace[:, None]).nonzero()
        if lane.size:
            places = self._to_memory(torch.from_numpy(self._flat(lane, earlier[lane, back])))
            lanes = self._to_memory(torch.from_numpy(lane))
            weight = weights[places]
            targets[places] += weight * reward[lanes]
            weights[places] = weight * through[lanes]

    def _cut(self, ended: np.ndarray, next_obs: Tensor) -> None:
        """Gives the successors of the lanes that ended a slot, and closes their open n steps there."""
        successor = self._written[ended]
        lanes = self._to_memory(torch.from_numpy(ended))
        places = self._to_memory(torch.from_numpy(self._flat(ended, successor)))
        self._frames.index_copy_(0, places, self._to_memory(next_obs)[lanes])
        for field in self._fields.values():  # so that what is saved holds nothing by chance
            field.index_fill_(0, places, 0)
        self._ages[ended, successor % self.ring] = np.minimum(self._age[ended], self.stack_frames - 1)
        self._spans[ended, successor % self.ring] = 0
        open_from = np.maximum(self._trace[ended], successor - self.n_steps)
        for lane, first, end in zip(ended, open_from, successor):
            steps = np.arange(first, end)
            self._spans[lane, steps % self.ring] = end - steps
            if not self.whole_returns:
                self._push(lane, steps)
        self._written[ended] += 1
        self._trace[ended], self._age[ended] = self._written[ended], 0

    def _push(self, lane: Any, steps: np.ndarray) -> None:
        """Allows `steps` (M) to be sampled: one of each of the lanes (M), or all of the one lane."""
        if isinstance(lane, np.ndarray):
            self._ready[lane, self._past[lane] % self.ring] = steps
            self._past[lane] += 1
        else:
            self._ready[lane, (self._past[lane] + np.arange(steps.size)) % self.ring] = steps
            self._past[lane] += steps.size

    def _closing(self, ended: np.ndarray) -> Closing | None:
        """The traces that have ended, to be closed whole, and those that fill half a ring, of which the older half is to be closed."""
        end = self._written - 1  # the successor where a lane ended, elsewhere the state of the last step
        full = end - self._unclosed >= self.ring // 2
        full[ended] = False
        long = full.nonzero()[0]
        if not ended.size and not long.size:
            return None
        lane = np.concatenate([ended, long])
        filled = np.concatenate([end[ended], (self._unclosed[long] + end[long]) // 2])
        self._due = Closing(lane, self._unclosed[lane], filled, end[lane])
        return self._due

    def stacks(self, closing: Closing) -> Tensor:
        """uint8 (M, K, C, H, W), the states that the traces are to be closed from."""
        return self._gather(self._stack(closing.lane, closing.end))

    def close(self, values: Tensor) -> None:
        """Fills in whole returns: G_t = r_t + gamma d_t G_(t+1), and allows their slots to be sampled.

        Args:
            values: float (M), of `stacks` of what `append` returned.
        """
        assert self._due is not None, "close comes after an append that returned what is to be closed"
        held, discounts, values = self._fields["whole_return"], self._fields["step_discount"], self._to_memory(values).double()
        for row, (lane, first, filled, end) in enumerate(zip(*self._due)):
            steps = np.arange(first, end)
            places = self._to_memory(torch.from_numpy(self._flat(lane, steps)))
            reward = held[places].double()
            uncut = torch.zeros_like(reward, dtype=torch.bool)  # the last row bootstraps in any case
            whole = returns(reward, discounts[places], uncut, values[row].expand_as(reward), self.gamma)
            count = filled - first
            held[places[:count]] = whole[:count].float()
            self._push(lane, steps[:count])
            self._unclosed[lane] = filled if filled < end else end + 1
        self._due = None

    def sample(self, batch_size: int) -> Batch:
        """Draws uniformly, with replacement, by torch's default generator of the CPU. At least one slot must be ready (`len`)."""
        counts = self._past - self._first
        sums = counts.cumsum()
        drawn = torch.randint(int(sums[-1]), (batch_size,)).numpy()
        lane = sums.searchsorted(drawn, side="right")
        place = self._past[lane] - sums[lane] + drawn
        return self._batch(lane, self._ready[lane, place % self.ring])

    def _batch(self, lane: np.ndarray, step: np.ndarray) -> Batch:
        after = step + self._spans[lane, step % self.ring]
        frames = self._gather(np.concatenate([self._stack(lane, step), self._stack(lane, after)]))
        places = self._to_memory(torch.from_numpy(self._flat(lane, step)))
        fields = {name: field[places].to(self.device) for name, field in self._fields.items()}
        whole = fields.get("whole_return", torch.empty(0, device=self.device))
        count = lane.size
        return Batch(frames[:count], fields["action"].long(), fields["reward"], fields["discount"], frames[count:], whole)

    def _stack(self, lane: np.ndarray, step: np.ndarray) -> np.ndarray:
        """The slots of the K frames up to `step`, int64 (M, K), oldest first; the blank one before the episode's first."""
        back = np.arange(self.stack_frames - 1, -1, -1)
        known = back <= self._ages[lane, step % self.ring][:, None]
        return np.where(known, self._flat(lane[:, None], step[:, None] - back), self.lanes * self.ring)

    def _gather(self, slots: np.ndarray) -> Tensor:
        """uint8 (M, K, C, H, W) on the learner's device, from slots int64 (M, K)."""
        places = self._to_memory(torch.from_numpy(slots).flatten())
        if self.memory_device == self.device:
            frames = self._frames.index_select(0, places)
        else:  # through pinned memory, so that the copy runs beside the host
            pinned = torch.empty(places.shape[0], *self.obs_shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            frames = torch.index_select(self._frames, 0, places, out=pinned).to(self.device, non_blocking=True)
        return frames.view(*slots.shape, *self.obs_shape)

    def _flat(self, lane: Any, step: np.ndarray) -> np.ndarray:
        """The slots of `step`, counted over all lanes."""
        return lane * self.ring + step % self.ring

    def _to_memory(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.memory_device)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots that have been written."""
        return int(np.minimum(self._written, self.ring).sum()) * self.bytes_per_slot if self.lanes else 0

    def state_dict(self) -> dict[str, Any]:
        """What has been written, lane by lane, as views: a frame keeps its place until it is overwritten."""
        state: dict[str, Any] = {"shape": self._shape(), "lanes": {}}
        for lane in range(self.lanes):
            used, start = min(int(self._written[lane]), self.ring), lane * self.ring
            tensors = {"frames": self._frames, **self._fields}
            columns = {name: tensor[start : start + used] for name, tensor in tensors.items()}
            queued = min(int(self._past[lane]), self.ring)
            columns |= {"ages": torch.from_numpy(self._ages[lane, :used]), "spans": torch.from_numpy(self._spans[lane, :used])}
            columns |= {"ready": torch.from_numpy(self._ready[lane, :queued])}
            state["lanes"][str(lane)] = columns | {name: int(count[lane]) for name, count in self._counts().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Takes each lane out of `state` once it is copied, so that a large memory is not held twice.

        UserError where it was saved with other knobs.
        """
        if state["shape"] != self._shape():
            raise UserError(f"the saved replay has {state['shape']}, this one {self._shape()}")
        lanes = len(state["lanes"])
        if not lanes:
            return
        self._open(lanes)
        for lane in range(lanes):
            saved = state["lanes"].pop(str(lane))
            used, start = saved["ages"].shape[0], lane * self.ring
            for name, tensor in {"frames": self._frames, **self._fields}.items():
                tensor[start : start + used] = saved[name]
            self._ages[lane, :used], self._spans[lane, :used] = saved["ages"].numpy(), saved["spans"].numpy()
            self._ready[lane, : saved["ready"].shape[0]] = saved["ready"].numpy()
            for name, count in self._counts().items():
                count[lane] = saved[name]

    def _shape(self) -> dict[str, Any]:
        shape: dict[str, Any] = {"capacity": self.capacity, "obs_shape": list(self.obs_shape), "stack_frames": self.stack_frames}
        return shape | {"n_steps": self.n_steps, "gamma": self.gamma, "whole_returns": self.whole_returns}

    def _counts(self) -> dict[str, np.ndarray]:
        names = ("written", "trace", "unclosed", "age", "first", "past")
        return {name: getattr(self, f"_{name}") for name in names}

"""Small worlds with known optimal values: instruments for tests and demonstrations. Pixels in, one frame a step.

They run on the host like emulators, all lanes at once, and hand their tensors to the device in one copy, so they are the same on every
device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from envs.transfer import Transfer


class Toy:
    """What the toys share: lanes of one position each on a square board, drawn as lit cells of value 255.

    A toy gives `_open(count) -> position int64 (count)`, where new episodes begin; `_play(position, action) -> (position, reward float32,
    terminated bool)`, all (N); and `_lit(position) -> int64 (N, L)`, the board's cells that are lit, row by row. Cell -1 is dark.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        device: torch.device | str,
        action_names: tuple[str, ...],
        side: int,
        pixels_per_cell: int,
        max_steps: int,
    ) -> None:
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if pixels_per_cell < 1:
            raise UserError(f"{name}: pixels_per_cell must be at least 1, got {pixels_per_cell}")
        if max_steps < 0:
            raise UserError(f"{name}: max_steps must be 0 (no time limit) or more, got {max_steps}")
        self.num_envs = num_envs
        self._side, self._pixels_per_cell, self._max_steps = side, pixels_per_cell, max_steps
        edge = side * pixels_per_cell
        self.spec = Spec(name, len(action_names), action_names, (1, edge, edge), 1)
        self._transfer = Transfer(device)
        self._generator = torch.Generator()
        self._position: Tensor | None = None
        self._action: Tensor | None = None

    def reset(self, seed: int) -> Step:
        """Starts every lane anew; all that is random follows from `seed`. Drains a pending send."""
        self._generator.manual_seed(seed % 2**63)
        self._action = None
        self._position = self._open(self.num_envs)
        self._steps = torch.zeros(self.num_envs, dtype=torch.int64)
        (obs,) = self._transfer(self._draw(self._position).numpy())
        return first_step(obs)

    def send(self, action: Tensor) -> None:
        """Takes int64 (num_envs) actions on any device. ValueError where one is out of range."""
        if self._position is None or self._action is not None:
            raise RuntimeError("send comes after reset or recv")
        action = action.cpu()
        check_actions(action, self.num_envs, self.spec.num_actions)
        self._action = action.clone()

    def recv(self) -> Step:
        """Plays the step that `send` began."""
        if self._position is None or self._action is None:
            raise RuntimeError("recv comes after send")
        position, reward, terminated = self._play(self._position, self._action)
        self._action = None
        self._steps = self._steps + 1
        last = terminated | (self._steps >= self._max_steps) if self._max_steps else terminated
        discount = 1 - terminated.float()
        seen = self._draw(position)
        ends = int(last.sum())
        if not ends:
            self._position = position
            obs, *rest = self._transfer(seen.numpy(), reward.numpy(), discount.numpy(), last.numpy())
            return Step(obs, rest[0], rest[1], rest[2], obs)
        self._position = position.clone()
        self._position[last] = self._open(ends)
        self._steps[last] = 0
        opened = self._draw(self._position)
        return Step(*self._transfer(opened.numpy(), reward.numpy(), discount.numpy(), last.numpy(), seen.numpy()))

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Forgets the lanes. Twice is harmless."""
        self._position = self._action = None

    def _draw(self, position: Tensor) -> Tensor:
        """uint8 (N, 1, H, W), a tensor of its own."""
        side, zoom = self._side, self._pixels_per_cell
        lit = self._lit(position)
        board = torch.zeros(position.shape[0], side * side + 1, dtype=torch.uint8)  # the last cell takes what is dark
        board.scatter_(1, torch.where(lit < 0, side * side, lit), 255)
        cells = board[:, :-1].reshape(-1, 1, side, 1, side, 1)
        return cells.expand(-1, 1, side, zoom, side, zoom).reshape(-1, *self.spec.obs_shape).contiguous()

    def _open(self, count: int) -> Tensor:
        raise NotImplementedError

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError

    def _lit(self, position: Tensor) -> Tensor:
        return position[:, None]


class Chain(Toy):
    """A corridor of `length` cells, walked from the first by the actions left and right. The last cell ends the episode with reward 1.

    `max_steps` is a time limit, 0 for none. Optimal: right, always.
    """

    def __init__(self, num_envs: int, device: torch.device | str, length: int = 8, max_steps: int = 200, pixels_per_cell: int = 1) -> None:
        if length < 2:
            raise UserError(f"Chain: length must be at least 2, got {length}")
        self.length = length
        super().__init__("Chain", num_envs, device, ("LEFT", "RIGHT"), _side(length), pixels_per_cell, max_steps)

    def optimal_values(self, gamma: float) -> Tensor:
        """float64 (length - 1): the value of each cell but the last, gamma^(length - 2 - cell), time limits not counted as ends."""
        return gamma ** torch.arange(self.length - 2, -1, -1, dtype=torch.float64)

    def optimal_value(self, gamma: float) -> float:
        """The value of an episode's start, gamma^(length - 2)."""
        return gamma ** (self.length - 2)

    def _open(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = (position + 2 * action - 1).clamp(min=0)
        terminated = position == self.length - 1
        return position, terminated.float(), terminated


class Ring(Toy):
    """A ring of `length` cells, walked by the actions back and forth from a random one; every step gives reward 1 and nothing ever ends.

    Episodes are cut by the time limit of `max_steps`, 0 for none. The value of every state under every policy is 1 / (1 - gamma); who takes
    the limit for an end learns less.
    """

    def __init__(self, num_envs: int, device: torch.device | str, length: int = 6, max_steps: int = 10, pixels_per_cell: int = 1) -> None:
        if length < 2:
            raise UserError(f"Ring: length must be at least 2, got {length}")
        self.length = length
        super().__init__("Ring", num_envs, device, ("BACK", "FORTH"), _side(length), pixels_per_cell, max_steps)

    def optimal_value(self, gamma: float) -> float:
        """1 / (1 - gamma), for gamma < 1."""
        return 1 / (1 - gamma)

    def _open(self, count: int) -> Tensor:
        return torch.randint(self.length, (count,), generator=self._generator)

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position = (position + 2 * action - 1) % self.length
        return position, torch.ones(self.num_envs), torch.zeros(self.num_envs, dtype=torch.bool)


class Catch(Toy):
    """A ball falls from a random column of the top row of a `size` by `size` board, one row a step; the paddle in the bottom row starts in
    the middle and moves left, stays or moves right. Caught: reward 1, missed: -1, and the episode ends. After bsuite's catch (Osband et al.
    2020, arXiv 1908.03568), whose board is 10 by 5. Optimal: move under the ball, which there is always time for.
    """

    def __init__(self, num_envs: int, device: torch.device | str, size: int = 7, pixels_per_cell: int = 1) -> None:
        if size < 3:
            raise UserError(f"Catch: size must be at least 3, got {size}")
        self.size = size
        super().__init__("Catch", num_envs, device, ("LEFT", "STAY", "RIGHT"), size, pixels_per_cell, max_steps=0)

    def optimal_value(self, gamma: float) -> float:
        """The value of an episode's start, gamma^(size - 2): the ball is caught at step size - 1."""
        return gamma ** (self.size - 2)

    # position = (row * size + column of the ball) * size + column of the paddle

    def _open(self, count: int) -> Tensor:
        return torch.randint(self.size, (count,), generator=self._generator) * self.size + self.size // 2

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ball, paddle = position // self.size + self.size, position % self.size
        paddle = (paddle + action - 1).clamp(0, self.size - 1)
        landed = ball // self.size == self.size - 1
        reward = torch.where(landed, torch.where(ball % self.size == paddle, 1.0, -1.0), 0.0)
        return ball * self.size + paddle, reward, landed

    def _lit(self, position: Tensor) -> Tensor:
        floor = self.size * (self.size - 1)
        return torch.stack([position // self.size, floor + position % self.size], 1)


class Cue(Toy):
    """Memory: the first picture shows one of two cues, `delay` pictures show none, and the last one asks: the action of the cue gives
    reward 1, the other -1, and the episode ends. Actions before that do nothing. An episode takes delay + 2 steps.

    Optimal with memory: repeat the cue. The best that can be done from the last picture alone is worth 0.
    """

    def __init__(self, num_envs: int, device: torch.device | str, delay: int = 3, pixels_per_cell: int = 1) -> None:
        if delay < 0:
            raise UserError(f"Cue: delay must be 0 or more, got {delay}")
        self.delay = delay
        super().__init__("Cue", num_envs, device, ("LEFT", "RIGHT"), 3, pixels_per_cell, max_steps=0)

    def optimal_value(self, gamma: float) -> float:
        """The value of an episode's start, gamma^(delay + 1)."""
        return gamma ** (self.delay + 1)

    # position = 2 * time + cue; one more time after the question is the dark end

    def _open(self, count: int) -> Tensor:
        return torch.randint(2, (count,), generator=self._generator)

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        asked = position // 2 == self.delay + 1
        reward = torch.where(asked, torch.where(action == position % 2, 1.0, -1.0), 0.0)
        return position + 2, reward, asked

    def _lit(self, position: Tensor) -> Tensor:
        time, cue = position // 2, position % 2
        waiting = torch.where(time == self.delay + 1, 7, 4)  # below the centre the question, in the centre the wait
        lit = torch.where(time == 0, 2 * cue, waiting)  # top left or top right the cue
        return torch.where(time > self.delay + 1, -1, lit)[:, None]


class Deceptive(Toy):
    """A ladder of `height` rungs, climbed from its foot. Taking what lies at hand gives `small`, on any rung, and ends the climb; the
    climb past the last rung gives `large` and ends the episode. Small rewards come at once, and random play meets the large one with
    probability 2^-height: a greedy learner settles for the small.

    Taking ends the episode, or, with `equal_length`, leads to a rest on cells of its own, one a step, until the climb would have ended.
    Then every episode has `height` steps, and a constant pay for each frame speaks for neither.
    """

    def __init__(
        self,
        num_envs: int,
        device: torch.device | str,
        height: int = 10,
        small: float = 0.1,
        large: float = 1.0,
        equal_length: bool = False,
        pixels_per_cell: int = 1,
    ) -> None:
        if height < 1:
            raise UserError(f"Deceptive: height must be at least 1, got {height}")
        if not 0 < small < large < math.inf:
            raise UserError(f"Deceptive: rewards must keep 0 < small < large, got small {small} and large {large}")
        self.height, self.small, self.large, self.equal_length = height, small, large, equal_length
        cells = 2 * height if equal_length else height + 1
        super().__init__("Deceptive", num_envs, device, ("TAKE", "CLIMB"), _side(cells), pixels_per_cell, max_steps=0)

    def optimal_values(self, gamma: float) -> Tensor:
        """float64 (height): the value of each rung, max(small, gamma^(height - 1 - rung) large)."""
        climb = self.large * gamma ** torch.arange(self.height - 1, -1, -1, dtype=torch.float64)
        return climb.clamp(min=self.small)

    def optimal_value(self, gamma: float) -> float:
        """The value of an episode's start, the foot of the ladder."""
        return max(self.small, self.large * gamma ** (self.height - 1))

    # position = rung; `height` is the top, height + t the rest at step t < height, -1 the end

    def _open(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def _play(self, position: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        resting = position > self.height
        taken = ~resting & (action == 0)
        rest = position + 1 if not self.equal_length else torch.where(taken, position + 1 + self.height, position + 1)
        over = rest == 2 * self.height if self.equal_length else taken
        after = torch.where(over, -1, rest)
        top = after == self.height
        reward = torch.where(top, self.large, torch.where(taken, self.small, 0.0))
        return after, reward, top | over


def _side(cells: int) -> int:
    """The side of the smallest square board that holds `cells` cells."""
    return math.isqrt(cells - 1) + 1

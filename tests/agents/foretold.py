"""Perfect simulators of small worlds, which read where all stands off the picture; they note how often they were asked."""

import torch

from envs.gridmaze import AGENT, FLOOR, PALETTES, WALL, GridMaze
from envs.toy import Toy

MOVES = torch.tensor([[-1, 0], [1, 0], [0, -1], [0, 1]])  # rows and columns of UP, DOWN, LEFT, RIGHT


class Perfect:
    """What the two share."""

    def __init__(self, env, context_frames=1):
        self.obs_shape, self.num_actions = env.spec.obs_shape, env.spec.num_actions
        self.context_frames = context_frames
        self.shown, self.stepped = [], 0

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}

    def start(self, clip):
        assert clip.frames.shape[1] == self.context_frames
        self.shown.append(clip)
        return self.read(clip.frames[:, -1])

    def step(self, state, action):
        assert action.dtype == torch.int64
        assert len(action) == len(state[0])
        self.stepped += len(action)
        state, frames = self.move(state, action)
        return state, frames, torch.zeros(len(action)), torch.ones(len(action))


class PerfectToy(Perfect):
    """Of a toy with so many positions. State: the position."""

    def __init__(self, env: Toy, positions: int, context_frames=1):
        super().__init__(env, context_frames)
        self.env, self.pictures = env, env._draw(torch.arange(positions)).flatten(1)

    def read(self, frames):
        alike = (frames.flatten(1).unsqueeze(1) == self.pictures).all(2)
        assert alike.any(1).all(), "a picture of no position"
        return (alike.int().argmax(1),)

    def move(self, state, action):
        position, _, _ = self.env._play(state[0], action)
        return (position,), self.env._draw(position)


class PerfectMaze(Perfect):
    """Of mazes in rgb whose goal stays. State: cells (B, S, S), the agent's row and column (B, 2)."""

    def __init__(self, env: GridMaze):
        super().__init__(env)
        self.size, self.zoom = env.size, env.spec.obs_shape[1] // env.size
        self.palette = torch.tensor(PALETTES["rgb"], dtype=torch.uint8)

    def read(self, frames):
        colours = frames[:, :, :: self.zoom, :: self.zoom].permute(0, 2, 3, 1)
        kinds = (colours.unsqueeze(3) == self.palette).all(4).int().argmax(3)
        agent = (kinds == AGENT).flatten(1).int().argmax(1)
        return torch.where(kinds == AGENT, FLOOR, kinds), torch.stack((agent // self.size, agent % self.size), 1)

    def move(self, state, action):
        cells, agent = state
        lanes, there = torch.arange(len(cells)), agent + MOVES[action]
        agent = torch.where((cells[lanes, there[:, 0], there[:, 1]] == WALL).unsqueeze(1), agent, there)
        shown = cells.clone()
        shown[lanes, agent[:, 0], agent[:, 1]] = AGENT
        frames = self.palette[shown].permute(0, 3, 1, 2)
        return (cells, agent), frames.repeat_interleave(self.zoom, 2).repeat_interleave(self.zoom, 3)


class Deaf:
    """What is there stays, whatever is done; it keeps the clips that it was shown."""

    def __init__(self, spec, context_frames=1):
        self.obs_shape, self.context_frames, self.shown = spec.obs_shape, context_frames, []

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def start(self, clip):
        self.shown.append(clip)
        return (clip.frames[:, -1],)

    def step(self, state, action):
        return state, state[0], torch.zeros(len(action)), torch.ones(len(action))

"""Atari 2600 games: ale-py's native vector environment behind the contract of worlds, and one emulator to replay a lane of it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ale_py
import gymnasium
import numpy as np
import torch
from ale_py import roms
from torch import Tensor

from envs.api import Spec, Step, UserError, check_actions, first_step
from envs.cpus import usable_cpus
from envs.protocols import Protocol
from envs.seeds import lane_seed
from envs.transfer import Transfer

# Importing ale_py registers its games with gymnasium. What it ships without an id there has no one-player cartridge and aborts the process.
GAMES: dict[str, str] = {
    spec.id.removeprefix("ALE/").removesuffix("-v5"): spec.kwargs["game"]
    for spec in gymnasium.registry.values()
    if spec.id.startswith("ALE/") and spec.id.endswith("-v5")
}


Shape = tuple[int, int, int]  # channels (1 grey, 3 colour), height, width
OBS_MODES: dict[str, Shape] = {"grey84": (1, 84, 84), "grey42": (1, 42, 42), "rgb64": (3, 64, 64), "rgb210x160": (3, 210, 160)}

_UNLIMITED = 2**30  # ale-py adds one to its limit, so not the largest int


def rom_id(game: str) -> str:
    """ale-py's name of the cartridge of `game`, a key of GAMES. UserError with the nearest names where there is none."""
    if game in GAMES:
        return GAMES[game]
    plain = _plain(game)
    if plain in {_plain(rom) for rom in roms.get_all_rom_ids()} - {_plain(name) for name in GAMES}:
        raise UserError(f"{game} cannot be played: ale-py has only its two-player version; choose another game")
    names = {_plain(name): name for name in GAMES}
    nearest = [names[near] for near in difflib.get_close_matches(plain, names, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"the {len(GAMES)} games are named like {', '.join(sorted(GAMES)[:3])}"
    raise UserError(f"no Atari game is called {game}; {hint}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "")


def _obs_shape(obs: str) -> Shape:
    if obs not in OBS_MODES:
        raise UserError(f"obs must be one of {', '.join(OBS_MODES)}, got {obs}")
    return OBS_MODES[obs]


@cache
def _rom_path(rom: str) -> Path:
    path = roms.get_rom_path(rom)
    assert path is not None, rom
    return path


def _lanes(rom: str, num_envs: int, num_threads: int, protocol: Protocol, shape: Shape, **changes: Any) -> ale_py.ALEVectorInterface:
    """ale-py's vector environment with every knob set by hand: raw rewards, games that outlive a lost life, resets within the step."""
    knobs: dict[str, Any] = {
        "frame_skip": protocol.frame_skip,
        "stack_num": 1,
        "img_height": shape[1],
        "img_width": shape[2],
        "grayscale": shape[0] == 1,
        "maxpool": True,
        "noop_max": protocol.noop_max,
        "use_fire_reset": protocol.fire_reset,
        "episodic_life": False,
        "life_loss_info": False,
        "reward_clipping": False,
        "max_episode_steps": _UNLIMITED,  # AtariEnv keeps the time limit itself
        "repeat_action_probability": protocol.sticky,
        "full_action_space": protocol.full_action_set,
        "batch_size": 0,
        "num_threads": num_threads,
        "thread_affinity_offset": -1,
        "autoreset_mode": "SameStep",
    }
    return ale_py.ALEVectorInterface(rom_path=_rom_path(rom), num_envs=num_envs, **(knobs | changes))


class AtariEnv:
    """N games of one kind behind `envs.api.VectorEnv`.

    Args:
        game: a key of GAMES, such as "MsPacman".
        num_envs: lanes, at least 1.
        device: where the tensors of a Step land, in one copy.
        protocol: sticky actions, no-ops, lives, action set, frame skip, time limit. Its evaluation_* fields are not read here. A life lost
            on the very step of the time limit counts as lost: discount 0.
        obs: "grey84" (1, 84, 84), "grey42" (1, 42, 42), "rgb64" (3, 64, 64) or "rgb210x160" (3, 210, 160). Colour lies in memory as
            torch.channels_last, as emulators give it and convolutions like it; laying it out anew would cost a fifth of the speed.
        num_threads: emulator threads; 0 for as many as the process may use (affinity and container quota), never more than lanes.

    UserError on a bad knob. Rewards are the game's own, in points. The time limit counts frames after the no-ops and ends an episode with
    the true picture as `next_obs`. At a game's own end `next_obs` holds no picture of the end: ale-py drops the frames that would have made
    it and shows the observation before, merged with the last frame but one where the game ended on a step's last frame. Nothing is
    bootstrapped there.
    """

    lane_seed = staticmethod(lane_seed)

    def __init__(
        self,
        game: str,
        num_envs: int,
        device: torch.device | str,
        protocol: Protocol,
        obs: str = "grey84",
        num_threads: int = 0,
    ) -> None:
        rom, shape = rom_id(game), _obs_shape(obs)
        if num_envs < 1:
            raise UserError(f"num_envs must be at least 1, got {num_envs}")
        if num_threads < 0:
            raise UserError(f"num_threads must be 0 (all usable processors) or more, got {num_threads}")
        self.num_envs = num_envs
        self.protocol = protocol
        self.num_threads = min(num_threads or usable_cpus(), num_envs)
        self._ale: ale_py.ALEVectorInterface | None = _lanes(rom, num_envs, self.num_threads, protocol, shape)
        names = tuple(action.name for action in self._ale.get_action_set())
        self.spec = Spec(game, len(names), names, shape, protocol.frame_skip)
        self._transfer = Transfer(device)
        self._limit_steps = protocol.max_episode_frames // protocol.frame_skip
        self._strength = np.ones(num_envs, np.float32)  # of a paddle; full for every action
        self._pending = False
        self._lives = self._steps = np.zeros(0, np.int64)  # empty until the first reset

    def reset(self, seed: int) -> Step:
        """Starts every lane anew, each with a seed of its own that hashes (seed, lane). Drains a pending send."""
        ale = self._open()
        self._drain()
        seeds = np.array([lane_seed(seed, lane) for lane in range(self.num_envs)])
        obs, info = ale.reset(np.arange(self.num_envs), seeds)
        self._lives, self._steps = info["lives"], np.zeros(self.num_envs, np.int64)
        (shown,) = self._transfer(obs)
        return first_step(self._pixels(shown))

    def send(self, action: Tensor) -> None:
        """Takes int64 (num_envs) actions on any device and returns at once. ValueError where one is out of range."""
        ale = self._open()
        if self._pending or not self._steps.size:
            raise RuntimeError("send comes after reset or recv")
        action = action.cpu()
        check_actions(action, self.num_envs, self.spec.num_actions)  # ale-py would hang on a wrong one
        ale.send(action.numpy(), self._strength)
        self._pending = True

    def recv(self) -> Step:
        """Waits for the step that `send` began."""
        ale = self._open()
        if not self._pending:
            raise RuntimeError("recv comes after send")
        self._pending = False
        obs, points, terminated, _, info = ale.recv()
        lives = info["lives"]
        self._steps += 1
        late = (self._steps >= self._limit_steps) & ~terminated
        last = terminated | late
        discount = 1 - terminated.astype(np.float32)
        if self.protocol.life_loss:
            discount[lives < self._lives] = 0
        reward = points.astype(np.float32)
        self._lives = lives
        if not last.any():
            shown, *rest = self._transfer(obs, reward, discount, last)
            pixels = self._pixels(shown)
            return Step(pixels, rest[0], rest[1], rest[2], pixels)
        self._steps[last] = 0
        successor = obs.copy()
        if "final_obs" in info:  # rows of lanes that did not terminate are stale
            successor[terminated] = info["final_obs"][terminated]
        if late.any():
            obs, info = ale.reset(np.flatnonzero(late), np.full(late.sum(), -1))  # -1: goes on with the lane's random streams
            self._lives = info["lives"]
        shown, *rest, following = self._transfer(obs, reward, discount, last, successor)
        return Step(self._pixels(shown), rest[0], rest[1], rest[2], self._pixels(following))

    def step(self, action: Tensor) -> Step:
        """`send`, then `recv`."""
        self.send(action)
        return self.recv()

    def close(self) -> None:
        """Ends the emulators and their threads. Twice is harmless."""
        if self._ale is not None:
            self._drain()
            self._ale = None

    def _open(self) -> ale_py.ALEVectorInterface:
        if self._ale is None:
            raise RuntimeError(f"{self.spec.name} is closed")
        return self._ale

    def _drain(self) -> None:
        if self._pending and self._ale is not None:
            self._ale.recv()
            self._pending = False

    def _pixels(self, shown: Tensor) -> Tensor:
        """uint8 (N, C, H, W), a view of what ale-py shows: (N, 1, H, W) in grey, (N, 1, H, W, 3) in colour."""
        return shown if self.spec.obs_shape[0] == 1 else shown.squeeze(1).permute(0, 3, 1, 2)


class Moment(NamedTuple):
    """What one lane shows after one step, in numpy. Fields as in `envs.api.Step`, for one environment.

    Attributes:
        obs: uint8 (C, H, W), what to act on next.
        reward: points.
        discount: 0 after the game's end, and after a lost life where the protocol says so.
        last: the episode is over.
        next_obs: uint8 (C, H, W), the successor; `obs` itself but where a replay has gone on to the next episode.
        lives: lives left, of the game that `obs` belongs to.
        rgb: uint8 (210, 160, 3), the screen at the step's end (of the old episode where it ended), maximum of the step's last two frames:
            games draw some figures on every other frame only.
    """

    obs: np.ndarray
    reward: float
    discount: float
    last: bool
    next_obs: np.ndarray
    lives: int
    rgb: np.ndarray


@dataclass(frozen=True)
class EmulatorState:
    """A moment of an Emulator that can be returned to any number of times. Its arrays are never written."""

    ale: ale_py.ALEState
    moment: Moment
    screen: np.ndarray
    pool: tuple[np.ndarray, np.ndarray]
    steps: int
    openings: _Openings
    episode: int


class _Openings:
    """The numbers of frames that ale-py plays before each episode's first observation, for one lane seed.

    How the seed becomes numbers is the business of the C++ library that ale-py was built with, so they are asked of ale-py itself: a lane
    whose episodes last one frame shows them one after another.
    """

    def __init__(self, rom: str, protocol: Protocol, seed: int) -> None:
        self._lane = _lanes(rom, 1, 1, protocol, OBS_MODES["grey84"], frame_skip=1, max_episode_steps=1)
        info = self._lane.reset(np.zeros(1, np.int64), np.array([seed]))[-1]
        self._frames = [int(info["episode_frame_number"][0])]

    def __getitem__(self, episode: int) -> int:
        while episode >= len(self._frames):
            self._lane.send(np.zeros(1, np.int64), np.ones(1, np.float32))
            self._frames.append(int(self._lane.recv()[-1]["episode_frame_number"][0]))
        return self._frames[episode]


class Emulator:
    """One game that can be looked into, copied and replayed. Slower than AtariEnv; for videos, room maps, counterfactuals and play.

    Args as in AtariEnv. It starts with `reset(seed)`; `reset()` goes on to the next episode. `step` does not reset.
    """

    def __init__(self, game: str, protocol: Protocol, obs: str = "grey84") -> None:
        self._rom, shape, self.protocol = rom_id(game), _obs_shape(obs), protocol
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # of all that are made from here on: the first prints a banner
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", protocol.sticky)
        self._ale.loadROM(_rom_path(self._rom))
        self._actions = self._ale.getLegalActionSet() if protocol.full_action_set else self._ale.getMinimalActionSet()
        names = tuple(action.name for action in self._actions)
        self._fires = protocol.fire_reset and ale_py.Action.FIRE in self._actions
        self.spec = Spec(game, len(names), names, shape, protocol.frame_skip)
        self._openings: _Openings | None = None
        self._moment: Moment | None = None
        self._episode = self._steps = 0

    def reset(self, seed: int | None = None) -> Moment:
        """Opens an episode: the first of lane seed `seed` (see `lane_seed`), or the next one without it. Its `last` is True."""
        if seed is None:
            if self._openings is None:
                raise RuntimeError("the first reset needs a seed")
            self._episode += 1
        else:
            self._openings, self._episode = _Openings(self._rom, self.protocol, seed), 0
            self._ale.setInt("random_seed", seed)
            self._ale.loadROM(_rom_path(self._rom))
        self._ale.reset_game()
        frames = self._openings[self._episode]
        for frame in range(frames):
            self._ale.act(ale_py.Action.FIRE if self._fires and frame == 0 else ale_py.Action.NOOP)
        self._steps = 0
        self._screen = self._ale.getScreenRGB()
        seen = self._seen()
        self._pool = (seen, np.zeros_like(seen))
        obs = self._obs()
        self._moment = Moment(obs, 0.0, 1.0, True, obs, self._ale.lives(), self._screen)
        return self._moment

    def step(self, action: int, look: bool = True) -> Moment:
        """Plays `frame_skip` frames, fewer where the game ends. ValueError on an illegal action, RuntimeError after an episode's end.

        With look=False no pictures are made (the moment's are old ones), for who only reads `ram`.
        """
        if not 0 <= action < self.spec.num_actions:
            raise ValueError(f"actions must lie in 0..{self.spec.num_actions - 1}, got {action}")
        before = self._moment
        if before is None or (before.last and self._steps):
            raise RuntimeError("step comes after reset")
        reward, over, screens = 0, False, []
        newer, older = self._pool
        for left in range(self.protocol.frame_skip, 0, -1):
            reward += self._ale.act(self._actions[action])
            over = self._ale.game_over()
            if look and (over or left <= 2):
                screens.append(self._ale.getScreenRGB())
            if over:  # the lane looks at no frame from here on
                break
            if not look:
                continue
            if left == 2:
                older = self._seen()
            elif left == 1:
                newer = self._seen()
        self._steps += 1
        last = over or self._steps * self.protocol.frame_skip >= self.protocol.max_episode_frames
        lives = self._ale.lives()
        discount = 0.0 if over or (self.protocol.life_loss and lives < before.lives) else 1.0
        if look:
            self._pool, self._screen = (np.maximum(newer, older), older), screens[-1]
        obs, picture = (self._obs(), np.maximum(screens[0], screens[-1])) if look else (before.obs, before.rgb)
        self._moment = Moment(obs, float(reward), discount, last, obs, lives, picture)
        return self._moment

    def replay(self, seed: int, actions: Iterable[int], look: bool = True) -> Iterator[Moment]:
        """A lane of AtariEnv again, bit for bit: its first moment, then one for each action, through as many episodes as they last.

        `seed` is `lane_seed(seed of AtariEnv.reset, lane)`; `actions` are those sent to the lane since that reset. Protocol and obs must
        equal the environment's. The no-ops, sticky actions and resets follow from the seed.
        """
        yield self.reset(seed)
        for action in actions:
            moment = self.step(int(action), look)
            if moment.last:
                opening = self.reset()
                moment = moment._replace(obs=opening.obs, lives=opening.lives)
            yield moment

    def rgb(self) -> np.ndarray:
        """The screen now, uint8 (210, 160, 3)."""
        self._playing()
        return self._screen.copy()

    def ram(self) -> np.ndarray:
        """The console's memory now, uint8 (128)."""
        self._playing()
        return self._ale.getRAM()

    def clone(self) -> EmulatorState:
        """All there is to know of this moment, the random streams of sticky actions and no-ops included."""
        moment = self._playing()
        assert self._openings is not None
        ale = self._ale.cloneState(include_rng=True)
        return EmulatorState(ale, moment, self._screen, self._pool, self._steps, self._openings, self._episode)

    def restore(self, state: EmulatorState) -> Moment:
        """Back to a moment that `clone` of an Emulator of the same game and protocol returned."""
        self._ale.restoreState(state.ale)
        self._moment, self._screen, self._pool = state.moment, state.screen, state.pool  # ale-py does not restore its screen
        self._steps, self._openings, self._episode = state.steps, state.openings, state.episode
        return state.moment

    def _playing(self) -> Moment:
        if self._moment is None:
            raise RuntimeError("the first call is reset(seed)")
        return self._moment

    def _seen(self) -> np.ndarray:
        return self._ale.getScreenGrayscale() if self.spec.obs_shape[0] == 1 else self._ale.getScreenRGB()

    def _obs(self) -> np.ndarray:
        channels, height, width = self.spec.obs_shape
        from envs.area import shrink  # numba takes a while to import

        small = shrink(np.maximum(*self._pool), height, width)
        return small[None] if channels == 1 else np.ascontiguousarray(small.transpose(2, 0, 1))

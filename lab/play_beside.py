"""The simulator beside a world: it looks on for a few frames, then goes by its own, and is measured against the truth."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from generative.api import Clip
from generative.rollouts import psnr, squared_error
from lab.play_stage import Dice, Offer, Stage
from lab.play_worlds import Seen

ENDED = 0.5  # an expected discount below it says that the episode is over


class Beside:
    """One of several simulators, fed with the actions of a world that is stepped elsewhere.

    Args:
        stage: with the simulators on offer, at least one.
        dice: the tab's randomness.

    Attributes:
        frame: uint8 (C, H, W), the last that was foretold; None where the simulator stands at the truth.
        ahead: steps of the world since it was shown the truth.
        psnr: of `frame`, in decibels; None without a frame.
        returned: the rewards that were foretold since the episode opened, or since this simulator was chosen.
        over: it says that the episode has ended, and goes no further until it is set to the truth.
        sync_every: it is set to the truth after so many steps; 0 for never.
    """

    def __init__(self, stage: Stage, dice: Dice) -> None:
        self._offers: Sequence[Offer] = stage.offers
        self._dice = dice
        self.index = self.sync_every = 0
        self.returned = 0.0
        longest = max(offer.simulator.context_frames for offer in stage.offers)
        self._frames: deque[tuple[Tensor, ...]] = deque(maxlen=longest)
        self._led: deque[tuple[int, float, float]] = deque(maxlen=longest)  # action, reward and discount before each but the first frame
        self._ended = False  # the true episode
        self._forget()

    @property
    def offer(self) -> Offer:
        """The simulator that is played."""
        return self._offers[self.index]

    def open(self, seen: Seen) -> None:
        """An episode of the world has opened."""
        self._frames.clear()
        self._led.clear()
        self._frames.append(seen.obs)
        self._ended = False
        self._forget()
        self._look_on()

    def step(self, action: int, seen: Seen) -> None:
        """The world has taken a step."""
        self._led.append((action, seen.reward, seen.discount))
        self._frames.append(seen.obs)
        self._ended = seen.last
        if self._state is None:
            self._look_on()
            return
        self.ahead += 1
        due = self.sync_every and self.ahead >= self.sync_every and not self._ended
        if not self.over:
            self._foretell(action, seen)
            due = due and not self.over
        if due:
            self._start()

    def sync(self) -> None:
        """Sets the simulator to the truth, as far as it is known."""
        if not self._ended:
            returned = self.returned
            self._forget()
            self._start()
            self.returned = returned

    def switch(self, index: int) -> None:
        """Goes on with another simulator, from the truth."""
        self.index = index
        self._forget()
        self._look_on()

    def facts(self) -> dict[str, Any]:
        """All numbers of the moment, as plain values; None for what is not known, or not finite."""
        needs = self.offer.simulator.context_frames
        return {
            "index": self.index,
            "sync_every": self.sync_every,
            "known": min(len(self._frames), needs),
            "needs": needs,
            "ahead": None if self._state is None else self.ahead,
            "psnr": self.psnr,
            "reward": _finite(self.reward),
            "return": _finite(self.returned),
            "discount": _finite(self.discount),
            "over": self.over,
            "lost_life": self.offer.lives_end and self.discount is not None and self.discount < ENDED,
        }

    def _forget(self) -> None:
        self._state: tuple[Tensor, ...] | None = None
        self.frame: Tensor | None = None
        self.psnr: float | None = None
        self.reward: float | None = None
        self.discount: float | None = None
        self.ahead, self.returned, self.over = 0, 0.0, False

    def _look_on(self) -> None:
        if len(self._frames) >= self.offer.simulator.context_frames and not self._ended:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        offer = self.offer
        shown = [frames[offer.view] for frames in self._frames][-offer.simulator.context_frames :]
        led = list(self._led)[len(self._led) - len(shown) + 1 :]
        actions = torch.tensor([[action for action, _, _ in led]], dtype=torch.int64).view(1, -1)
        rewards, discounts = (torch.tensor([[step[field] for step in led]], dtype=torch.float32).view(1, -1) for field in (1, 2))
        clip = Clip(torch.stack(shown, 1), actions, rewards, discounts, torch.zeros_like(rewards, dtype=torch.bool))
        with self._dice.rolled():
            self._state = offer.simulator.start(clip)
        self.ahead, self.over = 0, False

    @torch.no_grad()
    def _foretell(self, action: int, seen: Seen) -> None:
        offer = self.offer
        assert self._state is not None
        with self._dice.rolled():
            self._state, frame, reward, discount = offer.simulator.step(self._state, torch.tensor([action]))
        self.frame, self.reward, self.discount = frame[0].cpu(), float(reward[0]), float(discount[0])
        self.psnr = float(psnr(squared_error(self.frame, seen.obs[offer.view][0])))
        self.returned += self.reward
        self.over = self.discount < ENDED and not offer.lives_end


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

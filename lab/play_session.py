"""One tab of job=play: a world of its own, the simulator beside it, and what the tab's keys and buttons do to both."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import torch

from agents.api import Decision
from envs.api import Step, UserError
from lab.play_beside import Beside
from lab.play_keys import all_keys, chords, chosen, in_order, resting, words
from lab.play_picture import message
from lab.play_stage import Dice, Stage
from lab.play_worlds import Seen, World

MOST_RATE, MOST_SYNC = 60, 100
MOST_KEYS = 16
WAIT_SECONDS = 1.5  # from an episode's end to the next, where it begins by itself


class Session:
    """Steps a world, and a simulator with the same actions. Not for two threads at once.

    A simulator is shown the first `context_frames` pictures of an episode; from then on it goes by its own until it is set to the truth.

    Args:
        stage: what all tabs share.
        seed: all that is random in this tab follows from it.
        rate: steps a second; None for the world's own.
    """

    def __init__(self, stage: Stage, seed: int, rate: int | None = None) -> None:
        self.stage, self._dice, self._random = stage, Dice(seed, stage.turn), random.Random(seed)
        self.rate = rate or stage.kind.steps_per_second
        spec = stage.kind.specs[0]
        self.chords = chords(spec.action_names)
        self._rest = resting(self.chords)
        self.paused, self.watching, self.goes_on = False, stage.player is not None, stage.player is not None
        self.beside = Beside(stage, self._dice) if stage.offers else None
        self._held: list[str] = []
        self._tapped: list[str] = []
        self._action = self._rest if self._rest is not None else 0
        self._episodes = 0
        self._world: World = stage.kind.make(seed)
        self._open()

    @property
    def running(self) -> bool:
        """Whether time passes by itself, and `advance` is to be called `rate` times a second."""
        if self.paused:
            return False
        if self.over:
            return self.goes_on
        return self.watching or self._rest is not None or self._pressed() is not None

    @property
    def over(self) -> bool:
        """Whether nothing can be stepped before a reset (or, where only the simulated episode ended, the truth)."""
        return self.seen.last or (self.beside is not None and self.beside.over and not self.goes_on)

    def do(self, said: Any) -> None:
        """Takes in what a tab says: {key: value}, the key one of `SAYINGS`. UserError where it is not understood; then nothing is done."""
        if not isinstance(said, dict) or len(said) != 1:
            raise UserError(f"a tab says {{key: value}}, got {_short(said)}")
        ((key, value),) = said.items()
        if key not in SAYINGS:
            raise UserError(f"there is no {_short(key)}; a tab says {', '.join(SAYINGS)}")
        SAYINGS[key](self, value)

    def advance(self) -> None:
        """What a tick of the clock does: one step; after the end, where the next episode opens by itself, a rest and then that."""
        if not self.over:
            self._step()
        elif self.goes_on:
            self._rested += 1
            if self._rested >= WAIT_SECONDS * self.rate:
                self._open()

    def close(self) -> None:
        """Ends the world. Twice is harmless."""
        self._world.close()

    def hello(self) -> dict[str, Any]:
        """What a tab is told once, in plain values: the world, its actions and their keys, simulators and player."""
        kind, player = self.stage.kind, self.stage.player
        names = kind.specs[0].action_names
        keys = [in_order(chord) if chord is not None else None for chord in self.chords]
        return {
            "world": kind.name,
            "protocol": kind.protocol.name if kind.protocol else None,
            "beside": kind.beside,
            "frames_per_step": kind.specs[0].frames_per_step,
            "actions": [{"name": name, "words": words(name), "keys": of} for name, of in zip(names, keys)],
            "keys": all_keys(self.chords),
            "waits": self._rest is None,
            "simulators": [{"label": offer.label, "context_frames": offer.simulator.context_frames} for offer in self.stage.offers],
            "player": {"label": player.label, "epsilon": player.epsilon} if player else None,
            "most_rate": MOST_RATE,
            "most_sync": MOST_SYNC,
        }

    def show(self) -> bytes:
        """The moment as a message: numbers, and pictures (see `lab.play_picture`)."""
        beside, kind = self.beside, self.stage.kind
        facts: dict[str, Any] = {
            "episode": self._episodes,
            "step": self._steps,
            "action": self._action if self._steps else None,
            "reward": self.seen.reward,
            "return": self._return,
            "last": self.seen.last,
            "lost_life": self.seen.discount == 0 and not self.seen.last,
            "over": self.over,
            "running": self.running,
            "paused": self.paused,
            "rate": self.rate,
            "watching": self.watching,
            "goes_on": self.goes_on,
        }
        pictures: dict[str, Any] = {"truth": self.seen.obs[beside.offer.view if beside else 0][0]}
        if beside is not None:
            facts["simulator"] = beside.facts()
            shown = beside.frame if beside.frame is not None else pictures["truth"]
            pictures["simulated"] = shown
        if kind.beside and self.seen.beside is not None:
            pictures[kind.beside] = torch.from_numpy(self.seen.beside).permute(2, 0, 1)
        return message(facts, pictures)

    def _open(self) -> None:
        """A new episode, in the world and beside it."""
        self.seen: Seen = self._world.open()
        self._episodes += 1
        self._steps, self._return, self._rested = 0, 0.0, 0
        self._tapped.clear()
        self._decision: Decision | None = None
        if self.beside is not None:
            self.beside.open(self.seen)
        self._decide()

    def _decide(self) -> None:
        """Asks the agent, whoever plays, so that its memory follows."""
        player = self.stage.player
        if player is None or self.seen.last:
            return
        told = torch.tensor([self.seen.reward]), torch.tensor([self.seen.discount]), torch.tensor([self._steps == 0])
        obs, *rest = (tensor.to(player.device) for tensor in (self.seen.obs[player.view], *told))
        step = Step(obs, rest[0], rest[1], rest[2], obs)
        with self._dice.rolled(), torch.no_grad():
            carry = self._decision.carry if self._decision is not None else player.agent.initial(1)
            self._decision = player.agent.act(step, carry, explore=False)

    def _step(self) -> None:
        """One step of both worlds, by the agent's action or by the keys'."""
        action = self._next_action()
        self._tapped.clear()
        self._action = action
        self.seen = self._world.step(action)
        self._steps += 1
        self._return += self.seen.reward
        if self.beside is not None:
            self.beside.step(action, self.seen)
        self._decide()

    def _next_action(self) -> int:
        if self.watching and self.stage.player is not None:
            assert self._decision is not None
            if self._random.random() < self.stage.player.epsilon:
                return self._random.randrange(self.stage.kind.specs[0].num_actions)
            return int(self._decision.action)
        pressed = self._pressed()
        if pressed is not None:
            return pressed
        return self._rest if self._rest is not None else self._action

    def _pressed(self) -> int | None:
        """The action of keys that are down, or went down since the last step and are up again."""
        return chosen(self.chords, [key for key in self._tapped if key not in self._held] + self._held)

    def _say_keys(self, value: Any) -> None:
        whole = isinstance(value, list) and len(value) <= MOST_KEYS and all(isinstance(key, str) and len(key) <= 32 for key in value)
        if not whole:
            raise UserError(f"keys is a list of at most {MOST_KEYS} keys that are held, oldest first, got {_short(value)}")
        self._tapped += [key for key in value if key not in self._held and key not in self._tapped]
        del self._tapped[:-MOST_KEYS]
        self._held = value

    def _say_do(self, value: Any) -> None:
        deeds: dict[Any, Callable[[], None]] = {"reset": self._open, "step": self._step_once, "sync": self._sync}
        if not isinstance(value, str) or value not in deeds:
            raise UserError(f"do is one of {', '.join(deeds)}, got {_short(value)}")
        deeds[value]()

    def _step_once(self) -> None:
        self.paused = True
        if not self.over:
            self._step()

    def _sync(self) -> None:
        self._simulated("sync").sync()

    def _say_paused(self, value: Any) -> None:
        self.paused = _flag("paused", value)

    def _say_goes_on(self, value: Any) -> None:
        self.goes_on = _flag("goes_on", value)

    def _say_watching(self, value: Any) -> None:
        if _flag("watching", value) and self.stage.player is None:
            raise UserError("watching wants a trained agent, and none plays here (job=play run=runs/TRAINED)")
        self.watching = value
        self._tapped.clear()

    def _say_rate(self, value: Any) -> None:
        self.rate = _count("rate", value, 1, MOST_RATE)

    def _say_sync_every(self, value: Any) -> None:
        self._simulated("sync_every").sync_every = _count("sync_every", value, 0, MOST_SYNC)

    def _say_simulator(self, value: Any) -> None:
        self._simulated("simulator").switch(_count("simulator", value, 0, len(self.stage.offers) - 1))

    def _simulated(self, word: str) -> Beside:
        if self.beside is None:
            raise UserError(f"{word} is said to a simulator, and there is none here")
        return self.beside


SAYINGS: dict[str, Callable[[Session, Any], None]] = {
    "keys": Session._say_keys,
    "do": Session._say_do,
    "paused": Session._say_paused,
    "rate": Session._say_rate,
    "sync_every": Session._say_sync_every,
    "simulator": Session._say_simulator,
    "watching": Session._say_watching,
    "goes_on": Session._say_goes_on,
}


def _flag(word: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{word} is true or false, got {_short(value)}")
    return value


def _count(word: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UserError(f"{word} is a whole number from {least} to {most}, got {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

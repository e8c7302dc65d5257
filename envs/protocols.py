"""How an Atari game is set up and scored. Papers differ here, and scores under different protocols cannot be compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from envs.api import UserError


@dataclass(frozen=True)
class Protocol:
    """Every knob of an Atari environment and of its evaluation. UserError where one is out of range.

    Attributes:
        name: stamped on every score.
        sticky: probability with which the emulator, at each frame, repeats its previous action instead of the new one.
        noop_max: how many different openings there are: an episode opens with 0 .. noop_max - 1 no-op frames, drawn uniformly. 1: none.
        fire_reset: True presses FIRE once at an episode's start, where the game has that action.
        life_loss: True gives discount 0 (and not last) where a life is lost. The game itself goes on.
        full_action_set: True offers all 18 joystick actions, False those that the game uses.
        frame_skip: emulator frames an action lasts; the observation is the pixelwise maximum of the last two.
        max_episode_frames: time limit of an episode after its no-ops, in emulator frames, a multiple of frame_skip. Not a termination.
        evaluation_epsilon: probability of a uniform action in evaluation, applied outside the agent.
        evaluation_max_frames: the time limit in evaluation, in emulator frames, a multiple of frame_skip.
        score: what the protocol reports, the mean of "evaluation" episodes or of the "last_100_training_episodes".
    """

    name: str
    sticky: float
    noop_max: int
    fire_reset: bool
    life_loss: bool
    full_action_set: bool
    frame_skip: int
    max_episode_frames: int
    evaluation_epsilon: float
    evaluation_max_frames: int
    score: Literal["evaluation", "last_100_training_episodes"]

    def __post_init__(self) -> None:
        for knob in ("sticky", "evaluation_epsilon"):
            if not 0 <= getattr(self, knob) <= 1:
                raise UserError(f"protocol {self.name}: {knob} must lie in 0..1, got {getattr(self, knob)}")
        for knob in ("noop_max", "frame_skip"):
            if getattr(self, knob) < 1:
                raise UserError(f"protocol {self.name}: {knob} must be at least 1, got {getattr(self, knob)}")
        for knob in ("max_episode_frames", "evaluation_max_frames"):
            frames = getattr(self, knob)
            if frames < 1 or frames % self.frame_skip:
                raise UserError(f"protocol {self.name}: {knob} must be a positive multiple of frame_skip {self.frame_skip}, got {frames}")
        if self.score not in ("evaluation", "last_100_training_episodes"):
            raise UserError(f"protocol {self.name}: score must be evaluation or last_100_training_episodes, got {self.score}")

    def for_evaluation(self) -> Protocol:
        """The same protocol for evaluation episodes: their own time limit, and no signal at a lost life."""
        return replace(self, max_episode_frames=self.evaluation_max_frames, life_loss=False)


def _mfec2016() -> Protocol:
    """Blundell et al. 2016, arXiv 1606.04460, section 4.1: one of 30 openings, action repeat 4, epsilon 0.005. Nothing is said of the time
    limit; 108,000 frames is the custom of its time."""
    return Protocol(
        name="mfec2016",
        sticky=0.0,
        noop_max=30,
        fire_reset=False,
        life_loss=False,
        full_action_set=False,
        frame_skip=4,
        max_episode_frames=108_000,
        evaluation_epsilon=0.005,
        evaluation_max_frames=108_000,
        score="evaluation",
    )


def _nature2015() -> Protocol:
    """Mnih et al. 2015, Nature 518: up to 30 no-ops, a lost life ends the return while training, evaluation with epsilon 0.05 for at most
    5 minutes (18,000 frames). The training limit of 108,000 frames is later practice."""
    return Protocol(
        name="nature2015",
        sticky=0.0,
        noop_max=30,
        fire_reset=False,
        life_loss=True,
        full_action_set=False,
        frame_skip=4,
        max_episode_frames=108_000,
        evaluation_epsilon=0.05,
        evaluation_max_frames=18_000,
        score="evaluation",
    )


def _machado2018() -> Protocol:
    """Machado et al. 2018, arXiv 1709.06009: sticky actions, all 18 actions, no life-loss signal, no no-ops, 5 minutes (18,000 frames) an
    episode, score from the last 100 training episodes. The paper allows frame skips of 4 and 5; 4 is kept. It evaluates no frozen agent;
    for those who do, the epsilon is 0.01, DQN's own at the end of training."""
    return Protocol(
        name="machado2018",
        sticky=0.25,
        noop_max=1,
        fire_reset=False,
        life_loss=False,
        full_action_set=True,
        frame_skip=4,
        max_episode_frames=18_000,
        evaluation_epsilon=0.01,
        evaluation_max_frames=18_000,
        score="last_100_training_episodes",
    )


def _atari100k() -> Protocol:
    """Kaiser et al. 2020, arXiv 1903.00374, as IRIS (arXiv 2209.00588) and DIAMOND (arXiv 2405.12399) run it: no sticky actions, up to 30
    no-ops, life-loss signal while training only, 108,000 frames an episode. Their budget is 400,000 frames; the agents explore by
    themselves."""
    return Protocol(
        name="atari100k",
        sticky=0.0,
        noop_max=30,
        fire_reset=False,
        life_loss=True,
        full_action_set=False,
        frame_skip=4,
        max_episode_frames=108_000,
        evaluation_epsilon=0.0,
        evaluation_max_frames=108_000,
        score="evaluation",
    )


PROTOCOLS: dict[str, Protocol] = {make().name: make() for make in (_mfec2016, _nature2015, _machado2018, _atari100k)}

"""An agent that learns its world from what it plays, and learns to play in dreams of it (Sutton 1991's Dyna; Ha and Schmidhuber 2018)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from agents.api import Agent, Decision, Metrics
from agents.loop import play
from agents.trajectories import Trajectories
from envs.api import Spec, Step, UserError
from generative.api import Simulator, Trainable
from generative.dream import DreamEnv
from generative.fit import Fitter, Precision

PREPARED_FRAMES = 1_000
ENDLESS = 2**62  # updates


class Dreamer:
    """Plays, fits a simulator to what it played, and lets an inner agent learn in the simulator, through the same loop as in any world.

    Every `train_frames` frames of true play there is a round: `updates` of the simulator, then `dreams` times `dream_envs` dreams of
    `dream_steps` steps, which begin where true play has been. The inner agent acts in the true world too, but learns from dreams alone.
    What dreams give it are expected rewards and discounts (`generative.dream`), and time that it counts in frames is that of dreams.

    A simulator that is not fitted by gradients is dreamt in as it is.

    Args:
        spec: of the environment.
        device: of the simulator, the inner agent, and what is observed.
        simulator: fitted to what is played.
        inner: the agent that learns in dreams.
        capacity: pictures that are remembered, of all environments together, in the host's memory.
        learning_starts_frames: frames played at random before the first round.
        train_frames: frames of true play between two rounds.
        first_updates: of the simulator, in the first round.
        updates: of the simulator, in every other round.
        batch_size: clips of an update.
        learning_rate: of the simulator.
        warmup_updates: see `generative.fit.Fitter`.
        window_steps: transitions of a clip, or None for as few as the simulator can learn from.
        horizon: predictions in a row that are fed back in an update, of simulators that know of it.
        precision: of the simulator's updates, see `generative.fit.choose_precision`.
        dreams: in a round.
        dream_envs: lanes of a dream.
        dream_steps: of a dream at most; the last one is bootstrapped.
        context_frames: pictures before a dream that the inner agent walks over, so that it begins with its memory of them; at least as
            many as the simulator looks at.
        epsilon: share of random actions in true play, while training.
    """

    fits_simulator = True

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        simulator: Simulator,
        inner: Agent,
        capacity: int = 100_000,
        learning_starts_frames: int = 4_000,
        train_frames: int = 1_000,
        first_updates: int = 1_000,
        updates: int = 100,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        warmup_updates: int = 200,
        window_steps: int | None = None,
        horizon: int = 1,
        precision: Precision = "auto",
        dreams: int = 10,
        dream_envs: int = 64,
        dream_steps: int = 20,
        context_frames: int = 4,
        epsilon: float = 0.0,
    ) -> None:
        counts = {"train_frames": train_frames, "first_updates": first_updates, "updates": updates, "batch_size": batch_size}
        counts |= {"horizon": horizon, "dreams": dreams, "dream_envs": dream_envs, "dream_steps": dream_steps}
        counts |= {"context_frames": context_frames} | ({} if window_steps is None else {"window_steps": window_steps})
        for name, count, least in (
            *((name, count, 1) for name, count in counts.items()),
            ("learning_starts_frames", learning_starts_frames, 0),
            ("warmup_updates", warmup_updates, 0),
        ):
            if count < least:
                raise UserError(f"agent.{name} must be at least {least}, got {count}")
        if not 0 < learning_rate < math.inf:
            raise UserError(f"agent.learning_rate must be above 0, got {learning_rate}")
        if not 0 <= epsilon <= 1:
            raise UserError(f"agent.epsilon must lie in [0, 1], got {epsilon}")
        least = simulator.context_frames - 1 + horizon
        if window_steps is not None and window_steps < least:
            known = f"{simulator.context_frames} known frames and a horizon of {horizon}"
            raise UserError(f"agent.window_steps={window_steps} is too short: {known} need {least} at least")
        self.simulator, self.inner, self.trajectories = simulator, inner, Trajectories(capacity, spec.obs_shape)
        self.fitter: Fitter | None = None
        self.frames = self.rounds = 0
        if hasattr(simulator, "horizon"):
            simulator.horizon = horizon
        context = max(context_frames, simulator.context_frames)
        self.dream = DreamEnv(simulator, self.trajectories, spec, dream_envs, dream_steps, context, device)
        self._spec, self._dreams, self._epsilon = spec, dreams, epsilon
        self._batch_size, self._learning_rate, self._warmup_updates = batch_size, learning_rate, warmup_updates
        self._clip_steps, self._precision = window_steps or least, precision
        self._starts, self._every, self._updates = learning_starts_frames, train_frames, (first_updates, updates)
        self._seen: list[tuple[Step, Decision, Step]] = []

    @property
    def due(self) -> int:
        """The frames of true play at which the next round falls due."""
        return self._starts + self.rounds * self._every

    def initial(self, num_envs: int) -> Any:
        return self.inner.initial(num_envs)

    def act(self, step: Step, carry: Any, explore: bool) -> Decision:
        decision = self.inner.act(step, carry, explore=False)
        epsilon = (1.0 if self.frames < self._starts else self._epsilon) if explore else 0.0
        action = decision.action
        if epsilon > 0:
            random = torch.randint_like(action, self._spec.num_actions)
            action = torch.where(torch.rand(action.shape, device=action.device) < epsilon, random, action)
        return Decision(action, decision.carry, {})

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        self._seen.append((step, decision, after))
        self.frames += decision.action.shape[0] * self._spec.frames_per_step

    def learn(self) -> Metrics:
        due = self.due <= self.frames
        self._remember()
        metrics: dict[str, Tensor | float] = {}
        while self.due <= self.frames and len(self.trajectories):
            metrics |= self._fit(self._updates[min(self.rounds, 1)])
            for _ in range(self._dreams):
                metrics |= self._learn_in_a_dream()
            self.rounds += 1
        if due and metrics:
            metrics |= {"memory/entries": float(len(self.trajectories)), "memory/bytes": float(self.trajectories.nbytes)}
        return metrics

    def _remember(self) -> None:
        """Writes to the memory what was observed since the last time."""
        seen, self._seen = self._seen, []
        for step, decision, after in seen:
            last = after.last if after.next_obs is not after.obs else None
            self.trajectories.append(step.obs, decision.action, after.reward, after.discount, last, after.next_obs)

    def _fit(self, updates: int) -> Metrics:
        """So many updates of the simulator, where it is one that is fitted."""
        if not isinstance(self.simulator, Trainable):
            return {}
        if self.fitter is None:
            if hasattr(self.simulator, "prepare"):
                self.simulator.prepare(self.trajectories.spread(PREPARED_FRAMES))
            self.fitter = self._new_fitter()
        metrics: Mapping[str, Tensor] = {}
        for tick in self.fitter.run(self.fitter.update + updates):
            metrics = tick.metrics
        return {f"simulator/{name}": value for name, value in metrics.items()} | {"simulator/updates": float(self.fitter.update)}

    def _new_fitter(self) -> Fitter:
        return Fitter(
            self.simulator,
            self.trajectories,
            self._batch_size,
            self._learning_rate,
            updates=ENDLESS,
            precision=self._precision,
            warmup_updates=self._warmup_updates,
            clip_steps=self._clip_steps,
            clip_lead=self.simulator.context_frames - 1,
        )

    def _learn_in_a_dream(self) -> Metrics:
        """One dream of every lane, which the inner agent learns from."""
        metrics: dict[str, Tensor | float] = {}
        begun = wake(self.dream, self.inner, seed=int(torch.randint(2**31, ())))
        frames = self.dream.num_envs * self.dream.horizon * self._spec.frames_per_step
        rewards, ends = [], []
        for tick in play(self.dream, self.inner, frames, seed=0, begun=begun):
            metrics |= tick.metrics
            rewards.append(tick.after.reward.mean())
            ends.append(tick.after.last.float().mean())
        ended = torch.stack(ends[:-1]).mean() if ends[:-1] else 0.0
        return metrics | {"dream/reward": torch.stack(rewards).mean(), "dream/end_share": ended}

    def required_bytes(self, steps: int) -> int:
        """Memory, simulator with its gradient and optimiser, and what the inner agent needs for all the dreams."""
        rounds = max(0, steps * self._spec.frames_per_step - self._starts) // self._every + 1
        parameters = (
            sum(part.numel() for parts in self.simulator.players().values() for part in parts)
            if isinstance(self.simulator, Trainable)
            else 0
        )
        dreamt = rounds * self._dreams * self.dream.num_envs * self.dream.horizon
        return self.trajectories.required_bytes(steps) + 16 * parameters + self.inner.required_bytes(dreamt)

    def rollout_bytes(self, num_envs: int) -> int:
        """Of the inner agent in its dreams."""
        return int(getattr(self.inner, "rollout_bytes", lambda lanes: 0)(self.dream.num_envs))

    def state_dict(self) -> dict[str, Any]:
        self._remember()
        state: dict[str, Any] = {"frames": self.frames, "rounds": self.rounds, "inner": self.inner.state_dict()}
        state |= {"simulator": self.simulator.state_dict(), "trajectories": self.trajectories.state_dict()}
        return state | ({} if self.fitter is None else {"fitter": self.fitter.state_dict()})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.trajectories.load_state_dict(state["trajectories"])
        self.simulator.load_state_dict(state["simulator"])
        self.inner.load_state_dict(state["inner"])
        self.frames, self.rounds, self._seen = state["frames"], state["rounds"], []
        self.fitter = None
        if "fitter" in state:
            self.fitter = self._new_fitter()
            self.fitter.load_state_dict(state["fitter"])


def wake(dream: DreamEnv, agent: Agent, seed: int) -> tuple[Step, Any]:
    """Begins dreams anew: the first step and, as though the agent had seen the context, its carry; what `agents.loop.play` begins with.

    Lanes whose episode had just opened begin with `last` True and no memory, all others with `last` False.
    """
    step, carry = dream.reset(seed), agent.initial(dream.num_envs)
    frames = dream.context.frames
    length = frames.shape[1]
    for t in range(length - 1):
        seen = frames[:, t]
        carry = agent.act(step._replace(obs=seen, last=t <= length - dream.known, next_obs=seen), carry, explore=False).carry
    return step._replace(last=dream.known == 1), carry

"""Deep Q-network (Mnih et al. 2015): double estimation, n steps, dueling streams, the mixed Monte Carlo target of Bellemare et al. 2016."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from agents.api import Decision, Metrics
from agents.bonus import Bonus
from agents.capture import captured
from agents.half import fastest_torso
from agents.informed import Carry, InformedExploration, follow
from agents.nets import head
from agents.optimise import FlatOptimiser, Kind, working_dtype
from agents.replay import Batch, Replay
from agents.schedules import linear
from agents.stack import empty_stack, push_frame
from envs.api import Spec, Step, UserError
from generative.api import Simulator


class QNetwork(nn.Module):
    """uint8 (B, K, C, H, W) -> float32 (B, A).

    With `dueling` Q = V + advantage - its mean over actions (Wang et al. 2016, arXiv 1511.06581, equation 9); the streams part after the
    torso's hidden layer, the paper's before it.
    """

    def __init__(self, spec: Spec, stack_frames: int, dueling: bool, precision: str, device: torch.device) -> None:
        super().__init__()
        self.torso = fastest_torso(spec.obs_shape, stack_frames, precision, device)
        self.advantage = head(self.torso.features, spec.num_actions)
        self.value = head(self.torso.features, 1) if dueling else None

    def forward(self, frames: Tensor) -> Tensor:
        features = self.torso(frames)
        q = self.advantage(features)
        return q if self.value is None else self.value(features) + q - q.mean(1, keepdim=True)


def targets(
    reward: Tensor, discount: Tensor, next_q: Tensor, next_q_online: Tensor | None, whole_return: Tensor | None, eta: float
) -> Tensor:
    """What Q(frames, action) is drawn to: (1 - eta) (reward + discount * Q_target(next, best)) + eta * whole_return.

    `best` is the action that the target network likes best (Mnih et al. 2015) or, where the online network's values are given, that one
    does (van Hasselt et al. 2016, arXiv 1509.06461, equation 4). The Monte Carlo part is that of Bellemare et al. 2016, arXiv 1606.01868,
    section 5.1.

    Args:
        reward: float32 (B), of n steps.
        discount: float32 (B), of the value n steps later.
        next_q: float32 (B, A), of the target network.
        next_q_online: float32 (B, A), or None.
        whole_return: float32 (B), or None where eta is 0.
        eta: weight of the whole return.
    """
    best = (next_q if next_q_online is None else next_q_online).argmax(1, keepdim=True)
    target = reward + discount * next_q.gather(1, best).squeeze(1)
    return target if whole_return is None else torch.lerp(target, whole_return, eta)


class DQN:
    """Epsilon-greedy on a Q-network that learns from a replay, one update every `update_frames`.

    Kept from Mnih et al. 2015: network, replay, target network, clipped rewards, clipped TD errors (Huber), RMSProp with its centred second
    moment, epsilon from 1 to 0.1. Durations are in environment frames, as everywhere here: the paper's code counts agent steps of 4 frames,
    so its replay start of 50,000 is 200,000 frames, its million of exploration 4,000,000, its target period of 10,000 is 40,000 frames, its
    update every 4 steps is every 16 frames. Losses are averaged over the batch where that code adds them up; the optimiser's epsilon is
    0.01 / 32^2 instead of its 0.01, which makes both the same. Different from the paper: N environments play into one replay, and the
    weights start orthogonal.

    An episode's time limit and an iteration's cut are bootstrapped from their true successors; a lost life with discount 0 ends the return
    and not the stack. With `eta` a trace that was cut is closed by the target network's value as of that moment.

    With a bonus the reward that is learned from is the clipped one plus the bonus of the frame that it led to; the bonus is computed in
    `learn`, while the emulators work, before its step may be sampled.

    With a simulator an action that would have been random, those before learning starts among them, is the one that leads to what was seen
    least of late (`agents.informed`). The defaults of its three knobs are what Oh et al. (2015) give for most games, as far as is known:
    for Q*bert they have visit_frames 200, for Freeway visit_delta 0.

    Args:
        spec: of the environment.
        device: of network, replay (see Replay) and what is observed.
        bonus: intrinsic rewards, or None.
        bonus_scale: what they are multiplied with; 0.05 in Bellemare et al. 2016.
        simulator: foretells what each action shows, for informed exploration, or None for uniformly random actions.
        visit_frames: how many pictures of each lane's past it compares that with, and the two knobs that follow: see InformedExploration.
        capacity: frames that the replay holds, of all environments together.
        stack_frames: K.
        gamma: discount for one agent step.
        n_steps: of a target.
        double: whether the online network chooses the action that the target network values.
        dueling: whether the network has two streams.
        eta: weight of the episode's whole return in the target; with 0 nothing is kept of it.
        batch_size: transitions an update.
        learning_starts_frames: frames played at random before the first update.
        update_frames: frames between two updates.
        target_frames: frames between two copies of the network to the target network.
        epsilon_start: share of random actions until learning starts.
        epsilon_end: what it falls to.
        epsilon_frames: in a straight line, within so many frames.
        reward_clip: rewards are clipped to +- this, or None.
        error_clip: where the loss turns from square to straight (Huber), or None for square.
        optimiser: see FlatOptimiser, and the four knobs that follow.
        max_gradient_norm: longer gradients are scaled down to it, or None.
        precision: auto, float32, bfloat16, or float16 (see `agents.half.fastest_torso`).
        capture: whether updates are replayed as CUDA graphs (see `agents.capture.Captured`).
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        bonus: Bonus | None = None,
        bonus_scale: float = 0.05,
        simulator: Simulator | None = None,
        visit_frames: int = 20,
        visit_delta: int = 50,
        visit_sigma: float = 100.0,
        capacity: int = 1_000_000,
        stack_frames: int = 4,
        gamma: float = 0.99,
        n_steps: int = 1,
        double: bool = True,
        dueling: bool = False,
        eta: float = 0.0,
        batch_size: int = 32,
        learning_starts_frames: int = 200_000,
        update_frames: int = 16,
        target_frames: int = 40_000,
        epsilon_start: float = 1.0,
        epsilon_end: float = 0.1,
        epsilon_frames: int = 4_000_000,
        reward_clip: float | None = 1.0,
        error_clip: float | None = 1.0,
        optimiser: str = "rmsprop_centred",
        learning_rate: float = 2.5e-4,
        decay: float = 0.95,
        momentum: float = 0.9,
        optimiser_epsilon: float = 0.01 / 32**2,
        max_gradient_norm: float | None = None,
        precision: str = "auto",
        capture: bool = False,
    ) -> None:
        for name, share in (("gamma", gamma), ("eta", eta), ("epsilon_start", epsilon_start), ("epsilon_end", epsilon_end)):
            if not 0 <= share <= 1:
                raise UserError(f"agent.{name} must lie in [0, 1], got {share}")
        for name, least, count in (
            ("batch_size", 1, batch_size),
            ("update_frames", 1, update_frames),
            ("target_frames", 1, target_frames),
            ("learning_starts_frames", 0, learning_starts_frames),
            ("epsilon_frames", 0, epsilon_frames),
        ):
            if count < least:
                raise UserError(f"agent.{name} must be at least {least}, got {count}")
        if not 0 <= bonus_scale < math.inf:
            raise UserError(f"agent.bonus_scale must be 0 or more, got {bonus_scale}")
        for name, bound in (("reward_clip", reward_clip), ("error_clip", error_clip), ("max_gradient_norm", max_gradient_norm)):
            if bound is not None and not 0 < bound < math.inf:
                raise UserError(f"agent.{name} must be above 0, or null for none, got {bound}")
        self.replay = Replay(capacity, spec.obs_shape, spec.num_actions, stack_frames, n_steps, gamma, eta > 0, device)
        dtype = working_dtype(precision, device)
        self.online = QNetwork(spec, stack_frames, dueling, precision, device).to(device)
        self.target = copy.deepcopy(self.online).to(dtype).requires_grad_(False)
        self.optimiser = FlatOptimiser(
            self.online, cast(Kind, optimiser), learning_rate, decay, momentum, optimiser_epsilon, dtype, player="agent=dqn"
        )
        self.bonus, self._bonus_scale, self.frames = bonus, bonus_scale, 0
        knobs = visit_frames, visit_delta, visit_sigma
        self.informed = InformedExploration(simulator, spec, device, *knobs) if simulator is not None else None
        self._spec, self._device, self._stack_frames = spec, device, stack_frames
        self._double, self._eta, self._batch_size = double, eta, batch_size
        self._starts, self._every, self._target_every = learning_starts_frames, update_frames, target_frames
        self._epsilon = (epsilon_start, epsilon_end, epsilon_frames)
        self._reward_clip, self._error_clip, self._max_norm = reward_clip, error_clip, max_gradient_norm
        self._descend = captured(self._take_step, capture, device)
        self._due = learning_starts_frames + update_frames  # when the next update falls due
        self._seen: list[tuple[Step, Decision, Step]] = []

    def epsilon(self) -> float:
        """The share of random actions now."""
        start, end, frames = self._epsilon
        return linear(self.frames - self._starts, start, end, frames)

    def initial(self, num_envs: int) -> Tensor | Carry:
        if self.informed is not None:
            return self.informed.initial(num_envs, self._stack_frames)
        return empty_stack(num_envs, self._stack_frames, self._spec.obs_shape, self._device)

    def act(self, step: Step, carry: Tensor | Carry, explore: bool) -> Decision:
        if isinstance(carry, Carry):
            return self._act_informed(step, carry, explore)
        frames, stack = push_frame(carry, step.obs, step.last)
        lanes, epsilon = frames.shape[0], self.epsilon() if explore else 0.0
        if epsilon == 1:
            return Decision(torch.randint(self._spec.num_actions, (lanes,), device=self._device), stack, {})
        with torch.inference_mode():
            action = self.online(frames).argmax(1)
        if epsilon > 0:
            random = torch.randint(self._spec.num_actions, (lanes,), device=self._device)
            action = torch.where(torch.rand(lanes, device=self._device) < epsilon, random, action)
        return Decision(action.clone(), stack, {})

    def _act_informed(self, step: Step, carry: Carry, explore: bool) -> Decision:
        """As `act`. Which lanes explore is drawn on the host, so that nothing waits for the device and nothing is foretold for others."""
        assert self.informed is not None, "this carry is of an agent with a simulator"
        frames, stack = push_frame(carry.stack, step.obs, step.last)
        past, lanes, epsilon = follow(carry.past, carry.action, step), len(frames), self.epsilon() if explore else 0.0
        action, notes = torch.zeros(lanes, dtype=torch.int64, device=self._device), {}
        if epsilon < 1:
            with torch.inference_mode():
                best = self.online(frames).argmax(1)
            action = best.clone()
        rows = (torch.rand(lanes) < epsilon).nonzero().squeeze(1) if epsilon > 0 else torch.empty(0)
        if len(rows):
            rows = rows.to(self._device)
            chosen, counts = self.informed.choose(past, step, rows)
            unasked = torch.full((lanes, self._spec.num_actions), math.nan, dtype=counts.dtype, device=self._device)
            action, notes = action.index_copy(0, rows, chosen), {"visits": unasked.index_copy(0, rows, counts)}
        return Decision(action, Carry(stack, past, action), notes)

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        self._seen.append((step, decision, after))
        if self.informed is not None:
            self.informed.observe(step, decision.notes.get("visits"), after)
        self.frames += decision.action.shape[0] * self._spec.frames_per_step

    def learn(self) -> Metrics:
        metrics: dict[str, Tensor | float] = {}
        played = self.frames
        if self._remember() and self.bonus is not None:
            metrics |= self.bonus.metrics()
        if self.informed is not None:
            metrics |= self.informed.metrics()
        while self._due <= played:
            if len(self.replay):
                metrics |= self._update(self.replay.sample(self._batch_size))
            if self._due // self._target_every > (self._due - self._every) // self._target_every:
                self.sync()
            self._due += self._every
        if metrics:
            metrics |= {"train/epsilon": self.epsilon(), "train/updates": float(self.optimiser.updates)}
            metrics |= {"memory/entries": float(len(self.replay)), "memory/bytes": float(self.replay.nbytes)}
        return metrics

    def sync(self) -> None:
        """Copies the network to the target network."""
        for mine, theirs in zip(self.target.parameters(), self.online.parameters()):
            mine.copy_(theirs.detach())
        self.target.torso.refresh()

    def _remember(self) -> bool:
        """Writes to the replay what was observed since the last time, bonuses included. False where that was nothing."""
        seen, self._seen = self._seen, []
        for step, decision, after in seen:
            reward = after.reward if self._reward_clip is None else after.reward.clamp(-self._reward_clip, self._reward_clip)
            if self.bonus is not None:
                reward = reward + self._bonus_scale * self.bonus(after.next_obs)
            last = after.last if after.next_obs is not after.obs else None
            closing = self.replay.append(step.obs, decision.action, reward, after.discount, last, after.next_obs)
            if closing is not None:
                with torch.no_grad():
                    self.replay.close(self.target(self.replay.stacks(closing)).amax(1))
        return bool(seen)

    def _update(self, batch: Batch) -> Metrics:
        self.optimiser.begin()
        metrics = self._descend(batch)
        self.optimiser.finish()
        self.online.torso.refresh()
        return {**metrics}

    def _take_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step down the gradient: a function of tensors, nothing in it depends on their values; what may be captured."""
        with torch.no_grad():
            next_q = self.target(batch.next_frames)
            next_q_online = self.online(batch.next_frames) if self._double else None
            whole = batch.whole_return if self._eta > 0 else None
            target = targets(batch.reward, batch.discount, next_q, next_q_online, whole, self._eta)
        q = self.online(batch.frames).gather(1, batch.action.unsqueeze(1)).squeeze(1)
        loss = self.loss(q, target)
        norm = self.optimiser.descend(loss, self._max_norm)
        return {"train/loss": loss.detach(), "train/q_mean": q.detach().mean(), "train/gradient_norm": norm}

    def loss(self, q: Tensor, target: Tensor) -> Tensor:
        """Half the square of the TD errors (B), straight beyond error_clip with slope error_clip, averaged."""
        if self._error_clip is None:
            return 0.5 * nn.functional.mse_loss(q, target)
        return nn.functional.huber_loss(q, target, delta=self._error_clip)

    def required_bytes(self, steps: int) -> int:
        """Replay, networks, optimiser, bonus and simulator. What does not fit on a GPU beside the networks lies in the host's memory."""
        networks = sum(parameter.numel() for parameter in self.online.parameters()) * 24 if steps else 0
        beside = self.bonus.required_bytes(steps) if self.bonus is not None else 0
        beside += self.informed.required_bytes() if self.informed is not None else 0
        return self.replay.required_bytes(steps) + networks + beside

    def lane_bytes(self, num_envs: int) -> int:
        """What the agent remembers of so many lanes besides."""
        return self.informed.lane_bytes(num_envs) if self.informed is not None else 0

    def state_dict(self) -> dict[str, Any]:
        self._remember()
        state = {"frames": self.frames, "due": self._due, "online": self.optimiser.state_dict(), "replay": self.replay.state_dict()}
        state["target"] = {str(place): parameter.detach() for place, parameter in enumerate(self.target.parameters())}
        parts = {"bonus": self.bonus, "informed": self.informed}
        return state | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load_state_dict(state["online"])
        for place, parameter in enumerate(self.target.parameters()):
            parameter.copy_(state["target"][str(place)])
        for network in (self.online, self.target):
            network.torso.refresh()
        self.replay.load_state_dict(state["replay"])
        if self.bonus is not None:
            self.bonus.load_state_dict(state["bonus"])
        if self.informed is not None:
            self.informed.load_state_dict(state["informed"])
        self.frames, self._due = state["frames"], state["due"]
        self._seen = []

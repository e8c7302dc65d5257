"""Advantage actor-critic (A3C, Mnih et al. 2016, arXiv 1602.01783), its workers the lanes of one batch; with a bonus, A3C+."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from agents.api import Decision, Metrics
from agents.bonus import Bonus
from agents.capture import captured
from agents.half import fastest_torso
from agents.nets import Recurrent, head
from agents.optimise import FlatOptimiser, Kind, working_dtype
from agents.planned import Course, Planned, course_metrics
from agents.returns import advantages
from agents.rollout import Batch, Carry, Rollout, Successor
from agents.schedules import linear
from agents.stack import empty_stack, push_frame
from envs.api import Spec, Step, UserError
from generative.api import Planner

POLICY_GAIN = 0.01  # logits start near 0, so play starts uniform


class Latest(NamedTuple):
    """The state that was acted on last, and its value float32 (N).

    A memo, which changes nothing: who asks for the value of the very same tensors gets it without another look.
    """

    obs: Tensor
    carry: Carry
    value: Tensor


class Output(NamedTuple):
    """What the network makes of T steps of N lanes: logits float32 (T, N, A), value (T, N), the state after, and the course of plans."""

    logits: Tensor
    value: Tensor
    state: Tensor
    course: Course | None = None


class PolicyAndValue(nn.Module):
    """Torso, an optional recurrent core, and two heads: logits and value. The logits of a planner take the place of a head's."""

    def __init__(
        self, spec: Spec, stack_frames: int, recurrent: str, precision: str, device: torch.device, planner: Planner | None = None
    ) -> None:
        super().__init__()
        self.torso = fastest_torso(spec.obs_shape, stack_frames, precision, device)
        features = self.torso.features
        self.core = Recurrent(recurrent, features) if recurrent != "none" else None
        if self.core is not None:
            features = self.core.units
        self.policy = head(features, spec.num_actions, POLICY_GAIN) if planner is None else Planned(planner, features)
        self.value = head(features, 1)

    def initial(self, lanes: int, device: torch.device) -> Tensor:
        """The state before an episode's first frame, float32: zeros (N, S, D) of a recurrent core, or an empty plan (N, ...)."""
        if isinstance(self.policy, Planned):
            return self.policy.planner.start(lanes)
        rows, units = (self.core.rows, self.core.units) if self.core is not None else (0, 1)
        return torch.zeros(lanes, rows, units, device=device)

    def forward(self, features: Tensor, opens: Tensor, state: Tensor, noise: Tensor | None = None) -> Output:
        """The torso's features (T * N, D), bool (T, N), float32 (N, ...), a planner's draws (T, N, ...) or None for new ones -> Output."""
        features, state = self.remember(features, opens, state)
        value = self.value(features).view(opens.shape)
        if isinstance(self.policy, Planned):
            course = self.policy(features.unflatten(0, opens.shape), opens, state, noise)
            return Output(course.logits, value, course.plan, course)
        return Output(self.policy(features).unflatten(0, opens.shape), value, state)

    def remember(self, features: Tensor, opens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """The features (T * N, D) that the heads see, after the recurrent core where there is one, and its state (N, S, D)."""
        if self.core is None:
            return features, state
        outputs, state = self.core(features.unflatten(0, opens.shape), state, opens)
        return outputs.flatten(0, 1), state


class ActorCritic:
    """Every `n_steps` steps of all lanes, one step down the gradient of policy loss + value_cost * value loss - entropy_cost * entropy.

    Kept from Mnih et al. 2016: n-step returns, RMSProp, entropy bonus, optional LSTM of 256 units, clipped rewards, and a policy that is
    sampled also when it is evaluated. As in the A2C baselines, and different from the paper: N lanes in one batch step together instead of
    workers that write into shared parameters, the network of Mnih et al. 2015 with orthogonal weights, a gradient clipped to norm 0.5,
    losses averaged.
    The first action of a rollout is taken with the policy one update back, because learning takes place while the emulators play that
    action (`agents.loop`); A3C's own workers are further behind.

    An episode cut by a time limit or at an iteration's end is bootstrapped with the value of its true successor, read with the lane's own
    memory; a termination and a lost life with nothing.

    With a planner (Vezhnevets et al. 2016, arXiv 1606.04695) the logits are its own, its plan is what a lane remembers, and its cost joins
    the loss. A rollout is walked again with the draws that were noted, so gradients flow through the plans to its first step, and
    no further; the value is read from the features, also while a plan is followed. Our own is `plan_cost_frames`: in trials on
    GridMaze, agents that paid in full from the start learned later and scored less.

    With a bonus the reward that is learned from is the clipped one plus `bonus_scale` times the bonus of the frame that it led to
    (Bellemare et al. 2016, arXiv 1606.01868, section 5.2: A3C+); frames are absorbed in `learn`, while the emulators work.

    Args:
        spec: of the environment.
        device: of the network and of what is observed.
        bonus: intrinsic rewards, or None.
        planner: of macro-actions, or None. It takes no recurrent core beside it.
        stack_frames: K.
        recurrent: none, lstm or gru.
        gamma: discount for one agent step.
        n_steps: of a rollout.
        gae_lambda: of generalised advantage estimation; 1 gives n-step returns.
        entropy_cost: weight of the entropy.
        value_cost: weight of the squared error of values; 0.25 are the paper's halves of halves.
        reward_clip: rewards are clipped to +- this, or None.
        bonus_scale: beta; 0.01 for A3C+.
        optimiser: see FlatOptimiser, and the four knobs that follow.
        learning_rate_frames: environment frames within which the learning rate falls to 0 in a straight line, or None for a constant one.
        plan_cost_frames: environment frames within which what a planner's cost weighs rises from 0 to 1 in a straight line, or None for 1.
        max_gradient_norm: longer gradients are scaled down to it, or None.
        precision: auto, float32, bfloat16, or float16 (see `agents.half.fastest_torso`).
        capture: whether updates are replayed as CUDA graphs (see `agents.capture.Captured`).
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        bonus: Bonus | None = None,
        planner: Planner | None = None,
        stack_frames: int = 4,
        recurrent: str = "none",
        gamma: float = 0.99,
        n_steps: int = 5,
        gae_lambda: float = 1.0,
        entropy_cost: float = 0.01,
        value_cost: float = 0.5,
        reward_clip: float | None = 1.0,
        bonus_scale: float = 0.01,
        optimiser: str = "rmsprop",
        learning_rate: float = 7e-4,
        decay: float = 0.99,
        momentum: float = 0.9,
        optimiser_epsilon: float = 1e-5,
        learning_rate_frames: int | None = None,
        plan_cost_frames: int | None = None,
        max_gradient_norm: float | None = 0.5,
        precision: str = "auto",
        capture: bool = False,
    ) -> None:
        for name, share in (("gamma", gamma), ("gae_lambda", gae_lambda)):
            if not 0 <= share <= 1:
                raise UserError(f"agent.{name} must lie in [0, 1], got {share}")
        periods = {"learning_rate_frames": learning_rate_frames, "plan_cost_frames": plan_cost_frames}
        for name, count in {"n_steps": n_steps, "stack_frames": stack_frames, **periods}.items():
            if count is not None and count < 1:
                raise UserError(f"agent.{name} must be at least 1, got {count}")
        for name, cost in (("entropy_cost", entropy_cost), ("value_cost", value_cost), ("bonus_scale", bonus_scale)):
            if not 0 <= cost < math.inf:
                raise UserError(f"agent.{name} must be 0 or more, got {cost}")
        for name, bound in (("reward_clip", reward_clip), ("max_gradient_norm", max_gradient_norm)):
            if bound is not None and not 0 < bound < math.inf:
                raise UserError(f"agent.{name} must be above 0, or null for none, got {bound}")
        if recurrent not in ("none", "lstm", "gru"):
            raise UserError(f"agent.recurrent is one of none, lstm, gru, got {recurrent}")
        if planner is not None and recurrent != "none":
            raise UserError(f"agent.recurrent={recurrent}: with planner= a lane remembers its plan alone; leave one of the two out")
        if planner is None and plan_cost_frames is not None:
            raise UserError(f"agent.plan_cost_frames={plan_cost_frames} says when plans cost; it needs planner=")
        dtype = working_dtype(precision, device)
        self.network = PolicyAndValue(spec, stack_frames, recurrent, precision, device, planner).to(device)
        kind = cast(Kind, optimiser)
        self.optimiser = FlatOptimiser(self.network, kind, learning_rate, decay, momentum, optimiser_epsilon, dtype, player="agent=a3c")
        self.bonus, self.frames = bonus, 0
        self._spec, self._device, self._stack_frames = spec, device, stack_frames
        self._gamma, self._trace = gamma, gae_lambda
        self._entropy_cost, self._value_cost, self._bonus_scale = entropy_cost, value_cost, bonus_scale
        self._reward_clip, self._max_norm, self._learning_rate_frames = reward_clip, max_gradient_norm, learning_rate_frames
        self._plan_cost_frames, self._plan_weight = plan_cost_frames, torch.ones((), device=device)
        self._descend = captured(self._take_step, capture, device)
        self._rollout = Rollout(n_steps)
        self._fresh: list[Tensor] = []
        self._latest: Latest | None = None

    def learning_rate(self) -> float:
        """The learning rate now."""
        start = self.optimiser.learning_rate
        return start if self._learning_rate_frames is None else linear(self.frames, start, 0.0, self._learning_rate_frames)

    def initial(self, num_envs: int) -> Carry:
        stack = empty_stack(num_envs, self._stack_frames, self._spec.obs_shape, self._device)
        return Carry(stack, self.network.initial(num_envs, self._device))

    def act(self, step: Step, carry: Carry, explore: bool) -> Decision:
        with torch.no_grad():
            frames, stack = push_frame(carry.stack, step.obs, step.last)
            seen = self.network.torso.look(frames)
            out = self.network(seen["features"], step.last.unsqueeze(0), carry.state)
            noise = torch.empty_like(out.logits[0]).exponential_()
            action = (out.logits[0] - noise.log_()).argmax(1)  # a sample of softmax(logits), by the Gumbel trick
        self._latest = Latest(step.obs, carry, out.value[0])
        notes = {**seen, **carry._asdict()} if out.course is None else {**seen, **carry._asdict(), "plan_noise": out.course.noise[0]}
        return Decision(action, Carry(stack, out.state), notes if explore else {})

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        self._rollout.append(step, decision, after)
        self.frames += decision.action.shape[0] * self._spec.frames_per_step
        if self.bonus is not None:
            self._fresh.append(after.next_obs)

    def learn(self) -> Metrics:
        if self.bonus is not None:
            for frames in self._fresh:
                self._rollout.add_bonus(self.bonus(frames))
            self._fresh = []
        if not self._rollout.full:
            return {}
        batch = self._rollout.take()
        metrics = self._update(batch, self.learning_rate())
        return metrics if self.bonus is None else {**metrics, **self.bonus.metrics(), "train/bonus": self._bonus_scale * batch.bonus.mean()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of a batch, and its parts.

        What acting saw is not looked at again but for the first step, which was decided on with the parameters one update back.
        """
        return self._loss(self._valued(batch))

    def _loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch whose known successors are valued: a function of tensors, nothing in it depends on their values."""
        torso, lanes = self.network.torso, batch.frames.shape[0]
        unknown = [successor for successor in batch.successors if successor.value is None]
        goes_on = torch.zeros_like(batch.opens[0])
        stacks = [push_frame(successor.carry.stack, successor.obs, goes_on)[0] for successor in unknown]
        looked = torso.look(torch.cat([batch.frames, *stacks]))
        next_value = self._next_value(batch, unknown, looked["features"][lanes:])
        seen = {name: torch.cat([part[:lanes], *(notes[name] for notes in batch.notes)]) for name, part in looked.items()}
        logits, value, _, course = self.network(torso.recall(seen), batch.opens, batch.state, batch.plan_noise)
        reward = batch.reward if self._reward_clip is None else batch.reward.clamp(-self._reward_clip, self._reward_clip)
        if self.bonus is not None:
            reward = reward + self._bonus_scale * batch.bonus
        advantage = advantages(reward, batch.discount, batch.last, value.detach(), next_value, self._gamma, self._trace)
        log_policy = logits.log_softmax(-1)
        policy_loss = -(log_policy.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1) * advantage).mean()
        value_loss = nn.functional.mse_loss(value, advantage + value.detach())
        entropy = -(log_policy.exp() * log_policy).sum(-1).mean()
        loss = policy_loss + self._value_cost * value_loss - self._entropy_cost * entropy
        parts = {"train/policy_loss": policy_loss, "train/value_loss": value_loss, "train/entropy": entropy, "train/value": value.mean()}
        if course is not None:
            loss = loss + self._plan_weight * course.cost.mean()
            parts |= course_metrics(course)
        return loss, {name: part.detach() for name, part in parts.items()}

    def _valued(self, batch: Batch) -> Batch:
        """The batch with the value of that successor, if any, that acting has just valued, with the present parameters."""
        latest = self._latest
        if latest is None:
            return batch
        known = [s.shown and latest.obs is s.obs and latest.carry is s.carry for s in batch.successors]
        return batch._replace(successors=[s._replace(value=latest.value) if is_it else s for s, is_it in zip(batch.successors, known)])

    @torch.no_grad()
    def _next_value(self, batch: Batch, unknown: list[Successor], features: Tensor) -> Tensor:
        """V(next_obs) float32 (T, N); zeros in rows where nobody asks for it. Of those unknown, from the torso's features (len * N, D)."""
        next_value = torch.zeros_like(batch.reward)
        for successor in batch.successors:
            if successor.value is not None:
                next_value[successor.t] = successor.value
        if unknown:
            goes_on = torch.zeros(1, features.shape[0], dtype=torch.bool, device=features.device)
            features, _ = self.network.remember(features, goes_on, torch.cat([successor.carry.state for successor in unknown]))
            for successor, row in zip(unknown, self.network.value(features).view(len(unknown), -1)):
                next_value[successor.t] = row
        return next_value

    def _update(self, batch: Batch, learning_rate: float) -> dict[str, Tensor | float]:
        self.optimiser.begin(learning_rate)
        if self._plan_cost_frames is not None:
            self._plan_weight.fill_(linear(self.frames, 0.0, 1.0, self._plan_cost_frames))
        metrics = self._descend(self._valued(batch))
        self.optimiser.finish()
        self.network.torso.refresh()
        self._latest = None
        return {**metrics, "train/learning_rate": learning_rate, "train/updates": float(self.optimiser.updates)}

    def _take_step(self, batch: Batch) -> dict[str, Tensor]:
        """One step down the gradient of a batch whose known successors are valued; what may be captured."""
        loss, parts = self._loss(batch)
        return {**parts, "train/gradient_norm": self.optimiser.descend(loss, self._max_norm)}

    def required_bytes(self, steps: int) -> int:
        """Network, optimiser and bonus. A rollout is not counted: see `rollout_bytes`."""
        network = 16 * self.optimiser.master.numel() if steps else 0
        return network + (self.bonus.required_bytes(steps) if self.bonus is not None else 0)

    def rollout_bytes(self, num_envs: int) -> int:
        """An upper bound of what a rollout of so many lanes holds of a planner's plans; its few frames are not counted."""
        policy = self.network.policy
        return policy.planner.required_bytes(num_envs * self._rollout.length) if isinstance(policy, Planned) else 0

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"frames": self.frames, "optimiser": self.optimiser.state_dict()}
        return state | ({"bonus": self.bonus.state_dict()} if self.bonus is not None else {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load_state_dict(state["optimiser"])
        if self.bonus is not None:
            self.bonus.load_state_dict(state["bonus"])
        self.frames = state["frames"]
        self._rollout = Rollout(self._rollout.length)
        self._fresh = []
        self.network.torso.refresh()
        self._latest = None

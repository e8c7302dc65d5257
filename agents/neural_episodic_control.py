"""Neural episodic control (Pritzel et al. 2017, arXiv 1703.01988): a learned key, and a dictionary an action from keys to values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.api import Decision, Metrics
from agents.dictionary import Dictionaries, Reading, kernel_read
from agents.half import fastest_torso
from agents.hashing import FrameHash
from agents.nets import head
from agents.optimise import FlatOptimiser, working_dtype
from agents.replay import Batch, Replay
from agents.returns import returns
from agents.schedules import linear
from agents.stack import empty_stack, push_frame
from envs.api import Spec, Step, UserError

MOST_LANES = 64  # for which the steps that wait for their targets are counted in what is announced


class KeyNetwork(nn.Module):
    """uint8 (B, K, C, H, W) -> float32 (B, D), the key: the torso of Mnih et al. 2015 and a linear layer."""

    def __init__(self, spec: Spec, stack_frames: int, key_size: int, precision: str, device: torch.device) -> None:
        super().__init__()
        self.torso = fastest_torso(spec.obs_shape, stack_frames, precision, device)
        self.key = head(self.torso.features, key_size)

    def forward(self, frames: Tensor) -> Tensor:
        key: Tensor = self.key(self.torso(frames))
        return key


class Lived(NamedTuple):
    """One step of N lanes that waits for its target.

    Attributes:
        obs: uint8 (N, C, H, W), what was acted on.
        next_obs: uint8 (N, C, H, W), the true successor.
        action: int64 (N).
        key: float32 (N, D), as it was when the step was decided.
        hash: int64 (N), of the stack.
        value: float32 (N), max_a Q(obs, a) when the step was decided.
        reward: float32 (N).
        discount: float32 (N).
        last: bool (N).
        closing: float32 (N), max_a Q(next_obs, a) where the trace is cut and may be bootstrapped, else 0.
    """

    obs: Tensor
    next_obs: Tensor
    action: Tensor
    key: Tensor
    hash: Tensor
    value: Tensor
    reward: Tensor
    discount: Tensor
    last: Tensor
    closing: Tensor


def window_returns(steps: list[Lived], value: Tensor | None, gamma: float) -> Tensor:
    """The returns of each of T steps to their end, bootstrapped from `value` beyond it (equation 3): the first is a T-step return.

    By the rule of `agents.returns.returns`: a lost life ends the return, a cut trace is closed by the value of its true successor.

    Args:
        steps: T of them, in order.
        value: float32 (N), max_a Q of the state that follows the last step; None where every lane ends there.

    Returns:
        float32 (T, N).
    """
    reward, discount, last, closing = (
        torch.stack([getattr(step, name) for step in steps]) for name in ("reward", "discount", "last", "closing")
    )
    if value is not None:
        closing[-1] = torch.where(last[-1], closing[-1], value)
    return returns(reward.double(), discount, last, closing, gamma).float()


class NeuralEpisodicControl:
    """Epsilon-greedy on dictionaries from learned keys to N-step returns, which are written at once and learned from a replay.

    Kept from the paper: dictionaries, kernel and its p neighbours, N-step Q targets with the values as of when they were acted on
    (equation 3), tabular updates (equation 4), one replay of (state, action, target), L2 loss into network, keys and values by RMSProp, raw
    rewards (algorithm 1). `agents.dictionary` says how the dictionaries differ. Different from the paper: N environments share the memory,
    and a step is written N steps later for all lanes alike, or when all lanes end at once. The halves of the squared errors are averaged
    over the batch.

    While any dictionary is empty its value is 0 and all actions are drawn at random, exploring or not. Ties are broken at random. An
    episode's time limit and an iteration's cut are bootstrapped from their true successors; a lost life with discount 0 ends the return
    and not the stack.

    Args:
        spec: of the environment.
        device: of network, dictionaries, replay (see Replay) and what is observed.
        capacity: entries an action.
        k: neighbours that a value is read from, the paper's p.
        key_size: D.
        delta: of the kernel.
        alpha: of the tabular update.
        gamma: discount for one agent step.
        n_steps: N, of a target.
        stack_frames: K.
        epsilon_start: share of random actions at first.
        epsilon_end: what it falls to.
        epsilon_frames: in a straight line, within so many frames.
        replay_capacity: frames that the replay holds, of all environments together.
        batch_size: states an update.
        learning_starts_frames: frames before the first update of network, keys and values. Dictionaries are written from the first on.
        update_frames: frames between two updates.
        learning_rate: RMSProp's, and the two knobs that follow (see FlatOptimiser), of network, keys and values. Small, because frames are
            looked for among keys that were written long ago: at 1e-4 all keys of Pong moved together, far from those, until every frame had
            the same neighbours and one value.
        max_gradient_norm: longer gradients of the network are scaled down to it, or None.
        precision: auto, float32, bfloat16, or float16 (see `agents.half.fastest_torso`).
        search: nearest-neighbour backend.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        capacity: int = 500_000,
        k: int = 50,
        key_size: int = 64,
        delta: float = 1e-3,
        alpha: float = 0.1,
        gamma: float = 0.99,
        n_steps: int = 100,
        stack_frames: int = 4,
        epsilon_start: float = 1.0,
        epsilon_end: float = 0.001,
        epsilon_frames: int = 100_000,
        replay_capacity: int = 100_000,
        batch_size: int = 32,
        learning_starts_frames: int = 200_000,
        update_frames: int = 16,
        learning_rate: float = 8e-6,
        decay: float = 0.95,
        optimiser_epsilon: float = 0.1,
        max_gradient_norm: float | None = None,
        precision: str = "auto",
        search: str = "auto",
    ) -> None:
        for name, share in (("gamma", gamma), ("epsilon_start", epsilon_start), ("epsilon_end", epsilon_end)):
            if not 0 <= share <= 1:
                raise UserError(f"agent.{name} must lie in [0, 1], got {share}")
        for name, least, count in (
            ("key_size", 1, key_size),
            ("n_steps", 1, n_steps),
            ("batch_size", 1, batch_size),
            ("update_frames", 1, update_frames),
            ("learning_starts_frames", 0, learning_starts_frames),
            ("epsilon_frames", 0, epsilon_frames),
        ):
            if count < least:
                raise UserError(f"agent.{name} must be at least {least}, got {count}")
        if max_gradient_norm is not None and not 0 < max_gradient_norm < math.inf:
            raise UserError(f"agent.max_gradient_norm must be above 0, or null for none, got {max_gradient_norm}")
        self.memory = Dictionaries(spec.num_actions, key_size, capacity, k, delta, alpha, device, search)
        # A step comes to the replay with its target as its reward and discount 0, so the replay itself has one step to look ahead.
        self.replay = Replay(
            replay_capacity, spec.obs_shape, spec.num_actions, stack_frames, 1, gamma, False, device, "agent.replay_capacity"
        )
        dtype = working_dtype(precision, device)
        self.network = KeyNetwork(spec, stack_frames, key_size, precision, device).to(device)
        self.optimiser = FlatOptimiser(
            self.network, "rmsprop", learning_rate, decay, epsilon=optimiser_epsilon, dtype=dtype, player="agent=neural_episodic_control"
        )
        self.frames = 0
        self._spec, self._device, self._stack_frames, self._batch_size = spec, device, stack_frames, batch_size
        self._gamma, self._n_steps, self._epsilon = gamma, n_steps, (epsilon_start, epsilon_end, epsilon_frames)
        self._every, self._rule, self._max_norm = update_frames, (learning_rate, decay, optimiser_epsilon), max_gradient_norm
        self._hash = FrameHash(stack_frames * math.prod(spec.obs_shape), device)
        self._due = learning_starts_frames + update_frames  # when the next update falls due
        self._waiting: list[Lived] = []
        self._all_ended = False  # with the last of those that wait

    def epsilon(self) -> float:
        """The share of random actions now."""
        start, end, frames = self._epsilon
        return linear(self.frames, start, end, frames)

    def initial(self, num_envs: int) -> Tensor:
        return empty_stack(num_envs, self._stack_frames, self._spec.obs_shape, self._device)

    def act(self, step: Step, carry: Tensor, explore: bool) -> Decision:
        frames, stack = push_frame(carry, step.obs, step.last)
        key, read = self._look(frames)
        lanes = frames.shape[0]
        best = read.value == read.value.amax(1, keepdim=True)
        action = torch.where(best, torch.rand(best.shape, device=self._device), -1.0).argmax(1)
        epsilon = 1.0 if min(self.memory.sizes) == 0 else self.epsilon() if explore else 0.0
        if epsilon > 0:
            random = torch.randint(self._spec.num_actions, (lanes,), device=self._device)
            action = torch.where(torch.rand(lanes, device=self._device) < epsilon, random, action)
        notes = {"key": key, "hash": self._hash(frames), "rows": read.rows, "value": read.value.amax(1)}
        return Decision(action, stack, notes)

    @torch.no_grad()
    def _look(self, frames: Tensor) -> tuple[Tensor, Reading]:
        """The keys of stacks uint8 (B, K, C, H, W), and what is read there."""
        key = self.network(frames)
        return key, self.memory.estimate(key)

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        notes, closing = decision.notes, torch.zeros_like(after.reward)
        self.memory.touch(notes["rows"])
        self._all_ended = False
        if after.next_obs is not after.obs:
            self._all_ended = bool(after.last.all())
            lanes = (after.last & (after.discount > 0)).nonzero().squeeze(1)
            if lanes.shape[0]:
                goes_on = torch.zeros_like(lanes, dtype=torch.bool)
                frames, _ = push_frame(decision.carry[lanes], after.next_obs[lanes], goes_on)
                _, read = self._look(frames)
                self.memory.touch(read.rows)
                closing[lanes] = read.value.amax(1)
        outcome = (after.reward, after.discount, after.last, closing)
        self._waiting.append(Lived(step.obs, after.next_obs, decision.action, notes["key"], notes["hash"], notes["value"], *outcome))
        self.frames += decision.action.shape[0] * self._spec.frames_per_step

    def learn(self) -> Metrics:
        metrics: dict[str, Tensor | float] = {}
        played = self.frames
        if self._settle():
            sizes = {f"memory/entries_{name.lower()}": float(size) for name, size in zip(self._spec.action_names, self.memory.sizes)}
            metrics |= {"memory/entries": float(len(self.memory)), **sizes}
            metrics |= {"memory/bytes": float(self.memory.nbytes + self.replay.nbytes), "train/epsilon": self.epsilon()}
        while self._due <= played:
            if len(self.replay):
                metrics |= self._update(self.replay.sample(self._batch_size))
                metrics["train/updates"] = float(self.optimiser.updates)
            self._due += self._every
        return metrics

    def _settle(self) -> bool:
        """Writes the steps whose targets are known, to the dictionaries and to the replay. False where there are none."""
        waiting, before = self._waiting, len(self._waiting)
        while len(waiting) > self._n_steps:
            target = window_returns(waiting[: self._n_steps], waiting[self._n_steps].value, self._gamma)
            self._write(waiting.pop(0), target[0])
        if waiting and self._all_ended:
            for step, target in zip(waiting, window_returns(waiting, None, self._gamma)):
                self._write(step, target)
            waiting.clear()
        return len(waiting) < before

    def _write(self, step: Lived, target: Tensor) -> None:
        self.memory.write(step.action, step.key, step.hash, target)
        self.replay.append(step.obs, step.action, target, torch.zeros_like(target), step.last, step.next_obs)

    def _update(self, batch: Batch) -> dict[str, Tensor | float]:
        """One step down the gradient of the loss between what is read at the batch's states and their targets."""
        actions, each = batch.action, torch.arange(batch.action.shape[0], device=self._device)
        self.optimiser.begin()
        keys = self.network(batch.frames)
        wanted = nn.functional.one_hot(actions, self._spec.num_actions).bool()
        rows = self.memory.nearest(keys.detach(), wanted)
        mine = rows[each, actions]
        near = self.memory.near(actions, mine)
        query, of_near = keys.detach().requires_grad_(), (near.keys.requires_grad_(), near.values.requires_grad_())
        q = kernel_read(query, near, self.memory.delta)
        loss = 0.5 * nn.functional.mse_loss(q, batch.reward)
        of_query, of_keys, of_values = torch.autograd.grad(loss, (query, *of_near))
        norm = self.optimiser.descend((keys * of_query).sum(), self._max_norm)  # whose gradient is the loss's
        self.optimiser.finish()
        self.network.torso.refresh()
        self.memory.descend(actions, mine, (of_keys, of_values), *self._rule)
        self.memory.touch(rows)
        keys, q = keys.detach(), q.detach()
        seen = {"train/q_mean": q.mean(), "train/q_std": q.std(correction=0)}  # keys that fall together give every state one value
        seen |= {"train/key_norm": keys.norm(dim=1).mean(), "train/key_std": keys.std(0, correction=0).norm()}
        return {"train/loss": loss.detach(), **seen, "train/gradient_norm": norm}

    def required_bytes(self, steps: int) -> int:
        """Dictionaries, replay, network, optimiser, and the frames of the steps that wait for their targets."""
        network = sum(parameter.numel() for parameter in self.network.parameters()) * 24 if steps else 0
        waiting = min(steps, (self._n_steps + 1) * MOST_LANES) * (2 * math.prod(self._spec.obs_shape) + 4 * self.memory.dims + 64)
        return self.memory.required_bytes(steps) + self.replay.required_bytes(steps) + network + waiting

    def state_dict(self) -> dict[str, Any]:
        waiting = {name: torch.stack(column) for name, column in zip(Lived._fields, zip(*self._waiting))}
        state = {"frames": self.frames, "due": self._due, "waiting": waiting, "all_ended": self._all_ended}
        return state | {"network": self.optimiser.state_dict(), "memory": self.memory.state_dict(), "replay": self.replay.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.optimiser.load_state_dict(state["network"])
        self.network.torso.refresh()
        self.memory.load_state_dict(state["memory"])
        self.replay.load_state_dict(state["replay"])
        self.frames, self._due, self._all_ended = state["frames"], state["due"], state["all_ended"]
        columns = [state["waiting"][name].to(self._device) for name in Lived._fields] if state["waiting"] else []
        self._waiting = [Lived(*row) for row in zip(*columns)]

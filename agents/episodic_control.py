"""Model-free episodic control (Blundell et al. 2016, arXiv 1606.04460): act by the best return ever had from here or near here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.api import Decision, Metrics
from agents.episode import OpenEpisodes
from agents.hashing import FrameHash
from agents.neighbours import Neighbours
from agents.returns import returns
from agents.stack import empty_stack, push_frame
from envs.api import Spec, Step, UserError
from generative.api import Encoder

HIT_RATE_LOOKUPS = 10_000


class Carry(NamedTuple):
    """What a lane remembers of the K - 1 frames before: uint8 (N, K - 1, C, H, W) pixels, and their features float32 (N, K - 1, D)."""

    stack: Tensor
    features: Tensor


class EpisodicControl:
    """MFEC: one table of (key, best return) an action, whole episodes written backwards when they end.

    Kept from the paper: the update (equation 1: a value is the largest return), the estimate (equation 2: exact match, else
    the plain mean of the k nearest), raw rewards, constant epsilon, least-recently-used eviction. Where the paper is silent:
    an action with fewer than k entries is tried first, ties are broken at random, "used" means read as a neighbour or an
    exact match, or written. Different from the paper: N environments share the tables.

    An episode that is cut (by a time limit, or at an iteration's end) has no known return and is dropped. A lost life with
    discount 0 ends the return there, not the episode.

    Args:
        spec: of the environment.
        device: of the tables and of what is looked up.
        encoder: maps a frame to D features.
        capacity: entries an action.
        k: neighbours that an estimate averages.
        gamma: discount for one agent step.
        epsilon: share of uniformly random actions while exploring.
        key_frames: K, the frames that a key joins; 1 in the paper.
        search: nearest-neighbour backend.
    """

    def __init__(
        self,
        spec: Spec,
        device: torch.device,
        encoder: Encoder,
        capacity: int = 1_000_000,
        k: int = 11,
        gamma: float = 1.0,
        epsilon: float = 0.005,
        key_frames: int = 1,
        search: str = "auto",
    ) -> None:
        if not 0 <= gamma <= 1:
            raise UserError(f"agent.gamma must lie in [0, 1], got {gamma}")
        if not 0 <= epsilon <= 1:
            raise UserError(f"agent.epsilon must lie in [0, 1], got {epsilon}")
        if key_frames < 1:
            raise UserError(f"agent.key_frames must be at least 1, got {key_frames}")
        self.encoder = encoder
        self.memory = Neighbours(spec.num_actions, key_frames * encoder.features, capacity, k, device, search)
        self._spec, self._device = spec, device
        self._gamma, self._epsilon, self._key_frames = gamma, epsilon, key_frames
        channels, height, width = spec.obs_shape
        self._hash = FrameHash(key_frames * channels * height * width, device)
        self._open = OpenEpisodes()
        self._finished: list[dict[str, Tensor]] = []
        self._exact = torch.zeros((), dtype=torch.int64, device=device)
        self._lookups = 0
        self._exact_rate: Tensor | float = 0.0

    def initial(self, num_envs: int) -> Carry:
        features = torch.zeros(num_envs, self._key_frames - 1, self.encoder.features, device=self._device)
        return Carry(empty_stack(num_envs, self._key_frames, self._spec.obs_shape, self._device), features)

    def act(self, step: Step, carry: Carry, explore: bool) -> Decision:
        frames, stack = push_frame(carry.stack, step.obs, step.last)
        features = self._features(step, carry)
        carry, lanes = Carry(stack, features[:, 1:]), frames.shape[0]
        keys, hashes = features.flatten(1), self._hash(frames)
        value, exact, rows = self.memory.estimate(keys, hashes)
        best = value == value.amax(1, keepdim=True)
        action = torch.where(best, torch.rand(value.shape, device=self._device), -1.0).argmax(1)
        if explore:
            random = torch.randint(self._spec.num_actions, (lanes,), device=self._device)
            action = torch.where(torch.rand(lanes, device=self._device) < self._epsilon, random, action)
        return Decision(action, carry, {"key": keys, "hash": hashes, "rows": rows, "exact": exact})

    def _features(self, step: Step, carry: Carry) -> Tensor:
        """Features float32 (N, K, D) of the K frames of a key; each frame is encoded once, when it is new."""
        present = self.encoder.encode(step.obs).unsqueeze(1)
        if self._key_frames == 1:
            return present
        blank = self.encoder.encode(torch.zeros_like(step.obs[:1]))  # what stands before an episode's first frame
        return torch.cat([torch.where(step.last.view(-1, 1, 1), blank, carry.features), present], dim=1)

    def observe(self, step: Step, decision: Decision, after: Step) -> None:
        notes = decision.notes
        self.memory.touch(notes["rows"])
        self._exact += notes["exact"].sum()
        self._lookups += notes["exact"].numel()
        self._open.append(
            key=notes["key"], hash=notes["hash"], action=decision.action, reward=after.reward, discount=after.discount, last=after.last
        )
        if after.next_obs is not after.obs:
            for lane, (last, discount) in enumerate(zip(after.last.tolist(), after.discount.tolist())):
                if last and discount == 0:
                    self._finished.append(self._open.take(lane))
                elif last:
                    self._open.drop(lane)

    def learn(self) -> Metrics:
        if not self._finished:
            return {}
        for episode in self._finished:
            reward = episode["reward"].to(torch.float64)
            value = returns(reward, episode["discount"], episode["last"], torch.zeros_like(reward), self._gamma)
            self.memory.write(episode["action"], episode["key"], episode["hash"], value)
        self._finished = []
        if self._lookups >= HIT_RATE_LOOKUPS:
            self._exact_rate = self._exact / self._lookups
            self._exact, self._lookups = torch.zeros_like(self._exact), 0
        sizes = {f"memory/entries_{name.lower()}": float(size) for name, size in zip(self._spec.action_names, self.memory.sizes)}
        return {
            "memory/entries": float(len(self.memory)),
            "memory/bytes": float(self.memory.nbytes),
            "memory/exact_hit_rate": self._exact_rate,
            **sizes,
        }

    def required_bytes(self, steps: int) -> int:
        """Bytes that the tables take after `steps` agent steps of all lanes together."""
        return self.memory.required_bytes(steps)

    def state_dict(self) -> dict[str, Any]:
        hits = {"exact": self._exact, "lookups": self._lookups, "rate": float(self._exact_rate)}
        return {"encoder": dict(self.encoder.state_dict()), "memory": self.memory.state_dict(), "hits": hits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.encoder.load_state_dict(state["encoder"])
        self.memory.load_state_dict(state["memory"])
        self._exact = state["hits"]["exact"].to(self._device)
        self._lookups, self._exact_rate = state["hits"]["lookups"], state["hits"]["rate"]

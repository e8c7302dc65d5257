"""Simulators with a memory and random latents, fitted to a lower bound of the likelihood of what was recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from envs.api import UserError
from generative.api import Clip
from generative.data import frame_weights
from generative.heads import DiscountHead, RewardHead
from generative.latents import Categoricals, Gaussians, weigh_gradient
from generative.likelihoods import LOG_TWO_PI
from generative.nets import to_pixels
from generative.state_space_nets import Places, Vector

Architecture = Literal["vector", "places"]
Kind = Literal["categorical", "gaussian"]
State = tuple[Tensor, Tensor]
FRAMES_AT_ONCE = 1024


class Terms(NamedTuple):
    """A bound's parts in nats, float32 (B, F) each, 0 where they do not count: padding, and frames that only stand for missing ones.

    Attributes:
        distortion: -log p(frame | h, z).
        rate: KL(q(z | h, frame) || p(z | h)).
        reward, discount: -log p of those of the transition to the frame; 0 for a row's first.
        counted: 1 for the frames that count.
        squared_error: of the frame's mean, a mean over pixels on the scale of [0, 1].
    """

    distortion: Tensor
    rate: Tensor
    reward: Tensor
    discount: Tensor
    counted: Tensor
    squared_error: Tensor


class StateSpace(nn.Module):
    """Trainable and Simulator: h_t = f(h_{t-1}, z_{t-1}, a_{t-1}), z_t ~ p(z_t | h_t), and frame, reward and discount given both.

    A sequential VAE with a deterministic and a random state (Chung et al. 2015, arXiv 1506.02216; Hafner et al. 2019, arXiv 1811.04551),
    whose posterior q(z_t | h_t, frame_t) filters. Frames are Gaussians of a fixed std, rewards and discounts as in `generative.heads`,
    latents Gaussians, or categoricals with straight-through gradients (Hafner et al. 2021, arXiv 2010.02193). With the reward and the
    discount of the transition that led to a frame, and all in nats, summed over pixels,

        -ELBO = sum_t E_q[-log p(frame_t | h_t, z_t) - log p(reward_t | h_t, z_t) - log p(discount_t | h_t, z_t)] + KL(q_t || p_t)

    `losses` follows its gradient exactly (up to the draw, and for categoricals up to the straight-through estimate) with
    `dynamics_cost=1 representation_cost=1 free_nats=0 reward_cost=1 discount_cost=1`. What departs from the bound otherwise: the gradient
    of the KL is weighted apart for the prior (`dynamics_cost`) and for the posterior (`representation_cost`), though its value is not,
    which is KL balancing; and a frame's KL below `free_nats` has none. `elbo` and the metrics always tell the bound itself.

    `horizon` is an attribute that whoever fits may change between updates: of so many frames in a row after the first `context_frames`,
    only the first is looked at, and the z of the others are drawn from the prior. As their KL is 0, what is learned from is a bound
    still. The default of 1 looks at all.

    Args:
        obs_shape: (C, H, W) of the frames, any size.
        num_actions: A.
        device: where the parameters lie.
        architecture: `vector`, or `places` (see `state_space_nets`).
        latents: `categorical` or `gaussian`.
        groups: categoricals, or numbers of the Gaussian, a place.
        classes: of each categorical; not of Gaussians.
        memory: numbers of h, a place.
        units: of the layers between.
        channels: of convolutions at the finest scale.
        context_frames: how many frames `start` looks at.
        std: of a pixel on the scale of [0, 1]. The smaller, the more a small thing is worth against the KL.
        dynamics_cost: weight of the KL's gradient for the prior, and for the memory that it comes from.
        representation_cost: the same for the posterior.
        free_nats: KL a frame, summed over all latents, below which it has no gradient.
        uniform_mix: share of every categorical that is uniform.
        reward_cost: weight of the reward's loss.
        discount_cost: likewise.
        sample: whether `start` and `step` draw z, by torch's default generator; else they take means, or the likeliest classes: the same
            future every time, wrong where the world is random.
    """

    mean_image: Tensor

    def __init__(
        self,
        obs_shape: Sequence[int],
        num_actions: int,
        device: torch.device | str,
        architecture: Architecture = "vector",
        latents: Kind = "categorical",
        groups: int = 32,
        classes: int = 32,
        memory: int = 512,
        units: int = 512,
        channels: int = 24,
        context_frames: int = 5,
        std: float = 0.1,
        dynamics_cost: float = 1.0,
        representation_cost: float = 0.1,
        free_nats: float = 1.0,
        uniform_mix: float = 0.01,
        reward_cost: float = 1.0,
        discount_cost: float = 1.0,
        sample: bool = True,
    ) -> None:
        super().__init__()
        for name, value, options in (
            ("architecture", architecture, ("vector", "places")),
            ("latents", latents, ("categorical", "gaussian")),
        ):
            if value not in options:
                raise UserError(f"{name} is one of {', '.join(options)}, got {value}")
        for name, count in (("memory", memory), ("units", units), ("channels", channels), ("context_frames", context_frames)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        if not 0 < std < math.inf:
            raise UserError(f"std must be above 0, got {std}")
        for name, cost in (
            ("dynamics_cost", dynamics_cost),
            ("representation_cost", representation_cost),
            ("free_nats", free_nats),
            ("reward_cost", reward_cost),
            ("discount_cost", discount_cost),
        ):
            if not 0 <= cost < math.inf:
                raise UserError(f"{name} must be 0 or more, got {cost}")
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])
        self.num_actions, self.horizon, self.context_frames, self.draws = num_actions, 1, context_frames, sample
        self.std, self.free_nats, self.reward_cost, self.discount_cost = std, free_nats, reward_cost, discount_cost
        self.dynamics_cost, self.representation_cost = dynamics_cost, representation_cost
        self.latents = Gaussians(groups) if latents == "gaussian" else Categoricals(groups, classes, uniform_mix)
        body = Vector if architecture == "vector" else Places
        self.body: Vector | Places = body(self.obs_shape, num_actions, self.latents, memory, units, channels)
        self.outcome = nn.Sequential(nn.Linear(self.body.features, units), nn.SiLU())
        self.reward_head, self.discount_head = RewardHead(units), DiscountHead(units)
        self.register_buffer("mean_image", torch.zeros(self.obs_shape))
        self.to(device)

    @property
    def device(self) -> torch.device:
        return self.mean_image.device

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        """One player, `simulator`, with every parameter."""
        return {"simulator": self.parameters()}

    @torch.no_grad()
    def prepare(self, frames: Tensor) -> None:
        """Takes the mean of uint8 (B, C, H, W) training frames as the mean image. Before the first update: what is learned leans on it."""
        self._check_frames(frames)
        total = sum(part.to(self.device).sum(0, dtype=torch.float64) for part in frames.split(FRAMES_AT_ONCE))
        self.mean_image.copy_(total / (255 * len(frames)))

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields once: (`simulator`, distortion + KL + reward_cost * reward loss + discount_cost * discount loss, metrics).

        Nats a frame, means over the frames that count. Metrics, detached: `distortion`, `rate`, `reward_loss`, `discount_loss`, `elbo` =
        minus their plain sum, and `squared_error` of the frames, which were looked at, as they come back.
        """
        terms = self.terms(clip)
        total = terms.counted.sum().clamp(min=1)
        distortion, rate, reward, discount, squared_error = (
            part.sum() / total for part in (terms.distortion, terms.rate, terms.reward, terms.discount, terms.squared_error)
        )
        held = torch.maximum(terms.rate, self.free_nats * terms.counted).sum() / total
        loss = distortion + held + self.reward_cost * reward + self.discount_cost * discount
        metrics = {"distortion": distortion, "rate": rate, "reward_loss": reward, "discount_loss": discount}
        metrics |= {"elbo": -(distortion + rate + reward + discount), "squared_error": squared_error}
        yield "simulator", loss, {name: value.detach() for name, value in metrics.items()}

    @torch.no_grad()
    def elbo(self, clip: Clip) -> Tensor:
        """One-draw estimate of the lower bound of log p(frames, rewards, discounts | actions) of each row, nats (B), the KL in closed
        form. Of frames it is a density on the scale of [0, 1]."""
        terms = self.terms(clip)
        return -(terms.distortion + terms.rate + terms.reward + terms.discount).sum(1)

    def terms(self, clip: Clip) -> Terms:
        """The bound's parts, by one draw of z from torch's default generator, with gradient."""
        assert self.horizon >= 1, f"horizon must be at least 1, got {self.horizon}"
        images, actions = self._centre(clip.frames), clip.actions.to(self.device)
        memories, latents, q = self._listen(images, actions)
        shape = memories.shape[:2]
        p = self.body.prior(memories.flatten(0, 1)).unflatten(0, shape)
        q, p = weigh_gradient(q, self.representation_cost), weigh_gradient(p, self.dynamics_cost)
        drawn, told = (part.unflatten(0, shape) for part in self.body.draw(memories.flatten(0, 1), latents.flatten(0, 1)))
        outcome = self.outcome(told[1:])
        squares = functional.mse_loss(drawn, images, reduction="none").flatten(2)
        distortion = 0.5 * squares.sum(2) / self.std**2 + squares.shape[2] * (math.log(self.std) + 0.5 * LOG_TWO_PI)
        reward = self.reward_head.loss(self.reward_head(outcome), clip.rewards.to(self.device).T)
        discount = self.discount_head.loss(self.discount_head(outcome), clip.discounts.to(self.device).T)
        led = (actions >= 0).float()
        known = torch.cat((led, led.new_ones(len(led), 1)), 1)
        counted = (frame_weights(clip).to(self.device) * known).T
        arrived = counted[1:] * led.T
        rate = self.latents.kl(q, p).flatten(2).sum(2) if self.body.places else self.latents.kl(q, p)
        nothing = torch.zeros_like(counted[:1])
        parts = (counted * distortion, counted * rate, torch.cat((nothing, arrived * reward)), torch.cat((nothing, arrived * discount)))
        error = counted * squares.detach().mean(2)
        return Terms(*(part.T for part in (*parts, counted, error)))

    @torch.no_grad()
    def start(self, clip: Clip) -> State:
        """(h, z) float32 after the clip's last `context_frames` frames, or those that are known where they are fewer.

        Frames that stand for missing ones, from which action -1 leads on, are left out, not taken for a world that stands still.
        """
        first = max(0, clip.frames.shape[1] - self.context_frames)
        frames, actions = clip.frames[:, first:], clip.actions[:, first:]
        memories, latents, _ = self._listen(self._centre(frames), actions.to(self.device), self.draws)
        return memories[-1], latents[-1]

    @torch.no_grad()
    def step(self, state: State, action: Tensor) -> tuple[State, Tensor, Tensor, Tensor]:
        """int64 (B) -> (state, frame uint8 (B, C, H, W), expected reward and discount float32 (B)). The given state stays as it is."""
        memory, latents = state
        assert action.dtype == torch.int64, f"actions are int64, got {action.dtype}"
        assert action.shape == memory.shape[:1], f"actions are ({len(memory)},), got {tuple(action.shape)}"
        memory = self.body.advance(memory, latents, self._one_hot(action.to(self.device)))
        latents = self.latents.draw(self.body.prior(memory), self._noise(len(memory)) if self.draws else None)
        images, told = self.body.draw(memory, latents)
        outcome = self.outcome(told)
        reward, discount = self.reward_head.mean(self.reward_head(outcome)), self.discount_head.mean(self.discount_head(outcome))
        return (memory, latents), to_pixels(images + self.mean_image), reward, discount

    def _listen(self, images: Tensor, actions: Tensor, sample: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """h, z and the statistics of what z was drawn from, (F, B, ...) each, of float (F, B, C, H, W) frames and int64 (B, F - 1) actions.

        A row begins anew, with h and z 0 and no action, at its first frame and after every action of -1.
        """
        count, batch = images.shape[:2]
        seen = self.body.see(images.flatten(0, 1)).unflatten(0, (count, batch))
        noise = self._noise(count, batch) if sample else None
        taken = self._one_hot(torch.cat((actions.new_full((batch, 1), -1), actions), 1)).transpose(0, 1)
        goes_on = taken.sum(2)
        memory = torch.zeros(batch, *self.body.memory_shape, device=self.device)
        latents = torch.zeros(batch, *self.body.places, self.latents.numbers, device=self.device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for t in range(count):
            keep = goes_on[t]
            memory = self.body.advance(_rows(keep, memory) * memory, _rows(keep, latents) * latents, taken[t])
            looks = t < self.context_frames or (t - self.context_frames + 1) % self.horizon == 0
            statistics = self.body.posterior(memory, seen[t]) if looks else self.body.prior(memory)
            latents = self.latents.draw(statistics, None if noise is None else noise[t])
            found.append((memory, latents, statistics))
        memories, drawn, statistics = (torch.stack(parts) for parts in zip(*found))
        return memories, drawn, statistics

    def _noise(self, *shape: int) -> Tensor:
        return self.latents.noise(*shape, *self.body.places, device=self.device)

    def _one_hot(self, actions: Tensor) -> Tensor:
        """int64 (...) -> float32 (..., A); -1 is no action, all 0."""
        return (actions.unsqueeze(-1) == torch.arange(self.num_actions, device=actions.device)).float()

    def _centre(self, frames: Tensor) -> Tensor:
        """uint8 (B, F, C, H, W) -> float32 (F, B, C, H, W)."""
        self._check_frames(frames)
        return frames.to(self.device).transpose(0, 1).contiguous().float() / 255 - self.mean_image

    def _check_frames(self, frames: Tensor) -> None:
        assert frames.dtype == torch.uint8, f"frames are uint8, got {frames.dtype}"
        assert tuple(frames.shape[-3:]) == self.obs_shape, f"frames are (..., {self.obs_shape}), got {tuple(frames.shape)}"


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """(B) -> (B, 1, ...), as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))

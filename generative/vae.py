"""Variational autoencoder of single frames: trains, represents, samples. Blundell et al. 2016, appendix A, or a small fast one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn

from envs.api import UserError
from generative.api import Clip, Recoding
from generative.bounds import importance_weighted_in_chunks
from generative.data import frame_weights
from generative.likelihoods import LEVELS, bernoulli_log_prob, bits_per_dim, gaussian_log_prob, kl_gaussians, logistic_log_prob
from generative.nets import normalise, paper_decoder, paper_encoder, small_decoder, small_encoder, to_pixels
from generative.online import OnlineRMSProp

Architecture = Literal["small", "mfec"]
Likelihood = Literal["fixed_gaussian", "gaussian", "bernoulli", "logistic"]
LOG_STD_BOUND = 8.0
FIRST_LOG_STD = -1.0  # of q in the small architecture; at 0 the noise drowns the means, and latents come into use later


class VAE(nn.Module):
    """p(x, z) = N(z; 0, 1) p(x | z) over pixels x in [0, 1], with q(z | x) a diagonal Gaussian (Kingma and Welling 2014).

    Trainable, Encoder and Sampler; a Density too, whose number is only a bound, for comparison. A representation is q's means, then its
    log-stds: 2 * latents features (same appendix).
    No layer behaves differently in training, so the module's mode never matters.

    Args:
        obs_shape: (C, H, W) of the frames; any size for `small`, at least 52x52 for `mfec`.
        num_actions: unused, every model takes it.
        device: where the parameters lie.
        architecture: `mfec`, appendix A of the paper; `small`, which never convolves at full resolution, about 7 times faster on a CPU.
        latents: dimensions of z (32 in the paper).
        beta: weight of the rate in the loss; 1 is the ELBO, 4 the beta-VAE of Higgins et al. 2017. Reported bounds always weigh it 1.
        likelihood: of a pixel. `gaussian`: mean and log-std maps, std floored at `std` (the paper). `fixed_gaussian`: std is `std`
            everywhere, so that what moves cannot be explained away as noise. `bernoulli`: logits. `logistic`: 256 discretised levels, scale
            floored at `std`.
        std: floor, or value, of a pixel's std on the scale of [0, 1] (the paper's floor is 0.05).
    """

    exact = False
    updates_per_frame = 1.0

    def __init__(
        self,
        obs_shape: tuple[int, int, int],
        num_actions: int,
        device: torch.device | str,
        architecture: Architecture = "small",
        latents: int = 32,
        beta: float = 1.0,
        likelihood: Likelihood = "fixed_gaussian",
        std: float = 0.05,
    ) -> None:
        super().__init__()
        if architecture not in ("small", "mfec"):
            raise UserError(f"architecture is one of small, mfec, got {architecture}")
        if likelihood not in ("fixed_gaussian", "gaussian", "bernoulli", "logistic"):
            raise UserError(f"likelihood is one of fixed_gaussian, gaussian, bernoulli, logistic, got {likelihood}")
        if latents < 1 or beta < 0 or std <= 0:
            raise UserError(f"latents >= 1, beta >= 0 and std > 0 are needed, got {latents}, {beta} and {std}")
        self.obs_shape = (obs_shape[0], obs_shape[1], obs_shape[2])
        self.latents, self.features, self.beta, self.likelihood, self.std = latents, 2 * latents, beta, likelihood, std
        self.dims = math.prod(self.obs_shape)
        maps = self.obs_shape[0] * (2 if likelihood in ("gaussian", "logistic") else 1)
        encoder, decoder = (paper_encoder, paper_decoder) if architecture == "mfec" else (small_encoder, small_decoder)
        self.encoder = encoder(self.obs_shape, self.features)
        self.decoder = decoder(latents, self.obs_shape, maps)
        if architecture == "small":
            nn.init.constant_(list(self.encoder.parameters())[-1][latents:], FIRST_LOG_STD)
        self.online: OnlineRMSProp | None = None  # once frames are absorbed
        self.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def players(self) -> dict[str, Iterable[nn.Parameter]]:
        """One player, `vae`, with every parameter."""
        return {"vae": self._weights()}

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float (B, C, H, W) in [0, 1] -> mean and log-std of q(z | x), float32 (B, latents); the log-std lies within -8 and 8."""
        mean, log_std = self.encoder(images).float().chunk(2, 1)
        return mean, LOG_STD_BOUND * torch.tanh(log_std / LOG_STD_BOUND)

    def log_likelihood(self, images: Tensor, maps: Tensor) -> Tensor:
        """log p(x | z) in nats (B) from the decoder's maps."""
        maps = maps.float()
        if self.likelihood == "bernoulli":
            log_prob = bernoulli_log_prob(images, maps)
        elif self.likelihood == "fixed_gaussian":
            log_prob = gaussian_log_prob(images, maps, math.log(self.std))
        else:
            mean, log_std = maps.chunk(2, 1)
            log_prob_of = gaussian_log_prob if self.likelihood == "gaussian" else logistic_log_prob
            log_prob = log_prob_of(images, mean, log_std.clamp(min=math.log(self.std)))
        return log_prob.flatten(1).sum(1)

    def distortion_and_rate(self, frames: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """uint8 (B, C, H, W) -> (-log p(x | z) for one draw of z ~ q, KL(q(z | x) || p(z))), nats (B) each; their sum estimates -ELBO.

        `noise` (B, latents) makes the draw; without it torch's default generator does.
        """
        images = normalise(frames.to(self.device))
        mean, log_std = self.posterior(images)
        latents = mean + torch.exp(log_std) * (torch.randn_like(mean) if noise is None else noise)
        return -self.log_likelihood(images, self.decoder(latents)), kl_gaussians(mean, log_std).sum(1)

    def losses(self, clip: Clip) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Yields once: (`vae`, distortion + beta * rate per pixel, metrics), averaged over the frames of the clip that are not padding.

        The loss is divided by the number of pixels, so that learning rates carry over between observation shapes. Metrics, detached:
        `distortion`, `rate` and `elbo` = -(distortion + rate) in nats a frame, `bits_per_dim` of that bound.
        """
        frames = clip.frames.flatten(0, 1)
        weights = frame_weights(clip).flatten().to(self.device)
        distortion, rate = ((weights * nats).sum() / weights.sum() for nats in self.distortion_and_rate(frames))
        elbo = -(distortion + rate).detach()
        metrics = {"distortion": distortion.detach(), "rate": rate.detach(), "elbo": elbo, "bits_per_dim": self.bits_per_dim(elbo)}
        yield "vae", (distortion + self.beta * rate) / self.dims, metrics

    def bits_per_dim(self, nats: Tensor) -> Tensor:
        """Bounds in nats a frame -> bits a pixel. For `bernoulli`, of binary images."""
        return bits_per_dim(nats, self.dims, density="gaussian" in self.likelihood)

    @torch.no_grad()
    def elbo(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> one-draw estimate of the evidence lower bound, nats (B), the KL in closed form; for Gaussians a density."""
        distortion, rate = self.distortion_and_rate(frames)
        return -(distortion + rate)

    @torch.no_grad()
    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> one-draw estimate of a bound of the log-probability, float64 (B) nats; a density is taken for the mass of a
        pixel's level by the midpoint rule."""
        return self._mass_bound(frames, torch.randn(len(frames), self.latents, device=self.device)).double()

    def absorb(self, frames: Tensor) -> Recoding:
        """One gradient step a frame, in their order; the bound before and after it, float64 (B) nats, with the same draw of z's noise."""
        if self.online is None:
            self.online = OnlineRMSProp(self._weights(), "vae", self.dims)
        draws = [torch.randn(1, self.latents, device=self.device) for _ in frames]
        steps = [self.online.absorb(frame, partial(self._mass_bound, noise=noise)) for frame, noise in zip(frames.split(1), draws)]
        return Recoding(*(torch.cat(parts) for parts in zip(*steps)))

    def _mass_bound(self, frames: Tensor, noise: Tensor) -> Tensor:
        distortion, rate = self.distortion_and_rate(frames, noise)
        return -(distortion + rate) - (self.dims * math.log(LEVELS - 1) if "gaussian" in self.likelihood else 0.0)

    def _weights(self) -> Iterator[nn.Parameter]:
        return chain(self.encoder.parameters(), self.decoder.parameters())

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The inverse of `state_dict`, the memory of online learning included where there is one."""
        if self.online is None and any(name.startswith("online.") for name in state):
            self.online = OnlineRMSProp(self._weights(), "vae", self.dims)
        return super().load_state_dict(state, strict, assign)

    @torch.no_grad()
    def importance_weighted_bound(self, frames: Tensor, samples: int, chunk: int = 8) -> Tensor:
        """uint8 (B, C, H, W) -> the bound of Burda et al. 2016 from `samples` draws, nats (B), `chunk` draws at a time."""
        images = normalise(frames.to(self.device))
        mean, log_std = self.posterior(images)

        def draw(count: int) -> Tensor:
            noise = torch.randn(count, *mean.shape, device=mean.device)
            latents = mean + torch.exp(log_std) * noise
            log_ratio = (gaussian_log_prob(latents, torch.zeros_like(mean), 0.0) - gaussian_log_prob(latents, mean, log_std)).sum(-1)
            maps = self.decoder(latents.flatten(0, 1))
            log_likelihood = self.log_likelihood(images.repeat(count, 1, 1, 1), maps).unflatten(0, (count, -1))
            return log_likelihood + log_ratio

        return importance_weighted_in_chunks(draw, samples, chunk)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> float32 (B, 2 * latents): means, then log-stds, of q(z | x)."""
        assert frames.dtype == torch.uint8, f"frames are uint8, got {frames.dtype}"
        assert tuple(frames.shape[1:]) == self.obs_shape, f"frames are (B, {self.obs_shape}), got {tuple(frames.shape)}"
        return torch.cat(self.posterior(normalise(frames.to(self.device))), 1)

    @torch.no_grad()
    def reconstruct(self, frames: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> uint8 of the same shape: the decoder's means at q's means."""
        mean, _ = self.posterior(normalise(frames.to(self.device)))
        return self._pixels(self.decoder(mean))

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """uint8 (n, C, H, W): the decoder's means at draws from the prior; no pixel noise is added."""
        return self._pixels(self.decoder(torch.randn(n, self.latents, device=self.device)))

    def _pixels(self, maps: Tensor) -> Tensor:
        means = maps[:, : self.obs_shape[0]].float()
        return to_pixels(torch.sigmoid(means) if self.likelihood == "bernoulli" else means)

"""State-space models and clips for tests: small ones of every kind, whose every weight counts."""

import torch

from generative.api import Clip
from generative.state_space import StateSpace

SHAPE, ACTIONS, CONTEXT = (2, 6, 5), 3, 3
KINDS = [(architecture, latents) for architecture in ("vector", "places") for latents in ("categorical", "gaussian")]
PLAIN = {"dynamics_cost": 1.0, "representation_cost": 1.0, "free_nats": 0.0}


def clip_of(count, batch=2, shape=SHAPE, actions=ACTIONS, seed=0):
    """Random frames, actions, rewards and discounts; nothing ends."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randint(0, 256, (batch, count, *shape), dtype=torch.uint8, generator=generator)
    taken = torch.randint(0, actions, (batch, count - 1), generator=generator)
    rewards = torch.randint(-2, 3, (batch, count - 1), generator=generator).float()
    discounts = torch.rand(batch, count - 1, generator=generator)
    return Clip(frames, taken, rewards, discounts, torch.zeros(batch, count - 1, dtype=torch.bool))


def model_of(kind, shape=SHAPE, seed=0, **knobs):
    """Weights that start at or near 0 are moved away from it."""
    torch.manual_seed(seed)
    sizes = {"groups": 3, "classes": 4, "memory": 7, "units": 8, "channels": 4, "context_frames": CONTEXT, "std": 0.5}
    model = StateSpace(shape, ACTIONS, "cpu", architecture=kind[0], latents=kind[1], **(sizes | knobs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.prepare(torch.randint(0, 256, (5, *shape), dtype=torch.uint8))
    return model


def known(clip, count):
    return Clip(clip.frames[:, :count], *(part[:, : count - 1] for part in clip[1:]))


def loss_of(model, clip, seed=3):
    """(loss, metrics, gradients by name) with the same draws every time."""
    torch.manual_seed(seed)
    ((player, loss, metrics),) = model.losses(clip)
    assert player == "simulator"
    model.zero_grad()
    loss.backward()
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    return loss.detach(), metrics, zeros | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

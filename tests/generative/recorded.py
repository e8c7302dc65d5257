"""Clips of a toy that was never played: random pictures, rewards and ends."""

import json

import pytest
import torch

from envs.api import Spec, Step, UserError
from generative.clips import ClipData
from generative.recording import ClipWriter

SHAPE, LANES, ACTIONS = (3, 5, 4), 3, 6
SPEC = Spec("Toy", ACTIONS, tuple("abcdef"), SHAPE, 4)
SOURCE = {"env": "Toy", "seed": 3}


def steps_of(count, seed=0, ends=0.1):
    """Steps of random pictures, rewards and ends; the observation of one is that of the step before."""
    random = torch.Generator().manual_seed(seed)

    def pictures():
        return torch.randint(0, 256, (LANES, *SHAPE), dtype=torch.uint8, generator=random)

    obs, steps = pictures(), []
    for _ in range(count):
        last = torch.rand(LANES, generator=random) < ends
        following = pictures()
        successor = torch.where(last[:, None, None, None], pictures(), following)
        reward = torch.randn(LANES, generator=random)
        discount = (torch.rand(LANES, generator=random) > 0.5).float()
        step = Step(obs, reward, discount, last, obs)
        steps.append((step, torch.randint(ACTIONS, (LANES,), generator=random), Step(following, reward, discount, last, successor)))
        obs = following
    return steps


def record(folder, *parts, **knobs):
    with ClipWriter(folder, SPEC, LANES, SOURCE, **knobs) as writer:
        for steps in parts:
            for step in steps:
                writer.append(*step)
            writer.end_part()
    return folder


PARTS = steps_of(41, seed=1), steps_of(20, seed=2)


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def refused(folder, match, **knobs):
    with pytest.raises(UserError, match=match) as caught:
        ClipData(folder, **knobs)
    assert "\n" not in str(caught.value)

"""Small worlds that simulators of frames learn exactly, and what they cannot know of others."""

import pytest
import torch
from torch import nn

from generative.api import Clip
from generative.simulator import FrameSimulator


def known(clip, count):
    return Clip(clip.frames[:, :count], *(part[:, : count - 1] for part in clip[1:]))


SIDE, MOVES = 4, torch.tensor([0, 1, 4])  # stay, right, down on a board without edges


def board(cells):
    """int64 (...) -> one lit pixel, uint8 (..., 1, 4, 4)."""
    return (nn.functional.one_hot(cells, SIDE**2) * 255).to(torch.uint8).unflatten(-1, (1, SIDE, SIDE))


def walk(cells, actions):
    """Cells int64 (B) and actions int64 (B, T) -> a Clip of the walk. Arriving at cell 0 gives 5 points and ends what it may."""
    places = [cells]
    for action in actions.T:
        row, column = places[-1] // SIDE + (action == 2).long(), places[-1] % SIDE + (action == 1).long()
        places.append(row % SIDE * SIDE + column % SIDE)
    places = torch.stack(places, 1)
    home = (places[:, 1:] == 0).float()
    return Clip(board(places), actions, 5 * home, 1 - home, torch.zeros_like(home, dtype=torch.bool))


def fitted(clip, updates, **knobs):
    torch.manual_seed(0)
    model = FrameSimulator((1, SIDE, SIDE), 3, "cpu", **({"hidden": 64, "factors": 64, "context_frames": 1} | knobs))
    model.prepare(clip.frames.flatten(0, 1))
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for update in range(updates):
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - update / updates)
        ((_, loss, metrics),) = model.losses(clip)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model, metrics


def every_move():
    """All 16 cells with all 3 actions."""
    return walk(torch.arange(SIDE**2).repeat(3), torch.arange(3).repeat_interleave(SIDE**2)[:, None])


@pytest.mark.parametrize("knobs", [{}, {"residual": True}, {"architecture": "local"}], ids=str)
def test_a_world_that_actions_decide_is_learned_and_dreamt_under_any_of_them(knobs):
    model, metrics = fitted(every_move(), 250, **knobs)
    assert metrics["squared_error"] < 1e-4
    truth = walk(torch.arange(SIDE**2), torch.randint(3, (SIDE**2, 10), generator=torch.Generator().manual_seed(7)))
    state = model.start(known(truth, 1))
    for step in range(10):
        state, frame, reward, discount = model.step(state, truth.actions[:, step])
        assert torch.equal((frame / 255).round(), truth.frames[:, step + 1] / 255)
        torch.testing.assert_close(reward, truth.rewards[:, step], atol=0.1, rtol=0)
        torch.testing.assert_close(discount, truth.discounts[:, step], atol=0.1, rtol=0)


def test_without_actions_it_sees_the_mean_of_what_may_come():
    """Each of three cells is lit with a chance of a third: an error of 2/3 over 16 pixels at best."""
    _, metrics = fitted(every_move(), 100, action="none")
    assert metrics["squared_error"].item() == pytest.approx(2 / 3 / 16, rel=0.05)


def test_the_recurrent_one_remembers_what_frames_do_not_show():
    """The pixel goes on in the direction of its last step, which one frame does not tell, whatever is done."""
    actions = torch.arange(1, 3).repeat(SIDE**2)[:, None].expand(-1, 5)
    clip = walk(torch.arange(SIDE**2).repeat_interleave(2), actions)
    clip = clip._replace(actions=torch.zeros_like(actions))
    _, blind = fitted(clip, 150, context_frames=1)
    assert blind["squared_error"].item() > 0.02
    model, metrics = fitted(clip, 150, encoder="recurrent", context_frames=2)
    assert metrics["squared_error"] < 1e-3
    state = model.start(known(clip, 2))
    for step in range(1, 5):
        state, frame, _, _ = model.step(state, clip.actions[:, step])
        assert torch.equal((frame / 255).round(), clip.frames[:, step + 1] / 255)

"""How good a simulator is: one set of figures for all, on recorded clips and against the live world."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from agents.api import Agent
from envs.api import VectorEnv
from generative.api import Clip, Simulator
from generative.clips import ClipData
from generative.rollouts import moving_error, psnr, rollout, squared_error, ssim

BATCH = 16  # clips that are foretold together
HELD_STEPS = 4  # that a counterfactual action is held for
SEEN_DIFFERENCE = 8  # of 255: pictures that differ by less anywhere look the same
SPEED_SECONDS = 1.0


def picture_errors(simulator: Simulator, data: ClipData, known: int, horizon: int, clips: int) -> dict[str, list[float | None]]:
    """Means over clips at even distances, by steps ahead of `known` frames, None where no clip is so long.

    `mse` (scale of [0, 1]), `psnr` of that mean in decibels, `ssim`, and `moving_mse`, of moving pixels alone. Steps after an episode's end
    do not count.
    """
    sums = {name: torch.zeros(horizon, dtype=torch.float64) for name in ("weights", "mse", "ssim", "moving", "moved")}
    for clip in _spread(data, clips, known - 1 + horizon, known - 1):
        seen = rollout(simulator, clip, horizon, known)
        moving, moved = moving_error(seen.frames, seen.truth, seen.before)
        found = (torch.ones_like(seen.weights), squared_error(seen.frames, seen.truth), ssim(seen.frames, seen.truth), moving, moved)
        for total, values in zip(sums.values(), found):
            total += (seen.weights * values).sum(0).double().cpu()
    mse = sums["mse"] / sums["weights"]
    figures = {"mse": mse, "psnr": psnr(mse), "ssim": sums["ssim"] / sums["weights"], "moving_mse": sums["moving"] / sums["moved"]}
    return {name: [value if math.isfinite(value) else None for value in values.tolist()] for name, values in figures.items()}


def event_figures(simulator: Simulator, data: ClipData, known: int, clips: int) -> dict[str, Any]:
    """How well rewards and ends of episodes are foretold, one step ahead of `known` frames.

    A reward counts as foretold where the prediction is nearer to the smallest that occurs than to none; an end, where the discount is
    below one half. Precision and recall are None where nothing was foretold, or nothing happened.
    """
    columns: list[Tensor] = []
    for clip in _spread(data, clips, known, known - 1):
        seen = rollout(simulator, clip, 1, known)
        parts = (seen.clip.rewards, seen.rewards, seen.clip.discounts, seen.discounts)
        columns.append(torch.stack([part[:, 0].cpu() for part in parts]))
    rewards, said_rewards, discounts, said_discounts = torch.cat(columns, 1)
    sizes = rewards[rewards != 0].abs()
    least = float(sizes.min()) / 2 if len(sizes) else 0.5
    return {
        "reward": _agreement(rewards != 0, said_rewards.abs() >= least),
        "end": _agreement(discounts < 0.5, said_discounts < 0.5),
        "reward_absolute_error": float((said_rewards - rewards).abs().mean()),
        "transitions": len(rewards),
    }


def _spread(data: ClipData, clips: int, steps: int, lead: int) -> Iterator[Clip]:
    """So many clips at even distances, a batch at a time."""
    there = data.starts(steps, lead)
    most = min(clips, there)
    for first in range(0, most, BATCH):
        chosen = torch.arange(first, min(first + BATCH, most))
        yield data.clips(chosen * there // most, steps, lead)


def _agreement(happened: Tensor, said: Tensor) -> dict[str, Any]:
    both = int((happened & said).sum())
    times, foretold = int(happened.sum()), int(said.sum())
    return {
        "happened": times,
        "foretold": foretold,
        "precision": both / foretold if foretold else None,
        "recall": both / times if times else None,
    }


def counterfactuals(simulator: Simulator, data: ClipData, env: VectorEnv, part: int, step: int) -> dict[str, Any] | None:
    """The same moments, every action, held for four steps: do the simulator's pictures differ where the live world's do?

    The live world is led to the moment before step `step` of a part, once for each action, by the part's seed and recorded actions.

    Returns:
        Over pairs of actions, lanes and steps: `pairs` that differ in the live world; the share of these that differ in the
        simulator (`recall`); of the pairs that are the same there, the share that is here (`specificity`); `overlap` (intersection over
        union of the pixels that differ); `correlation` of the differences. None where an episode ends too near in every lane.
    """
    actions, seed = data.actions(part), data.parts[part]["env_seed"]
    context = simulator.context_frames - 1
    known = data.clips_at(part, step, context + 1, context)
    start = Clip(known.frames[:, : context + 1], *(piece[:, :context] for piece in known[1:]))
    alive = torch.ones(data.lanes, dtype=torch.bool)
    state, truth, said = simulator.start(start), [], []
    for action in range(env.spec.num_actions):
        live = env.reset(seed)
        for t in range(step):
            live = env.step(actions[t])
        assert torch.equal(live.obs.cpu(), known.frames[:, context]), "the live world is not the recorded one"
        chosen = torch.full((data.lanes,), action)
        branch, pictures, foretold = state, [], []
        for held in range(HELD_STEPS):
            alive = alive & ~(live.last.cpu() & (held > 0))
            live = env.step(chosen)
            pictures.append(live.next_obs.cpu())
            branch, frame, _, _ = simulator.step(branch, chosen)
            foretold.append(frame.cpu())
        truth.append(torch.stack(pictures, 1))
        said.append(torch.stack(foretold, 1))
    if not alive.any():
        return None
    return _compare(torch.stack(truth)[:, alive], torch.stack(said)[:, alive])


def _compare(truth: Tensor, said: Tensor) -> dict[str, Any]:
    """uint8 (A, N, J, C, H, W) twice -> figures over pairs of actions."""
    first, second = torch.triu_indices(len(truth), len(truth), 1)
    real, ours = (pictures[first].float() - pictures[second].float() for pictures in (truth, said))
    real_mask, our_mask = (differences.abs().amax(3) > SEEN_DIFFERENCE for differences in (real, ours))
    differs, here = real_mask.flatten(3).any(3), our_mask.flatten(3).any(3)
    union = int((real_mask | our_mask).sum())
    norms = float(real.double().square().sum().sqrt() * ours.double().square().sum().sqrt())
    return {
        "pairs": int(differs.sum()),
        "recall": float(here[differs].float().mean()) if differs.any() else None,
        "specificity": float((~here[~differs]).float().mean()) if (~differs).any() else None,
        "overlap": int((real_mask & our_mask).sum()) / union if union else None,
        "correlation": float((real * ours).double().sum()) / norms if norms else 0.0,
    }


def control_score(simulator: Simulator, env: VectorEnv, agent: Agent, every: int, seed: int, steps: int) -> list[float]:
    """The return of each lane's first episode, or of its first `steps` steps, in the live world, of an agent that sees what the simulator
    foretells and the truth only at every `every`-th step and where an episode opens (Oh et al. 2015, section 4.2, where a DQN plays so).

    With the truth the simulator is given the true frames before it, and the agent what it would remember had it seen them all. every = 1 is
    the live world itself.
    """
    step, memory = env.reset(seed), agent.initial(env.num_envs)  # what one remembers who has seen the truth
    known, acted = [step.obs] * simulator.context_frames, [torch.full((env.num_envs,), -1)] * simulator.context_frames
    carry, shown, state = memory, step.obs, simulator.start(_history(known, acted))
    totals, playing = torch.zeros(env.num_envs), torch.ones(env.num_envs, dtype=torch.bool)
    for t in range(steps):
        opens = step.last.cpu()
        known = [torch.where(_like(opens, old), step.obs, old) for old in known[1:]] + [step.obs]
        acted = [torch.where(opens, -1, old) for old in acted[1:]] + [acted[-1]]
        told = opens | (t % every == 0)
        truth = agent.act(step, memory, explore=False)
        if told.any():
            state = _pick(told, simulator.start(_history(known, acted)), state)
            shown = _pick(told, step.obs, shown)
        # an agent forgets by itself where an episode opens, so it needs its memory of the truth only where all lanes are told
        decision = truth if told.all() else agent.act(step._replace(obs=shown), carry, explore=False)
        state, foretold, _, _ = simulator.step(state, decision.action)
        memory, carry, shown = truth.carry, decision.carry, foretold.to(step.obs.device)
        acted = [*acted[:-1], decision.action.cpu()]
        step = env.step(decision.action)
        totals += step.reward.cpu() * playing
        playing &= ~step.last.cpu()
        if not playing.any():
            break
    return totals.tolist()


def _history(known: list[Tensor], acted: list[Tensor]) -> Clip:
    """The last K frames of all lanes; actions are those that led from one to the next, -1 before an episode's first frame."""
    frames = torch.stack(known, 1)
    between = frames.shape[1] - 1
    zeros = torch.zeros(len(frames), between)
    actions = torch.stack(acted[:-1], 1) if between else zeros.long()
    return Clip(frames, actions, zeros, zeros + 1, zeros.bool())


def _pick(chosen: Tensor, new: Any, old: Any) -> Any:
    """Rows of `new` where chosen, else of `old`: tensors, batch first, or tuples of them, or None."""
    if isinstance(new, Tensor):
        return torch.where(_like(chosen.to(new.device), new), new, old)
    if isinstance(new, tuple):
        parts = [_pick(chosen, one, other) for one, other in zip(new, old)]
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    assert new is None, f"a memory of {type(new).__name__}"
    return None


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    return rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1))


def steps_per_second(simulator: Simulator, clip: Clip) -> float:
    """Steps of single lanes a second, all rows of a clip of `context_frames` frames together, pictures included."""
    action = torch.zeros(len(clip.frames), dtype=torch.int64)
    state = simulator.start(clip)
    for _ in range(2):
        state, frame, _, _ = simulator.step(state, action)
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + SPEED_SECONDS:
        for _ in range(4):
            state, frame, _, _ = simulator.step(state, action)
        frame[:, 0, 0, 0].cpu()  # waits for the device
        count += 4 * len(action)
    return count / (time.perf_counter() - began)

"""The one loop. Whoever wants to log, film, record, evaluate or save listens to what it yields."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from time import perf_counter
from typing import Any, NamedTuple

import torch

from agents.api import Agent, Decision, Metrics
from envs.api import Step, VectorEnv


class Seconds(NamedTuple):
    """Host seconds that one tick spent in each part."""

    act: float
    env: float
    learn: float
    observe: float


class Tick(NamedTuple):
    """One step of every lane.

    Attributes:
        played: environment frames of all lanes since the loop began, this tick included.
        step: what the agent acted on.
        decision: what it decided.
        after: what came of it, uncut.
        metrics: what `learn` returned, often empty.
        seconds: where the time went; the first tick's `env` includes the reset.
    """

    played: int
    step: Step
    decision: Decision
    after: Step
    metrics: Metrics
    seconds: Seconds


def cut(after: Step) -> Step:
    """`after` with every trace cut: last everywhere. Where an episode went on its discount stays 1, as at a time limit."""
    next_obs = after.next_obs.view_as(after.next_obs)  # another object, which tells the host that lanes ended
    return after._replace(last=torch.ones_like(after.last), next_obs=next_obs)


def ticks_for(frames: int, env: VectorEnv) -> int:
    """The least number of ticks that play at least `frames` environment frames."""
    return -(-frames // (env.num_envs * env.spec.frames_per_step))


def play(env: VectorEnv, agent: Agent, frames: int, seed: int, begun: tuple[Step, Any] | None = None) -> Generator[Tick, bool | None, None]:
    """Plays at least `frames` environment frames from a fresh reset, learning on the way; the last step is cut.

    A listener that wants to end early sends True: one more tick is played, as the last, and comes back from `send` (StopIteration where the
    budget was spent anyway).

    The agent learns while the emulators work, and once more at the end, so that nothing observed stays unlearned; the
    metrics of that last time come with no tick and are not reported.

    Args:
        env: reset with `seed` first.
        agent: acts with explore=True.
        frames: the budget of all lanes together, rounded up to whole ticks.
        seed: the environment's seed.
        begun: the step to act on next and the carry to do it with, of an environment that has been reset, instead of a reset with `seed`.
    """
    began = perf_counter()
    step, carry = begun or (env.reset(seed), agent.initial(env.num_envs))
    resetting = perf_counter() - began
    frames_per_tick = env.num_envs * env.spec.frames_per_step
    ticks = ticks_for(frames, env)
    tick = 0
    while tick < ticks:
        tick += 1
        start = perf_counter()
        decision = agent.act(step, carry, explore=True)
        acted = perf_counter()
        env.send(decision.action)
        sent = perf_counter()
        try:
            metrics = agent.learn()
        finally:
            learned = perf_counter()
            after = env.recv()
        received = perf_counter()
        agent.observe(step, decision, cut(after) if tick == ticks else after)
        seconds = Seconds(acted - start, resetting + sent - acted + received - learned, learned - sent, perf_counter() - received)
        resetting = 0.0
        if (yield Tick(tick * frames_per_tick, step, decision, after, metrics, seconds)):
            ticks = min(ticks, tick + 1)
        step, carry = after, decision.carry
    agent.learn()


def watch(env: VectorEnv, agent: Agent, seed: int, epsilon: float = 0.0) -> Iterator[Tick]:
    """Plays on and on without learning: only `initial` and `act(explore=False)`.

    Args:
        epsilon: share of uniformly random actions, applied here, outside the agent.
    """
    step, carry = env.reset(seed), agent.initial(env.num_envs)
    frames_per_tick = env.num_envs * env.spec.frames_per_step
    played = 0
    while True:
        start = perf_counter()
        decision = agent.act(step, carry, explore=False)
        if epsilon > 0:
            action = decision.action
            random = torch.randint_like(action, env.spec.num_actions)
            decision = decision._replace(action=torch.where(torch.rand(action.shape, device=action.device) < epsilon, random, action))
        acted = perf_counter()
        after = env.step(decision.action)
        played += frames_per_tick
        yield Tick(played, step, decision, after, {}, Seconds(acted - start, perf_counter() - acted, 0.0, 0.0))
        step, carry = after, decision.carry


def evaluate(env: VectorEnv, agent: Agent, episodes_per_lane: int, seed: int, epsilon: float = 0.0) -> Iterator[Tick]:
    """Plays as `watch` until every lane has finished its quota of episodes.

    Equal quotas keep short episodes from being counted more often than long ones. Lanes that are done play on
    until the last is done; whoever counts leaves their surplus episodes out.
    """
    finished = torch.zeros(env.num_envs, dtype=torch.int64)
    for tick in watch(env, agent, seed, epsilon):
        if tick.after.next_obs is not tick.after.obs:
            finished += tick.after.last.cpu()
        yield tick
        if int(finished.min()) >= episodes_per_lane:
            return

"""What informed exploration costs: training rate of agent=dqn with a simulator beside that of agent=dqn, in alternating pairs of turns.

    python -m benchmarks.informed_speed --out benchmarks/results/informed_speed.json

Both are processes that live through all pairs (`benchmarks.turns`). 16 environments, the configurations' own defaults, but that epsilon
stays as told; with 1.0 neither learns, as before learning starts. The simulator has learned nothing: what it foretells costs the same.
Beside the rates: where an informed choice of all lanes spends its time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from agents.dqn import DQN
from agents.informed import Carry, follow, visit_counts
from agents.loop import play
from benchmarks.record import record
from benchmarks.turns import OUTSIDE, Worker, serve, summary, take_turns
from lab.configure import compose, plain
from lab.run import make_agent, make_env

NUM_ENVS = 16
CPU = torch.device("cpu")
OBS = ("grey84", "rgb64")


def make(simulator: str, game: str, obs: str, epsilon: float, *words: str) -> tuple[Any, DQN]:
    """An environment and an agent, with a simulator's name or none."""
    torch.manual_seed(0)
    told = [f"env={game}", f"env.obs={obs}", "agent=dqn", "agent.capacity=20_000", *words]
    told += [f"agent.epsilon_start={epsilon}", f"agent.epsilon_end={epsilon}"]
    told += [f"agent.learning_starts_frames={1_000 if epsilon < 1 else 10**9}"]
    settings = plain(compose(told if simulator == "none" else [*told, f"simulator={simulator}"]))
    env = make_env(settings, NUM_ENVS, CPU)
    agent, _ = make_agent(settings, env.spec, CPU)
    assert isinstance(agent, DQN)
    return env, agent


def work(simulator: str, game: str, obs: str, epsilon: float) -> None:
    """One side."""
    env, agent = make(simulator, game, obs, epsilon)
    facts = {"torch_threads": torch.get_num_threads()}
    serve(play(env, agent, 10**12, seed=0), NUM_ENVS, facts, lambda: agent.optimiser.updates)


def measure(simulator: str, game: str, obs: str, epsilon: float, pairs: int, seconds: float) -> dict[str, Any]:
    """One row: median rates and ratios (informed to uniform) over `pairs` of turns of about `seconds`."""
    command = [sys.executable, "-m", "benchmarks.informed_speed", "--games", game, "--obs", obs, "--epsilons", str(epsilon), "--serve"]
    workers = [Worker([*command, name], OUTSIDE) for name in (simulator, "none")]
    row = {"simulator": simulator, "game": game, "obs": obs, "epsilon": epsilon}
    return row | summary(take_turns(workers, pairs, seconds, 10 * NUM_ENVS))


def parts(simulator: str, game: str, obs: str, visit_frames: int, rounds: int) -> dict[str, Any]:
    """Milliseconds, medians, of an informed choice of all lanes: what the lanes remember, what is foretold, and the count of visits."""
    env, agent = make(simulator, game, obs, 1.0, f"agent.visit_frames={visit_frames}")
    for _ in play(env, agent, (visit_frames + 2) * NUM_ENVS * env.spec.frames_per_step, seed=0):
        pass
    informed, step, carry = agent.informed, env.reset(1), agent.initial(NUM_ENVS)
    assert informed is not None
    assert isinstance(carry, Carry)
    rows, past = torch.arange(NUM_ENVS), carry.past
    foretold, (seen, known) = informed._foretell(past), informed._trajectories(step, rows)
    found = {
        "remember": _milliseconds(lambda: follow(past, carry.action, step), rounds),
        "foretell": _milliseconds(lambda: informed._foretell(past), rounds),
        "visits": _milliseconds(lambda: visit_counts(foretold, seen, known, 50, 100.0), rounds),
    }
    env.close()
    return {"game": game, "obs": obs, "visit_frames": visit_frames, "pictures": len(rows) * env.spec.num_actions, "milliseconds": found}


def _milliseconds(call: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return round(1e3 * statistics.median(taken), 2)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and writes JSON with `--out`."""
    parser = argparse.ArgumentParser(prog="informed_speed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulator", default="small_feedforward")
    parser.add_argument("--games", nargs="+", default=["Qbert"])
    parser.add_argument("--obs", nargs="+", default=list(OBS), choices=OBS)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.1, 1.0])
    parser.add_argument("--visit-frames", nargs="+", type=int, default=[20, 200])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        work(arguments.serve, arguments.games[0], arguments.obs[0], arguments.epsilons[0])
        return 0
    worlds = [(game, obs) for game in arguments.games for obs in arguments.obs]
    choices = [parts(arguments.simulator, *world, frames, 5) for world in worlds for frames in arguments.visit_frames]
    print(f"{'game':10s} {'pictures':8s} {'d':>4s}  ms of a choice of all lanes")
    for choice in choices:
        shown = ", ".join(f"{name} {value:.1f}" for name, value in choice["milliseconds"].items())
        print(f"{choice['game']:10s} {choice['obs']:8s} {choice['visit_frames']:4d}  {shown}", flush=True)
    rows = []
    print(f"{'game':10s} {'pictures':8s} {'epsilon':>7s} {'steps/s':>8s} {'uniform':>8s} {'share':>6s}  range")
    for world in worlds:
        for epsilon in arguments.epsilons:
            row = measure(arguments.simulator, *world, epsilon, arguments.pairs, arguments.seconds)
            low, high = row["ratio_range"]
            rates = f"{row['steps_per_second']:8,d} {row['others_steps_per_second']:8,d}"
            print(f"{world[0]:10s} {world[1]:8s} {epsilon:7g} {rates} {row['ratio_median']:6.3f}  {low:.3f}-{high:.3f}", flush=True)
            rows.append(row)
    threads = torch.get_num_threads()
    record(arguments.out, "informed_speed", argv, rows, choices=choices, torch_threads=threads, outside_the_code=OUTSIDE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

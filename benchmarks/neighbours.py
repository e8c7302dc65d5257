"""How long a nearest-neighbour search takes, and how true it is: every backend, tables from 1,000 to 1,000,000 real keys.

    python -m benchmarks.neighbours --games Pong Qbert --frames 500000

Keys are random projections (64 Gaussian dimensions) of distinct grey 84x84 frames under random actions; queries are frames of
other episodes that are no stored frame. Recall is the share of the k nearest, by float64 distances of float32 keys, that a search returned.
Collected keys are kept under data/neighbours/ and used as they are when found there. Writes benchmarks/results/neighbours.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.search import exact_distances, make_search
from envs.atari import AtariEnv
from envs.cpus import usable_cpus
from envs.protocols import PROTOCOLS
from generative.projection import RandomProjection

DIMS, ACTIONS, QUERIES, K = 64, 6, 16, 11
RESULTS = Path(__file__).parent / "results"


def frames(game: str, seed: int) -> Iterator[Tensor]:
    """Endless uint8 (16, 1, 84, 84) frames of 16 lanes under random actions."""
    env = AtariEnv(game, 16, "cpu", PROTOCOLS["mfec2016"])
    g = torch.Generator().manual_seed(seed)
    step = env.reset(seed)
    try:
        while True:
            yield step.obs
            step = env.step(torch.randint(env.spec.num_actions, (16,), generator=g))
    finally:
        env.close()


def collect(game: str, count: int, path: Path, held_out: int = 2048) -> tuple[Tensor, Tensor, str]:
    """float32 keys (count, 64) of distinct frames in order of time, queries (held_out, 64) of frames not among them, and what they are."""
    if path.exists():
        stored = np.load(path)
        return torch.from_numpy(stored["keys"][:count]), torch.from_numpy(stored["queries"]), str(stored["what"])
    torch.manual_seed(0)
    encoder = RandomProjection((1, 84, 84), ACTIONS, "cpu", DIMS)
    seen: set[int] = set()
    columns = []
    for seed, wanted, skip in ((7, count, 1), (1007, held_out, 10)):  # queries: about every tenth frame of a run with other seeds
        keys: list[Tensor] = []
        found = 0
        for ticks, obs in enumerate(frames(game, seed)):
            fresh = [n for n in range(16) if (ticks + n) % skip == 0 and hash(obs[n].numpy().tobytes()) not in seen]
            seen.update(hash(obs[n].numpy().tobytes()) for n in fresh)
            if fresh:
                keys.append(encoder.encode(obs[fresh]))
            found += len(fresh)
            if found >= wanted:
                break
        columns.append(torch.cat(keys)[:wanted])
    what = f"distinct frames of 16 lanes of {game}, protocol mfec2016, random actions"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, keys=columns[0].numpy(), queries=columns[1].numpy(), what=what)
    return columns[0], columns[1], what


def tables(pool: Tensor, size: int) -> tuple[list[Tensor], str]:
    """Six tables of `size` keys from `pool` (M, 64), in order of time, and what they are."""
    g = torch.Generator().manual_seed(size)
    if ACTIONS * size <= len(pool):
        picks = torch.randperm(len(pool), generator=g)[: ACTIONS * size].view(ACTIONS, size).sort(1).values
        return [pool[rows] for rows in picks], "disjoint random sets of real frames"
    if size <= len(pool):
        return [pool[torch.randperm(len(pool), generator=g)[:size].sort().values] for _ in range(ACTIONS)], (
            f"random sets out of {len(pool)} real frames, so tables share frames"
        )
    more = size - len(pool)
    noise = 0.01 * pool.std(0).mean()
    copied = (pool[torch.randint(len(pool), (more,), generator=g)] for _ in range(ACTIONS))
    return [torch.cat((pool, rows + noise * torch.randn(more, DIMS, generator=g))) for rows in copied], (
        f"all {len(pool)} real frames in each table, and {more} copies moved by Gaussian noise of 0.01 of the keys' standard deviation"
    )


def recall(rows: Tensor, keys: Sequence[Tensor], queries: Tensor) -> float:
    """Share of rows int64 (N, A, K) that are no farther than the true K-th nearest."""
    good, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # small pieces, and nothing is timed here
    for action, table in enumerate(keys):
        for n, query in enumerate(queries):
            far = torch.cat([exact_distances(query, part) for part in table.split(8192)])
            good.append((far[rows[n, action]] <= far.kthvalue(K).values).double().mean())
    torch.set_num_threads(threads)
    return float(torch.stack(good).mean())


def measure(name: str, keys: list[Tensor], queries: Tensor, seconds: float) -> dict[str, Any]:
    """Milliseconds of one call over as many as fit into `seconds` (at least 3), and recall of the last.

    `cpu_ms` is processor time of all threads, which other work on the machine touches little (waiting OpenMP threads that spin count).
    """
    search = make_search(name, DIMS, len(keys), "cpu")
    sizes = [len(table) for table in keys]
    begin = time.perf_counter()
    search.rebuild(keys, sizes)
    rebuilt = time.perf_counter() - begin
    wanted = torch.ones(QUERIES, len(keys), dtype=torch.bool)
    batches = queries[: len(queries) // QUERIES * QUERIES].view(-1, QUERIES, DIMS)
    search.nearest(keys, sizes, batches[0], wanted, K)
    spent: list[float] = []
    cpu = time.process_time()
    while sum(spent) < seconds or len(spent) < 3:
        batch = batches[len(spent) % len(batches)]
        begin = time.perf_counter()
        _, rows = search.nearest(keys, sizes, batch, wanted, K)
        spent.append(time.perf_counter() - begin)
    cpu = time.process_time() - cpu
    ms = np.array(spent) * 1e3
    checked = recall(rows[:, :1], keys[:1], batch) if sizes[0] > 100_000 else recall(rows, keys, batch)
    return {
        "ms_median": float(np.median(ms)),
        "ms_least": float(ms.min()),
        "ms_90th_percentile": float(np.quantile(ms, 0.9)),
        "cpu_ms": cpu * 1e3 / len(spent),
        "calls": len(spent),
        "recall": checked,
        "rebuild_ms": rebuilt * 1e3,
        "bytes_per_entry": search.bytes_per_entry,
    }


def hardware() -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    try:
        cpu = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor()
    versions = {}
    for package in ("torch", "numpy", "numba", "faiss-cpu", "ale-py"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    from agents import scan

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": cpu,
        "cpus": usable_cpus(),
        "torch_threads": torch.get_num_threads(),
        "vnni": scan.VNNI,
        "versions": versions,
        "load": load,
    }


def markdown(result: dict[str, Any]) -> str:
    """The figures as a table, a row a game and size."""
    names = result["backends"]
    machine = result["hardware"]
    head = f"| game | keys a table | {' | '.join(f'{name}: ms / least / cpu, recall' for name in names)} | keys |"
    lines = [
        f"{QUERIES} queries in each of {ACTIONS} tables, {DIMS} dimensions, k = {K}. Milliseconds of one call for the whole batch:",
        "median / least / processor time of all threads (which a crowded machine changes least).",
        f"{machine['cpu']}, {machine['cpus']} processors, shared with other work (load {machine['load']:.1f} at the start).",
        "",
        head,
        "|" + "---|" * (len(names) + 3),
    ]
    for row in result["rows"]:
        figures = [row[name] for name in names]
        cells = (f"{f['ms_median']:.2f} / {f['ms_least']:.2f} / {f['cpu_ms']:.2f}, {f['recall']:.4f}" for f in figures)
        lines.append(f"| {row['game']} | {row['size']:,} | {' | '.join(cells)} | {row['keys']} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Collects where needed, measures, writes the results. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", nargs="+", default=["Pong", "Qbert"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1000, 10_000, 20_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--backends", nargs="+", default=["torch", "faiss", "scan"])
    parser.add_argument("--frames", type=int, default=500_000, help="distinct frames to collect a game")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each figure")
    parser.add_argument("--data", type=Path, default=Path("data/neighbours"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    result: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.neighbours", *arguments]),
        "hardware": hardware(),
        "setting": {"queries": QUERIES, "tables": ACTIONS, "dims": DIMS, "k": K},
        "backends": options.backends,
        "frames": {},
        "rows": [],
    }
    for game in options.games:
        pool, queries, what = collect(game, options.frames, options.data / f"{game}.npz")
        result["frames"][game] = {"count": len(pool), "what": what, "queries": len(queries)}
        for size in options.sizes:
            keys, kind = tables(pool, size)
            row: dict[str, Any] = {"game": game, "size": size, "keys": kind}
            for name in options.backends:
                row[name] = measure(name, keys, queries, options.seconds)
                print(f"{game} {size:>9,} {name:>6} {row[name]['ms_median']:8.2f} ms, recall {row[name]['recall']:.4f}", flush=True)
            result["rows"].append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "neighbours.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "neighbours.md").write_text(markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

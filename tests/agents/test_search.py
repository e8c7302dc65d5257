"""Every search backend gives the true neighbours, on keys chosen to break it, with the same bits."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from agents.search import ScanSearch, Search, exact_distances, make_search
from envs.api import UserError

BACKENDS = [name for name in ("torch", "faiss", "scan") if name != "faiss" or importlib.util.find_spec("faiss")]
D, K = 24, 11


def brute(keys: list[Tensor], sizes: list[int], queries: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The answer, in numpy float64, ties by lowest row."""
    count, actions = wanted.shape
    distances, rows = np.full((count, actions, k), np.inf), np.full((count, actions, k), -1)
    for a in range(actions):
        table = keys[a][: sizes[a]].numpy().astype(np.float64)
        for n in range(count):
            if wanted[n, a]:
                squared = ((table - queries[n].numpy().astype(np.float64)) ** 2).sum(1)
                rows[n, a] = np.argsort(squared, kind="stable")[:k]
                distances[n, a] = squared[rows[n, a]]
    return torch.from_numpy(distances).float(), torch.from_numpy(rows)


def told(name: str, keys: list[Tensor], sizes: list[int], pieces: int = 1) -> Search:
    """A search that was told of the rows in `pieces` calls an action."""
    search = make_search(name, keys[0].shape[1], len(keys), "cpu")
    for a, size in enumerate(sizes):
        for rows in torch.arange(size).chunk(pieces):
            search.written(a, keys[a], rows)
    return search


def agree(search: Search, keys: list[Tensor], sizes: list[int], queries: Tensor, wanted: Tensor | None = None, k: int = K) -> None:
    wanted = torch.ones(len(queries), len(keys), dtype=torch.bool) if wanted is None else wanted
    distances, rows = search.nearest(keys, sizes, queries, wanted, k)
    true_distances, true_rows = brute(keys, sizes, queries, wanted, k)
    assert distances.dtype == torch.float32
    assert rows.dtype == torch.int64
    assert torch.equal(rows, true_rows)
    torch.testing.assert_close(distances, true_distances, rtol=1e-6, atol=0)


def offset(g: torch.Generator) -> Tensor:
    return (torch.randn(3000, D, generator=g) + 30000.0 * torch.arange(1, D + 1)).float()


def heavy_tails(g: torch.Generator) -> Tensor:
    return torch.randn(3000, D, generator=g) / torch.rand(3000, 1, generator=g) ** 2


def lattice(g: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (3000, D), generator=g).float()


def duplicates(g: torch.Generator) -> Tensor:
    return torch.randn(30, D, generator=g)[torch.randint(0, 30, (3000,), generator=g)]


def rising(g: torch.Generator) -> Tensor:
    return torch.arange(3000.0)[:, None] * torch.randn(1, D, generator=g) + torch.randn(3000, D, generator=g)


HARD = {
    "normal": lambda g: torch.randn(3000, D, generator=g),
    "huge offset": offset,
    "offset that leaves few bits": lambda g: torch.randn(3000, D, generator=g) + 1e6,
    "tiny scale": lambda g: torch.randn(3000, D, generator=g) * 1e-22,
    "great scale": lambda g: torch.randn(3000, D, generator=g) * 1e18,
    "constant dims": lambda g: torch.randn(3000, D, generator=g) * (torch.arange(D) % 3 == 0) + 7,
    "all equal": lambda g: torch.full((3000, D), 1e9),
    "duplicates": duplicates,
    "lattice": lattice,
    "heavy tails": heavy_tails,
    "one far key": lambda g: torch.cat((torch.randn(2999, D, generator=g), torch.full((1, D), 1e9))),
    "rising": rising,
}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("kind", HARD)
def test_true_neighbours_on_hard_keys(name: str, kind: str) -> None:
    g = torch.Generator().manual_seed(len(kind))
    keys = [HARD[kind](g) for _ in range(3)]
    sizes = [3000, 1500, 333]
    near = keys[0][torch.randint(0, 3000, (9,), generator=g)]
    queries = torch.cat((near, near + near.std() * 0.01 * torch.randn(9, D, generator=g), 3 * near, near[:1] * 0, near[:1] * 0 + 1e5))
    wanted = torch.rand(len(queries), 3, generator=g) < 0.7
    agree(told(name, keys, sizes), keys, sizes, queries, wanted)
    agree(told(name, keys, sizes, pieces=29), keys, sizes, queries, wanted)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dims", [1, 3, 8, 64, 130])
@pytest.mark.parametrize("k", [1, 50])
def test_dimensions_and_k(name: str, dims: int, k: int) -> None:
    g = torch.Generator().manual_seed(dims)
    keys = [torch.randn(size, dims, generator=g) + 100 for size in (700, 50)]
    queries = torch.randn(17, dims, generator=g) + 100
    agree(told(name, keys, [700, 50]), keys, [700, 50], queries, k=k)  # the second table holds exactly k at k = 50


@pytest.mark.parametrize("name", BACKENDS)
def test_all_backends_have_the_same_bits_on_larger_tables(name: str) -> None:
    g = torch.Generator().manual_seed(5)
    keys = [torch.randn(12000, 64, generator=g) @ torch.randn(64, 64, generator=g) + 3000 for _ in range(2)]
    sizes = [12000, 11000]
    queries = keys[0][:20] + 3 * torch.randn(20, 64, generator=g)
    wanted = torch.ones(20, 2, dtype=torch.bool)
    distances, rows = told(name, keys, sizes).nearest(keys, sizes, queries, wanted, 300)
    reference = told("torch", keys, sizes)._all  # type: ignore[attr-defined]
    for a in range(2):
        true_distances, true_rows = reference(keys[a][: sizes[a]], queries, 300)
        assert torch.equal(rows[:, a], true_rows)
        assert torch.equal(distances[:, a], true_distances.float())


@pytest.mark.parametrize("name", BACKENDS)
def test_growth_and_overwriting(name: str) -> None:
    g = torch.Generator().manual_seed(6)
    queries = torch.randn(10, D, generator=g)
    keys, sizes = [torch.empty(40, D) for _ in range(2)], [0, 0]
    search = make_search(name, D, 2, "cpu")
    for turn in range(25):
        for a in range(2):
            new = int(torch.randint(1, 60, (), generator=g)) + (K if turn == 0 else 0)
            while sizes[a] + new > keys[a].shape[0]:
                grown = torch.full((2 * keys[a].shape[0], D), torch.nan)  # what lies beyond `sizes` must not matter
                grown[: sizes[a]] = keys[a][: sizes[a]]
                keys[a] = grown
            over = torch.randint(0, max(sizes[a], 1), (20 if sizes[a] else 0,), generator=g)
            rows = torch.cat((over.unique(), torch.arange(sizes[a], sizes[a] + new)))
            # Later keys lie ever farther out, one of each batch beyond all others, and some queries among them.
            keys[a][rows] = torch.randn(len(rows), D, generator=g) * 1.5**turn
            keys[a][rows[-1]] *= 1000
            sizes[a] += new
            search.written(a, keys[a], rows)
        agree(search, keys, sizes, queries * 1.4**turn)
    fresh = make_search(name, D, 2, "cpu")
    fresh.rebuild(keys, sizes)
    agree(fresh, keys, sizes, queries)


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_wanted_and_too_few_keys(name: str) -> None:
    keys, sizes = [torch.randn(64, D), torch.randn(64, D)], [64, K - 1]
    search = told(name, keys, sizes)
    distances, rows = search.nearest(keys, sizes, torch.randn(4, D), torch.zeros(4, 2, dtype=torch.bool), K)
    assert bool((distances == torch.inf).all())
    assert bool((rows == -1).all())
    wanted = torch.tensor([[True, False]] * 4)
    agree(search, keys, sizes, torch.randn(4, D), wanted)
    wanted[2, 1] = True
    with pytest.raises(ValueError, match="action 1 holds 10 keys"):
        search.nearest(keys, sizes, torch.randn(4, D), wanted, K)


def test_scan_gives_the_same_bits_with_any_number_of_threads() -> None:
    g = torch.Generator().manual_seed(8)
    keys = [torch.randn(60000, 16, generator=g), torch.randint(0, 3, (60000, 16), generator=g).float()]
    queries, wanted = torch.randn(33, 16, generator=g), torch.ones(33, 2, dtype=torch.bool)
    answers = []
    for threads in (1, 2, 7):  # 7 threads split two tables into parts
        search = ScanSearch(16, 2, threads)
        search.rebuild(keys, [60000, 60000])
        answers.append(search.nearest(keys, [60000, 60000], queries, wanted, 50))
    for distances, rows in answers[1:]:
        assert torch.equal(distances, answers[0][0])
        assert torch.equal(rows, answers[0][1])


def test_scan_filters_and_keeps_its_step_when_one_key_is_far() -> None:
    """Rows measured exactly: a few hundred of 50,000, with and without a key at 1e9."""
    from agents import scan

    g = torch.Generator().manual_seed(9)
    keys = torch.randn(50000, 64, generator=g)
    for far in (False, True):
        if far:
            keys[777] = 1e9
        search = ScanSearch(64, 1, 1)
        search.rebuild([keys], [50000])
        measured: list[int] = []
        search._scan = lambda *arguments, measured=measured: measured.append(scan.search(*arguments))
        search.nearest([keys], [50000], torch.randn(8, 64, generator=g), torch.ones(8, 1, dtype=torch.bool), K)
        assert measured[0] < 8 * 500


def test_scan_measures_few_rows_of_keys_that_drift() -> None:
    """Every row is nearer to the query than all before it, as where a network's keys move while it learns."""
    from agents import scan

    g = torch.Generator().manual_seed(13)
    keys = torch.arange(30000.0)[:, None] * 0.01 + torch.randn(30000, 16, generator=g)
    search = told("scan", [keys], [30000])
    assert isinstance(search, ScanSearch)
    measured: list[int] = []
    search._scan = lambda *arguments: measured.append(scan.search(*arguments))
    agree(search, [keys], [30000], keys[-4:] + 1)
    assert sum(measured) < 4 * 1500


def test_the_error_bound_is_needed_and_kept() -> None:
    """Neighbours that differ by less than a step of the codes, in a table whose range is wide: only the bound keeps them apart."""
    g = torch.Generator().manual_seed(10)
    keys = torch.randn(20000, 64, generator=g) * 100
    cluster = torch.randperm(20000, generator=g)[:2000]
    keys[cluster] = keys[cluster[0]] + 0.4 * torch.randn(2000, 64, generator=g)
    queries = keys[cluster[:1]] + 0.4 * torch.randn(16, 64, generator=g)
    agree(told("scan", [keys], [20000]), [keys], [20000], queries)


def test_a_row_that_rounds_away_from_the_query_is_not_lost() -> None:
    """Two keys at 10.60 and 10.55 steps in each dimension from a query that rounds to itself: the nearer has the farther code."""
    keys = torch.randn(100, 64, generator=torch.Generator().manual_seed(11))
    search = told("scan", [keys], [100])
    assert isinstance(search, ScanSearch)
    centre, step = torch.from_numpy(search._tables[0].centre).float(), search._tables[0].step
    keys[:] = centre + 100 * step
    keys[5], keys[90] = centre + 10.6 * step, centre + 10.55 * step
    search.written(0, keys, torch.arange(100))
    assert search._tables[0].step == step
    agree(search, [keys], [100], centre[None], k=1)


def test_codes_follow_keys_that_spread() -> None:
    g = torch.Generator().manual_seed(12)
    keys = torch.randn(2000, 64, generator=g)
    keys[1000:] *= 100
    search = ScanSearch(64, 1)
    search.written(0, keys, torch.arange(1000))
    step = search._tables[0].step
    for rows in torch.arange(1000, 1500).split(20):
        search.written(0, keys, rows)
    assert search._tables[0].step > 50 * step


def test_exact_distances_by_hand() -> None:
    query = torch.zeros(2, 10)
    keys = torch.arange(20.0).view(2, 10)
    assert exact_distances(query, keys).tolist() == [285.0, 2185.0]
    assert exact_distances(torch.tensor([1e8]), torch.tensor([1e8 + 8])).item() == 64.0


def test_announced_bytes() -> None:
    keys = torch.randn(1024, 64)
    search = ScanSearch(64, 1)
    search.written(0, keys, torch.arange(100))
    held = search._tables[0].codes.numel() + 4 * search._tables[0].halves.numel()
    assert held == 1024 * search.bytes_per_entry == 1024 * 68


def test_names() -> None:
    assert isinstance(make_search("auto", 64, 2, "cpu"), ScanSearch)
    with pytest.raises(UserError, match="auto, torch, faiss, scan"):
        make_search("annoy", 64, 2, "cpu")
    with pytest.raises(UserError, match="CPU only"):
        make_search("scan", 64, 2, "cuda")


def test_faiss_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs faiss"):
        make_search("faiss", 64, 2, "cpu")


def test_plain_processors_get_the_same_rows() -> None:
    """The kernel as compiled for a processor without VNNI, in a process of its own."""
    code = (
        "import torch; from agents import scan; from agents.search import make_search\n"
        "assert not scan.VNNI\n"
        "g = torch.Generator().manual_seed(0)\n"
        "keys, q = [torch.randn(5000, 30, generator=g) + 50], torch.randn(19, 30, generator=g) + 50\n"
        "answers = []\n"
        "for name in ('torch', 'scan'):\n"
        "    s = make_search(name, 30, 1, 'cpu'); s.rebuild(keys, [5000])\n"
        "    answers.append(s.nearest(keys, [5000], q, torch.ones(19, 1, dtype=torch.bool), 11))\n"
        "assert all(torch.equal(x, y) for x, y in zip(*answers))\n"
    )
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])

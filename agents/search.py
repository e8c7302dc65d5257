"""Exact nearest neighbours of a few queries in one growing table of keys an action, by three backends with equal answers.

`torch` is the reference (CPU and CUDA), `faiss` calls faiss.knn (or knn_gpu), `scan` runs our own compiled int8 filter (CPU). The caller
owns the keys; a backend keeps at most codes beside them.

**One definition of distance.** Every backend ends by measuring its candidates with the same additions in the same order
(`exact_distances`, float64), and orders them by (distance, row). So backends, devices and numbers of threads agree in every bit, and equal
keys come lowest row first. What differs is only the filter before, and each filter proves that it lost nobody or measures more rows.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from envs.api import UserError

SEARCHES = ("auto", "torch", "faiss", "scan")
UNIT = 2.0**-24  # float32 rounding
TINY = 2.0**-126  # what one float32 product may lose below its normal range


class Search(Protocol):
    """Finds the nearest rows of A tables of float32 keys (capacity_a, D) that the caller owns and overwrites. Keys are finite."""

    bytes_per_entry: int
    """What the backend keeps for one row beside its float32 key. While a table grows, old and new codes exist together for a moment."""

    def written(self, action: int, keys: Tensor, rows: Tensor) -> None:
        """Takes note that `rows` int64 (M) of the table `keys` (capacity, D) were just written, appended without gaps or overwritten.

        `keys` may be a larger copy of the tensor of the call before. O(M D), and now and then O(size D) (amortised over the rows).
        """

    def nearest(self, keys: Sequence[Tensor], sizes: Sequence[int], queries: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of the first sizes[a] rows of keys[a] to each of `queries` float32 (N, D) where `wanted` bool (N, A).

        Returns squared distances float32 (N, A, k), ascending, and rows int64 (N, A, k), equal distances by lowest row; inf and -1 where
        not wanted. ValueError where a wanted table holds fewer than k rows or a shape or dtype is wrong. O(N sum(sizes) D).
        """

    def rebuild(self, keys: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Forgets everything and takes in the first sizes[a] rows of each table, as after a checkpoint was loaded."""


def exact_distances(queries: Tensor, keys: Tensor) -> Tensor:
    """|query - key|^2 in float64 of float32 `queries` (..., D) and `keys` (..., D): (...).

    The squares of dimensions d, d + 8, d + 16, ... are added in this order into eight sums, these by halves: only elementwise operations,
    so the result has the same bits on every device, and the same as the compiled kernel's.
    """
    gap = queries.double() - keys.double()
    square = gap * gap
    if square.shape[-1] % 8:
        square = torch.nn.functional.pad(square, (0, -square.shape[-1] % 8))
    total = square[..., :8]
    for start in range(8, square.shape[-1], 8):
        total = total + square[..., start : start + 8]
    total = total[..., :4] + total[..., 4:]
    total = total[..., :2] + total[..., 2:]
    return total[..., 0] + total[..., 1]


def ranked(queries: Tensor, keys: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of candidate `rows` int64 (Q, M) by (exact distance, row): float64 (Q, k) and int64 (Q, k)."""
    rows = rows.sort(dim=1).values
    distances, order = exact_distances(queries[:, None], keys[rows]).sort(dim=1, stable=True)
    return distances[:, :k], rows.gather(1, order[:, :k])


def check_nearest(keys: Sequence[Tensor], sizes: Sequence[int], queries: Tensor, wanted: Tensor, k: int) -> None:
    """ValueError unless the arguments of `nearest` fit together."""
    count, dims = queries.shape
    if tuple(wanted.shape) != (count, len(keys)) or wanted.dtype != torch.bool or len(sizes) != len(keys):
        raise ValueError(f"wanted must be bool ({count}, {len(keys)}), with one size a table")
    if k < 1 or queries.dtype != torch.float32:
        raise ValueError(f"queries must be float32 and k at least 1, got {queries.dtype} and {k}")
    for table, size in zip(keys, sizes):
        if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != dims or not table.is_contiguous() or size > table.shape[0]:
            raise ValueError(f"keys must be contiguous float32 (capacity >= size, {dims})")
    if min(sizes) < k:
        for action, asked in enumerate(wanted.any(0).tolist()):
            if asked and sizes[action] < k:
                raise ValueError(f"action {action} holds {sizes[action]} keys, fewer than k = {k}")


class TorchSearch:
    """Matrix products of centred keys as a filter, candidates measured exactly, a guard that proves the filter right.

    **The guard.** With p = q - c and y = x - c in float32, the filter ranks rows by y.y - 2 p.y, computed in float32 and any order of
    additions. Of the m best, the k-th in exact distance lies at r. A row left out that is as near as r has |y| <= |p| + r = R, so its
    score errs by at most B = 4 (D + 8) 2^-24 R^2 (+ underflow). If the m-th best score exceeds r^2 - |p|^2 by more than B, none exists.
    Else m is multiplied by eight, and at last all rows are measured.
    """

    bytes_per_entry = 0

    def __init__(self, dims: int, device: torch.device) -> None:
        self.dims, self.device = dims, device
        self.chunk = (1 << 14) if device.type == "cpu" else (1 << 18)
        self._centred = self._square = torch.empty(0, dims, device=device)
        self._scores = torch.empty(0, device=device)

    def written(self, action: int, keys: Tensor, rows: Tensor) -> None:
        """Nothing to do: all is computed from the keys themselves."""

    def rebuild(self, keys: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Nothing to do."""

    def nearest(self, keys: Sequence[Tensor], sizes: Sequence[int], queries: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Search.nearest`. On CUDA every query visits every table that is large enough; the host waits once a table, for the guard."""
        check_nearest(keys, sizes, queries, wanted, k)
        count, actions = wanted.shape
        distances = torch.full((count, actions, k), torch.inf, device=queries.device)
        rows = torch.full((count, actions, k), -1, dtype=torch.int64, device=queries.device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            for action, size in enumerate(sizes):
                if size < k:
                    continue
                chosen = wanted[:, action].nonzero()[:, 0] if queries.device.type == "cpu" else torch.arange(count, device=queries.device)
                if chosen.numel():
                    found = self._table(keys[action][:size], queries[chosen], k, max(k + 16, 32))
                    distances[chosen, action], rows[chosen, action] = found[0].float(), found[1]
        finally:
            torch.set_float32_matmul_precision(precision)
        if queries.device.type != "cpu":
            distances.masked_fill_(~wanted[:, :, None], torch.inf)
            rows.masked_fill_(~wanted[:, :, None], -1)
        return distances, rows

    def _table(self, keys: Tensor, queries: Tensor, k: int, limit: int) -> tuple[Tensor, Tensor]:
        size = keys.shape[0]
        if limit > 4096 + k or 2 * limit >= size:
            return self._all(keys, queries, k)
        rows, sure_above = self._filter(keys, queries, limit)
        distances, found = ranked(queries, keys, rows, k)
        doubtful = (~sure_above(distances[:, -1])).nonzero()[:, 0]
        if doubtful.numel():
            again = self._table(keys, queries[doubtful], k, 8 * limit)
            distances[doubtful], found[doubtful] = again
        return distances, found

    def _filter(self, keys: Tensor, queries: Tensor, limit: int) -> tuple[Tensor, Any]:
        """Rows of the `limit` best scores, int64 (Q, limit), and the guard: squared distances (Q) -> bool (Q), none left out so near."""
        centre = keys[:: max(1, keys.shape[0] // 256)].mean(0)
        aim = queries - centre
        best = rows = None
        for start in range(0, keys.shape[0], self.chunk):
            part = keys[start : start + self.chunk]
            scores, places = self._best(part, centre, aim, min(limit, part.shape[0]))
            places = places + start
            if best is not None and rows is not None:
                scores, places = torch.cat((best, scores), 1), torch.cat((rows, places), 1)
                scores, order = scores.topk(limit, dim=1, largest=False, sorted=False)
                places = places.gather(1, order)
            best, rows = scores, places
        assert best is not None
        assert rows is not None
        worst, length = best.max(1).values.double(), aim.double().square().sum(1)

        def sure_above(nearest: Tensor) -> Tensor:
            reach = length.sqrt() + nearest.sqrt()
            error = 4 * (self.dims + 8) * (UNIT * reach.square() * 1.001 + TINY)
            return worst + length - error > nearest

        return rows, sure_above

    def _best(self, keys: Tensor, centre: Tensor, aim: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        count, size = aim.shape[0], keys.shape[0]
        if self._centred.shape[0] < size:
            self._centred, self._square = (torch.empty(self.chunk, self.dims, device=keys.device) for _ in range(2))
        if self._scores.numel() < count * size:
            self._scores = torch.empty(count * self.chunk, device=keys.device)
        centred, square = self._centred[:size], self._square[:size]
        torch.sub(keys, centre, out=centred)
        norms = torch.mul(centred, centred, out=square).sum(1)
        scores = self._scores[: count * size].view(count, size)
        torch.addmm(norms, aim, centred.T, alpha=-2, out=scores)
        blocks = size // 64
        if blocks <= 2 * limit or size % 64:
            return scores.topk(limit, dim=1, largest=False, sorted=False)
        # The best `limit` scores lie in the `limit` blocks with the least minima: a small top-k, then another.
        scores = scores.view(count, blocks, 64)
        places = scores.amin(2).topk(limit, dim=1, largest=False, sorted=False).indices
        inside = scores.gather(1, places[:, :, None].expand(-1, -1, 64)).view(count, -1)
        values, order = inside.topk(limit, dim=1, largest=False, sorted=False)
        return values, places.gather(1, order // 64) * 64 + order % 64

    def _all(self, keys: Tensor, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Every row measured exactly, one query after another in pieces that fit the cache."""
        distances, rows = [], []
        for query in queries:
            far = torch.cat([exact_distances(query, part) for part in keys.split(8192)])
            if keys.shape[0] <= 8192:
                values, order = far.sort(stable=True)
            else:
                near = (far <= far.kthvalue(k).values).nonzero()[:, 0]
                values, order = far[near].sort(stable=True)
                order = near[order]
            distances.append(values[:k])
            rows.append(order[:k])
        return torch.stack(distances), torch.stack(rows)


class FaissSearch(TorchSearch):
    """faiss as the filter; the exact measure, the guard and the retreat are those of `TorchSearch`.

    On the CPU, faiss.knn adds squared differences directly for calls of fewer queries than its `distance_compute_blas_threshold`, so a
    distance errs by at most (D + 2) 2^-24 of itself; that this holds is checked on every candidate. On CUDA, faiss.knn_gpu ranks centred
    chunks by products, under the guard of `TorchSearch`; it takes at most 2048 neighbours.
    """

    def __init__(self, dims: int, device: torch.device) -> None:
        super().__init__(dims, device)
        import faiss

        self.faiss = faiss
        if device.type == "cuda":
            import faiss.contrib.torch_utils  # makes faiss take tensors

            self.resources = faiss.StandardGpuResources()

    def _filter(self, keys: Tensor, queries: Tensor, limit: int) -> tuple[Tensor, Any]:
        if queries.device.type != "cpu" or limit > 2048:
            return super()._filter(keys, queries, limit)
        piece = max(1, min(len(queries), self.faiss.cvar.distance_compute_blas_threshold - 1))
        parts = [self.faiss.knn(queries[at : at + piece].numpy(), keys.numpy(), limit) for at in range(0, len(queries), piece)]
        scores, rows = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts))
        rounding = 2 * (self.dims + 2) * UNIT
        rows.clamp_(min=0)  # faiss gives -1 where a distance overflows; such rows fail the check below
        measured = exact_distances(queries[:, None], keys[rows])
        honest = ((scores.double() - measured).abs() <= rounding * measured + self.dims * TINY).all(1)
        worst = scores.double().max(1).values

        def sure_above(nearest: Tensor) -> Tensor:
            return honest & (worst * (1 - rounding) - self.dims * TINY > nearest)

        return rows, sure_above

    def _best(self, keys: Tensor, centre: Tensor, aim: Tensor, limit: int) -> tuple[Tensor, Tensor]:
        if keys.device.type == "cpu" or limit > 2048:
            return super()._best(keys, centre, aim, limit)
        squared, rows = self.faiss.knn_gpu(self.resources, aim, keys - centre, limit)
        return squared - aim.square().sum(1, keepdim=True), rows


class ScanSearch:
    """int8 codes of the keys (`agents.codes`), filtered and measured in one compiled pass (`agents.scan` proves its bound). CPU only.

    Threads are plain Python threads that leave the interpreter's lock, so no threading layer of numba is involved; small searches stay on
    the calling thread.
    """

    def __init__(self, dims: int, num_actions: int, threads: int | None = None) -> None:
        from agents import codes, scan

        self._scan, self._new_codes = scan.search, lambda: codes.Codes(dims)
        self.threads = threads
        self.bytes_per_entry = codes.bytes_per_row(dims)
        self._tables = [self._new_codes() for _ in range(num_actions)]
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def written(self, action: int, keys: Tensor, rows: Tensor) -> None:
        """See `Search.written`."""
        if rows.numel():
            self._tables[action].written(keys, np.ascontiguousarray(rows.numpy()))

    def rebuild(self, keys: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """See `Search.rebuild`."""
        self._tables = [self._new_codes() for _ in keys]
        for codes, table, size in zip(self._tables, keys, sizes):
            codes.load(table, size)

    def nearest(self, keys: Sequence[Tensor], sizes: Sequence[int], queries: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """See `Search.nearest`."""
        check_nearest(keys, sizes, queries, wanted, k)
        asked = wanted.numpy()
        per_table = asked.sum(0)
        lengths = np.array(sizes, np.int64)
        if any(size > filled for size, filled, asks in zip(sizes, (table.filled for table in self._tables), per_table) if asks):
            raise ValueError("a table holds rows that `written` was never told of")
        count, actions = asked.shape
        # Microseconds on one thread, roughly; below 200 a second thread costs more than it gives.
        work = float((per_table * 5.0 + (per_table + 7) // 8 * lengths * 0.0014).sum())
        threads = 1 if work < 200 else (self.threads or torch.get_num_threads())
        tables = int((per_table > 0).sum())
        parts = 1 if tables >= threads else max(1, min(-(-threads // max(tables, 1)), int(lengths.max()) // 16384))
        distances = np.full((parts, count, actions, k), np.inf)
        rows = np.full((parts, count, actions, k), -1, np.int64)
        longest_first = np.argsort(-lengths * (per_table > 0), kind="stable")  # so that threads end together
        addresses = ([t.data_ptr() for t in keys], [t.codes.data_ptr() for t in self._tables], [t.halves.data_ptr() for t in self._tables])
        fits = ([t.step for t in self._tables], [t.slack for t in self._tables], [t.error for t in self._tables])
        arguments: list[Any] = [np.array(column, np.int64) for column in addresses]
        arguments += [lengths, longest_first, np.stack([t.centre for t in self._tables]), *(np.array(column) for column in fits)]
        arguments += [np.ascontiguousarray(queries.numpy()), np.ascontiguousarray(asked).view(np.uint8), parts, np.zeros(1, np.int64)]
        arguments += [distances, rows]
        helpers = [self._workers().submit(self._scan, *arguments) for _ in range(min(threads, tables * parts) - 1)]
        self._scan(*arguments)
        for helper in helpers:
            helper.result()
        best, places = distances[0], rows[0]
        if parts > 1:
            joined, where = (np.moveaxis(values, 0, 2).reshape(count, actions, parts * k) for values in (distances, rows))
            order = np.lexsort((where, joined))[..., :k]
            best, places = np.take_along_axis(joined, order, 2), np.take_along_axis(where, order, 2)
        return torch.from_numpy(best.astype(np.float32)), torch.from_numpy(np.ascontiguousarray(places))

    def _workers(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pool[0] != os.getpid():  # threads do not survive a fork
            self._pool = os.getpid(), ThreadPoolExecutor(max(1, (self.threads or torch.get_num_threads()) - 1), "scan")
        return self._pool[1]


def make_search(name: str, dims: int, num_actions: int, device: torch.device | str) -> Search:
    """The search called `name` for keys of `dims` dimensions in `num_actions` tables on `device`.

    `auto` is the fastest measured (benchmarks/results/neighbours.md): scan on the CPU, torch on CUDA. UserError for an
    unknown name, faiss without its package, scan away from the CPU or beyond its dimensions.
    """
    from_device = torch.device(device)
    if name == "auto":
        name = "scan" if from_device.type == "cpu" and dims <= 8192 else "torch"
    if name == "torch":
        return TorchSearch(dims, from_device)
    if name == "faiss":
        if importlib.util.find_spec("faiss") is None:
            raise UserError("agent.search=faiss needs faiss: install reverie[cpu] or reverie[gpu], or take agent.search=auto")
        if from_device.type == "cuda" and not hasattr(importlib.import_module("faiss"), "StandardGpuResources"):
            raise UserError("agent.search=faiss on CUDA needs faiss-gpu: install reverie[gpu], or take agent.search=auto")
        return FaissSearch(dims, from_device)
    if name == "scan":
        if from_device.type != "cpu":
            raise UserError(f"agent.search=scan runs on the CPU only, not on {from_device}: take agent.search=auto")
        if dims > 8192:
            raise UserError(f"agent.search=scan takes at most 8192 dimensions, got {dims}: take agent.search=torch")
        return ScanSearch(dims, num_actions)
    raise UserError(f"unknown agent.search={name}: choose one of {', '.join(SEARCHES)}")

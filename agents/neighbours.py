"""The memory of episodic agents: for every action a growing table of keys and values, read by exact match or nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.hashing import HashIndex, action_hashes
from agents.search import Search, make_search
from envs.api import UserError

FIRST_ROWS = 1024
GROWTH = 1.125  # of a table that is full; a doubling would leave up to half of the memory unused


class Estimate(NamedTuple):
    """What the memory says of N keys under each of A actions.

    Attributes:
        value: float32 (N, A); +inf where an action has fewer than k entries.
        exact: bool (N, A), where the value is that of the very same frame.
        rows: int64 (N, A, k), the rows that were read: the neighbours, or the exact row first; -1 where none.
    """

    value: Tensor
    exact: Tensor
    rows: Tensor


class Table:
    """The rows of one action, of which `size` are in use: keys float32 (rows, D), values float32, hashes and stamps int64 (rows), and
    moments float32 (rows, M) of an optimiser where rows are learned."""

    def __init__(self, dims: int, rows: int, device: torch.device, moments: int = 0) -> None:
        self.size = 0
        self.keys = torch.empty(rows, dims, device=device)
        self.values = torch.empty(rows, device=device)
        self.hashes = torch.empty(rows, dtype=torch.int64, device=device)
        self.stamps = torch.zeros(rows, dtype=torch.int64, device=device)
        self.moments = torch.zeros(rows, moments, device=device)

    def columns(self) -> dict[str, Tensor]:
        """The tensors by name, whole."""
        columns = {"keys": self.keys, "values": self.values, "hashes": self.hashes, "stamps": self.stamps}
        return columns | ({"moments": self.moments} if self.moments.shape[1] else {})

    def reserve(self, rows: int, capacity: int) -> None:
        """Makes room for `rows` rows, one tensor after another, so that only one is held twice at a time."""
        room = self.values.shape[0]
        if rows <= room:
            return
        room = allocated(rows, room, capacity)
        for name, old in self.columns().items():
            grown = torch.zeros(room, *old.shape[1:], dtype=old.dtype, device=old.device)
            grown[: self.size] = old[: self.size]
            setattr(self, name, grown)


def allocated(rows: int, room: int, capacity: int) -> int:
    """Rows that a table with `room` rows has after it grew for `rows`."""
    while room < rows:
        room = int(room * GROWTH) + 1
    return min(room, capacity)


class Tables:
    """One table an action, whose rows are found by exact match or by nearness. A full table gives up those that were used longest ago.

    What a value is, and how it is read and written, is for the classes built on this one. Keys and values live on `device`. Tables grow by
    an eighth, up to `capacity` rows each.

    Args:
        num_actions: A.
        dims: D, the length of a key.
        capacity: rows that each table may hold, at least k.
        k: neighbours that an estimate reads.
        search: backend of the nearest-neighbour search (see `agents.search.make_search`).
    """

    moments = 0  # of a row

    def __init__(self, num_actions: int, dims: int, capacity: int, k: int, device: torch.device, search: str = "auto") -> None:
        if k < 1:
            raise UserError(f"k must be at least 1, got {k}")
        if capacity < k:
            raise UserError(f"capacity must be at least k = {k} entries an action, got {capacity}")
        self.num_actions, self.dims, self.capacity, self.k, self.device = num_actions, dims, capacity, k, device
        self._search: Search = make_search(search, dims, num_actions, device)
        self._clear()

    def _clear(self) -> None:
        first = min(FIRST_ROWS, self.capacity)
        self.tables = [Table(self.dims, first, self.device, self.moments) for _ in range(self.num_actions)]
        self._ready = torch.zeros(self.num_actions, dtype=torch.bool, device=self.device)
        self._clock = 0
        self._index = HashIndex(self.device)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        """Entries of each table."""
        return [table.size for table in self.tables]

    @property
    def nbytes(self) -> int:
        """Bytes that the memory takes now, the search's codes and the rows that it has grown for included."""
        rows = sum(table.values.shape[0] for table in self.tables)
        return rows * self._bytes_per_row() + self._index.nbytes

    def required_bytes(self, entries: int) -> int:
        """An upper bound of the bytes that the memory takes with `entries` entries, however they spread over the actions.

        Rows that a table has grown for and not used yet, and the copy that is made while the largest one grows, are included.
        """
        first = min(FIRST_ROWS, self.capacity)
        largest = min(entries, self.capacity)
        rows = min(int(entries * GROWTH) + self.num_actions * (first + 1), self.num_actions * self.capacity)
        return rows * self._bytes_per_row() + HashIndex.required_bytes(entries) + largest * max(4 * self.dims, self._search.bytes_per_entry)

    def _bytes_per_row(self) -> int:
        return 4 * self.dims + 4 + 8 + 8 + 4 * self.moments + self._search.bytes_per_entry

    def touch(self, rows: Tensor) -> None:
        """Marks rows int64 (N, A, k) of an estimate (-1: none) as used now."""
        self._clock += 1
        read = rows.transpose(0, 1).flatten(1)  # A, N * k
        stamps = torch.where(read >= 0, self._clock, 0)
        read = read.clamp(min=0)
        for action, table in enumerate(self.tables):
            table.stamps.scatter_reduce_(0, read[action], stamps[action], "amax")

    def _append(self, action: int, keys: Tensor, pairs: Tensor, values: Tensor) -> Tensor:
        """Writes new entries of `action`, at most `capacity` and no pair twice, into new rows or over old ones: the rows int64 (M)."""
        table, count = self.tables[action], pairs.shape[0]
        fresh = min(count, self.capacity - table.size)
        rows = torch.arange(table.size, table.size + fresh, device=self.device)
        if fresh < count:
            oldest = table.stamps[: table.size].topk(count - fresh, largest=False).indices.sort().values
            self._index.remove(table.hashes[oldest])
            rows = torch.cat([rows, oldest])
        table.reserve(table.size + fresh, self.capacity)
        table.size += fresh
        table.keys[rows], table.values[rows], table.hashes[rows], table.stamps[rows] = keys, values, pairs, self._clock
        self._ready[action] = table.size >= self.k
        self._index.insert(pairs, rows)
        self._search.written(action, table.keys, rows)
        return rows

    def _pairs(self, actions: Tensor, hashes: Tensor) -> Tensor:
        """The hashes int64 (T) of pairs of a frame, by its hash, and an action."""
        return action_hashes(hashes, self.num_actions).gather(1, actions.unsqueeze(1)).squeeze(1)

    def state_dict(self) -> dict[str, Any]:
        """The columns of the rows in use, table by table, and the clock. Views, not copies."""
        tables = {
            str(action): {name: column[: table.size] for name, column in table.columns().items()}
            for action, table in enumerate(self.tables)
        }
        return {"dims": self.dims, "clock": self._clock, "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. Takes each table out of `state` once it is copied, so that a large memory is not held twice.

        UserError where the tables do not fit this memory.
        """
        saved = state["tables"]
        sizes = [saved[str(action)]["values"].shape[0] for action in range(len(saved))]
        if len(saved) != self.num_actions or state["dims"] != self.dims or max(sizes) > self.capacity:
            raise UserError(
                f"the saved memory has {len(saved)} actions, keys of {state['dims']} numbers and up to {max(sizes)} rows; "
                f"this one {self.num_actions}, {self.dims} and {self.capacity}"
            )
        self._clear()
        self._clock = state["clock"]
        for action, (table, size) in enumerate(zip(self.tables, sizes)):
            columns = saved.pop(str(action))
            table.reserve(size, self.capacity)
            for name, column in table.columns().items():
                column[:size] = columns[name].to(self.device)
            table.size = size
            self._ready[action] = size >= self.k
            if size:
                self._index.insert(table.hashes[:size], torch.arange(size, device=self.device))
        self._search.rebuild([table.keys for table in self.tables], sizes)


class Neighbours(Tables):
    """The tables of episodic control: a value only rises, an estimate is the exact match's or the plain mean over the k nearest."""

    def estimate(self, keys: Tensor, hashes: Tensor) -> Estimate:
        """The value of each action: that of the exact match, else the plain mean over the k nearest keys (equation 2 of MFEC).

        An action with fewer than k entries is worth +inf, so that it is tried first. Changes nothing.

        Args:
            keys: float32 (N, D).
            hashes: int64 (N), of the raw frames.
        """
        exact_rows = self._index.lookup(action_hashes(hashes, self.num_actions))
        exact = (exact_rows >= 0) & self._ready
        keys_of = [table.keys for table in self.tables]
        _, rows = self._search.nearest(keys_of, self.sizes, keys, self._ready & ~exact, self.k)
        known, near = exact_rows.clamp(min=0), rows.clamp(min=0)
        exact_value = torch.stack([table.values[known[:, action]] for action, table in enumerate(self.tables)], dim=1)
        mean = torch.stack([table.values[near[:, action]].mean(1) for action, table in enumerate(self.tables)], dim=1)
        value = torch.where(exact, exact_value, mean)
        rows[:, :, 0] = torch.where(exact, exact_rows, rows[:, :, 0])
        return Estimate(torch.where(self._ready, value, torch.inf), exact, rows)

    def write(self, actions: Tensor, keys: Tensor, hashes: Tensor, values: Tensor) -> None:
        """Writes steps, new pairs of (frame, action) as new rows; a known pair keeps the larger value (equation 1 of MFEC).

        Args:
            actions: int64 (T).
            keys: float32 (T, D).
            hashes: int64 (T), of the raw frames.
            values: float (T), the returns.
        """
        self._clock += 1
        pairs, group = self._pairs(actions, hashes).unique(return_inverse=True)
        best = torch.full(pairs.shape, -torch.inf, device=self.device)
        best = best.scatter_reduce(0, group, values.to(torch.float32), "amax")
        step = torch.zeros_like(pairs).scatter_reduce(0, group, torch.arange(group.shape[0], device=self.device), "amax")
        action, rows = actions[step], self._index.lookup(pairs)
        for number, table in enumerate(self.tables):
            mine = action == number
            known = (mine & (rows >= 0)).nonzero().squeeze(1)
            table.values[rows[known]] = torch.maximum(table.values[rows[known]], best[known])
            table.stamps[rows[known]] = self._clock
            new = (mine & (rows < 0)).nonzero().squeeze(1)
            if new.shape[0]:
                new = new[step[new].argsort()[-self.capacity :]]
                self._append(number, keys[step[new]], pairs[new], best[new])

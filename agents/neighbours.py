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


class Neighbours:
    """One table an action. A value only rises; a full table gives up the rows that were used (read or written) longest ago.

    Keys and values live on `device`. Tables double as they grow, up to `capacity` rows each.

    Args:
        num_actions: A.
        dims: D, the length of a key.
        capacity: rows that each table may hold, at least k.
        k: neighbours that an estimate averages.
        search: backend of the nearest-neighbour search (see `agents.search.make_search`).
    """

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
        self.sizes = [0] * self.num_actions
        self.keys = [torch.empty(first, self.dims, device=self.device) for _ in range(self.num_actions)]
        self._values = torch.empty(self.num_actions, first, device=self.device)
        self._hashes = torch.empty(self.num_actions, first, dtype=torch.int64, device=self.device)
        self._stamps = torch.empty(self.num_actions, first, dtype=torch.int64, device=self.device)
        self._clock = 0
        self._index = HashIndex(self.device)

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def nbytes(self) -> int:
        """Bytes that the memory takes now, the search's codes and the rows that it has grown for included."""
        held = sum(table.nbytes for table in (*self.keys, self._values, self._hashes, self._stamps))
        return held + self._index.nbytes + len(self) * self._search.bytes_per_entry

    def required_bytes(self, entries: int) -> int:
        """Bytes that the memory takes with `entries` entries in all, the largest copy made while growing included."""
        entries = min(entries, self.num_actions * self.capacity)
        row = 4 * self.dims + 4 + 8 + 8 + self._search.bytes_per_entry
        largest_copy = min(entries, self.capacity) * max(4 * self.dims, 8 * self.num_actions) // 2
        return entries * row + HashIndex.required_bytes(entries) + largest_copy

    def estimate(self, keys: Tensor, hashes: Tensor) -> Estimate:
        """The value of each action: that of the exact match, else the plain mean over the k nearest keys (equation 2 of MFEC).

        An action with fewer than k entries is worth +inf, so that it is tried first. Changes nothing.

        Args:
            keys: float32 (N, D).
            hashes: int64 (N), of the raw frames.
        """
        exact_rows = self._index.lookup(action_hashes(hashes, self.num_actions))
        ready = torch.tensor([size >= self.k for size in self.sizes], device=self.device).expand_as(exact_rows)
        exact = (exact_rows >= 0) & ready
        _, rows = self._search.nearest(self.keys, self.sizes, keys, ready & ~exact, self.k)
        action = torch.arange(self.num_actions, device=self.device)
        mean = self._values[action.view(1, -1, 1), rows.clamp(min=0)].mean(2)
        value = torch.where(exact, self._values[action, exact_rows.clamp(min=0)], mean)
        rows[:, :, 0] = torch.where(exact, exact_rows, rows[:, :, 0])
        return Estimate(torch.where(ready, value, torch.inf), exact, rows)

    def touch(self, rows: Tensor) -> None:
        """Marks rows int64 (N, A, k) of an estimate (-1: none) as used now."""
        self._clock += 1
        read = rows.transpose(0, 1).flatten(1)  # A, N * k
        self._stamps.scatter_reduce_(1, read.clamp(min=0), torch.where(read >= 0, self._clock, 0), "amax")

    def write(self, actions: Tensor, keys: Tensor, hashes: Tensor, values: Tensor) -> None:
        """Writes steps, new pairs of (frame, action) as new rows; a known pair keeps the larger value (equation 1 of MFEC).

        Args:
            actions: int64 (T).
            keys: float32 (T, D).
            hashes: int64 (T), of the raw frames.
            values: float (T), the returns.
        """
        self._clock += 1
        pairs = action_hashes(hashes, self.num_actions).gather(1, actions.unsqueeze(1)).squeeze(1)
        pairs, group = pairs.unique(return_inverse=True)
        best = torch.full(pairs.shape, -torch.inf, device=self.device)
        best = best.scatter_reduce(0, group, values.to(torch.float32), "amax")
        step = torch.zeros_like(pairs).scatter_reduce(0, group, torch.arange(group.shape[0], device=self.device), "amax")
        action, rows = actions[step], self._index.lookup(pairs)
        known = rows >= 0
        known_action, known_rows = action[known], rows[known]
        self._values[known_action, known_rows] = torch.maximum(self._values[known_action, known_rows], best[known])
        self._stamps[known_action, known_rows] = self._clock
        for table in range(self.num_actions):
            new = (~known & (action == table)).nonzero().squeeze(1)
            if new.shape[0]:
                new = new[step[new].argsort()[-self.capacity :]]
                self._append(table, keys[step[new]], pairs[new], best[new])

    def _append(self, table: int, keys: Tensor, pairs: Tensor, values: Tensor) -> None:
        count, size = pairs.shape[0], self.sizes[table]
        fresh = min(count, self.capacity - size)
        rows = torch.arange(size, size + fresh, device=self.device)
        if fresh < count:
            oldest = self._stamps[table, :size].topk(count - fresh, largest=False).indices.sort().values
            self._index.remove(self._hashes[table, oldest])
            rows = torch.cat([rows, oldest])
        self._reserve(table, size + fresh)
        self.sizes[table] = size + fresh
        self.keys[table][rows] = keys
        self._values[table, rows] = values
        self._hashes[table, rows] = pairs
        self._stamps[table, rows] = self._clock
        self._index.insert(pairs, rows)
        self._search.written(table, self.keys[table], rows)

    def _reserve(self, table: int, rows: int) -> None:
        """Doubles what is too small for `rows` rows, one tensor after another, so that only one copy exists at a time."""
        if rows > (held := self.keys[table].shape[0]):
            grown = torch.empty(self._doubled(held, rows), self.dims, device=self.device)
            grown[:held] = self.keys[table]
            self.keys[table] = grown
        if rows > (held := self._values.shape[1]):
            columns = self._doubled(held, rows)
            for name in ("_values", "_hashes", "_stamps"):
                old = getattr(self, name)
                grown = torch.empty(self.num_actions, columns, dtype=old.dtype, device=self.device)
                grown[:, :held] = old
                setattr(self, name, grown)

    def _doubled(self, held: int, rows: int) -> int:
        while held < rows:
            held *= 2
        return min(held, self.capacity)

    def state_dict(self) -> dict[str, Any]:
        """Keys, values, hashes and stamps of the rows in use, table by table, and the clock."""
        tables = {
            str(table): {
                "keys": self.keys[table][:size],
                "values": self._values[table, :size],
                "hashes": self._hashes[table, :size],
                "stamps": self._stamps[table, :size],
            }
            for table, size in enumerate(self.sizes)
        }
        return {"dims": self.dims, "clock": self._clock, "tables": tables}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. UserError where the tables do not fit this memory."""
        tables = state["tables"]
        sizes = [tables[str(table)]["values"].shape[0] for table in range(len(tables))]
        if len(tables) != self.num_actions or state["dims"] != self.dims or max(sizes) > self.capacity:
            raise UserError(
                f"the saved memory has {len(tables)} actions, keys of {state['dims']} numbers and up to {max(sizes)} rows; "
                f"this one {self.num_actions}, {self.dims} and {self.capacity}"
            )
        self._clear()
        self._clock = state["clock"]
        for table, size in enumerate(sizes):
            saved = tables[str(table)]
            self._reserve(table, size)
            self.sizes[table] = size
            self.keys[table][:size] = saved["keys"].to(self.device)
            for name in ("values", "hashes", "stamps"):
                getattr(self, f"_{name}")[table, :size] = saved[name].to(self.device)
            if size:
                self._index.insert(self._hashes[table, :size], torch.arange(size, device=self.device))
        self._search.rebuild(self.keys, self.sizes)

"""Differentiable neural dictionaries (Pritzel et al. 2017, arXiv 1703.01988, section 3.1): tables whose keys and values are learned."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from agents.neighbours import Tables
from envs.api import UserError


class Reading(NamedTuple):
    """What the dictionaries say of N keys under each of A actions.

    Attributes:
        value: float32 (N, A); 0 where a dictionary is empty.
        rows: int64 (N, A, k), the neighbours that were read; -1 where a dictionary has fewer than k.
    """

    value: Tensor
    rows: Tensor


class Near(NamedTuple):
    """Copies of the neighbours of B keys: keys float32 (B, k, D), values float32 (B, k), and bool (B, k) whether there is one at all."""

    keys: Tensor
    values: Tensor
    known: Tensor


def kernel_read(query: Tensor, near: Near, delta: float) -> Tensor:
    """sum_i w_i v_i with w_i = k_i / sum_j k_j and k_i = 1 / (|h - h_i|^2 + delta) (equations 1, 2 and 5), over the known neighbours.

    Args:
        query: float (B, D), h. Each must have a known neighbour.
        near: its neighbours h_i and their values v_i.
        delta: above 0.

    Returns:
        float (B), differentiable in query, keys and values.
    """
    kernel = near.known / ((query.unsqueeze(1) - near.keys).square().sum(2) + delta)
    return (kernel * near.values).sum(1) / kernel.sum(1)


class Dictionaries(Tables):
    """One dictionary an action. A pair of frame and action has one entry, found by a hash of the raw frame.

    Kept from the paper: read, tabular update, eviction of the entry that was a neighbour longest ago (one that is written counts as one),
    gradients into keys and values. Different: the neighbours are the exact ones, not those of an approximate search; the paper finds an
    entry to be updated by its key, which no frame has any more once the network has learned, and appends it again: here the frame's hash
    finds it, and it moves to the frame's present key. RMSProp keeps one moment of a key, the mean over its D numbers, instead of D: eight
    bytes an entry, and a step that has the gradient's direction. The moments of an entry decay when it is learned from.

    Args:
        num_actions, dims, capacity, k, device, search: see Tables; k is the paper's p.
        delta: of the kernel.
        alpha: share of the way to its new value that a known entry goes when it is written.
    """

    moments = 2  # RMSProp's, of a row's key and of its value

    def __init__(
        self,
        num_actions: int,
        dims: int,
        capacity: int,
        k: int,
        delta: float,
        alpha: float,
        device: torch.device,
        search: str = "auto",
    ) -> None:
        if not 0 < delta < float("inf"):
            raise UserError(f"agent.delta must be above 0, got {delta}")
        if not 0 < alpha <= 1:
            raise UserError(f"agent.alpha must lie in (0, 1], got {alpha}")
        super().__init__(num_actions, dims, capacity, k, device, search)
        self.delta, self.alpha = delta, alpha

    def nearest(self, keys: Tensor, wanted: Tensor) -> Tensor:
        """The k nearest rows to keys float32 (N, D) of each dictionary where `wanted` bool (N, A): int64 (N, A, k), else -1.

        All rows where there are fewer than k, and -1 behind them.
        """
        _, rows = self._search.nearest([table.keys for table in self.tables], self.sizes, keys, wanted & self._ready, self.k)
        for action, size in enumerate(self.sizes):
            if 0 < size < self.k:
                all_rows = torch.arange(size, device=self.device)
                rows[:, action, :size] = torch.where(wanted[:, action, None], all_rows, -1)
        return rows

    def estimate(self, keys: Tensor) -> Reading:
        """Reads every dictionary at keys float32 (N, D). Changes nothing."""
        rows = self.nearest(keys, torch.ones(keys.shape[0], self.num_actions, dtype=torch.bool, device=self.device))
        value = torch.zeros(rows.shape[:2], device=self.device)
        for action, table in enumerate(self.tables):
            if table.size:
                value[:, action] = kernel_read(keys, self._near(action, rows[:, action]), self.delta)
        return Reading(value, rows)

    def near(self, actions: Tensor, rows: Tensor) -> Near:
        """The neighbours `rows` int64 (B, k) of B keys, those of row b in the dictionary of actions[b], which is not empty."""
        count, k = rows.shape
        keys, values = torch.empty(count, k, self.dims, device=self.device), torch.empty(count, k, device=self.device)
        for action in range(self.num_actions):
            mine = (actions == action).nonzero().squeeze(1)
            if mine.shape[0]:
                found = self._near(action, rows[mine])
                keys[mine], values[mine] = found.keys, found.values
        return Near(keys, values, rows >= 0)

    def _near(self, action: int, rows: Tensor) -> Near:
        table, places = self.tables[action], rows.clamp(min=0)  # row 0 stands for those that are not there
        return Near(table.keys[places], table.values[places], rows >= 0)

    def write(self, actions: Tensor, keys: Tensor, hashes: Tensor, values: Tensor) -> None:
        """Writes steps one after another: a new pair is appended, a known one's value moves by alpha (new - old) (equation 4).

        Args:
            actions: int64 (T).
            keys: float32 (T, D).
            hashes: int64 (T), of the raw frames.
            values: float (T), the N-step returns.
        """
        self._clock += 1
        pairs, values = self._pairs(actions, hashes), values.to(torch.float32)
        turns = _occurrences(pairs)
        for turn in range(int(turns.max()) + 1):
            now = (turns == turn).nonzero().squeeze(1)
            rows = self._index.lookup(pairs[now])
            for action, table in enumerate(self.tables):
                mine = actions[now] == action
                known = mine & (rows >= 0)
                self._move(action, rows[known], keys[now[known]], values[now[known]])
                new = now[mine & (rows < 0)][-self.capacity :]
                if new.shape[0]:
                    rows_of_new = self._append(action, keys[new], pairs[new], values[new])  # in a table that may have grown
                    table.moments[rows_of_new] = 0

    def _move(self, action: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        table = self.tables[action]
        table.keys[rows] = keys
        table.values[rows] += self.alpha * (values - table.values[rows])
        table.stamps[rows] = self._clock
        self._search.written(action, table.keys, rows)

    def descend(self, actions: Tensor, rows: Tensor, gradient: tuple[Tensor, Tensor], rate: float, decay: float, epsilon: float) -> None:
        """One RMSProp step of the entries that a loss was made of; the search follows. An entry whose gradient is not finite stays.

        s = decay s + (1 - decay) g^2;  p -= rate g / (sqrt(s) + epsilon), g^2 averaged over a key. What the loss says of an entry that is
        a neighbour of several keys is added up.

        Args:
            actions: int64 (B).
            rows: int64 (B, k), as they were read.
            gradient: of the loss, by the keys (B, k, D) and the values (B, k) of `near`.
        """
        of_keys, of_values = gradient
        for action, table in enumerate(self.tables):
            mine = (actions == action).unsqueeze(1) & (rows >= 0)
            touched, place = rows[mine].unique(return_inverse=True)
            key = torch.zeros(touched.shape[0], self.dims, device=self.device).index_add_(0, place, of_keys[mine])
            value = torch.zeros(touched.shape[0], device=self.device).index_add_(0, place, of_values[mine])
            square = torch.stack([key.square().mean(1), value.square()], 1)
            finite = square.isfinite().all(1)
            square = torch.lerp(square, table.moments[touched], decay)
            step = rate / (square.sqrt() + epsilon)
            touched, square, step, key, value = touched[finite], square[finite], step[finite], key[finite], value[finite]
            table.moments[touched] = square
            table.keys[touched] -= step[:, :1] * key
            table.values[touched] -= step[:, 1] * value
            self._search.written(action, table.keys, touched)


def _occurrences(pairs: Tensor) -> Tensor:
    """How many equal ones come before: int64 (T) -> int64 (T)."""
    ordered, order = pairs.sort(stable=True)
    place = torch.arange(pairs.shape[0], device=pairs.device)
    opens = torch.ones_like(ordered, dtype=torch.bool)
    opens[1:] = ordered[1:] != ordered[:-1]
    rank = place - torch.where(opens, place, 0).cummax(0).values
    return torch.empty_like(rank).index_copy_(0, order, rank)

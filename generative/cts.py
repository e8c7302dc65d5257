"""Context-tree switching over small grey frames: the density of Bellemare et al. 2016, one tree a pixel."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from envs.api import UserError
from generative.api import Recoding
from generative.cts_kernel import INITIAL_WEIGHT, tree_nodes
from generative.grey_levels import to_frames


class CTS:
    """A Density by context-tree switching (Veness et al. 2012), with location-dependent models (Bellemare et al. 2016, section 3.3).

    A frame's log-probability is the sum over pixels, each predicted from its left, upper, upper-left and upper-right neighbours by a tree
    of its own, which is split on the left neighbour first. As in the first author's code (github.com/mgbellemare/SkipCTS): contexts and
    their order, the Dirichlet prior 1 / levels, weights 1/2 at first, switching rate 1 / (t + 1) at the t-th update. Different from it: the
    two weights are updated at the same time, as in the paper; neighbours beyond the border have level 0.

    Tables are dense: 1 + L + L^2 + L^3 + L^4 nodes a pixel, of L counts each. 42x42 frames of 8 levels take 281 MB.

    Args:
        height: of a frame, in pixels.
        width: of a frame, in pixels.
        levels: grey levels, 2 to 256; a pixel of 0..255 has level pixel * levels // 256.
        device: of the tables.
        obs_shape: (1, H, W), in place of height and width.
        num_actions: ignored; frames alone are modelled.
    """

    exact = True
    updates_per_frame = 1.0
    _counts: Tensor
    _inner: Tensor

    def __init__(
        self,
        height: int = 42,
        width: int = 42,
        levels: int = 8,
        device: torch.device | str = "cpu",
        obs_shape: tuple[int, int, int] | None = None,
        num_actions: int = 0,
    ) -> None:
        if obs_shape is not None:
            channels, height, width = obs_shape
            if channels != 1:
                raise UserError(f"density=cts models grey frames (1, H, W), got {tuple(obs_shape)}")
        if height < 1 or width < 1:
            raise UserError(f"height and width must be at least 1, got {height}x{width}")
        if not 2 <= levels <= 256:
            raise UserError(f"levels must lie in 2..256, got {levels}")
        self.obs_shape = (1, height, width)
        self.levels, self.updates = levels, 0
        self.device = torch.device(device)
        _, nodes = tree_nodes(levels)
        self._shape = (nodes, height * width, levels)
        memory = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else psutil.virtual_memory().total
        if self.nbytes > memory:
            trees = f"context trees of {levels} levels over {height}x{width} pixels"
            raise UserError(f"{trees} take {self.nbytes:,} bytes and {self.device} has {memory:,}; lower levels")
        self._clear()
        self._pool: ThreadPoolExecutor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the tables take once all is touched."""
        nodes, pixels, levels = self._shape
        return pixels * (4 * nodes * levels + 16 * tree_nodes(levels)[0])

    def absorb(self, frames: Tensor) -> Recoding:
        """Learns uint8 (B, 1, H, W) frames of 0..255, one after another. Returns float64 (B) nats of each just before and just after."""
        shown = self.quantise(frames)
        batch, height, width = shown.shape
        if self.device.type == "cuda":
            from generative.cts_cuda import THREADS, absorb_pixels

            before, after = torch.empty((2, batch, height * width), dtype=torch.float64, device=self.device)
            absorb_pixels[-(-height * width // THREADS), THREADS](self._counts, self._inner, shown, self.updates, before, after)
        else:
            from generative.cts_kernel import absorb_rows

            before, after = torch.zeros((2, batch, height), dtype=torch.float64)
            counts, inner, levels = self._counts.numpy(), self._inner.numpy(), shown.numpy()
            sums = before.numpy(), after.numpy()
            self._in_parts(height, lambda first, stop: absorb_rows(counts, inner, levels, first, stop, self.updates, *sums))
        self.updates += batch
        return Recoding(before.sum(1), after.sum(1))

    def log_prob(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) -> float64 (B), nats; learns nothing."""
        shown = self.quantise(frames)
        batch, height, width = shown.shape
        if self.device.type == "cuda":
            from generative.cts_cuda import THREADS, predict_pixels

            nats = torch.empty((batch, height * width), dtype=torch.float64, device=self.device)
            predict_pixels[-(-height * width * batch // THREADS), THREADS](self._counts, self._inner, shown, nats)
            return nats.sum(1)
        from generative.cts_kernel import predict_rows

        nats = torch.zeros((batch, height), dtype=torch.float64)
        tables, levels, sums = (self._counts.numpy(), self._inner.numpy()), shown.numpy(), nats.numpy()
        self._in_parts(height, lambda first, stop: predict_rows(*tables, levels, first, stop, sums))
        return nats.sum(1)

    def sample(self, n: int) -> Tensor:
        """uint8 (n, 1, H, W), drawn with torch's default generator. Quantising gives the levels back."""
        _, height, width = self.obs_shape
        uniform = torch.rand(n, height, width, dtype=torch.float64, device=self.device)
        shown = torch.zeros(n, height, width, dtype=torch.uint8, device=self.device)
        if self.device.type == "cuda":
            from generative.cts_cuda import THREADS
            from generative.cts_cuda import sample_frames as sample_on_device

            sample_on_device[-(-n // THREADS), THREADS](self._counts, self._inner, shown, uniform)
        else:
            from generative.cts_kernel import sample_frames

            tables, frames, draws = (self._counts.numpy(), self._inner.numpy()), shown.numpy(), uniform.numpy()
            self._in_parts(n, lambda first, stop: sample_frames(*tables, frames, first, stop, draws))
        return to_frames(shown, self.levels)

    def quantise(self, frames: Tensor) -> Tensor:
        """uint8 (B, 1, H, W) of 0..255 -> uint8 (B, H, W) levels, contiguous, on the model's device. UserError for other shapes."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or tuple(frames.shape[1:]) != self.obs_shape:
            raise UserError(f"density=cts takes uint8 frames (B, {self.obs_shape}), got {frames.dtype} {tuple(frames.shape)}")
        return (frames[:, 0].to(self.device, torch.int32) * self.levels // 256).to(torch.uint8).contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Visited nodes only: their places int64 (M), counts int32 (M, levels) and, of inner ones, weight and sum float64 (.., 2)."""
        counts = self._counts.view(-1, self.levels)
        if self.device.type == "cuda":
            nodes = counts.any(1).nonzero()[:, 0]
        else:
            from generative.cts_kernel import visited

            nodes = torch.from_numpy(visited(counts.numpy()))
        inner = self._inner.view(-1, 2)[self._inner_of(nodes)]
        return {"shape": self._described(), "updates": self.updates, "nodes": nodes, "counts": counts[nodes], "inner": inner}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`. UserError where it was made for other frames or levels."""
        if dict(state["shape"]) != self._described():
            raise UserError(f"the context trees of this checkpoint are of {dict(state['shape'])}, not of {self._described()}")
        nodes = state["nodes"].to(self.device)
        self._clear()
        self._counts.view(-1, self.levels)[nodes] = state["counts"].to(self.device)
        self._inner.view(-1, 2)[self._inner_of(nodes)] = state["inner"].to(self.device)
        self.updates = int(state["updates"])

    def to(self, device: torch.device | str) -> CTS:
        """The same model, its tables on `device`."""
        self.device = torch.device(device)
        self._counts, self._inner = self._counts.to(self.device), self._inner.to(self.device)
        return self

    def _clear(self) -> None:
        """Empty tables."""
        if self.device.type == "cuda":
            self._counts = torch.zeros(self._shape, dtype=torch.int32, device=self.device)
        else:
            self._counts = torch.from_numpy(np.zeros(self._shape, np.int32))  # numpy's zeros take no memory until they are written
        self._inner = torch.zeros(tree_nodes(self.levels)[0], self._shape[1], 2, dtype=torch.float64, device=self.device)
        self._inner[..., 0] = INITIAL_WEIGHT

    def _described(self) -> dict[str, int]:
        return {"height": self.obs_shape[1], "width": self.obs_shape[2], "levels": self.levels}

    def _inner_of(self, nodes: Tensor) -> Tensor:
        """Places int64 among the inner nodes of those of the visited nodes int64 (M) that are inner ones."""
        return nodes[nodes < tree_nodes(self.levels)[0] * self._shape[1]]

    def _in_parts(self, size: int, work: Callable[[int, int], object]) -> None:
        """Runs work(first, stop) over 0..size in parts, on as many threads as torch uses. Results do not depend on how many."""
        threads = max(1, min(torch.get_num_threads(), os.cpu_count() or 1, size))
        if threads == 1:
            work(0, size)
            return
        self._pool = self._pool or ThreadPoolExecutor(threads, "cts")
        bounds = [size * part // threads for part in range(threads + 1)]
        for future in [self._pool.submit(work, *pair) for pair in pairwise(bounds)]:
            future.result()

"""Context-tree switching, one pixel at a time: plain scalar functions, compiled for CPU threads and for CUDA.

A pixel's tree of depth 4 is dense and lies in heap order: the child of node n for the context level c is n * levels + 1 + c. `counts` int32
(nodes, pixels, levels) holds how often each level was seen at a node; `inner` float64 (inner nodes, pixels, 2) the share, in [0, 1], of an
inner node's own estimator in its prediction, and the sum of its counts. The node comes first, since neighbouring pixels are mostly in the
same context: a frame is then a few rows in memory, read from left to right.

Everything is linear, not logarithmic: with p the estimator's prediction, q the child's and w the weight,

    prediction   m = w p + (1 - w) q
    after level  w' = ((1 - a) w p + a (1 - w) q) / m,        a = 1 / (t + 1) at the t-th update

which is the update of Veness et al. 2012 (section 4) with its weights normalised: they never drift, and no logarithm is needed but one
for several pixels. The rate a keeps w at least about a away from 0 and 1, so float64 keeps eight digits of both shares beyond 10^7 updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

DEPTH = 4
PIXELS_PER_LOG = 8  # probabilities multiplied before a logarithm is taken; each is above 1e-30
INITIAL_WEIGHT = 0.5


def tree_nodes(levels: int) -> tuple[int, int]:
    """(inner nodes, all nodes) of one pixel's tree."""
    inner = sum(levels**depth for depth in range(DEPTH))
    return inner, inner + levels**DEPTH


def make_functions(compiled: Callable[..., Any]) -> tuple[Any, Any, Any]:
    """(path_of, recode, predict), compiled by `compiled`, the decorator of the CPU or of CUDA."""

    def path_of(frames, b, i, j, width, levels):
        """The nodes at depth 1 to 4 that pixel (i, j) of frame b uint8 (B, H, W) falls into.

        Contexts are the left, upper, upper-left and upper-right neighbours, in this order, and 0 beyond the border.
        """
        left = frames[b, i, j - 1] if j > 0 else 0
        up = frames[b, i - 1, j] if i > 0 else 0
        up_left = frames[b, i - 1, j - 1] if i > 0 and j > 0 else 0
        up_right = frames[b, i - 1, j + 1] if i > 0 and j + 1 < width else 0
        first = 1 + int(left)
        second = first * levels + 1 + int(up)
        third = second * levels + 1 + int(up_left)
        return first, second, third, third * levels + 1 + int(up_right)

    def total_of(counts, pixel, leaf, levels):
        total = 0
        for symbol in range(levels):
            total += counts[leaf, pixel, symbol]
        return total

    def recode_node(counts, inner, pixel, node, level, prior, rate, before, after):
        """Absorbs `level` at an inner node whose child gave the probabilities `before` and `after`; returns the node's own two."""
        count, weight, total = counts[node, pixel, level], inner[node, pixel, 0], inner[node, pixel, 1]
        counts[node, pixel, level] = count + 1
        inner[node, pixel, 1] = total + 1.0
        share = 1.0 / ((total + 1.0) * (total + 2.0))  # one division in place of two
        stay = weight * ((count + prior) * (total + 2.0) * share)
        split = (1.0 - weight) * before
        mixed = stay + split
        weight = ((1.0 - rate) * stay + rate * split) / mixed
        inner[node, pixel, 0] = weight
        return mixed, weight * ((count + 1.0 + prior) * (total + 1.0) * share) + (1.0 - weight) * after

    def predict_node(counts, inner, pixel, node, level, prior, child):
        """The probability of `level` at an inner node whose child gives it the probability `child`."""
        weight = inner[node, pixel, 0]
        return weight * ((counts[node, pixel, level] + prior) / (inner[node, pixel, 1] + 1.0)) + (1.0 - weight) * child

    total_of, recode_node, predict_node = compiled(total_of), compiled(recode_node), compiled(predict_node)

    def recode(counts, inner, pixel, path, level, levels, rate):
        """Absorbs `level` at the pixel. Returns its probability before and after."""
        first, second, third, leaf = path
        prior = 1.0 / levels
        total = total_of(counts, pixel, leaf, levels)
        count = counts[leaf, pixel, level]
        counts[leaf, pixel, level] = count + 1
        before, after = (count + prior) / (total + 1.0), (count + 1.0 + prior) / (total + 2.0)
        before, after = recode_node(counts, inner, pixel, third, level, prior, rate, before, after)
        before, after = recode_node(counts, inner, pixel, second, level, prior, rate, before, after)
        before, after = recode_node(counts, inner, pixel, first, level, prior, rate, before, after)
        return recode_node(counts, inner, pixel, 0, level, prior, rate, before, after)

    def predict(counts, inner, pixel, path, level, levels):
        """The probability of `level` at the pixel."""
        first, second, third, leaf = path
        prior = 1.0 / levels
        mixed = (counts[leaf, pixel, level] + prior) / (total_of(counts, pixel, leaf, levels) + 1.0)
        mixed = predict_node(counts, inner, pixel, third, level, prior, mixed)
        mixed = predict_node(counts, inner, pixel, second, level, prior, mixed)
        mixed = predict_node(counts, inner, pixel, first, level, prior, mixed)
        return predict_node(counts, inner, pixel, 0, level, prior, mixed)

    return compiled(path_of), compiled(recode), compiled(predict)


_path_of, _recode, _predict = make_functions(njit(nogil=True, inline="always"))


@njit(cache=True, nogil=True)
def absorb_rows(counts, inner, frames, first, stop, updates, before, after):
    """Rows first..stop of uint8 (B, H, W) levels, one frame after another; adds nats to float64 (B, H) `before` and `after`.

    Pixels have trees of their own, so each takes all frames in their order before the next pixel begins: its tree stays in the cache.
    """
    batch, _, width = frames.shape
    levels = counts.shape[2]
    products = np.ones((2, batch))
    for i in range(first, stop):
        for j in range(width):
            pixel = i * width + j
            for b in range(batch):
                path = _path_of(frames, b, i, j, width, levels)
                old, new = _recode(counts, inner, pixel, path, frames[b, i, j], levels, 1.0 / (updates + b + 2.0))
                products[0, b] *= old
                products[1, b] *= new
            if j % PIXELS_PER_LOG == PIXELS_PER_LOG - 1 or j == width - 1:
                for b in range(batch):
                    before[b, i] += math.log(products[0, b])
                    after[b, i] += math.log(products[1, b])
                products[:] = 1.0


@njit(cache=True, nogil=True)
def predict_rows(counts, inner, frames, first, stop, nats):
    """Rows first..stop of uint8 (B, H, W) levels; adds nats to float64 (B, H)."""
    batch, _, width = frames.shape
    levels = counts.shape[2]
    for i in range(first, stop):
        for b in range(batch):
            product = 1.0
            for j in range(width):
                path = _path_of(frames, b, i, j, width, levels)
                product *= _predict(counts, inner, i * width + j, path, frames[b, i, j], levels)
                if j % PIXELS_PER_LOG == PIXELS_PER_LOG - 1 or j == width - 1:
                    nats[b, i] += math.log(product)
                    product = 1.0


@njit(cache=True, nogil=True)
def sample_frames(counts, inner, frames, first, stop, uniform):
    """Draws frames first..stop of uint8 (B, H, W), pixel by pixel in raster order, from uniform float64 (B, H, W) in [0, 1)."""
    _, height, width = frames.shape
    levels = counts.shape[2]
    for b in range(first, stop):
        for i in range(height):
            for j in range(width):
                path = _path_of(frames, b, i, j, width, levels)
                below = 0.0
                level = 0
                while level < levels - 1:
                    below += _predict(counts, inner, i * width + j, path, level, levels)
                    if uniform[b, i, j] < below:
                        break
                    level += 1
                frames[b, i, j] = level


@njit(cache=True, nogil=True)
def visited(counts):
    """int64 (M): the rows of int32 (rows, levels) that are not all zero, ascending."""
    found = np.empty(1024, np.int64)
    size = 0
    for row in range(counts.shape[0]):
        for symbol in range(counts.shape[1]):
            if counts[row, symbol] != 0:
                if size == found.shape[0]:
                    found = np.concatenate((found, np.empty(size, np.int64)))
                found[size] = row
                size += 1
                break
    return found[:size].copy()

"""Compiled kernel of the slim PixelCNN (`generative.masked.SlimNet`) on CPUs: the same function, gradient and online update, one thread.

Nothing here compiles at import; `score` and `absorb` compile at their first call and are cached on disk beside this file.

A pixel's prediction depends on nothing but its context, the cells above and to the left within the first convolution's reach. So the
network is evaluated once a *distinct* context: 300 to 1,060 of the 1,764 pixels in 42x42 frames of five Atari games. Contexts are
told apart exactly, by the levels of each row of cells packed into a word (`find_contexts`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from generative.vectors import LANES, SOURCE, exp, gather, multiply, rmsprop, scatter

ROWS = 64  # contexts that go through all layers together: their activations (about 60 KB) stay in the first caches
FAR_BELOW = np.float32(-1e30)  # logits of the levels that fill the last vector up
_REORDER = {"reassoc", "contract", "nsz"}  # not "fast", which lets a compiler assume that nothing is infinite


@njit(nogil=True, error_model="numpy")
def find_contexts(frames, reach, levels, cells, words, slots, which, examples):
    """Tells the distinct contexts of uint8 (F, H, W) levels apart; returns how many there are.

    A context is the row words at its pixel of the `reach` rows above, and the word of the cells to its left; words hold whole cells, 9 bits
    at most for each of 7, so two contexts are equal exactly where their words are.

    Args:
        cells: uint16 (F, H + reach, W + 2 reach), filled with the frames' levels; the border has level `levels`.
        words: int64 (F, 2, H + reach, W), filled: of the cells around a pixel in its row, and of those to its left.
        slots: int32 (a power of two, at least 2 F H W), a table of contexts with open addressing.
        which: int32 (F H W), filled with each pixel's context.
        examples: int64 (at least as many as contexts), filled with each context's first pixel, a place in `cells`.
    """
    count, height, width = frames.shape
    bits = 1
    while levels >> bits:
        bits += 1
    whole, part = (np.int64(1) << (bits * (2 * reach + 1))) - 1, (np.int64(1) << (bits * reach)) - 1
    cells[:] = levels
    for f in range(count):
        for i in range(height):
            for j in range(width):
                cells[f, i + reach, j + reach] = frames[f, i, j]
        for i in range(height + reach):
            word = np.int64(0)
            for j in range(2 * reach):
                word = (word << bits) | np.int64(cells[f, i, j])
            for j in range(width):
                words[f, 1, i, j] = (word >> (bits * reach)) & part
                word = ((word << bits) | np.int64(cells[f, i, j + 2 * reach])) & whole
                words[f, 0, i, j] = word
    slots[:] = -1
    mask, stride, found = np.int64(slots.shape[0] - 1), width + 2 * reach, 0
    origin = np.empty((examples.shape[0], 3), np.int64)
    for f in range(count):
        for i in range(reach, height + reach):
            for j in range(width):
                code = words[f, 1, i, j]
                for r in range(1, reach + 1):
                    code = (code * np.int64(-7046029254386353131)) ^ words[f, 0, i - r, j]
                    code ^= (code >> 29) & np.int64(0x7FFFFFFFF)
                code *= np.int64(-4417276706812531889)
                slot = (code >> 31) & mask
                while True:
                    context = slots[slot]
                    if context < 0:
                        context = found
                        slots[slot] = found
                        origin[found, 0], origin[found, 1], origin[found, 2] = f, i, j
                        examples[found] = (f * (height + reach) + i) * stride + j + reach
                        found += 1
                        break
                    g, k, m = origin[context, 0], origin[context, 1], origin[context, 2]
                    equal = words[f, 1, i, j] == words[g, 1, k, m]
                    for r in range(1, reach + 1):
                        equal &= words[f, 0, i - r, j] == words[g, 0, k - r, m]
                    if equal:
                        break
                    slot = (slot + 1) & mask
                which[(f * height + i - reach) * width + j] = context
    return found


@njit(nogil=True, error_model="numpy")
def _pack(weights, layers, places, packed):
    """Copies each layer's matrix (in, out), its transpose and its bias into `packed`, out padded to whole vectors: weights with 0."""
    for layer in range(layers.shape[0]):
        matrix, bias, inner, outer = layers[layer]
        padded = (outer + LANES - 1) // LANES * LANES
        for i in range(inner):
            for o in range(outer):
                value = weights[matrix + i * outer + o]
                packed[places[layer, 0] + i * padded + o] = value
                packed[places[layer, 1] + o * inner + i] = value
        packed[places[layer, 2] : places[layer, 2] + padded] = FAR_BELOW
        for o in range(outer):
            packed[places[layer, 2] + o] = weights[bias + o]


@njit(nogil=True, error_model="numpy")
def _unpack(gradient, layers, places, packed):
    """The layers' gradients from `packed`, where those of matrix and bias stand, to their places in the flat gradient."""
    for layer in range(layers.shape[0]):
        matrix, bias, inner, outer = layers[layer]
        padded = (outer + LANES - 1) // LANES * LANES
        for i in range(inner):
            for o in range(outer):
                gradient[matrix + i * outer + o] = packed[places[layer, 3] + i * padded + o]
        for o in range(outer):
            gradient[bias + o] = packed[places[layer, 4] + o]


@njit(nogil=True, error_model="numpy")
def lay_out(layers):
    """int64 (layers, 5) places in `packed` of matrix, transpose, bias and the gradients of matrix and bias; and the size of `packed`."""
    places, size = np.empty((layers.shape[0], 5), np.int64), 0
    for layer in range(layers.shape[0]):
        inner, padded = layers[layer, 2], (layers[layer, 3] + LANES - 1) // LANES * LANES
        for kind in range(5):
            places[layer, kind] = size
            size += padded if kind == 2 or kind == 4 else inner * padded
    return places, size


@njit(nogil=True, error_model="numpy")
def _copy(source, target):
    for place in range(source.shape[0]):
        target[place] = source[place]


@njit(nogil=True, error_model="numpy")
def _add(source, target):
    for place in range(source.shape[0]):
        target[place] += source[place]


@njit(nogil=True, error_model="numpy")
def _dense(x, y, packed, places):
    """y (ROWS, out) = x (ROWS, in) W + b."""
    inner, outer = x.shape[1], y.shape[1]
    matrix, bias = packed.ctypes.data + 4 * places[0], packed.ctypes.data + 4 * places[2]
    multiply(y.ctypes.data, 4 * outer, bias, 0, x.ctypes.data, 4 * inner, 4, matrix, 4 * outer, ROWS, outer, inner)


@njit(nogil=True, error_model="numpy")
def _dense_back(x, dy, dx, packed, places):
    """Adds the gradients of W and b to `packed`, and dy W^T to dx (ROWS, in)."""
    inner, outer = x.shape[1], dy.shape[1]
    matrix, bias = packed.ctypes.data + 4 * places[3], packed[places[4] : places[4] + outer]
    multiply(matrix, 4 * outer, matrix, 4 * outer, x.ctypes.data, 4, 4 * inner, dy.ctypes.data, 4 * outer, inner, outer, ROWS)
    for row in range(ROWS):
        _add(dy[row], bias)
    transpose = packed.ctypes.data + 4 * places[1]
    multiply(dx.ctypes.data, 4 * inner, dx.ctypes.data, 4 * inner, dy.ctypes.data, 4 * outer, 4, transpose, 4 * inner, ROWS, inner, outer)


@njit(nogil=True, error_model="numpy")
def _gate(x, gates, mixed):
    """x (ROWS, 2p) -> gates: tanh of the first half, sigmoid of the second; mixed (ROWS, p): their product."""
    planes = mixed.shape[1]
    one, two = np.float32(1.0), np.float32(2.0)
    for row in range(ROWS):
        source, target, product = x[row], gates[row], mixed[row]
        for j in range(planes):
            target[j] = two / (one + exp(-two * source[j])) - one
            target[planes + j] = one / (one + exp(-source[planes + j]))
            product[j] = target[j] * target[planes + j]


@njit(nogil=True, error_model="numpy")
def _gate_back(dmixed, gates, dx):
    """The gradient of `_gate` with respect to x."""
    planes = dmixed.shape[1]
    one = np.float32(1.0)
    for row in range(ROWS):
        for j in range(planes):
            tanh, sigmoid = gates[row, j], gates[row, planes + j]
            dx[row, j] = dmixed[row, j] * sigmoid * (one - tanh * tanh)
            dx[row, planes + j] = dmixed[row, j] * tanh * sigmoid * (one - sigmoid)


@njit(nogil=True, error_model="numpy")
def _rectify(x, y):
    """y = x where it is above 0, else 0; a nan stays one. Flat arrays, as below."""
    for place in range(x.shape[0]):
        y[place] = np.float32(0.0) if x[place] < np.float32(0.0) else x[place]


@njit(nogil=True, error_model="numpy")
def _rectify_back(dy, y):
    """Zeroes the gradient in place where a rectifier was shut."""
    for place in range(y.shape[0]):
        dy[place] = dy[place] if y[place] > np.float32(0.0) else np.float32(0.0)


@njit(nogil=True, fastmath=_REORDER, error_model="numpy")
def _normalise(logits, probs, log_sums, first):
    """probs (ROWS, padded): softmax; log_sums[first + row]: log of the sum of exp(logits), of which those of the padding are FAR_BELOW."""
    for row in range(ROWS):
        source, target = logits[row], probs[row]
        largest = source[0]
        for j in range(0, source.shape[0], LANES):
            for lane in range(LANES):
                largest = source[j + lane] if source[j + lane] > largest else largest
        total = np.float32(0.0)
        for j in range(0, source.shape[0], LANES):
            for lane in range(LANES):
                target[j + lane] = exp(source[j + lane] - largest)
                total += target[j + lane]
        share = np.float32(1.0) / total
        for j in range(0, source.shape[0], LANES):
            for lane in range(LANES):
                target[j + lane] *= share
        log_sums[first + row] = np.float64(largest) + np.log(np.float64(total))


@njit(nogil=True, error_model="numpy")
def evaluate(weights, layers, places, packed, gradient, cells, offsets, examples, found, counts, scale, learn, logits, log_sums):
    """Runs the network on the contexts: fills logits float32 (contexts, levels padded) and log_sums float64 (contexts).

    With `learn` it also fills `gradient`, that of `scale` times the negative log-likelihood of `counts` float32 (contexts, levels), the
    number of pixels of each level that each context has. Contexts fill whole blocks of ROWS; those beyond `found` are copies of the last,
    with counts of 0.
    """
    blocks, planes, hidden_planes = (layers.shape[0] - 2) // 2, layers[0, 2], layers[-1, 2]
    levels, padded, number = layers[-1, 3], logits.shape[1], offsets.shape[0]
    stream, gates = np.empty((blocks + 1, ROWS, planes), np.float32), np.empty((blocks, ROWS, 2 * planes), np.float32)
    mixed, wide = np.empty((blocks, ROWS, planes), np.float32), np.empty((ROWS, 2 * planes), np.float32)
    top, hidden = np.empty((ROWS, planes), np.float32), np.empty((ROWS, hidden_planes), np.float32)
    probs, dlogits = np.zeros((ROWS, padded), np.float32), np.zeros((ROWS, padded), np.float32)
    dhidden, dtop, dmixed, dwide = np.empty_like(hidden), np.empty_like(top), np.empty_like(top), np.empty_like(wide)
    zero, level_step, cell_step, table = np.float32(0.0), 4 * planes, 4 * planes * (levels + 1), number * (levels + 1) * planes
    bias, dbias = weights[table : table + planes], gradient[table : table + planes]
    _pack(weights, layers, places, packed)
    if learn:
        gradient[:] = zero
        for layer in range(layers.shape[0]):
            packed[places[layer, 3] : places[layer, 4] + (layers[layer, 3] + LANES - 1) // LANES * LANES] = zero
    for first in range(0, found, ROWS):
        for row in range(ROWS):
            pixel = cells.ctypes.data + 2 * examples[min(first + row, found - 1)]
            _copy(bias, stream[0, row])
            for j in range(0, planes, LANES):
                entry = weights.ctypes.data + 4 * j
                gather(stream[0, row].ctypes.data + 4 * j, entry, pixel, offsets.ctypes.data, number, cell_step, level_step)
        for block in range(blocks):
            _dense(stream[block], wide, packed, places[2 * block])
            _gate(wide, gates[block], mixed[block])
            _dense(mixed[block], stream[block + 1], packed, places[2 * block + 1])
            _add(stream[block].reshape(-1), stream[block + 1].reshape(-1))
        _rectify(stream[blocks].reshape(-1), top.reshape(-1))
        _dense(top, hidden, packed, places[2 * blocks])
        _rectify(hidden.reshape(-1), hidden.reshape(-1))
        shown = logits[first : first + ROWS]
        _dense(hidden, shown, packed, places[2 * blocks + 1])
        _normalise(shown, probs, log_sums, first)
        if not learn:
            continue
        for row in range(ROWS):
            total = zero
            for level in range(levels):
                total += counts[first + row, level]
            for level in range(levels):
                dlogits[row, level] = scale * (total * probs[row, level] - counts[first + row, level])
        dhidden[:], dtop[:] = zero, zero
        _dense_back(hidden, dlogits, dhidden, packed, places[2 * blocks + 1])
        _rectify_back(dhidden.reshape(-1), hidden.reshape(-1))
        _dense_back(top, dhidden, dtop, packed, places[2 * blocks])
        _rectify_back(dtop.reshape(-1), top.reshape(-1))
        for block in range(blocks - 1, -1, -1):
            dmixed[:] = zero
            _dense_back(mixed[block], dtop, dmixed, packed, places[2 * block + 1])
            _gate_back(dmixed, gates[block], dwide)
            _dense_back(stream[block], dwide, dtop, packed, places[2 * block])
        for row in range(min(ROWS, found - first)):
            pixel = cells.ctypes.data + 2 * examples[first + row]
            for j in range(0, planes, LANES):
                entry = gradient.ctypes.data + 4 * j
                scatter(dtop[row].ctypes.data + 4 * j, entry, pixel, offsets.ctypes.data, number, cell_step, level_step)
            _add(dtop[row], dbias)
    if learn:
        _unpack(gradient, layers, places, packed)


@njit(nogil=True, error_model="numpy")
def _offsets(reach, width):
    """int64 (cells of a context): bytes from a pixel to each in a padded map of uint16; rows from above, each from the left."""
    offsets, place = np.empty(2 * reach * (reach + 1), np.int64), 0
    for i in range(-reach, 1):
        for j in range(-reach, reach + 1):
            if i < 0 or j < 0:
                offsets[place] = 2 * (i * (width + 2 * reach) + j)
                place += 1
    return offsets


@njit(nogil=True, error_model="numpy")
def _frame_nats(frames, which, logits, log_sums, out):
    """out float64 (F): log-probability of each uint8 (F, H, W) frame from its contexts' logits."""
    count, height, width = frames.shape
    for f in range(count):
        total = 0.0
        for i in range(height):
            for j in range(width):
                context = which[(f * height + i) * width + j]
                total += np.float64(logits[context, frames[f, i, j]]) - log_sums[context]
        out[f] = total


@njit(nogil=True, error_model="numpy")
def _rooms(frames, reach, padded):
    """What `find_contexts` and `evaluate` fill, for uint8 (F, H, W) frames."""
    count, height, width = frames.shape
    pixels, slots = count * height * width, 64
    while slots < 2 * pixels:
        slots *= 2
    rows = (pixels + ROWS - 1) // ROWS * ROWS
    cells, words = np.empty((count, height + reach, width + 2 * reach), np.uint16), np.empty((count, 2, height + reach, width), np.int64)
    logits, log_sums = np.empty((rows, padded), np.float32), np.empty(rows)
    return cells, words, np.empty(slots, np.int32), np.empty(pixels, np.int32), np.empty(rows, np.int64), logits, log_sums


@njit(nogil=True, fastmath=_REORDER, error_model="numpy")
def _square_sum(values):
    """float64 sum of squares."""
    total = 0.0
    for value in values:
        total += np.float64(value) * np.float64(value)
    return total


def _make_entries(source: int) -> tuple[Any, Any]:
    """(score, absorb); a change of `source` compiles them anew, see `generative.vectors`."""

    @njit(cache=True, nogil=True, error_model="numpy")
    def score(frames, weights, layers, reach, out):
        """out float64 (F): log-probability in nats of uint8 (F, H, W) levels; see `absorb` for the rest."""
        assert source >= 0
        levels = layers[-1, 3]
        cells, words, slots, which, examples, logits, log_sums = _rooms(frames, reach, (levels + LANES - 1) // LANES * LANES)
        places, size = lay_out(layers)
        packed, nothing, counts = np.zeros(size, np.float32), np.empty(0, np.float32), np.empty((0, 0), np.float32)
        found = find_contexts(frames, reach, levels, cells, words, slots, which, examples)
        offsets, zero = _offsets(reach, frames.shape[2]), np.float32(0.0)
        evaluate(weights, layers, places, packed, nothing, cells, offsets, examples, found, counts, zero, False, logits, log_sums)
        _frame_nats(frames, which, logits, log_sums, out)

    @njit(cache=True, nogil=True, error_model="numpy")
    def absorb(frames, weights, square, velocity, layers, reach, per_step, rate, decay, momentum, epsilon, tiny, before, after):
        """Online learning of uint8 (B, H, W) levels, a gradient step for each `per_step` frames in turn.

        Args:
            weights, square, velocity: float32 (P), parameters and the optimiser's memory, changed in place. First comes the first
                convolution, (cells, levels + 1, planes), and its bias, then the layers.
            layers: int64 (layers, 4): places in `weights` of matrix (in, out) and bias, in, out. Two a residual block, then the head's two.
            reach: of the first convolution.
            rate, decay, momentum, epsilon, tiny: float32, of `generative.online`.
            before, after: float64 (B), filled with nats.

        Returns:
            How many frames were absorbed before a loss or gradient was not finite; all else is as it was before that step.
        """
        assert source >= 0
        levels, batch = layers[-1, 3], frames.shape[0]
        cells, words, slots, which, examples, logits, log_sums = _rooms(frames[:per_step], reach, (levels + LANES - 1) // LANES * LANES)
        places, size = lay_out(layers)
        packed, gradient = np.zeros(size, np.float32), np.empty_like(weights)
        counts, offsets = np.zeros((examples.shape[0], levels), np.float32), _offsets(reach, frames.shape[2])
        for first in range(0, batch, per_step):
            part = frames[first : first + per_step]
            found = find_contexts(part, reach, levels, cells[: len(part)], words[: len(part)], slots, which, examples)
            counts[: (found + ROWS - 1) // ROWS * ROWS] = np.float32(0.0)
            for pixel in range(part.size):
                counts[which[pixel], part.flat[pixel]] += np.float32(1.0)
            scale = np.float32(1.0 / part.size)
            shown, learnt = before[first : first + per_step], after[first : first + per_step]
            network = weights, layers, places, packed, gradient
            evaluate(*network, cells, offsets, examples, found, counts, scale, True, logits, log_sums)
            _frame_nats(part, which, logits, log_sums, shown)
            if not (np.isfinite(shown.sum()) and np.isfinite(np.float32(_square_sum(gradient)))):
                return first
            kept = weights.copy(), square.copy(), velocity.copy()
            rmsprop(weights, square, velocity, gradient, rate, decay, momentum, epsilon, tiny)
            evaluate(*network, cells, offsets, examples, found, counts, scale, False, logits, log_sums)
            _frame_nats(part, which, logits, log_sums, learnt)
            if not np.isfinite(learnt.sum()):
                for old, target in zip(kept, (weights, square, velocity)):
                    _copy(old, target)
                return first
        return batch

    return score, absorb


score, absorb = _make_entries(SOURCE)

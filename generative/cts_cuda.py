"""The kernels of context-tree switching on CUDA: one thread a pixel, the scalar functions of `generative.cts_kernel`.

Imported only where tensors lie on CUDA (or numba's simulator is on), since importing numba.cuda takes a while.
"""

from __future__ import annotations

import math

from numba import cuda

from generative.cts_kernel import make_functions

THREADS = 64
_path_of, _recode, _predict = make_functions(cuda.jit(device=True))


@cuda.jit
def absorb_pixels(counts, inner, frames, updates, before, after):
    """A thread's pixel of uint8 (B, H, W) levels, one frame after another; writes nats to float64 (B, H * W)."""
    pixel = cuda.grid(1)
    batch, height, width = frames.shape
    if pixel < height * width:
        i, j, levels = pixel // width, pixel % width, counts.shape[2]
        for b in range(batch):
            path = _path_of(frames, b, i, j, width, levels)
            old, new = _recode(counts, inner, pixel, path, frames[b, i, j], levels, 1.0 / (updates + b + 2.0))
            before[b, pixel] = math.log(old)
            after[b, pixel] = math.log(new)


@cuda.jit
def predict_pixels(counts, inner, frames, nats):
    """A thread's pixel and frame of uint8 (B, H, W) levels; writes nats to float64 (B, H * W)."""
    place = cuda.grid(1)
    batch, height, width = frames.shape
    if place < batch * height * width:
        b, pixel = place // (height * width), place % (height * width)
        path = _path_of(frames, b, pixel // width, pixel % width, width, counts.shape[2])
        level = frames[b, pixel // width, pixel % width]
        nats[b, pixel] = math.log(_predict(counts, inner, pixel, path, level, counts.shape[2]))


@cuda.jit
def sample_frames(counts, inner, frames, uniform):
    """A thread's frame of uint8 (B, H, W), drawn pixel by pixel in raster order from uniform float64 (B, H, W) in [0, 1)."""
    b = cuda.grid(1)
    batch, height, width = frames.shape
    if b < batch:
        levels = counts.shape[2]
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

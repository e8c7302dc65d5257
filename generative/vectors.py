"""Vectors of 16 float32 in compiled code: matrix products, sums of table rows, exp, RMSProp. Parts of kernels.

Nothing here compiles at import; most functions are compiled into the kernels that call them. Numba's cache on disk watches only the file in
which a cached function stands, so a kernel must take `SOURCE` into its closure to be compiled anew after a change here.

All matrix products are one kernel, `multiply`, Y = Y0 + X W with free strides in X, so that it serves forward passes (X as it lies), the
gradients of weights (X transposed, W the gradient of the output) and of inputs (W transposed by whoever calls). It keeps eight rows of Y in
registers while it walks along the inner dimension: 50 to 80 billion multiplications a second on one AVX-512 core where the inner
dimension is 16 to 64. A row's sum runs in the same order wherever the row stands, so its bits do not depend on its company.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
TILE = 8  # rows of Y held in registers
SOURCE = zlib.crc32(Path(__file__).read_bytes())

_F32, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_F32, LANES)


def _at(builder: ir.IRBuilder, kind: ir.Type, address: ir.Value, offset: int = 0) -> ir.Value:
    return builder.inttoptr(builder.add(address, _I64(offset)), kind.as_pointer())


def _loop(builder: ir.IRBuilder, stop: ir.Value, start: list[ir.Value], step: Any) -> list[ir.Value]:
    """Emits `for count in range(stop): values = step(count, values)`; the values after it."""
    entry = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    count, values = builder.phi(_I64), [builder.phi(value.type) for value in start]
    for phi, value in zip([count, *values], [_I64(0), *start]):
        phi.add_incoming(value, entry)
    builder.cbranch(builder.icmp_signed("<", count, stop), body, done)
    builder.position_at_end(body)
    for phi, value in zip([count, *values], [builder.add(count, _I64(1)), *step(count, values)]):
        phi.add_incoming(value, body)
    builder.branch(head)
    builder.position_at_end(done)
    return values


def _make_tile(vectors: int) -> Any:
    """Eight rows and 16 * `vectors` columns of Y = Y0 + X W; addresses, strides in bytes, and the number of terms, all int64."""

    @intrinsic
    def tile(typingctx, y, y_row, start, start_row, x, x_row, x_step, w, w_step, terms):
        def codegen(context, builder, signature, arguments):
            y, y_row, start, start_row, x, x_row, x_step, w, w_step, terms = arguments
            multiply_add = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fmuladd.v{LANES}f32"
            )
            undefined, first = ir.Constant(_VECTOR, ir.Undefined), ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
            each = [(r, v) for r in range(TILE) for v in range(vectors)]
            places = [_at(builder, _VECTOR, builder.add(y, builder.mul(y_row, _I64(r))), 64 * v) for r, v in each]
            origins = [_at(builder, _VECTOR, builder.add(start, builder.mul(start_row, _I64(r))), 64 * v) for r, v in each]
            offsets = [builder.mul(x_row, _I64(r)) for r in range(TILE)]

            def step(count, values):
                x, w, *sums = values
                weights = [builder.load(_at(builder, _VECTOR, w, 64 * v), align=4) for v in range(vectors)]
                added = []
                for r in range(TILE):
                    scalar = builder.load(_at(builder, _F32, builder.add(x, offsets[r])), align=4)
                    wide = builder.shuffle_vector(builder.insert_element(undefined, scalar, _I32(0)), undefined, first)
                    added += [builder.call(multiply_add, [wide, weights[v], sums[r * vectors + v]]) for v in range(vectors)]
                return [builder.add(x, x_step), builder.add(w, w_step), *added]

            _, _, *sums = _loop(builder, terms, [x, w, *[builder.load(origin, align=4) for origin in origins]], step)
            for place, value in zip(places, sums):
                builder.store(value, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return tile


_tile_one, _tile_two = _make_tile(1), _make_tile(2)


def _make_lookup(adds: bool) -> Any:
    """16 lanes of y += table[cell, level of the cell], summed over cells; or, to scatter, of table[cell, level of the cell] += y.

    Arguments (int64): addresses of y, of the table, of the context's pixel in a padded map of uint16 levels, and of each cell's place
    relative to it (int64, in bytes); number of cells; bytes from cell to cell and from level to level in the table.
    """

    @intrinsic
    def lookup(typingctx, y, table, pixel, offsets, cells, cell_step, level_step):
        def codegen(context, builder, signature, arguments):
            y, table, pixel, offsets, cells, cell_step, level_step = arguments
            place = _at(builder, _VECTOR, y)

            def step(count, values):
                total, row = values
                offset = builder.load(_at(builder, _I64, builder.add(offsets, builder.mul(count, _I64(8)))))
                level = builder.zext(builder.load(_at(builder, _I16, builder.add(pixel, offset))), _I64)
                entry = _at(builder, _VECTOR, builder.add(row, builder.mul(level, level_step)))
                found = builder.load(entry, align=4)
                if adds:
                    builder.store(builder.fadd(found, total), entry, align=4)
                return [total if adds else builder.fadd(total, found), builder.add(row, cell_step)]

            total, _ = _loop(builder, cells, [builder.load(place, align=4), table], step)
            if not adds:
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), codegen

    return lookup


gather, scatter = _make_lookup(False), _make_lookup(True)


@intrinsic
def _float_of_bits(typingctx, bits):
    """The float32 that has the bits of an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _F32)

    return types.float32(types.int32), codegen


@intrinsic
def _bits_of_float(typingctx, value):
    """The bits of a float32 as an int32."""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], _I32)

    return types.int32(types.float32), codegen


@njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def exp(x):
    """exp(x) in float32, relative error below 2e-7 within -60 and 88, beyond which x is cut; a nan stays one. Vectorised in a loop.

    x is split into a whole number of log 2, which is added to the exponent's bits, and a rest, for which a polynomial stands (the
    coefficients of the Cephes library). Adding 1.5 * 2^23 leaves that whole number in a float's last bits.
    Nothing below exp(-60) comes out, so that no product of it becomes denormal, which processors are slow at.
    """
    x = np.float32(-60.0) if x < np.float32(-60.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    shifted = x * np.float32(1.44269504) + np.float32(12582912.0)
    whole = shifted - np.float32(12582912.0)
    rest = (x - whole * np.float32(0.693359375)) + whole * np.float32(2.12194440e-4)
    power = np.float32(1.9875691500e-4) * rest + np.float32(1.3981999507e-3)
    power = power * rest + np.float32(8.3334519073e-3)
    power = power * rest + np.float32(4.1665795894e-2)
    power = power * rest + np.float32(1.6666665459e-1)
    power = power * rest + np.float32(5.0000001201e-1)
    power = power * (rest * rest) + rest + np.float32(1.0)
    return power * _float_of_bits((_bits_of_float(shifted) + np.int32(127)) << np.int32(23))


@njit(nogil=True)
def multiply(y, y_row, start, start_row, x, x_row, x_step, w, w_step, rows, columns, terms):
    """Y (rows, columns) = Y0 + X (rows, terms) W (terms, columns) at byte addresses; rows a multiple of 8, columns of 16.

    Y0 at `start` may be Y itself, or one row, with `start_row` 0.
    """
    for row in range(0, rows, TILE):
        column = 0
        while column < columns:
            target, origin = y + row * y_row + 4 * column, start + row * start_row + 4 * column
            if column + 2 * LANES <= columns:
                _tile_two(target, y_row, origin, start_row, x + row * x_row, x_row, x_step, w + 4 * column, w_step, terms)
                column += 2 * LANES
            else:
                _tile_one(target, y_row, origin, start_row, x + row * x_row, x_row, x_step, w + 4 * column, w_step, terms)
                column += LANES


@njit(cache=True, nogil=True, error_model="numpy")
def rmsprop(weights, square, velocity, gradient, rate, decay, momentum, epsilon, tiny):
    """A step of `generative.online.OnlineRMSProp` in place, on float32 (P) arrays, the numbers float32 too."""
    one, zero = np.float32(1.0), np.float32(0.0)
    for place in range(weights.shape[0]):
        mean = decay * square[place] + (one - decay) * (gradient[place] * gradient[place])
        square[place] = zero if mean < tiny else mean
        speed = momentum * velocity[place] + rate * gradient[place] / np.sqrt(mean + epsilon)
        velocity[place] = zero if abs(speed) < tiny else speed
        weights[place] -= speed

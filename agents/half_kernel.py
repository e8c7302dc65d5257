"""Compiled kernels of convolutions and dense layers in half precision, for processors with AVX-512 FP16 (`agents.half`).

Nothing here compiles at import; every function compiles at its first call and is cached on disk beside this file. First come tiles, written
in LLVM's instructions, then loops over tiles, whose outermost is shared by numba's threads; no result depends on how many there are.

A vector holds 32 halves, one for each of 32 output channels. Products are added in half precision, and after at most LONGEST_SUM of them
the sum goes to a float32 one, which keeps rounding below that of bfloat16's inputs. A processor without AVX-512 FP16 is made to do the same
by other instructions: right, and slow.

Images lie channels last; a row of a kernel's window is then one run of memory (a segment), whatever the kernel. Addresses and strides are
int64, strides in bytes. Arguments that are constants at compile time come first.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from agents.half_writer import FLOATS, HALF, HALVES, HALVES16, I32, I64, LANES, Writer

LONGEST_SUM = 128


@intrinsic(prefer_literal=True)
def convolve_tile(
    typingctx, rows, vectors, chunk, masked, image, image_column, offsets, chunks, weights, out, out_column, extra, extra_column
):
    """One tile of a convolution's output: `rows` neighbouring columns of an output row, 32 * `vectors` channels, written as halves.

    A window is `chunks` runs of `chunk` inputs, at the byte `offsets` (an address of int64 [chunks]) from its first; weights are halves
    [chunks * chunk][channels]. Unless `masked`, `extra` is the address of float32 biases, and a ReLU follows; else that of halves in the
    output's order, and the output is 0 where they are.
    """
    signature = types.void(rows, vectors, chunk, masked, *[types.int64] * 9)  # literal, so that every set has a body of its own
    rows, vectors, chunk, masked = (constant.literal_value for constant in (rows, vectors, chunk, masked))

    def codegen(context, builder, signature, arguments):
        image, image_column, offsets, chunks, weights, out, out_column, extra, extra_column = arguments[4:]
        write, places = Writer(builder), [(row, vector) for row in range(rows) for vector in range(vectors)]
        entry = builder.block
        outer, inner, after, done = (builder.append_basic_block(name) for name in ("outer", "inner", "after", "done"))
        builder.branch(outer)

        builder.position_at_end(outer)
        number = builder.phi(I64)
        number.add_incoming(I64(0), entry)
        totals = {place: [builder.phi(FLOATS), builder.phi(FLOATS)] for place in places}
        for total in (half for pair in totals.values() for half in pair):
            total.add_incoming(ir.Constant(FLOATS, None), entry)
        window = builder.add(image, write.load(write.at(offsets, 8, number), I64, 8))
        columns = [write.at(window, image_column, row) for row in range(rows)]
        matrix = write.at(weights, chunk * vectors * 2 * LANES, number)
        builder.branch(inner)

        builder.position_at_end(inner)
        step = builder.phi(I64)
        step.add_incoming(I64(0), outer)
        sums = {place: builder.phi(HALVES) for place in places}
        for place in places:
            sums[place].add_incoming(ir.Constant(HALVES, None), outer)
        added = dict(sums)
        for ahead in range(4):
            place = builder.add(step, I64(ahead))
            line = write.at(matrix, vectors * 2 * LANES, place)
            weight = [write.load(builder.add(line, I64(2 * LANES * vector)), HALVES, 2) for vector in range(vectors)]
            for row, column in enumerate(columns):
                value = write.spread(write.at(column, 2, place))
                for vector in range(vectors):
                    added[row, vector] = write.multiply_add(value, weight[vector], added[row, vector])
        following = builder.add(step, I64(4))
        step.add_incoming(following, inner)
        for place, total in sums.items():
            total.add_incoming(added[place], inner)
        builder.cbranch(builder.icmp_signed("<", following, I64(chunk)), inner, after)

        builder.position_at_end(after)
        results = {}
        for place in places:
            results[place] = [builder.fadd(old, new) for old, new in zip(totals[place], write.widen(added[place]))]
            for total, result in zip(totals[place], results[place]):
                total.add_incoming(result, after)
        proceed = builder.add(number, I64(1))
        number.add_incoming(proceed, after)
        builder.cbranch(builder.icmp_signed("<", proceed, chunks), outer, done)

        builder.position_at_end(done)
        for row, vector in places:
            for half, result in enumerate(results[row, vector]):
                byte = I64(2 * LANES * vector + LANES * half)
                if masked:
                    mask = write.load(builder.add(write.at(extra, extra_column, row), byte), HALVES16, 2)
                    result = write.positive(mask, result)
                else:
                    result = builder.fadd(result, write.load(builder.add(extra, builder.mul(byte, I64(2))), FLOATS, 4))
                    result = write.positive(result, result)
                write.store(builder.fptrunc(result, HALVES16), builder.add(write.at(out, out_column, row), byte), 2)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def correlate_tile(
    typingctx, rows, vectors, fresh, factor, image, image_row, image_column, slopes, slopes_row, slopes_column, high, wide, out, out_row
):
    """Adds to a tile of a weight's gradient, float32 `rows` inputs by 32 * `vectors` channels, `factor` times what `high` rows of `wide`
    columns give. With `fresh` the tile holds nothing before."""
    signature = types.void(rows, vectors, fresh, types.float32, *[types.int64] * 10)
    rows, vectors, fresh = rows.literal_value, vectors.literal_value, fresh.literal_value

    def codegen(context, builder, signature, arguments):
        factor, image, image_row, image_column, slopes, slopes_row, slopes_column, high, wide, out, out_row = arguments[3:]
        write, places = Writer(builder), [(row, vector) for row in range(rows) for vector in range(vectors)]
        entry = builder.block
        outer, inner, after, done = (builder.append_basic_block(name) for name in ("outer", "inner", "after", "done"))
        builder.branch(outer)

        builder.position_at_end(outer)
        line = builder.phi(I64)
        line.add_incoming(I64(0), entry)
        begun = {place: builder.phi(HALVES) for place in places}
        for place in places:
            begun[place].add_incoming(ir.Constant(HALVES, None), entry)
        image_line, slopes_line = write.at(image, image_row, line), write.at(slopes, slopes_row, line)
        builder.branch(inner)

        builder.position_at_end(inner)
        step = builder.phi(I64)
        step.add_incoming(I64(0), outer)
        sums = {place: builder.phi(HALVES) for place in places}
        for place in places:
            sums[place].add_incoming(begun[place], outer)
        column, slope = write.at(image_line, image_column, step), write.at(slopes_line, slopes_column, step)
        vector_of = [write.load(builder.add(slope, I64(2 * LANES * vector)), HALVES, 2) for vector in range(vectors)]
        added = {}
        for row in range(rows):
            value = write.spread(builder.add(column, I64(2 * row)))
            for vector in range(vectors):
                added[row, vector] = write.multiply_add(value, vector_of[vector], sums[row, vector])
        following = builder.add(step, I64(1))
        step.add_incoming(following, inner)
        for place in places:
            sums[place].add_incoming(added[place], inner)
        builder.cbranch(builder.icmp_signed("<", following, wide), inner, after)

        builder.position_at_end(after)
        for place in places:
            begun[place].add_incoming(added[place], after)
        proceed = builder.add(line, I64(1))
        line.add_incoming(proceed, after)
        builder.cbranch(builder.icmp_signed("<", proceed, high), outer, done)

        builder.position_at_end(done)
        for row, vector in places:
            for half, value in enumerate(write.widen(added[row, vector])):
                address = builder.add(write.at(out, out_row, row), I64(4 * LANES * vector + 2 * LANES * half))
                value = builder.fmul(value, write.everywhere(factor))
                write.store(value if fresh else builder.fadd(write.load(address, FLOATS, 4), value), address, 4)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def patch_tile(typingctx, pixels, row, out):
    """Writes a patch of 4x4 pixels, its rows `row` bytes apart, as 16 halves in [0, 1): pixel / 256, which is exact."""

    def codegen(context, builder, signature, arguments):
        pixels, row, out = arguments
        write, words = Writer(builder), ir.Constant(ir.VectorType(I32, 4), ir.Undefined)
        for line in range(4):
            words = builder.insert_element(words, write.load(write.at(pixels, row, line), I32, 1), I32(line))
        wide = builder.uitofp(builder.bitcast(words, ir.VectorType(ir.IntType(8), 16)), HALVES16)
        scale = ir.Constant(HALVES16, [ir.Constant(HALF, 1 / 256)] * 16)
        write.store(builder.fmul(wide, scale), out, 2)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic(prefer_literal=True)
def dot_tile(typingctx, inputs, samples, weights, weights_block, slopes, slopes_sample, blocks, seen, seen_sample, out, out_sample):
    """The gradient of `inputs` neighbouring inputs of a dense layer for `samples` samples, 0 where `seen`, the inputs, are. All are halves:
    weights [block of 64 outputs][input][64], the gradient of the outputs [sample][outputs].
    """
    signature = types.void(inputs, samples, *[types.int64] * 9)
    inputs, samples = inputs.literal_value, samples.literal_value

    def codegen(context, builder, signature, arguments):
        weights, weights_block, slopes, slopes_sample, blocks, seen, seen_sample, out, out_sample = arguments[2:]
        write, places = Writer(builder), [(number, sample) for number in range(inputs) for sample in range(samples)]
        entry, loop, done = builder.block, builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)

        builder.position_at_end(loop)
        block = builder.phi(I64)
        block.add_incoming(I64(0), entry)
        sums = {place: builder.phi(HALVES) for place in places}
        for place in places:
            sums[place].add_incoming(ir.Constant(HALVES, None), entry)
        added = dict(sums)
        source, slope = write.at(weights, weights_block, block), write.at(slopes, 4 * LANES, block)
        for byte in (I64(0), I64(2 * LANES)):
            weight = [write.load(builder.add(write.at(source, 4 * LANES, number), byte), HALVES, 2) for number in range(inputs)]
            for sample in range(samples):
                value = write.load(builder.add(write.at(slope, slopes_sample, sample), byte), HALVES, 2)
                for number in range(inputs):
                    added[number, sample] = write.multiply_add(value, weight[number], added[number, sample])
        following = builder.add(block, I64(1))
        block.add_incoming(following, loop)
        for place, total in sums.items():
            total.add_incoming(added[place], loop)
        builder.cbranch(builder.icmp_signed("<", following, blocks), loop, done)

        builder.position_at_end(done)
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
        reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
        for number, sample in places:
            low, high = write.widen(added[number, sample])
            total = builder.call(reduce, [ir.Constant(ir.FloatType(), -0.0), builder.fadd(low, high)], fastmath=("reassoc",))
            total = write.positive(write.load(builder.add(write.at(seen, seen_sample, sample), I64(2 * number)), HALF, 2), total)
            write.store(builder.fptrunc(total, HALF), builder.add(write.at(out, out_sample, sample), I64(2 * number)), 2)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def narrow_tile(typingctx, source, out):
    """64 float32 as halves."""

    def codegen(context, builder, signature, arguments):
        source, out = arguments
        write = Writer(builder)
        for part in range(4):
            floats = write.load(builder.add(source, I64(64 * part)), FLOATS, 4)
            write.store(builder.fptrunc(floats, HALVES16), builder.add(out, I64(32 * part)), 2)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit(parallel=True, nogil=True, cache=True)
def halve(count, stack, high, wide, pixels, images, pictures, row, out):
    """Patches of 4x4 pixels as channels: uint8 (count, stack, 4 high or more, 4 wide or more) -> halves (count, high, wide, stack * 16)."""
    for number in prange(count):
        for picture in range(stack):
            first = pixels + number * images + picture * pictures
            for y in range(high):
                place = out + 32 * ((number * high + y) * wide * stack + picture)
                for x in range(wide):
                    patch_tile(first + 4 * y * row + 4 * x, row, place + 32 * stack * x)


@cache
def convolution(rows: int, vectors: int, chunk: int, masked: int) -> Any:
    """A compiled convolution of many images: tiles of `rows` columns, the last of a row overlapping the one before."""

    @njit(parallel=True, nogil=True, cache=True)
    def convolve(count, high, wide, image, images, image_row, image_column, offsets, chunks, weights, weights_each, out, outs, out_row,
                 out_column, extra, extras, extra_row, extra_column):  # fmt: skip
        for number in prange(count):
            for y in range(high):
                for start in range(0, wide, rows):
                    x = min(start, wide - rows)
                    source = image + number * images + y * image_row + x * image_column
                    target = out + number * outs + y * out_row + x * out_column
                    beside = extra + number * extras + y * extra_row + x * extra_column
                    convolve_tile(rows, vectors, chunk, masked, source, image_column, offsets, chunks, weights + number * weights_each,
                                  target, out_column, beside, extra_column)  # fmt: skip

    return convolve


@njit(parallel=True, nogil=True, cache=True)
def narrow(inputs, blocks, weights, out):
    """float32 [inputs][64 * blocks] -> halves [blocks][inputs][64]."""
    for part in prange(64):
        for number in range(part * inputs // 64, (part + 1) * inputs // 64):
            for block in range(blocks):
                narrow_tile(weights + (number * blocks + block) * 256, out + (block * inputs + number) * 128)


@cache
def dense_images(samples: int) -> Any:
    """The gradient of a dense layer's inputs, images [count][high][wide][channels] (see `dot_tile`), for at least `samples` of them."""

    @njit(parallel=True, nogil=True, cache=True)
    def run(count, wide, channels, inputs, blocks, weights, slopes, seen, out, out_image, out_row):
        for tile in prange(inputs // 4):
            pixel = 4 * tile // channels
            place = out + pixel // wide * out_row + 2 * (4 * tile - pixel // wide * wide * channels)
            for start in range(0, count, samples):
                first = min(start, count - samples)
                dot_tile(4, samples, weights + tile * 512, inputs * 128, slopes + first * blocks * 128, blocks * 128, blocks,
                          seen + 2 * (first * inputs + 4 * tile), 2 * inputs, place + first * out_image, out_image)  # fmt: skip

    return run


@njit(parallel=True, nogil=True, cache=True)
def dense_weight(count, longest, inputs, blocks, images, slopes, factor, out):
    """The gradient of a dense layer's weight, float32 [inputs][64 * blocks], from halves [count][inputs] and [count][64 * blocks]."""
    for tile in prange(inputs // 8):
        for block in range(blocks):
            image, slope, target = images + 16 * tile, slopes + 128 * block, out + 256 * (8 * tile * blocks + block)
            correlate_tile(8, 2, 1, factor, image, 0, 2 * inputs, slope, 0, 128 * blocks, 1, min(longest, count), target, 256 * blocks)
            for start in range(longest, count, longest):
                correlate_tile(8, 2, 0, factor, image + 2 * inputs * start, 0, 2 * inputs, slope + 128 * blocks * start, 0, 128 * blocks,
                                1, min(longest, count - start), target, 256 * blocks)  # fmt: skip


@cache
def correlation(rows: int, vectors: int) -> Any:
    """A compiled gradient of a convolution's weights, float32 [parts][kernel rows * segment][channels], and of its biases after them.

    The images are cut into `parts`, each with a sum of its own, so that the result does not depend on the number of threads.
    """

    @njit(parallel=True, nogil=True, cache=True)
    def correlate(parts, count, high, wide, lines, factor, image, images, image_row, image_column, kernel_row, kernel, segment, slopes,
                  slopes_all, slopes_row, slopes_column, one, out, out_part):  # fmt: skip
        channels = vectors * 32
        for part in prange(parts):
            sums = out + part * out_part
            for number in range(part * count // parts, (part + 1) * count // parts):
                for y in range(0, high, lines):
                    some = min(lines, high - y)
                    slope = slopes + number * slopes_all + y * slopes_row
                    for window in range(kernel):
                        source = image + number * images + y * image_row + window * kernel_row
                        for place in range(0, segment, rows):
                            target = sums + (window * segment + place) * channels * 4
                            correlate_tile(rows, vectors, 0, factor, source + 2 * place, image_row, image_column, slope, slopes_row,
                                            slopes_column, some, wide, target, channels * 4)  # fmt: skip
                    correlate_tile(1, vectors, 0, factor, one, 0, 0, slope, slopes_row, slopes_column, some, wide,
                                    sums + kernel * segment * channels * 4, channels * 4)  # fmt: skip

    return correlate

"""Compiled kernel of the `scan` search: int8 codes of the keys (`agents.codes`), eight queries against 32 rows at a time, exact re-ranking.

Nothing here compiles at import; every function compiles at its first call and is cached on disk beside this file.

A 64-byte vector of codes holds four dimensions of sixteen rows, so one vpdpbusd adds four products to sixteen int32 sums and no sum is ever
taken across a vector. Codes of eight queries are int8 [dims / 4][query of 8][4].

**Why no neighbour is lost.** Let P clip a point to the table's box of codes (`agents.codes`). A key has P(x) = c + s u + e and a query
P(q) = c + s v + f with integers u and v; |e| and |f| are rounding errors, however far key or query lie outside. Clipping to a convex
set moves no two points apart, so s |v - u| <= |P(q) - P(x)| + |e| + |f| <= |q - x| + |e| + |f|. Let r be the distance of the worst of
the k rows held so far (infinite while fewer are held). A row that belongs among the k nearest has |q - x| <= r, hence

    |v - u|^2 <= ((r + e_max + |f|) / s)^2 = L,        |v - u|^2 = |v|^2 + |u|^2 - 2 v.u   exactly, in integers,

which is tested as v.u - floor(|u|^2 / 2) >= floor((|v|^2 - L) / 2); every rounding lets more rows through, and L is inflated by more than
the float64 error of computing it. Whatever passes is measured exactly (`_exact`).

Learned keys drift, and the nearest are mostly new: with the oldest rows first, two thirds of all were measured on Pong, and not 1/20.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from agents.codes import BLOCK

TILE = 8  # queries compared at a time
WAITING = 16  # rows that passed for a query and are being fetched before they are measured together
CHUNK = 32  # row pairs (of 32 rows) that all queries visit before the next are fetched: 64 KiB of codes at 64 dims

_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_LANES = ir.VectorType(_I32, BLOCK)


def _splat(builder: ir.IRBuilder, value: ir.Value, like: ir.VectorType) -> ir.Value:
    single = builder.insert_element(ir.Constant(like, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(single, ir.Constant(like, ir.Undefined), ir.Constant(ir.VectorType(_I32, like.count), [0] * like.count))


def _dot_vnni(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, query: ir.Value) -> ir.Value:
    kind = ir.FunctionType(_LANES, [_LANES, _LANES, _LANES])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
    return builder.call(function, [total, codes, query])


def _dot_portable(builder: ir.IRBuilder, total: ir.Value, codes: ir.Value, query: ir.Value) -> ir.Value:
    # Bytes 0 and 2 as 16-bit halves, then 1 and 3: LLVM turns each sum of two 16-bit products into the host's multiply-add.
    halves, wide = ir.VectorType(_I16, 2 * BLOCK), ir.VectorType(_I32, 2 * BLOCK)
    eight, low = ir.Constant(halves, [8] * 2 * BLOCK), ir.Constant(halves, [255] * 2 * BLOCK)
    codes, query = builder.bitcast(codes, halves), builder.bitcast(query, halves)
    pairs = (
        (builder.and_(codes, low), builder.ashr(builder.shl(query, eight), eight)),
        (builder.lshr(codes, eight), builder.ashr(query, eight)),
    )
    for code, factor in pairs:
        product = builder.mul(builder.sext(code, wide), builder.sext(factor, wide))
        for start in (0, 1):
            index = ir.Constant(ir.VectorType(_I32, BLOCK), list(range(start, 2 * BLOCK, 2)))
            total = builder.add(total, builder.shuffle_vector(product, product, index))
    return total


def _make_scan(vnni: bool) -> Any:
    """The inner loop as an intrinsic: walks row pairs start..stop-1 and returns the first with a row that passes for some query, or stop.

    Arguments (int64): addresses of the codes, half norms (int32 a row), query codes, thresholds (int32 [8]) and of the masks to fill
    (uint32 [8], bit i is row i of the 32); start, stop; dims / 4.
    """
    tiles = [(range(TILE), range(2))] if vnni else [(range(q, q + 4), range(b, b + 1)) for b in range(2) for q in (0, 4)]
    dot = _dot_vnni if vnni else _dot_portable

    @intrinsic
    def scan(typingctx, codes, halves, query, limits, masks, start, stop, groups):
        signature = types.int64(*[types.int64] * 8)

        def codegen(context, builder, signature, arguments):
            codes, halves, query, limits, masks, start, stop, groups = arguments
            step = builder.mul(groups, _I64(64))

            def load(address, kind, align):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

            entry = builder.block
            head, body, hit, following, done = (builder.append_basic_block(name) for name in ("head", "body", "hit", "following", "done"))
            builder.branch(head)
            builder.position_at_end(head)
            pair = builder.phi(_I64)
            pair.add_incoming(start, entry)
            builder.cbranch(builder.icmp_signed("<", pair, stop), body, done)

            builder.position_at_end(body)
            first = builder.add(codes, builder.mul(builder.mul(pair, _I64(2)), step))
            passing: dict[tuple[int, int], ir.Value] = {}
            for queries, blocks in tiles:
                base = [builder.add(first, builder.mul(step, _I64(b))) for b in blocks]
                norms = [load(builder.add(halves, builder.add(builder.mul(pair, _I64(128)), _I64(64 * b))), _LANES, 64) for b in blocks]
                before = builder.block
                inner, after = builder.append_basic_block("inner"), builder.append_basic_block("after")
                builder.branch(inner)
                builder.position_at_end(inner)
                group = builder.phi(_I64)
                group.add_incoming(_I64(0), before)
                totals = {}
                for b, norm in zip(blocks, norms):
                    for q in queries:
                        totals[q, b] = builder.phi(_LANES)
                        totals[q, b].add_incoming(norm, before)
                offset = builder.mul(group, _I64(64))
                vectors = [load(builder.add(address, offset), _LANES, 64) for address in base]
                row = builder.add(query, builder.mul(group, _I64(4 * TILE)))
                summed = {}
                for q in queries:
                    wide = _splat(builder, load(builder.add(row, _I64(4 * q)), _I32, 4), _LANES)
                    for b, vector in zip(blocks, vectors):
                        summed[q, b] = dot(builder, totals[q, b], vector, wide)
                for place, total in totals.items():
                    total.add_incoming(summed[place], inner)
                proceed = builder.add(group, _I64(1))
                group.add_incoming(proceed, inner)
                builder.cbranch(builder.icmp_signed("<", proceed, groups), inner, after)
                builder.position_at_end(after)
                for q, b in summed:
                    limit = _splat(builder, load(builder.add(limits, _I64(4 * q)), _I32, 4), _LANES)
                    passing[q, b] = builder.icmp_signed(">=", summed[q, b], limit)
            anyone = passing[0, 0]
            for mask in passing.values():
                anyone = builder.or_(anyone, mask)
            builder.cbranch(builder.icmp_unsigned("!=", builder.bitcast(anyone, _I16), _I16(0)), hit, following)

            builder.position_at_end(following)
            pair.add_incoming(builder.add(pair, _I64(1)), following)
            builder.branch(head)

            builder.position_at_end(hit)
            for q in range(TILE):
                low, high = (builder.zext(builder.bitcast(passing[q, b], _I16), _I32) for b in range(2))
                both = builder.or_(low, builder.shl(high, _I32(16)))
                builder.store(both, builder.inttoptr(builder.add(masks, _I64(4 * q)), _I32.as_pointer()))
            builder.branch(done)

            builder.position_at_end(done)
            found = builder.phi(_I64)
            found.add_incoming(pair, head)
            found.add_incoming(pair, hit)
            return found

        return signature, codegen

    return scan


@intrinsic
def _next_task(typingctx, counter):
    """Adds one to the int64 at the address `counter`, whole, whichever threads call; returns the value before."""

    def codegen(context, builder, signature, arguments):
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], _I64.as_pointer()), _I64(1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def _lowest_bit(typingctx, mask):
    """The place of the lowest bit set in a uint32."""

    def codegen(context, builder, signature, arguments):
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), _I64)

    return types.int64(types.uint32), codegen


@intrinsic
def _fetch(typingctx, address, lines):
    """Asks for `lines` cache lines from `address` on, without waiting."""

    def codegen(context, builder, signature, arguments):
        address, lines = arguments
        byte = _I8.as_pointer()
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32]), "llvm.prefetch.p0"
        )
        with cgutils.for_range(builder, lines) as loop:
            place = builder.inttoptr(builder.add(address, builder.mul(loop.index, _I64(64))), byte)
            builder.call(function, [place, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _float32_at(typingctx, address):
    """The address as a pointer to float32."""

    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(types.int64), codegen


VNNI = "+avx512vnni" in cpu_target.target_context.codegen().magic_tuple()[2]  # what numba compiles for, NUMBA_CPU_NAME included
_scan = _make_scan(VNNI)


@intrinsic
def _eight_sums(typingctx, query, key, count, out):
    """float64 (8) at `out`: squared differences of `count` groups of eight float32, one sum a place, groups added in order."""

    def codegen(context, builder, signature, arguments):
        query, key, count, out = arguments
        single, double = ir.VectorType(ir.FloatType(), 8), ir.VectorType(ir.DoubleType(), 8)
        entry, head, body, done = builder.block, *(builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        group, total = builder.phi(_I64), builder.phi(double)
        group.add_incoming(_I64(0), entry)
        total.add_incoming(ir.Constant(double, [0.0] * 8), entry)
        builder.cbranch(builder.icmp_signed("<", group, count), body, done)
        builder.position_at_end(body)
        values = []
        for address in (query, key):
            place = builder.inttoptr(builder.add(address, builder.mul(group, _I64(32))), single.as_pointer())
            values.append(builder.fpext(builder.load(place, align=4), double))
        gap = builder.fsub(*values)
        total.add_incoming(builder.fadd(total, builder.fmul(gap, gap)), body)
        group.add_incoming(builder.add(group, _I64(1)), body)
        builder.branch(head)
        builder.position_at_end(done)
        builder.store(total, builder.inttoptr(out, double.as_pointer()), align=8)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@njit(cache=True, nogil=True)
def _exact(query_at, key_at, dims, sums, sums_at):
    """|query - key|^2 of the float32 (D) at two addresses, in float64, with the additions of `agents.search.exact_distances`."""
    whole = dims // 8
    _eight_sums(query_at, key_at, whole, sums_at)
    query, key = _float32_at(query_at), _float32_at(key_at)
    for d in range(8 * whole, dims):
        gap = np.float64(query[d]) - np.float64(key[d])
        sums[d - 8 * whole] += gap * gap
    return ((sums[0] + sums[4]) + (sums[2] + sums[6])) + ((sums[1] + sums[5]) + (sums[3] + sums[7]))


@njit(cache=True, nogil=True)
def _sink(distances, rows, place, count):
    """Restores the heap of the first `count` entries (greatest (distance, row) on top) below `place`."""
    distance, row = distances[place], rows[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        other = child + 1
        if other < count and (distances[other] > distances[child] or (distances[other] == distances[child] and rows[other] > rows[child])):
            child = other
        if distances[child] < distance or (distances[child] == distance and rows[child] < row):
            break
        distances[place], rows[place] = distances[child], rows[child]
        place = child
    distances[place], rows[place] = distance, row


@njit(cache=True, nogil=True)
def _limit(worst, error, step, norm, shift):
    """The int32 threshold of a query whose worst held row lies at squared distance `worst` (see the head of this file)."""
    reach = (np.sqrt(worst) + error) / step
    reach = reach * reach * (1.0 + 1e-9) + 1.0
    bound = np.int64(reach) if reach < 2.0**29 else np.int64(1 << 29)
    return np.int32(((norm - bound) >> 1) + shift)


@njit(cache=True, nogil=True)
def _aim(queries, chosen, centre, step, slack, codes, error, norm, shift):
    """Codes of the queries `chosen` (Q), their |f|, |v|^2 and 128 sum(v), which undoes the offset of the keys' unsigned codes."""
    for i in range(chosen.shape[0]):
        total, square, gaps = 0, 0, 0.0
        for d in range(centre.shape[0]):
            inside = min(max((np.float64(queries[chosen[i], d]) - centre[d]) / step, -128.0), 127.0)
            code = np.rint(inside)
            gaps += (inside - code) * (inside - code)
            total += int(code)
            square += int(code) * int(code)
            codes[i // TILE, d // 4, i % TILE, d % 4] = np.int8(code)
        error[i] = step * np.sqrt(gaps) + slack
        norm[i], shift[i] = square, 128 * total


@njit(cache=True, nogil=True)
def _admit(query_at, keys_at, dims, size, waiting, distances, rows, held, sums, sums_at):
    """Measures the `waiting` rows and keeps the k nearest in the heap of k places, of which `held` are taken; returns the new number."""
    k = rows.shape[0]
    for row in waiting:
        if row >= size:
            continue
        distance = _exact(query_at, keys_at + row * dims * 4, dims, sums, sums_at)
        if held < k:
            distances[held], rows[held] = distance, row
            held += 1
            if held == k:
                for parent in range(k // 2 - 1, -1, -1):
                    _sink(distances, rows, parent, k)
        elif distance < distances[0] or (distance == distances[0] and row < rows[0]):
            distances[0], rows[0] = distance, row
            _sink(distances, rows, 0, k)
    return held


@njit(cache=True, nogil=True)
def _sort(distances, rows):
    """Orders a row of heap entries ascending."""
    count = rows.shape[0]
    for place in range(count // 2 - 1, -1, -1):
        _sink(distances, rows, place, count)
    for last in range(count - 1, 0, -1):
        distances[0], distances[last] = distances[last], distances[0]
        rows[0], rows[last] = rows[last], rows[0]
        _sink(distances, rows, 0, last)


@njit(cache=True, nogil=True)
def search(
    keys_at, codes_at, halves_at, sizes, order, centres, steps, slacks, errors, queries, wanted, parts, counter, out_distances, out_rows
):
    """Takes tasks (table, part of its rows) from `counter` until none is left; run by any number of threads on the same arguments.

    keys_at, codes_at, halves_at: int64 (A) addresses; sizes int64 (A); order int64 (A), in which tables are taken; centres float64 (A, D);
    steps, slacks, errors float64 (A), errors being e_max; queries float32 (N, D); wanted uint8 (N, A); counter int64 (1). Fills
    out_distances float64 and out_rows int64 (parts, N, A, k), which hold inf and -1, ascending from the front. Returns the number of
    rows that this thread measured exactly.
    """
    num, dims = queries.shape
    actions, k = sizes.shape[0], out_rows.shape[3]
    groups, packs = (dims + 3) // 4, (num + TILE - 1) // TILE
    sums, masks = np.empty(8), np.empty(TILE, np.uint32)
    codes = np.zeros((packs, groups, TILE, 4), np.int8)
    limits = np.empty(packs * TILE, np.int32)
    reach, norm, shift = np.empty(num), np.empty(num, np.int64), np.empty(num, np.int64)
    chosen, filled, query_at = np.empty(num, np.int64), np.empty(num, np.int64), np.empty(num, np.int64)
    waiting, queued, lines = np.empty((num, WAITING), np.int64), np.empty(num, np.int64), (dims * 4 + 63) // 64
    distances, rows = np.empty((num, k)), np.empty((num, k), np.int64)  # a heap of k for each query
    queries_at, aims_at, limits_at = queries.ctypes.data, codes.ctypes.data, limits.ctypes.data
    masks_at, sums_at = masks.ctypes.data, sums.ctypes.data
    measured = 0
    while True:
        task = _next_task(counter.ctypes.data)
        if task >= actions * parts:
            break
        table, part = order[task % actions], task // actions
        count = 0
        for n in range(num):
            if wanted[n, table]:
                chosen[count], query_at[count], filled[count], queued[count] = n, queries_at + n * dims * 4, 0, 0
                count += 1
        if count == 0:
            continue
        size, step, keys = sizes[table], steps[table], keys_at[table]
        _aim(queries, chosen[:count], centres[table], step, slacks[table], codes, reach, norm, shift)
        limits[:] = 2147483647
        limits[:count] = -2147483648
        pairs = (size + 2 * BLOCK - 1) // (2 * BLOCK)
        begin, end = pairs * part // parts, pairs * (part + 1) // parts
        for chunk in range(begin + (end - begin - 1) // CHUNK * CHUNK, begin - 1, -CHUNK):  # the newest first: see the head of this file
            stop = min(chunk + CHUNK, end)
            for first in range(0, count, TILE):
                pair, aim_at, limit_at = chunk, aims_at + first * groups * 4, limits_at + first * 4
                while True:
                    pair = _scan(codes_at[table], halves_at[table], aim_at, limit_at, masks_at, pair, stop, groups)
                    if pair >= stop:
                        break
                    for i in range(first, min(first + TILE, count)):
                        mask = masks[i - first]
                        while mask != 0:
                            row = pair * 2 * BLOCK + _lowest_bit(mask)
                            mask &= mask - np.uint32(1)
                            _fetch(keys + row * dims * 4, lines)
                            waiting[i, queued[i]] = row
                            queued[i] += 1
                            if queued[i] < WAITING:
                                continue
                            filled[i] = _admit(query_at[i], keys, dims, size, waiting[i], distances[i], rows[i], filled[i], sums, sums_at)
                            measured, queued[i] = measured + WAITING, 0
                            if filled[i] == k:
                                limits[i] = _limit(distances[i, 0], reach[i] + errors[table], step, norm[i], shift[i])
                    pair += 1
        for i in range(count):
            rest = waiting[i, : queued[i]]
            held = _admit(query_at[i], keys, dims, size, rest, distances[i], rows[i], filled[i], sums, sums_at)
            measured += queued[i]
            _sort(distances[i, :held], rows[i, :held])
            out_distances[part, chosen[i], table, :held] = distances[i, :held]
            out_rows[part, chosen[i], table, :held] = rows[i, :held]
    return measured

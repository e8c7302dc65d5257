"""What kernels in half precision are written with: LLVM's instructions for vectors of halves (`agents.half_kernel`).

Whoever changes this file touches that one too: what is cached on disk goes by its date.
"""

from __future__ import annotations

from functools import cache

from llvmlite import binding, ir
from numba.core import cgutils

LANES = 32

I32, I64 = ir.IntType(32), ir.IntType(64)
HALF, HALVES, HALVES16 = ir.HalfType(), ir.VectorType(ir.HalfType(), LANES), ir.VectorType(ir.HalfType(), LANES // 2)
FLOATS = ir.VectorType(ir.FloatType(), LANES // 2)


@cache
def native() -> bool:
    """Whether this processor computes with halves (AVX-512 FP16)."""
    return bool(binding.get_host_cpu_features().get("avx512fp16"))


class Writer:
    """Writes LLVM instructions."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def load(self, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: ir.Value, address: ir.Value, align: int) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def at(self, base: ir.Value, stride: ir.Value | int, index: ir.Value | int) -> ir.Value:
        """base + stride * index."""
        index = I64(index) if isinstance(index, int) else index
        return self.builder.add(base, self.builder.mul(I64(stride) if isinstance(stride, int) else stride, index))

    def spread(self, address: ir.Value) -> ir.Value:
        """The half at `address`, 32 times."""
        undefined = ir.Constant(HALVES, ir.Undefined)
        single = self.builder.insert_element(undefined, self.load(address, HALF, 2), I32(0))
        return self.builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(I32, LANES), [0] * LANES))

    def everywhere(self, number: ir.Value) -> ir.Value:
        """The float32 `number`, 16 times."""
        undefined = ir.Constant(FLOATS, ir.Undefined)
        single = self.builder.insert_element(undefined, number, I32(0))
        return self.builder.shuffle_vector(single, undefined, ir.Constant(ir.VectorType(I32, LANES // 2), [0] * (LANES // 2)))

    def multiply_add(self, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
        """x y + z, rounded to halves: at once or, without AVX-512 FP16, by way of float32, which holds the products exactly."""
        if native():
            return self._fused([x, y, z], HALVES, "llvm.fma.v32f16")
        parts = zip(self.widen(x), self.widen(y), self.widen(z))
        low, high = (self.builder.fptrunc(self._fused(list(part), FLOATS, "llvm.fma.v16f32"), HALVES16) for part in parts)
        return self.builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))))

    def _fused(self, parts: list[ir.Value], kind: ir.Type, name: str) -> ir.Value:
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return self.builder.call(function, parts)

    def widen(self, halves: ir.Value) -> list[ir.Value]:
        """Two vectors of 16 float32."""
        undefined, wide = ir.Constant(HALVES, ir.Undefined), []
        for start in (0, LANES // 2):
            index = ir.Constant(ir.VectorType(I32, LANES // 2), list(range(start, start + LANES // 2)))
            wide.append(self.builder.fpext(self.builder.shuffle_vector(halves, undefined, index), FLOATS))
        return wide

    def positive(self, like: ir.Value, value: ir.Value) -> ir.Value:
        """`value` where `like` is above 0, else 0."""
        above = self.builder.fcmp_ordered(">", like, ir.Constant(like.type, None))
        return self.builder.select(above, value, ir.Constant(value.type, None))

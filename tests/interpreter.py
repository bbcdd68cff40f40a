"""Triton's interpreter, taught bfloat16: it multiplies the bits and truncates where it rounds."""

from __future__ import annotations

import numpy as np


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x):
    """Round to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def teach_bfloat16():
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, src, dst_type):
        kinds = (src.dtype.scalar, dst_type.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return TensorHandle(to_float(src.data), tl.float32)
        if kinds == (tl.float32, tl.bfloat16):
            return TensorHandle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle(to_float(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, *args)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return cast_impl(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp

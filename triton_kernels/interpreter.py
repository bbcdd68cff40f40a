"""Mends the interpreter of Triton 3.6, for this process.

It multiplies the bits of bfloat16 and truncates its results, does not know numpy 2.4 and patches
functions of its own language only once they have failed.
"""

from __future__ import annotations

from functools import cache

import numpy as np


def to_float(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x):
    """Round to nearest, ties to even, as the hardware does."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


@cache
def mend() -> None:
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

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

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        # int() of an array of one element is gone from numpy 2.4
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    patched = set()

    def call_function(self, *args, **kwargs):
        # the launch has patched the language for our functions; its own need it once
        module = self.fn.__module__
        if module.startswith("triton.") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang_tensor = patch_lang_tensor
    InterpretedFunction.__call__ = call_function
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp

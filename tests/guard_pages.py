"""Calls the C++ operators on tensors that lie between inaccessible pages.

`python -m tests.guard_pages SUBJECT` prints each case before it runs it, so that the last line
names the one that died. SUBJECT is an instruction set, or a fault that tests this program itself.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.block_sparse_attention_backward import op as backward
from sparse_attn.ops.flex_prefill_attention import op as flex_prefill
from sparse_attn.ops.flex_prefill_select import op as select
from sparse_attn.ops.hip_prune_select import op as hip_prune
from sparse_attn.ops.hip_select import op as hip_select
from sparse_attn.ops.merge_attention_states import op as merge
from sparse_attn.ops.sale_attention import op as sale_attention
from sparse_attn.ops.sale_estimate import op as sale_estimate
from sparse_attn.ops.sale_quantize import op as sale_quantize
from sparse_attn.ops.squeezed_attend import op as squeezed_attend
from sparse_attn.ops.squeezed_lookup import op as squeezed_lookup
from tests.cases import DTYPES, Shape, index, inputs, instruction_set
from tests.ops.test_block_sparse_attention_cache import paged, spare
from tests.squeezed_cases import Case, attend_inputs, lookup_inputs

PAGE = mmap.PAGESIZE
NO_ACCESS, READ_ONLY = 0, 1
SIDES = ("end", "start")
LIBC = ctypes.CDLL(None, use_errno=True)


def protect(address: int, n: int, access: int) -> None:
    if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(n), access) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded(x: torch.Tensor, side: str) -> torch.Tensor:
    """A read-only copy of x, strides included, whose storage ends or starts at a guard page.

    What is left of the first or last page is NaN: if it is read, the result shows it.
    """
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    n = extent * x.element_size() if x.numel() else 0
    room = max(1, -(-n // PAGE)) * PAGE
    pages = mmap.mmap(-1, room + 2 * PAGE)
    pages[PAGE : PAGE + room] = b"\xff" * room
    begin = PAGE + (room - n if side == "end" else 0)
    base = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if n == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    # the tensor holds the array, the array the pages
    array = (ctypes.c_char * n).from_buffer(pages, begin)
    copy = torch.frombuffer(array, dtype=x.dtype).as_strided(x.shape, x.stride())
    copy.copy_(x)
    protect(base, PAGE, NO_ACCESS)
    protect(base + PAGE, room, READ_ONLY)
    protect(base + PAGE + room, PAGE, NO_ACCESS)
    return copy


def padded(x: torch.Tensor) -> torch.Tensor:
    """x with a gap of NaN after each row."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)
    wide[..., :-3] = x
    return wide[..., :-3]


def layouts(*tensors: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    return {
        "tokens outside heads": list(tensors),
        "contiguous": [x.contiguous() for x in tensors],
        "gaps": [padded(x) for x in tensors],
    }


def equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.nan_to_num(7e9), want.nan_to_num(7e9))


def check(name: str, run, tensors: list[torch.Tensor]) -> None:
    """run(*tensors) survives between guard pages and finds there what it finds elsewhere."""
    want = run(*tensors)
    for side in SIDES:
        print(f"{name}, at the {side} of the pages", flush=True)
        got = run(*(guarded(x, side) for x in tensors))
        if not all(equal(g, w) for g, w in zip(got, want, strict=True)):
            sys.exit("the result differs from that on ordinary tensors")


ATTENTION = [
    # prefill: odd lengths, blocks of every kind, head_dim with and without a rest
    Shape(Tq=70, Tk=70, D=64, Dv=64),
    Shape(Tq=129, Tk=129, D=80, Dv=96, Hq=4, Hkv=2, Hi=4, q_block=64, kv_block=32, share=1.0),
    Shape(Tq=65, Tk=65, D=96, Dv=80, q_block=17, kv_block=5, B=2),
    Shape(Tq=257, Tk=257, D=128, Dv=128, Hi=1, q_block=128, kv_block=128, share=1.0),
    Shape(Tq=330, Tk=331, D=72, Dv=33, q_block=5, kv_block=3),
    Shape(Tq=40, Tk=40, D=33, Dv=1, q_block=128, kv_block=128, share=1.0),
    Shape(Tq=7, Tk=31, D=1, Dv=5, q_block=1, kv_block=1),
    # chunked prefill, and more queries than keys
    Shape(Tq=50, Tk=333, D=128, Dv=64, Hq=6, Hkv=2, Hi=2, q_block=16, kv_block=64),
    Shape(Tq=20, Tk=8300, D=64, Dv=40, q_block=64, kv_block=128, share=1.0),
    Shape(Tq=50, Tk=31, D=40, Dv=24, Hi=1, q_block=16, kv_block=17),
    # decode
    Shape(Tq=1, Tk=8191, D=80, Dv=128, Hq=4, Hkv=1, Hi=1, q_block=1, kv_block=16, share=1.0),
    Shape(Tq=1, Tk=33, D=96, Dv=96, Hq=2, Hkv=2, q_block=1, kv_block=64, share=1.0),
    Shape(Tq=3, Tk=501, D=128, Dv=80, Hq=2, Hkv=2, q_block=2, kv_block=7),
    Shape(Tq=3, Tk=3, D=20, Dv=13, q_block=128, kv_block=1, share=1.0),
]  # fmt: skip
MASKS = [(True, 0, 0), (True, 5, 19), (False, 3, 9)]  # causal, sink, window


def attention_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape in ATTENTION:
        listed = index(shape)
        for dtype in DTYPES:
            for layout, tensors in layouts(*inputs(shape, dtype)).items():
                for causal, sink, window in MASKS[: None if layout == "gaps" else 1]:
                    run = partial(
                        attend, q_block=shape.q_block, kv_block=shape.kv_block, causal=causal,
                        sink=sink, window=window, backend="cpp",
                    )  # fmt: skip
                    name = f"block_sparse_attention, {dtype}, {layout}, {shape}, {causal=}, {sink=}"
                    yield name, run, [*tensors, listed.indices, listed.counts]


CACHES = [  # page_size, the capacity is Tk
    (16, Shape(B=2, Tq=1, Tk=512, D=128, Dv=128, Hq=4, Hkv=1, Hi=1, q_block=1, share=1.0)),
    (16, Shape(B=2, Tq=70, Tk=256, D=64, Dv=72, q_block=32, kv_block=32)),
    (64, Shape(B=3, Tq=40, Tk=256, D=40, Dv=64, Hq=4, Hkv=2, Hi=4, q_block=17, kv_block=5)),
    (128, Shape(B=2, Tq=130, Tk=384, D=96, Dv=33, share=1.0)),
    (0, Shape(B=3, Tq=33, Tk=200, D=64, Dv=64, q_block=16, kv_block=16)),
]


def cache_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    """The pages in use lie between pages of NaN, and places of no page lead outside."""
    for page_size, shape in CACHES:
        listed = index(shape)
        lengths = torch.tensor([shape.Tk - 7, 33, 0][: shape.B], dtype=torch.int32)
        for dtype in DTYPES:
            query, key, value = inputs(shape, dtype)
            tensors = [spare(key, lengths), spare(value, lengths)]
            if page_size:
                *tensors, table = paged(key, value, lengths, page_size)
                tensors.append(table)
            for causal, sink, window in MASKS:

                def run(query, key, value, *rest, causal=causal, sink=sink, window=window,
                        shape=shape):  # fmt: skip
                    *table, lengths, indices, counts = rest
                    return attend(
                        query, key, value, indices, counts, shape.q_block, shape.kv_block, causal,
                        sink, window, None, *table or [None], lengths, backend="cpp",
                    )  # fmt: skip

                name = f"block_sparse_attention in pages of {page_size}, {dtype}, {shape}, {sink=}"
                yield name, run, [query, *tensors, lengths, listed.indices, listed.counts]


FLEX = [
    (Shape(Tq=300, Tk=300, D=64, Dv=64, Hq=4, Hkv=2), 128),
    (Shape(Tq=140, Tk=2100, D=32, Dv=32, Hq=1), 128),
    (Shape(Tq=65, Tk=400, D=80, Dv=40), 37),
    (Shape(Tq=50, Tk=21, D=33, Dv=7, B=2), 16),
    (Shape(Tq=1, Tk=131, D=96, Dv=96, Hq=3, Hkv=1), 64),
]


def backward_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape in ATTENTION:
        shape = replace(shape, Tk=min(shape.Tk, 700))  # only the forward splits longer ones
        listed = index(shape)
        for dtype, (causal, sink, window) in zip(DTYPES, MASKS, strict=True):
            options = {
                "q_block": shape.q_block, "kv_block": shape.kv_block, "causal": causal,
                "sink": sink, "window": window, "backend": "cpp",
            }  # fmt: skip
            tensors = inputs(shape, dtype)
            if causal and sink:
                tensors = [padded(x) for x in tensors]
            out, lse = attend(*tensors, *listed[:2], **options)
            grads = [torch.randn_like(out), torch.randn_like(lse)]
            name = f"block_sparse_attention_backward, {dtype}, {shape}, {causal=}, {sink=}"
            run = partial(backward, **options)
            yield name, run, [*grads, *tensors, out, lse, listed.indices, listed.counts]


def flex_prefill_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape, block in FLEX:
        for dtype in DTYPES:
            for layout, (query, key, value) in layouts(*inputs(shape, dtype, spread=3.0)).items():
                for tau in (0.0, 1.0):  # vertical and slash; query-aware
                    options = {"gamma": 0.7, "tau": tau, "min_budget": block, "block_size": block}
                    name = f"{dtype}, {layout}, {shape}, {options}"
                    run = partial(select, **options, backend="cpp")
                    yield f"flex_prefill_select, {name}", run, [query, key]
                    if layout == "gaps" and tau == 0:  # both operators in it have their own cases
                        run = partial(flex_prefill, **options, backend="cpp")
                        yield f"flex_prefill_attention, {name}", run, [query, key, value]


SALE = [
    (Shape(Tq=300, Tk=300, D=64, Dv=64, Hq=4, Hkv=2), 64, 32),
    (Shape(Tq=70, Tk=261, D=34, Dv=7, B=2), 32, 16),
    (Shape(Tq=129, Tk=129, D=128, Dv=96, Hq=6, Hkv=1), 128, 64),
    (Shape(Tq=90, Tk=31, D=2, Dv=1), 16, 16),
]


def sale_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape, q_block, kv_block in SALE:
        grid = {"q_block": q_block, "kv_block": kv_block, "local": 16, "sink": 16}
        for dtype in DTYPES:
            for layout, (query, key, value) in layouts(*inputs(shape, dtype, spread=3.0)).items():
                name = f"{dtype}, {layout}, {shape}, {grid}"
                for group in ("query", "key"):
                    run = partial(sale_quantize, group=group, block=kv_block, backend="cpp")
                    yield f"sale_quantize, {group}, {name}", run, [key]
                run = partial(sale_attention, **grid, backend="cpp")
                threshold = torch.full((shape.Hq,), 0.1)
                yield f"sale_attention, {name}", run, [query, key, value, threshold]
        packed, step, _ = sale_quantize(query, None, "query")
        keys = sale_quantize(key, None, "key", kv_block)[:2]
        bias = torch.randn(shape.B, shape.Hq, shape.Tk)
        theta = torch.randn(shape.B, shape.Hq, shape.Tq) + 5
        run = partial(sale_estimate, **grid, backend="cpp")
        yield f"sale_estimate, {shape}, {grid}", run, [packed, step, *keys, bias, theta]


HIP = [
    Shape(Tq=70, Tk=300, D=64, Hq=4, Hkv=2),
    Shape(Tq=33, Tk=200, D=33, B=2),  # no pairs of dimensions
    Shape(Tq=20, Tk=131, D=40),
    Shape(Tq=1, Tk=400, D=128, Hq=4, Hkv=1),  # few voters
    Shape(Tq=3, Tk=150, D=2, Hq=3, Hkv=3),
]


def hip_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape in HIP:
        for dtype in DTYPES:
            for layout, (query, key) in layouts(*inputs(shape, dtype)[:2]).items():
                name = f"{dtype}, {layout}, {shape}"
                for share in (False, True):
                    run = partial(
                        hip_select, budget=21, q_block=16, kv_block=3, sink=5, window=9,
                        share_kv_heads=share, backend="cpp",
                    )  # fmt: skip
                    yield f"hip_select, {name}, {share=}", run, [query, key]
                run = partial(
                    hip_prune, chunks=[32, 8], keeps=[96, 24], q_strides=[2, 1], q_block=16,
                    sink=5, window=9, backend="cpp",
                )  # fmt: skip
                yield f"hip_prune_select, {name}", run, [query, key]


def merge_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for shape in (Shape(Tq=33, D=64), Shape(B=2, Hq=3, Tq=601, D=5)):
        for dtype in DTYPES:
            out_a, out_b = (inputs(shape, dtype)[0] for _ in range(2))
            lse = torch.randn(2, shape.B, shape.Tq, shape.Hq).transpose(2, 3)
            for layout, (a, b) in layouts(out_a, out_b).items():
                name = f"merge_attention_states, {dtype}, {layout}, {shape}"
                yield name, partial(merge, backend="cpp"), [a, lse[0], b, lse[1]]


SQUEEZED_LOOKUP = [
    Case(Tq=1, K=77, K1=5, D=72),
    Case(B=2, C=2, Tq=9, K=33, D=33, shared=True),
    Case(B=2, Tq=1, Hq=9, Hkv=1, K=1030, D=64),
    Case(Tq=70, K=31, K1=3, D=1),
]
SQUEEZED_ATTEND = [
    (Shape(B=2, Tq=1, Tk=301, Hq=4, Hkv=2, D=72, Dv=40), 4, 33),
    (Shape(Tq=70, Tk=97, Hq=4, Hkv=2, D=33, Dv=17), 2, 81),
    (Shape(Tq=9, Tk=5000, D=64, Dv=64), 2, 9),
]


def squeezed_cases() -> Iterator[tuple[str, object, list[torch.Tensor]]]:
    for dtype in DTYPES:
        for case in SQUEEZED_LOOKUP:
            args = lookup_inputs(case, dtype)
            given = [x for x in args if isinstance(x, torch.Tensor)]
            shared = partial(squeezed_lookup, shared=case.shared, backend="cpp")
            for layout, first in layouts(*given[:2]).items():
                yield f"squeezed_lookup, {dtype}, {layout}, {case}", shared, [*first, *given[2:]]
        for shape, heads, tail in SQUEEZED_ATTEND:
            args = attend_inputs(shape, heads, tail, dtype=dtype)
            lengths = torch.full((shape.B,), tail - 2, dtype=torch.int32)
            run = partial(squeezed_attend, backend="cpp")
            for layout, first in layouts(*args[:5]).items():
                name = f"squeezed_attend, {dtype}, {layout}, {shape}"
                yield name, run, [*first, *args[5:8], lengths]


def run_all(isa: str) -> None:
    torch.manual_seed(0)
    with instruction_set(isa):
        for cases in (
            attention_cases, cache_cases, backward_cases, flex_prefill_cases, hip_cases,
            sale_cases, squeezed_cases, merge_cases,
        ):  # fmt: skip
            for case in cases():
                check(*case)


def fault(what: str) -> None:
    """Does to a guarded tensor what no operator may do; each fault must kill the process."""
    for side in SIDES:
        x = guarded(torch.ones(5, dtype=torch.bfloat16), side)
        begin, end = x.data_ptr(), x.data_ptr() + 10
        print(f"a legal read at the {side} of the pages", flush=True)
        if ctypes.string_at(begin, 10) != b"\x80\x3f" * 5:
            sys.exit("the tensor does not hold what was written")
        at = {"read past the end": end, "read before the start": begin - 1}.get(what)
        if at is None or (side == "end") == (at == end):
            print(what, flush=True)
            ctypes.string_at(at, 1) if at is not None else x.zero_()


if __name__ == "__main__":
    (subject,) = sys.argv[1:]
    (fault if " " in subject else run_all)(subject)
    print("survived")

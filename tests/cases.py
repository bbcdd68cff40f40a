"""Inputs and comparisons that the operator tests share."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch

from sparse_attn import cpu_isa
from sparse_attn.block_index import BlockIndex
from tests import simt
from tests.simt.operators import executor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = cpu_isa.available()
TRITON = ("triton", None)  # on the GPU if there is one, otherwise under the interpreter
# the CUDA kernels: on the GPU, without one in the executor in four orders of the threads
CUDA = [("cuda", seed) for seed in range(1 if torch.cuda.is_available() else 4)]
# every way to run an operator on this machine: (backend, instruction set or seed)
RUNS = [("reference", None), *(("cpp", isa) for isa in ISAS), TRITON]
# far below one unit in the last place of a result of size 1, for rows whose dense error is 0
FLOOR = {torch.float32: 5e-7, torch.float16: 2e-4, torch.bfloat16: 2e-3}
GARBAGE = torch.tensor([-1, 2**31 - 1, -(2**31)], dtype=torch.int32)  # no pages, no lengths


@contextmanager
def instruction_set(isa: str | None):
    """Runs the C++ kernels with one instruction set."""
    if isa is not None:
        cpu_isa.cpu_isa(isa)
    try:
        yield
    finally:
        if isa is not None:
            cpu_isa.cpu_isa("auto")


def call(op, run, *args, **options):
    """An operator by a backend or one of `RUNS`, on the device it is for; results on the CPU."""
    backend, variant = (run, None) if isinstance(run, str) else run
    on_gpu = backend in ("triton", "cuda") and torch.cuda.is_available()

    def move(x):
        return x.cuda() if on_gpu and isinstance(x, torch.Tensor) else x

    args, options = [move(x) for x in args], {k: move(x) for k, x in options.items()}
    way = instruction_set(variant) if backend == "cpp" else nullcontext()
    if backend == "cuda" and not on_gpu:
        way = executor(variant or 0)
    with way:
        if backend == "cuda":
            skip_if_refused(op, args, options)
        results = op(*args, **options, backend=backend)
    results = (results,) if isinstance(results, torch.Tensor) else results
    return tuple(x.cpu() for x in results)


def skip_if_refused(op, args, options):
    """Skips a legal call that the CUDA kernels leave to other backends, with their reason."""
    bound = op.cast(*op.bind(*args, **options))
    op.check(*bound)
    reason = op.reasons(bound)["cuda"]
    if reason is not None:
        pytest.skip(f"cuda: {reason}")


def cuda_why_not():
    """Why no CUDA kernel can run here, not even in the executor."""
    return None if torch.cuda.is_available() else simt.why_not()


def opcheck(overload, args):
    """torch.library.opcheck, on the GPU for overloads that need one where there is one."""
    pytest.importorskip("expecttest", reason="opcheck needs expecttest")
    if torch.cuda.is_available() and overload._overloadname in ("triton", "cuda"):
        args = [
            x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x
            for x in args
        ]
    torch.library.opcheck(overload, tuple(args))


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention call."""

    B: int = 1
    Hq: int = 2
    Hkv: int = 1
    Tq: int = 70
    Tk: int = 70
    D: int = 64
    Dv: int = 64
    Hi: int = 2
    q_block: int = 64
    kv_block: int = 64
    share: float = 0.5  # of the blocks that is listed


def inputs(s: Shape, dtype: torch.dtype = torch.float32, spread: float = 1.0):
    """query, key, value as [B, T, H, D] tensors seen as [B, H, T, D]: what models hand over."""
    query = torch.randn(s.B, s.Tq, s.Hq, s.D).mul(spread).to(dtype).transpose(1, 2)
    key = torch.randn(s.B, s.Tk, s.Hkv, s.D).to(dtype).transpose(1, 2)
    value = torch.randn(s.B, s.Tk, s.Hkv, s.Dv).to(dtype).transpose(1, 2)
    return query, key, value


class Lists(NamedTuple):
    """What operators take of a `BlockIndex`, its `blocks` by name."""

    indices: torch.Tensor
    counts: torch.Tensor
    q_block: int
    kv_block: int


def index(s: Shape) -> Lists:
    rows, blocks = -(-s.Tq // s.q_block), -(-s.Tk // s.kv_block)
    listed = torch.rand(s.B, s.Hi, rows, blocks) < s.share
    return Lists(*BlockIndex.from_mask(listed, s.q_block, s.kv_block).blocks)


def assert_as_accurate(got, exact, dense, floor):
    """|got - exact| <= 2 |dense - exact| + floor, where dense is the computation in `dtype`."""
    error = (got.double() - exact.double()).abs().max().item()
    allowed = 2 * (dense.double() - exact.double()).abs().max().item()
    size = max(1.0, exact.double().abs().max().item())
    assert error <= allowed + floor * size, f"error {error:.3g}, allowed {allowed:.3g}"


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

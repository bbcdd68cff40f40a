"""Calls the C++ operators on tensors that lie between inaccessible pages.

`python -m tests.guard_pages SUBJECT` prints each case before it runs it, so that the last line
names the one that died. SUBJECT is an instruction set, or a fault that tests this program itself.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

from tests.cases import instruction_set
from tests.ops import all_of

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


def run_all(isa: str) -> None:
    with instruction_set(isa):
        for cases in all_of("guarded").values():
            torch.manual_seed(0)
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

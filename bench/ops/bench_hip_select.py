"""HiP's search over growing prompts: its time, the exponent of its growth, and its memory."""

from __future__ import annotations

import math

import torch

from sparse_attn.evaluate.memory import MEASURABLE, forget_peak, resident
from sparse_attn.ops.hip_select import op

from ..harness import Report, time_in_turn

LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
SHAPE = "1 x T x 64, bfloat16"


def tensors(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return tuple(torch.randn(1, 1, n, 64, generator=generator).bfloat16() for _ in range(2))


def slope(values: dict[int, float]) -> float:
    """Exponent of the growth, by least squares on logarithms."""
    x = torch.tensor([math.log(n) for n in values])
    y = torch.tensor([math.log(v) for v in values.values()])
    x, y = x - x.mean(), y - y.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def run(report: Report) -> None:
    seconds: dict[int, float] = {}
    memory: dict[int, float] = {}
    for n in LENGTHS:
        query, key = tensors(n)
        repeats = max(1, 65536 // n)
        seconds[n] = time_in_turn({"select": lambda t=(query, key): op(*t)}, repeats)["select"]
        rounds = math.ceil(math.log(-(-(n - 272) // 2) / 256, 4))
        report.add(f"HiP's search, {SHAPE}, T = {n}: ms", seconds[n] * 1e3, rounds=rounds)
        if MEASURABLE:
            before = forget_peak()
            result = op(query, key)
            memory[n] = resident("VmHWM") - before
            size = sum(x.numel() * x.element_size() for x in result)
            report.add(
                f"peak extra memory / size of the index, T = {n}", memory[n] / size,
                mib=memory[n] / 2**20,
            )  # fmt: skip
    work = {n: n * math.log2(n / 512) for n in LENGTHS}
    report.add("exponent of time over T, 8k to 256k", slope(seconds), "< 1.4")
    report.add("the same of T log2(T / budget)", slope(work))
    if memory:
        report.add("exponent of peak memory over T", slope(memory), "<= 1.05")
    options()


def options() -> None:
    """Prints what the options cost at 32k; nothing here is a goal."""
    query, key = tensors(32768)
    base = time_in_turn({"x": lambda: op(query, key)}, 3)["x"]
    for change in ({"branch": 2}, {"q_stride": 4}, {"representative": "first"}, {"budget": 2048},
                   {"kv_block": 8, "key_stride": 2}, {"q_block": 128}):  # fmt: skip
        t = time_in_turn({"x": lambda c=change: op(query, key, **c)}, 3)["x"]
        print(f"  {change}: {t / base:.2f} of the time with the defaults")

"""4-bit codes: the definition step by step, and every backend bit by bit against the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.ops.sale_quantize import op
from sparse_attn.reference import sale_quantize as reference
from sparse_attn.reference.sale_quantize import FLOOR, SMALLEST, unpack
from tests.cases import CUDA, DTYPES, Shape, call, opcheck
from tests.cases import RUNS as ALL
from tests.cases import inputs as random_inputs

BACKENDS = ("reference", "cpp", "triton", "cuda")  # a backend that has a kernel adds its name
RUNS = [run for run in [*ALL, CUDA[-1]] if run[0] in BACKENDS]
KERNELS = [run for run in RUNS if run[0] != "reference"]
GROUPS = [("query", 32), ("key", 32), ("key", 16), ("key", 64)]


def tokens(T=70, D=64, B=1, H=2, dtype=torch.float32, offset=0.0):
    """Queries of tests/cases.py, each channel shifted by its own constant."""
    x = random_inputs(Shape(B=B, Hq=H, Tq=T, D=D), torch.float32)[0]
    return (x + offset * torch.randn(D)).to(dtype)


def place(t, group, block):
    return {"query": t // 16 * 8 + t % 8, "key": t // block * 4 + t % 8 // 2}[group]


def equal(got, want):
    """Bit by bit; NaN is equal to NaN."""
    return all(
        torch.equal(g.nan_to_num(7e9), w.nan_to_num(7e9)) for g, w in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("group, block", GROUPS)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_definition(run, group, block):
    """Group by group in numpy's float32."""
    x, mean = tokens(T=39, D=24, B=2, dtype=torch.bfloat16), torch.randn(2, 2, 24) / 3
    packed, step, center = call(op, run, x, mean, group, block)
    assert torch.equal(center, mean)
    c = x.float().numpy() - mean.numpy()[:, :, None]
    codes = unpack(packed).numpy()
    places = np.array([place(t, group, block) for t in range(39)])
    for b, h in np.ndindex(2, 2):
        floor = np.float32(FLOOR) * np.abs(mean.numpy()[b, h]).max()
        for i in range(step.shape[2]):
            rows = places == i
            m = max(np.abs(c[b, h, rows]).max(initial=0), floor)
            assert step[b, h, i] == m / np.float32(7)
            want = np.rint(c[b, h, rows] * (np.float32(7) / m))
            assert (codes[b, h, rows] == want).all() and np.abs(want).max(initial=0) <= 7


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_nibbles(run):
    """Byte b holds channel b low and channel b + D / 2 high, in two's complement."""
    x = torch.tensor([[[[-7.0, 3.0, 5.0, -1.0]]]])
    packed, step, _ = call(op, run, x, torch.zeros(1, 1, 4))
    assert packed.tolist() == [[[[0x9 | 5 << 4, 3 | 0xF << 4]]]]
    assert step.tolist() == [[[1.0] + [0.0] * 7]]


@pytest.mark.parametrize("group, block", GROUPS)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_half_a_step_at_most(run, group, block):
    for T in (1, 15, 16, 50, 97):
        x = tokens(T=T, offset=4.0)
        packed, step, mean = call(op, run, x, None, group, block)
        of_token = step[:, :, [place(t, group, block) for t in range(T)]].double()
        centred = x.double() - mean.double()[:, :, None]
        error = (unpack(packed) * of_token[..., None] - centred).abs().amax(-1)
        assert (error <= of_token * (0.5 + 1e-5)).all()
        torch.testing.assert_close(mean.double(), x.double().mean(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", KERNELS, ids=str)
@settings(max_examples=30)
@given(data=st.data())
def test_kernel_equals_reference_bit_by_bit(run, data):
    pick = lambda *xs: data.draw(st.sampled_from(xs))  # noqa: E731
    group, block = pick(*GROUPS)
    dtype = pick(*(DTYPES[1:] if run[0] == "cuda" else DTYPES))
    B, H, T, D = (
        pick(1, 2),
        pick(1, 3),
        data.draw(st.integers(1, 200)),
        pick(8, 24, 64, 96, 128, 256),
    )
    if run[0] in ("cpp", "reference"):
        D = pick(D, 2, 6, 34)
    x = tokens(T, D, B, H, dtype, offset=pick(0.0, 3.0, 300.0)) * pick(1.0, 1e-3, 100.0)
    if pick(True, False):
        x = x.contiguous()
    packed, step, mean = call(op, run, x, None, group, block)
    exact = x.double().mean(2)
    torch.testing.assert_close(
        mean.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item()
    )
    again = call(op, run, x, None, group, block)
    assert equal(again, (packed, step, mean)), "twice the same"
    assert equal((packed, step, mean), op(x, mean, group, block, backend="reference"))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_groups_of_zeros_and_strange_numbers(run):
    """Zeros: step 0. NaN, infinity: step NaN. Both: codes 0, and no other group is touched."""
    dtype = torch.bfloat16 if run[0] == "cuda" else torch.float32
    x, zero = tokens(T=64, dtype=dtype).contiguous(), torch.zeros(1, 2, 64)
    want = op(x, zero, "query", backend="reference")
    x[0, 0, 3] = x[0, 0, 11] = 0
    x[0, 0, 20, 5], x[0, 1, 40, 7], x[0, 1, 50, 60] = torch.nan, -torch.inf, 2.0**-60
    packed, step, _ = call(op, run, x, zero, "query")
    strange = torch.zeros_like(step, dtype=torch.bool)
    strange[0, 0, 8 + 4] = strange[0, 1, 16 + 0] = True
    assert torch.equal(step.isnan(), strange)
    assert step[0, 0, 3] == 0 and (step > 0).sum() == step.numel() - 3
    assert not packed[0, 0, [3, 11, 20, 28]].any() and not packed[0, 1, [32, 40]].any()
    same = torch.ones(2, 64, dtype=torch.bool)
    same[0, [3, 11, 20, 28]] = same[1, [32, 40, 50]] = False
    assert torch.equal(packed[0][same], want[0][0][same])
    tiny = torch.full((1, 1, 20, 8), SMALLEST / 2, dtype=dtype)
    packed, step, _ = call(op, run, tiny, torch.zeros(1, 1, 8), "key")
    assert not step.any() and not packed.any()
    x[:] = torch.nan
    packed, step, mean = call(op, run, x)
    assert step.isnan().all() and mean.isnan().all() and not packed.any()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_constant_tokens_keep_a_step(run):
    """Without one what a mean adds could not be counted in steps."""
    x = torch.full((1, 1, 33, 32), 3.0, dtype=torch.bfloat16)
    packed, step, mean = call(op, run, x)
    assert (mean == 3).all() and not packed.any()
    assert (step == 3 * FLOOR / 7).all()


def test_a_prefix_keeps_its_codes():
    """With a frozen mean, whole tiles and blocks do not change when tokens follow."""
    x, mean = tokens(T=160), torch.zeros(1, 2, 64)
    for group, block in GROUPS:
        long, short = (op(y, mean, group, block) for y in (x, x[:, :, :128]))
        assert torch.equal(long[0][:, :, :128], short[0])
        assert torch.equal(long[1][:, :, : short[1].shape[2]], short[1])


def test_the_reference_has_a_step_per_token():
    x, zero = tokens(T=39, D=24, offset=2.0), torch.zeros(1, 2, 24)
    packed, step, _ = reference.sale_quantize(x, zero, "token")
    largest = x.abs().amax(3)
    torch.testing.assert_close(step, largest / 7, rtol=0, atol=0)
    assert torch.equal(unpack(packed), torch.round(x * (7 / largest)[..., None]).int())


def test_float64_is_served():
    x = tokens().double()
    assert equal(op(x, torch.zeros(1, 2, 64)), op(x.float(), torch.zeros(1, 2, 64)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, "x: expected 4 dimensions"),
        ({"x": torch.zeros(1, 1, 3, 5)}, "x: head_dim 5, expected an even one"),
        ({"x": torch.zeros(1, 1, 3, 4, dtype=torch.int32)}, "x: expected dtype"),
        ({"x": torch.zeros(1, 1, 0, 4)}, "x: dimension T is empty"),
        ({"group": "token"}, r"group: got 'token', expected one of \('query', 'key'\)"),
        ({"block": 48}, r"block: got 48, expected one of \(16, 32, 64\)"),
        ({"block": "a"}, "block: got 'a', expected an integer"),
        ({"mean": torch.zeros(1, 1, 4)}, r"mean: shape is \(1, 1, 4\), expected \(1, 2, 4\)"),
        ({"mean": torch.zeros(1, 2, 4).half()}, "mean: expected dtype float32"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        op(**{"x": torch.zeros(1, 2, 3, 4), **change})


@pytest.mark.parametrize("overload", ["default", *BACKENDS])
def test_opcheck(overload):
    overload = getattr(torch.ops.sparse_attn.sale_quantize, overload)
    x = tokens(T=37, dtype=torch.bfloat16)
    opcheck(overload, (x,))
    opcheck(overload, (x, torch.zeros(1, 2, 64), "key", 16))


def test_compiles_for_any_length():
    run = torch.compile(lambda x: op(x, None, "key"), fullgraph=True, dynamic=True)
    for T in (70, 33):
        x = tokens(T=T)
        assert equal(run(x), op(x, None, "key"))

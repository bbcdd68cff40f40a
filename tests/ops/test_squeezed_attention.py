"""Look up and attend in one call: the published code's outputs, and dense attention at 0."""

import pytest
import torch

from sparse_attn.ops.squeezed_attend import op as attend
from sparse_attn.ops.squeezed_attention import op
from sparse_attn.ops.squeezed_lookup import op as lookup
from sparse_attn.reference.squeezed_attend import token_mask
from tests.cases import FLOOR, assert_as_accurate, call, opcheck
from tests.squeezed_cases import (
    HIERARCHICAL,
    RECORDED,
    Case,
    dtype_for,
    lookup_inputs,
    recorded,
    recorded_lookup,
    runs_for,
)

RUNS = runs_for(op)
WITH_OUTPUT = [c for c in RECORDED if c[1] == "f32" and c[2] == 0]
SOME_OUTPUT = [c for c in WITH_OUTPUT if c[4] == "0.9"]


def recorded_call(case, dtype):
    """The operator's arguments for a recorded call, of the heads whose outputs are recorded.

    Returns (arguments, name, mask [H, S], order [H, Sc]): the recorded mask, and where token i of
    the sorted context stood.
    """
    file, _, _, mode, quantile = case
    z, heads = recorded(file), [1] if file == HIERARCHICAL else [0, 1]
    args, order = recorded_lookup(*case, dtype)
    args = [x[:, heads] if isinstance(x, torch.Tensor) and x.dim() > 1 else x for x in args]
    query, *level, shared, scale = args
    S, W, nq = int(z["S"]), int(z["W"]), int(z["nq"])
    stop = S + nq if mode == "prefill" else S + nq + int(z["n_gen"])
    context, tail = [], []
    for name in "kv":
        x = torch.from_numpy(z[f"l0_{name}"]).to(dtype)
        at = order[heads][..., None].expand(-1, -1, x.shape[2])
        context.append(x[:, : S - W].gather(1, at)[None])
        tail.append(x[None, :, S - W : stop])
    name = f"f32_l0_{mode}_p{quantile}"
    mask = torch.from_numpy(z[f"{name}_mask"])[heads]
    return [query, *context, *tail, *level, shared, None, scale], name, mask, order[heads]


def dense_outputs(args, mask, order, dtype):
    """Attention over the keys of a recorded mask and over the tail, computed in `dtype`."""
    query, *parts = [x.to(dtype) for x in args[:5]]
    keys, values = (torch.cat(parts[i::2], 2) for i in (0, 1))
    n, Tq = order.shape[1], query.shape[2]
    length = keys.shape[2]
    seen = torch.ones(len(mask), Tq, length, dtype=torch.bool).tril(length - Tq)
    seen[:, :, :n] &= mask[:, :n].gather(1, order)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen[None])[0]


@pytest.mark.parametrize("case", WITH_OUTPUT, ids=lambda c: "-".join(map(str, c[3:])))
@pytest.mark.parametrize("run", [run for run in RUNS if run[0] != "cuda"], ids=str)
def test_equals_the_recorded_outputs(run, case):
    """In float32 to 2e-5."""
    z = recorded(case[0])
    args, name, mask, _ = recorded_call(case, torch.float32)
    out, lse, tokens = call(op, run, *args)
    want = torch.from_numpy(z[f"{name}_ref_out64"])
    torch.testing.assert_close(out[0].double(), want, rtol=0, atol=2e-5)
    official = torch.from_numpy(z[f"{name}_out_fp32partials"])
    torch.testing.assert_close(out[0], official, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        lse[0].double(), torch.from_numpy(z[f"{name}_ref_lse64"]), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(tokens[0].long(), mask.sum(-1) - int(z["W"]))


@pytest.mark.parametrize("case", SOME_OUTPUT, ids=lambda c: "-".join(map(str, c[3:])))
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_is_near_the_recorded_outputs_in_float16(run, case):
    """As near as dense attention in float16, in heads where rounding changes no choice."""
    args, name, mask, order = recorded_call(case, torch.float16)
    out, _, _ = call(op, run, *args)
    runs = call(lookup, run, args[0], *args[5:14], args[15])[:3]
    kept = token_mask(*runs, order.shape[1])[0]
    same = (kept == mask[:, : order.shape[1]].gather(1, order)).all(1)
    assert same.any(), "none of the recorded choices"
    want = torch.from_numpy(recorded(case[0])[f"{name}_ref_out64"])
    dense = dense_outputs(args, mask, order, torch.float16)
    assert_as_accurate(out[0, same], want[same], dense[same], floor=FLOOR[torch.float16])


def whole_inputs(case, tail=20, dtype=torch.float32):
    query, *level, shared, scale = lookup_inputs(case, dtype)
    n = int(level[2][..., -1].max())
    context = [torch.randn(case.C, case.Hkv, n, case.D).to(dtype) for _ in range(2)]
    tails = [torch.randn(case.B, case.Hkv, tail, case.D).to(dtype) for _ in range(2)]
    return [query, *context, *tails, *level, shared, None, scale]


@pytest.mark.parametrize("case", [Case(B=2, Tq=1), Case(B=2, Tq=6, K1=5), Case(Tq=3, shared=True)],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_is_its_parts(run, case):
    args = whole_inputs(case, dtype=dtype_for(run))
    out, lse, tokens = call(op, run, *args)
    *runs, kept = call(lookup, run, args[0], *args[5:14], args[15])
    want = call(attend, run, *args[:5], *runs)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and torch.equal(tokens, kept)


@pytest.mark.parametrize("Tq", [1, 6])
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_threshold_0_is_dense_attention(run, Tq):
    args = whole_inputs(Case(B=2, Tq=Tq), tail=Tq + 9, dtype=dtype_for(run))
    args[8] = torch.tensor(0.0)
    n = int(args[7][0, 0, -1])
    # a context of the same length in both heads
    args[7] = args[7][:, :1].expand(-1, 2, -1).contiguous()
    args[6] = args[6][:, :1].expand(-1, 2, -1).contiguous()
    args[1:3] = [x[:, :, :n] for x in args[1:3]]
    out, _, tokens = call(op, run, *args)
    keys, values = (torch.cat([x.expand(2, -1, -1, -1), y], 2)
                    for x, y in zip(args[1:3], args[3:5], strict=True))  # fmt: skip
    mask = torch.ones(Tq, n + Tq + 9).tril(n + 9).bool()
    exact, dense = (
        torch.nn.functional.scaled_dot_product_attention(
            *(x.to(dtype) for x in (args[0], keys, values)), mask, enable_gqa=True
        )
        for dtype in (torch.float64, out.dtype)
    )
    assert_as_accurate(out, exact, dense, floor=1e-6)
    assert (tokens == n).all()


@pytest.mark.parametrize("overload", ["default", *sorted({run[0] for run in RUNS})])
def test_opcheck(overload):
    args = whole_inputs(Case(B=2, K1=4, shared=True), dtype=torch.bfloat16)
    args[-2:] = [torch.tensor([15, 20], dtype=torch.int32), 0.2]
    opcheck(getattr(torch.ops.sparse_attn.squeezed_attention, overload), args)


def test_compiles_whole():
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: op(*a), fullgraph=True, dynamic=True, backend="eager")
    for tail in (8, 12):
        args = whole_inputs(Case(B=2), tail=tail)
        assert torch.equal(compiled(*args)[0], op(*args)[0])


@pytest.mark.parametrize(
    "at, change, message",
    [
        (0, lambda x: x[:, :3], "query: 3 heads"),
        (1, lambda x: x.double(), "key: dtype"),
        (5, lambda x: x.repeat(2, 1, 1, 1), "log_counts: shape"),
        (15, lambda x: float("inf"), "scale: got inf"),
    ],
)
def test_bad_input(at, change, message):
    args = whole_inputs(Case(B=2))
    args[at] = change(args[at])
    with pytest.raises((ValueError, TypeError), match=message):
        op(*args)

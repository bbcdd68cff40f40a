import pytest
import torch

from sparse_attn.block_index import BlockIndex
from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.merge_attention_states import op
from tests.cases import CUDA, DTYPES, FLOOR, Shape, assert_as_accurate, call, inputs, opcheck

RUNS = ["cpp", "reference", "triton", *CUDA]


def states(dtype=torch.float32):
    torch.manual_seed(1)
    outs = [torch.randn(2, 9, 3, 40).to(dtype).transpose(1, 2) for _ in range(2)]
    lses = [torch.randn(2, 9, 3).mul(5).transpose(1, 2) for _ in range(2)]
    lses[0][0, 0, :3] = -torch.inf
    lses[1][0, 0, 2:5] = -torch.inf
    for out, lse in zip(outs, lses, strict=True):
        out[lse == -torch.inf] = 0
    return outs[0], lses[0], outs[1], lses[1]


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(run, dtype):
    args = states(dtype)
    exact, exact_lse = op(*(x.double() for x in args))
    out, lse = call(op, run, *args)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_as_accurate(out, exact, exact.to(dtype), FLOOR[dtype])
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert (out[0, 0, 2] == 0).all() and lse[0, 0, 2] == -torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_an_empty_side_may_hold_anything(run, dtype):
    """A row with lse -inf takes the other side, whatever was left in its out."""
    args = states(dtype)
    want = call(op, run, *args)
    for out, lse, junk in ((args[0], args[1], torch.nan), (args[2], args[3], torch.inf)):
        out[lse == -torch.inf] = junk
    got = call(op, run, *args)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_joins_disjoint_keys(run, dtype):
    query, key, value = inputs(Shape(Tq=70, Tk=192), torch.float32)
    whole = BlockIndex.full(70, 192, 64, 64)
    mask = whole.to_mask(192)
    parts = [torch.tensor([True, False, True]), torch.tensor([False, True, False])]
    results = [
        attend(query, key, value, *BlockIndex.from_mask(mask & part, 64, 64).blocks)
        for part in parts
    ]
    states = [x for out, lse in results for x in (out.to(dtype), lse)]
    out, lse = call(op, run, *states)
    want, want_lse = attend(query, key, value, *whole.blocks)
    # each side's output has been rounded once, and the result is
    tolerance = 1e-5 + 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", CUDA, ids=str)
@pytest.mark.parametrize("dv", [1, 8, 31, 128, 264, 300])
@pytest.mark.parametrize("layout", ["contiguous", "every second element", "from the middle"])
def test_head_dims_and_layouts(run, dv, layout):
    """Elements are loaded eight at a time where alignment allows it, else one by one."""
    outs = [torch.randn(2, 2, 5, 2 * dv + 3).half() for _ in range(2)]
    cut = {
        "contiguous": lambda x: x[..., :dv].contiguous(),
        "every second element": lambda x: x[..., : 2 * dv : 2],
        "from the middle": lambda x: x[..., 3 : dv + 3],
    }[layout]
    outs = [cut(x) for x in outs]
    lses = [torch.randn(2, 2, 5) for _ in range(2)]
    args = outs[0], lses[0], outs[1], lses[1]
    want, want_lse = op(*(x.double() for x in args))
    out, lse = call(op, run, *args)
    assert_as_accurate(out, want, want.half(), FLOOR[torch.float16])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize(
    "at, change, message",
    [
        (0, lambda x: x[0], "out_a: expected 4 dimensions"),
        (1, lambda x: x.double(), "lse_a: expected dtype"),
        (2, lambda x: x[:, :1], "out_b: shape"),
        (2, lambda x: x.half(), "out_b: dtype"),
        (3, lambda x: x[:1], "lse_b: shape"),
    ],
)
def test_bad_input(run, at, change, message):
    args = list(states())
    args[at] = change(args[at])
    with pytest.raises((ValueError, TypeError), match=message):
        call(op, run, *args)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton", "cuda"])
def test_opcheck(overload):
    args = states(torch.bfloat16 if overload == "cuda" else torch.float32)
    opcheck(getattr(torch.ops.sparse_attn.merge_attention_states, overload), args)


def test_gradient():
    """gradcheck where both sides see keys; zeros, never NaN, for rows that one or both see none."""
    leaves = [x.double() for x in states()]
    leaves[0][leaves[1] == -torch.inf] = torch.nan  # not read
    leaves = [x.requires_grad_() for x in leaves]
    apart = [x[1:, :, :2].detach().requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(op.default, apart)
    out, lse = op.default(*leaves)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (leaves[0].grad[0, 0, :3] == 0).all() and (leaves[2].grad[0, 0, 2:5] == 0).all()
    assert (leaves[0].grad[0, 0, 3:5] == 1).all()


def test_partial_attention_is_differentiable():
    """Attention over two halves of the keys, joined, has the gradient of the whole."""
    shape = Shape(Tq=70, Tk=192)
    whole = BlockIndex.full(70, 192, 64, 64)
    mask = whole.to_mask(192)
    grads = []
    for parts in ([True, True, True],), ([True, False, True], [False, True, False]):
        torch.manual_seed(2)
        leaves = [x.requires_grad_() for x in inputs(shape, torch.float32)]
        found = [
            attend(*leaves, *BlockIndex.from_mask(mask & torch.tensor(part), 64, 64).blocks)
            for part in parts
        ]
        out, lse = found[0] if len(found) == 1 else op(*found[0], *found[1])
        (out.square().sum() + lse.sum()).backward()
        grads.append([x.grad for x in leaves])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)

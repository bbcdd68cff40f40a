import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.hip_attention import op
from sparse_attn.ops.hip_prune_select import op as prune
from sparse_attn.ops.hip_select import op as select
from tests import hip
from tests.cases import Shape, call, opcheck

RUNS = hip.runs_of(select)  # attention has every backend
BACKENDS = sorted({run[0] for run in RUNS})
OPTIONS = (40, 32, 4, 2, 2, 5, 30, "first", 4, True, True, 0.2)


def tensors(run, **sizes):
    query, key = hip.smooth_keys(Shape(Hq=4, Hkv=2, **sizes), dtype=hip.dtype_for(run))
    return query, key, torch.randn_like(key)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_equals_select_then_attend(run):
    length = hip.brief(run, 500, 300)
    query, key, value = tensors(run, Tq=100, Tk=length)
    out, lse = call(op, run, query, key, value, *OPTIONS)
    indices, counts = call(select, run, query, key, *OPTIONS)
    want = call(attend, run, query, key, value, indices, counts, 32, 4, True, 5, 30, 0.2)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert (counts == 10).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("page_size", [None, 16])
def test_reads_a_cache(run, page_size):
    query, key, value = tensors(run, B=2, Tq=33, Tk=150)
    key, table, lengths = hip.paged(key, page_size, [147, 60])
    value = hip.paged(value, page_size, [147, 60])[0]
    cache = {"block_table": table, "kv_lengths": lengths}
    out, lse = call(op, run, query, key, value, *OPTIONS, **cache)
    indices, counts = call(select, run, query, key, *OPTIONS, **cache)
    want = call(attend, run, query, key, value, indices, counts, 32, 4, True, 5, 30, 0.2, **cache)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert out.isfinite().all() and (counts[0] == 10).all()


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_a_budget_for_all_is_dense_attention(run):
    query, key, value = tensors(run, Tq=70, Tk=150)
    out, lse = call(op, run, query, key, value, 1000, 16, window=20)
    nothing = torch.zeros(1, 1, 5, 0, dtype=torch.int32), torch.zeros(1, 1, 5, dtype=torch.int32)
    want = call(attend, run, query, key, value, *nothing, 16, 16, sink=150)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if query.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(out, want[0], **tolerance)
    torch.testing.assert_close(lse, want[1], **tolerance)


@pytest.mark.parametrize("overload", ["default", *(x for x in BACKENDS if x != "cuda")])
def test_opcheck(overload):
    args = (*tensors(("cpp", None), Tq=50, Tk=90), *OPTIONS)
    target = getattr(torch.ops.sparse_attn.hip_attention, overload)
    opcheck(target, args)
    key, table, lengths = hip.paged(args[1], 16, [61])
    value = hip.paged(args[2], 16, [61])[0]
    opcheck(target, (args[0], key, value, *OPTIONS, table, lengths))


def test_no_silent_loss_of_gradient():
    query, key, value = tensors(("cpp", None), Tq=50, Tk=90)
    out, _ = op(query.requires_grad_(), key, value, 20)
    with pytest.raises(NotImplementedError, match="has no backward. Call sparse_attn.attention"):
        out.sum().backward()


LARGE = 'serves CUDA tensors of this size with backend="reference" only'


@pytest.mark.parametrize(
    "called, options, head, remedy",
    [
        (select, (4096,), 64, "budget 2048 or less, kv_block 4 or more"),
        (select, (4999, 64, 1), 64, "budget 1024 or less, kv_block 5 or more"),
        (select, (128,), 512, "head_dim 512, served up to 256"),
        (op, (4096,), 64, "budget 2048 or less, kv_block 4 or more"),
        (prune, ((2,), (4096,), (1,)), 64, r"keeps\[0\] 2048 or less, chunks\[0\] 4 or more"),
    ],
)
def test_on_a_gpu_the_reference_serves_nothing_large_unasked(
    monkeypatch, called, options, head, remedy
):
    """It loops in Python: a user has to know. Asked for by name, and on CPU tensors, it serves."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, head, device="cuda")
        key = torch.empty(1, 2, 5000, head, device="cuda")
        args = called.bind(query, key, *([key] if called is op else []), *options)
        with pytest.raises(NotImplementedError, match=remedy) as error:
            called.select(args)
        assert LARGE in str(error.value)
        assert called.select(args, "reference").backend == "reference"
        monkeypatch.setenv("SPARSE_ATTN_BACKEND", "reference")
        assert called.select(args).backend == "reference"
        monkeypatch.delenv("SPARSE_ATTN_BACKEND")
        assert called.reasons(args)["reference"] is None
        near = tuple(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)
        assert called.reasons(near, asked=False)["reference"] is None


def test_on_a_gpu_small_calls_are_served():
    """Sizes at the border, and a budget for all keys, which needs no room in a kernel."""
    with FakeTensorMode():
        query = torch.empty(1, 2, 64, 64, device="cuda")
        key = torch.empty(1, 2, 5000, 64, device="cuda")
        for args in ((2048,), (4096, 64, 4), (5000,), (10**9,)):
            assert select.reasons(select.bind(query, key, *args), asked=False)["reference"] is None

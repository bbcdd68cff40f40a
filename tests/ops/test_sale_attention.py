import pytest
import torch

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.sale_attention import op
from sparse_attn.ops.sale_select import op as select
from tests.cases import call, opcheck
from tests.ops.test_sale_estimate import BACKENDS
from tests.ops.test_sale_select import RUNS, brief, structured


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_equals_select_then_attend(run):
    query, key, value = structured("sharp", brief(run, 1000, 300))
    options = (torch.full((4,), 0.05), 32, 16, 64, 16, True, True, 0.2, torch.randn(1, 2, 64))
    out, lse = call(op, run, query, key, value, *options)
    indices, counts = call(select, run, query, key, *options)
    want = call(attend, run, query, key, value, indices, counts, 32, 16, True, scale=0.2)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("overload", ["default", *(b for b in BACKENDS if b != "cuda")])
def test_opcheck(overload):
    tensors = (x[:, :, :150] for x in structured("sharp", 500))
    args = (*tensors, torch.full((4,), 0.05), 32, 16, 64, 16, True)
    opcheck(getattr(torch.ops.sparse_attn.sale_attention, overload), args)


def test_no_silent_loss_of_gradient():
    query, key, value = structured("flat", 400, torch.float32)
    out, _ = op(query.requires_grad_(), key, value, torch.full((4,), 0.05))
    with pytest.raises(NotImplementedError, match="has no backward. Call sparse_attn.attention"):
        out.sum().backward()

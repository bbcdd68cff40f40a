import pytest
import torch

from sparse_attn.ops.block_sparse_attention import op as attend
from sparse_attn.ops.flex_prefill_attention import op
from sparse_attn.ops.flex_prefill_select import op as select
from tests.cases import CUDA, call, opcheck
from tests.ops.test_flex_prefill_select import structured
from tests.simt.operators import executor


@pytest.mark.parametrize("run", ["cpp", "reference", "triton", CUDA[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_select_then_attend(run, dtype):
    length = {"triton": 500, CUDA[-1]: 500}.get(run, 1500)
    query, key, value = structured("sharp", length, dtype)
    options = (0.8, 0.0, 128, None, 64, "exact", True, 0.2)
    out, lse = call(op, run, query, key, value, *options)
    indices, counts, _ = call(select, run, query, key, *options)
    want = call(attend, run, query, key, value, indices, counts, 64, 64, True, scale=0.2)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    blocks = -(-length // 64)
    assert counts.sum() < 0.8 * (blocks * (blocks + 1) / 2) * 4


def test_official_variant_is_not_served_by_a_forced_cpp():
    query, key, value = structured("sharp", 600)
    out, _ = op(query, key, value, variant="official")
    assert out.isfinite().all()
    with pytest.raises(NotImplementedError, match="cpp: the official variant"):
        op(query, key, value, variant="official", backend="cpp")


def test_cuda_refuses_what_one_of_its_parts_does():
    query, key, value = structured("sharp", 500, torch.bfloat16)
    odd = torch.cat([value, value[..., :1]], -1)
    for args, message in (((query, key, odd), "64 and 65"), ((query, key, value, 0.9, 0.1, 0, None,
                           64, "official"), "official")):  # fmt: skip
        with executor(0), pytest.raises(NotImplementedError, match=f"cuda: .*{message}"):
            op(*args, backend="cuda")


@pytest.mark.parametrize("overload", ["default", "cpp", "reference", "triton"])
def test_opcheck(overload):
    opcheck(
        getattr(torch.ops.sparse_attn.flex_prefill_attention, overload),
        (*(x[:, :, :150] for x in structured("sharp", 500)), 0.9, 0.1, 32, None, 32),
    )


def test_no_silent_loss_of_gradient():
    query, key, value = structured("flat", 64)
    out, _ = op(query.requires_grad_(), key, value)
    with pytest.raises(NotImplementedError, match="has no backward. Call sparse_attn.attention"):
        out.sum().backward()

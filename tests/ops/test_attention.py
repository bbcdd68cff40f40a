import pytest
import torch

import sparse_attn
from sparse_attn.ops.attention import op
from tests.cases import CUDA, call, opcheck
from tests.ops.test_flex_prefill_select import structured


def test_equals_the_function():
    query, key, value = structured("sharp", 1200)
    out, lse = torch.ops.sparse_attn.attention(
        query, key, value, "flex_prefill", '{"gamma": 0.8, "min_budget": 128}', True, 0.2
    )
    config = sparse_attn.FlexPrefill(gamma=0.8, min_budget=128)
    want = sparse_attn.attention(query, key, value, config, scale=0.2, return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("method", ["dense", "flex_prefill"])
def test_cuda_kernels_serve_it(method):
    tensors = [x[:, :, :300] for x in structured("sharp", 1200, torch.bfloat16)]
    out, lse = call(op, CUDA[0], *tensors, method, '{"gamma": 1.0}' if method != "dense" else "{}")
    want, want_lse = op(*tensors, "dense", backend="reference")
    torch.testing.assert_close(lse, want_lse, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("flex", "{}", "method: got 'flex', expected one of"),
        ("dense", "[]", "options: expected a JSON object"),
        ("dense", "{", "options: expected a JSON object"),
        (
            "flex_prefill",
            '{"gama": 1}',
            r"options: flex_prefill has no \['gama'\]; it has .*; did you mean 'gamma'",
        ),
        ("flex_prefill", '{"gamma": -1}', "gamma: got -1"),
        ("flex_prefill", '{"block_size": 1.5}', "options: block_size: got 1.5, expected an int"),
        (
            "flex_prefill",
            '{"min_budget": null}',
            "options: min_budget: got None, expected an int",
        ),
    ],
)
def test_bad_method(method, options, message):
    with pytest.raises(ValueError, match=message):
        op(*structured("flat", 64), method, options)


@pytest.mark.parametrize("overload", ["default", "cpp", "reference"])
def test_opcheck(overload):
    opcheck(
        getattr(torch.ops.sparse_attn.attention, overload),
        (*structured("sharp", 300), "flex_prefill"),
    )


def test_no_silent_loss_of_gradient():
    query, key, value = structured("flat", 64)
    out, _ = op(query.requires_grad_(), key, value, "dense")
    with pytest.raises(NotImplementedError, match="has no backward. Call sparse_attn.attention"):
        out.sum().backward()

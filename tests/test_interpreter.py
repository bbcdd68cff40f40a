"""TRITON_INTERPRET=1 outside of pytest: what docs/env.md promises of CPU tensors."""

import os

import pytest

from tests.test_registry import python

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_run_on_cpu_tensors(monkeypatch, dtype):
    """Methods whose kernels need all that is mended: single numbers, bfloat16."""
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    python(
        f"""
        import torch, sparse_attn as s
        torch.manual_seed(0)
        query, key = torch.randn(1, 2, 40, 32), torch.randn(1, 1, 120, 32)
        query, key = query.to(torch.{dtype}), key.to(torch.{dtype})
        for method in (s.HiP(budget=16, window=16), s.Sale(threshold=0.03, q_block=32),
                       s.InfiniteHiP((16, 8), (64, 16), (1, 1), sink=4, window=16)):
            got = s.select(query, key, method, backend="triton")
            want = s.select(query, key, method, backend="reference")
            assert (got.counts == want.counts).float().mean() > 0.5, method
            listed = torch.arange(got.indices.shape[-1]) < want.counts[..., None]
            same = (got.indices == want.indices)[listed].float().mean()
            assert same > 0.9, (method, same)
            given = {{"index": want, "return_lse": True}}
            got, lse = s.attention(query, key, key, backend="triton", **given)
            out, want = s.attention(query, key, key, backend="reference", **given)
            torch.testing.assert_close(got, out, rtol=2e-2, atol=2e-2)
            torch.testing.assert_close(lse, want, rtol=1e-2, atol=1e-2)
        """
    )

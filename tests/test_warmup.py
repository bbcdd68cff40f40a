import time

import pytest
import torch

import sparse_attn
from sparse_attn import FlexPrefill
from tests.cases import Shape, inputs


def test_on_the_cpu_it_is_cheap_and_changes_nothing():
    sparse_attn.warmup(4, 2, 64, device="cpu")  # what the first calls of a process cost
    state = torch.get_rng_state()
    start = time.perf_counter()
    warmed = sparse_attn.warmup(
        8, 2, 64, methods=("dense", FlexPrefill(gamma=0.9)), dtypes=(torch.float32, torch.bfloat16),
        lengths=((131072, 131072), (1, 131072)), device="cpu",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert [x[:4] for x in warmed] == [
        (method, n_queries, 256, dtype)
        for method in ("dense", "flex_prefill")
        for dtype in (torch.float32, torch.bfloat16)
        for n_queries in (256, 1)
    ]
    assert all(x.seconds > 0 for x in warmed) and sum(x.seconds for x in warmed) <= seconds < 5
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": [(8, 0)]}, r"lengths: got \(8, 0\)"),
        ({"lengths": [(1, 2, 3)]}, "lengths: got"),
        ({"methods": ["flash"]}, "method: got 'flash'"),
        ({"backend": "tpu"}, "backend: got 'tpu'"),
        ({"n_heads": 3}, "query: 3 heads"),
    ],
)
def test_bad_input(options, message):
    arguments = {"n_heads": 4, "n_key_heads": 2, "head_dim": 32, "device": "cpu"} | options
    with pytest.raises(ValueError, match=message):
        sparse_attn.warmup(**arguments)


@pytest.mark.gpu
@pytest.mark.triton
def test_nothing_is_compiled_after_it():
    from sparse_attn.triton_kernels.block_sparse_attention import block_sparse_attention_kernel
    from sparse_attn.triton_kernels.flex_prefill_select import list_kernel

    kernels = (block_sparse_attention_kernel, list_kernel)
    count = lambda: [len(k.device_caches[torch.cuda.current_device()][0]) for k in kernels]  # noqa: E731
    sparse_attn.warmup(8, 2, 64, backend="triton")
    before = count()
    for length, n_queries in ((9000, 9000), (7000, 7000), (20000, 20000), (8000, 1)):
        shape = Shape(Hq=8, Hkv=2, Tq=n_queries, Tk=length)
        query, key, value = (x.cuda() for x in inputs(shape, torch.bfloat16))
        sparse_attn.attention(query, key, value, backend="triton")
    assert count() == before

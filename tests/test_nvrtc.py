"""What CuPy would compile and launch is what the extension compiles and launches."""

import ctypes
import re
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.nvrtc import launch, source
from sparse_attn.ops._sale import n_groups
from sparse_attn.registry import OPS
from tests import simt
from tests.cases import FLOOR, Shape, assert_as_accurate, index, inputs
from tests.ops.test_sale_estimate import case as sale_case
from tests.simt.operators import arguments
from tests.squeezed_cases import Case, lookup_inputs
from tests.test_registry import python

HALF = (torch.float16, torch.bfloat16)
CUDA_OPS = [n for n, op in OPS.items() if any(i.backend == "cuda" for i in op.impls)]


def models_layout(dtype, batch, heads, tokens, dim):
    """Heads between tokens, as models have them."""
    return torch.empty(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2)


def merge_arguments(draw):
    shape = [draw(st.integers(1, high)) for high in (2, 3, 9)]
    dv, offset = draw(st.integers(1, 300)), draw(st.sampled_from((0, 3, 8)))
    dtype = draw(st.sampled_from(HALF))
    outs = [torch.empty(*shape, 2 * dv + 8, dtype=dtype)[..., offset : offset + dv] for _ in "ab"]
    if draw(st.booleans()):
        outs[0] = models_layout(dtype, *shape, dv)
    lses = [torch.empty(*shape[::-1]).permute(2, 1, 0) for _ in "ab"]
    return outs[0], lses[0], outs[1], lses[1]


def query_key_value(draw):
    batch, hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    tq, tk = draw(st.integers(1, 700)), draw(st.integers(1, 60000))
    dtype, dims = draw(st.sampled_from(HALF)), [8 * draw(st.integers(1, 32)) for _ in "kv"]
    return (
        models_layout(dtype, batch, hkv * group, tq, dims[0]),
        models_layout(dtype, batch, hkv, tk, dims[0]),
        models_layout(dtype, batch, hkv, tk, dims[1]),
    )


def attention_arguments(draw):
    query, key, value = query_key_value(draw)
    q_block, kv_block = draw(st.integers(1, 128)), draw(st.integers(1, 128))
    heads = draw(st.sampled_from((1, key.shape[1], query.shape[1])))
    rows, most = -(-query.shape[2] // q_block), draw(st.integers(1, 500))
    indices = torch.zeros(query.shape[0], heads, rows, most, dtype=torch.int32)
    edges = [draw(st.sampled_from((0, 1, 100, 10**6))) for _ in range(2)]
    scale = draw(st.sampled_from((None, 0.3)))
    counts = torch.zeros(indices.shape[:3], dtype=torch.int32)
    lengths, table = torch.zeros(query.shape[0], dtype=torch.int32), None
    if draw(st.booleans()):
        size = draw(st.sampled_from((16, 32, 64, 128)))
        key, value = (models_layout(x.dtype, 9, x.shape[1], size, x.shape[3]) for x in (key, value))
        table = torch.zeros(query.shape[0], draw(st.integers(1, 900)), dtype=torch.int32)
    cache = table, draw(st.sampled_from((None, lengths)))
    options = q_block, kv_block, draw(st.booleans()), *edges, scale
    return query, key, value, indices, counts, *options, *cache


def select_arguments(draw):
    query, key, _ = query_key_value(draw)
    gamma, tau = draw(st.sampled_from((0.3, 0.95, 1.0, 2.0))), draw(st.sampled_from((0.0, 0.1)))
    low, high = draw(st.integers(0, 10**4)), draw(st.sampled_from((None, 1, 5000)))
    block, scale = draw(st.integers(1, 128)), draw(st.sampled_from((None, 0.3)))
    return query, key, gamma, tau, low, high, block, "exact", True, scale


def quantize_arguments(draw):
    _, x, _ = query_key_value(draw)
    mean = torch.empty(*x.shape[:2], x.shape[3]) if draw(st.booleans()) else None
    return (
        x,
        mean,
        draw(st.sampled_from(("query", "key"))),
        draw(st.sampled_from((16, 64))),
    )


def estimate_arguments(draw):
    query, key, _ = query_key_value(draw)
    q_block, kv_block = (
        draw(st.sampled_from((16, 32, 64, 128))),
        draw(st.sampled_from((16, 32, 64))),
    )
    edges = draw(st.integers(1, 10**5)), draw(st.integers(0, 10**5))
    sizes = [(x.shape[1], n_groups(x.shape[2], kind, kv_block)) for x, kind in
             ((query, "query"), (key, "key"))]  # fmt: skip
    sizes += [(query.shape[1], x.shape[2]) for x in (key, query)]
    query_step, key_step, *rows = (torch.empty(len(query), *size) for size in sizes)
    query, key = (x[..., ::2].to(torch.uint8) for x in (query, key))
    return query, query_step, key, key_step, *rows, q_block, kv_block, *edges


def threshold_arguments(draw):
    query, key, _ = query_key_value(draw)
    q_block, kv_block = (
        draw(st.sampled_from((16, 32, 64, 128))),
        draw(st.sampled_from((16, 32, 64))),
    )
    edges = draw(st.integers(1, 10**5)), draw(st.integers(0, 10**5))
    mean = torch.empty(*key.shape[:2], key.shape[3])
    scale = draw(st.sampled_from((None, 0.3)))
    return query, key, mean, torch.empty(query.shape[1]), q_block, kv_block, *edges, True, scale


def pages_of(draw, key):
    """key, block_table, kv_lengths: as they are, or in pages."""
    batch, lengths = key.shape[0], draw(st.booleans())
    lengths = torch.zeros(batch, dtype=torch.int32) if lengths else None
    if not draw(st.booleans()):
        return key, None, lengths
    size = draw(st.sampled_from((16, 128)))
    pages = models_layout(key.dtype, 7, key.shape[1], size, key.shape[3])
    return pages, torch.zeros(batch, -(-key.shape[2] // size), dtype=torch.int32), lengths


def search_arguments(draw):
    query, key, _ = query_key_value(draw)
    key, *pages = pages_of(draw, key)
    q_block, kv_block = draw(st.integers(1, 128)), draw(st.integers(1, 128))
    options = [
        draw(st.integers(1, 600)), q_block, kv_block, draw(st.integers(1, q_block)),
        draw(st.integers(1, kv_block)), draw(st.integers(0, 300)), draw(st.integers(0, 3000)),
        draw(st.sampled_from(("centre", "first"))), draw(st.sampled_from((2, 4))),
    ]  # fmt: skip
    options += [draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from((None, -0.3)))]
    return query, key, *options, *pages


def stages_arguments(draw):
    query, key, _ = query_key_value(draw)
    key, *pages = pages_of(draw, key)
    chunks = draw(st.sampled_from(([256, 32, 8], [64, 64], [12], [128, 64, 32, 16, 8, 4, 2, 1])))
    q_block = draw(st.integers(1, 128))
    keeps = [draw(st.integers(1, 9000)) for _ in chunks[1:]] + [draw(st.integers(1, 300))]
    strides = [draw(st.integers(1, q_block)) for _ in chunks]
    edges = [draw(st.integers(0, 3000)) for _ in range(2)]
    names = [draw(st.sampled_from(x)) for x in (("centre", "first"), ("none", "group", "all"))]
    scale = draw(st.sampled_from((None, 0.0)))
    return query, key, chunks, keeps, strides, q_block, *edges, *names, False, scale, *pages


def level_arguments(draw, query, hkv, batch):
    """A level of clusters without its threshold's value, of one context or one per sequence."""
    clusters, batch = draw(st.integers(1, 9000)), draw(st.sampled_from((1, batch)))
    return (
        models_layout(query.dtype, batch, hkv, clusters, query.shape[3]),
        torch.empty(hkv, batch, clusters).transpose(0, 1),
        torch.empty(batch, hkv, clusters + 1, dtype=torch.int32), torch.empty(()),
    )  # fmt: skip


def squeezed_lookup_arguments(draw):
    query, key, _ = query_key_value(draw)
    fine = level_arguments(draw, query, key.shape[1], query.shape[0])
    coarse = level_arguments(draw, query, key.shape[1], fine[0].shape[0])
    coarse = coarse if draw(st.booleans()) else (None,) * 4
    return query, *fine, *coarse, draw(st.booleans()), draw(st.sampled_from((None, -0.3)))


def squeezed_attend_arguments(draw):
    query, key, value = query_key_value(draw)
    batch, hkv, room = query.shape[0], key.shape[1], draw(st.integers(0, 3000))
    tails = [models_layout(query.dtype, batch, hkv, room, x.shape[3]) for x in (key, value)]
    if draw(st.booleans()):
        key, value = key[:1], value[:1]
    heads, runs = draw(st.sampled_from((hkv, query.shape[1]))), draw(st.integers(1, 500))
    starts, sums = (
        torch.zeros(heads, batch, runs, dtype=torch.int32).transpose(0, 1) for _ in "ab"
    )
    counts = torch.zeros(heads, batch, dtype=torch.int32).t()
    lengths = draw(st.sampled_from((None, torch.zeros(batch, dtype=torch.int32))))
    scale = draw(st.sampled_from((None, 0.3)))
    return query, key, value, *tails, starts, sums, counts, lengths, scale


ARGUMENTS = {
    "block_sparse_attention": attention_arguments,
    "flex_prefill_select": select_arguments,
    "hip_prune_select": stages_arguments,
    "hip_select": search_arguments,
    "merge_attention_states": merge_arguments,
    "sale_estimate": estimate_arguments,
    "sale_quantize": quantize_arguments,
    "sale_threshold": threshold_arguments,
    "squeezed_attend": squeezed_attend_arguments,
    "squeezed_lookup": squeezed_lookup_arguments,
}


def module_of(op):
    return import_module(f"sparse_attn.nvrtc.{op}")


def flat(x):
    """The numbers of a plan, in the order of its fields."""
    return [n for part in x for n in flat(part)] if isinstance(x, tuple) else [int(x)]


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
@pytest.mark.parametrize("op", ARGUMENTS)
@settings(max_examples=80)
@given(st.data())
def test_parameters_and_plan_are_those_of_the_extension(op, data):
    module = module_of(op)
    args = ARGUMENTS[op](data.draw)
    inputs, outputs, numbers = arguments(OPS[op], *args)
    there = {"scratch": torch.empty(1, dtype=torch.uint8)}
    params = module.params(*OPS[op].bind(*args), *outputs.values())
    limits = launch.DeviceLimits(data.draw(st.sampled_from((4, 132, 2000))), 163 * 1024)
    plan = module.plan(params, limits)
    if hasattr(module, "place"):
        module.place(params, plan, there["scratch"].data_ptr())
    there["params"] = torch.empty(ctypes.sizeof(params), dtype=torch.uint8)
    there["plan"] = torch.empty(len(flat(plan)), dtype=torch.int64)
    simt.run(f"{op}_plan", inputs, outputs | there, numbers | {"processors": limits.processors})
    assert bytes(there["params"].tolist()) == bytes(params)
    assert there["plan"].tolist() == flat(plan)


def test_every_operator_is_compared():
    assert set(ARGUMENTS) == {n for n in CUDA_OPS if (simt.HERE / "ops" / f"{n}.cpp").exists()}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_assembled_source_is_one_text(op):
    """NVRTC finds no header of ours; what is cached is known by this text alone."""
    text = source.assembled(op)
    included = set(re.findall(r'#include "?<?([^">]*)', text))
    assert {n for n in included if not n.startswith("simt/")} <= {
        "cuda_bf16.h", "cuda_fp16.h", "cstdint",
    }  # fmt: skip
    headers = [source.csrc() / "common/params.h", *(source.csrc() / "cuda").glob(f"{op}*.cuh")]
    for header in headers:
        last = [x for x in header.read_text().split("\n") if x and not x.startswith("#include")]
        assert all(line in text for line in last[-5:]), header


def squeezed_call(shape):
    query, key, value = inputs(shape, torch.float16)
    runs = torch.tensor([[[3], [8]]], dtype=torch.int32)  # 3 or 8 tokens, from token 3 or 8 on
    counts = torch.ones(1, 2, dtype=torch.int32)
    return query, key, value, key, value, runs, runs, counts, counts[:, 0] + 63


def direct_calls():
    shape = Shape(Tq=64, Tk=64)
    query, key, value = inputs(shape, torch.float16)
    return {
        "block_sparse_attention": (
            query,
            key,
            value,
            *index(shape),
            True,
            0,
            0,
            None,
            torch.zeros(1, 1, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        ),
        "flex_prefill_select": (query, key),
        "hip_prune_select": (query, key, [8], [32], [1]),
        "hip_select": (query, key),
        "merge_attention_states": (query, query[..., 0].float(), query, query[..., 0].float()),
        "sale_estimate": sale_case(64, 64),
        "sale_quantize": (query, query[:, :, 0].float()),
        "sale_threshold": (query, key, key[:, :, 0].float(), torch.ones(2)),
        "squeezed_attend": squeezed_call(shape),
        "squeezed_lookup": tuple(lookup_inputs(Case(K1=4), torch.float16)),
    }


@pytest.mark.parametrize("op", ARGUMENTS)
def test_tensors_of_two_devices_are_refused(op):
    """By each kernel itself: a call of the overload passes no other check."""
    args = direct_calls()[op]
    for i, x in enumerate(args[1:], 1):
        if isinstance(x, torch.Tensor):
            with pytest.raises(ValueError, match=": device is meta, expected cpu as "):
                getattr(module_of(op), op)(*args[:i], x.to("meta"), *args[i + 1 :])


def test_nothing_to_merge_is_refused():
    args = [x[:, :, :0] for x in direct_calls()["merge_attention_states"]]
    with pytest.raises(ValueError, match="out_a: .* not empty"):
        module_of("merge_attention_states").merge_attention_states(*args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_overload_refuses_a_tensor_of_the_cpu(op):
    if any(row.missing for row in OPS[op].impls if row.backend == "cuda"):
        pytest.skip("neither the CUDA extension nor CuPy")
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in direct_calls()[op]]
    args[1] = args[1].cpu()
    with pytest.raises(
        (ValueError, RuntimeError),
        match=r"(key|lse_a|query_step|mean|centroids): (expected a CUDA|device)",
    ):
        getattr(torch.ops.sparse_attn, op).cuda(*args)


def test_the_remedies_are_named():
    python(
        """
        import sys
        sys.modules["sparse_attn._C_cuda"] = sys.modules["cupy"] = None
        import sparse_attn
        table = sparse_attn.backends()
        for op in ("block_sparse_attention", "flex_prefill_select", "merge_attention_states",
                   "squeezed_attend", "squeezed_lookup"):
            reason = table[op]["cuda"]
            assert "CUDA extension not built" in reason, reason
            assert "pip install cupy-cuda" in reason, reason
        assert "CUDA extension not built" in sparse_attn.info()
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_through_cupy(dtype):
    """On a stream of our own; the extension, where there is one, runs the same kernels."""
    pytest.importorskip("cupy")
    shape = Shape(Tq=600, Tk=600, Hq=4, Hkv=2, D=64, Dv=64, Hi=4)
    query, key, value = (x.cuda() for x in inputs(shape, dtype))
    listed = [x.cuda() if isinstance(x, torch.Tensor) else x for x in index(shape)]
    attend = (query, key, value, *listed, True, 10, 20)
    states = OPS["block_sparse_attention"](*attend)
    calls = {
        "flex_prefill_select": (query, key, 0.9, 0.1, 64, None, 64),
        "block_sparse_attention": attend,
        "hip_select": (query, key, 64),
        "hip_prune_select": (query, key, [32, 8], [256, 64], [1, 1]),
        "merge_attention_states": (*states, *states),
    }
    torch.cuda.synchronize()  # the inputs are there, whatever the stream
    for name, args in calls.items():
        with torch.cuda.stream(torch.cuda.Stream()):
            got = getattr(module_of(name), name)(*args)
        torch.cuda.synchronize()
        dense = OPS[name](*args, backend="reference")
        if name.endswith("select"):  # its test compares what is selected
            assert (got[1] - dense[1]).abs().max() <= 1
            continue
        double = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x for x in args]
        exact = OPS[name](*double, backend="reference")
        assert_as_accurate(got[0], exact[0], dense[0], FLOOR[dtype])
        torch.testing.assert_close(got[1].double(), exact[1], rtol=1e-3, atol=1e-3)

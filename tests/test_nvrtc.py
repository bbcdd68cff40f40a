"""What CuPy would compile and launch is what the extension compiles and launches."""

import ctypes
import re
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.nvrtc import launch, source
from sparse_attn.registry import OPS
from tests import simt
from tests.cases import FLOOR, Shape, assert_as_accurate, index, inputs
from tests.ops import all_of
from tests.ops.drawn import HALF
from tests.simt.operators import arguments
from tests.test_registry import python

CUDA_OPS = [n for n, op in OPS.items() if any(i.backend == "cuda" for i in op.impls)]


ARGUMENTS, CALLS = all_of("arguments"), all_of("direct_call")


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


@pytest.mark.parametrize("op", ARGUMENTS)
def test_tensors_of_two_devices_are_refused(op):
    """By each kernel itself: a call of the overload passes no other check."""
    args = CALLS[op]()
    for i, x in enumerate(args[1:], 1):
        if isinstance(x, torch.Tensor):
            with pytest.raises(ValueError, match=": device is meta, expected cpu as "):
                getattr(module_of(op), op)(*args[:i], x.to("meta"), *args[i + 1 :])


def test_nothing_to_merge_is_refused():
    args = [x[:, :, :0] for x in CALLS["merge_attention_states"]()]
    with pytest.raises(ValueError, match="out_a: .* not empty"):
        module_of("merge_attention_states").merge_attention_states(*args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_overload_refuses_a_tensor_of_the_cpu(op):
    if any(row.missing for row in OPS[op].impls if row.backend == "cuda"):
        pytest.skip("neither the CUDA extension nor CuPy")
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in CALLS[op]()]
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

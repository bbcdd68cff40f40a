"""What CuPy would compile and launch is what the extension compiles and launches."""

import ctypes
import re
import shutil
import subprocess
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_attn.nvrtc import launch, source
from sparse_attn.registry import OPS
from tests import simt
from tests.cases import FLOOR, assert_as_accurate
from tests.simt.operators import arguments
from tests.test_registry import python

HALF = (torch.float16, torch.bfloat16)
CUDA_OPS = [n for n, op in OPS.items() if any(i.backend == "cuda" for i in op.impls)]


def merge_arguments(draw):
    shape = [draw(st.integers(1, high)) for high in (2, 3, 9)]
    dv, offset, step = (
        draw(st.integers(1, 300)),
        draw(st.sampled_from((0, 3, 8))),
        draw(st.booleans()),
    )
    dtype = draw(st.sampled_from(HALF))
    outs = [torch.empty(*shape, 2 * dv + 8, dtype=dtype)[..., offset : offset + dv] for _ in "ab"]
    if step:  # heads between tokens, as models have them
        outs[0] = torch.empty(shape[0], shape[2], shape[1], dv, dtype=dtype).transpose(1, 2)
    lses = [torch.empty(*shape[::-1]).permute(2, 1, 0) for _ in "ab"]
    return outs[0], lses[0], outs[1], lses[1]


ARGUMENTS = {"merge_attention_states": merge_arguments}


def module_of(op):
    return import_module(f"sparse_attn.nvrtc.{op}")


def flat(x):
    """The numbers of a plan, in the order of its fields."""
    return [n for part in x for n in flat(part)] if isinstance(x, tuple) else [int(x)]


@pytest.mark.skipif(simt.why_not() is not None, reason=str(simt.why_not()))
@pytest.mark.parametrize("op", ARGUMENTS)
@settings(max_examples=60)
@given(st.data())
def test_parameters_and_plan_are_those_of_the_extension(op, data):
    module = module_of(op)
    args = ARGUMENTS[op](data.draw)
    inputs, outputs, numbers = arguments(OPS[op], *args)
    params = module.params(*OPS[op].bind(*args), *outputs.values())
    plan = flat(module.plan(params))
    there = {
        "params": torch.empty(ctypes.sizeof(params), dtype=torch.uint8),
        "plan": torch.empty(len(plan), dtype=torch.int64),
    }
    simt.run(f"{op}_plan", inputs, outputs | there, numbers)
    assert bytes(there["params"].tolist()) == bytes(params)
    assert there["plan"].tolist() == plan


def launched(op, monkeypatch):
    """The kernels that an operator launches for a few arguments."""
    names = set()
    monkeypatch.setattr(launch, "run", lambda op, name, *rest: names.add(name))
    for dtype in HALF:
        for dv in (64, 5):
            x, lse = torch.empty(1, 2, 3, dv, dtype=dtype), torch.empty(1, 2, 3)
            getattr(module_of(op), op)(x, lse, x, lse)
    return names


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_assembled_source_compiles(op, tmp_path, monkeypatch):
    """One text without our headers; nvcc stands in for NVRTC, which needs a driver in CuPy."""
    text, names = source.assembled(op), launched(op, monkeypatch)
    assert len(names) == 4 and "simt/cuda.h" in text
    included = set(re.findall(r"#include (.*)", text))
    assert {n for n in included if "simt" not in n} <= {
        "<cuda_bf16.h>",
        "<cuda_fp16.h>",
        "<cstdint>",
    }
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on PATH")
    uses = "".join(f"auto* f{i} = &sparse_attn::{n};\n" for i, n in enumerate(sorted(names)))
    (tmp_path / "kernel.cu").write_text(text + uses)
    done = subprocess.run(
        ["nvcc", "-std=c++20", "-arch=sm_80", "-cubin", "-o", "kernel.cubin", "kernel.cu"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = (tmp_path / "kernel.cubin").read_bytes()
    assert len(set(re.findall(rb"\.text\.(\w+)", made))) == len(names)


def test_a_change_of_any_header_changes_what_is_cached():
    text = source.assembled("merge_attention_states")
    for name in ("common/params.h", "cuda/device.cuh", "cuda/merge_attention_states.cuh"):
        last = (source.csrc() / name).read_text().strip().split("\n")[-5:]
        assert all(line in text for line in last if not line.startswith("#include"))


@pytest.mark.parametrize("op", CUDA_OPS)
def test_the_remedies_are_named(op):
    python(
        f"""
        import sys
        sys.modules["sparse_attn._C_cuda"] = sys.modules["cupy"] = None
        import sparse_attn
        reason = sparse_attn.backends()["{op}"]["cuda"]
        assert "CUDA extension not built" in reason and "pip install cupy-cuda" in reason, reason
        assert "CUDA extension not built" in sparse_attn.info()
        """
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dv", [128, 33])
def test_merge_through_cupy(dtype, dv):
    pytest.importorskip("cupy")
    from sparse_attn.nvrtc.merge_attention_states import merge_attention_states

    outs = [torch.randn(2, 3, 70, dv, dtype=dtype, device="cuda") for _ in "ab"]
    lses = [torch.randn(2, 3, 70, device="cuda") for _ in "ab"]
    args = outs[0], lses[0], outs[1], lses[1]
    want, want_lse = OPS["merge_attention_states"](*(x.double() for x in args))
    with torch.cuda.stream(torch.cuda.Stream()):
        out, lse = merge_attention_states(*args)
    torch.cuda.synchronize()
    assert_as_accurate(out, want, want.to(dtype), FLOOR[dtype])
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-6, atol=1e-6)

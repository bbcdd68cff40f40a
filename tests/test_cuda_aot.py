"""The CUDA kernels compile for GPUs that are not here, without spills, within what a block has."""

import shutil

import pytest

from bench import cuda_aot
from sparse_attn.nvrtc import source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def rows():
    return cuda_aot.table(quick=True)


@pytest.mark.parametrize("arch", cuda_aot.QUICK)
def test_kernels_fit(rows, arch):
    found = [row for row in rows if row.arch == arch]
    assert len(found) >= 14
    assert not {r.kernel: r.spilled for r in found if r.spilled}
    assert not {r.kernel: r.shared for r in found if r.shared > cuda_aot.LIMITS[arch][1]}
    assert not {r.kernel: r.registers for r in found if r.registers * r.threads > REGISTERS}


SPILLS = """
namespace sparse_attn {
__global__ void __launch_bounds__(1024, 2) too_much(float* p) {  // 32 registers per thread
  __shared__ float s[256];
  float x[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i] = p[threadIdx.x + i * 1024];
  s[threadIdx.x % 256] = x[0];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[threadIdx.x + i * 1024] = x[63 - i] + s[i];
}
}
"""


def test_what_does_not_fit_shows(monkeypatch):
    monkeypatch.setattr(source, "assembled", lambda op: SPILLS)
    (row,) = cuda_aot.compile_kernels("op", "sm_80", {"too_much": (1024, 5000)})
    assert row.registers <= 32 and row.spilled > 0 and row.shared == 1024 + 5000

"""The CUDA kernels compile for GPUs that are not here, without spills, within what a block has."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench import cuda_aot, sass
from sparse_attn.nvrtc import source

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
REGISTERS = 65536  # of a multiprocessor
ROOT = Path(__file__).parent.parent
BINDINGS = sorted((ROOT / "csrc/cuda").glob("*.cu"))


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


@pytest.mark.parametrize("binding", BINDINGS, ids=lambda path: path.stem)
def test_bindings_compile(binding, tmp_path):
    """As setup.py compiles them, but without optimising or assembling: seconds, not minutes."""
    target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    headers = Path(torch.__file__).parent / "include"
    made = tmp_path / "binding.ptx"
    subprocess.run(
        ["nvcc", "-std=c++20", "-arch=compute_80", "-ptx", "-Xcicc", "-O0", f"-I{headers}",
         f"-DTORCH_TARGET_VERSION={target}", "-DSA_MODULE=_C_cuda", binding, "-o", made],
        check=True,
    )  # fmt: skip
    assert ".entry" in made.read_text()  # the kernels that it launches


@pytest.mark.skipif(sass.disassembler() is None, reason="no cuobjdump")
@pytest.mark.parametrize("arch, product, each", [
    ("sm_80", "IMMA.16864.S4.S4", 64), ("sm_90a", "IMMA.16832.S8.U8", 32),
])  # fmt: skip
def test_products_of_codes_are_single_instructions(arch, product, each):
    """Up to sm_89 of 4-bit integers; later GPUs would have them in software."""
    code = sass.compiled(arch, [sass.KERNELS[128]])[sass.KERNELS[128]]
    executed = [x for piece in code for x in piece]
    assert {x for x in executed if x.startswith(("IMMA", "HMMA", "IGMMA"))} == {product}
    assert arch == "sm_80" or not [x for x in executed if x.startswith("CALL")]
    tile = sass.tile(code, arch, 128)
    # 64 x 32 products of 128 channels in pieces of 16 x 8 x each, little beside them
    assert tile.products == 4 * 4 * (128 // each) and tile.instructions < 330


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

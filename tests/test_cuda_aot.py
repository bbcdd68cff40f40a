"""The CUDA kernels compile for GPUs that are not here, without spills, within what a block has."""

import shutil

import pytest

from bench import cuda_aot

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def rows():
    return cuda_aot.table(quick=True)


@pytest.mark.parametrize("arch", cuda_aot.QUICK)
def test_kernels_fit(rows, arch):
    found = [row for row in rows if row.arch == arch]
    assert len(found) >= 1
    assert not {r.kernel: r.spilled for r in found if r.spilled}
    assert not {r.kernel: r.shared for r in found if r.shared > cuda_aot.LIMITS[arch][1]}
    assert not {r.kernel: r.registers for r in found if r.registers * r.threads > REGISTERS}

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from sparse_attn import _ext
from tests.cases import CUDA, TRITON, cuda_why_not

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined

# pytest-xdist's processes share the processors
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // workers))

settings.register_profile(
    "ci",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("ci")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Shows what needs Triton, a GPU or a way to run CUDA kernels as skipped, with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        named = {v for v in values if isinstance(v, (str, tuple))}
        triton = item.get_closest_marker("triton") or {"triton", TRITON} & named
        if triton and _ext.triton_missing:
            item.add_marker(pytest.mark.skip(reason=_ext.triton_missing))
        if {"cuda", *CUDA} & named and cuda_why_not():
            item.add_marker(pytest.mark.skip(reason=cuda_why_not()))

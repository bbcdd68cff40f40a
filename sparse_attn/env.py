"""Every environment variable that is read at run time (build variables: see setup.py)."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """SPARSE_ATTN_BACKEND: use this backend for every operator; for debugging only."""
    return os.environ.get("SPARSE_ATTN_BACKEND") or None


def interpreted() -> bool:
    """TRITON_INTERPRET, Triton's own variable: kernels run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"

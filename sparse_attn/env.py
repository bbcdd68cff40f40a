"""Every environment variable that is read at run time (build variables: see setup.py)."""

from __future__ import annotations

import os


def forced_backend() -> str | None:
    """SPARSE_ATTN_BACKEND: use this backend for every operator; for debugging only."""
    return os.environ.get("SPARSE_ATTN_BACKEND") or None

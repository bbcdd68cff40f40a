"""Results as one line: dtypes and shapes in place of the numbers."""

from __future__ import annotations

from typing import Any

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """As in "float32"."""
    return str(dtype).removeprefix("torch.")


def brief(x: Any) -> str:
    """The `__repr__` of a NamedTuple that holds tensors."""
    fields = (f"{name}={_one(value)}" for name, value in x._asdict().items())
    return f"{type(x).__name__}({', '.join(fields)})"


def _one(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{dtype_name(value.dtype)}{list(value.shape)}"
    return repr(value)

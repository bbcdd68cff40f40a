"""Results as one line: dtypes and shapes in place of the numbers."""

from __future__ import annotations

from typing import Any

import torch


def brief(x: Any) -> str:
    """The `__repr__` of a NamedTuple that holds tensors."""
    fields = (f"{name}={_one(value)}" for name, value in x._asdict().items())
    return f"{type(x).__name__}({', '.join(fields)})"


def _one(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)

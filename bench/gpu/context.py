"""What a part of the GPU check is given: sizes, devices, time left, and where to write rows."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class Context:
    """One part's view of the run; rows are on disk as soon as they are added."""

    part: str
    file: Path
    seconds: float  # after which the part is ended from outside
    dry: bool = False  # tiny sizes on the CPU, under Triton's interpreter

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds
        self.device = "cpu" if self.dry else "cuda"
        self.dtype = torch.float32 if self.dry else torch.bfloat16

    def size(self, real: Any, dry: Any) -> Any:
        return dry if self.dry else real

    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self.end - time.monotonic()

    def enough(self, seconds: float, what: str) -> bool:
        """Whether there is time; reports what is skipped otherwise."""
        if self.dry or self.left() > seconds:
            return True
        self.note(what, "skipped: out of time")
        return False

    def backends(self, operator: str) -> list[str]:
        """Our GPU backends that can run an operator here, each compared with the others."""
        from sparse_attn import backends

        if self.dry:
            return ["triton"]
        ready = backends()[operator]
        return [name for name in ("cuda", "triton") if ready[name] is None]

    def add(self, what: str, value: float, unit: str, goal: str = "", **details: Any) -> None:
        self._write({"what": what, "value": value, "unit": unit, "goal": goal, **details})
        shown = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in details.items()
        )
        print(f"  {what}: {value:.4g} {unit}  {goal}  {shown}", flush=True)

    def note(self, what: str, text: str) -> None:
        """Something that has no number: a failure, or what was skipped and why."""
        self._write({"what": what, "note": text})
        print(f"  {what}: {text}", flush=True)

    def failed(self, what: str, error: BaseException | str) -> None:
        """Reports a failure; a call that a backend does not serve by design is none."""
        if isinstance(error, NotImplementedError):
            self.note(what, "not served: " + str(error).strip().split("\n")[-1].strip())
            return
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.note(what, "FAILED: " + (text.strip() or "no message")[-600:])

    def _write(self, row: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps({"part": self.part, **row}) + "\n")

"""The text of the demonstration, with planted needles."""

from __future__ import annotations

import random
import string
import sysconfig
from pathlib import Path
from typing import NamedTuple

import torch

NEEDLES = 8
SHORTEST = 512  # bytes of a prompt: the planted lines and the questions take 336


class Prompt(NamedTuple):
    """Bytes of a prompt and where in it the planted values are asked for."""

    ids: torch.Tensor  # int64 [1, T]
    answers: list[range]
    text_end: int  # the questions begin here


def corpus(path: Path | None) -> bytes:
    """The file, or the standard library's own sources, longest modules last."""
    if path is not None:
        try:
            return path.read_bytes()
        except OSError as error:
            raise SystemExit(f"--text: {error}") from error
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"), key=lambda p: (p.stat().st_size, p.name))
    return b"\n\n".join(p.read_bytes() for p in files if p.stat().st_size > 4000)


def prompt(text: bytes, length: int) -> Prompt:
    """`length` bytes: text with NEEDLES lines `key_abcd = 12345`, then a question for each."""
    if length < SHORTEST:
        raise SystemExit(f"--lengths: got {length}, expected at least {SHORTEST}")
    rng = random.Random(length)
    names = ["key_" + "".join(rng.choices(string.ascii_lowercase, k=4)) for _ in range(NEEDLES)]
    values = [str(rng.randrange(10000, 100000)) for _ in range(NEEDLES)]
    planted = [f"{n} = {v}\n".encode() for n, v in zip(names, values, strict=True)]
    questions = [f"assert {n} == {v}\n".encode() for n, v in zip(names, values, strict=True)]
    room = length - sum(map(len, planted + questions))
    if len(text) < room:
        raise SystemExit(f"--text: {len(text)} bytes are too few for a prompt of {length}")
    lines = text[:room].splitlines(keepends=True)
    at = sorted(rng.sample(range(1, max(len(lines) - 1, NEEDLES + 1)), NEEDLES))
    for place, line in sorted(zip(at, planted, strict=True), reverse=True):
        lines.insert(place, line)
    body = b"".join(lines)
    whole = (body + b"".join(questions))[-length:]
    text_end = len(whole) - sum(map(len, questions))
    answers, end = [], text_end
    for question in questions:
        end += len(question)
        answers.append(range(end - 6, end - 1))
    return Prompt(torch.tensor(list(whole))[None], answers, text_end)

"""Prompts of a given length made from a text: what was planted far back is asked for at the end.

The tasks are those of RULER (arXiv 2404.06654) in kind; text, wording and scoring are our own:
lines of code in a real text, answers scored token by token given the right tokens before them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ..demo.text import Prompt

TASKS = ("multi_key", "multi_value", "variable_tracking", "copying")
DISTRACTORS = 4  # keys planted for each that is asked for
HOPS = 3  # assignments from a value to the name that is asked for
CUE, COPIED = 16, 32  # tokens of a passage that are given, that are asked for
Encode = Callable[[str], list[int]]


class Source:
    """A text in lines of tokens, from which prompts are cut."""

    def __init__(self, text: str, encode: Encode, prefix: Iterable[int] = ()) -> None:
        self.encode = encode
        self.prefix = list(prefix)  # what every prompt begins with
        self._lines = text.splitlines(keepends=True)
        self._encoded: list[list[int]] = []

    def _line(self, i: int) -> list[int]:
        while len(self._encoded) <= i:
            if len(self._encoded) == len(self._lines):
                raise ValueError(
                    f"text: {sum(map(len, self._encoded))} tokens are too few for a prompt"
                )
            self._encoded.append(self.encode(self._lines[len(self._encoded)]))
        return self._encoded[i]

    def filler(self, n_tokens: int) -> list[list[int]]:
        """The first lines of the text, `n_tokens` in all, the last one cut."""
        lines: list[list[int]] = []
        while n_tokens > 0:
            lines.append(self._line(len(lines))[:n_tokens])
            n_tokens -= len(lines[-1])
        return lines

    def plain(self, length: int) -> Prompt:
        """Text alone."""
        ids = self.prefix + sum(self.filler(length - len(self.prefix)), [])
        return Prompt(torch.tensor(ids)[None], [], length)

    def prompt(
        self,
        length: int,
        planted: list[tuple[float, list[int]]],
        questions: list[tuple[list[int], list[int]]],
    ) -> Prompt:
        """Text with lines planted at depths of 0 to 1, then questions, each with its answer."""
        tail = sum((given + answer for given, answer in questions), [])
        room = length - len(self.prefix) - len(tail) - sum(len(line) for _, line in planted)
        if room < length // 4:
            raise ValueError(
                f"length: {length} tokens are too few for {len(planted)} planted lines and "
                f"{len(questions)} questions"
            )
        lines = self.filler(room)
        starts, at = [], 0
        for line in lines:
            starts.append(at)
            at += len(line)
        body, rest = list(self.prefix), sorted(planted, key=lambda one: one[0])
        for start, line in zip(starts, lines, strict=True):
            while rest and rest[0][0] * room <= start:
                body += rest.pop(0)[1]
            body += line
        for _, line in rest:
            body += line
        answers, end = [], len(body)
        for given, answer in questions:
            end += len(given) + len(answer)
            answers.append(range(end - len(answer), end))
        return Prompt(torch.tensor(body + tail)[None], answers, len(body))


class Maker:
    """Writes the prompts of one length; the same seed gives the same prompts."""

    def __init__(self, source: Source, length: int, samples: int) -> None:
        self.source, self.length, self.samples = source, length, samples
        self.newline = source.encode("\n")

    def _random(self, task: Any) -> random.Random:
        return random.Random(f"{self.length} {task}")

    def _name(self, rng: random.Random) -> str:
        return "key_" + "".join(rng.choices(string.ascii_lowercase, k=4))

    def _value(self, rng: random.Random) -> list[int]:
        return self.source.encode(str(rng.randrange(10000, 100000)))

    def _set(self, name: str, value: list[int]) -> list[int]:
        return self.source.encode(f"{name} = ") + value + self.newline

    def _ask(self, name: str, value: list[int]) -> tuple[list[int], list[int]]:
        return self.newline + self.source.encode(f"assert {name} == "), value

    def needle(self, depth: float) -> Prompt:
        """`samples` keys side by side at one depth; each is asked for."""
        rng = self._random(f"needle {depth:.3f}")
        pairs = [(self._name(rng), self._value(rng)) for _ in range(self.samples)]
        planted = [(depth, self._set(*pair)) for pair in pairs]
        rng.shuffle(pairs)
        return self.source.prompt(self.length, planted, [self._ask(*pair) for pair in pairs])

    def multi_key(self) -> Prompt:
        """Many keys all over the text; some are asked for."""
        rng = self._random("multi_key")
        n = self.samples * DISTRACTORS
        pairs = [(self._name(rng), self._value(rng)) for _ in range(n)]
        planted = [((i + 0.5) / n, self._set(*pair)) for i, pair in enumerate(pairs)]
        asked = [self._ask(*pair) for pair in rng.sample(pairs, self.samples)]
        return self.source.prompt(self.length, planted, asked)

    def multi_value(self) -> Prompt:
        """One key that gets several values; all are asked for, in their order."""
        rng = self._random("multi_value")
        name, values = self._name(rng), [self._value(rng) for _ in range(self.samples)]
        planted = [
            ((i + 0.5) / self.samples, self._set(name, value)) for i, value in enumerate(values)
        ]
        return self.source.prompt(self.length, planted, [self._ask(name, v) for v in values])

    def variable_tracking(self) -> Prompt:
        """Chains `a = 1`, `b = a`, `c = b` spread over the text; the last name is asked for."""
        rng = self._random("variable_tracking")
        planted, asked = [], []
        for chain in range(self.samples):
            value = self._value(rng)
            names = [self._name(rng) for _ in range(HOPS)]
            for hop, name in enumerate(names):
                depth = (hop + (chain + 0.5) / self.samples) / HOPS
                given = value if hop == 0 else self.source.encode(names[hop - 1])
                planted.append((depth, self._set(name, given)))
            asked.append(self._ask(names[-1], value))
        return self.source.prompt(self.length, planted, asked)

    def copying(self) -> Prompt:
        """Passages of the text; each begins anew at the end and is to be continued."""
        rng = self._random("copying")
        passage = CUE + COPIED
        room = self.length - len(self.source.prefix) - self.samples * (passage + len(self.newline))
        text = sum(self.source.filler(max(room, 1)), [])
        if len(text) < 4 * passage:
            raise ValueError(f"length: {self.length} tokens are too few for passages to copy")
        questions = []
        for i in range(self.samples):
            span = (len(text) - passage) // self.samples
            at = i * span + rng.randrange(max(1, span - passage))
            cut = text[at : at + passage]
            questions.append((self.newline + cut[:CUE], cut[CUE:]))
        return self.source.prompt(self.length, [], questions)

    def task(self, name: str) -> Prompt:
        """One of TASKS."""
        return getattr(self, name)()


def depths(n: int) -> list[float]:
    """`n` depths from the beginning of the text to its end."""
    return [i / max(1, n - 1) for i in range(n)]

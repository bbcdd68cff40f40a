"""Thresholds of SALE per layer and head, lowered until what a head computes is close to dense.

calibrate_sale([[(query, key, value), ...] for each layer]).save("sale.json")
Sale("sale.json", layer=3)  # the method of one layer
register("sale.json")  # of all layers of a model
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .block_index import BlockIndex
from .methods.dense import Dense
from .methods.sale import Sale
from .ops import _checks as check
from .ops.block_sparse_attention import op as attend

START, LEAST = 0.008, 1e-4  # the published code's first threshold, and the last but 0
Prompt = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """What was found for a layer; every list has a number per query head.

    Attributes:
        threshold: 0 where no threshold from 1e-4 on was good enough: such a head stays dense.
        error: mean over tokens of sum over channels of |out - dense|.
        recall: share of the attention mass that was kept, mean over tokens.
        density: share of the visible blocks that was computed.
        prompts: how many were looked at; the numbers above are means over them.
    """

    threshold: list[float]
    error: list[float]
    recall: list[float]
    density: list[float]
    prompts: int


@dataclass(frozen=True)
class Calibration:
    """The layers in order, what was asked for, and the fields of `Sale` it holds for."""

    layers: list[Layer]
    target: dict[str, float]
    options: dict[str, Any]

    def save(self, path: str | Path) -> None:
        """Writes what `Sale(threshold=path, layer=i)` and `Sale.load(path)` read.

        `options` and `layers` are fields of the method, `measured` is for readers.
        """
        fields = [asdict(layer) for layer in self.layers]
        found = {
            "method": "sale",
            "options": self.options,
            "layers": {i: {"threshold": x.pop("threshold")} for i, x in enumerate(fields)},
            "measured": {"target": self.target, "layers": dict(enumerate(fields))},
        }
        text = json.dumps(found, indent=1)
        # a list of numbers on a line of its own
        text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text)
        Path(path).write_text(text + "\n")


def calibrate_sale(
    layers: Iterable[Iterable[Prompt]],
    *,
    max_error: float | None = None,
    min_recall: float | None = None,
    config: Sale | None = None,
    scale: float | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> Calibration:
    """Finds a threshold for each head of each layer (arXiv 2505.24179, its code's calibration).

    Starts at 0.008 and halves the thresholds of the heads that miss the target, all heads of a
    layer at once, until none does or a head's falls below 1e-4: then it is 0, dense. Thresholds
    only go down from prompt to prompt.

    Args:
        layers: for each layer its prompts, (query, key, value) as `attention` takes them. Read
            once, one layer at a time, so generators will do; the prompts of a layer are all held
            until it is done, because its last thresholds are measured on each.
        max_error: the most that a head's output may differ from dense, mean over tokens of the sum
            over channels of the absolute difference; default 0.4 if min_recall is not given either.
        min_recall: the least share of a head's attention mass to keep, mean over tokens.
        config: the other fields of `Sale`, which the file keeps; its threshold has no effect, and
            min_length none on the search.
        scale, backend: as in `attention`.
        progress: show a bar on stderr; needs tqdm.

    Raises:
        ValueError: a target out of range, no layer, a layer without prompts.
    """
    if max_error is None and min_recall is None:
        max_error = 0.4
    target = {}
    for name, x, high in (("max_error", max_error, float("inf")), ("min_recall", min_recall, 1)):
        if x is not None:
            check.number(name, x)
            check.between(name, x, 0, high)
            target[name] = float(x)
    config = Sale() if config is None else config
    results = []
    with _bar(progress) as bar:
        for i, prompts in enumerate(layers):
            bar.set_description(f"layer {i}")
            results.append(_layer(i, prompts, target, config, scale, backend, bar))
    if not results:
        raise ValueError("layers: got none")
    options = {k: v for k, v in asdict(config).items() if k not in ("threshold", "layer")}
    return Calibration(results, target, options)


def _layer(i, prompts, target, config, scale, backend, bar) -> Layer:
    kept: list[Prompt] = []
    threshold: torch.Tensor | None = None
    for prompt in prompts:
        if isinstance(prompt, torch.Tensor):
            raise ValueError(
                f"layers: layer {i} holds a tensor, expected its prompts: [(query, key, value)]"
            )
        kept.append(prompt)
        if threshold is None:
            threshold = torch.full((prompt[0].shape[1],), START)
        _lower(threshold, prompt, target, config, scale, backend, bar)
    if threshold is None:
        raise ValueError(f"layers: layer {i} has no prompt")
    found = []
    for prompt in kept:
        found.append(torch.stack(_measure(prompt, threshold, config, scale, backend)))
        bar.update()
    error, recall, density = torch.stack(found).mean(0).tolist()
    return Layer(_plain(threshold), error, recall, density, len(kept))


def _plain(threshold: torch.Tensor) -> list[float]:
    """As decimal numbers, not as what float32 makes of them."""
    return [float(f"{x:.6g}") for x in threshold.tolist()]


def _lower(threshold, prompt, target, config, scale, backend, bar) -> None:
    """Halves the thresholds of heads that miss the target on a prompt, in place."""
    query, key, value = prompt
    groups = query.shape[1] // key.shape[1]
    dense = _dense(prompt, scale, backend)
    todo = threshold > 0
    while todo.any():
        # only the KV heads that some query head still needs
        kv = todo.view(-1, groups).any(1).nonzero().flatten()
        heads = (kv[:, None] * groups + torch.arange(groups)).flatten()
        part = (query[:, heads], key[:, kv], value[:, kv])
        error, recall, _ = _measure(
            part, threshold[heads], config, scale, backend, [x[:, heads] for x in dense]
        )
        missed = torch.zeros(len(heads), dtype=torch.bool)
        if "max_error" in target:
            missed |= ~(error <= target["max_error"])
        if "min_recall" in target:
            missed |= ~(recall >= target["min_recall"])
        todo[heads] &= missed
        threshold[todo] /= 2
        threshold[threshold < LEAST] = 0
        todo &= threshold > 0
        bar.update()


def _dense(prompt, scale, backend):
    query, key, value = prompt
    index = Dense().select(query, key)
    args = (query, key, value, *index.blocks, True, index.sink)
    return attend(*args, scale=scale, backend=backend)


def _measure(prompt, threshold, config, scale, backend, dense=None):
    """Error, recall and density per query head, on the CPU."""
    query, key, value = prompt
    out, lse = _dense(prompt, scale, backend) if dense is None else dense
    config = replace(config, threshold=threshold.tolist())
    index: BlockIndex = config.select(query, key, scale=scale, backend=backend)
    got, got_lse = attend(query, key, value, *index.blocks, True, scale=scale, backend=backend)
    error = (got.float() - out.float()).abs().sum(-1).mean((0, 2))
    recall = (got_lse - lse).exp().nan_to_num(1).mean((0, 2))
    listed = index.counts.float().sum(2).mean(0)
    shape = (query.shape[2], key.shape[2], index.q_block, index.kv_block)
    visible = BlockIndex.full(*shape).counts.sum()
    density = (listed / visible).repeat_interleave(query.shape[1] // len(listed))
    return [x.cpu() for x in (error, recall, density.to(error.device))]


def _bar(progress):
    """A bar that counts measurements."""
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise ImportError("progress: needs tqdm; install it or pass progress=False") from None
        from contextlib import nullcontext
        from types import SimpleNamespace

        return nullcontext(SimpleNamespace(set_description=lambda _: None, update=lambda: None))
    return tqdm(unit="runs", disable=not progress)

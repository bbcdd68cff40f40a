"""SALE: block selection by 4-bit estimates of single scores (arXiv 2505.24179)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from ..block_index import BlockIndex
from ..ops import _checks as check
from ..ops import _sale as sale
from ..ops import sale_select as ops
from ..registry import Op

# of the fields that a calibrated file has too
DEFAULTS: dict[str, Any] = {
    "q_block": 64, "kv_block": 32, "local": 128, "sink": 32, "min_length": 1024,
    "share_kv_heads": False,
}  # fmt: skip


@dataclass(frozen=True)
class Sale:
    """Keeps every block in which one pair of tokens looks important.

    A calibrated file gives all fields: its thresholds hold for the blocks and the reference region
    that they were found with. None stands for the file's value, or without a file the default.

    Attributes:
        threshold: a pair is important if its weight exceeds this share of the reference region's
            softmax sum (paper: tau); default 0.004, below 1e-5 keeps everything. One number, one
            per query head (a tuple, list or tensor), or the path of a file that
            `calibrate_sale` wrote, from which the numbers of `layer` are read at once, and the
            fields below; one given here that differs raises ValueError.
        layer: which layer of the file; None where it has one only. For all layers: `load`.
        q_block: queries per block; 16, 32, 64 or 128, default 64.
        kv_block: keys per block; 16, 32 or 64, default 32.
        local: the reference region holds the last ceil(local / kv_block) blocks before and at the
            first query of the block, and those up to its last; default 128 tokens.
        sink: and the first ceil(sink / kv_block) blocks; default 32 tokens.
        min_length: prompts of fewer keys take the dense path; default 1024.
        share_kv_heads: one list per KV head, the union of its query heads' lists; default False.
    """

    threshold: Any = 0.004
    q_block: int | None = None
    kv_block: int | None = None
    local: int | None = None
    sink: int | None = None
    min_length: int | None = None
    share_kv_heads: bool | None = None
    layer: int | None = None

    name: ClassVar[str] = "sale"

    def __post_init__(self) -> None:
        threshold, options = self.threshold, DEFAULTS
        if isinstance(threshold, (str, Path)):
            threshold, options = _of_layer(threshold, self.layer)
            self._agree(options)
            object.__setattr__(self, "layer", None)  # the numbers are what counts from here on
        elif self.layer is not None:
            raise ValueError(
                f"layer: got {self.layer}, but threshold is no file with layers to choose from"
            )
        for name in DEFAULTS:
            if getattr(self, name) is None:
                object.__setattr__(self, name, options[name])
        sale.check_grid(self.q_block, self.kv_block, self.local, self.sink)
        check.not_negative("min_length", self.min_length)
        sale.check_share(self.share_kv_heads)
        if isinstance(threshold, torch.Tensor):
            threshold = threshold.tolist()
        several = isinstance(threshold, (list, tuple))
        for x in threshold if several else (threshold,):
            check.number("threshold", x)
            check.between("threshold", x, 0, check.MAX_FLOAT32)
        if several and not threshold:
            raise ValueError("threshold: got no number, expected one per query head")
        # so a config says what it does, and does not change when the file does
        object.__setattr__(self, "threshold", tuple(threshold) if several else threshold)

    def _agree(self, options: dict[str, Any]) -> None:
        """Refuses fields that are not those of the file."""
        for name, of_file in options.items():
            given = getattr(self, name)
            if given is not None and given != of_file:
                raise ValueError(
                    f"{name}: got {given!r}, but {str(self.threshold)!r} was calibrated for "
                    f"{of_file!r}; Sale.load(path, {name}={given!r})[layer] overrides that"
                )

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> dict[int, Sale]:
        """The config of each layer of a calibrated file; `options` replace other fields of it."""
        found = _read(path)
        options = {**found["options"], **options}
        layers = found["layers"].items()
        return {int(i): cls(threshold=x["threshold"], **options) for i, x in layers}

    def why_not(self, query: torch.Tensor, key: torch.Tensor, causal: bool) -> str | None:
        if isinstance(self.threshold, tuple):  # also where the dense path needs none
            n = len(self.threshold)
            check.same("threshold", "number of heads", n, query.shape[1], "query")
        if query.shape[3] % 2 != 0:
            return (
                f"SALE packs two channels a byte, head_dim {query.shape[3]} is odd; pad it with a "
                "channel of zeros and give scale, or use another method"
            )
        return sale.why_not(causal)

    def selector(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        causal: bool,
        scale: float | None,
        key_mean: torch.Tensor | None = None,
        query_mean: torch.Tensor | None = None,
    ) -> tuple[Op, tuple[Any, ...]]:
        if isinstance(self.threshold, tuple):
            # the numbers travel as arguments of one kernel: a copy from the host would wait
            zeros = query.new_zeros(len(self.threshold), dtype=torch.float32)
            each = torch._foreach_add(list(zeros.unbind()), list(map(float, self.threshold)))
            threshold = torch.stack(each)
        else:
            threshold = query.new_full((query.shape[1],), self.threshold, dtype=torch.float32)
        return ops.op, (
            query, key, threshold, self.q_block, self.kv_block, self.local, self.sink,
            self.share_kv_heads, causal, scale, key_mean, query_mean,
        )  # fmt: skip

    def select(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        *,
        causal: bool = True,
        scale: float | None = None,
        backend: str | None = None,
        key_mean: torch.Tensor | None = None,
        query_mean: torch.Tensor | None = None,
    ) -> BlockIndex:
        """As every method's; `key_mean` [B, Hkv, D], `query_mean` [B, Hq, D] float32: frozen means.

        For prefill in chunks, see `SaleState`. None: the mean of the tokens of this call.
        """
        op, args = self.selector(query, key, causal, scale, key_mean, query_mean)
        return BlockIndex(*op(*args, backend=backend), self.q_block, self.kv_block)


class SaleState:
    """One layer's prompt in chunks: the means of the first chunk serve all that follow.

    So a whole block of tokens has the same codes in every chunk, and chunks that end at multiples
    of q_block and kv_block choose what the whole prompt with these means would. Without a state
    each chunk takes the means of its own call; both are exact in what they attend to, a mean only
    moves what the estimate rounds.

        state = SaleState(Sale(threshold=0.004))
        out, lse = state.attention(query, key, value)  # once per chunk, on all keys so far

    Attributes:
        config: how blocks are chosen.
        key_mean, query_mean: float32 [B, Hkv, D] and [B, Hq, D], None before the first chunk.
        fallback: why the last chunk took the dense path, None if it did not.
    """

    def __init__(self, config: Sale | None = None) -> None:
        if config is not None and not isinstance(config, Sale):
            raise TypeError(f"config: got {config!r}, expected a Sale, such as Sale(threshold=0.1)")
        self.config = Sale() if config is None else config
        self.reset()

    def reset(self) -> None:
        """Forgets the means: for a new prompt."""
        self.key_mean: torch.Tensor | None = None
        self.query_mean: torch.Tensor | None = None
        self.fallback: str | None = None
        self._keys = 0

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None = None,
        backend: str | None = None,
        fallback: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One chunk: (out, lse) of queries [B, Hq, Tq, D] on key and value [B, Hkv, Tk, D], Tk all.

        Causal. Takes new means where the shapes are not those of a next chunk. The dense path
        where `sparse_attn.attention` takes it; `fallback=False` refuses it.
        """
        from .. import api

        before = key.shape[2] - query.shape[2]
        means = (self.key_mean, self.query_mean)
        like = all(
            mean is not None and mean.shape == (*x.shape[:2], x.shape[3])
            for mean, x in zip(means, (key, query), strict=True)
        )
        if not (like and before > 0 and before == self._keys):
            self.key_mean, self.query_mean = (
                x.detach().mean(2, dtype=torch.float32) for x in (key, query)
            )
        self._keys = key.shape[2]
        options: dict[str, Any] = {"scale": scale, "backend": backend}
        how: dict[str, Any] = {"method": "dense"}
        self.fallback = api.dense_because(self.config, query, key, key.shape[2], fallback, backend)
        if self.fallback is None:
            means = {"key_mean": self.key_mean, "query_mean": self.query_mean}
            how = {"index": self.config.select(query.detach(), key.detach(), **options, **means)}
        return api.attention(query, key, value, **how, **options, return_lse=True)


def _read(path: str | Path) -> dict[str, Any]:
    """A file of `Calibration.save`."""
    try:
        found = json.loads(Path(path).read_text())
        legal = found["method"] == "sale" and found["options"].keys() <= DEFAULTS.keys()
        for layer in found["layers"].values():
            legal = legal and list(layer) == ["threshold"] and isinstance(layer["threshold"], list)
    except FileNotFoundError:
        raise ValueError(f"threshold: there is no file {str(path)!r}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        legal = False
    if not legal:
        raise ValueError(f"threshold: {str(path)!r} is no file that calibrate_sale wrote")
    found["options"] = {**DEFAULTS, **found["options"]}
    return found


def _of_layer(path: str | Path, layer: int | None) -> tuple[list[float], dict[str, Any]]:
    found = _read(path)
    layers = found["layers"]
    only = next(iter(layers)) if len(layers) == 1 and layer is None else str(layer)
    if only not in layers:
        raise ValueError(
            f"layer: got {layer}, expected one of {', '.join(layers)}, the layers of "
            f"{str(path)!r}; Sale.load gives the configs of all"
        )
    return layers[only]["threshold"], found["options"]


METHOD = Sale

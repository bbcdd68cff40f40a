"""`SqueezedContext`: a fixed context prepared once, and what a layer of it offers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..brief import brief, dtype_name
from ..ops import _checks as check
from ..ops.squeezed_attention import op as squeezed_attention
from .calibrate import threshold_of


class SqueezedLayer(NamedTuple):
    """One layer of a context, as the operators take it; one context, so the batch size is 1.

    Attributes:
        key, value: [1, Hkv, Sc, D], [1, Hkv, Sc, Dv], the clustered tokens, sorted by cluster and
            clusters by their coarse parent.
        order: int32 [1, Hkv, Sc], the position in the text of each sorted token.
        window_key, window_value: [1, Hkv, W, D], [1, Hkv, W, Dv], the last tokens of the context:
            never clustered, always attended to.
        centroids: [1, Hkv, K, D] in key's dtype, means of the keys.
        log_counts: float32 [1, Hkv, K], log of the keys per cluster, -inf for an empty one.
        offsets: int32 [1, Hkv, K + 1], where each cluster begins.
        threshold: float32 [], one for the whole model.
        coarse_centroids, coarse_log_counts, children, coarse_threshold: the coarse level of a
            hierarchical context, otherwise None.
        scores, coarse_scores: float32 [H', K], the calibration scores that thresholds come from.
        shared: one choice per KV head instead of one per query head.
        scale: of the attention scores, None for 1 / sqrt(D).
    """

    key: torch.Tensor
    value: torch.Tensor
    order: torch.Tensor
    window_key: torch.Tensor
    window_value: torch.Tensor
    centroids: torch.Tensor
    log_counts: torch.Tensor
    offsets: torch.Tensor
    threshold: torch.Tensor
    coarse_centroids: torch.Tensor | None
    coarse_log_counts: torch.Tensor | None
    children: torch.Tensor | None
    coarse_threshold: torch.Tensor | None
    scores: torch.Tensor
    coarse_scores: torch.Tensor | None
    shared: bool
    scale: float | None

    __repr__ = brief

    @property
    def lookup(self) -> tuple[Any, ...]:
        """The arguments of `squeezed_lookup` after the query."""
        return (
            self.centroids, self.log_counts, self.offsets, self.threshold, self.coarse_centroids,
            self.coarse_log_counts, self.children, self.coarse_threshold, self.shared, self.scale,
        )  # fmt: skip

    @property
    def own_scale(self) -> float:
        """`scale`, in numbers."""
        return self.key.shape[3] ** -0.5 if self.scale is None else self.scale

    def has_scale(self, scale: float | None) -> bool:
        """Whether a call with this scale, None for 1 / sqrt(D), has the scale of the context."""
        theirs = self.key.shape[3] ** -0.5 if scale is None else scale
        return abs(theirs - self.own_scale) <= 1e-6 * abs(self.own_scale)

    def attention(
        self,
        query: torch.Tensor,
        tail_key: torch.Tensor,
        tail_value: torch.Tensor,
        tail_lengths: torch.Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`squeezed_attention` over this layer: out, lse and the tokens kept per head.

        The tail begins with the window (`window_key`, `window_value`), which is not added here.
        """
        *level, shared, scale = self.lookup
        return squeezed_attention(
            query, self.key, self.value, tail_key, tail_value, *level, shared, tail_lengths, scale,
            backend=backend,
        )  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """How a context is prepared, and for what; the readable part of its file.

    Attributes:
        clusters: clusters per clustered key (paper: 5 %), above 0, at most 1.
        coarse: coarse clusters per clustered key (paper: 1 %), less than `clusters`; None for a
            flat lookup.
        window: last tokens of the context that stand in for the unknown queries and are always
            attended to (paper: 100), at least 1.
        sparsity: share of the clustered keys that the threshold drops for the calibration queries
            (paper: 0.5, 0.7 or 0.9), 0 to below 1; 0 keeps everything, at both levels.
        coarse_sparsity: the same of the coarse level (official code: 0.5).
        shared: one choice per KV head, from the mean score of its query heads, instead of one per
            query head (paper, appendix on grouped queries).
        segment: cluster in segments of about so many tokens, at a cost that grows linearly; None
            clusters the whole context at once, as the paper does.
        iterations: of K-means, at most (official: 300).
        split_above: clusters of more than this many times the mean size are split, which the
            paper does not do; None for never.
        seed: of K-means.
        scale: of the attention scores, None for 1 / sqrt(D).
        model: a name of yours, checked by nobody.
    """

    clusters: float = 0.05
    coarse: float | None = None
    window: int = 100
    sparsity: float = 0.9
    coarse_sparsity: float = 0.5
    shared: bool = False
    segment: int | None = None
    iterations: int = 20
    split_above: float | None = 4.0
    seed: int = 0
    scale: float | None = None
    model: str = ""

    def __post_init__(self) -> None:
        check.number("clusters", self.clusters)
        if not 0 < self.clusters <= 1:
            raise ValueError(f"clusters: got {self.clusters}, expected above 0, at most 1")
        if self.coarse is not None:
            check.number("coarse", self.coarse)
            if not 0 < self.coarse < self.clusters:
                raise ValueError(
                    f"coarse: got {self.coarse}, expected above 0 and less than clusters, "
                    f"{self.clusters}, or None for one level"
                )
        for name in ("window", "iterations", "segment"):
            least = getattr(self, name)
            if least is None and name == "segment":
                continue
            check.integer(name, least)
            if least < 1:
                raise ValueError(f"{name}: got {least}, expected 1 or more")
        for name in ("sparsity", "coarse_sparsity"):
            share = getattr(self, name)
            check.number(name, share)
            if not 0 <= share < 1:
                raise ValueError(f"{name}: got {share}, expected 0 to below 1")
        if self.split_above is not None:
            check.number("split_above", self.split_above)
            if not self.split_above >= 1:
                raise ValueError(f"split_above: got {self.split_above}, expected 1 or more or None")
        check.integer("seed", self.seed)
        check.finite_scale(self.scale)


@dataclass(frozen=True, repr=False)
class SqueezedContext:
    """A fixed context, clustered: what `Squeezed` and `SqueezedCache` attend to.

    Attributes:
        layers: one `SqueezedLayer` per layer of the model.
        parameters: what it was prepared with.
        tokens: int64 [S], the ids of the context, None where it was built from tensors alone.
        fingerprint: of the model that prepared it, None where it was built from tensors alone.
    """

    layers: tuple[SqueezedLayer, ...]
    parameters: Parameters
    tokens: torch.Tensor | None = None
    fingerprint: str | None = None

    def __repr__(self) -> str:
        fields = (f"{name}={value!r}" for name, value in self.summary().items())
        return f"SqueezedContext({', '.join(fields)})"

    @classmethod
    def build(
        cls,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        queries: Sequence[torch.Tensor],
        *,
        tokens: torch.Tensor | None = None,
        progress: bool = True,
        fingerprint: str | None = None,
        **parameters: Any,
    ) -> SqueezedContext:
        """Clusters a context and calibrates its threshold (arXiv 2411.09688, sec. 3 and 4).

        Args:
            keys: per layer [1, Hkv, S, D], rotated at their positions, of the whole context.
            values: per layer [1, Hkv, S, Dv].
            queries: per layer [1, Hq, W, D], those of the last W = `window` tokens, rotated.
            tokens: int64 [S], the ids; kept for checks.
            progress: show a bar, where tqdm is installed.
            fingerprint: of the model; kept for checks.
            parameters: the fields of `Parameters`.

        Raises:
            ValueError, TypeError: an argument is not legal, or scores are not finite.
        """
        from .build import build_layers

        chosen = Parameters(**parameters)
        layers = build_layers(keys, values, queries, chosen, progress)
        return cls(layers, chosen, tokens, fingerprint).calibrated()

    def calibrated(self) -> SqueezedContext:
        """The same context with the thresholds that its parameters ask for."""
        return self.with_sparsity(self.parameters.sparsity)

    def with_sparsity(
        self, sparsity: float, coarse_sparsity: float | None = None
    ) -> SqueezedContext:
        """The same context with thresholds for another sparsity; nothing is clustered again."""
        coarse = self.parameters.coarse_sparsity if coarse_sparsity is None else coarse_sparsity
        chosen = replace(self.parameters, sparsity=sparsity, coarse_sparsity=coarse)
        counts = [_counts(x.offsets) for x in self.layers]
        value = threshold_of([x.scores for x in self.layers], counts, sparsity, "fine")
        found = {"threshold": torch.tensor(value, dtype=torch.float32)}
        if chosen.coarse is not None:
            parents = [x.offsets.gather(-1, x.children.long()).diff(dim=-1)[0] for x in self.layers]
            scores = [x.coarse_scores for x in self.layers]
            value = threshold_of(scores, parents, coarse if sparsity else 0, "coarse")
            found["coarse_threshold"] = torch.tensor(value, dtype=torch.float32)
        found = {name: x.to(self.layers[0].key.device) for name, x in found.items()}
        layers = tuple(x._replace(**found) for x in self.layers)
        return replace(self, layers=layers, parameters=chosen)

    @property
    def length(self) -> int:
        """Tokens of the context, S: the clustered ones and the window."""
        layer = self.layers[0]
        return layer.key.shape[2] + layer.window_key.shape[2]

    @property
    def threshold(self) -> float:
        """The global threshold; read from the device."""
        return self.layers[0].threshold.item()

    def to(self, device: Any) -> SqueezedContext:
        """The same context on another device."""
        layers = tuple(
            SqueezedLayer(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in layer))
            for layer in self.layers
        )
        tokens = None if self.tokens is None else self.tokens.to(device)
        return replace(self, layers=layers, tokens=tokens)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a readable header, at once or not at all."""
        from .file import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: Any = "cpu") -> SqueezedContext:
        """Reads a file of `save`; ValueError says what is wrong with a damaged or foreign one."""
        from .file import load

        return load(Path(path)).to(device)

    def summary(self) -> dict[str, Any]:
        """Shapes, parameters and sizes, for people and for the header of the file."""
        layer = self.layers[0]
        metadata = ("centroids", "log_counts", "offsets", "coarse_centroids", "coarse_log_counts",
                    "children", "order", "scores", "coarse_scores")  # fmt: skip
        sizes = {
            name: sum(x.nbytes for y in self.layers if (x := getattr(y, name)) is not None)
            for name in ("key", "value", *metadata)
        }
        kv = sizes["key"] + sizes["value"]
        return {
            "fingerprint": self.fingerprint,
            "layers": len(self.layers),
            "kv_heads": layer.key.shape[1],
            "query_heads": layer.scores.shape[0] if not layer.shared else None,
            "head_dim": layer.key.shape[3],
            "value_dim": layer.value.shape[3],
            "dtype": dtype_name(layer.key.dtype),
            "length": self.length,
            "clusters_per_layer": [x.centroids.shape[2] for x in self.layers],
            "coarse_clusters": None if layer.children is None else layer.children.shape[2] - 1,
            "threshold": self.threshold,
            "coarse_threshold": None
            if layer.coarse_threshold is None
            else layer.coarse_threshold.item(),
            "kv_bytes": kv,
            "metadata_bytes": sum(sizes.values()) - kv,
            "parameters": asdict(self.parameters),
        }


def _counts(offsets: torch.Tensor) -> torch.Tensor:
    """Keys per cluster [Hkv, K] from int32 [1, Hkv, K + 1]."""
    return offsets.diff(dim=-1)[0]


TENSORS = tuple(
    f
    for f in SqueezedLayer._fields
    if f not in ("shared", "scale", "threshold", "coarse_threshold")
)
PARAMETERS = tuple(f.name for f in fields(Parameters))

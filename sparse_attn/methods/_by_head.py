"""Options with a value for each query head, for methods whose operators take one for all heads.

The config's class names the option, `by_head: ClassVar[str]`, and calls these functions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..block_index import BlockIndex
from ..ops import _checks as check

MANY = 1024  # queries


def values(config: Any) -> tuple[Any, ...] | None:
    """The values of the option, one for each query head; None where one is for all."""
    given = getattr(config, config.by_head)
    if isinstance(getattr(type(config), config.by_head), tuple):  # one head's is a tuple itself
        return given if isinstance(given, tuple) and isinstance(given[0], tuple) else None
    return given if isinstance(given, tuple) else None


def each(config: Any) -> tuple[Any, ...]:
    """The values of the option, a single one where it is for all heads."""
    return values(config) or (getattr(config, config.by_head),)


def freeze(config: Any) -> None:
    """Makes tuples of the option's lists, which have no hash, and refuses none at all."""
    given = _tuples(getattr(config, config.by_head))
    if isinstance(given, tuple) and not given:
        raise ValueError(f"{config.by_head}: got no value, expected one, or one per query head")
    object.__setattr__(config, config.by_head, given)


def _tuples(x: Any) -> Any:
    return tuple(map(_tuples, x)) if isinstance(x, (list, tuple)) else x


def check_heads(config: Any, query: torch.Tensor) -> None:
    """Refuses other numbers of values than query has heads."""
    given = values(config)
    if given is not None:
        name = config.by_head
        check.same(name, "number of values", len(given), query.shape[1], "the heads of query")


def refuse_shared(config: Any, option: str, accepted: Any) -> None:
    """Refuses values by query head where an option lets query heads choose together."""
    if values(config) is not None and getattr(config, option) != accepted:
        raise ValueError(
            f"{config.by_head}: got one value per query head, but with {option}="
            f"{getattr(config, option)!r} they do not choose for themselves; expected one value "
            f"for all, or {option}={accepted!r}"
        )


def select(config: Any, query: torch.Tensor, key: torch.Tensor, **options: Any) -> BlockIndex:
    """What a config with `values` chooses.

    In as many calls as there are different values. Where there are many queries, the heads of a
    value choose alone, from copies of their keys. Else, and from pages, a copy would take longer
    than a choice: all heads choose by every value, and those of the value are taken. Nothing is
    read from the device nor copied to it.
    """
    check_heads(config, query)
    given, group = values(config), query.shape[1] // key.shape[1]
    alone = options.get("block_table") is None and _many(query)
    chosen: list[Any] = [None] * len(given)
    for value in dict.fromkeys(given):
        heads = [h for h, v in enumerate(given) if v == value]
        places, states = heads, (query, key)
        if alone and len(heads) < len(given):
            places = list(range(len(heads)))
            states = (_take(query, heads), _take(key, [h // group for h in heads]))
        index = replace(config, **{config.by_head: value}).select(*states, **options)
        for i, h in zip(places, heads, strict=True):
            chosen[h] = (index.indices[:, i : i + 1], index.counts[:, i : i + 1])
    width = max(indices.shape[-1] for indices, _ in chosen)
    return index._replace(
        indices=torch.cat([_widen(indices, width) for indices, _ in chosen], 1),
        counts=torch.cat([counts for _, counts in chosen], 1),
    )


def _many(query: torch.Tensor) -> bool:
    """In an exported program no: it may not depend on the length."""
    return not torch.compiler.is_exporting() and query.shape[2] >= MANY


def _take(x: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """Some heads of [B, H, T, D]; a list as an index would be copied to the device."""
    return torch.cat([x[:, h : h + 1] for h in heads], 1)


def _widen(indices: torch.Tensor, width: int) -> torch.Tensor:
    """Not padded by 0, which would bound the lengths of an exported program."""
    missing = width - indices.shape[-1]
    return F.pad(indices, (0, missing)) if missing else indices

"""The public functions: attention, select, explain, backends, info."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from . import _ext, cpu_isa
from .block_index import BlockIndex
from .crossover import dense_is_faster
from .methods import METHODS, resolve
from .methods.dense import Dense
from .ops import _checks as check
from .ops.block_sparse_attention import op as attend
from .registry import BACKENDS, OPS, Op, requested


class Stats(NamedTuple):
    """What a call did.

    Attributes:
        method: its name, or "index".
        backend: the one that attended.
        density: share of the visible blocks that was computed.
        fallback: why the dense path was taken, None if it was not.
        selected_by: the backend that chose the blocks, None where no operator chose any.
    """

    method: str
    backend: str
    density: float
    fallback: str | None
    selected_by: str | None


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    method: Any = "flex_prefill",
    *,
    index: BlockIndex | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
    fallback: bool = True,
    return_lse: bool = False,
    return_stats: bool = False,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> Any:
    """Sparse attention by a method, or over a given index.

    Differentiable with respect to query, key and value, as attention to the blocks chosen.

    Args:
        query: [B, Hq, Tq, D] float32, float16 or bfloat16, any strides.
        key: [B, Hkv, Tk, D]; query head h reads KV head h // (Hq // Hkv).
        value: [B, Hkv, Tk, Dv].
        method: a name or a config such as `FlexPrefill(gamma=0.9)`.
        index: attend to these blocks instead of selecting any; `method` is not used. A batch of 1
            serves every batch.
        causal: query i stands at position Tk - Tq + i and sees keys up to itself (bottom-right
            aligned, unlike torch's `is_causal`).
        scale: multiplies query @ key; None for 1 / sqrt(D).
        backend: one of "cpp", "triton", "cuda", "reference"; None chooses. Never falls back.
        fallback: take the dense path where it is known to be faster.
        return_lse: also return the log-sum-exp, float32 [B, Hq, Tq], natural log.
        return_stats: also return `Stats`; reads the index on the host.
        block_table: int32 [B, pages of a sequence]: key and value are pages, [pages, Hkv,
            page_size, D], and token t of sequence b lies in page block_table[b, t // page_size].
            With `index` or the methods "dense", "hip" and "infinite_hip"; no gradient.
            docs/ops/block_sparse_attention.md.
        kv_lengths: int32 [B], how many keys each sequence has of those there is room for; Tk
            above. As `block_table`.

    Returns:
        out [B, Hq, Tq, Dv] in query's dtype, then lse and stats if asked for.

    Raises:
        ValueError, TypeError: an argument is not legal; the message names it.
        NotImplementedError: no backend, or not the one asked for, can serve the call.
    """
    query, key, value = attend.cast(query, key, value)
    cache = _cache(block_table, kv_lengths)
    capacity = _check(query, key, value, causal, scale, cache)
    backend = requested(backend)
    if return_stats:
        _not_in_a_graph()
    why_dense = selector = None
    dense = False
    if index is not None:
        _spelt(method)
        chosen, name = _given(index, query), "index"
    else:
        config = _able(method, query, key, causal, cache)
        name = config.name
        why_dense = dense_because(config, query, key, capacity, fallback, backend)
        config = config if why_dense is None else Dense()
        dense = isinstance(config, Dense)
        selector = None if dense else config.selector(query, key, causal, scale, **cache)
        chosen = _choose(config, query, key, causal, scale, backend, cache, capacity)
    if cache and return_stats and not dense:
        raise NotImplementedError(
            "return_stats: no density is computed for a choice with block_table or kv_lengths"
        )
    args = _arguments(query, key, value, chosen, causal, scale, cache)
    out, lse = attend(*args, backend=backend)
    more: list[Any] = [lse] if return_lse else []
    if return_stats:
        served_by = attend.select(args, backend).backend
        density = chosen.density(query.shape[2], capacity, causal)
        selected_by = selector and selector[0].select(selector[1], backend).backend
        more.append(Stats(name, served_by, density, why_dense, selected_by))
    return (out, *more) if more else out


def _cache(block_table: Any, kv_lengths: Any) -> dict[str, Any]:
    """The arguments of a cache, none where there is none."""
    if block_table is None and kv_lengths is None:
        return {}
    return {"block_table": block_table, "kv_lengths": kv_lengths}


def _check(query: Any, key: Any, value: Any, causal: Any, scale: Any, cache: dict[str, Any]) -> int:
    """The checks of arguments before any choice; returns how many keys there is room for."""
    capacity = check.cache(query, key, value, **cache)
    if value is None:
        raise TypeError("value: expected a tensor [B, Hkv, Tk, Dv], got None")
    check.boolean("causal", causal)
    check.finite_scale(scale)
    if causal and not cache:
        check.layout(query, key)
    return capacity


def _not_in_a_graph() -> None:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break(
            msg="return_stats=True reads the index on the host, which a whole graph cannot: leave "
            "it out here, or compile with fullgraph=False"
        )


def _spelt(method: Any) -> None:
    """Refuses a method that is none, although an index takes its place."""
    if method is not None:
        resolve(method)


def _given(index: Any, query: torch.Tensor) -> BlockIndex:
    if not isinstance(index, BlockIndex):
        raise TypeError(f"index: expected a BlockIndex, got {type(index).__name__}")
    return index.expand(query.shape[0])


def _able(
    method: Any, query: torch.Tensor, key: torch.Tensor, causal: bool, cache: dict[str, Any]
) -> Any:
    """A method's config; NotImplementedError if it cannot serve the call."""
    config = resolve(method)
    reason = _why_not(config, query, key, causal, cache)
    if reason is not None:
        raise NotImplementedError(f"method {config.name!r} cannot serve this call: {reason}")
    return config


def _why_not(
    config: Any, query: torch.Tensor, key: torch.Tensor, causal: bool, cache: dict[str, Any]
) -> str | None:
    if cache and not (isinstance(config, Dense) or getattr(config, "takes_cache", False)):
        takes = (n for n, m in sorted(METHODS.items()) if getattr(m, "takes_cache", False))
        return (
            "it selects from keys in one piece, all there; with block_table or kv_lengths give an "
            f"index or one of the methods 'dense', {', '.join(map(repr, takes))}"
        )
    return config.why_not(query, key, causal)


def _choose(
    config: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    scale: float | None,
    backend: str | None,
    cache: dict[str, Any],
    capacity: int,
) -> BlockIndex:
    """What a method chooses, which has no gradient."""
    query, key = query.detach(), key.detach()
    if isinstance(config, Dense):
        # it knows nothing of caches: all keys, of which it sees a page
        return config.select(query, key)._replace(sink=capacity)
    return config.select(query, key, causal=causal, scale=scale, backend=backend, **cache)


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chosen: BlockIndex,
    causal: bool,
    scale: float | None,
    cache: dict[str, Any],
) -> tuple[Any, ...]:
    """The arguments of `block_sparse_attention`, all of them."""
    states = (query, key, value, *chosen.blocks)
    pages = (cache.get("block_table"), cache.get("kv_lengths"))
    return (*states, causal, chosen.sink, chosen.window, scale, *pages)


def dense_because(
    config: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    n_keys: int,
    fallback: bool,
    backend: str | None,
) -> str | None:
    """Why a call takes the dense path, None if it does not."""
    backend = requested(backend)
    if not fallback:
        return None
    least = getattr(config, "min_length", 0)
    if n_keys < least:
        return f"{n_keys} keys are fewer than min_length, {least}"
    return dense_is_faster(config.name, backend or _backend_for(query, key), query, n_keys)


def _backend_for(query: torch.Tensor, key: torch.Tensor) -> str:
    """The backend that attends where none was asked for, of those that may differ in speed."""
    for row in attend.impls:
        if row.is_for(query.device.type) and not row.missing and row.when(query, key, key) is True:
            return row.backend
    return "reference"


def select(
    query: torch.Tensor,
    key: torch.Tensor,
    method: Any = "flex_prefill",
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> BlockIndex:
    """What a method would attend to: look before you attend, reuse across steps or layers.

    The index holds the blocks and, for methods that have them, the sink and the window. Arguments
    and errors as of `attention`, but for the dense path: the method always chooses.
    """
    cache = _cache(block_table, kv_lengths)
    capacity = _check(query, key, key, causal, scale, cache)  # values would be like the keys
    backend = requested(backend)
    config = _able(method, query, key, causal, cache)
    return _choose(config, query, key, causal, scale, backend, cache, capacity)


def explain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    method: Any = "flex_prefill",
    *,
    index: BlockIndex | None = None,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
    fallback: bool = True,
    block_table: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
) -> str:
    """In words: what `attention` would do with these arguments, and why not otherwise.

    Arguments that are not legal raise the errors of `attention`; that nothing can serve the call
    is explained.
    """
    query, key, value = attend.cast(query, key, value)
    cache = _cache(block_table, kv_lengths)
    capacity = _check(query, key, value, causal, scale, cache)
    backend = requested(backend)
    if index is not None:
        _spelt(method)
        lines, chosen = ["over the index given"], _given(index, query)
    else:
        config = resolve(method)
        lines = [f"method {config.name}: {config}"]
        reason = _why_not(config, query, key, causal, cache)
        if reason is not None:
            return "\n".join([*lines, f"cannot serve this call: {reason}"])
        dense = dense_because(config, query, key, capacity, fallback, backend)
        if dense is not None:
            lines.append(f"takes the dense path: {dense} (fallback=False forces the method)")
        elif not isinstance(config, Dense):
            selector = config.selector(query, key, causal, scale, **cache)
            if selector is not None:
                lines += _explain_op(*selector, backend)
        # which backend attends does not depend on what was chosen
        chosen = _choose(Dense(), query, key, causal, scale, backend, cache, capacity)
    args = _arguments(query, key, value, chosen, causal, scale, cache)
    return "\n".join([*lines, *_explain_op(attend, args, backend)])


def _explain_op(op: Op, args: tuple[Any, ...], backend: str | None) -> list[str]:
    """An operator's backends: which one serves the call, and why not the others."""
    op.check(*args)
    reasons = op.reasons(args, asked=backend is not None)
    try:
        used = op.select(args, backend).backend
    except NotImplementedError:
        used = None
    spare = "could serve, is not preferred" if backend is None else f"{backend} was asked for"
    lines = [f"{op.name}:" if used else f"{op.name}: raises NotImplementedError"]
    for name in BACKENDS:
        lines.append(f"  {name}: {'used' if name == used else reasons[name] or spare}")
    return lines


def backends() -> dict[str, dict[str, str | None]]:
    """For each operator and backend None if it is ready on this machine, otherwise why not."""
    table: dict[str, dict[str, str | None]] = {}
    for name, op in sorted(OPS.items()):
        rows = {row.backend: row for row in op.impls}
        table[name] = {}
        for backend in BACKENDS:
            row = rows.get(backend)
            why = "not implemented for this operator" if row is None else row.missing
            if row is not None and row.device == "cuda" and not torch.cuda.is_available():
                why = why or "no CUDA device"
            table[name][backend] = why
    return table


def info() -> str:
    """Versions, the instruction set, and what each operator can run on; for bug reports."""
    from . import __version__

    lines = [f"sparse_attn {__version__}, torch {torch.__version__}"]
    lines.append(f"C++ extension: {_ext.cpp_missing or 'loaded'}")
    if _ext.cpp_missing is None:
        lines.append(
            f"instruction set: {cpu_isa.cpu_isa()} of {', '.join(cpu_isa.available())}; "
            f"{torch.get_num_threads()} threads"
        )
    cuda = _ext.cuda_extension_missing or f"loaded, for {_ext.cuda_archs()}"
    if _ext.cuda_extension_missing and not _ext.cuda_missing:
        cuda += "; CuPy compiles its kernels at their first call"
    lines.append(f"CUDA extension: {cuda}")
    lines.append(f"CUDA device: {torch.cuda.is_available()}")
    for name, row in backends().items():
        ready = [b for b, why in row.items() if why is None]
        lines.append(f"{name}: {', '.join(ready)}")
    return "\n".join(lines)

"""`python -m sparse_attn squeeze build | info | run`: prepare a text once, ask about it cheaply."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "demo" / "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="squeeze", required=True)
    build = commands.add_parser("build", help="cluster a text for a model and write a file")
    build.add_argument("file", type=Path, help="the file to write")
    _shared(build)
    build.add_argument("--length", type=int, default=8192, help="tokens of the text to take")
    build.add_argument("--window", type=int, default=100)
    build.add_argument("--clusters", type=float, default=0.05, help="per key")
    build.add_argument("--coarse", type=float, help="per key; two levels")
    build.add_argument("--sparsity", type=float, default=0.9, help="share of the keys to drop")
    build.add_argument("--shared", action="store_true", help="one choice per KV head")
    build.add_argument("--segment", type=int, help="cluster so many tokens at a time")
    build.add_argument("--iterations", type=int, default=20, help="of K-means")
    info = commands.add_parser("info", help="what a file holds")
    info.add_argument("file", type=Path)
    run = commands.add_parser("run", help="generate behind a prepared text")
    run.add_argument("file", type=Path)
    _shared(run)
    run.add_argument("--ask", help="what follows the text (default: its own next bytes)")
    run.add_argument("--tokens", type=int, default=48, help="to generate")
    run.add_argument("--sparsity", type=float, help="another than the file was built with")
    run.add_argument("--figure", type=Path, help="a picture of the keys kept per layer and head")


def _shared(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of a Llama-like model")
    parser.add_argument("--text", type=Path, help="a text file (default: Python's own sources)")


def run(args: argparse.Namespace) -> None:
    try:
        {"build": build, "info": info, "run": ask}[args.squeeze](args)
    except ModuleNotFoundError as error:
        hint = "" if "pip install" in str(error) else ": pip install 'sparse_attn[demo]'"
        raise SystemExit(f"{error}{hint}") from error
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def _load_model(folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, None for the byte-level demonstration model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        raise SystemExit(f"--model: no config.json in {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    has_tokenizer = any(folder.glob("tokenizer*"))
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None


def _writable(name: str, file: Path) -> None:
    if not file.absolute().parent.is_dir():
        raise SystemExit(f"{name}: no folder {file.absolute().parent}")
    if file.is_dir():
        raise SystemExit(f"{name}: got the folder {file}, expected a file")


def _encode(tokenizer: Any, text: bytes) -> list[int]:
    return list(text) if tokenizer is None else tokenizer.encode(text.decode(errors="replace"))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace") if tokenizer is None else tokenizer.decode(ids)


def build(args: argparse.Namespace) -> None:
    import torch

    from ..demo.text import corpus
    from ..integrations.squeezed import prepare
    from .context import Parameters

    names = ("window", "clusters", "coarse", "sparsity", "shared", "segment", "iterations")
    options = {name: getattr(args, name) for name in names}
    Parameters(**options)
    _writable("file", args.file)
    model, tokenizer = _load_model(args.model)
    ids = _encode(tokenizer, corpus(args.text))[: args.length]
    start = time.perf_counter()
    context = prepare(model, torch.tensor(ids), **options)
    context.save(args.file)
    seconds, size = time.perf_counter() - start, args.file.stat().st_size / 2**20
    print(f"{args.file}: {len(ids):,} tokens in {seconds:.1f} s, {size:.1f} MiB")


def info(args: argparse.Namespace) -> None:
    from .file import read_header

    header = read_header(args.file)
    for name, value in header.items():
        if name == "crc32":
            print(f"{name}: of {len(value)} tensors")
        elif name == "parameters":
            print("parameters:", *(f"  {k}: {v}" for k, v in value.items()), sep="\n")
        else:
            print(f"{name}: {value}")


def ask(args: argparse.Namespace) -> None:
    import torch

    if args.figure is not None:  # what is missing is said before the work, not after it
        import matplotlib.figure

        from ..plot import plot_kept

        _writable("--figure", args.figure)
        kinds = matplotlib.figure.Figure().canvas.get_supported_filetypes()
        if args.figure.suffix[1:].lower() not in kinds:
            raise SystemExit(
                f"--figure: got {args.figure}, expected a name that ends in one of {sorted(kinds)}"
            )
    from ..demo.text import corpus
    from ..integrations.squeezed import SqueezedCache, cache_argument
    from . import SqueezedContext

    context = SqueezedContext.load(args.file)
    if args.sparsity is not None:
        context = context.with_sparsity(args.sparsity)
    model, tokenizer = _load_model(args.model)
    if context.tokens is None:
        raise SystemExit(f"{args.file} holds no tokens: it was not written by `squeeze build`")
    if args.ask is None:
        more = _encode(tokenizer, corpus(args.text))[context.length :][:64]
    else:
        more = _encode(tokenizer, args.ask.encode())
    if not more:
        raise SystemExit("--text: nothing follows the prepared part; give --ask")
    ids = torch.cat([context.tokens, torch.tensor(more)])[None]
    cache, seconds = SqueezedCache(context, model), {}
    cache.check_ids(ids)
    for name, given in (("squeezed", cache), ("dense", None)):
        if name == "dense":
            model.set_attn_implementation("sdpa")
        start = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False,
            pad_token_id=0, **{cache_argument(model): given},
        )  # fmt: skip
        seconds[name] = time.perf_counter() - start
        answer = _decode(tokenizer, out[0, ids.shape[1] :].tolist())
        what = "squeezed" if name == "squeezed" else "dense, prompt included"
        print(f"{what}, {seconds[name]:.2f} s:\n{answer}\n")
    nominal = f"nominal {1 - context.parameters.sparsity:.0%}"
    print(f"{context.length:,} prepared tokens; keys kept, {nominal}:")
    for i, kept in enumerate(cache.kept()):
        prefill = "-" if kept.prefill is None else f"{kept.prefill:.1%}"
        decode = "-" if kept.decode is None else f"{kept.decode:.1%}"
        print(f"  layer {i}: input {prefill}, generated {decode}")
    if args.figure is not None:
        title = f"keys kept by the last token, of {context.length:,} ({nominal})"
        plot_kept([x.per_head for x in cache.kept()], title).savefig(args.figure, dpi=90)
        print(f"keys kept per layer and head: {args.figure}")

"""`python -m sparse_attn squeeze build | info | run`: prepare a text once, ask about it cheaply."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "demo" / "model"
NEXT = 64  # tokens of the text itself that follow the prepared part, without a question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="squeeze", required=True)
    build = commands.add_parser("build", help="cluster a text for a model and write a file")
    build.add_argument("file", type=Path, help="the file to write")
    _model(build)
    build.add_argument("--text", type=Path, help="a text file (default: Python's own sources)")
    for name, kind, default, what in (
        ("length", int, 8192, "tokens of the text to take, from its beginning"),
        ("window", int, 100, "last tokens, which are never clustered and always attended to"),
        ("clusters", float, 0.05, "clusters per token, above 0 to 1"),
        ("coarse", float, None, "clusters of clusters per token, for a lookup in two levels "
         "(such as 0.01; default: one level)"),
        ("sparsity", float, 0.9, "share of the tokens to drop, 0 to below 1"),
        ("segment", int, None, "cluster about so many tokens at a time, faster for a long text "
         "(such as 8192; default: all at once)"),
        ("iterations", int, 20, "rounds of K-means, at most"),
    ):  # fmt: skip
        shown = what if default is None else f"{what} (default: {default})"
        build.add_argument(f"--{name}", type=kind, default=default, help=shown)
    build.add_argument(
        "--shared", action="store_true",
        help="one choice of clusters per KV head (default: one per query head)",
    )  # fmt: skip
    info = commands.add_parser("info", help="what a file holds")
    info.add_argument("file", type=Path, help="a file of `squeeze build`")
    run = commands.add_parser("run", help="generate behind a prepared text")
    run.add_argument("file", type=Path, help="a file of `squeeze build`")
    _model(run)
    run.add_argument(
        "--ask", metavar="QUESTION",
        help=f"what follows the text (default: the next {NEXT} tokens of the text itself)",
    )  # fmt: skip
    run.add_argument(
        "--text", type=Path,
        help="without --ask: the text file that was built from (default: Python's own sources)",
    )  # fmt: skip
    run.add_argument("--tokens", type=int, default=48, help="how many to generate (default: 48)")
    run.add_argument(
        "--sparsity", type=float,
        help="share of the tokens to drop, 0 to below 1 (default: the file's)",
    )  # fmt: skip
    run.add_argument(
        "--figure", type=Path, help="a picture to write, of the keys kept per layer and head"
    )


def _model(parser: argparse.ArgumentParser) -> None:
    what = "folder of a Llama-like model (default: the demonstration model)"
    parser.add_argument("--model", type=Path, default=MODEL, help=what)


def run(args: argparse.Namespace) -> None:
    try:
        {"build": build, "info": info, "run": ask}[args.squeeze](args)
    except ModuleNotFoundError as error:
        hint = "" if "pip install" in str(error) else ": pip install 'sparse_attn[demo]'"
        raise SystemExit(f"{error}{hint}") from error
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from error


def _load_model(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, None for the byte-level demonstration model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (folder / "config.json").exists():
        raise SystemExit(f"--model: no config.json in {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    has_tokenizer = any(folder.glob("tokenizer*"))
    return model, AutoTokenizer.from_pretrained(folder) if has_tokenizer else None


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise SystemExit(f"{name}: got {value}, expected 1 or more")


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

    from ..cpu_isa import model_dtype
    from ..demo.text import corpus
    from ..integrations.squeezed import prepare
    from .context import Parameters

    names = ("window", "clusters", "coarse", "sparsity", "shared", "segment", "iterations")
    options = {name: getattr(args, name) for name in names}
    Parameters(**options)
    _positive("--length", args.length)
    _writable("file", args.file)
    text = corpus(args.text)
    model, tokenizer = _load_model(args.model, model_dtype())
    ids = _encode(tokenizer, text)[: args.length]
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

    _positive("--tokens", args.tokens)
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
    model, tokenizer = _load_model(args.model, context.layers[0].key.dtype)
    if context.tokens is None:
        raise SystemExit(f"{args.file} holds no tokens: it was not written by `squeeze build`")
    if args.ask is None:
        text = _encode(tokenizer, corpus(args.text))[: context.length + NEXT]
        more = text[context.length :]
        if text[: context.length] != context.tokens.tolist():
            raise SystemExit(
                f"--text: {args.text or 'the default text'} does not begin as the one that "
                f"{args.file} was built from; give that one, or a question with --ask"
            )
        if not more:
            raise SystemExit("--text: nothing follows the prepared part; give --ask")
    else:
        more = _encode(tokenizer, args.ask.encode())
        if not more:
            raise SystemExit("--ask: got an empty question, expected a text")
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

"""`python -m sparse_attn demo`: a long real text through a small model, dense and sparse."""

from __future__ import annotations

import argparse
from pathlib import Path

MODEL = Path(__file__).parents[2] / "demo" / "model"
LENGTHS = (4096, 8192, 16384, 32768)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", nargs="+", help="names of methods (default: all)")
    parser.add_argument("--text", type=Path, help="a text file (default: Python's own sources)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        help="folder for the pictures (default: %(default)s)",
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+",
        help=f"bytes per prompt (default: those of {' '.join(map(str, LENGTHS))} that take no more "
        "than a few minutes on this machine)",
    )  # fmt: skip
    parser.add_argument(
        "--model", type=Path, default=MODEL,
        help="folder of a byte-level Llama (default: demo/model of the checkout)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3,
        help="timed runs, in turn over the methods; one where a turn takes more than 15 s, the "
        "first, untimed elsewhere, where it takes more than 60 s (default: %(default)s)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    if not (args.model / "config.json").exists():
        raise SystemExit(
            f"no model in {args.model}: the demonstration model is in the git checkout under "
            "demo/model; give its folder with --model"
        )
    if args.repeats < 1:
        raise SystemExit(f"--repeats: got {args.repeats}, expected at least 1")
    try:
        from .measure import main
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'sparse_attn[demo]'") from error
    main(args)

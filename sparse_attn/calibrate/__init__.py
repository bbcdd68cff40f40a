"""`python -m sparse_attn calibrate`: searches an option of a method layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluate import DEMO_MODEL, add_place


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(DEMO_MODEL),
        help="folder or name of a causal language model of transformers (default: demo/model)",
    )  # fmt: skip
    parser.add_argument(
        "--method", required=True, help="a name, with options that stay as they are given"
    )
    parser.add_argument("--field", help="the option to search (default: the method's own)")
    parser.add_argument(
        "--values", type=float, nargs="+", help="values to try (default: the method's own)"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--mass", type=float, help="share of the attention to keep in each layer (default: 0.98)"
    )
    target.add_argument("--loss", type=float, help="bits per token that may be lost in the model")
    parser.add_argument("--heads", action="store_true", help="a value for each query head")
    parser.add_argument(
        "--length", type=int, default=4096, help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument("--text", type=Path, help="a text file (default: Python's own sources)")
    parser.add_argument(
        "--out", type=Path, default=Path("calibrated.json"),
        help="the file to write (default: %(default)s)",
    )  # fmt: skip
    add_place(parser)


def run(args: argparse.Namespace) -> None:
    try:
        from .search import main
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'sparse_attn[demo]'") from error
    main(args)

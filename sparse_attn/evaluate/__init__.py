"""`python -m sparse_attn evaluate`: what each method costs in quality and gains in time."""

from __future__ import annotations

import argparse
from pathlib import Path

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default=str(DEMO_MODEL),
        help="folder or name of a causal language model of transformers (default: demo/model)",
    )  # fmt: skip
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD",
        help="names, names with options such as flex_prefill:gamma=0.9,min_budget=256, or files "
        "that calibrate wrote; several settings of a method make a line (default: every method)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 2048, 4096],
        help="tokens per prompt (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--text", type=Path, help="a text file (default: Python's own sources)")
    parser.add_argument(
        "--out", type=Path, default=Path("evaluate_out"),
        help="folder for results.json and report.html; a run that was stopped goes on here "
        "(default: %(default)s)",
    )  # fmt: skip
    for name, default, what in (
        ("depths", 5, "how many depths needles lie at, evenly spaced"),
        ("samples", 4, "how many needles, keys, chains per prompt"),
        ("repeats", 3, "runs that are timed"),
        ("layer", 1, "whose heads are drawn"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)"
        )
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Where and in what the model runs."""
    parser.add_argument("--device", default=None, help="(default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"],
        help="of the weights (default: bfloat16; float32 on CPUs without AVX512-BF16 or AMX)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    for name, least in (("depths", 1), ("samples", 1), ("repeats", 1), ("layer", 0)):
        if getattr(args, name) < least:
            raise SystemExit(f"--{name}: got {getattr(args, name)}, expected at least {least}")
    try:
        from .measure import main
    except ImportError as error:
        raise SystemExit(f"{error}: pip install 'sparse_attn[demo]'") from error
    main(args)

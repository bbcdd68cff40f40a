"""`python -m sparse_attn info | demo | evaluate | calibrate`."""

from __future__ import annotations

import argparse

from . import info


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sparse_attn", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what this installation can run")
    from . import calibrate, demo, evaluate

    parts = {
        "demo": (demo, "a long text through a small language model"),
        "evaluate": (evaluate, "what methods cost and gain in a model: a report"),
        "calibrate": (calibrate, "searches a method's option layer by layer"),
    }
    for name, (part, what) in parts.items():
        part.add_arguments(commands.add_parser(name, help=what))
    args = parser.parse_args(argv)
    if args.command == "info":
        print(info())
    else:
        parts[args.command][0].run(args)


if __name__ == "__main__":
    main()
